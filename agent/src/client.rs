//! Authenticated channels to the hub.
