//! Small work on text for people.

/// Cuts a text to at most `max_bytes`, between two characters.
pub fn shorten(text: &mut String, max_bytes: usize) {
    let mut end = text.len().min(max_bytes);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.truncate(end);
}

/// Whether a character may change how the text around it looks, rather than show itself: control
/// characters, and those that only direct or format, such as an override of the direction of writing.
#[must_use]
pub fn is_invisible(c: char) -> bool {
    c.is_control()
        || matches!(c,
            '\u{ad}' | '\u{61c}' | '\u{180e}' | '\u{feff}' | '\u{200b}'..='\u{200f}'
            | '\u{2028}'..='\u{202e}' | '\u{2060}'..='\u{206f}' | '\u{fff9}'..='\u{fffb}'
            | '\u{e0000}'..='\u{e007f}')
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn characters_are_not_cut_in_half() {
        for (text, max_bytes, rest) in
            [("abc", 9, "abc"), ("abc", 2, "ab"), ("aä", 2, "a"), ("ä", 1, ""), ("", 0, "")]
        {
            let mut text = text.to_owned();
            shorten(&mut text, max_bytes);
            assert_eq!(text, rest);
        }
    }

    #[test]
    fn what_only_changes_how_other_text_looks_is_invisible() {
        for c in ['\u{202e}', '\u{2066}', '\u{200f}', '\u{feff}', '\u{1b}', '\n', '\u{e0041}'] {
            assert!(is_invisible(c), "{c:?}");
        }
        for c in ['a', ' ', 'ä', '漢', 'א', '…', '🙂'] {
            assert!(!is_invisible(c), "{c:?}");
        }
    }
}
