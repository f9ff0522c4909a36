//! The agent's side: from a command to a sandbox that runs it, made for it or beforehand. A
//! [`Launched`] command ends with its owner.

use std::ffi::OsString;
use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use cortex_shared::policy::Mode;
use tokio::net::unix::pipe;

use super::cgroup::{ControlGroups, Group};
use super::channel::Document;
use super::identity::{self, NoIdentity};
use super::mapping::Mappings;
use super::memory_file;
use super::planted::Before;
use super::protect;
use super::remedy::Refusal;
use super::spare::{NextSpare, Spares};
use super::spec::{
    Action, Confinement, Identity, LibrarySpec, Limits, Network, ProbeFacts, Spec, StrictSpec,
};
use super::stage_handle::{Stage, StageHandle};
use super::terminal::TerminalSize;
use super::workspace::{self, WorkspaceRefusal};

/// The oldest Landlock that makes a sandbox here.
const MINIMUM_LANDLOCK_ABI: i64 = 1;
/// How long a sandbox made beforehand may take to say that it has its command.
const TAKEN_WITHIN: Duration = Duration::from_secs(30);

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
    spares: Arc<Spares>,
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
    /// Whether it is given standard input; otherwise it reads end-of-file.
    pub stdin: bool,
    /// A terminal in place of pipes; its output is all standard output.
    pub terminal: Option<TerminalSize>,
    /// Directories of this machine that it sees read-only, at the same path.
    pub read_only: Vec<PathBuf>,
    /// The library of skills, which it sees read-only.
    pub library: Option<PathBuf>,
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
        Self {
            stage: stage.into(),
            groups: None,
            mappings: Arc::default(),
            broken: Arc::default(),
            spares: Arc::default(),
        }
    }

    /// With control groups, where this machine lets this process have them, and as many descriptors
    /// as this process may have. To be called once in a process, before it runs commands: it may move
    /// the process to another group.
    #[must_use]
    pub fn with_control_groups(self) -> Self {
        raise_own_limit();
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
        let limits = command.limits;
        let (mappings, program) = (Arc::clone(&self.mappings), self.stage.clone());
        let groups = self.groups.clone().unwrap_or_default();
        if command.require_control_group && groups.version() == "none" {
            return Err(LaunchError::Refused(ControlGroups::required_and_missing()));
        }
        let write = move || Files::write(command, &mappings, &program);
        let files = tokio::task::spawn_blocking(write).await.map_err(|error| {
            LaunchError::Io { attempt: "prepare the command", source: io::Error::other(error) }
        })??;

        let (stdout_writer, stdout) = output_pipe()?;
        let (stderr_writer, stderr) = output_pipe()?;
        let stdin = if stdin_wanted {
            let (sender, receiver) = pipe::pipe().map_err(io_error("create a pipe"))?;
            Some((sender, receiver.into_blocking_fd().map_err(io_error("create a pipe"))?))
        } else {
            None
        };
        let mut fds = vec![stdout_writer.as_fd(), stderr_writer.as_fd()];
        fds.extend(stdin.as_ref().map(|(_, read)| read.as_fd()));
        if let Confinement::Strict(StrictSpec { identity, .. }) = &files.confinement {
            give_pipes_to(*identity, &fds)?;
        }
        fds.extend(files.script.as_ref().map(OwnedFd::as_fd));
        fds.extend(files.tree.as_ref().map(OwnedFd::as_fd));
        fds.extend(files.library.as_ref().map(OwnedFd::as_fd));

        let spare = if is_probe { None } else { self.spares.take(&files.confinement) };
        let mut given = None;
        if let Some(spare) = spare {
            spare.group().limit(&limits).map_err(io_error("limit the control group"))?;
            given = give(spare, &files.spec, &fds).await?;
        }
        let (mut handle, group) = match given {
            Some(given) => given,
            None => {
                let group = groups.new_group().map_err(io_error("create a control group"))?;
                let group = group.unwrap_or_default();
                group.limit(&limits).map_err(io_error("limit the control group"))?;
                Stage::start(&self.stage, files.confinement.clone(), group)
                    .map_err(io_error("start the sandbox stage"))?
                    .give(&files.spec, &fds)
                    .map_err(io_error("instruct the sandbox stage"))?
            }
        };
        if !is_probe && is_worth_a_spare(&files.confinement) {
            handle.then(NextSpare {
                spares: Arc::downgrade(&self.spares),
                program: self.stage.clone(),
                groups,
                confinement: files.confinement,
            });
        }
        Ok(Launched {
            stdout,
            stderr,
            stdin: stdin.map(|(sender, _)| sender),
            before: files.before,
            group,
            stage: handle,
        })
    }

    /// Ends the sandbox that was made beforehand for the next command, and makes none any more. To be
    /// called before the agent ends, which otherwise leaves an empty control group behind.
    pub async fn close(&self) {
        self.spares.close().await;
    }
}

