//! What a node's owner shows to strict commands beyond what they see anyway: directories and files of this
//! machine, read-only, at their own path.
//!
//! It is looked at for each command anew, on the agent's side. Nothing on the way to it may be a link, and
//! the stage follows none: what is shown is what was checked, whatever others do to directories of theirs.

use std::path::{Component, Path, PathBuf};

use super::workspace::{
    canonical_as_far_as_it_exists, home_directories, is_among_ancestors, mount_below,
};

/// Most of them. Each costs every command a mount.
pub const MAX_EXPOSED: usize = 32;
/// Longest path of one.
const MAX_PATH_BYTES: usize = 1024;

/// Of these nothing is shown: what the kernel and services say about the whole machine, where secrets are
/// kept, where everybody writes, and what is something else inside.
const NEVER: [&str; 15] = [
    "/proc",
    "/sys",
    "/dev",
    "/run",
    "/var/run",
    "/boot",
    "/etc",
    "/tmp",
    "/var/tmp",
    "/var/lib/cortex-agent",
    "/var/lib/cortex-hubd",
    "/var/spool",
    "/workspace",
    "/library",
    "/home/cortex",
];

/// Why something is not shown to commands.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ExposeRefusal {
    /// It does not say where it is.
    #[error(
        "{path:?} is no absolute path of plain names in UTF-8, of at most {MAX_PATH_BYTES} bytes"
    )]
    NotPlain {
        /// The path.
        path: PathBuf,
    },
    /// It is, holds or lies in something that commands must never see.
    #[error("{path:?} would show {hidden:?} to commands")]
    ShowsHidden {
        /// The path.
        path: PathBuf,
        /// What must stay hidden.
        hidden: PathBuf,
    },
    /// What begins with a dot in a home holds keys and settings.
    #[error("{path:?} is a hidden file or directory of a home")]
    HiddenInHome {
        /// The path.
        path: PathBuf,
    },
    /// A link is on the way to it, or it is one.
    #[error("{path:?} leads over a link, to {target:?}")]
    Link {
        /// The path.
        path: PathBuf,
        /// Where it leads.
        target: PathBuf,
    },
    /// It is neither a directory nor a file.
    #[error("{path:?} is neither a directory nor a file")]
    Special {
        /// The path.
        path: PathBuf,
    },
    /// Another file system is mounted below it.
    #[error("another file system is mounted inside {path:?}, at {mount:?}")]
    MountInside {
        /// The path.
        path: PathBuf,
        /// Where.
        mount: PathBuf,
    },
    /// It cannot be looked at.
    #[error("{path:?} cannot be looked at: {problem}")]
    Unusable {
        /// The path.
        path: PathBuf,
        /// What the kernel said.
        problem: String,
    },
}

impl ExposeRefusal {
    /// What helps.
    #[must_use]
    pub fn hint(&self) -> &'static str {
        "the node's owner changes sandbox.read_only_paths in agent.json: `cortex-agent doctor` there says more"
    }
}

/// Checks what can be told from the path alone.
///
/// # Errors
/// If it is not plain, or is, holds or lies in what is never shown.
pub fn check_name(path: &Path) -> Result<(), ExposeRefusal> {
    let plain = path.is_absolute()
        && path.components().skip(1).all(|part| matches!(part, Component::Normal(_)))
        && path.to_str().is_some_and(|text| text.len() <= MAX_PATH_BYTES && !text.contains('\0'));
    if !plain {
        return Err(ExposeRefusal::NotPlain { path: path.to_owned() });
    }
    let hidden = NEVER.iter().map(Path::new).find(|never| meets(path, never));
    match hidden {
        Some(hidden) => Err(shows(path, hidden)),
        None => Ok(()),
    }
}

/// Decides whether something is shown to a command. `apart` must not be seen: the agent's own state, and
/// workspaces, which commands change. Whether it is there at all; touches the disk.
///
/// # Errors
/// See [`ExposeRefusal`].
pub fn check(path: &Path, apart: &[PathBuf]) -> Result<bool, ExposeRefusal> {
    check_name(path).and_then(|()| look(path, apart))
}

