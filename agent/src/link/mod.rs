//! The session with the hub.
