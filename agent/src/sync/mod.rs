//! Workspaces of this node.
