//! The agent's side: starts the stage, gives it its specification, and passes its reports on.
//!
//! The stage is started with `posix_spawn` (the standard library does so as long as nothing must
//! run in the child before `exec`), because a `fork` of a large agent takes milliseconds. A
//! [`Launched`] command ends with its owner: dropping it closes the control socket.

use std::ffi::OsString;
use std::io::{self, Write as _};
use std::os::fd::{AsFd as _, OwnedFd};
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};
use std::process::{ExitStatus, Stdio};
use std::sync::{Arc, OnceLock};

use cortex_shared::policy::Mode;
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::net::{AddressFamily, SocketFlags, SocketType};
use tokio::net::UnixDatagram;
use tokio::net::unix::pipe;
use tokio::process::Child;

use super::cgroup::{ControlGroups, Group};
use super::channel;
use super::identity::{self, NoIdentity};
use super::mapping::Mappings;
use super::planted::Before;
use super::protect;
use super::remedy::Refusal;
use super::spec::{
    Action, Confinement, ControlGroup, Ending, Limits, MAX_SPEC_BYTES, Network, Order, ProbeFacts,
    Report, STAGE_NAME, Spec, StrictSpec,
};
use super::terminal::TerminalSize;
use super::workspace::{self, WorkspaceRefusal};

/// The oldest Landlock that makes a sandbox here.
const MINIMUM_LANDLOCK_ABI: i64 = 1;

/// Starts commands.
#[derive(Debug, Clone)]
pub struct Launcher {
    /// A program that asks [`super::stage_requested`] first thing.
    stage: PathBuf,
    /// `None` until they are prepared; until then, commands have none.
    groups: Option<Arc<ControlGroups>>,
    mappings: Arc<Mappings>,
    /// What a probe found this kernel not to enforce, which refuses every strict command.
    broken: Arc<OnceLock<Refusal>>,
}

impl Default for Launcher {
    /// With the running program as the stage. The link survives an upgrade of the program's file.
    fn default() -> Self {
        Self::with_stage("/proc/self/exe")
    }
}

/// A command to be started.
#[derive(Debug, Clone)]
pub struct Command {
    /// What to run.
    pub program: Program,
    /// Its whole environment.
    pub env: Vec<(Vec<u8>, Vec<u8>)>,
    /// The directory of the workspace on this machine; without one, the command gets an empty
    /// private directory.
    pub workspace: Option<PathBuf>,
    /// The working directory, relative to the workspace.
    pub cwd: Vec<u8>,
    /// The mode in force.
    pub mode: Mode,
    /// What of the network it sees (in permissive mode always all).
    pub network: Network,
    /// Its limits.
    pub limits: Limits,
    /// Somebody asked for limits other than the node's own.
    pub limits_asked_for: bool,
    /// Whether it is given standard input; otherwise it reads end-of-file.
    pub stdin: bool,
    /// A terminal in place of pipes; its output is all standard output.
    pub terminal: Option<TerminalSize>,
    /// Directories of this machine that it sees read-only, at the same path.
    pub read_only: Vec<PathBuf>,
    /// Directories that no workspace may contain or lie in.
    pub forbidden: Vec<PathBuf>,
    /// Refuse it where there is no control group to limit it as a whole.
    pub require_control_group: bool,
}

/// What to run.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Program {
    /// A program and its arguments.
    Arguments(Vec<Vec<u8>>),
    /// A bash script.
    Script(Vec<u8>),
    /// Nothing: the sandbox is set up, verified, tried from within and left.
    Probe {
        /// An abstract socket that somebody listens on outside.
        abstract_socket: Vec<u8>,
    },
}

