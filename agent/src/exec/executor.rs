//! What starts commands: from the request to a running command, and the look at what it left behind.

use std::sync::OnceLock;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio::time::Instant;

use super::policy;
use super::request::{CommandControl, CommandEvent, CommandExit, CommandRequest, CommandVerdict};
use super::run::{Running, UNTOLD, signal_code};
use crate::sandbox::{Before, Group, LaunchError, Launched, Launcher};

/// What a limit of memory means where the agent may create no control groups.
const BY_PROCESS: &str = "this node limits the memory of each process, not of the command as a whole, \
                          nor shared memory: it may create no control groups (see cortex-agent doctor)";

/// Runs commands.
#[derive(Debug, Clone)]
pub struct Executor {
    launcher: Launcher,
}

/// Runs one command with the executor of this process, which is prepared by the first call. See
/// [`Executor::run`].
pub async fn run(
    request: CommandRequest,
    initial_credit: u64,
    control: mpsc::Receiver<CommandControl>,
    events: mpsc::Sender<CommandEvent>,
) {
    Executor::of_this_process().run(request, initial_credit, control, events).await;
}

impl Executor {
    /// The one executor of this process, with the running program as the sandbox stage and with
    /// control groups where they are to be had. The first call prepares it, which may move this
    /// process to another control group.
    pub fn of_this_process() -> &'static Self {
        static SHARED: OnceLock<Executor> = OnceLock::new();
        SHARED.get_or_init(|| Self::new(Launcher::default().with_control_groups()))
    }

    /// What starts its commands.
    #[must_use]
    pub fn launcher(&self) -> &Launcher {
        &self.launcher
    }

    /// With a launcher of its own.
    #[must_use]
    pub fn new(launcher: Launcher) -> Self {
        Self { launcher }
    }

    /// Runs one command to its end. [`CommandEvent::Exit`] is the last event, whatever happens,
    /// unless the receiver is gone. If `control` is closed the command is ended; if this future
    /// is dropped it is killed.
    pub async fn run(
        &self,
        request: CommandRequest,
        initial_credit: u64,
        control: mpsc::Receiver<CommandControl>,
        events: mpsc::Sender<CommandEvent>,
    ) {
        let begun = Instant::now();
        let mode = request.mode;
        let with_terminal = request.terminal.is_some();
        let memory_asked = request.limits.memory_bytes.is_some();
        let mut exit = match self.start(request).await {
            Err(exit) => exit,
            Ok((mut launched, time_limit)) => {
                let before = launched.before.take();
                let group = std::mem::take(&mut launched.group);
                let memory_by_process = memory_asked && !group.exists();
                let mut running = Running::new(
                    launched,
                    mode,
                    initial_credit,
                    time_limit,
                    control,
                    events.clone(),
                );
                if with_terminal {
                    running.await_terminal();
                }
                let exit = Box::pin(running.run()).await;
                let mut exit = look_back(exit, before, group).await;
                if memory_by_process {
                    add_hint(&mut exit.hint, BY_PROCESS.to_owned());
                }
                exit
            }
        };
        exit.duration = begun.elapsed();
        // Nobody listens any more: then nobody is told.
        events.send(CommandEvent::Exit(exit)).await.ok();
    }

    async fn start(&self, request: CommandRequest) -> Result<(Launched, Duration), CommandExit> {
        let memory = rustix::system::sysinfo();
        let memory = u64::from(memory.mem_unit).saturating_mul(memory.totalram);
        let agent_env = |name: &str| {
            use std::os::unix::ffi::OsStringExt as _;
            std::env::var_os(name).map(|value| value.into_vec())
        };
        let (command, time_limit) =
            policy::resolve(request, memory, agent_env).map_err(|refusal| {
                CommandExit::new(CommandVerdict::Refused, refusal.to_string(), None)
            })?;
        match self.launcher.launch(command).await {
            Ok(launched) => Ok((launched, time_limit)),
            Err(LaunchError::Workspace(refusal)) => {
                let hint = refusal.hint().to_owned();
                Err(CommandExit::new(CommandVerdict::Refused, refusal.to_string(), Some(hint)))
            }
            Err(LaunchError::Identity(error)) => {
                let hint = error.hint().to_owned();
                Err(CommandExit::new(CommandVerdict::Refused, error.to_string(), Some(hint)))
            }
            Err(LaunchError::Refused(refusal)) => {
                let reason = format!("{}: {}", refusal.what, refusal.why);
                Err(CommandExit::new(CommandVerdict::Refused, reason, Some(refusal.remedy)))
            }
            Err(error @ LaunchError::TooLong) => {
                Err(CommandExit::new(CommandVerdict::Refused, error.to_string(), None))
            }
            Err(LaunchError::Io { attempt, source }) => {
                let reason = format!("{attempt}: {source}");
                Err(CommandExit::new(CommandVerdict::Failed, reason, None))
            }
        }
    }
}

/// Says what only shows afterwards: why it was killed, and what came or changed in its workspace that
/// programs outside the sandbox would obey.
async fn look_back(mut exit: CommandExit, before: Option<Before>, group: Group) -> CommandExit {
    let look = tokio::task::spawn_blocking(move || {
        group.end_all();
        (before.and_then(|before| before.look_again()), group.ran_out_of_memory())
    });
    // A panic there would be a mistake of ours, and no reason to hide how the command ended.
    let (changed, out_of_memory) = look.await.unwrap_or_default();
    if out_of_memory {
        if exit.reason.as_deref() == Some(UNTOLD) {
            // The kernel ended the process that would have told, with all others.
            exit.verdict = CommandVerdict::Signalled;
            exit.exit_code = signal_code(libc::SIGKILL);
            exit.signal = Some(libc::SIGKILL);
            (exit.reason, exit.hint) = (None, None);
        }
        add_hint(&mut exit.hint, "it ran out of memory: allow it more".to_owned());
    }
    if let Some(changed) = changed {
        add_hint(&mut exit.hint, changed);
    }
    exit
}

/// One hint never hides another.
fn add_hint(hint: &mut Option<String>, more: String) {
    *hint = Some(match hint.take() {
        Some(hint) => format!("{hint}; {more}"),
        None => more,
    });
}