fn look(path: &Path, apart: &[PathBuf]) -> Result<bool, ExposeRefusal> {
    let unusable = |error: std::io::Error| ExposeRefusal::Unusable {
        path: path.to_owned(),
        problem: error.to_string(),
    };
    let target = match path.canonicalize() {
        Ok(target) => target,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(false),
        Err(error) => return Err(unusable(error)),
    };
    if target != path {
        return Err(ExposeRefusal::Link { path: path.to_owned(), target });
    }
    let found = path.symlink_metadata().map_err(unusable)?;
    if !found.is_dir() && !found.is_file() {
        return Err(ExposeRefusal::Special { path: path.to_owned() });
    }
    for home in home_directories() {
        if home.starts_with(path) {
            return Err(shows(path, &home));
        }
        let below = path.strip_prefix(&home).into_iter().flat_map(Path::components);
        if below.map(|part| part.as_os_str()).any(|name| name.as_encoded_bytes().starts_with(b"."))
        {
            return Err(ExposeRefusal::HiddenInHome { path: path.to_owned() });
        }
    }
    for secret in apart {
        let secret = canonical_as_far_as_it_exists(secret);
        // A bind mount gives a directory a second name, which the comparison of names misses.
        if meets(path, &secret)
            || is_among_ancestors(path, &secret)
            || is_among_ancestors(&secret, path)
        {
            return Err(shows(path, &secret));
        }
    }
    match mount_below(path).map_err(unusable)? {
        Some(mount) => Err(ExposeRefusal::MountInside { path: path.to_owned(), mount }),
        None => Ok(true),
    }
}

/// Whether one of them holds the other.
fn meets(a: &Path, b: &Path) -> bool {
    a.starts_with(b) || b.starts_with(a)
}

fn shows(path: &Path, hidden: &Path) -> ExposeRefusal {
    ExposeRefusal::ShowsHidden { path: path.to_owned(), hidden: hidden.to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_would_show_too_much_is_refused_by_its_name() {
        for bad in [
            "/",
            "",
            "opt/x",
            "/opt/../root",
            "/proc",
            "/proc/1",
            "/sys/kernel",
            "/dev/sda",
            "/run/user/0",
            "/var",
            "/var/lib",
            "/var/lib/cortex-agent/identity",
            "/etc",
            "/etc/shadow",
            "/home",
            "/tmp/x",
            "/workspace",
            "/library/x",
            "/boot/vmlinuz",
        ] {
            assert!(check_name(Path::new(bad)).is_err(), "{bad:?}");
        }
        assert!(check_name(Path::new(&format!("/{}", "x".repeat(MAX_PATH_BYTES)))).is_err());
        for good in
            ["/opt/models", "/srv/data", "/usr/local/cuda", "/var/lib/models", "/home/ann/data"]
        {
            assert_eq!(check_name(Path::new(good)), Ok(()), "{good:?}");
        }
    }

    #[test]
    fn links_homes_mounts_and_what_is_apart_are_refused_and_what_is_not_there_is_not_shown() {
        let folder = tempfile::tempdir().unwrap();
        let root = folder.path().canonicalize().unwrap();
        let made = |name: &str| {
            let path = root.join(name);
            std::fs::create_dir_all(&path).unwrap();
            path
        };
        let (data, state) = (made("data/inner"), made("state/identity"));
        let (data, state) = (data.parent().unwrap(), state.parent().unwrap());
        assert_eq!(look(data, &[state.to_owned()]), Ok(true));
        assert_eq!(look(&root.join("nowhere"), &[]), Ok(false));
        for (path, apart) in [
            (root.clone(), vec![state.to_owned()]),
            (state.join("identity"), vec![state.to_owned()]),
            (data.to_owned(), vec![data.join("inner")]),
            (data.to_owned(), vec![data.join("not yet there")]),
        ] {
            let refused = look(&path, &apart);
            assert!(
                matches!(refused, Err(ExposeRefusal::ShowsHidden { .. })),
                "{path:?} {refused:?}"
            );
        }
        std::os::unix::fs::symlink(state, root.join("link")).unwrap();
        for path in ["link", "link/identity"] {
            let refused = look(&root.join(path), &[]);
            assert!(matches!(refused, Err(ExposeRefusal::Link { .. })), "{path}");
        }
        let _socket = std::os::unix::net::UnixListener::bind(root.join("socket")).unwrap();
        let refused = look(&root.join("socket"), &[]);
        assert!(matches!(refused, Err(ExposeRefusal::Special { .. })));
        for home in home_directories() {
            assert!(look(&home, &[]).is_err(), "{home:?}");
            let hidden = home.join(".cortex-test");
            // Absent, or refused.
            assert_ne!(look(&hidden, &[]), Ok(true), "{hidden:?}");
        }
    }
}
