//! The gRPC side: the only place where protocol and domain meet.

pub mod accept;
pub mod auth;
pub mod convert;
pub mod enroll;
mod exec;
pub mod node;
pub mod operator;
pub mod status;
pub mod sync;