/// Why a command could not be handed to the stage. It has not run.
#[derive(Debug, thiserror::Error)]
pub enum LaunchError {
    /// The workspace must not be shown.
    #[error(transparent)]
    Workspace(#[from] WorkspaceRefusal),
    /// There is no user to run it as.
    #[error(transparent)]
    Identity(#[from] NoIdentity),
    /// Arguments and environment are too long.
    #[error("arguments and environment are too long")]
    TooLong,
    /// Something that was asked for is not to be had on this machine.
    #[error("{}: {}", .0.what, .0.why)]
    Refused(Refusal),
    /// The agent lacks something to start a process.
    #[error("{attempt}")]
    Io {
        /// What was attempted.
        attempt: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

fn io_error(attempt: &'static str) -> impl Fn(io::Error) -> LaunchError {
    move |source| LaunchError::Io { attempt, source }
}

impl Launcher {
    /// With another program as the stage.
    #[must_use]
    pub fn with_stage(stage: impl Into<PathBuf>) -> Self {
        Self { stage: stage.into(), groups: None, mappings: Arc::default(), broken: Arc::default() }
    }

    /// With control groups, where this machine lets this process have them. To be called once in a
    /// process, before it runs commands: it may move the process to another group.
    #[must_use]
    pub fn with_control_groups(self) -> Self {
        Self { groups: Some(Arc::new(ControlGroups::prepare())), ..self }
    }

    /// Which control groups are used: "v2", "v1" or "none". Before they are prepared, which are
    /// likely to be.
    #[must_use]
    pub fn control_groups(&self) -> &'static str {
        self.groups.as_ref().map_or_else(ControlGroups::likely_version, |groups| groups.version())
    }

    /// Refuses every strict command from now on, for the reason that a probe found.
    pub(super) fn refuse_from_now_on(&self, refusal: Refusal) {
        // The first reason is as good as any later one.
        self.broken.set(refusal).ok();
    }

    /// Starts a command. Whether it could be set up and executed is told by
    /// [`StageHandle::next_message`].
    ///
    /// # Errors
    /// If the workspace is refused or the stage cannot be started; nothing runs then.
    pub async fn launch(&self, command: Command) -> Result<Launched, LaunchError> {
        let stdin_wanted = command.stdin && command.terminal.is_none();
        let is_probe = matches!(command.program, Program::Probe { .. });
        if let Some(refusal) =
            self.broken.get().filter(|_| command.mode == Mode::Strict && !is_probe)
        {
            return Err(LaunchError::Refused(refusal.clone()));
        }
        // Looking at the workspace touches the disk, which may be slow or a dead network mount.
        let groups = self.groups.clone().unwrap_or_default();
        let (mappings, stage) = (Arc::clone(&self.mappings), self.stage.clone());
        let write = move || Files::write(command, &groups, &mappings, &stage);
        let files = tokio::task::spawn_blocking(write).await.map_err(|error| {
            LaunchError::Io { attempt: "prepare the command", source: io::Error::other(error) }
        })??;

        let (ours, theirs) = rustix::net::socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )
        .map_err(|error| io_error("create the control socket")(error.into()))?;
        let (stdout_writer, stdout) = output_pipe()?;
        let (stderr_writer, stderr) = output_pipe()?;
        let stdin = if stdin_wanted {
            let (sender, receiver) = pipe::pipe().map_err(io_error("create a pipe"))?;
            Some((sender, receiver.into_blocking_fd().map_err(io_error("create a pipe"))?))
        } else {
            None
        };

        let monitor = tokio::process::Command::new(&self.stage)
            .arg0(STAGE_NAME)
            .env_clear()
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::from(stdout_writer))
            .stderr(Stdio::from(stderr_writer))
            .spawn()
            .map_err(io_error("start the sandbox stage"))?;

        let mut fds = vec![files.spec.as_fd()];
        fds.extend(files.script.as_ref().map(OwnedFd::as_fd));
        fds.extend(stdin.as_ref().map(|(_, read)| read.as_fd()));
        fds.extend(files.mapping.as_ref().map(OwnedFd::as_fd));
        fds.extend(files.group.entrance().iter().map(OwnedFd::as_fd));
        channel::send_descriptors(&ours, &fds).map_err(io_error("instruct the sandbox stage"))?;

        rustix::io::ioctl_fionbio(&ours, true)
            .map_err(|error| io_error("create the control socket")(error.into()))?;
        Ok(Launched {
            stdout,
            stderr,
            stdin: stdin.map(|(sender, _)| sender),
            before: files.before,
            group: files.group,
            stage: StageHandle {
                control: UnixDatagram::from_std(ours.into())
                    .map_err(io_error("watch the control socket"))?,
                control_open: true,
                monitor,
            },
        })
    }
}

fn output_pipe() -> Result<(OwnedFd, pipe::Receiver), LaunchError> {
    let (sender, receiver) = pipe::pipe().map_err(io_error("create a pipe"))?;
    Ok((sender.into_blocking_fd().map_err(io_error("create a pipe"))?, receiver))
}

/// The sealed memory files that a command travels in.
struct Files {
    spec: OwnedFd,
    script: Option<OwnedFd>,
    mapping: Option<OwnedFd>,
    before: Option<Before>,
    group: Group,
}

impl Files {
    fn write(
        command: Command,
        groups: &ControlGroups,
        mappings: &Mappings,
        stage: &Path,
    ) -> Result<Self, LaunchError> {
        let mut workspace = command
            .workspace
            .as_deref()
            .map(|root| workspace::check(root, &command.forbidden))
            .transpose()?;
        let before = match (&mut workspace, command.mode) {
            (Some(workspace), Mode::Strict) => {
                let before = Before::of(&workspace.path);
                workspace.pins = protect::pins(before.survey());
                Some(before)
            }
            _ => None,
        };
        let (action, script) = match command.program {
            Program::Arguments(arguments) => (Action::Program(arguments), None),
            Program::Script(text) => (Action::Script, Some(sealed(&text)?)),
            Program::Probe { abstract_socket } => {
                let agent = rustix::process::getpid().as_raw_nonzero().get();
                let hidden = command.forbidden;
                (Action::Probe(ProbeFacts { agent, abstract_socket, hidden }), None)
            }
        };
        let confinement = match command.mode {
            Mode::Permissive => Confinement::Permissive,
            Mode::Strict => Confinement::Strict(StrictSpec {
                identity: identity::of_commands()?,
                network: command.network,
                read_only: command.read_only,
                minimum_landlock_abi: MINIMUM_LANDLOCK_ABI,
            }),
        };
        let mut mapping = None;
        if let (Confinement::Strict(strict), Some(workspace)) = (&confinement, &mut workspace) {
            let (owner, identity) = ((workspace.owner_uid, workspace.owner_gid), strict.identity);
            if identity.assumed && owner != (identity.uid, identity.gid) {
                let made = mappings.namespace(stage, owner, identity);
                mapping = Some(made.map_err(|error| LaunchError::Refused((&error).into()))?);
                workspace.mapped = true;
            }
        }
        // A permissive command has no other boundary that it could not leave.
        let wanted = command.limits_asked_for
            || command.require_control_group
            || command.mode == Mode::Permissive;
        let group = groups
            .group_for(&command.limits, wanted)
            .map_err(io_error("create a control group"))?
            .unwrap_or_default();
        if command.require_control_group && group.entrance().is_empty() {
            return Err(LaunchError::Refused(ControlGroups::required_and_missing()));
        }
        let control_group = match group.entrance().len() {
            0 => ControlGroup::None,
            _ if groups.are_born_into() => ControlGroup::BornInto,
            count => ControlGroup::Joined(count),
        };
        let spec = Spec {
            confinement,
            action,
            env: command.env,
            cwd: OsString::from_vec(command.cwd).into(),
            workspace,
            limits: command.limits,
            stdin: command.stdin && command.terminal.is_none(),
            terminal: command.terminal,
            control_group,
        };
        let spec = serde_json::to_vec(&spec).map_err(|error| LaunchError::Io {
            attempt: "write the specification",
            source: error.into(),
        })?;
        if u64::try_from(spec.len()).map_or(true, |length| length > MAX_SPEC_BYTES) {
            return Err(LaunchError::TooLong);
        }
        Ok(Self { spec: sealed(&spec)?, script, mapping, before, group })
    }
}

/// A memory file that nobody can change any more.
fn sealed(bytes: &[u8]) -> Result<OwnedFd, LaunchError> {
    let write = || -> io::Result<OwnedFd> {
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let mut file = std::fs::File::from(rustix::fs::memfd_create("cortex", flags)?);
        file.write_all(bytes)?;
        std::io::Seek::rewind(&mut file)?;
        let seals = SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL;
        rustix::fs::fcntl_add_seals(&file, seals)?;
        Ok(file.into())
    };
    write().map_err(io_error("write a memory file"))
}

/// A started command.
#[derive(Debug)]
pub struct Launched {
    /// Its standard output.
    pub stdout: pipe::Receiver,
    /// Its standard error.
    pub stderr: pipe::Receiver,
    /// Its standard input, where it was asked for.
    pub stdin: Option<pipe::Sender>,
    /// What stood in its workspace before; `None` without one and in permissive mode.
    pub before: Option<Before>,
    /// Its control group, to be dropped when it is over.
    pub group: Group,
    /// Its life.
    pub stage: StageHandle,
}

/// What reports on a started command and takes orders for it. Dropping it ends the command.
#[derive(Debug)]
pub struct StageHandle {
    /// A socket of whole messages; the type fits every kind of unix socket that keeps them apart.
    control: UnixDatagram,
    control_open: bool,
    monitor: Child,
}

/// What happens to a started command, in this order: `Started`, `Ended`, `Over`; or one of the
/// failures and `Over`.
#[derive(Debug)]
pub enum StageMessage {
    /// The agent's side of its terminal, where it was asked for one. Before `Started`.
    Terminal(OwnedFd),
    /// The command runs.
    Started,
    /// The program was not found or cannot be executed; nothing has run.
    NotExecuted {
        /// The program.
        program: String,
        /// Why.
        source: io::Error,
    },
    /// The sandbox could not be set up; nothing has run.
    Refused(Refusal),
    /// The command has run, or may have, and is ended because it cannot be looked after any more.
    Failed(Refusal),
    /// The command itself ended.
    Ended(Ending),
    /// Every process of the command has ended, and nothing more will come.
    Over(ExitStatus),
}

impl StageHandle {
    /// The process with which all others of this command end.
    #[must_use]
    pub fn process_id(&self) -> Option<u32> {
        self.monitor.id()
    }

