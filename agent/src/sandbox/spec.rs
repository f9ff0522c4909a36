//! What the agent tells the stage, and what the stage answers.
//!
//! Both run the same binary, so this format has one reader and one writer and may change at will.
//! Everything travels over a private socket, never in arguments or environment, where other
//! processes could read it: first a [`Preparation`], which says what the sandbox is made of, then,
//! perhaps much later, a [`Spec`] with what is to run in it.

use std::io;
use std::path::PathBuf;

pub use cortex_shared::policy::Network;
use serde::{Deserialize, Serialize};

use super::terminal::TerminalSize;

/// `argv[0]` of the stage.
pub(super) const STAGE_NAME: &str = "cortex-sandbox";
/// `argv[0]` of the process that makes a user namespace for the agent.
pub(super) const MAPPER_NAME: &str = "cortex-namespace";
/// Where the workspace appears inside.
pub const WORKSPACE_INSIDE: &str = "/workspace";
/// Where the library of skills appears inside.
pub const LIBRARY_INSIDE: &str = "/library";
/// The home directory inside: private to the command and gone with it.
pub const HOME_INSIDE: &str = "/home/cortex";
/// Most bytes of a serialised [`Spec`]. Arguments and environment of 1 MiB, as JSON numbers.
pub(super) const MAX_SPEC_BYTES: u64 = 16 * 1024 * 1024;
/// Most bytes of one message on the control socket.
pub(super) const MAX_MESSAGE_BYTES: usize = 16 * 1024;
/// Longest script given to `bash -c`; a longer one is given as a file. The kernel takes no
/// argument of 128 KiB or more (`MAX_ARG_STRLEN`).
pub(super) const MAX_INLINE_SCRIPT_BYTES: u64 = 120 * 1024;

/// What can be set up before it is known what is to run.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Preparation {
    pub(super) confinement: Confinement,
    /// Descriptors of control groups that come with this.
    pub(super) control_group: ControlGroup,
}

/// The command. Its standard output and error come with this, in this order, and then what the
/// fields say.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Spec {
    pub(super) action: Action,
    pub(super) env: Vec<(Vec<u8>, Vec<u8>)>,
    /// Relative to the workspace, or to the private directory where there is none.
    pub(super) cwd: PathBuf,
    pub(super) workspace: Option<WorkspaceSpec>,
    pub(super) library: Option<LibrarySpec>,
    pub(super) limits: Limits,
    /// A pipe for standard input comes with the specification; otherwise the command reads
    /// end-of-file.
    pub(super) stdin: bool,
    /// It has a terminal, and does not use the pipes.
    pub(super) terminal: Option<TerminalSize>,
}

/// How the command enters its control group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum ControlGroup {
    /// It has none.
    None,
    /// By being created in the one directory that comes.
    BornInto,
    /// By the monitor writing itself to each of so many files that come.
    Joined(usize),
}

/// How the command is confined.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Confinement {
    /// The sandbox.
    Strict(StrictSpec),
    /// None. The process tree still ends with the command.
    Permissive,
}

/// What is particular to the sandbox.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct StrictSpec {
    /// Who the command runs as.
    pub(super) identity: Identity,
    pub(super) network: Network,
    /// Directories of the host visible at the same path, read-only.
    pub(super) read_only: Vec<PathBuf>,
    /// The oldest Landlock interface accepted.
    pub(super) minimum_landlock_abi: i64,
    /// Size of each private temporary directory.
    pub(super) temporary_bytes: u64,
}

/// The user and group id of a command.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Identity {
    /// User id, the same inside and outside; never 0.
    pub uid: u32,
    /// Group id, the same inside and outside.
    pub gid: u32,
    /// The agent is root and takes on another identity for the command.
    pub assumed: bool,
}

/// A workspace, named by path and checked by identity, so that a directory exchanged after the
/// check is noticed.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct WorkspaceSpec {
    pub(super) path: PathBuf,
    pub(super) device: u64,
    pub(super) inode: u64,
    pub(super) owner_uid: u32,
    pub(super) owner_gid: u32,
    /// It comes with the specification as a detached mount, mapped to the command's user.
    pub(super) mounted: bool,
    /// What in it is kept from the command, in the order of the names. Empty in permissive mode.
    pub(super) pins: Vec<Pin>,
}

/// The library of skills, seen read-only.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct LibrarySpec {
    /// Where it is on the host.
    pub(super) path: PathBuf,
    /// It comes with the specification as a detached mount.
    pub(super) mounted: bool,
}

/// A name in a workspace that is kept from the command.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Pin {
    /// Relative to the workspace; without links on the way.
    pub(super) name: Vec<u8>,
    /// Nothing in it can be changed; otherwise it can only not be moved.
    pub(super) read_only: bool,
}

