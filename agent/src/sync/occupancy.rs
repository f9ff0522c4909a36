//! Strict commands that run in a workspace, and the files that must keep still under them.
//!
//! A command may not change what programs outside obey ([`crate::sandbox`] pins it), and a pin is
//! lost when somebody outside replaces the file, which ends the command. So the engine, which
//! replaces files by rename, leaves such names alone while commands run, says so, and is woken when
//! the last has ended. A command in turn does not begin while they are being replaced. Nothing of
//! this is stored: the plan finds what was left out.

use std::sync::Arc;

use cortex_shared::wire_path::WirePath;
use tokio::sync::watch;

use crate::sandbox::is_obeyed_at_top;

/// Who is in one workspace. Clones share it.
#[derive(Clone, Debug, Default)]
pub struct Occupancy(Arc<watch::Sender<Occupants>>);

#[derive(Debug, Default)]
struct Occupants {
    commands: usize,
    /// The engine replaces protected names.
    replacing: bool,
}

/// A command is in the workspace until this is dropped.
#[derive(Debug)]
pub struct Occupied(Occupancy);

impl Drop for Occupied {
    fn drop(&mut self) {
        self.0.0.send_modify(|occupants| occupants.commands -= 1);
    }
}

/// The engine replaces protected names until this is dropped.
pub(super) struct Replacing(Occupancy);

impl Drop for Replacing {
    fn drop(&mut self) {
        self.0.0.send_modify(|occupants| occupants.replacing = false);
    }
}

impl Occupancy {
    /// Whether a path is one that must not be replaced under a command.
    pub(super) fn concerns(path: &WirePath) -> bool {
        let mut components = path.components();
        components.next().is_some_and(is_obeyed_at_top) && components.next().is_none()
    }

    /// Lets a command in, once nothing is being replaced: a batch of renames at most.
    pub async fn enter(&self) -> Occupied {
        let mut occupants = self.0.subscribe();
        loop {
            let entered = self.0.send_if_modified(|occupants| {
                let free = !occupants.replacing;
                occupants.commands += usize::from(free);
                free
            });
            if entered {
                return Occupied(self.clone());
            }
            // The sender lives as long as `self`.
            occupants.wait_for(|occupants| !occupants.replacing).await.ok();
        }
    }

    /// Keeps commands out for a moment; `None` if one is in.
    pub(super) fn replace(&self) -> Option<Replacing> {
        let begun = self.0.send_if_modified(|occupants| {
            let free = occupants.commands == 0;
            occupants.replacing |= free;
            free
        });
        begun.then(|| Replacing(self.clone()))
    }

    /// Waits until no command is in.
    pub(super) async fn left(&self) {
        self.0.subscribe().wait_for(|occupants| occupants.commands == 0).await.ok();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn commands_and_replacing_exclude_each_other_and_commands_do_not() {
        let occupancy = Occupancy::default();
        let (first, second) = (occupancy.enter().await, occupancy.enter().await);
        assert!(occupancy.replace().is_none());
        drop(first);
        assert!(occupancy.replace().is_none());
        drop(second);
        occupancy.left().await;
        let replacing = occupancy.replace().unwrap();
        let entering = tokio::spawn({
            let occupancy = occupancy.clone();
            async move { drop(occupancy.enter().await) }
        });
        tokio::task::yield_now().await;
        assert!(!entering.is_finished());
        drop(replacing);
        entering.await.unwrap();
    }

    #[test]
    fn what_is_obeyed_is_concerned_by_itself_only() {
        let concerns = |path: &str| Occupancy::concerns(&WirePath::new(path).unwrap());
        assert!(concerns(".envrc") && concerns(".vscode"));
        assert!(!concerns(".vscode/tasks.json") && !concerns("a/.envrc") && !concerns("envrc"));
    }
}
