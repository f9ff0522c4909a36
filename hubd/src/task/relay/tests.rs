use cortex_proto::v1::{Output, StartTask, TaskState};
use cortex_shared::policy::Role;
use tokio_util::sync::CancellationToken;

use super::*;
use crate::events::EventLimits;
use crate::node::registry::{Arrival, Outbox, Registry, SessionEnds};
use crate::store::history::{HistoryLimits, HistoryStore};
use crate::store::sqlite::SqliteStore;
use crate::store::{IdempotencyKey, Verdict, fixtures};
use crate::task::limits::CommandLimits;
use crate::task::spool::SpoolLimits;
use crate::task::to_reader::{End, ReaderFrame};
use crate::task::verdict::{MAX_TEXT_BYTES, journal_entry};

/// A resume grace that tests wait for.
const SHORT: Duration = Duration::from_millis(300);

struct Fixture {
    folder: tempfile::TempDir,
    relay: Arc<Relay>,
    store: Arc<dyn Store>,
    session: SessionEnds,
    registry: Registry,
    node: NodeId,
}

fn events() -> Arc<EventBus> {
    EventBus::in_memory(EventLimits::default())
}

async fn history(folder: &tempfile::TempDir, scope: &TaskScope) -> Arc<History> {
    let store = HistoryStore::open(folder.path().join("history.db"), scope).await.unwrap();
    History::start(store, HistoryLimits::default(), scope)
}

async fn fixture() -> Fixture {
    fixture_with(Duration::ZERO).await
}

async fn fixture_with(resume: Duration) -> Fixture {
    let folder = tempfile::tempdir().unwrap();
    let scope = TaskScope::new();
    let store = SqliteStore::open(folder.path().join("hub.db"), &scope).await.unwrap();
    let store: Arc<dyn Store> = Arc::new(store);
    let node = fixtures::node("box");
    let id = node.id;
    let registry = Registry::new(vec![node]);
    let cancel = CancellationToken::new();
    let arrival = Arrival { generation: 1, ..Arrival::default() };
    let begun = registry.begin_session(id, arrival, cancel);
    let spool = Spool::open(folder.path().join("tasks"), SpoolLimits::default(), &scope).unwrap();
    let deadlines = Deadlines { start: Duration::from_secs(60), resume };
    let history = history(&folder, &scope).await;
    let limits = Default::default();
    let relay = Relay::new(Arc::clone(&store), spool, history, events(), scope, deadlines, limits);
    Fixture { folder, relay, store, session: begun.unwrap().0, registry, node: id }
}

impl Fixture {
    async fn start(&self, actor: &str, role: Role) -> Result<Arc<Task>, StartRefusal> {
        let session = self.session.handle.clone();
        let (new, claim) = (self.new_task(actor, role), Claim::default());
        match self.relay.start(new, TaskSpec::default(), 1 << 20, session, &claim).await? {
            Begun::New(task) => Ok(task),
            Begun::Known(id) => panic!("{id} is known"),
        }
    }

    fn new_task(&self, actor: &str, role: Role) -> NewTask {
        NewTask { role, ..fixtures::task(actor, self.session.handle.node) }
    }

    /// The node opens the task's first stream.
    fn open(&self, task: &Task) -> u64 {
        let hello = hello(task, false);
        self.relay.open_stream(self.node, &hello).unwrap().1
    }

    /// The node begins another session, which holds these tasks.
    fn reconnect(&mut self, held: &[TaskId]) {
        let old = self.session.handle.id;
        self.session = self
            .registry
            .begin_session(
                self.node,
                Arrival { generation: 1, ..Arrival::default() },
                CancellationToken::new(),
            )
            .unwrap()
            .0;
        self.relay.session_began(&self.session.handle, held);
        self.relay.session_lost(old);
    }

    async fn verdict(&self, id: TaskId) -> Option<Verdict> {
        self.store.task(id).await.unwrap().unwrap().end.map(|end| end.verdict)
    }
}

fn hello(task: &Task, resume: bool) -> TaskIoHello {
    let task_id = task.id().as_bytes().to_vec().into();
    TaskIoHello { task_id, resume, ..TaskIoHello::default() }
}

fn output(offset: u64, data: &'static str) -> task_io_up::Frame {
    task_io_up::Frame::Output(Output { stream: 0, offset, data: data.into() })
}

