//! The last look before a command runs outside the sandbox, or in it with the host's network.
//!
//! Between the order and the start lies the opening of the command's stream, for as long as the hub
//! likes. What allowed the command may be gone by then: the owner may have lowered the ceiling, the
//! policy may have ended. So it is decided again here, from a ceiling read anew, directly
//! before the command starts; it is written down only then, and once more looked at afterwards,
//! since the disk may take its time too. A command that was written down and never ran gets a
//! second line that says so; a crash in between loses that line.

use cortex_shared::policy::Role;
use tokio::sync::mpsc;

use super::authority::{Wanted, wanted};
use super::dispatch::Dispatcher;
use super::request::Refusal;
use crate::audit::{AuditEvent, CommandLine, cut};
use crate::exec::{
    self, CommandControl, CommandEvent, CommandExit, CommandRequest, CommandVerdict,
};

/// Events between the command and its stream, beside those that wait there already.
const EVENTS: usize = 1;

/// Who wants to run a command, and what is to be written down about it.
#[derive(Clone)]
pub(super) struct Permit {
    dispatcher: Dispatcher,
    role: Option<Role>,
    line: CommandLine,
}

impl Permit {
    pub(super) fn new(dispatcher: Dispatcher, role: Option<Role>, line: CommandLine) -> Self {
        Self { dispatcher, role, line }
    }

    /// Runs the command as [`exec::run`] does, if it is (still) allowed to.
    pub(super) async fn run(
        self,
        command: CommandRequest,
        initial_credit: u64,
        control: mpsc::Receiver<CommandControl>,
        events: mpsc::Sender<CommandEvent>,
    ) {
        let Some(wanted) = wanted(command.mode, command.network) else {
            return self.run_strict(command, initial_credit, control, events).await;
        };
        let permit = self.clone();
        let confirmed = tokio::task::spawn_blocking(move || permit.confirm(wanted)).await;
        if let Err(refusal) = confirmed.unwrap_or(Err(Refusal::NotRecorded)) {
            tracing::info!(task = %self.line.task_id, %refusal, "command refused");
            // Nobody listens any more: then nobody is told.
            let (reason, hint) = (refusal.to_string(), Some(refusal.hint()));
            let exit = CommandExit::new(CommandVerdict::Refused, reason, hint);
            events.send(CommandEvent::Exit(exit)).await.ok();
            return;
        }
        if wanted == Wanted::Network {
            return self.run_strict(command, initial_credit, control, events).await;
        }
        let (seen, watched) = mpsc::channel(EVENTS);
        let running = exec::run(command, initial_credit, control, seen);
        let ((), never_ran) = tokio::join!(running, pass_on(watched, events));
        if let Some(reason) = never_ran {
            tokio::task::spawn_blocking(move || self.note_not_run(&reason)).await.ok();
        }
    }

    /// Runs a command that must not lose what is pinned in its workspace.
    async fn run_strict(
        &self,
        command: CommandRequest,
        initial_credit: u64,
        control: mpsc::Receiver<CommandControl>,
        events: mpsc::Sender<CommandEvent>,
    ) {
        let _occupied = match &command.workspace {
            Some(view) => self.dispatcher.enter_workspace(&view.host_root).await,
            None => None,
        };
        exec::run(command, initial_credit, control, events).await;
    }

    /// Writes down a refusal that came before the command had a stream. Blocks for the disk.
    pub(super) fn note_refusal(self, refusal: &Refusal) {
        self.dispatcher.audit().note_refusal(self.line, refusal.to_string());
    }

    /// Looks, writes down, and looks again. Blocks for the disk.
    fn confirm(self, wanted: Wanted) -> Result<(), Refusal> {
        if let Err(refusal) = self.dispatcher.allows(wanted, self.role) {
            self.note_refusal(&refusal);
            return Err(refusal);
        }
        if wanted == Wanted::Network {
            // Still within the sandbox: the hub's record of the command is enough.
            return Ok(());
        }
        let event = AuditEvent::Permissive(self.line.clone());
        if let Err(error) = self.dispatcher.audit().append(&event) {
            tracing::error!(%error, "a permissive command cannot be written down");
            return Err(Refusal::NotRecorded);
        }
        self.dispatcher
            .allows(wanted, self.role)
            .inspect_err(|refusal| self.note_not_run(&refusal.to_string()))
    }

    fn note_not_run(&self, reason: &str) {
        let event = AuditEvent::NotRun { command: self.line.clone(), reason: cut(reason) };
        self.dispatcher.audit().note(&event);
    }
}

/// Passes events on until the last one. The reason, if the command ended without having started.
async fn pass_on(
    mut watched: mpsc::Receiver<CommandEvent>,
    events: mpsc::Sender<CommandEvent>,
) -> Option<String> {
    let mut started = false;
    while let Some(event) = watched.recv().await {
        started |= matches!(event, CommandEvent::Started { .. });
        let end = match &event {
            CommandEvent::Exit(exit) => Some(exit.reason.clone().unwrap_or_default()),
            _ => None,
        };
        if events.send(event).await.is_err() && end.is_none() {
            // The command is told so by the closed channel, and ends; whether it ran by then is
            // not known here.
            return None;
        }
        if end.is_some() {
            return end.filter(|_| !started);
        }
    }
    None
}
