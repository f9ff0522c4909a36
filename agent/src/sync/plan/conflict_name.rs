//! Names of conflict copies: `stem.conflict-<hash>.ext`.
//!
//! The name comes from the content of the loser, not from a clock or a node, so two members with the
//! same losing content make one and the same copy. A copy of a copy gets a name of its own content
//! beside the first one, never a second marker.

use cortex_shared::entry::{Digest, Entry};
use cortex_shared::wire_path::{MAX_NAME_BYTES, WirePath};

const MARKER: &[u8] = b".conflict-";
/// Hexadecimal digits of the shortest name; longer ones are used if it is taken by other content.
const SHORTEST_DIGITS: usize = 8;
const LONGEST_DIGITS: usize = 64;
/// Longest extension that is kept behind the marker.
const MAX_EXTENSION_BYTES: usize = 64;

/// What identifies the losing content.
fn loser_digest(loser: &Entry) -> Digest {
    match loser {
        Entry::File(file) => file.content,
        Entry::Link { .. } | Entry::Dir => loser.identity(),
    }
}

/// Possible paths of the conflict copy of `loser`, which stood at `path`, best first. Empty only if
/// the path is too long for any of them.
pub(in crate::sync) fn candidates(
    path: &WirePath,
    loser: &Entry,
) -> impl Iterator<Item = WirePath> {
    let hex = loser_digest(loser).to_string();
    let original = original_name(path.name()).unwrap_or_else(|| path.name().to_vec());
    let parent = path.parent();
    let own = path.clone();
    (SHORTEST_DIGITS..=LONGEST_DIGITS)
        .step_by(4)
        .filter_map(move |digits| {
            let name = copy_name(&original, hex.as_bytes().get(..digits)?);
            match &parent {
                Some(parent) => parent.join(&name).ok(),
                None => WirePath::new(name).ok(),
            }
        })
        .filter(move |candidate| *candidate != own)
}

/// The path that `path` is a conflict copy of, if it is the untouched copy of a loser: its name holds
/// the digest of its content.
pub(in crate::sync) fn conflict_of(path: &WirePath, entry: &Entry) -> Option<WirePath> {
    let (_, digits, _) = split_marker(path.name())?;
    if !loser_digest(entry).to_string().as_bytes().starts_with(digits) {
        return None;
    }
    let original = original_name(path.name())?;
    match path.parent() {
        Some(parent) => parent.join(&original).ok(),
        None => WirePath::new(original).ok(),
    }
}

fn copy_name(original: &[u8], digits: &[u8]) -> Vec<u8> {
    let (stem, extension) = split_extension(original);
    let room = MAX_NAME_BYTES - MARKER.len() - digits.len() - extension.len();
    let mut cut = stem.len().min(room);
    // Not in the middle of a UTF-8 sequence, if it is one.
    while cut > 0 && cut < stem.len() && stem[cut] & 0xc0 == 0x80 && cut + 3 > stem.len().min(room)
    {
        cut -= 1;
    }
    [&stem[..cut], MARKER, digits, extension].concat()
}

/// Stem and extension, the latter with its dot. A leading dot begins no extension.
fn split_extension(name: &[u8]) -> (&[u8], &[u8]) {
    match name.iter().rposition(|&b| b == b'.') {
        Some(dot) if dot > 0 && name.len() - dot <= MAX_EXTENSION_BYTES => name.split_at(dot),
        _ => (name, b""),
    }
}

/// Splits a conflict copy's name into what stands before the marker, the digits, and the rest.
fn split_marker(name: &[u8]) -> Option<(&[u8], &[u8], &[u8])> {
    let start = name.windows(MARKER.len()).rposition(|window| window == MARKER)?;
    let (stem, rest) = (&name[..start], &name[start + MARKER.len()..]);
    let digits =
        rest.iter().take_while(|b| b.is_ascii_digit() || (b'a'..=b'f').contains(b)).count();
    let (digits, extension) = rest.split_at(digits);
    let plausible = (SHORTEST_DIGITS..=LONGEST_DIGITS).contains(&digits.len())
        && (extension.is_empty() || extension[0] == b'.');
    plausible.then_some((stem, digits, extension))
}

fn original_name(name: &[u8]) -> Option<Vec<u8>> {
    let (stem, _, extension) = split_marker(name)?;
    let original = [stem, extension].concat();
    (!original.is_empty()).then_some(original)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn link(target: &str) -> Entry {
        Entry::Link { target: target.as_bytes().into() }
    }

    fn first(path: &[u8]) -> WirePath {
        candidates(&WirePath::new(path).unwrap(), &link("x")).next().unwrap()
    }

    #[test]
    fn marker_stands_before_the_extension_and_never_twice() {
        let hash = link("x").identity().short_hex(4);
        for (path, name) in [
            ("a.txt", format!("a.conflict-{hash}.txt")),
            ("d/a", format!("d/a.conflict-{hash}")),
            (".bashrc", format!(".bashrc.conflict-{hash}")),
            ("a.tar.gz", format!("a.tar.conflict-{hash}.gz")),
            ("a.conflict-0123abcd.txt", format!("a.conflict-{hash}.txt")),
        ] {
            assert_eq!(first(path.as_bytes()).to_string(), name);
        }
    }

    #[test]
    fn long_names_are_cut_to_fit_and_stay_valid() {
        for stem in ["x".repeat(255), "ä".repeat(127), format!("{}.txt", "ä".repeat(125))] {
            for candidate in candidates(&WirePath::new(stem.as_str()).unwrap(), &link("x")) {
                assert!(candidate.name().len() <= MAX_NAME_BYTES);
                assert!(std::str::from_utf8(candidate.name()).is_ok(), "{candidate}");
            }
        }
    }

    #[test]
    fn an_untouched_copy_tells_what_it_is_a_copy_of() {
        let path = WirePath::new("d/a.txt").unwrap();
        let copy = candidates(&path, &link("x")).next().unwrap();
        assert_eq!(conflict_of(&copy, &link("x")), Some(path.clone()));
        assert_eq!(conflict_of(&copy, &link("edited")), None);
        assert_eq!(conflict_of(&path, &link("x")), None);
    }

    #[test]
    fn a_copy_is_never_its_own_candidate() {
        let copy = first(b"a.txt");
        let next = candidates(&copy, &link("x")).next().unwrap();
        assert_ne!(next, copy);
        assert_eq!(conflict_of(&next, &link("x")).unwrap().to_string(), "a.txt");
    }
}
