//! The hub's configuration.
