//! One command from request to exit.
//!
//! One loop owns everything: the stage, both pipes, standard input, credit and deadlines. It never
//! waits for the receiver of events alone, so a stalled reader cannot keep a cancel from working.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::sync::OnceLock;
use std::time::Duration;

use cortex_shared::policy::Mode;
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::output::OutputPipe;
use super::policy;
use super::request::{
    CommandControl, CommandEvent, CommandExit, CommandRequest, CommandVerdict, OutputStream,
};
use super::stdin::Stdin;
use super::terminal::Terminal;
use crate::sandbox::{
    Absent, Ending, Group, LaunchError, Launched, Launcher, StageHandle, StageMessage, TerminalSize,
};

/// The reason given where even the process that tells of the command's end was ended.
const UNTOLD: &str = "the sandbox ended without telling how the command did";
/// Longest time from starting the stage to the command being executed.
const START_TIMEOUT: Duration = Duration::from_secs(30);
/// Between the polite signal and the final one, where nobody chose.
const DEFAULT_GRACE: Duration = Duration::from_secs(2);
/// Longest grace that a caller may choose.
const MAX_GRACE: Duration = Duration::from_secs(10 * 60);
/// How long the kernel may take to end everything before the next harder means is tried.
const KILL_PATIENCE: Duration = Duration::from_secs(5);

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
    /// unless the receiver is gone. If `control` is closed the command is cancelled; if this future
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
        let mut exit = match self.start(request).await {
            Err(exit) => exit,
            Ok((mut launched, time_limit)) => {
                let absent = std::mem::take(&mut launched.absent);
                let group = std::mem::take(&mut launched.group);
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
                look_back(exit, absent, group).await
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
        let (command, time_limit) = policy::resolve(request, memory, agent_env)
            .map_err(|refusal| verdict(CommandVerdict::Refused, refusal.to_string(), None))?;
        match self.launcher.launch(command).await {
            Ok(launched) => Ok((launched, time_limit)),
            Err(LaunchError::Workspace(refusal)) => {
                let hint = refusal.hint().to_owned();
                Err(verdict(CommandVerdict::Refused, refusal.to_string(), Some(hint)))
            }
            Err(LaunchError::Identity(error)) => {
                let hint = error.hint().to_owned();
                Err(verdict(CommandVerdict::Refused, error.to_string(), Some(hint)))
            }
            Err(LaunchError::Refused(refusal)) => {
                let reason = format!("{}: {}", refusal.what, refusal.why);
                Err(verdict(CommandVerdict::Refused, reason, Some(refusal.remedy)))
            }
            Err(error @ LaunchError::TooLong) => {
                Err(verdict(CommandVerdict::Refused, error.to_string(), None))
            }
            Err(LaunchError::Io { attempt, source }) => {
                let reason = format!("{attempt}: {source}");
                Err(verdict(CommandVerdict::Failed, reason, None))
            }
        }
    }
}

/// Says what only shows afterwards: why it was killed, and what it left in its workspace that
/// programs outside the sandbox would obey.
async fn look_back(mut exit: CommandExit, absent: Absent, group: Group) -> CommandExit {
    let look = tokio::task::spawn_blocking(move || (absent.present(), group.ran_out_of_memory()));
    // A panic there would be a mistake of ours, and no reason to hide how the command ended.
    let (appeared, out_of_memory) = look.await.unwrap_or_default();
    if out_of_memory {
        if exit.reason.as_deref() == Some(UNTOLD) {
            // The kernel ended the process that would have told, with all others.
            exit.verdict = CommandVerdict::Signalled;
            exit.exit_code = signal_code(libc::SIGKILL);
            exit.signal = Some(libc::SIGKILL);
            (exit.reason, exit.hint) = (None, None);
        }
        exit.hint.get_or_insert_with(|| "it ran out of memory: allow it more".to_owned());
    }
    if exit.hint.is_none() && !appeared.is_empty() {
        let names: Vec<_> = appeared.iter().map(|name| name.display().to_string()).collect();
        exit.hint = Some(format!(
            "it created {}, which programs outside the sandbox obey: look at it before using git, \
             a shell or an editor in this workspace",
            names.join(", ")
        ));
    }
    exit
}