    /// Waits for the next message. Cancelling the wait loses nothing.
    ///
    /// # Errors
    /// If the stage speaks nonsense or cannot be waited for.
    pub async fn next_message(&mut self) -> io::Result<StageMessage> {
        if self.control_open {
            tokio::select! {
                biased;
                report = receive(&self.control) => match report? {
                    Some(message) => return Ok(message),
                    None => self.control_open = false,
                },
                status = self.monitor.wait() => {
                    let status = status?;
                    // What it said last may still lie in the socket.
                    return match receive_now(&self.control) {
                        Ok(Some(message)) => Ok(message),
                        Ok(None) | Err(_) => Ok(StageMessage::Over(status)),
                    };
                }
            }
        }
        self.monitor.wait().await.map(StageMessage::Over)
    }

    /// Sends a signal to the command's process group. Without effect once it has ended.
    pub fn signal(&self, number: i32) {
        self.order(Order::Signal(number));
    }

    /// Ends every process of the command now.
    pub fn kill(&self) {
        self.order(Order::Kill);
    }

    /// Ends the monitor, and by that everything, where [`StageHandle::kill`] had no effect.
    pub fn kill_monitor(&mut self) {
        // Fails only if it has ended, which is what is wanted.
        self.monitor.start_kill().ok();
    }

