//! Moving content and versions between the tree here and the hub.

mod growing;
mod lane;
mod large;
mod outgoing;
mod packing;
mod pull;
mod push;
mod refresh;
mod stage;
mod supply;

use cortex_shared::ids::{WorkspaceEpoch, WorkspaceId};
use tokio_util::sync::CancellationToken;

use super::core::CoreCell;
use super::ground::Batches;
use super::occupancy::Occupancy;
use super::status::Progress;

pub(super) use lane::Lane;
pub(super) use large::{Arrived, Large, download};
pub(super) use packing::{Parcel, send_packs};
pub(super) use pull::{Pulled, pull};
pub(super) use push::{Pushed, push};
pub(super) use refresh::{Refreshed, refresh};
pub(super) use supply::supply;

/// What every transfer needs.
pub(super) struct Session<'a, H> {
    pub(super) hub: &'a H,
    pub(super) workspace: WorkspaceId,
    pub(super) core: &'a mut CoreCell,
    pub(super) cancel: &'a CancellationToken,
    pub(super) progress: &'a Progress,
    pub(super) occupancy: &'a Occupancy,
    pub(super) batches: Batches,
}

/// The history that operations belong to.
pub(super) type Epoch = WorkspaceEpoch;
