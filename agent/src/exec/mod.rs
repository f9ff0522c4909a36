//! Running one command on this node.
//!
//! | module | subject |
//! |---|---|
//! | `request` | what is asked for and what comes back |
//! | `policy` | pure: limits, environment, and what a request may contain |
//! | `output`, `stdin` | a pipe each: credit, frames, hash; a bounded queue |
//! | `terminal` | what stands in for the pipes of a command with a terminal |
//! | `executor` | from the request to a running command |
//! | `run` | one command from start to exit |
//!
//! Invariants. [`CommandEvent::Exit`] is always sent, once, last. No more bytes are under way than
//! credit was given. Every wait has an end: the command's time limit, the grace after a signal, the
//! bounded drain after the end. The future owns the command; dropping it ends everything the
//! command started. Nothing is persisted: the journal belongs to the caller.

mod executor;
mod output;
mod policy;
mod request;
mod run;
mod stdin;
mod terminal;

pub use executor::{Executor, run};
pub use output::MAX_FRAME_BYTES;
pub use policy::{MAX_ARGUMENT_BYTES, MAX_ARGUMENTS_BYTES, MAX_SCRIPT_BYTES, MAX_TIME_LIMIT};
pub use request::{
    Bounds, CancelCause, CommandControl, CommandEvent, CommandExit, CommandRequest, CommandVerdict,
    OutputStream, RequestedLimits, TerminalRequest, WorkspaceView,
};