fn exited() -> TaskExit {
    TaskExit {
        verdict: TaskVerdict::Exited.into(),
        stdout_hash: vec![1; 32].into(),
        ..TaskExit::default()
    }
}

fn starts(outbox: &mut Outbox) -> Vec<StartTask> {
    std::iter::from_fn(|| outbox.try_recv().ok())
        .filter_map(|frame| match frame.frame {
            Some(hub_frame::Frame::StartTask(start)) => Some(start),
            _ => None,
        })
        .collect()
}

async fn end(task: &Task) -> TaskExit {
    loop {
        if let Some(ReaderFrame::End(End::Exit(exit))) = task.to_reader.next(1).await {
            return exit;
        }
    }
}

#[tokio::test]
async fn an_agent_token_has_a_handful_of_commands_at_once_and_a_place_is_free_at_the_end() {
    let mut fixture = fixture().await;
    let mut tasks = Vec::new();
    for _ in 0..CommandLimits::default().agent_token {
        tasks.push(fixture.start("bot", Role::AgentToken).await.unwrap());
    }
    let refusal = fixture.start("bot", Role::AgentToken).await.err().unwrap();
    assert!(matches!(refusal, StartRefusal::TooMany { limit: 8, .. }));
    fixture.start("ann", Role::Operator).await.unwrap();
    let exit = TaskExit { verdict: TaskVerdict::Exited.into(), ..TaskExit::default() };
    fixture.relay.finish(tasks[0].id(), fixture.node, exit);
    fixture.start("bot", Role::AgentToken).await.unwrap();
    let roles: Vec<_> = starts(&mut fixture.session.outbox).into_iter().map(|s| s.role).collect();
    assert_eq!(roles.iter().filter(|role| *role == "agent-token").count(), 9);
    assert_eq!(roles.iter().filter(|role| *role == "operator").count(), 1);
}

#[tokio::test]
async fn an_agent_token_writes_so_much_and_no_more() {
    let fixture = fixture().await;
    let task = fixture.start("bot", Role::AgentToken).await.unwrap();
    let stream = fixture.open(&task);
    let data = bytes::Bytes::from(vec![b'x'; 256 * 1024]);
    let frames = CommandLimits::default().agent_token_output / data.len() as u64;
    for n in 0..=frames {
        let offset = n * data.len() as u64;
        let output = Output { stream: 0, offset, data: data.clone() };
        let more = fixture.relay.node_frame(&task, stream, task_io_up::Frame::Output(output));
        assert_eq!(more, n < frames, "frame {n} of {frames}");
        if more {
            task.to_reader.next(1).await.unwrap();
            task.grant(data.len() as u64);
        }
    }
    let exit = end(&task).await;
    assert_eq!(exit.verdict(), TaskVerdict::Failed);
    assert!(exit.reason.contains("more output"), "{}", exit.reason);
}

#[tokio::test]
async fn what_runs_for_a_revoked_caller_ends_at_once_and_nothing_else() {
    let mut fixture = fixture().await;
    let bobs = fixture.start("bob", Role::Operator).await.unwrap();
    let anns = fixture.start("ann", Role::Operator).await.unwrap();
    fixture.relay.end_of_actor("bob", "bob was revoked");
    let exit = end(&bobs).await;
    assert_eq!((exit.verdict(), exit.reason.as_str()), (TaskVerdict::Cancelled, "bob was revoked"));
    assert!(bobs.has_ended() && !anns.has_ended());
    let cancelled: Vec<_> = std::iter::from_fn(|| fixture.session.outbox.try_recv().ok())
        .filter_map(|frame| match frame.frame {
            Some(hub_frame::Frame::CancelTask(cancel)) => Some((cancel.task_id, cancel.grace_ms)),
            _ => None,
        })
        .collect();
    assert_eq!(cancelled, [(bobs.id().as_bytes().to_vec().into(), 0)], "killed without grace");
}