/// What to run.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) enum Action {
    /// A program with its arguments, looked up in the `PATH` of the command's environment.
    Program(Vec<Vec<u8>>),
    /// The bash script in the second memory file.
    Script,
    /// Nothing: set everything up, verify it, try what a command must not be able to do, and end
    /// with success.
    Probe(ProbeFacts),
}

/// What is outside of a probe's sandbox, for it to reach for.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct ProbeFacts {
    /// The process id of the agent.
    pub(super) agent: i32,
    /// The name of an abstract socket that the agent listens on for the time of the probe.
    pub(super) abstract_socket: Vec<u8>,
    /// Paths that must not exist inside: the agent's own directories.
    pub(super) hidden: Vec<PathBuf>,
}

/// Limits of one command.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Bytes of memory: of the whole command where a control group is to be had, of each process
    /// otherwise.
    pub memory_bytes: u64,
    /// Processes and threads at a time.
    pub processes: u64,
    /// Open files of each process.
    pub open_files: u64,
    /// Size of a single file.
    pub file_bytes: u64,
    /// Size of each private temporary directory.
    pub temporary_bytes: u64,
}

/// Agent to stage.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
pub(super) enum Order {
    /// Signal the command's process group.
    Signal(i32),
    /// End everything now.
    Kill,
}

/// Stage to agent.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) enum Report {
    /// The specification has come, and nothing of it was done yet. First of all, and the agent may
    /// give the command to nobody else from here on.
    Taken,
    /// The agent's side of the command's terminal comes beside this. Before `Started`.
    Terminal,
    /// The command runs.
    Started,
    /// The program could not be executed; nothing has run.
    NotExecuted { errno: i32, program: String },
    /// Something could not be set up; nothing has run.
    Refused(SetupError),
    /// The command's process was started, and could not be looked after any more. Everything ends.
    Failed(SetupError),
    /// The command ended. Everything it left behind is ended with it.
    Ended(Ending),
}

/// How a command ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Ending {
    /// By itself, with this code.
    Exited(i32),
    /// By this signal.
    Signalled(i32),
}

/// The part of the set-up that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub enum Step {
    /// Receiving and reading the specification.
    Specification,
    /// Finding the workspace as it was when it was checked.
    Workspace,
    /// Keeping names from the command that programs outside obey.
    ProtectedNames,
    /// Mapping the owner of the workspace to the identity of the command.
    MappedWorkspace,
    /// Creating the namespaces.
    Namespaces,
    /// Mapping user and group ids of the user namespace.
    IdentityMap,
    /// Taking on the identity of the command.
    Identity,
    /// Building the file system.
    FileSystem,
    /// The private `/proc`.
    Proc,
    /// The private network.
    Loopback,
    /// The process that runs the command.
    Process,
    /// The terminal.
    Terminal,
    /// The control group.
    ControlGroup,
    /// The working directory.
    WorkingDirectory,
    /// Resource limits.
    Limits,
    /// Giving up all capabilities.
    Capabilities,
    /// Landlock.
    Landlock,
    /// The system call filter.
    Seccomp,
    /// Reading back that all of it holds.
    Verification,
    /// Trying what must be denied, from within.
    SelfTest,
    /// A mistake in the stage itself.
    Internal,
}

/// Why the stage refused to run a command.
#[derive(Debug, Clone, Serialize, Deserialize, thiserror::Error)]
#[error("{detail}")]
pub struct SetupError {
    /// What failed.
    pub step: Step,
    /// The error number of the kernel, where there was one.
    pub errno: Option<i32>,
    /// What was attempted and what the kernel said.
    pub detail: String,
}

impl SetupError {
    /// An error without an error number of the kernel.
    pub(super) fn new(step: Step, detail: impl Into<String>) -> Self {
        Self { step, errno: None, detail: shortened(detail.into()) }
    }
}

/// A message has to fit the control socket, whatever paths it names.
fn shortened(text: String) -> String {
    const MOST: usize = 1000;
    if text.chars().count() <= MOST {
        return text;
    }
    text.chars().take(MOST).chain(['…']).collect()
}

/// Adds the step and what was attempted to an error of the kernel.
pub(super) trait Context<T> {
    fn step(self, step: Step, attempt: impl std::fmt::Display) -> Result<T, SetupError>;
}

impl<T, E: Into<io::Error>> Context<T> for Result<T, E> {
    fn step(self, step: Step, attempt: impl std::fmt::Display) -> Result<T, SetupError> {
        self.map_err(|error| {
            let error: io::Error = error.into();
            let detail = shortened(format!("{attempt}: {error}"));
            SetupError { step, errno: error.raw_os_error(), detail }
        })
    }
}
