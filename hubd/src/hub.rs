//! The running hub.
