//! Nodes: who is known, who is connected, which workspaces they share, and operations on their files.

pub mod files;
pub mod membership;
pub mod registry;
pub mod session;