fn verdict(verdict: CommandVerdict, reason: String, hint: Option<String>) -> CommandExit {
    let nothing = *blake3::hash(b"").as_bytes();
    let exit_code = match verdict {
        CommandVerdict::TimeLimit => 124,
        CommandVerdict::Refused => 126,
        CommandVerdict::NotFound => 127,
        CommandVerdict::Exited => 0,
        CommandVerdict::Signalled | CommandVerdict::Cancelled | CommandVerdict::Failed => 125,
    };
    CommandExit {
        verdict,
        exit_code,
        signal: None,
        stdout_bytes: 0,
        stdout_hash: nothing,
        stderr_bytes: 0,
        stderr_hash: nothing,
        reason: (!reason.is_empty()).then_some(reason),
        hint,
        duration: Duration::ZERO,
    }
}

/// Why a command is being ended from here.
#[derive(Debug)]
enum Stop {
    TimeLimit,
    Cancelled(&'static str),
    Failed(String),
}

/// How far ending it has come. Each step has a time after which the next is taken.
#[derive(Debug, Clone, Copy)]
enum Escalation {
    /// Not being ended.
    None,
    /// Asked to end; will be killed then.
    Asked(Instant),
    /// Killed through pid 1; the monitor will be killed then.
    Killed(Instant),
    /// The monitor was killed; given up then.
    MonitorKilled(Instant),
    /// Not even the kernel ends it.
    GivenUp,
}

impl Escalation {
    fn deadline(self) -> Option<Instant> {
        match self {
            Self::Asked(at) | Self::Killed(at) | Self::MonitorKilled(at) => Some(at),
            Self::None | Self::GivenUp => None,
        }
    }
}

/// What the loop woke up for.
enum Wake {
    Order(Option<CommandControl>),
    Message(std::io::Result<StageMessage>),
    Deadline,
    /// The receiver of events has room, or is gone.
    Room(Result<mpsc::OwnedPermit<CommandEvent>, mpsc::error::SendError<()>>),
    Frame(OutputStream, Option<bytes::Bytes>),
}

/// The terminal of a command.
#[derive(Debug)]
enum TerminalState {
    /// It has none.
    None,
    /// It is to have one, of this size if it has changed since it was asked for.
    Awaited(Option<TerminalSize>),
    Open(Terminal),
}

struct Running {
    stage: StageHandle,
    mode: Mode,
    stdout: OutputPipe,
    stderr: OutputPipe,
    stdin: Stdin,
    terminal: TerminalState,
    credit: u64,
    control: mpsc::Receiver<CommandControl>,
    control_open: bool,
    events: mpsc::Sender<CommandEvent>,
    /// At most an event of each kind; output is read only when this is empty.
    pending: VecDeque<CommandEvent>,
    /// When the stage has to have executed the command.
    start_by: Instant,
    time_limit: Duration,
    /// When the command's time is up: counted from its start, so that a slow machine does not
    /// report a command as too slow that never ran. `None` before.
    deadline: Option<Instant>,
    started: bool,
    ending: Option<Ending>,
    /// The command was never executed, and this is why.
    not_run: Option<CommandExit>,
    stop: Option<Stop>,
    escalation: Escalation,
    /// All processes have ended.
    over: bool,
    /// Nobody wants the rest of the output.
    abandoned: bool,
}

impl Running {
    fn new(
        launched: Launched,
        mode: Mode,
        credit: u64,
        time_limit: Duration,
        control: mpsc::Receiver<CommandControl>,
        events: mpsc::Sender<CommandEvent>,
    ) -> Self {
        Self {
            stage: launched.stage,
            mode,
            stdout: OutputPipe::new(launched.stdout),
            stderr: OutputPipe::new(launched.stderr),
            stdin: Stdin::new(launched.stdin),
            terminal: TerminalState::None,
            credit,
            control,
            control_open: true,
            events,
            pending: VecDeque::new(),
            start_by: Instant::now() + START_TIMEOUT,
            time_limit,
            deadline: None,
            started: false,
            ending: None,
            not_run: None,
            stop: None,
            escalation: Escalation::None,
            over: false,
            abandoned: false,
        }
    }

