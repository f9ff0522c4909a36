//! The agent of cortex mesh: the daemon of a node, and the command line of operators.
//!
//! ```text
//! main → cli → daemon → control, link → exec, library, sync, files → sandbox, client, root_dir, identity, audit,
//! config
//! ```
//!
//! | module | subject |
//! |---|---|
//! | [`cli`] | a verb a file; output and errors |
//! | [`daemon`] | the composition root of `cortex-agent run` |
//! | [`control`] | the local socket of the machine's owner |
//! | [`link`] | the session with the hub, and what it makes this node do |
//! | [`exec`], [`sandbox`] | one command; the walls around it |
//! | [`files`] | looking at files of workspaces, and changing them, from afar |
//! | [`library`] | the skills of the mesh, placed read-only |
//! | [`sync`], [`root_dir`] | workspaces; a directory handle that nothing can leave |
//! | [`client`] | channels to the hub, which has to prove itself first |
//! | [`identity`], [`config`] | keys, certificates and settings on disk |
//! | [`audit`] | the local file of what changed authority here |
//!
//! Invariants. Arrows point downward only. The agent listens on no network port. It believes a hub
//! only by its mesh's authority and sends nothing before that. Nothing runs before it is decided
//! whether this process is a sandbox stage: no thread, no runtime. An unconfigured node is strict,
//! and its owner's ceiling holds against the hub. A task id runs at most once. Deliberately absent:
//! a way for the hub to choose paths on this machine, and any output but through `cli::printer`.

#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod audit;
pub mod cli;
pub mod client;
pub mod config;
pub mod control;
pub mod daemon;
pub mod exec;
pub mod files;
pub mod identity;
pub mod library;
pub mod link;
pub mod root_dir;
pub mod sandbox;
pub mod sync;

/// The program, called by `main` and by the test binaries.
#[must_use]
pub fn main_entry() -> std::process::ExitCode {
    // First of all: the stage must be single-threaded, and is not for the command line to parse.
    if sandbox::stage_requested() {
        return sandbox::stage_main();
    }
    cli::main()
}
