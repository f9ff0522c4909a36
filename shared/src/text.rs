//! Small work on text for people.

/// Cuts a text to at most `max_bytes`, between two characters.
pub fn shorten(text: &mut String, max_bytes: usize) {
    let mut end = text.len().min(max_bytes);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    text.truncate(end);
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
}
