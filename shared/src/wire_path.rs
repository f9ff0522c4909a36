//! Names and paths of a workspace tree as they travel: bytes, relative, checked once.
//!
//! A [`WirePath`] cannot leave its root: it has no empty component, no `.` or `..`, no separator
//! inside a name, no NUL, and a bounded length and depth. Names are bytes because file systems hold
//! bytes; nothing here looks at an encoding.

use std::fmt;

/// Longest name, the limit of every file system in use.
pub const MAX_NAME_BYTES: usize = 255;
/// Longest path, the kernel's `PATH_MAX`.
pub const MAX_PATH_BYTES: usize = 4096;
/// Deepest nesting; bounds recursion and the number of directory handles.
pub const MAX_DEPTH: usize = 256;
/// A name that belongs to the agent and may not appear at the top of a workspace.
pub const PRIVATE_NAME: &[u8] = b".cortex";
/// The file at the top of a workspace that says what is left out of it, in the syntax of `.gitignore`.
pub const RULES_NAME: &[u8] = b".cortexignore";

/// Why bytes are not a valid name or path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InvalidPath {
    /// An empty path, or two separators in a row, or one at an end.
    #[error("path has an empty component")]
    EmptyComponent,
    /// `.` or `..`.
    #[error("path has a '.' or '..' component")]
    DotComponent,
    /// A NUL byte, or a separator inside a name.
    #[error("name holds a NUL byte or a separator")]
    ForbiddenByte,
    /// A name of more than [`MAX_NAME_BYTES`].
    #[error("name is longer than {MAX_NAME_BYTES} bytes")]
    NameTooLong,
    /// A path of more than [`MAX_PATH_BYTES`].
    #[error("path is longer than {MAX_PATH_BYTES} bytes")]
    PathTooLong,
    /// More than [`MAX_DEPTH`] components.
    #[error("path is deeper than {MAX_DEPTH}")]
    TooDeep,
    /// The first component is the agent's private directory.
    #[error("the name .cortex at the top of a workspace is reserved")]
    Private,
}

/// Checks a single name.
///
/// # Errors
/// See [`InvalidPath`].
pub fn check_name(name: &[u8]) -> Result<(), InvalidPath> {
    if name.is_empty() {
        return Err(InvalidPath::EmptyComponent);
    }
    if name.len() > MAX_NAME_BYTES {
        return Err(InvalidPath::NameTooLong);
    }
    if name == b"." || name == b".." {
        return Err(InvalidPath::DotComponent);
    }
    if name.iter().any(|&b| b == 0 || b == b'/') {
        return Err(InvalidPath::ForbiddenByte);
    }
    Ok(())
}

/// A valid path below a workspace root: one or more names joined by `/`.
///
/// Ordering is that of a depth-first walk with the children of each directory sorted by their
/// bytes: a directory is followed by everything below it, before its next sibling. (Plain byte
/// order is not: `a-b` sorts before `a/b`.)
#[derive(Clone, PartialEq, Eq, Hash)]
pub struct WirePath(Box<[u8]>);

impl WirePath {
    /// Checks and takes a path.
    ///
    /// # Errors
    /// See [`InvalidPath`].
    pub fn new(path: impl Into<Vec<u8>>) -> Result<Self, InvalidPath> {
        let path = path.into();
        if path.len() > MAX_PATH_BYTES {
            return Err(InvalidPath::PathTooLong);
        }
        let mut depth = 0;
        for name in path.split(|&b| b == b'/') {
            check_name(name)?;
            if depth == 0 && name == PRIVATE_NAME {
                return Err(InvalidPath::Private);
            }
            depth += 1;
        }
        if depth > MAX_DEPTH {
            return Err(InvalidPath::TooDeep);
        }
        Ok(Self(path.into_boxed_slice()))
    }

    /// The path of `name` below this directory.
    ///
    /// # Errors
    /// If the name is invalid or the result too long or too deep.
    pub fn join(&self, name: &[u8]) -> Result<Self, InvalidPath> {
        check_name(name)?;
        let mut path = Vec::with_capacity(self.0.len() + 1 + name.len());
        path.extend_from_slice(&self.0);
        path.push(b'/');
        path.extend_from_slice(name);
        if path.len() > MAX_PATH_BYTES {
            return Err(InvalidPath::PathTooLong);
        }
        if self.depth() + 1 > MAX_DEPTH {
            return Err(InvalidPath::TooDeep);
        }
        Ok(Self(path.into_boxed_slice()))
    }

    /// The bytes, components joined by `/`.
    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// The components from the top down.
    pub fn components(&self) -> impl DoubleEndedIterator<Item = &[u8]> {
        self.0.split(|&b| b == b'/')
    }

    /// Number of components, at least one.
    #[must_use]
    pub fn depth(&self) -> usize {
        self.components().count()
    }

    /// The last component.
    #[must_use]
    pub fn name(&self) -> &[u8] {
        self.components().next_back().unwrap_or_default()
    }