/// Descriptors that commands of the same user have on their way through sockets count against this
/// process's limit, too; theirs is set to at most half of what this process may have.
fn raise_own_limit() {
    use rustix::process::{Resource, getrlimit, setrlimit};
    let mut limit = getrlimit(Resource::Nofile);
    limit.current = limit.maximum;
    if let Err(error) = setrlimit(Resource::Nofile, limit) {
        tracing::debug!(%error, "the limit of open files stays");
    }
}

/// Gives a command to a sandbox made beforehand; `None` if that has died without taking it.
async fn give(
    spare: Stage,
    job: &Document,
    fds: &[BorrowedFd<'_>],
) -> Result<Option<(StageHandle, Group)>, LaunchError> {
    let (mut handle, group) =
        spare.give(job, fds).map_err(io_error("instruct the sandbox stage"))?;
    // Without its word, a command given to another sandbox could run twice.
    match tokio::time::timeout(TAKEN_WITHIN, handle.has_taken()).await {
        Ok(true) => Ok(Some((handle, group))),
        Ok(false) => Ok(None),
        Err(_) => Err(io_error("hand the command to its sandbox")(io::ErrorKind::TimedOut.into())),
    }
}

/// Whether the next command is likely to want the same. The host's network is for few commands, and
/// what `/etc` says about it may change.
fn is_worth_a_spare(confinement: &Confinement) -> bool {
    matches!(confinement, Confinement::Strict(StrictSpec { network: Network::None, .. }))
}

/// The command opens `/dev/stdout` by path, for which the pipe must belong to it.
fn give_pipes_to(identity: Identity, pipes: &[BorrowedFd<'_>]) -> Result<(), LaunchError> {
    if !identity.assumed {
        return Ok(());
    }
    let uid = rustix::fs::Uid::from_raw(identity.uid);
    let gid = rustix::fs::Gid::from_raw(identity.gid);
    pipes.iter().try_for_each(|pipe| {
        rustix::fs::fchown(pipe, Some(uid), Some(gid))
            .map_err(|error| io_error("hand the pipes to the command's user")(error.into()))
    })
}

fn output_pipe() -> Result<(OwnedFd, pipe::Receiver), LaunchError> {
    let (sender, receiver) = pipe::pipe().map_err(io_error("create a pipe"))?;
    Ok((sender.into_blocking_fd().map_err(io_error("create a pipe"))?, receiver))
}

/// What a command travels in.
struct Files {
    confinement: Confinement,
    spec: Document,
    script: Option<OwnedFd>,
    /// The workspace, where this process can mount it.
    tree: Option<OwnedFd>,
    /// The library, likewise.
    library: Option<OwnedFd>,
    before: Option<Before>,
}

impl Files {
    fn write(command: Command, mappings: &Mappings, stage: &Path) -> Result<Self, LaunchError> {
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
        let sealed =
            |bytes: &[u8]| memory_file::sealed(bytes).map_err(io_error("write a memory file"));
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
                temporary_bytes: command.limits.temporary_bytes,
            }),
        };
        let mut tree = None;
        if let (Confinement::Strict(StrictSpec { identity, .. }), Some(workspace)) =
            (&confinement, &mut workspace)
            && identity.assumed
        {
            let owner = (workspace.owner_uid, workspace.owner_gid);
            let mounted = if owner == (identity.uid, identity.gid) {
                workspace::mount(workspace, None)
            } else {
                mappings
                    .namespace(stage, owner, *identity)
                    .and_then(|mapping| workspace::mount(workspace, Some(&mapping)))
            };
            tree = Some(mounted.map_err(|error| LaunchError::Refused((&error).into()))?);
            workspace.mounted = true;
        }
        let (mut library, mut library_tree) = (None, None);
        if let (Confinement::Strict(StrictSpec { identity, .. }), Some(path)) =
            (&confinement, command.library)
        {
            if identity.assumed {
                let tree = workspace::mount_library(&path);
                library_tree = tree.map_err(|error| LaunchError::Refused((&error).into()))?;
            }
            let mounted = library_tree.is_some();
            library = (mounted || !identity.assumed).then_some(LibrarySpec { path, mounted });
        }
        let spec = Spec {
            action,
            env: command.env,
            cwd: OsString::from_vec(command.cwd).into(),
            workspace,
            library,
            limits: command.limits,
            stdin: command.stdin && command.terminal.is_none(),
            terminal: command.terminal,
        };
        let spec = Document::new(&spec)
            .map_err(io_error("write the specification"))?
            .ok_or(LaunchError::TooLong)?;
        Ok(Self { confinement, spec, script, tree, library: library_tree, before })
    }
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