#[tokio::test]
async fn acceptance_and_end_stand_in_the_audit_log_once() {
    let fixture = fixture().await;
    let task = fixture.start("ann", Role::Operator).await.unwrap();
    let exit = TaskExit {
        verdict: TaskVerdict::Exited.into(),
        exit_code: 3,
        stdout_bytes: 2,
        stdout_hash: vec![7; 32].into(),
        stderr_hash: vec![7; 5].into(),
        reason: "ä".repeat(2000),
        ..TaskExit::default()
    };
    fixture.relay.finish(task.id(), fixture.node, exit.clone());
    end(&task).await;
    fixture.relay.finish(task.id(), fixture.node, exit);
    let lines = fixture.store.audit_page(None, 10).await.unwrap();
    let actions: Vec<_> = lines.iter().map(|l| (l.actor.as_str(), l.action.as_str())).collect();
    assert_eq!(actions, [("ann", "task.accepted"), ("ann", "task.ended")]);
    let accepted: serde_json::Value = serde_json::from_str(&lines[0].detail).unwrap();
    let ended: serde_json::Value = serde_json::from_str(&lines[1].detail).unwrap();
    assert_eq!(lines[1].target, task.id().to_string());
    assert_eq!((&accepted["node"], &accepted["command"]), (&"box".into(), &"true".into()));
    assert_eq!((&ended["verdict"], &ended["exit_code"]), (&"exited".into(), &3.into()));
    assert_eq!(ended["stdout_hash"], "07".repeat(32));
    assert!(ended["stderr_hash"].is_null(), "what is no hash is none");
    assert!(ended["reason"].as_str().unwrap().len() <= MAX_TEXT_BYTES);
}

#[tokio::test]
async fn a_node_that_comes_back_in_time_takes_its_task_up_and_the_reader_hears_both() {
    let mut fixture = fixture_with(SHORT).await;
    let task = fixture.start("ann", Role::Operator).await.unwrap();
    let other = fixture.start("ann", Role::Operator).await.unwrap();
    fixture.open(&other);
    let first = fixture.open(&task);
    assert!(fixture.relay.node_frame(&task, first, output(0, "abc")));
    fixture.reconnect(&[task.id(), other.id()]);
    let interrupted = |frame| matches!(frame, Some(ReaderFrame::Interrupted(_)));
    assert!(interrupted(task.to_reader.next(1).await), "at once");
    let (_, second) = fixture.relay.open_stream(fixture.node, &hello(&task, true)).unwrap();
    assert!(!fixture.relay.node_frame(&task, first, output(3, "old")), "the old stream is over");
    fixture.relay.stream_ended(&task, first);
    assert!(fixture.relay.node_frame(&task, second, output(3, "def")));
    assert_eq!(task.to_reader.next(1).await, Some(ReaderFrame::Resumed));
    let mut text = Vec::new();
    while text.len() < 6 {
        let Some(ReaderFrame::Output(output)) = task.to_reader.next(1).await else { panic!() };
        text.extend_from_slice(&output.data);
    }
    assert_eq!(text, b"abcdef");
    other.ended().await;
    assert!(!task.has_ended(), "the deadline of an interruption that is over does nothing");
    assert!(fixture.relay.finish(task.id(), fixture.node, exited()));
    end(&task).await;
    assert_eq!(fixture.verdict(task.id()).await, Some(Verdict::Exited));
}

#[tokio::test]
async fn the_end_of_a_stream_interrupts_what_it_carries_and_no_later_one() {
    let fixture = fixture_with(Duration::from_secs(600)).await;
    let task = fixture.start("ann", Role::Operator).await.unwrap();
    let first = fixture.open(&task);
    fixture.relay.stream_ended(&task, first);
    assert_eq!(task.state().0, TaskState::Interrupted);
    let (_, second) = fixture.relay.open_stream(fixture.node, &hello(&task, true)).unwrap();
    fixture.relay.stream_ended(&task, first);
    assert_eq!(task.state().0, TaskState::Running);
    fixture.relay.stream_ended(&task, second);
    assert_eq!(task.state().0, TaskState::Interrupted);
}

#[tokio::test]
async fn a_node_that_stays_away_loses_its_task_and_what_it_says_later_is_added_once() {
    let mut fixture = fixture_with(SHORT).await;
    let task = fixture.start("ann", Role::Operator).await.unwrap();
    fixture.open(&task);
    fixture.relay.session_lost(fixture.session.handle.id);
    let exit = end_after_news(&task).await;
    assert_eq!(exit.verdict(), TaskVerdict::StreamLost);
    assert!(exit.reason.contains("may still be running"), "{}", exit.reason);
    fixture.reconnect(&[task.id()]);
    let over = fixture.relay.open_stream(fixture.node, &hello(&task, true));
    assert_eq!(over.err(), Some(StreamRefusal::Unknown));
    for code in [3, 4] {
        let exit = TaskExit { exit_code: code, ..exited() };
        fixture.relay.outcome(task.id(), &fixture.session.handle, exit);
        wait_for_ack(&mut fixture.session.outbox, task.id()).await;
    }
    let record = fixture.store.task(task.id()).await.unwrap().unwrap();
    assert_eq!(record.end.unwrap().verdict, Verdict::StreamLost, "never rewritten");
    assert_eq!(record.late.unwrap().exit_code, Some(3));
}

