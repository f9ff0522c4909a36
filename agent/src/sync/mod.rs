//! Workspaces of this node.

pub mod index;
pub mod plan;
