//! The gRPC side: the only place where protocol and domain meet.

pub mod accept;
pub mod auth;
mod authority;
pub mod convert;
mod detached;
mod draining;
pub mod enroll;
mod events;
mod exec;
mod files;
pub(crate) mod guests;
mod history;
mod in_scope;
mod invites;
pub(crate) mod listing;
mod login_link;
pub mod node;
pub mod operator;
mod past;
pub mod place;
mod rotation;
mod skills;
pub mod status;
pub mod sync;
mod tasks;
mod workers;
mod workspaces;
