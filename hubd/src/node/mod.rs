//! Nodes: who is known, who is connected, and which workspaces they share.

pub mod membership;
pub mod registry;
pub mod session;