    /// The directory that holds this path; `None` if that is the root.
    #[must_use]
    pub fn parent(&self) -> Option<Self> {
        let cut = self.0.iter().rposition(|&b| b == b'/')?;
        Some(Self(self.0[..cut].into()))
    }

    /// Every directory above this path, nearest first, without the root.
    pub fn ancestors(&self) -> impl Iterator<Item = Self> {
        std::iter::successors(self.parent(), Self::parent)
    }

    /// Whether this path lies below `directory`.
    #[must_use]
    pub fn is_below(&self, directory: &Self) -> bool {
        self.0.len() > directory.0.len()
            && self.0.starts_with(&directory.0)
            && self.0[directory.0.len()] == b'/'
    }

    /// A key whose plain byte order is this type's order: the separator becomes NUL, which no name
    /// holds and which sorts before every other byte. For use in a store.
    #[must_use]
    pub fn sort_key(&self) -> Vec<u8> {
        self.0.iter().map(|&b| if b == b'/' { 0 } else { b }).collect()
    }

    /// The inverse of [`WirePath::sort_key`].
    ///
    /// # Errors
    /// If the bytes are not the key of a valid path.
    pub fn from_sort_key(key: &[u8]) -> Result<Self, InvalidPath> {
        if key.contains(&b'/') {
            return Err(InvalidPath::ForbiddenByte);
        }
        Self::new(key.iter().map(|&b| if b == 0 { b'/' } else { b }).collect::<Vec<u8>>())
    }
}

impl Ord for WirePath {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.components().cmp(other.components())
    }
}

impl PartialOrd for WirePath {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}

/// For people: bytes that are not UTF-8 become U+FFFD, control characters become `?`.
impl fmt::Display for WirePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for c in String::from_utf8_lossy(&self.0).chars() {
            write!(f, "{}", if c.is_control() { '?' } else { c })?;
        }
        Ok(())
    }
}

impl fmt::Debug for WirePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "\"{}\"", self.0.escape_ascii())
    }
}

impl TryFrom<&[u8]> for WirePath {
    type Error = InvalidPath;
    fn try_from(path: &[u8]) -> Result<Self, InvalidPath> {
        Self::new(path)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn hostile_paths_are_refused() {
        for (path, why) in [
            (&b""[..], InvalidPath::EmptyComponent),
            (b"/etc/passwd", InvalidPath::EmptyComponent),
            (b"a//b", InvalidPath::EmptyComponent),
            (b"a/", InvalidPath::EmptyComponent),
            (b"..", InvalidPath::DotComponent),
            (b"a/../b", InvalidPath::DotComponent),
            (b"./a", InvalidPath::DotComponent),
            (b"a\0b", InvalidPath::ForbiddenByte),
            (b".cortex/stage", InvalidPath::Private),
        ] {
            assert_eq!(WirePath::new(path).unwrap_err(), why, "{}", path.escape_ascii());
        }
        assert_eq!(WirePath::new([b'a'; 256]).unwrap_err(), InvalidPath::NameTooLong);
        assert_eq!(WirePath::new("a/".repeat(256) + "a").unwrap_err(), InvalidPath::TooDeep);
        let long = vec!["x".repeat(255); 17].join("/");
        assert_eq!(WirePath::new(long).unwrap_err(), InvalidPath::PathTooLong);
    }

    #[test]
    fn unusual_names_are_kept() {
        for name in [&b"-rf"[..], b"\xff\xfe", b"new\nline", b" ", b"...", b"a/.cortex"] {
            assert_eq!(WirePath::new(name).unwrap().as_bytes(), name);
        }
    }

    #[test]
    fn order_keeps_a_directory_and_its_children_together() {
        let mut paths: Vec<_> =
            ["a.b", "a/z", "a", "a-b", "a/b/c", "b"].map(|p| WirePath::new(p).unwrap()).into();
        paths.sort();
        let sorted: Vec<_> = paths.iter().map(ToString::to_string).collect();
        assert_eq!(sorted, ["a", "a/b/c", "a/z", "a-b", "a.b", "b"]);
    }

    fn any_path() -> impl Strategy<Value = WirePath> {
        prop::collection::vec(prop::collection::vec(any::<u8>(), 1..12), 1..6)
            .prop_filter_map("valid", |names| WirePath::new(names.join(&b'/')).ok())
    }

    proptest! {
        #[test]
        fn sort_key_orders_and_returns(a in any_path(), b in any_path()) {
            prop_assert_eq!(a.cmp(&b), a.sort_key().cmp(&b.sort_key()));
            prop_assert_eq!(WirePath::from_sort_key(&a.sort_key()).unwrap(), a);
        }

        #[test]
        fn parent_and_name_rebuild_the_path(a in any_path()) {
            match a.parent() {
                Some(parent) => {
                    prop_assert!(a.is_below(&parent));
                    prop_assert_eq!(parent.join(a.name()).unwrap(), a);
                }
                None => prop_assert_eq!(a.depth(), 1),
            }
        }
    }
}
