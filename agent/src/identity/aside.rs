//! Putting an identity aside, and a new one in its place.
//!
//! The new one is complete in `identity.new` before anything is moved; the old one moves to
//! `identity.old-ID`, then the new one to `identity`. A crash between the two moves leaves no
//! `identity` and a complete `identity.new`, which [`finish_replacement`] finds and moves.

use std::path::PathBuf;

use cortex_shared::durable;
use cortex_shared::ids::NodeId;

use super::NODE;
use crate::config::{ConfigError, StateDir};

/// Moves a complete new identity into its place if there is none.
pub(super) fn finish_replacement(state: &StateDir) -> Result<(), ConfigError> {
    let (place, new) = (state.identity(), state.new_identity());
    if place.exists() || !new.join(NODE).exists() {
        return Ok(());
    }
    match std::fs::rename(&new, &place) {
        Ok(()) => {}
        // Another process of ours was quicker.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(()),
        Err(source) => return Err(ConfigError::Write { path: place, source }),
    }
    sync(state)
}

/// Moves the identity aside; the result is where to.
pub(super) fn put_aside(state: &StateDir, id: NodeId) -> Result<PathBuf, ConfigError> {
    let kept = (0..)
        .map(|n: u32| match n {
            0 => state.path().join(format!("identity.old-{id}")),
            n => state.path().join(format!("identity.old-{id}.{n}")),
        })
        .find(|path| !path.exists())
        .expect("some number is free");
    std::fs::rename(state.identity(), &kept)
        .map_err(|source| ConfigError::Write { path: kept.clone(), source })?;
    sync(state)?;
    Ok(kept)
}

/// Moves the identity aside, and with it one that was prepared and never put in place: after this
/// the machine is no node.
pub(super) fn leave(state: &StateDir, id: NodeId) -> Result<PathBuf, ConfigError> {
    let new = state.new_identity();
    if new.exists() {
        let path = state.path().join(format!("identity.unused-{}", uuid::Uuid::now_v7()));
        std::fs::rename(&new, &path).map_err(|source| ConfigError::Write { path, source })?;
    }
    put_aside(state, id)
}

fn sync(state: &StateDir) -> Result<(), ConfigError> {
    durable::sync_folder(state.path())
        .map_err(|source| ConfigError::Write { path: state.path().to_owned(), source })
}