#[tokio::test]
async fn a_verdict_of_the_hubs_own_takes_no_nodes_word_for_heard() {
    let mut fixture = fixture_with(Duration::from_secs(600)).await;
    for (code, late) in ["by its stream", "by its session"].into_iter().enumerate() {
        let task = fixture.start("bob", Role::Operator).await.unwrap();
        let stream = fixture.open(&task);
        fixture.relay.end_of_actor("bob", "bob was revoked");
        assert_eq!(end(&task).await.verdict(), TaskVerdict::Cancelled);
        let acknowledged = acks(&mut fixture.session.outbox);
        assert!(acknowledged.is_empty(), "its end is not known yet");
        let pending = async || {
            let held = vec![task.id()];
            fixture.store.tasks_to_cancel(fixture.node, held).await.unwrap().len()
        };
        assert_eq!(pending().await, 1);
        let exit = TaskExit { exit_code: u32::try_from(code).unwrap(), ..exited() };
        if late == "by its stream" {
            let exit = task_io_up::Frame::Exit(exit);
            assert!(!fixture.relay.node_frame(&task, stream, exit), "no more may follow");
        } else {
            fixture.relay.outcome(task.id(), &fixture.session.handle, exit);
        }
        wait_for_ack(&mut fixture.session.outbox, task.id()).await;
        let record = fixture.store.task(task.id()).await.unwrap().unwrap();
        assert_eq!(record.end.unwrap().verdict, Verdict::Cancelled, "never rewritten");
        let said = record.late.map(|late| late.exit_code);
        assert_eq!(said, Some(u32::try_from(code).ok()), "{late}");
        assert_eq!(pending().await, 0);
    }
}

#[tokio::test]
async fn a_verdict_by_the_nodes_word_is_acknowledged_once() {
    let mut fixture = fixture_with(Duration::from_secs(600)).await;
    let task = fixture.start("ann", Role::Operator).await.unwrap();
    let stream = fixture.open(&task);
    assert!(!fixture.relay.node_frame(&task, stream, task_io_up::Frame::Exit(exited())));
    end(&task).await;
    assert_eq!(acks(&mut fixture.session.outbox), [task.id()]);
    assert!(fixture.store.task(task.id()).await.unwrap().unwrap().late.is_none());
}

#[tokio::test]
async fn a_node_that_comes_back_late_has_the_whole_grace_to_take_its_tasks_up_and_no_longer() {
    // A third of it is for a machine that is busy.
    let grace = 20 * SHORT;
    let mut fixture = fixture_with(grace).await;
    let task = fixture.start("ann", Role::Operator).await.unwrap();
    let other = fixture.start("ann", Role::Operator).await.unwrap();
    for task in [&task, &other] {
        fixture.open(task);
    }
    fixture.relay.session_lost(fixture.session.handle.id);
    tokio::time::sleep(grace * 2 / 3).await;
    fixture.reconnect(&[task.id(), other.id()]);
    tokio::time::sleep(grace * 2 / 3).await;
    assert!(!task.has_ended() && !other.has_ended(), "the deadline of its absence is over");
    assert!(fixture.relay.open_stream(fixture.node, &hello(&task, true)).is_ok());
    let exit = end_after_news(&other).await;
    assert_eq!(exit.verdict(), TaskVerdict::StreamLost);
    assert!(exit.reason.contains("did not take the command up"), "{}", exit.reason);
    tokio::time::sleep(SHORT).await;
    assert!(!task.has_ended(), "it was taken up");
    // The node is there, and it has said nothing of the other one's end.
    assert_eq!(acks(&mut fixture.session.outbox), []);
}

