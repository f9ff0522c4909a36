//! Changing a setting in a file that somebody else keeps: one line, and nothing else of it.

use toml::{Table, Value};

/// The text of a configuration with this setting in it. Comments, order and every other setting stay.
///
/// # Errors
/// What is wrong, for people, if the text is no configuration, or says this setting in a way that cannot be
/// changed by a line.
pub fn with_setting(text: &str, name: &str, value: &str) -> Result<String, String> {
    let parse = |text: &str| text.parse::<Table>().map_err(|error| error.to_string());
    let mut wanted = parse(text)?;
    if wanted.get(name).and_then(Value::as_str) == Some(value) {
        return Ok(text.to_owned());
    }
    wanted.insert(name.to_owned(), Value::String(value.to_owned()));
    let row = format!("{name} = {}", Value::String(value.to_owned()));
    let mut lines: Vec<String> = text.lines().map(str::to_owned).collect();
    let says = |line: &str| is_row(line, name);
    let offers = |line: &str| line.trim_start().strip_prefix('#').is_some_and(says);
    match lines.iter().position(|line| says(line)) {
        Some(at) => lines[at] = format!("{row}{}", comment_of(&lines[at])),
        // As the file is made: the default, commented out.
        None => match lines.iter().position(|line| offers(line)) {
            Some(at) => lines[at] = row,
            None => lines.push(row),
        },
    }
    let changed = lines.join("\n") + "\n";
    // Whatever a line may be a part of, such as a text of several lines: the result says whether it was one.
    if parse(&changed).ok().as_ref() == Some(&wanted) {
        Ok(changed)
    } else {
        Err(format!("set {name} = {} there by hand", Value::String(value.to_owned())))
    }
}

/// Whether a line begins with this key.
fn is_row(line: &str, name: &str) -> bool {
    let rest = line.trim_start().strip_prefix(name);
    rest.is_some_and(|rest| rest.trim_start().starts_with('='))
}

/// The comment at the end of a row, with the space before it.
fn comment_of(line: &str) -> &str {
    let ends = line.match_indices('#').map(|(at, _)| line[..at].trim_end());
    // The first that leaves a row, and not half a text.
    let row = ends.into_iter().find(|row| row.parse::<Table>().is_ok());
    row.map_or("", |row| &line[row.len()..])
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::config::{HubConfig, settings};

    #[test]
    fn one_line_changes_and_the_rest_stays() {
        for (text, expected) in [
            ("", "grpc = \"new\"\n"),
            ("# mine\nlog = \"info\"\n", "# mine\nlog = \"info\"\ngrpc = \"new\"\n"),
            ("grpc = \"old\" # why #1\nlog = \"x\"\n", "grpc = \"new\" # why #1\nlog = \"x\"\n"),
            ("grpc=\"o#ld\"\n", "grpc = \"new\"\n"),
            ("# What it is.\n# grpc = \"default\"\n", "# What it is.\ngrpc = \"new\"\n"),
            ("# grpc = \"default\"\ngrpc = 'mine'", "# grpc = \"default\"\ngrpc = \"new\"\n"),
            ("grpc_more = \"old\"\n", "grpc_more = \"old\"\ngrpc = \"new\"\n"),
            ("  grpc = \"new\"   # kept as it is", "  grpc = \"new\"   # kept as it is"),
        ] {
            assert_eq!(with_setting(text, "grpc", "new").as_deref(), Ok(expected), "{text}");
        }
    }

    #[test]
    fn what_is_no_line_of_its_own_is_left_to_people() {
        for text in [
            "log = \"\"\"\ngrpc = \"in a text\"\n\"\"\"\n",
            "\"grpc\" = \"old\"\n",
            "[table]\nx = 1\n",
        ] {
            assert!(with_setting(text, "grpc", "new").unwrap_err().contains("by hand"), "{text}");
        }
        assert!(with_setting("grpc = \n", "grpc", "new").is_err());
    }

    proptest! {
        #[test]
        fn the_printed_file_with_any_setting_changed_says_that_and_nothing_else(
            at in 0..settings::SETTINGS.len(),
            value in "[ -~]{0,20}",
        ) {
            let text = settings::document(&HubConfig::new("/data".into()));
            let name = settings::SETTINGS[at].name;
            let changed = with_setting(&text, name, &value).unwrap();
            let parsed: Table = changed.parse().unwrap();
            prop_assert_eq!(parsed.get(name).and_then(Value::as_str), Some(value.as_str()));
            prop_assert_eq!(parsed.len(), text.parse::<Table>().unwrap().len().max(1));
            let same = text.lines().zip(changed.lines()).filter(|(old, new)| old == new).count();
            prop_assert!(same + 1 >= text.lines().count());
        }
    }
}
