//! Entries as they rest in the index.

use cortex_shared::chunk::Recipe;
use cortex_shared::entry::{Digest, Entry, File, Kind};

const FILE_HEADER_BYTES: usize = 1 + 32 + 8 + 8;

/// Kind, then for a file its content, size, time and recipe, for a link its target.
pub(super) fn encode(entry: &Entry) -> Vec<u8> {
    let mut bytes = vec![entry.kind() as u8];
    match entry {
        Entry::File(file) => {
            bytes.extend_from_slice(file.content.as_bytes());
            bytes.extend_from_slice(&file.size.to_be_bytes());
            bytes.extend_from_slice(&file.mtime_ns.to_be_bytes());
            bytes.extend_from_slice(&file.recipe.encode());
        }
        Entry::Link { target } => bytes.extend_from_slice(target),
        Entry::Dir => {}
    }
    bytes
}

/// The inverse; `None` if the bytes are not an encoded entry.
pub(super) fn decode(bytes: &[u8]) -> Option<Entry> {
    let (&kind, rest) = bytes.split_first()?;
    let entry = if kind == Kind::File as u8 || kind == Kind::ExecutableFile as u8 {
        let (header, recipe) = rest.split_at_checked(FILE_HEADER_BYTES - 1)?;
        let size = u64::from_be_bytes(header[32..40].try_into().ok()?);
        Entry::File(File {
            content: Digest::from_slice(&header[..32])?,
            size,
            executable: kind == Kind::ExecutableFile as u8,
            mtime_ns: i64::from_be_bytes(header[40..48].try_into().ok()?),
            recipe: Recipe::parse(recipe, size).ok()?,
        })
    } else if kind == Kind::Link as u8 {
        Entry::Link { target: rest.into() }
    } else if kind == Kind::Dir as u8 && rest.is_empty() {
        Entry::Dir
    } else {
        return None;
    };
    entry.check().ok()?;
    Some(entry)
}

#[cfg(test)]
mod tests {
    use cortex_shared::chunk::ChunkRef;

    use super::*;

    #[test]
    fn every_kind_of_entry_returns_and_damage_is_noticed() {
        let chunk = ChunkRef { hash: Digest::of(b"c"), len: 7 };
        let file = |executable, recipe: Vec<ChunkRef>| {
            Entry::File(File {
                content: Digest::of(b"content"),
                size: 7 * recipe.len().max(1) as u64,
                executable,
                mtime_ns: -5,
                recipe: Recipe(recipe),
            })
        };
        for entry in [
            file(false, vec![]),
            file(true, vec![chunk, chunk]),
            Entry::Link { target: b"t\xff"[..].into() },
            Entry::Dir,
        ] {
            let bytes = encode(&entry);
            assert_eq!(decode(&bytes).as_ref(), Some(&entry));
            assert_ne!(decode(&bytes[..bytes.len() - 1]), Some(entry));
        }
        assert_eq!(decode(b""), None);
        assert_eq!(decode(b"\x09"), None);
    }
}
