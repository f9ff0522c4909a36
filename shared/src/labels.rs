//! Names that people give, labels, and the patterns and selectors that choose by them.

use std::collections::BTreeMap;

/// Labels of a node: sorted, so that they print and compare the same everywhere.
pub type Labels = BTreeMap<String, String>;

/// Most labels one node may carry.
pub const MAX_LABELS: usize = 64;

/// Begins the key of every label that a node gave itself. Operators and invites set no such label, and
/// no operator's scope is made of one: a node must not be able to put itself into somebody's reach.
pub const SELF_LABEL_PREFIX: &str = "self/";

/// Why a name, label or selector is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum InvalidName {
    /// Not a node, workspace or operator name.
    #[error(
        "{0:?} is not a valid name: 1 to 63 of a-z, 0-9, '-', '_' and '.', starting with a letter or digit"
    )]
    Name(String),
    /// A name that would be taken for an id.
    #[error("{0:?} is an id: choose a name that is none")]
    Id(String),
    /// Not a label.
    #[error(
        "{0:?} is not a valid label: key=value, both of up to 63 letters, digits, '-', '_', '.' and '/', the key not empty"
    )]
    Label(String),
    /// More than [`MAX_LABELS`].
    #[error("more than {MAX_LABELS} labels")]
    TooMany,
}

/// Checks the name of a node, workspace or operator.
///
/// # Errors
/// If it is not 1 to 63 of `a-z 0-9 - _ .`, starting with a letter or digit.
pub fn check_name(name: &str) -> Result<(), InvalidName> {
    let valid = matches!(name.len(), 1..=63)
        && name.starts_with(|c: char| c.is_ascii_lowercase() || c.is_ascii_digit())
        && name.bytes().all(|b| {
            b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'-' | b'_' | b'.')
        });
    if valid { Ok(()) } else { Err(InvalidName::Name(name.to_owned())) }
}

/// Checks a name that is to be given.
///
/// # Errors
/// As [`check_name`], and if it is a UUID. One that was given before that was checked goes on being a name.
pub fn check_new_name(name: &str) -> Result<(), InvalidName> {
    check_name(name)?;
    if is_id(name) { Err(InvalidName::Id(name.to_owned())) } else { Ok(()) }
}

/// What looks like an id would be taken for whatever has that id.
fn is_id(name: &str) -> bool {
    uuid::Uuid::parse_str(name).is_ok()
}

/// Checks a label's key and value.
///
/// # Errors
/// See [`InvalidName::Label`].
pub fn check_label(key: &str, value: &str) -> Result<(), InvalidName> {
    let part = |text: &str| {
        text.len() <= 63
            && text
                .bytes()
                .all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.' | b'/'))
    };
    if !key.is_empty() && part(key) && part(value) {
        Ok(())
    } else {
        Err(InvalidName::Label(format!("{key}={value}")))
    }
}

/// Checks all labels of one owner.
///
/// # Errors
/// The first invalid label, or too many of them.
pub fn check_labels<'a>(
    labels: impl IntoIterator<Item = (&'a String, &'a String)>,
) -> Result<(), InvalidName> {
    for (count, (key, value)) in labels.into_iter().enumerate() {
        if count >= MAX_LABELS {
            return Err(InvalidName::TooMany);
        }
        check_label(key, value)?;
    }
    Ok(())
}

/// Makes a valid node name of a host name: lower case, everything else becomes `-`.
#[must_use]
pub fn name_from_hostname(hostname: &str) -> String {
    let mut name: String = hostname
        .chars()
        .map(|c| c.to_ascii_lowercase())
        .map(|c| if c.is_ascii_lowercase() || c.is_ascii_digit() || c == '.' { c } else { '-' })
        .skip_while(|c| !c.is_ascii_alphanumeric())
        .take(48)
        .collect();
    if name.is_empty() {
        name.push_str("node");
    } else if is_id(&name) {
        name.insert_str(0, "node-");
    }
    name
}

/// Whether `name` fits a shell pattern of `*` (any run) and `?` (any one character).
#[must_use]
pub fn pattern_matches(pattern: &str, name: &str) -> bool {
    let (pattern, name) = (pattern.as_bytes(), name.as_bytes());
    let (mut p, mut n) = (0, 0);
    // Where to go on if the run that the last `*` stands for has to be one longer.
    let mut retry: Option<(usize, usize)> = None;
    while n < name.len() {
        match pattern.get(p) {
            Some(b'*') => {
                retry = Some((p + 1, n));
                p += 1;
            }
            Some(&c) if c == b'?' || c == name[n] => {
                p += 1;
                n += 1;
            }
            _ => match retry {
                Some((after_star, start)) => {
                    retry = Some((after_star, start + 1));
                    p = after_star;
                    n = start + 1;
                }
                None => return false,
            },
        }
    }
    pattern[p..].iter().all(|&c| c == b'*')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_checked() {
        for good in ["a", "web-3", "0", "a.b_c", &"x".repeat(63)] {
            assert!(check_name(good).is_ok(), "{good}");
        }
        for bad in ["", "-a", "A", "a b", "a/b", "ä", &"x".repeat(64), "a\n"] {
            assert!(check_name(bad).is_err() && check_new_name(bad).is_err(), "{bad}");
        }
        let id = "0b8d1c3e-2f4a-4c6d-8e9f-a0b1c2d3e4f5";
        for id in [id, &id.replace('-', "")] {
            assert!(check_name(id).is_ok() && check_new_name(id).is_err(), "{id}");
        }
    }

    #[test]
    fn host_names_become_node_names() {
        let id = "0b8d1c3e-2f4a-4c6d-8e9f-a0b1c2d3e4f5";
        for (host, name) in [
            ("Build-Box_1.LAN", "build-box-1.lan"),
            ("--", "node"),
            ("", "node"),
            (id, &format!("node-{id}")),
        ] {
            assert_eq!(name_from_hostname(host), name);
            assert!(check_name(&name_from_hostname(host)).is_ok());
        }
    }

    #[test]
    fn patterns() {
        for (pattern, name, fits) in [
            ("web-*", "web-3", true),
            ("web-*", "wep-3", false),
            ("*", "", true),
            ("a?c", "abc", true),
            ("a?c", "ac", false),
            ("*b*b", "abab", true),
            ("*b*c", "abab", false),
            ("", "a", false),
        ] {
            assert_eq!(pattern_matches(pattern, name), fits, "{pattern} {name}");
        }
    }
}
