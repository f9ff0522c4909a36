//! Workspaces of this node.

pub mod plan;
