//! Sessions of nodes.
