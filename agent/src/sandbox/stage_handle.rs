//! The agent's end of a stage: starting it, hearing its reports, giving it orders.
//!
//! The stage is started with `posix_spawn` (the standard library does so as long as nothing must
//! run in the child before `exec`), because a `fork` of a large agent takes milliseconds. Dropping
//! its handle closes the control socket, which ends everything in the sandbox.

use std::io;
use std::os::fd::{AsFd as _, BorrowedFd, OwnedFd};
use std::path::Path;
use std::process::{ExitStatus, Stdio};

use rustix::net::{AddressFamily, SocketFlags, SocketType};
use tokio::net::UnixDatagram;
use tokio::process::Child;
use tokio::sync::oneshot;

use super::cgroup::Group;
use super::channel::{self, Document};
use super::remedy::Refusal;
use super::spare::NextSpare;
use super::spec::{Confinement, ControlGroup, Ending, Order, Preparation, Report, STAGE_NAME};

/// A stage that was told what its sandbox is made of, and not yet what is to run in it.
#[derive(Debug)]
pub(super) struct Stage {
    handle: StageHandle,
    group: Group,
}

impl Stage {
    /// Starts the program as a stage, which begins to prepare the sandbox. To be called within a
    /// runtime.
    pub(super) fn start(
        program: &Path,
        confinement: Confinement,
        group: Group,
    ) -> io::Result<Self> {
        let control_group = match group.entrance().len() {
            0 => ControlGroup::None,
            _ if group.is_born_into() => ControlGroup::BornInto,
            count => ControlGroup::Joined(count),
        };
        let preparation = Document::new(&Preparation { confinement, control_group })?
            .ok_or_else(|| io::Error::other("what the sandbox is made of is too long"))?;
        let (ours, theirs) = rustix::net::socketpair(
            AddressFamily::UNIX,
            SocketType::SEQPACKET,
            SocketFlags::CLOEXEC,
            None,
        )?;
        let entrance: Vec<_> = group.entrance().iter().map(OwnedFd::as_fd).collect();
        preparation.send(&ours, &entrance)?;
        let monitor = tokio::process::Command::new(program)
            .arg0(STAGE_NAME)
            .env_clear()
            .stdin(Stdio::from(theirs))
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()?;
        rustix::io::ioctl_fionbio(&ours, true)?;
        let control = UnixDatagram::from_std(ours.into())?;
        let handle =
            StageHandle { control, control_open: true, monitor, next: None, _running: None };
        Ok(Self { handle, group })
    }

    /// The control group of the command to come.
    pub(super) fn group(&self) -> &Group {
        &self.group
    }

    /// Gives it the command. What becomes of that is told by the handle.
    pub(super) fn give(
        self,
        job: &Document,
        fds: &[BorrowedFd<'_>],
    ) -> io::Result<(StageHandle, Group)> {
        match job.send(&self.handle.control, fds) {
            // It is gone already. What it said before, or else its end, tells why.
            Err(error)
                if matches!(
                    error.kind(),
                    io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset
                ) => {}
            sent => sent?,
        }
        Ok((self.handle, self.group))
    }

    /// Ends it. It has run nothing.
    pub(super) async fn end(self) {
        let Self { handle: StageHandle { control, mut monitor, .. }, group } = self;
        drop(control);
        monitor.wait().await.ok();
        // Only an empty group can be removed.
        drop(group);
    }
}

/// What reports on a started command and takes orders for it. Dropping it ends the command.
#[derive(Debug)]
pub struct StageHandle {
    /// A socket of whole messages; the type fits every kind of unix socket that keeps them apart.
    control: UnixDatagram,
    control_open: bool,
    monitor: Child,
    /// Has the next sandbox made once this command runs.
    next: Option<NextSpare>,
    /// Its drop tells the maker of the next sandbox that this command is over.
    _running: Option<oneshot::Sender<()>>,
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
        while self.control_open {
            tokio::select! {
                biased;
                report = receive(&self.control) => match report? {
                    Some(Told::Message(message)) => {
                        if matches!(message, StageMessage::Started)
                            && let Some(next) = self.next.take()
                        {
                            let (running, over) = oneshot::channel();
                            self._running = Some(running);
                            next.make(over);
                        }
                        return Ok(message);
                    }
                    Some(Told::Taken) => continue,
                    None => self.control_open = false,
                },
                status = self.monitor.wait() => {
                    let status = status?;
                    // What it said last may still lie in the socket.
                    return match receive_now(&self.control) {
                        Ok(Some(Told::Message(message))) => Ok(message),
                        Ok(Some(Told::Taken)) => continue,
                        Ok(None) | Err(_) => Ok(StageMessage::Over(status)),
                    };
                }
            }
        }
        self.monitor.wait().await.map(StageMessage::Over)
    }

    /// Waits until the stage has the command. If this says no, the command has not run and never
    /// will by this stage.
    pub(super) async fn has_taken(&mut self) -> bool {
        matches!(receive(&self.control).await, Ok(Some(Told::Taken)))
    }

    /// Has the next sandbox made once this command runs.
    pub(super) fn then(&mut self, next: NextSpare) {
        self.next = Some(next);
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

/// What the stage says.
enum Told {
    /// It has the command.
    Taken,
    Message(StageMessage),
}

async fn receive(control: &UnixDatagram) -> io::Result<Option<Told>> {
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

fn receive_now(control: &UnixDatagram) -> io::Result<Option<Told>> {
    let Some((report, fd)) = channel::receive_with_descriptor(control)? else { return Ok(None) };
    Ok(Some(Told::Message(match report {
        Report::Taken => return Ok(Some(Told::Taken)),
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
    })))
}
