//! `workspace status` of the mesh, and following it until all members are equal, or until those that are not
//! have done nothing about it for a while.

use std::time::Duration;

use cortex_proto::v1;
use indicatif::{ProgressBar, ProgressStyle};
use tokio::time::Instant;

use super::error::{CliError, Exit};
use super::persist::Latest;
use super::printer::{Format, progress_is_visible};
use super::workspace::{MemberJson, SyncRow, WorkspaceRow};
use super::{Global, Output, hub};

/// Members that do nothing for so long are not waited for any longer: what halts one for a moment, such as a
/// start, is over by then.
const IDLE: Duration = Duration::from_secs(10);
/// And those that have said that they try again later, which they do within so long.
const IDLE_UNTIL_RETRY: Duration = Duration::from_secs(90);

pub(super) async fn status(
    global: &Global,
    workspace: String,
    watch: bool,
    output: Output,
) -> Result<(), CliError> {
    let mut client = hub::operator(global).await?;
    let request = v1::WorkspaceStatusRequest { workspace, watch };
    let mut printer = global.printer(output);
    if !watch {
        let update = client.workspace_status(request).await?.into_inner().message().await?;
        let info = update.and_then(|update| update.workspace);
        let info =
            info.ok_or_else(|| CliError::new(Exit::Unreachable, "the hub sent no status"))?;
        let row = WorkspaceRow::of(info);
        return printer.show(&row, &row.lines());
    }
    let bar = (output.format == Format::Table && progress_is_visible()).then(progress_bar);
    let mut updates = Latest::new();
    let mut seen = Seen::default();
    let given_up = loop {
        let next = updates.next(async || client.workspace_status(request.clone()).await);
        let update = match seen.deadline() {
            None => Some(next.await?),
            Some(deadline) => tokio::time::timeout_at(deadline, next).await.ok().transpose()?,
        };
        match update {
            Some(Some(update)) => {
                let Some(info) = update.workspace else { continue };
                let row = WorkspaceRow::of(info);
                // A program that follows wants every step; people want the last one, and a bar until then.
                if output.format == Format::Jsonl {
                    printer.show(&row, &[])?;
                }
                if let Some(bar) = &bar {
                    draw(bar, &row);
                }
                seen.take(row, updates.settles_at());
            }
            Some(None) => seen.lost(),
            None => {
                if let Some(resting) = seen.resting.take() {
                    break resting.members;
                }
                seen.settles_at = None;
            }
        }
        if seen.is_done() {
            break Vec::new();
        }
    };
    if let Some(bar) = bar {
        bar.finish_and_clear();
    }
    let row =
        seen.last.ok_or_else(|| CliError::new(Exit::Unreachable, "the hub sent no status"))?;
    if output.format != Format::Jsonl {
        printer.show(&row, &row.lines())?;
    }
    if given_up.is_empty() {
        return Ok(());
    }
    let text = format!("{} is not equal everywhere: {}", row.name, given_up.join("; "));
    let hint = format!("cortex-agent workspace status {}", row.name);
    Err(CliError::new(Exit::Failed, text).hint(hint))
}

/// What was seen so far.
#[derive(Default)]
struct Seen {
    last: Option<WorkspaceRow>,
    /// Members that do nothing, and until when they are waited for.
    resting: Option<Resting>,
    rests_until: Option<Instant>,
    /// Until when members may still come back to a hub that was lost.
    settles_at: Option<Instant>,
    /// Those that were offline before it was lost: nobody waits for them.
    offline: Vec<String>,
    /// Whether the hub is there.
    connected: bool,
}

impl Seen {
    fn take(&mut self, row: WorkspaceRow, settles_at: Option<Instant>) {
        let resting = Resting::of(&row).filter(|resting| !resting.members.is_empty());
        if resting != self.resting {
            self.rests_until = resting.as_ref().map(|resting| Instant::now() + resting.patience);
            self.resting = resting;
        }
        if settles_at.is_none() {
            let offline = row.members.iter().filter(|member| !member.online);
            self.offline = offline.map(|member| member.node_id.clone()).collect();
        }
        (self.settles_at, self.connected) = (settles_at, true);
        self.last = Some(row);
    }

    /// The hub is away: nobody's time runs.
    fn lost(&mut self) {
        (self.resting, self.rests_until, self.settles_at) = (None, None, None);
        self.connected = false;
    }

    /// When to look again though nothing comes.
    fn deadline(&self) -> Option<Instant> {
        self.rests_until.or(self.settles_at)
    }

    fn is_done(&self) -> bool {
        let Some(row) = self.last.as_ref().filter(|_| self.connected) else { return false };
        let comes_back =
            |member: &MemberJson| !member.online && !self.offline.contains(&member.node_id);
        let awaited = self.settles_at.is_some() && row.members.iter().any(comes_back);
        at_head(row) && !awaited
    }
}

/// Whether every member that is online has applied the head and has nothing to send. Members that
/// are offline would keep a watcher for ever.
fn at_head(row: &WorkspaceRow) -> bool {
    row.members.iter().filter(|member| member.online).all(|member| is_at(member, row.head_seq))
}

fn is_at(member: &MemberJson, head_seq: u64) -> bool {
    member.status.as_ref().is_some_and(|status| {
        status.state == "idle"
            && status.pending_push == 0
            && status.applied_seq == head_seq
            && member.applied_seq == head_seq
    })
}

