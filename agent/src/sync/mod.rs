//! Workspaces of this node.

pub mod apply;
mod core;
pub mod hub;
pub mod ignore;
pub mod index;
pub mod plan;
pub mod private_dir;
pub mod problem;
pub mod scan;
pub mod status;
mod transfer;
mod watch;
