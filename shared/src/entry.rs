//! What stands at a path of a workspace, and the digests that tell two trees apart.
//!
//! Identity is kind, content and executable bit (or link target); the modification time is carried
//! along but is not identity, so touching a file changes nothing. A directory's digest covers its
//! children's names, kinds and digests, so equal root digests mean equal trees, and two trees that
//! differ are compared by descending only where digests differ.

use crate::chunk::{ChunkRef, InvalidRecipe, Recipe};
use crate::text::hex;
use crate::wire_path::WirePath;

/// Longest link target, the kernel's `PATH_MAX`.
pub const MAX_LINK_TARGET_BYTES: usize = 4096;

/// A BLAKE3 digest of content or of a tree.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Digest([u8; 32]);

impl Digest {
    /// The digest of nothing: 32 zero bytes, the root digest of a workspace without any version.
    pub const ZERO: Self = Self([0; 32]);

    /// Takes 32 bytes as a digest.
    #[must_use]
    pub const fn from_bytes(bytes: [u8; 32]) -> Self {
        Self(bytes)
    }

    /// Reads a digest from the wire or the store; `None` unless there are 32 bytes.
    #[must_use]
    pub fn from_slice(bytes: &[u8]) -> Option<Self> {
        bytes.try_into().ok().map(Self)
    }

    /// BLAKE3 of `data`.
    #[must_use]
    pub fn of(data: &[u8]) -> Self {
        Self(*blake3::hash(data).as_bytes())
    }

    /// The 32 bytes.
    #[must_use]
    pub const fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }

    /// The first `bytes` bytes as lower-case hexadecimal.
    #[must_use]
    pub fn short_hex(&self, bytes: usize) -> String {
        hex(&self.0[..bytes.min(self.0.len())])
    }
}

impl From<blake3::Hash> for Digest {
    fn from(hash: blake3::Hash) -> Self {
        Self(*hash.as_bytes())
    }
}

impl std::fmt::Display for Digest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.short_hex(32))
    }
}

impl std::fmt::Debug for Digest {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.short_hex(6))
    }
}

/// A regular file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct File {
    /// BLAKE3 of the whole content.
    pub content: Digest,
    /// Length of the content in bytes.
    pub size: u64,
    /// Whether the owner may execute it: the only permission that is synced.
    pub executable: bool,
    /// Modification time at its source, nanoseconds since the Unix epoch. Not identity.
    pub mtime_ns: i64,
    /// How the content is cut; see [`Recipe`].
    pub recipe: Recipe,
}

impl File {
    /// The chunks of the content in order: those of the recipe, or the content itself where it is a
    /// single chunk. None for empty content.
    pub fn chunks(&self) -> impl Iterator<Item = ChunkRef> + '_ {
        // A size beyond a chunk's without a recipe is refused by `Entry::check`.
        let single = (self.recipe.is_empty() && self.size > 0).then(|| ChunkRef {
            hash: self.content,
            len: u32::try_from(self.size).unwrap_or(u32::MAX),
        });
        self.recipe.0.iter().copied().chain(single)
    }
}

/// Why something cannot be an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InvalidEntry {
    /// The recipe does not fit the content.
    #[error("invalid recipe: {0}")]
    Recipe(#[from] InvalidRecipe),
    /// Empty content with the hash of other content, or a size without content.
    #[error("content hash and size contradict each other")]
    EmptyContent,
    /// A link target that is empty, too long, or holds a NUL byte.
    #[error("link target is empty, longer than {MAX_LINK_TARGET_BYTES} bytes, or holds a NUL byte")]
    LinkTarget,
}

/// What stands at a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Entry {
    /// A regular file.
    File(File),
    /// A symbolic link, with the bytes of its target. Never followed.
    Link {
        /// 1 to [`MAX_LINK_TARGET_BYTES`] bytes without NUL.
        target: Box<[u8]>,
    },
    /// A directory.
    Dir,
}

/// The kind of an entry, as it enters digests and rests in stores.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Kind {
    /// A regular file that may not be executed.
    File = 1,
    /// A regular file that may be executed.
    ExecutableFile = 2,
    /// A symbolic link.
    Link = 3,
    /// A directory.
    Dir = 4,
}

