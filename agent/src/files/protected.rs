//! Names that programs on the node obey.
//!
//! A command in the strict sandbox cannot change them where they exist, and is reported where it makes
//! them; a file that is written from afar must not be a way round that. So nothing named like that is
//! made, replaced or removed, whoever asks: git directories at any depth, and what editors, shells and
//! agents obey at the top of a workspace.

use cortex_shared::wire_path::WirePath;

use super::FileError;
use crate::sandbox::is_obeyed_at_top;

/// Whether a path may be changed.
///
/// # Errors
/// [`FileError::Protected`].
pub(super) fn check(path: &WirePath) -> Result<(), FileError> {
    // Some file systems take a name for another one that differs in case.
    let protected = path.components().any(|name| name.eq_ignore_ascii_case(b".git"))
        || is_obeyed_at_top(path.components().next().unwrap_or_default());
    if protected { Err(FileError::Protected { name: path.to_string() }) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_programs_obey_is_protected_and_what_looks_like_it_is_not() {
        let allowed = |path: &str| check(&WirePath::new(path).unwrap()).is_ok();
        for path in [
            ".git",
            ".git/hooks/pre-commit",
            ".GIT/config",
            "sub/.git/config",
            "a/b/.git",
            ".vscode/tasks.json",
            ".envrc",
            ".Bashrc",
            ".mcp.json",
            ".claude/settings.json",
        ] {
            assert!(!allowed(path), "{path}");
        }
        for path in
            ["a", ".gitignore", ".github/workflows/x.yml", "sub/.envrc", "git/hooks", ".env"]
        {
            assert!(allowed(path), "{path}");
        }
    }
}
