//! Workspaces of this node.

pub mod ignore;
pub mod index;
pub mod plan;
pub mod problem;
pub mod scan;