impl Entry {
    /// Checks what came from outside.
    ///
    /// # Errors
    /// See [`InvalidEntry`].
    pub fn check(&self) -> Result<(), InvalidEntry> {
        match self {
            Self::File(file) => {
                file.recipe.check(file.size)?;
                if (file.size == 0) == (file.content == Digest::of(b"")) {
                    Ok(())
                } else {
                    Err(InvalidEntry::EmptyContent)
                }
            }
            Self::Link { target } => {
                let fits = (1..=MAX_LINK_TARGET_BYTES).contains(&target.len());
                if fits && !target.contains(&0) { Ok(()) } else { Err(InvalidEntry::LinkTarget) }
            }
            Self::Dir => Ok(()),
        }
    }

    /// The kind, executable bit included.
    #[must_use]
    pub fn kind(&self) -> Kind {
        match self {
            Self::File(File { executable: false, .. }) => Kind::File,
            Self::File(File { executable: true, .. }) => Kind::ExecutableFile,
            Self::Link { .. } => Kind::Link,
            Self::Dir => Kind::Dir,
        }
    }

    /// Whether this is a directory.
    #[must_use]
    pub fn is_dir(&self) -> bool {
        matches!(self, Self::Dir)
    }

    /// The digest by which compare-and-set tells entries apart. That of a directory is the same for
    /// every directory, whatever it holds: its children are entries of their own.
    #[must_use]
    pub fn identity(&self) -> Digest {
        let mut hasher = blake3::Hasher::new_derive_key("cortex.v1 entry identity");
        hasher.update(&[self.kind() as u8]);
        match self {
            Self::File(file) => hasher.update(file.content.as_bytes()),
            Self::Link { target } => hasher.update(target),
            Self::Dir => &mut hasher,
        };
        hasher.finalize().into()
    }

    /// Whether this is a link whose target is absolute, or leaves the root of the paths as written, where
    /// it stands at `path`.
    #[must_use]
    pub fn leads_outside(&self, path: &WirePath) -> bool {
        let Self::Link { target } = self else { return false };
        if target.first() == Some(&b'/') {
            return true;
        }
        // Directories above the link, which `..` may use up.
        let mut depth = path.depth() - 1;
        for component in target.split(|&byte| byte == b'/') {
            match component {
                b"" | b"." => {}
                b".." => match depth.checked_sub(1) {
                    Some(less) => depth = less,
                    None => return true,
                },
                _ => depth += 1,
            }
        }
        false
    }

    /// Whether two entries are the same but for their modification time.
    #[must_use]
    pub fn same_identity(&self, other: &Self) -> bool {
        match (self, other) {
            (Self::File(a), Self::File(b)) => {
                a.content == b.content && a.executable == b.executable
            }
            (Self::Link { target: a }, Self::Link { target: b }) => a == b,
            (Self::Dir, Self::Dir) => true,
            _ => false,
        }
    }
}

/// Whether two optional entries are the same but for modification times.
#[must_use]
pub fn same(a: Option<&Entry>, b: Option<&Entry>) -> bool {
    match (a, b) {
        (None, None) => true,
        (Some(a), Some(b)) => a.same_identity(b),
        _ => false,
    }
}

/// Builds the digest of a directory from its children, which must come sorted by name.
///
/// A child's digest is [`Entry::identity`] for files and links, and the child directory's own
/// digest for directories. An empty directory has the digest of an unused builder.
pub struct DirDigest(blake3::Hasher);

impl DirDigest {
    /// A directory without children so far.
    #[must_use]
    #[allow(clippy::new_without_default)]
    pub fn new() -> Self {
        Self(blake3::Hasher::new_derive_key("cortex.v1 directory digest"))
    }

    /// Adds the next child in byte order of names.
    pub fn child(&mut self, name: &[u8], kind: Kind, digest: &Digest) {
        // The length comes first, so that no two lists of children give the same bytes.
        self.0.update(&u32::try_from(name.len()).unwrap_or(u32::MAX).to_be_bytes());
        self.0.update(name);
        self.0.update(&[kind as u8]);
        self.0.update(digest.as_bytes());
    }

