//! This node's key and certificate on disk.
