//! The gRPC side: the only place where protocol and domain meet.

pub mod accept;
pub mod auth;
mod authority;
pub mod convert;
mod detached;
mod draining;
pub mod enroll;
mod exec;
mod files;
mod history;
mod in_scope;
mod invites;
mod listing;
pub mod node;
pub mod operator;
mod past;
mod rotation;
pub mod status;
pub mod sync;
mod tasks;
mod workspaces;
