//! Which names are not part of a workspace.

use cortex_shared::wire_path::{PRIVATE_NAME, WirePath};

/// Names that are neither walked, watched, sent nor accepted from others.
///
/// `.git`, at any depth: a repository is only consistent as a whole, and a member that could place
/// files in another's `.git/hooks` could have them executed there. `.cortex` at the top: ours.
#[derive(Clone, Debug, Default)]
pub struct Ignore;

impl Ignore {
    /// Whether `name` in `directory` (the root for `None`) is left out.
    #[must_use]
    pub fn ignores_name(&self, directory: Option<&WirePath>, name: &[u8]) -> bool {
        name == b".git" || (directory.is_none() && name == PRIVATE_NAME)
    }

    /// Whether a path, or anything above it, is left out.
    #[must_use]
    pub fn ignores(&self, path: &WirePath) -> bool {
        let mut components = path.components();
        components.next().is_some_and(|name| self.ignores_name(None, name))
            || components.any(|name| name == b".git")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn repositories_are_left_out_at_any_depth_and_similar_names_are_not() {
        let ignores = |path: &str| Ignore.ignores(&WirePath::new(path).unwrap());
        for path in [".git", ".git/hooks/pre-commit", "a/.git", "a/b/.git/config"] {
            assert!(ignores(path), "{path}");
        }
        for path in ["a", "a.git", ".gitignore", "a/.cortex", "a/.github"] {
            assert!(!ignores(path), "{path}");
        }
    }
}