    async fn run(mut self) -> CommandExit {
        while !self.is_finished() {
            let may_read = self.started && self.credit > 0 && self.pending.is_empty();
            let has_event = !self.pending.is_empty() || self.stdin.has_taken();
            let deadline = self.next_deadline();
            let wake = tokio::select! {
                order = self.control.recv(), if self.control_open => Wake::Order(order),
                message = self.stage.next_message(), if !self.over => Wake::Message(message),
                () = tokio::time::sleep_until(deadline.unwrap_or(self.start_by)),
                    if deadline.is_some() => Wake::Deadline,
                permit = self.events.clone().reserve_owned(), if has_event => Wake::Room(permit),
                frame = self.stdout.next_frame(self.credit),
                    if may_read && !self.stdout.is_done() => Wake::Frame(OutputStream::Stdout, frame),
                frame = self.stderr.next_frame(self.credit),
                    if may_read && !self.stderr.is_done() => Wake::Frame(OutputStream::Stderr, frame),
                () = self.stdin.write(), if self.stdin.wants_to_write() => continue,
            };
            match wake {
                Wake::Order(order) => self.take_order(order),
                Wake::Message(message) => self.take_message(message),
                Wake::Deadline => self.deadline_passed(),
                Wake::Room(Ok(permit)) => {
                    let event = self
                        .pending
                        .pop_front()
                        .unwrap_or_else(|| CommandEvent::StdinTaken(self.stdin.take_taken()));
                    permit.send(event);
                }
                Wake::Room(Err(_)) => self.abandon("nobody listens to the command any more"),
                Wake::Frame(stream, frame) => self.take_frame(stream, frame),
            }
        }
        self.exit()
    }

    /// The command has a terminal in place of pipes.
    fn await_terminal(&mut self) {
        self.terminal = TerminalState::Awaited(None);
        self.stdin = Stdin::of_terminal();
    }

    fn open_terminal(&mut self, master: OwnedFd) -> std::io::Result<()> {
        let (terminal, output, input) = Terminal::new(master)?;
        if let TerminalState::Awaited(Some(size)) = self.terminal {
            terminal.resize(size);
        }
        self.stdout = OutputPipe::of_terminal(output);
        self.stdin.open(input);
        self.terminal = TerminalState::Open(terminal);
        Ok(())
    }

    fn resize(&mut self, size: TerminalSize) {
        match &mut self.terminal {
            TerminalState::None => {}
            TerminalState::Awaited(awaited) => *awaited = Some(size),
            TerminalState::Open(terminal) => terminal.resize(size),
        }
    }

    fn is_finished(&self) -> bool {
        if !self.over {
            return matches!(self.escalation, Escalation::GivenUp);
        }
        let drained = !self.started || (self.stdout.is_done() && self.stderr.is_done());
        // Without anybody who could give credit, what cannot be sent never will be.
        let stuck = !self.control_open && self.credit == 0;
        self.abandoned || (self.pending.is_empty() && (drained || stuck))
    }

    fn next_deadline(&self) -> Option<Instant> {
        if self.over {
            return None;
        }
        match self.escalation {
            Escalation::None => Some(self.deadline.unwrap_or(self.start_by)),
            escalation => escalation.deadline(),
        }
    }

    fn deadline_passed(&mut self) {
        let now = Instant::now();
        match self.escalation {
            Escalation::None if self.started => {
                self.stop(Stop::TimeLimit, libc::SIGTERM, DEFAULT_GRACE);
            }
            Escalation::None => {
                let reason = "the sandbox could not be set up in time".to_owned();
                self.stop(Stop::Failed(reason), libc::SIGTERM, Duration::ZERO);
            }
            Escalation::Asked(_) => {
                self.stage.kill();
                self.escalation = Escalation::Killed(now + KILL_PATIENCE);
            }
            Escalation::Killed(_) => {
                self.stage.kill_monitor();
                self.escalation = Escalation::MonitorKilled(now + KILL_PATIENCE);
            }
            Escalation::MonitorKilled(_) | Escalation::GivenUp => {
                self.escalation = Escalation::GivenUp;
            }
        }
    }

