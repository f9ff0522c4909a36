//! The hub.

#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod authority;
mod cli;
pub mod config;
pub mod enroll;
pub mod grpc;
pub mod hub;
pub mod node;
pub mod store;
pub mod sync;
pub mod task;

/// The program, called by `main` and by the test binaries.
#[must_use]
pub fn main_entry() -> std::process::ExitCode {
    cli::run()
}
