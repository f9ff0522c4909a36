//! The agent.

#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod cli;
pub mod client;
pub mod config;
pub mod control;
pub mod daemon;
pub mod exec;
pub mod identity;
pub mod link;
pub mod root_dir;
pub mod sandbox;
pub mod sync;

/// The program, called by `main` and by the test binaries.
#[must_use]
pub fn main_entry() -> std::process::ExitCode {
    if sandbox::stage_requested() {
        return sandbox::stage_main();
    }
    cli::main()
}