    /// Begins to end the command. The first reason counts; a later call can only hasten it.
    fn stop(&mut self, reason: Stop, signal: i32, grace: Duration) {
        if self.over {
            return;
        }
        self.stop.get_or_insert(reason);
        // What has not been executed yet has nothing to tidy up, and may not have a group to
        // signal.
        let grace = if self.started { grace.min(MAX_GRACE) } else { Duration::ZERO };
        if self.started {
            self.signal(signal);
        }
        let kill_at = Instant::now() + grace;
        self.escalation = match self.escalation {
            Escalation::None => Escalation::Asked(kill_at),
            Escalation::Asked(at) => Escalation::Asked(at.min(kill_at)),
            further => further,
        };
    }

    /// Asks the command to end, or whatever the signal says.
    fn signal(&self, signal: i32) {
        if signal == libc::SIGTERM && !matches!(self.terminal, TerminalState::None) {
            // An interactive shell ignores the request to terminate. It ends, and tells its jobs,
            // when its terminal hangs up; a job that is stopped hears of it once it continues.
            self.stage.signal(libc::SIGHUP);
            self.stage.signal(libc::SIGCONT);
        } else {
            self.stage.signal(signal);
        }
    }

    fn abandon(&mut self, why: &'static str) {
        self.stop(Stop::Cancelled(why), libc::SIGTERM, DEFAULT_GRACE);
        self.pending.clear();
        self.stdin.close();
        self.stdin.take_taken();
        self.credit = 0;
        self.control_open = false;
        self.abandoned = true;
    }

    fn take_order(&mut self, order: Option<CommandControl>) {
        match order {
            Some(CommandControl::Credit(bytes)) => self.credit = self.credit.saturating_add(bytes),
            Some(CommandControl::Stdin { data, end }) => {
                if let Err(error) = self.stdin.push(data, end) {
                    self.stop(Stop::Failed(error.to_string()), libc::SIGTERM, DEFAULT_GRACE);
                }
            }
            Some(CommandControl::Signal(number)) => self.stage.signal(number),
            Some(CommandControl::Resize(size)) => self.resize(size),
            Some(CommandControl::Cancel { .. }) if self.over => {
                // Only undelivered output is left, and it is no longer wanted.
                self.abandoned = true;
            }
            Some(CommandControl::Cancel { signal, grace }) => {
                let signal = if signal == 0 { libc::SIGTERM } else { signal };
                self.stop(Stop::Cancelled("cancelled on request"), signal, grace);
            }
            None => {
                self.control_open = false;
                let why = "the connection that the command belonged to was closed";
                self.stop(Stop::Cancelled(why), libc::SIGTERM, DEFAULT_GRACE);
            }
        }
    }

    fn take_message(&mut self, message: std::io::Result<StageMessage>) {
        match message {
            Ok(StageMessage::Terminal(master)) => {
                if let Err(error) = self.open_terminal(master) {
                    let reason = format!("the terminal cannot be used: {error}");
                    self.stop(Stop::Failed(reason), libc::SIGTERM, Duration::ZERO);
                }
            }
            Ok(StageMessage::Started) => {
                self.started = true;
                self.deadline = Some(Instant::now() + self.time_limit);
                let process_id = self.stage.process_id().unwrap_or(0);
                self.pending.push_back(CommandEvent::Started { process_id, mode: self.mode });
            }
            Ok(StageMessage::NotExecuted { program, source }) => {
                let missing = matches!(
                    source.raw_os_error(),
                    Some(
                        libc::ENOENT
                            | libc::EACCES
                            | libc::ENOTDIR
                            | libc::ENOEXEC
                            | libc::ELOOP
                            | libc::EPERM
                            | libc::EISDIR
                            | libc::EINVAL
                    )
                );
                let kind = if missing { CommandVerdict::NotFound } else { CommandVerdict::Failed };
                let reason = format!("cannot execute {program}: {source}");
                self.not_run = Some(verdict(kind, reason, None));
            }
            Ok(StageMessage::Refused(refusal)) => {
                let reason = format!("{}: {}", refusal.what, refusal.why);
                self.not_run = Some(verdict(CommandVerdict::Refused, reason, Some(refusal.remedy)));
            }
            Ok(StageMessage::Ended(ending)) => self.ending = Some(ending),
            Ok(StageMessage::Over(status)) => {
                tracing::trace!(%status, "all processes of the command have ended");
                self.finish();
            }
            Err(error) => {
                self.stop(
                    Stop::Failed(format!("the sandbox stage cannot be understood: {error}")),
                    libc::SIGTERM,
                    Duration::ZERO,
                );
                self.stage.kill_monitor();
            }
        }
    }

