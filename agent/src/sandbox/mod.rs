//! The sandbox: running one command so that it cannot hurt the machine it runs on.
//!
//! ```text
//! agent (many threads)                        launch, spare, stage_handle
//!  └─ monitor: re-executed binary, one thread  stage → workspace, namespaces
//!      └─ pid 1 of the sandbox                 init → filesystem, mounts, protect; reaper
//!          └─ the command                      payload → limits, landlock, seccomp, privileges
//! ```
//!
//! Entry points: [`stage_requested`] and [`stage_main`], first thing in `main`; [`Launcher`] for
//! one command, and [`Launcher::probe`] for what this machine can enforce.
//!
//! Invariants. A command never runs with less than was asked for: whatever cannot be set up or,
//! read back from the kernel, does not hold, refuses the command before it is executed. A command
//! never runs as user 0. Nothing asynchronous and no second thread exists in the stage. `unsafe` is
//! in `syscalls` only. Deliberately absent: a setuid helper, acting twice on one path, any way to
//! weaken strict mode from within a request.

mod bpf;
mod cgroup;
mod channel;
pub mod exposed;
mod filesystem;
mod git_files;
mod identity;
mod init;
mod landlock;
mod launch;
mod limits;
mod mapping;
mod memory_file;
mod mounts;
mod namespaces;
mod payload;
mod permissive;
mod planted;
mod privileges;
mod probe;
mod protect;
mod reaper;
mod remedy;
mod seccomp;
mod self_test;
mod spare;
mod spec;
mod stage;
mod stage_handle;
mod survey;
#[allow(unsafe_code)]
mod syscalls;
mod terminal;
mod workspace;

pub use cgroup::Group;
pub use identity::NoIdentity;
pub use launch::{Command, LaunchError, Launched, Launcher, Program};
pub use planted::Before;
pub use probe::Capabilities;
pub use remedy::Refusal;
pub use spec::{
    Ending, HOME_INSIDE, Identity, LIBRARY_INSIDE, Limits, Network, SetupError, Step,
    WORKSPACE_INSIDE,
};
pub use stage::{stage_main, stage_requested};
pub use stage_handle::{StageHandle, StageMessage};
pub use survey::is_obeyed_at_top;
pub use terminal::TerminalSize;
pub use workspace::{CheckedWorkspace, WorkspaceRefusal, check_workspace};
