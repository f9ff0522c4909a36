//! Commands on this node.