/// What was acknowledged up to now.
fn acks(outbox: &mut Outbox) -> Vec<TaskId> {
    std::iter::from_fn(|| outbox.try_recv().ok())
        .filter_map(|frame| match frame.frame {
            Some(hub_frame::Frame::TaskAck(ack)) => TaskId::from_slice(&ack.task_id).ok(),
            _ => None,
        })
        .collect()
}

#[tokio::test]
async fn a_node_keeps_its_word_on_a_command_whose_verdict_is_not_journalled() {
    let mut fixture = fixture_with(SHORT).await;
    let lost = fixture.start("ann", Role::Operator).await.unwrap();
    fixture.open(&lost);
    fixture.relay.session_lost(fixture.session.handle.id);
    end_after_news(&lost).await;
    // Out of the table, and not in the journal yet.
    let early = fixture.new_task("ann", Role::Operator);
    fixture.store.accept_task(early.clone()).await.unwrap();
    fixture.reconnect(&[early.id, lost.id()]);
    for id in [early.id, lost.id()] {
        fixture.relay.outcome(id, &fixture.session.handle, exited());
    }
    // One report is dealt with after the other.
    loop {
        let frame = fixture.session.outbox.recv().await.unwrap().frame;
        if let Some(hub_frame::Frame::TaskAck(ack)) = frame {
            assert_eq!(ack.task_id, &lost.id().as_bytes()[..], "nobody has journalled the other");
            break;
        }
    }
    // Once it is, the report that is here already is dealt with: the node does not repeat it.
    let verdict = TaskExit { verdict: TaskVerdict::StreamLost.into(), ..TaskExit::default() };
    fixture.store.end_task(early.id, journal_entry(&verdict, None)).await.unwrap();
    wait_for_ack(&mut fixture.session.outbox, early.id).await;
    let record = fixture.store.task(early.id).await.unwrap().unwrap();
    assert_eq!(record.late.unwrap().verdict, Verdict::Exited);
}

#[tokio::test]
async fn what_a_node_does_not_hold_any_more_ends_when_it_says_so() {
    let mut fixture = fixture_with(Duration::from_secs(600)).await;
    let task = fixture.start("ann", Role::Operator).await.unwrap();
    fixture.open(&task);
    fixture.reconnect(&[]);
    assert_eq!(end_after_news(&task).await.verdict(), TaskVerdict::StreamLost);
}

#[tokio::test]
async fn a_reader_that_stays_away_ends_its_command_and_one_that_comes_back_does_not() {
    let mut fixture = fixture_with(SHORT).await;
    let (left, back) = (
        fixture.start("ann", Role::Operator).await.unwrap(),
        fixture.start("ann", Role::Operator).await.unwrap(),
    );
    fixture.relay.reader_lost(&back, 1);
    fixture.relay.reader_lost(&left, 1);
    assert_eq!(back.attach([0; 2], 1, 0).unwrap().reader, 2);
    let cancelled = loop {
        if let Some(hub_frame::Frame::CancelTask(cancel)) =
            fixture.session.outbox.recv().await.unwrap().frame
        {
            break TaskId::from_slice(&cancel.task_id).unwrap();
        }
    };
    assert_eq!(cancelled, left.id(), "and not the one whose deadline came first");
    assert!(!back.has_ended());
}

#[tokio::test]
async fn a_command_whose_reader_stayed_away_has_failed_and_was_not_cancelled() {
    let mut fixture = fixture_with(SHORT).await;
    let task = fixture.start("ann", Role::Operator).await.unwrap();
    let stream = fixture.open(&task);
    fixture.relay.reader_lost(&task, 1);
    assert_eq!(next_cancel(&mut fixture.session.outbox).await, (task.id(), 0));
    assert!(task.has_ended(), "the node's word is not waited for");
    let exit = end(&task).await;
    assert_eq!((exit.verdict(), exit.reason.as_str()), (TaskVerdict::Failed, READER_AWAY));
    let pending = async || {
        let held = vec![task.id()];
        fixture.store.tasks_to_cancel(fixture.node, held).await.unwrap().len()
    };
    assert_eq!(pending().await, 1, "until the node has said how it ended");
    let exit = TaskExit {
        verdict: TaskVerdict::Cancelled.into(),
        reason: "cancelled on request".into(),
        ..TaskExit::default()
    };
    fixture.relay.node_frame(&task, stream, task_io_up::Frame::Exit(exit));
    wait_for_ack(&mut fixture.session.outbox, task.id()).await;
    let record = fixture.store.task(task.id()).await.unwrap().unwrap();
    let end = record.end.unwrap();
    assert_eq!((end.verdict, end.reason.as_str()), (Verdict::Failed, READER_AWAY));
    assert_eq!(record.late.unwrap().verdict, Verdict::Cancelled);
    assert_eq!(pending().await, 0);
}

