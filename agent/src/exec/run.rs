//! One command from start to exit.
//!
//! One loop owns everything: the stage, both pipes, standard input, credit and deadlines. It never
//! waits for the receiver of events alone, so a stalled reader cannot keep a cancel from working.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;
use std::time::Duration;

use cortex_shared::policy::Mode;
use tokio::sync::mpsc;
use tokio::time::Instant;

use super::output::OutputPipe;
use super::request::{
    CancelCause, CommandControl, CommandEvent, CommandExit, CommandVerdict, OutputStream,
};
use super::stdin::Stdin;
use super::terminal::Terminal;
use crate::sandbox::{Ending, Launched, Refusal, StageHandle, StageMessage, TerminalSize};

/// The reason given where even the process that tells of the command's end was ended.
pub(super) const UNTOLD: &str = "the sandbox ended without telling how the command did";
/// Longest time from starting the stage to the command being executed.
const START_TIMEOUT: Duration = Duration::from_secs(30);
/// Between the polite signal and the final one, where nobody chose.
const DEFAULT_GRACE: Duration = Duration::from_secs(2);
/// Longest grace that a caller may choose.
const MAX_GRACE: Duration = Duration::from_secs(10 * 60);
/// How long the output of a cancelled command, all of whose processes have ended, may stand still before
/// the rest of it is given up.
const DRAIN: Duration = Duration::from_secs(2);
/// How long the kernel may take to end everything before the next harder means is tried.
const KILL_PATIENCE: Duration = Duration::from_secs(5);

/// Why a command is being ended from here.
#[derive(Debug)]
enum Stop {
    TimeLimit,
    Cancelled(CancelCause),
    Failed(String, Option<String>),
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

pub(super) struct Running {
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
    /// When output last came from the command, or the last of its processes ended.
    moved_at: Instant,
}

impl Running {
    pub(super) fn new(
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
            moved_at: Instant::now(),
        }
    }

