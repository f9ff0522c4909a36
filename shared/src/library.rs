//! Names of the library: the mesh-wide, read-only collection of skills that every node holds.
//!
//! A skill is a directory that was promoted out of a workspace. The hub keeps the library as a workspace
//! of its own ([`crate::ids::WorkspaceId::LIBRARY`]), in whose tree the current version of a skill stands at
//! `SKILL/VERSION`. A node places it wherever its owner wants; so that a link to it is the same bytes on
//! every member of a workspace, and stays inside of it as written, it leads over a door in the
//! workspace's private directory (`.cortex/library`), which each agent hangs where its own library is.

use crate::labels::{InvalidName, check_name};
use crate::wire_path::{InvalidPath, PRIVATE_NAME, WirePath};

/// The library's name where workspaces are listed by name. No workspace can have it.
pub const LIBRARY_NAME: &str = ".library";
/// The name of the door in a workspace's private directory.
pub const DOOR_NAME: &[u8] = b"library";
/// Most files, links and directories of one skill: what one commit changes in about a second.
pub const MAX_SKILL_ENTRIES: usize = 10_000;
/// Most bytes of all files of one skill. Every node holds them.
pub const MAX_SKILL_BYTES: u64 = 1 << 30;

/// Checks the name of a skill: like that of a node, so that it is one harmless path component.
///
/// # Errors
/// If it is not 1 to 63 of `a-z 0-9 - _ .`, starting with a letter or digit.
pub fn check_skill_name(name: &str) -> Result<(), InvalidName> {
    check_name(name)
}

/// Where a version of a skill stands in the library's tree.
///
/// # Errors
/// If the name is none of a skill.
pub fn version_path(skill: &str, version: u64) -> Result<WirePath, InvalidPath> {
    WirePath::new(format!("{skill}/{version}"))
}

/// The skill and the version that a directory of the library's tree holds; `None` if it is no such
/// directory.
#[must_use]
pub fn version_at(skill: &[u8], version: &[u8]) -> Option<(String, u64)> {
    let skill = std::str::from_utf8(skill).ok().filter(|name| check_skill_name(name).is_ok())?;
    let digits = std::str::from_utf8(version).ok()?;
    let number: u64 = digits.parse().ok()?;
    // One way to write each number.
    (number > 0 && number.to_string() == digits).then(|| (skill.to_owned(), number))
}

/// The target of a link at `path` that leads to a skill.
#[must_use]
pub fn link_target(path: &WirePath, skill: &str) -> Vec<u8> {
    let up = b"../".repeat(path.depth() - 1);
    [&up[..], PRIVATE_NAME, b"/", DOOR_NAME, b"/", skill.as_bytes()].concat()
}

/// The skill that a link at `path` with this target leads to, if it leads to one as [`link_target`] writes
/// it.
#[must_use]
pub fn linked_skill(path: &WirePath, target: &[u8]) -> Option<String> {
    let cut = target.iter().rposition(|&byte| byte == b'/')? + 1;
    let skill = std::str::from_utf8(&target[cut..]).ok()?;
    let whole = check_skill_name(skill).is_ok() && target == link_target(path, skill);
    whole.then(|| skill.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_link_leads_over_the_door_of_the_workspace_from_any_depth() {
        for (path, target) in [
            ("tools", ".cortex/library/lint"),
            ("a/tools", "../.cortex/library/lint"),
            ("a/b/c/tools", "../../../.cortex/library/lint"),
        ] {
            let path = WirePath::new(path).unwrap();
            assert_eq!(link_target(&path, "lint"), target.as_bytes());
            assert_eq!(linked_skill(&path, target.as_bytes()), Some("lint".to_owned()));
            for other in ["", "lint", "x/lint", "../lint", "../../../../.cortex/library/lint", "/"]
            {
                assert_eq!(linked_skill(&path, other.as_bytes()), None, "{other}");
            }
        }
    }

    #[test]
    fn a_version_is_named_in_one_way_only() {
        assert_eq!(version_at(b"lint", b"12"), Some(("lint".to_owned(), 12)));
        assert_eq!(version_path("lint", 12).unwrap().as_bytes(), b"lint/12");
        for (skill, version) in [
            (&b"lint"[..], &b"012"[..]),
            (b"lint", b"0"),
            (b"lint", b"+1"),
            (b"lint", b"-1"),
            (b"lint", b""),
            (b"lint", b"99999999999999999999"),
            (b"Lint", b"1"),
            (b".", b"1"),
            (b"\xff", b"1"),
        ] {
            assert_eq!(version_at(skill, version), None, "{skill:?} {version:?}");
        }
    }
}