#[tokio::test]
async fn a_command_that_somebody_cancelled_has_its_nodes_verdict_also_without_a_reader() {
    let mut fixture = fixture_with(SHORT).await;
    let task = fixture.start("ann", Role::Operator).await.unwrap();
    let stream = fixture.open(&task);
    fixture.relay.cancel(&task, 2, Duration::from_secs(60));
    assert_eq!(next_cancel(&mut fixture.session.outbox).await, (task.id(), 2));
    fixture.relay.reader_lost(&task, 1);
    assert_eq!(next_cancel(&mut fixture.session.outbox).await, (task.id(), 0), "and at once");
    assert!(!task.has_ended());
    let exit = TaskExit { verdict: TaskVerdict::Cancelled.into(), ..TaskExit::default() };
    fixture.relay.node_frame(&task, stream, task_io_up::Frame::Exit(exit));
    assert_eq!(end(&task).await.verdict(), TaskVerdict::Cancelled);
}

#[tokio::test]
async fn a_cancel_reaches_a_node_that_was_away() {
    let mut fixture = fixture_with(Duration::from_secs(600)).await;
    let task = fixture.start("ann", Role::Operator).await.unwrap();
    fixture.open(&task);
    fixture.relay.session_lost(fixture.session.handle.id);
    task.cancel(2, Duration::from_secs(1));
    fixture.reconnect(&[task.id()]);
    let frame = fixture.session.outbox.try_recv().unwrap().frame;
    let Some(hub_frame::Frame::CancelTask(cancel)) = frame else { panic!("{frame:?}") };
    assert_eq!(cancel.signal, 2);
}

#[tokio::test]
async fn a_task_that_waits_for_its_nodes_next_session_is_not_called_unknown() {
    let mut fixture = fixture_with(Duration::from_secs(600)).await;
    let open = |fixture: &Fixture, task: &Task, resume| {
        fixture.relay.open_stream(fixture.node, &hello(task, resume)).err()
    };
    let task = fixture.start("ann", Role::Operator).await.unwrap();
    let unopened = fixture.start("ann", Role::Operator).await.unwrap();
    fixture.open(&task);
    assert_eq!(open(&fixture, &task, false), Some(StreamRefusal::Unknown), "there is one already");
    fixture.relay.session_lost(fixture.session.handle.id);
    assert_eq!(open(&fixture, &task, true), Some(StreamRefusal::NotReached));
    assert_eq!(open(&fixture, &unopened, false), Some(StreamRefusal::Unknown), "it may not begin");
    let others = fixture.relay.open_stream(NodeId::new(), &hello(&task, true)).err();
    assert_eq!(others, Some(StreamRefusal::Unknown), "of another node");
    fixture.reconnect(&[task.id(), unopened.id()]);
    assert_eq!(open(&fixture, &task, true), None);
    fixture.relay.finish(task.id(), fixture.node, exited());
    assert_eq!(open(&fixture, &task, true), Some(StreamRefusal::Unknown), "it is over");
}

/// The next cancel that is on its way to the node.
async fn next_cancel(outbox: &mut Outbox) -> (TaskId, u32) {
    loop {
        if let Some(hub_frame::Frame::CancelTask(cancel)) = outbox.recv().await.unwrap().frame {
            return (TaskId::from_slice(&cancel.task_id).unwrap(), cancel.signal);
        }
    }
}

#[tokio::test]
async fn a_cancel_is_said_again_in_each_session_until_there_is_a_verdict() {
    let mut fixture = fixture_with(Duration::from_secs(600)).await;
    let task = fixture.start("ann", Role::Operator).await.unwrap();
    fixture.open(&task);
    fixture.relay.cancel(&task, 2, Duration::from_secs(1));
    for _ in 0..3 {
        assert_eq!(next_cancel(&mut fixture.session.outbox).await, (task.id(), 2));
        // Nobody knows whether it arrived before the line was cut.
        fixture.reconnect(&[task.id()]);
    }
}