/// Members that are online and not equal, none of which does anything about it.
#[derive(Clone, Debug, PartialEq, Eq)]
struct Resting {
    /// Each with the reason.
    members: Vec<String>,
    patience: Duration,
}

impl Resting {
    fn of(row: &WorkspaceRow) -> Option<Self> {
        let behind = || {
            let online = row.members.iter().filter(|member| member.online);
            online.filter(|member| !is_at(member, row.head_seq))
        };
        let members = behind().map(|member| {
            let why = member.status.as_ref()?.why_at_rest()?;
            Some(format!("node {} {why}", member.node_name))
        });
        let tries_again =
            behind().any(|member| member.status.as_ref().is_some_and(SyncRow::tries_again));
        let patience = if tries_again { IDLE_UNTIL_RETRY } else { IDLE };
        Some(Self { members: members.collect::<Option<_>>()?, patience })
    }
}

fn progress_bar() -> ProgressBar {
    let style = ProgressStyle::with_template("{bar:30} {pos}/{len} files  {msg}")
        .expect("the template is valid");
    ProgressBar::new(0).with_style(style)
}

fn draw(bar: &ProgressBar, row: &WorkspaceRow) {
    let statuses = || row.members.iter().filter_map(|member| member.status.as_ref());
    bar.set_length(statuses().map(|status| status.files_total).sum());
    bar.set_position(statuses().map(|status| status.files_done).sum());
    let behind = row
        .members
        .iter()
        .filter(|member| member.online && member.applied_seq < row.head_seq)
        .map(|member| super::error::printable(&member.node_name))
        .collect::<Vec<_>>()
        .join(", ");
    bar.set_message(if behind.is_empty() { String::new() } else { format!("behind: {behind}") });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(online: bool, applied: u64, status: Option<v1::SyncStatus>) -> v1::WorkspaceMember {
        v1::WorkspaceMember { online, applied_seq: applied, status, ..Default::default() }
    }

    #[test]
    fn watching_ends_when_all_that_are_online_are_at_the_head_with_nothing_to_send() {
        let idle = |applied, pending| {
            Some(v1::SyncStatus {
                applied_seq: applied,
                pending_push: pending,
                ..Default::default()
            })
        };
        let busy = Some(v1::SyncStatus {
            applied_seq: 5,
            state: v1::SyncState::Uploading.into(),
            ..Default::default()
        });
        for (what, members, done) in [
            ("nobody", vec![], true),
            ("all there", vec![member(true, 5, idle(5, 0)), member(true, 5, idle(5, 0))], true),
            ("one behind", vec![member(true, 5, idle(5, 0)), member(true, 4, idle(4, 0))], false),
            ("something to send", vec![member(true, 5, idle(5, 3))], false),
            ("busy", vec![member(true, 5, busy)], false),
            ("not heard of yet", vec![member(true, 5, None)], false),
            ("offline one behind", vec![member(true, 5, idle(5, 0)), member(false, 1, None)], true),
        ] {
            let info = v1::WorkspaceInfo { head_seq: 5, members, ..Default::default() };
            assert_eq!(at_head(&WorkspaceRow::of(info)), done, "{what}");
        }
    }

    #[test]
    fn watching_is_given_up_only_where_nobody_does_anything() {
        let at = |state: v1::SyncState| {
            Some(v1::SyncStatus { applied_seq: 4, state: state.into(), ..Default::default() })
        };
        let held = v1::SyncStatus {
            applied_seq: 5,
            pending_push: 150,
            problems: vec![v1::SyncProblem { message: "held".into(), ..Default::default() }],
            ..Default::default()
        };
        let halted = v1::SyncStatus { halted_reason: "no root".into(), ..Default::default() };
        let halted = v1::SyncStatus { state: v1::SyncState::Halted.into(), ..halted };
        let retried = v1::SyncStatus { next_retry_ms: 1, ..Default::default() };
        let skill = vec![v1::SyncProblem { code: "skill_awaited".into(), ..Default::default() }];
        let awaits = v1::SyncStatus { problems: skill, ..Default::default() };
        for (what, status, why) in [
            ("paused", at(v1::SyncState::Paused), Some(("is paused", IDLE))),
            ("halted", Some(halted), Some(("is halted: no root", IDLE))),
            ("held", Some(held), Some(("has 150 changes that do not go (held)", IDLE))),
            ("behind", at(v1::SyncState::Idle), Some(("stays at version 4", IDLE))),
            ("tried again", Some(retried), Some(("stays at version 0", IDLE_UNTIL_RETRY))),
            ("busy", at(v1::SyncState::Applying), None),
            ("its library is busy", Some(awaits), None),
            ("not heard of yet", None, None),
        ] {
            let equal = v1::SyncStatus { applied_seq: 5, ..Default::default() };
            let members = vec![member(true, 4, status), member(true, 5, Some(equal))];
            let info = v1::WorkspaceInfo { head_seq: 5, members, ..Default::default() };
            let resting = why
                .map(|(why, patience)| Resting { members: vec![format!("node  {why}")], patience });
            assert_eq!(Resting::of(&WorkspaceRow::of(info)), resting, "{what}");
        }
    }
}
