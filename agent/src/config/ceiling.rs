//! The owner's bound, believed only where nobody else could have written it.

use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::Path;

use cortex_shared::policy::Bound;

use super::{ConfigError, Settings, StateDir};

/// The owner's upper bound for what commands may do, as it counts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ceiling {
    /// What counts.
    pub bound: Bound,
    /// Why the stored bound is not believed and counts as strict.
    pub problem: Option<Exposed>,
}

/// A place that others than root and the agent's user can write.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{what}, so the ceiling counts as strict")]
pub struct Exposed {
    what: String,
    hint: String,
}

impl Exposed {
    /// The command that helps.
    #[must_use]
    pub fn hint(&self) -> &str {
        &self.hint
    }
}

impl Ceiling {
    /// Reads it anew. `agent_user` is the user that the agent runs as.
    ///
    /// # Errors
    /// If the node has not joined, or its settings cannot be read or are damaged.
    pub fn load(state: &StateDir, agent_user: u32) -> Result<Self, ConfigError> {
        let stored = Settings::load(state)?.ceiling;
        let mut problem = None;
        for path in [state.path(), &state.settings()] {
            problem = problem.or(exposed(path, agent_user)?);
        }
        let bound = if problem.is_some() { Bound::LEAST } else { stored };
        Ok(Self { bound, problem })
    }
}

fn exposed(path: &Path, agent_user: u32) -> Result<Option<Exposed>, ConfigError> {
    let metadata = std::fs::metadata(path)
        .map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
    let (owner, mode) = (metadata.uid(), metadata.permissions().mode() & 0o7777);
    let shown = path.display();
    Ok(if owner != 0 && owner != agent_user {
        Some(Exposed {
            what: format!("{shown} belongs to user {owner}, not to root or the agent's user"),
            hint: format!("look at what it says; then chown {agent_user} {shown}"),
        })
    } else if mode & 0o022 != 0 {
        Some(Exposed {
            what: format!("{shown} can be changed by others (mode {mode:o})"),
            hint: format!("look at what it says; then chmod go-w {shown}"),
        })
    } else {
        None
    })
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::chown;

    use cortex_shared::policy::{Mode, Network};

    use super::*;

    #[test]
    fn what_others_can_write_counts_as_strict() {
        let folder = tempfile::tempdir().unwrap();
        let state = StateDir::resolve(Some(folder.path().join("state"))).unwrap();
        state.create().unwrap();
        let all = Bound { mode: Mode::Permissive, network: Network::Full };
        let settings = Settings {
            hub: "hub:7443".parse().unwrap(),
            workspace_root: "/srv/cortex".into(),
            sandbox: Default::default(),
            commands: Default::default(),
            log: None,
            ceiling: all,
            workspace_paths: std::collections::BTreeMap::new(),
            library: crate::config::LibraryPlace::Default,
        };
        settings.save(&state).unwrap();
        let own = rustix::process::geteuid().as_raw();
        let ceiling = || Ceiling::load(&state, own).unwrap();
        assert_eq!(ceiling(), Ceiling { bound: all, problem: None });
        let file = state.settings();
        for (path, kept) in [(state.path(), 0o700), (file.as_path(), 0o600)] {
            let set = |mode| {
                std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
            };
            for open in [0o777, 0o720, 0o702] {
                set(open);
                let found = ceiling();
                assert_eq!(found.bound, Bound::LEAST, "{open:o}");
                let text = found.problem.unwrap().to_string();
                assert!(text.contains(&format!("{} can", path.display())), "{text}");
            }
            set(kept);
            if own == 0 {
                chown(path, Some(64_001), None).unwrap();
                assert_eq!(ceiling().bound, Bound::LEAST);
                chown(path, Some(0), None).unwrap();
            }
        }
        assert_eq!(ceiling().bound, all);
    }
}
