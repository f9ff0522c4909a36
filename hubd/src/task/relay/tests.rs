use cortex_proto::v1::{Output, StartTask};
use cortex_shared::policy::{Mode, Role};
use tokio::sync::mpsc;

use super::*;
use crate::node::registry::{Arrival, Registry, SessionEnds};
use crate::store::fixtures;
use crate::store::sqlite::SqliteStore;
use crate::task::limits::{AGENT_TOKEN_COMMANDS, AGENT_TOKEN_OUTPUT_BYTES};

struct Fixture {
    _folder: tempfile::TempDir,
    relay: Arc<Relay>,
    store: Arc<dyn Store>,
    session: SessionEnds,
}

async fn fixture() -> Fixture {
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
    let relay = Relay::new(Arc::clone(&store), scope, Duration::from_secs(60));
    Fixture { _folder: folder, relay, store, session: begun.unwrap().0 }
}

impl Fixture {
    async fn start(&self, actor: &str, role: Role) -> Result<Arc<Task>, StartRefusal> {
        let new = NewTask {
            id: TaskId::new(),
            node: self.session.handle.node,
            node_name: "box".into(),
            actor: actor.into(),
            role,
            command: crate::store::fixtures::command(),
            workspace: String::new(),
            mode: Mode::Strict,
            accepted_at_ms: 1,
        };
        let session = self.session.handle.clone();
        self.relay.start(new, TaskSpec::default(), 1 << 20, session, &Claim::default()).await
    }
}

fn starts(outbox: &mut mpsc::Receiver<cortex_proto::v1::HubFrame>) -> Vec<StartTask> {
    std::iter::from_fn(|| outbox.try_recv().ok())
        .filter_map(|frame| match frame.frame {
            Some(hub_frame::Frame::StartTask(start)) => Some(start),
            _ => None,
        })
        .collect()
}

async fn end(task: &Task) -> TaskExit {
    loop {
        if let Some(super::super::mailbox::ReaderFrame::End(End::Exit(exit))) =
            task.to_reader.next().await
        {
            return exit;
        }
    }
}

#[tokio::test]
async fn an_agent_token_has_a_handful_of_commands_at_once_and_a_place_is_free_at_the_end() {
    let mut fixture = fixture().await;
    let mut tasks = Vec::new();
    for _ in 0..AGENT_TOKEN_COMMANDS {
        tasks.push(fixture.start("bot", Role::AgentToken).await.unwrap());
    }
    let refusal = fixture.start("bot", Role::AgentToken).await.err().unwrap();
    assert!(matches!(refusal, StartRefusal::TooMany { limit: AGENT_TOKEN_COMMANDS, .. }));
    fixture.start("ann", Role::Operator).await.unwrap();
    let exit = TaskExit { verdict: TaskVerdict::Exited.into(), ..TaskExit::default() };
    fixture.relay.finish(tasks[0].id, fixture.session.handle.id, exit);
    fixture.start("bot", Role::AgentToken).await.unwrap();
    let roles: Vec<_> = starts(&mut fixture.session.outbox).into_iter().map(|s| s.role).collect();
    assert_eq!(roles.iter().filter(|role| *role == "agent-token").count(), 9);
    assert_eq!(roles.iter().filter(|role| *role == "operator").count(), 1);
}

#[tokio::test]
async fn an_agent_token_writes_so_much_and_no_more() {
    let fixture = fixture().await;
    let task = fixture.start("bot", Role::AgentToken).await.unwrap();
    let data = bytes::Bytes::from(vec![b'x'; 256 * 1024]);
    let frames = AGENT_TOKEN_OUTPUT_BYTES / data.len() as u64;
    for n in 0..=frames {
        let offset = n * data.len() as u64;
        let output = Output { stream: 0, offset, data: data.clone() };
        let more = fixture.relay.node_frame(&task, task_io_up::Frame::Output(output));
        assert_eq!(more, n < frames, "frame {n} of {frames}");
        if more {
            task.to_reader.next().await.unwrap();
            task.to_reader.grant(data.len() as u64);
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
    assert_eq!(cancelled, [(bobs.id.as_bytes().to_vec().into(), 0)], "killed without grace");
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
    fixture.relay.finish(task.id, fixture.session.handle.id, exit.clone());
    end(&task).await;
    fixture.relay.finish(task.id, fixture.session.handle.id, exit);
    let lines = fixture.store.audit_page(None, 10).await.unwrap();
    let actions: Vec<_> = lines.iter().map(|l| (l.actor.as_str(), l.action.as_str())).collect();
    assert_eq!(actions, [("ann", "task.accepted"), ("ann", "task.ended")]);
    let accepted: serde_json::Value = serde_json::from_str(&lines[0].detail).unwrap();
    let ended: serde_json::Value = serde_json::from_str(&lines[1].detail).unwrap();
    assert_eq!(lines[1].target, task.id.to_string());
    assert_eq!((&accepted["node"], &accepted["command"]), (&"box".into(), &"true".into()));
    assert_eq!((&ended["verdict"], &ended["exit_code"]), (&"exited".into(), &3.into()));
    assert_eq!(ended["stdout_hash"], "07".repeat(32));
    assert!(ended["stderr_hash"].is_null(), "what is no hash is none");
    assert!(ended["reason"].as_str().unwrap().len() <= MAX_REASON_BYTES);
}