#[tokio::test]
async fn what_was_given_up_while_its_node_was_away_ends_when_it_is_back_also_after_a_restart() {
    let mut fixture = fixture_with(SHORT).await;
    let revoked = fixture.start("bob", Role::Operator).await.unwrap();
    let cancelled = fixture.start("ann", Role::Operator).await.unwrap();
    let wanted = fixture.start("ann", Role::Operator).await.unwrap();
    let tasks = [&revoked, &cancelled, &wanted];
    for task in tasks {
        fixture.open(task);
    }
    fixture.relay.session_lost(fixture.session.handle.id);
    fixture.relay.end_of_actor("bob", "bob was revoked");
    fixture.relay.cancel(&cancelled, 15, Duration::from_secs(1));
    assert_eq!(end_after_news(&revoked).await.verdict(), TaskVerdict::Cancelled);
    for task in [&cancelled, &wanted] {
        assert_eq!(end_after_news(task).await.verdict(), TaskVerdict::StreamLost);
    }
    let held: Vec<TaskId> = tasks.iter().map(|task| task.id()).collect();
    for restarted in [false, true] {
        if restarted {
            let scope = TaskScope::new();
            let (folder, limits) = (fixture.folder.path().join("tasks"), SpoolLimits::default());
            let spool = Spool::open(folder, limits, &scope).unwrap();
            let deadlines = Deadlines { start: Duration::ZERO, resume: SHORT };
            let history = Arc::clone(fixture.relay.history());
            let store = Arc::clone(&fixture.store);
            let limits = Default::default();
            fixture.relay = Relay::new(store, spool, history, events(), scope, deadlines, limits);
            fixture.relay.recover().await.unwrap();
        }
        fixture.reconnect(&held);
        let mut ended = [(); 2].map(|()| TaskId::new());
        for id in &mut ended {
            *id = next_cancel(&mut fixture.session.outbox).await.0;
        }
        ended.sort();
        let mut unwanted = [revoked.id(), cancelled.id()];
        unwanted.sort();
        assert_eq!(ended, unwanted, "and not the third");
    }
    // Once the node has said how it ended, nobody asks any more.
    fixture.relay.outcome(revoked.id(), &fixture.session.handle.clone(), exited());
    wait_for_ack(&mut fixture.session.outbox, revoked.id()).await;
    fixture.reconnect(&held);
    assert_eq!(next_cancel(&mut fixture.session.outbox).await.0, cancelled.id());
    assert!(fixture.session.outbox.try_recv().is_err());
}

#[tokio::test]
async fn what_had_come_of_a_lost_command_is_counted() {
    let fixture = fixture().await;
    let task = fixture.start("ann", Role::Operator).await.unwrap();
    let stream = fixture.open(&task);
    assert!(fixture.relay.node_frame(&task, stream, output(0, "12345")));
    fixture.relay.session_lost(fixture.session.handle.id);
    let exit = end_after_news(&task).await;
    assert_eq!((exit.verdict(), exit.stdout_bytes), (TaskVerdict::StreamLost, 5));
    let end = fixture.store.task(task.id()).await.unwrap().unwrap().end.unwrap();
    assert_eq!((end.stdout_bytes, end.is_nodes_word()), (5, false));
}

#[tokio::test]
async fn a_node_has_so_many_commands_and_no_more() {
    let fixture = fixture().await;
    let mut tasks = Vec::new();
    for _ in 0..CommandLimits::default().node {
        // As many frames as are under way must not end the session.
        tasks.push(fixture.start("ann", Role::Operator).await.unwrap());
    }
    let full = fixture.start("bob", Role::Operator).await;
    assert!(matches!(full, Err(StartRefusal::Full { limit: 256, .. })));
    assert!(fixture.relay.finish(tasks[0].id(), fixture.node, exited()));
    assert!(fixture.start("bob", Role::Operator).await.is_ok());
}