    pub(super) async fn run(mut self) -> CommandExit {
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
                Wake::Room(Err(_)) => self.abandon(),
                Wake::Frame(stream, frame) => self.take_frame(stream, frame),
            }
        }
        self.exit()
    }

    /// The command has a terminal in place of pipes.
    pub(super) fn await_terminal(&mut self) {
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
            // Who cancelled it waits for its end, not for output that nobody takes.
            let cancelled = matches!(self.stop, Some(Stop::Cancelled(_)));
            return cancelled.then_some(self.moved_at + DRAIN);
        }
        match self.escalation {
            Escalation::None => Some(self.deadline.unwrap_or(self.start_by)),
            escalation => escalation.deadline(),
        }
    }

    fn deadline_passed(&mut self) {
        let now = Instant::now();
        if self.over {
            self.abandoned = true;
            return;
        }
        match self.escalation {
            Escalation::None if self.started => {
                self.stop(Stop::TimeLimit, libc::SIGTERM, DEFAULT_GRACE);
            }
            Escalation::None => {
                let reason = "the sandbox could not be set up in time".to_owned();
                self.stop(Stop::Failed(reason, None), libc::SIGTERM, Duration::ZERO);
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

    fn abandon(&mut self) {
        let why = "nobody listens to the command any more".to_owned();
        self.stop(Stop::Failed(why, None), libc::SIGTERM, DEFAULT_GRACE);
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
                    self.stop(Stop::Failed(error.to_string(), None), libc::SIGTERM, DEFAULT_GRACE);
                }
            }
            Some(CommandControl::Signal(number)) => self.stage.signal(number),
            Some(CommandControl::Resize(size)) => self.resize(size),
            Some(CommandControl::Cancel { .. }) if self.over => {
                // Only undelivered output is left, and it is no longer wanted.
                self.abandoned = true;
            }
            Some(CommandControl::Cancel { signal, grace, cause }) => {
                let signal = if signal == 0 { libc::SIGTERM } else { signal };
                self.stop(Stop::Cancelled(cause), signal, grace);
            }
            None => {
                self.control_open = false;
                let why = "the connection that the command belonged to was closed".to_owned();
                self.stop(Stop::Failed(why, None), libc::SIGTERM, DEFAULT_GRACE);
            }
        }
    }

    fn take_message(&mut self, message: std::io::Result<StageMessage>) {
        match message {
            Ok(StageMessage::Terminal(master)) => {
                if let Err(error) = self.open_terminal(master) {
                    let reason = format!("the terminal cannot be used: {error}");
                    self.stop(Stop::Failed(reason, None), libc::SIGTERM, Duration::ZERO);
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
                self.not_run = Some(CommandExit::new(kind, reason, None));
            }
            // Whoever reads "refused" may run it again: never said of what has run, whatever the
            // stage makes of it.
            Ok(StageMessage::Refused(refusal)) if self.started => self.lost(refusal),
            Ok(StageMessage::Failed(refusal)) => self.lost(refusal),
            Ok(StageMessage::Refused(refusal)) => {
                let reason = format!("{}: {}", refusal.what, refusal.why);
                self.not_run =
                    Some(CommandExit::new(CommandVerdict::Refused, reason, Some(refusal.remedy)));
            }
            Ok(StageMessage::Ended(ending)) => self.ending = Some(ending),
            Ok(StageMessage::Over(status)) => {
                tracing::trace!(%status, "all processes of the command have ended");
                self.finish();
            }
            Err(error) => {
                let reason = format!("the sandbox stage cannot be understood: {error}");
                self.stop(Stop::Failed(reason, None), libc::SIGTERM, Duration::ZERO);
                self.stage.kill_monitor();
            }
        }
    }

    /// The command has run, or may have, and its stage ends it.
    fn lost(&mut self, why: Refusal) {
        let reason = format!("{}: {}, so the command was ended", why.what, why.why);
        self.stop(Stop::Failed(reason, Some(why.remedy)), libc::SIGTERM, Duration::ZERO);
    }

    fn finish(&mut self) {
        self.over = true;
        self.moved_at = Instant::now();
        self.stdout.writers_are_gone();
        self.stderr.writers_are_gone();
        self.stdin.close();
    }

    fn take_frame(&mut self, stream: OutputStream, frame: Option<bytes::Bytes>) {
        let Some(data) = frame else { return };
        let bytes = u64::try_from(data.len()).unwrap_or(u64::MAX);
        self.moved_at = Instant::now();
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
                return CommandExit::new(CommandVerdict::Failed, reason, Some(hint));
            }
            Some(Stop::TimeLimit) => {
                let reason = format!("it ran longer than its limit of {:?}", self.time_limit);
                CommandExit::new(CommandVerdict::TimeLimit, reason, None)
            }
            Some(Stop::Cancelled(cause)) => {
                let (verdict, why) = cause.verdict();
                let mut exit = CommandExit::new(verdict, why.to_owned(), None);
                if verdict == CommandVerdict::Cancelled {
                    exit.exit_code = code;
                }
                exit
            }
            Some(Stop::Failed(reason, hint)) => {
                CommandExit::new(CommandVerdict::Failed, reason, hint)
            }
            None => match self.ending {
                Some(Ending::Exited(_)) => {
                    let mut exit = CommandExit::new(CommandVerdict::Exited, String::new(), None);
                    exit.exit_code = code;
                    exit
                }
                Some(Ending::Signalled(_)) => {
                    let mut exit = CommandExit::new(CommandVerdict::Signalled, String::new(), None);
                    exit.exit_code = code;
                    exit
                }
                None => CommandExit::new(
                    CommandVerdict::Failed,
                    UNTOLD.to_owned(),
                    Some(match self.mode {
                        Mode::Strict => {
                            "was this node out of memory? see the kernel's log".to_owned()
                        }
                        Mode::Permissive => {
                            "did the command end its own parent? was this node out \
                                             of memory? see the kernel's log"
                                .to_owned()
                        }
                    }),
                ),
            },
        };
        exit.signal = signal.filter(|_| self.ending.is_some());
        exit
    }
}

/// What a shell says of a command that a signal ended.
pub(super) fn signal_code(signal: i32) -> u8 {
    u8::try_from(signal).map_or(u8::MAX, |signal| signal.saturating_add(128))
}
