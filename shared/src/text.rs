//! Small work on text for people.

/// Cuts a text to at most `max_bytes`, between two characters.
pub fn shorten(text: &mut String, max_bytes: usize) {
    let mut end = text.len().min(max_bytes);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.truncate(end);
}

/// Bytes as lower-case hexadecimal.
#[must_use]
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Whether a character shows as itself: neither a control character nor one that only changes how
/// others are shown (direction, joining, tags) or is not shown at all. With those, text from
/// elsewhere can look like something it is not.
#[must_use]
pub fn is_printable(c: char) -> bool {
    !c.is_control() && !is_format(c)
}

/// Unicode's general categories Cf (format), Zl and Zp (separators of lines and paragraphs).
fn is_format(c: char) -> bool {
    matches!(u32::from(c),
        0xAD | 0x600..=0x605 | 0x61C | 0x6DD | 0x70F | 0x890..=0x891 | 0x8E2 | 0x180E
        | 0x200B..=0x200F | 0x2028..=0x202E | 0x2060..=0x206F | 0xFEFF | 0xFFF9..=0xFFFB
        | 0x110BD | 0x110CD | 0x13430..=0x1343F | 0x1BCA0..=0x1BCA3 | 0x1D173..=0x1D17A
        | 0xE0000..=0xE007F)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_changes_how_other_characters_look_is_not_printable() {
        for c in ['a', ' ', 'ä', '中', 'א', '…', '🙂', '\u{301}'] {
            assert!(is_printable(c), "{c:?}");
        }
        for c in "\u{0}\n\u{1b}\u{7f}\u{9b}\u{ad}\u{200b}\u{200f}\u{2028}\u{202e}\u{2066}\u{feff}\u{e0041}"
            .chars()
        {
            assert!(!is_printable(c), "{c:?}");
        }
    }

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
}