#[tokio::test]
async fn the_next_hub_takes_up_what_the_last_one_left_open() {
    let mut fixture = fixture_with(SHORT).await;
    let (task, lost) = (
        fixture.start("ann", Role::Operator).await.unwrap(),
        fixture.start("ann", Role::Operator).await.unwrap(),
    );
    let stream = fixture.open(&task);
    assert!(fixture.relay.node_frame(&task, stream, output(0, "before")));
    fixture.relay.spool().flush(task.id()).await;
    // As a crash: nothing of the old relay is asked any more.
    let scope = TaskScope::new();
    let spool = Spool::open(fixture.folder.path().join("tasks"), SpoolLimits::default(), &scope);
    let deadlines = Deadlines { start: Duration::ZERO, resume: SHORT };
    let history = Arc::clone(fixture.relay.history());
    let (store, limits) = (Arc::clone(&fixture.store), Default::default());
    let next = Relay::new(store, spool.unwrap(), history, events(), scope, deadlines, limits);
    next.recover().await.unwrap();
    assert_eq!(next.running(), 2);
    fixture.relay = next;
    fixture.reconnect(&[task.id(), lost.id()]);
    let (task, stream) = fixture.relay.open_stream(fixture.node, &hello(&task, true)).unwrap();
    assert_eq!(task.to_reader.resume().0, [6, 0], "the spool says how far it had come");
    assert!(fixture.relay.node_frame(&task, stream, output(6, " after")));
    let attached = task.attach([2, 0], 1 << 20, 0).unwrap();
    assert_eq!(attached.live_from, [6, 0]);
    // The other one does not come in time.
    let other = fixture.relay.get(lost.id()).unwrap();
    assert_eq!(end_after_news(&other).await.verdict(), TaskVerdict::StreamLost);
    assert!(!task.has_ended());
}

#[tokio::test]
async fn a_key_leads_to_one_task_of_its_actor_and_only_with_the_same_command() {
    let fixture = fixture().await;
    let key = |hash| Some(IdempotencyKey { key: "k".into(), request_hash: [hash; 32] });
    let start = async |actor: &str, hash| {
        let new = NewTask { key: key(hash), ..fixture.new_task(actor, Role::Operator) };
        let session = fixture.session.handle.clone();
        fixture.relay.start(new, TaskSpec::default(), 1, session, &Claim::default()).await
    };
    let Ok(Begun::New(first)) = start("ann", 1).await else { panic!() };
    let Ok(Begun::Known(again)) = start("ann", 1).await else { panic!() };
    assert_eq!(again, first.id());
    assert!(
        matches!(start("ann", 2).await, Err(StartRefusal::KeyReused { task }) if task == again)
    );
    assert!(matches!(start("bob", 1).await, Ok(Begun::New(_))));
}

#[tokio::test]
async fn a_task_that_never_began_gives_its_key_back() {
    let fixture = fixture().await;
    let key = || Some(IdempotencyKey { key: "k".into(), request_hash: [1; 32] });
    let start = async |claim: &Claim| {
        let new = NewTask { key: key(), ..fixture.new_task("ann", Role::Operator) };
        let session = fixture.session.handle.clone();
        fixture.relay.start(new, TaskSpec::default(), 1, session, claim).await
    };
    let given_up = Claim::default();
    assert!(given_up.take());
    assert!(matches!(start(&given_up).await, Err(StartRefusal::GivenUp)));
    // Its verdict is written beside.
    let lines = async || fixture.store.audit_page(None, 10).await.unwrap();
    while !lines().await.iter().any(|line| line.action == "task.ended") {
        tokio::task::yield_now().await;
    }
    let Ok(Begun::New(task)) = start(&Claim::default()).await else { panic!("a new one") };
    let Ok(Begun::Known(known)) = start(&Claim::default()).await else { panic!("the same") };
    assert_eq!(known, task.id());
}

/// The end, whatever is said of interruptions before it.
async fn end_after_news(task: &Task) -> TaskExit {
    loop {
        let number = task.attach([0; 2], 1 << 20, 0).map_or(1, |attached| attached.reader);
        while let Some(frame) = task.to_reader.next(number).await {
            if let ReaderFrame::End(End::Exit(exit)) = frame {
                return exit;
            }
        }
    }
}

async fn wait_for_ack(outbox: &mut Outbox, id: TaskId) {
    let limit = Duration::from_secs(20);
    loop {
        let frame = tokio::time::timeout(limit, outbox.recv()).await.expect("acknowledged");
        if let Some(hub_frame::Frame::TaskAck(ack)) = frame.unwrap().frame {
            assert_eq!(ack.task_id, id.as_bytes().to_vec());
            return;
        }
    }
}
