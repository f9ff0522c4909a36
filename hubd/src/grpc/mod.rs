//! The only place where protocol and domain meet.

pub mod auth;
pub mod status;
pub mod sync;