    fn finish(&mut self) {
        self.over = true;
        self.stdout.writers_are_gone();
        self.stderr.writers_are_gone();
        self.stdin.close();
    }

    fn take_frame(&mut self, stream: OutputStream, frame: Option<bytes::Bytes>) {
        let Some(data) = frame else { return };
        let bytes = u64::try_from(data.len()).unwrap_or(u64::MAX);
        self.credit = self.credit.saturating_sub(bytes);
        let pipe = match stream {
            OutputStream::Stdout => &self.stdout,
            OutputStream::Stderr => &self.stderr,
        };
        let offset = pipe.bytes() - bytes;
        self.pending.push_back(CommandEvent::Output { stream, offset, data });
    }

    fn exit(mut self) -> CommandExit {
        let mut exit = self.not_run.take().unwrap_or_else(|| self.verdict());
        exit.stdout_bytes = self.stdout.bytes();
        exit.stdout_hash = self.stdout.hash();
        exit.stderr_bytes = self.stderr.bytes();
        exit.stderr_hash = self.stderr.hash();
        exit
    }

    fn verdict(&mut self) -> CommandExit {
        let (code, signal) = match self.ending {
            Some(Ending::Exited(code)) => (u8::try_from(code).unwrap_or(u8::MAX), None),
            Some(Ending::Signalled(signal)) => (signal_code(signal), Some(signal)),
            None => (signal_code(libc::SIGKILL), Some(libc::SIGKILL)),
        };
        let mut exit = match self.stop.take() {
            _ if matches!(self.escalation, Escalation::GivenUp) => {
                let reason = "the kernel does not end the command's processes".to_owned();
                let hint = "look for a hung file system or device on this node".to_owned();
                return verdict(CommandVerdict::Failed, reason, Some(hint));
            }
            Some(Stop::TimeLimit) => {
                let reason = format!("it ran longer than its limit of {:?}", self.time_limit);
                verdict(CommandVerdict::TimeLimit, reason, None)
            }
            Some(Stop::Cancelled(why)) => {
                let mut exit = verdict(CommandVerdict::Cancelled, why.to_owned(), None);
                exit.exit_code = code;
                exit
            }
            Some(Stop::Failed(reason)) => verdict(CommandVerdict::Failed, reason, None),
            None => match self.ending {
                Some(Ending::Exited(_)) => {
                    let mut exit = verdict(CommandVerdict::Exited, String::new(), None);
                    exit.exit_code = code;
                    exit
                }
                Some(Ending::Signalled(_)) => {
                    let mut exit = verdict(CommandVerdict::Signalled, String::new(), None);
                    exit.exit_code = code;
                    exit
                }
                None => verdict(
                    CommandVerdict::Failed,
                    UNTOLD.to_owned(),
                    Some("was this node out of memory? see the kernel's log".to_owned()),
                ),
            },
        };
        exit.signal = signal.filter(|_| self.ending.is_some());
        exit
    }
}

/// What a shell says of a command that a signal ended.
fn signal_code(signal: i32) -> u8 {
    u8::try_from(signal).map_or(u8::MAX, |signal| signal.saturating_add(128))
}