    /// The digest.
    #[must_use]
    pub fn finish(self) -> Digest {
        self.0.finalize().into()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(content: &[u8], executable: bool, mtime_ns: i64) -> Entry {
        Entry::File(File {
            content: Digest::of(content),
            size: content.len() as u64,
            executable,
            mtime_ns,
            recipe: Recipe::default(),
        })
    }

    #[test]
    fn time_is_not_identity_but_content_and_executable_bit_are() {
        let a = file(b"x", false, 1);
        assert_eq!(a.identity(), file(b"x", false, 2).identity());
        assert_ne!(a.identity(), file(b"y", false, 1).identity());
        assert_ne!(a.identity(), file(b"x", true, 1).identity());
        assert!(a.same_identity(&file(b"x", false, 2)));
        assert!(!a.same_identity(&file(b"x", true, 1)));
    }

    #[test]
    fn a_link_is_not_a_file_with_the_same_bytes() {
        let link = Entry::Link { target: b"x"[..].into() };
        assert_ne!(link.identity(), file(b"x", false, 0).identity());
        assert_ne!(link.identity(), Entry::Dir.identity());
    }

    #[test]
    fn entries_that_contradict_themselves_are_refused() {
        let with = |size, content: &[u8], chunks| {
            let content = Digest::of(content);
            Entry::File(File {
                content,
                size,
                executable: false,
                mtime_ns: 0,
                recipe: Recipe(chunks),
            })
        };
        let chunk = ChunkRef { hash: Digest::ZERO, len: 2 };
        assert_eq!(with(0, b"", vec![]).check(), Ok(()));
        assert_eq!(with(1, b"x", vec![]).check(), Ok(()));
        assert_eq!(with(4, b"abcd", vec![chunk, chunk]).check(), Ok(()));
        assert_eq!(with(0, b"x", vec![]).check(), Err(InvalidEntry::EmptyContent));
        assert_eq!(with(1, b"", vec![]).check(), Err(InvalidEntry::EmptyContent));
        assert!(with(5, b"abcde", vec![chunk, chunk]).check().is_err());
        for (target, fits) in [
            (b"a".to_vec(), true),
            (vec![b'a'; MAX_LINK_TARGET_BYTES], true),
            (vec![], false),
            (b"a\0".to_vec(), false),
            (vec![b'a'; MAX_LINK_TARGET_BYTES + 1], false),
        ] {
            assert_eq!(Entry::Link { target: target.into() }.check().is_ok(), fits);
        }
    }

    #[test]
    fn chunks_of_a_file_are_its_recipe_or_its_content() {
        let Entry::File(mut file) = file(b"abcd", false, 0) else { unreachable!() };
        let single: Vec<_> = file.chunks().collect();
        assert_eq!(single, [ChunkRef { hash: file.content, len: 4 }]);
        let chunk = ChunkRef { hash: Digest::ZERO, len: 2 };
        file.recipe = Recipe(vec![chunk, chunk]);
        assert_eq!(file.chunks().collect::<Vec<_>>(), [chunk, chunk]);
        (file.size, file.recipe) = (0, Recipe::default());
        assert_eq!(file.chunks().count(), 0);
    }

    #[test]
    fn directory_digest_depends_on_names_kinds_and_children() {
        let digest = |children: &[(&[u8], Kind, Digest)]| {
            let mut builder = DirDigest::new();
            for (name, kind, digest) in children {
                builder.child(name, *kind, digest);
            }
            builder.finish()
        };
        let x = Digest::of(b"x");
        let base = digest(&[(b"a", Kind::File, x), (b"b", Kind::File, x)]);
        assert_ne!(base, digest(&[(b"a", Kind::File, x)]));
        assert_ne!(base, digest(&[(b"a", Kind::File, x), (b"c", Kind::File, x)]));
        assert_ne!(base, digest(&[(b"a", Kind::Dir, x), (b"b", Kind::File, x)]));
        assert_ne!(digest(&[(b"ab", Kind::File, x)]), digest(&[(b"a", Kind::File, x)]));
    }
}