    fn order(&self, order: Order) {
        if let Err(error) = channel::send(&self.control, &order) {
            tracing::debug!(%error, "the sandbox takes no more orders");
        }
    }
}

async fn receive(control: &UnixDatagram) -> io::Result<Option<StageMessage>> {
    loop {
        control.readable().await?;
        match receive_now(control) {
            // The readiness was of the past; try_io tells the runtime so.
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                control.try_io(tokio::io::Interest::READABLE, || Err::<(), _>(error)).ok();
            }
            result => return result,
        }
    }
}

fn receive_now(control: &UnixDatagram) -> io::Result<Option<StageMessage>> {
    let Some((report, fd)) = channel::receive_with_descriptor(control)? else { return Ok(None) };
    Ok(Some(match report {
        Report::Terminal => StageMessage::Terminal(
            fd.ok_or_else(|| io::Error::other("the stage sent no terminal"))?,
        ),
        Report::Started => StageMessage::Started,
        Report::NotExecuted { errno, program } => {
            StageMessage::NotExecuted { program, source: io::Error::from_raw_os_error(errno) }
        }
        Report::Refused(error) => StageMessage::Refused(Refusal::from(&error)),
        Report::Failed(error) => StageMessage::Failed(Refusal::from(&error)),
        Report::Ended(ending) => StageMessage::Ended(ending),
    }))
}
