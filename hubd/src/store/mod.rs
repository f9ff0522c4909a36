//! What the hub remembers.

pub mod workspace;
