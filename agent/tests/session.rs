//! The agent's process against a hub that behaves, and one that does not.

#![allow(clippy::unwrap_used, clippy::print_stderr)]

mod support;

use std::time::Duration;

use cortex_proto::v1::{self, hub_frame, node_frame, task_io_down, task_io_up};
use cortex_shared::ids::TaskId;
use support::{Agent, Hub, refusal, run, shell, within};

/// Heartbeats so frequent that this hub, which answers none, is left after 0.6 seconds.
const QUICK: Duration = Duration::from_millis(200);
/// Heartbeats that play no part.
const CALM: Duration = Duration::from_secs(60);

async fn connected(
    policy: v1::Mode,
    ceiling: &str,
    heartbeat: Duration,
) -> (Hub, Agent, support::Session) {
    let mut hub = Hub::start(policy, heartbeat).await;
    let agent = Agent::joined(&hub, ceiling).await;
    let session = hub.session().await;
    (hub, agent, session)
}

#[tokio::test]
async fn joining_twice_keeps_the_identity_and_a_wrong_pin_leaves_nothing_behind() {
    let hub = Hub::start(v1::Mode::Strict, CALM).await;
    let agent = Agent::unjoined();
    assert!(agent.join(&hub, "strict").await.status.success());
    let key = std::fs::read(agent.path("state/identity/key.pem")).unwrap();
    let again = agent.join(&hub, "strict").await;
    assert!(again.status.success());
    assert!(String::from_utf8_lossy(&again.stdout).contains("invite was not used"));
    assert_eq!(std::fs::read(agent.path("state/identity/key.pem")).unwrap(), key);

    let other = Hub::start(v1::Mode::Strict, CALM).await;
    let elsewhere = agent.join(&other, "strict").await;
    assert_eq!(elsewhere.status.code(), Some(7));

    let fresh = Agent::unjoined();
    let mismatched = Hub { address: hub.address, ..other };
    let refused = fresh.join(&mismatched, "strict").await;
    assert_eq!(refused.status.code(), Some(6));
    let text = String::from_utf8_lossy(&refused.stderr).into_owned();
    assert!(text.contains(&hub.ca.pin().to_string()), "{text}");
    assert!(text.contains(&mismatched.ca.pin().to_string()), "{text}");
    assert!(!fresh.path("state/identity/node.json").exists());
}

#[tokio::test]
async fn session_sends_heartbeats_and_tells_its_state_locally() {
    let (_hub, agent, mut session) = connected(v1::Mode::Strict, "strict", QUICK).await;
    assert_eq!(session.hello.ceiling, i32::from(v1::Mode::Strict));
    assert_eq!(session.hello.instance_id.len(), 16);
    loop {
        let frame = within(session.frames.message()).await.unwrap().unwrap().frame.unwrap();
        if matches!(frame, node_frame::Frame::Heartbeat(_)) {
            break;
        }
    }
    let mut status = agent.command();
    status.args(["status", "-o", "json"]);
    let output = run(status).await;
    let status: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(status["connected"], true);
    assert_eq!(status["name"], "n1");
    assert_eq!(status["ceiling"], "strict");
}

#[tokio::test]
async fn silent_hub_is_left_and_dialled_again() {
    let (mut hub, _agent, session) = connected(v1::Mode::Strict, "strict", QUICK).await;
    // The hub answers no heartbeat, so it seems dead after three intervals.
    let second = hub.session().await;
    assert_eq!(second.hello.instance_id, session.hello.instance_id);
}

#[tokio::test]
async fn drain_tells_when_to_come_back() {
    let mut hub = Hub::start(v1::Mode::Strict, CALM).await;
    let _agent = Agent::joined(&hub, "strict").await;
    let session = hub.session().await;
    session.send(hub_frame::Frame::Drain(v1::Drain { reconnect_after_ms: 1 })).await;
    hub.session().await;
}

/// A hub that orders more than anybody allowed: each time another part of the permission is missing.
#[tokio::test]
async fn lying_hub_is_refused_the_missing_part_named_and_the_refusal_written_down() {
    for (policy, ceiling, role, missing) in [
        (v1::Mode::Permissive, "strict", "operator", "ceiling"),
        (v1::Mode::Strict, "permissive", "admin", "policy"),
        (v1::Mode::Permissive, "permissive", "agent-token", "commands of agent-token are always"),
        (v1::Mode::Permissive, "permissive", "viewer", "commands of viewer are always"),
        (v1::Mode::Permissive, "permissive", "", "the hub names none"),
        (v1::Mode::Permissive, "permissive", "root", "the hub names none"),
    ] {
        let (mut hub, agent, session) = connected(policy, ceiling, CALM).await;
        let marker = agent.path("marker");
        let spec = v1::TaskSpec {
            mode: v1::Mode::Permissive.into(),
            ..shell(&format!("touch {}", marker.display()))
        };
        let id = TaskId::new();
        session.start_as(role, id.as_bytes(), spec).await;
        let (_, exit) = hub.task().await.read_to_exit().await;
        assert_eq!(exit.verdict, i32::from(v1::TaskVerdict::Refused), "{missing}");
        assert!(exit.reason.contains(missing), "{}", exit.reason);
        assert!(exit.hint.is_ascii() && !exit.hint.is_empty(), "{}", exit.hint);
        assert!(!marker.exists());
        let refused = agent.audit("command.refused");
        let [line] = refused.as_slice() else { panic!("{refused:?}") };
        assert_eq!((&line["task_id"], &line["role"]), (&id.to_string().into(), &role.into()));
        assert!(line["reason"].as_str().unwrap().contains(missing));
        assert!(line["command"].as_str().unwrap().starts_with("touch "));
        assert!(agent.audit("command.permissive").is_empty());
    }
}

#[tokio::test]
async fn permissive_policy_ends_by_itself_and_a_command_under_it_is_written_down() {
    let mut hub = Hub::start(v1::Mode::Strict, CALM).await;
    let agent = Agent::joined(&hub, "permissive").await;
    let session = hub.session().await;
    let spec = v1::TaskSpec { mode: v1::Mode::Permissive.into(), ..shell("echo ran") };
    let told = async |until_ms| {
        let policy = v1::Mode::Permissive.into();
        session
            .send(hub_frame::Frame::Policy(v1::PolicyUpdate { policy, until_ms, network: 0 }))
            .await;
    };
    told(support::now_ms() + 60_000).await;
    session.start(TaskId::new().as_bytes(), spec.clone(), 1024).await;
    let (stdout, _) = hub.task().await.read_to_exit().await;
    assert_eq!(stdout, b"ran\n");
    assert_eq!(agent.audit("command.permissive").len(), 1);
    // What is told while a line is being written replaces what waits for it.
    support::until(|| agent.audit("policy.received").len() == 1).await;
    let status = agent.json(&["status"]).await;
    assert_eq!(status["policy"], "permissive");
    assert!(status["policy_until_ms"].as_i64().unwrap() > support::now_ms());

    // The clocks are known to be equal to within half a round trip only.
    for (until_ms, reason) in [(support::now_ms() - 1000, "permissive until"), (0, "it is strict")]
    {
        told(until_ms).await;
        session.start(TaskId::new().as_bytes(), spec.clone(), 1024).await;
        let (_, exit) = hub.task().await.read_to_exit().await;
        assert_eq!(exit.verdict, i32::from(v1::TaskVerdict::Refused));
        assert!(exit.reason.contains(reason), "{}", exit.reason);
    }
    // Permissive, and its end; that it is strict says nothing new then.
    support::until(|| agent.audit("policy.received").len() == 2).await;
    assert_eq!(agent.json(&["status"]).await["policy"], "strict");
}

/// Between the order and the start lies the opening of the stream, as long as the hub likes.
#[tokio::test]
async fn permission_that_ends_while_the_hub_holds_a_stream_back_is_gone() {
    for missing in ["ceiling", "policy"] {
        let (mut hub, agent, session) = connected(v1::Mode::Permissive, "permissive", CALM).await;
        hub.set(|script| script.hold_tasks = true);
        let marker = agent.path("marker");
        let spec = v1::TaskSpec {
            mode: v1::Mode::Permissive.into(),
            ..shell(&format!("touch {}", marker.display()))
        };
        session.start(TaskId::new().as_bytes(), spec, 1024).await;
        hub.seen(|script| (script.held == 1).then_some(())).await;
        if missing == "ceiling" {
            let mut set = agent.command();
            set.args(["ceiling", "set", "strict"]);
            assert!(run(set).await.status.success());
        } else {
            support::until(|| agent.audit("policy.received").len() == 1).await;
            let policy =
                v1::PolicyUpdate { policy: v1::Mode::Strict.into(), until_ms: 0, network: 0 };
            session.send(hub_frame::Frame::Policy(policy)).await;
            support::until(|| agent.audit("policy.received").len() == 2).await;
        }
        hub.set(|script| script.hold_tasks = false);
        let (_, exit) = hub.task().await.read_to_exit().await;
        assert_eq!(exit.verdict, i32::from(v1::TaskVerdict::Refused));
        assert!(exit.reason.contains(missing), "{}", exit.reason);
        assert!(!marker.exists());
        assert!(agent.audit("command.permissive").is_empty());
        assert_eq!(agent.audit("command.refused").len(), 1);
    }
}

#[tokio::test]
async fn task_whose_stream_the_hub_never_takes_is_given_up() {
    let (hub, _agent, mut session) = connected(v1::Mode::Strict, "strict", CALM).await;
    hub.set(|script| script.hold_tasks = true);
    session.start(TaskId::new().as_bytes(), shell("true"), 1024).await;
    let node_frame::Frame::TaskOutcome(outcome) = session.next().await else {
        panic!("it is not given up")
    };
    let exit = outcome.exit.unwrap();
    assert_eq!(exit.verdict, i32::from(v1::TaskVerdict::Failed));
    assert!(exit.reason.contains("did not take it in time"), "{}", exit.reason);
}

#[tokio::test]
async fn permissive_command_that_was_written_down_and_did_not_start_has_a_line_that_says_so() {
    let (mut hub, agent, session) = connected(v1::Mode::Permissive, "permissive", CALM).await;
    let spec = |program: &str| v1::TaskSpec {
        mode: v1::Mode::Permissive.into(),
        argv: vec![program.to_owned().into()],
        ..Default::default()
    };
    for program in ["/nonexistent/program", "true"] {
        session.start(TaskId::new().as_bytes(), spec(program), 1024).await;
        let (_, exit) = hub.task().await.read_to_exit().await;
        let ran = exit.verdict == i32::from(v1::TaskVerdict::Exited);
        assert_eq!(ran, program == "true", "{}", exit.reason);
    }
    support::until(|| !agent.audit("command.not_run").is_empty()).await;
    assert_eq!(agent.audit("command.permissive").len(), 2);
    let not_run = agent.audit("command.not_run");
    let [line] = not_run.as_slice() else { panic!("{not_run:?}") };
    assert_eq!(line["command"], "/nonexistent/program");
    assert!(!line["reason"].as_str().unwrap().is_empty());
}

#[tokio::test]
async fn flood_of_policies_is_counted_and_pushes_nothing_out() {
    const POLICIES: u64 = 3000;
    let (mut hub, agent, session) = connected(v1::Mode::Strict, "permissive", CALM).await;
    let until_ms = support::now_ms() + 3_600_000;
    for n in 0..POLICIES {
        // Alternating, and with another end each time: none is the same as the one before.
        let policy = if n % 2 == 0 { v1::Mode::Permissive } else { v1::Mode::Strict };
        let until_ms = until_ms + i64::try_from(n).unwrap();
        let update = v1::PolicyUpdate { policy: policy.into(), until_ms, network: 0 };
        session.send(hub_frame::Frame::Policy(update)).await;
    }
    // The end of the session has the rest written.
    session.send(hub_frame::Frame::Drain(v1::Drain { reconnect_after_ms: 1 })).await;
    let _second = hub.session().await;
    let told = || {
        let lines = agent.audit("policy.received");
        let not_listed: u64 = lines.iter().filter_map(|line| line["not_listed"].as_u64()).sum();
        (lines.len() as u64, not_listed)
    };
    support::until(|| told().0 + told().1 == POLICIES).await;
    assert!(told().0 <= 30, "{:?}", told());
    let lines = agent.audit("policy.received");
    assert_eq!(lines.last().unwrap()["policy"], "strict");
    let kept = std::fs::read_to_string(agent.path("state/audit.jsonl")).unwrap();
    assert!(kept.contains("node.joined") && !kept.contains("policy.received"), "{kept}");
}

#[tokio::test]
async fn ceiling_that_others_can_write_is_not_believed_and_named() {
    use std::os::unix::fs::PermissionsExt as _;
    let (mut hub, agent, session) = connected(v1::Mode::Permissive, "permissive", CALM).await;
    let set = |path: &std::path::Path, mode| {
        std::fs::set_permissions(path, std::fs::Permissions::from_mode(mode)).unwrap();
    };
    let spec = v1::TaskSpec { mode: v1::Mode::Permissive.into(), ..shell("true") };
    for (path, open, kept) in
        [(agent.path("state"), 0o777, 0o700), (agent.path("state/agent.json"), 0o666, 0o600)]
    {
        set(&path, open);
        session.start(TaskId::new().as_bytes(), spec.clone(), 1024).await;
        let (_, exit) = hub.task().await.read_to_exit().await;
        assert_eq!(exit.verdict, i32::from(v1::TaskVerdict::Refused));
        assert!(exit.reason.contains("ceiling"), "{}", exit.reason);
        let status = agent.json(&["status"]).await;
        assert_eq!(status["ceiling"], "strict");
        let named = format!("{} can be changed by others", path.display());
        assert!(status["ceiling_problem"].as_str().unwrap().contains(&named), "{status}");
        let mut doctor = agent.command();
        doctor.arg("doctor");
        let doctor = String::from_utf8(run(doctor).await.stdout).unwrap();
        assert!(doctor.contains(&named), "{doctor}");
        set(&path, kept);
    }
    assert_eq!(agent.json(&["status"]).await["ceiling"], "permissive");
}

#[tokio::test]
async fn permissive_command_that_cannot_be_written_down_does_not_run() {
    let (mut hub, agent, session) = connected(v1::Mode::Permissive, "permissive", CALM).await;
    support::until(|| !agent.audit("policy.received").is_empty()).await;
    let audit = agent.path("state/audit.jsonl");
    std::fs::remove_file(&audit).unwrap();
    std::fs::create_dir(&audit).unwrap();
    let marker = agent.path("marker");
    let spec = v1::TaskSpec {
        mode: v1::Mode::Permissive.into(),
        ..shell(&format!("touch {}", marker.display()))
    };
    session.start(TaskId::new().as_bytes(), spec, 1024).await;
    let (_, exit) = hub.task().await.read_to_exit().await;
    assert_eq!(exit.verdict, i32::from(v1::TaskVerdict::Refused));
    assert!(exit.reason.contains("written down"), "{}", exit.reason);
    assert!(!marker.exists());
}

#[tokio::test]
async fn ceiling_is_changed_by_root_or_the_agents_user_only_and_each_change_written_down() {
    use std::os::unix::fs::{MetadataExt as _, chown};
    use std::os::unix::process::CommandExt as _;
    let hub = Hub::start(v1::Mode::Strict, CALM).await;
    let agent = Agent::unjoined();
    assert!(agent.join(&hub, "strict").await.status.success());
    let set = |mode: &str| {
        let mut command = agent.command();
        command.args(["ceiling", "set", mode]);
        command
    };
    assert!(run(set("permissive")).await.status.success());
    let lines = agent.audit("ceiling.set");
    assert_eq!((&lines[0]["before"], &lines[0]["after"]), (&"strict".into(), &"permissive".into()));
    // What cannot be written down is not raised, and can be lowered all the same.
    let audit = agent.path("state/audit.jsonl");
    let ceiling = async || agent.json(&["ceiling", "show"]).await["ceiling"].clone();
    let kept = std::fs::read(&audit).unwrap();
    std::fs::remove_file(&audit).unwrap();
    std::fs::create_dir(&audit).unwrap();
    assert!(run(set("strict")).await.status.success());
    assert_eq!(run(set("permissive")).await.status.code(), Some(1));
    assert_eq!(ceiling().await, "strict");
    std::fs::remove_dir(&audit).unwrap();
    std::fs::write(&audit, kept).unwrap();

    if !rustix::process::geteuid().is_root() {
        eprintln!("skipped: only root can act as two users");
        return;
    }
    let (owner, stranger) = (64_001, 64_002);
    let state = agent.path("state");
    for path in [agent.folder.path(), &state, &state.join("agent.json"), &audit] {
        chown(path, Some(owner), Some(owner)).unwrap();
    }
    // Root may, and leaves files that their owner can still use.
    assert!(run(set("permissive")).await.status.success());
    for file in ["agent.json", "audit.jsonl", "audit.lock", "agent.json.lock"] {
        assert_eq!(std::fs::metadata(state.join(file)).unwrap().uid(), owner, "{file}");
    }
    // The program has to be where these users may read it.
    let program = agent.path("cortex-agent");
    std::fs::copy(env!("CARGO_BIN_EXE_cortex-agent"), &program).unwrap();
    let set_as = |user: u32, mode: &str| {
        let mut command = std::process::Command::new(&program);
        command.args(["ceiling", "set", mode]).env_clear().uid(user).gid(user);
        command.env("HOME", "/").env("CORTEX_STATE", &state);
        command
    };
    assert!(run(set_as(owner, "strict")).await.status.success());
    // A stranger does not even get past the private directories; if they are left open, the state's
    // owner is still asked for.
    for path in [agent.folder.path(), &state] {
        let open = std::os::unix::fs::PermissionsExt::from_mode(0o777);
        std::fs::set_permissions(path, open).unwrap();
    }
    assert_eq!(run(set_as(stranger, "permissive")).await.status.code(), Some(5));
    assert_eq!(ceiling().await, "strict");
}

#[tokio::test]
async fn command_runs_once_streams_its_output_and_tells_its_end() {
    let (mut hub, agent, mut session) = connected(v1::Mode::Permissive, "permissive", CALM).await;
    let marker = agent.path("marker");
    let spec = v1::TaskSpec {
        mode: v1::Mode::Permissive.into(),
        ..shell(&format!("echo ran >> {}; echo out; exit 3", marker.display()))
    };
    let id = TaskId::new();
    session.start(id.as_bytes(), spec.clone(), 1024).await;
    let (stdout, exit) = hub.task().await.read_to_exit().await;
    assert_eq!(stdout, b"out\n");
    assert_eq!((exit.verdict, exit.exit_code), (v1::TaskVerdict::Exited.into(), 3));
    assert_eq!(exit.stdout_hash, blake3::hash(b"out\n").as_bytes().as_slice());

    // A repeated order is answered with how it ended. It never runs twice.
    session.start(id.as_bytes(), spec, 1024).await;
    let node_frame::Frame::TaskRefused(refused) = session.next().await else { panic!() };
    assert_eq!(refused.task_id, id.as_bytes().as_slice());
    assert_eq!(refused.exit.unwrap(), exit);
    assert_eq!(std::fs::read(marker).unwrap(), b"ran\n");
}

#[tokio::test]
async fn no_more_output_comes_than_was_granted() {
    let mut hub = Hub::start(v1::Mode::Permissive, CALM).await;
    let _agent = Agent::joined(&hub, "permissive").await;
    let session = hub.session().await;
    let spec = v1::TaskSpec {
        mode: v1::Mode::Permissive.into(),
        ..shell("head -c 100000 /dev/zero; echo done >&2")
    };
    session.start(TaskId::new().as_bytes(), spec, 1000).await;
    let mut task = hub.task().await;
    let mut received = 0;
    while received < 1000 {
        if let task_io_up::Frame::Output(output) = task.next().await {
            received += output.data.len();
        }
    }
    assert_eq!(received, 1000);
    // A pipe holds less than what is left, so the command cannot have ended; and nothing comes.
    let more = tokio::time::timeout(Duration::from_millis(300), task.up.message()).await;
    assert!(more.is_err(), "{more:?}");
    task.send(task_io_down::Frame::Credit(v1::Credit { bytes: 1_000_000 })).await;
    let (stdout, exit) = task.read_to_exit().await;
    assert_eq!(stdout.len() + received, 100_000);
    assert_eq!((exit.stdout_bytes, exit.stderr_bytes), (100_000, 5));
}

#[tokio::test]
async fn input_reaches_the_command_and_its_taking_is_told() {
    let (mut hub, _agent, session) = connected(v1::Mode::Permissive, "permissive", CALM).await;
    let spec =
        v1::TaskSpec { mode: v1::Mode::Permissive.into(), stdin: true, ..shell("cat; echo end") };
    session.start(TaskId::new().as_bytes(), spec, 1_000_000).await;
    let task = hub.task().await;
    for _ in 0..4 {
        let data = vec![b'x'; 64 * 1024].into();
        task.send(task_io_down::Frame::Stdin(v1::Stdin { data, end: false })).await;
    }
    task.send(task_io_down::Frame::Stdin(v1::Stdin { data: "y\n".into(), end: true })).await;
    let (stdout, exit) = task.read_to_exit().await;
    assert_eq!(stdout.len(), 4 * 64 * 1024 + 6);
    assert!(stdout.ends_with(b"xy\nend\n"));
    assert_eq!(exit.exit_code, 0);
}

#[tokio::test]
async fn cancel_ends_a_command_and_a_lost_session_does_where_that_was_asked_for() {
    let (mut hub, agent, session) = connected(v1::Mode::Permissive, "permissive", CALM).await;
    let waiting = |name: &str| v1::TaskSpec {
        mode: v1::Mode::Permissive.into(),
        ..shell(&format!(
            "trap 'touch {0}; exit 0' TERM; echo ready; while :; do sleep 0.1; done",
            agent.path(name).display()
        ))
    };
    let ready = async |task: &mut support::TaskIo| {
        while !matches!(task.next().await, task_io_up::Frame::Output(_)) {}
    };
    let gone = async |name: &str| {
        let path = agent.path(name);
        within(async {
            while !path.exists() {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        })
        .await;
    };

    let id = TaskId::new();
    session.start(id.as_bytes(), waiting("cancelled"), 1024).await;
    let mut task = hub.task().await;
    ready(&mut task).await;
    let cancel =
        v1::CancelTask { task_id: id.as_bytes().to_vec().into(), signal: 15, grace_ms: 5000 };
    session.send(hub_frame::Frame::CancelTask(cancel)).await;
    let (_, exit) = task.read_to_exit().await;
    assert_eq!(exit.verdict, i32::from(v1::TaskVerdict::Cancelled));
    gone("cancelled").await;

    let killed =
        v1::TaskSpec { on_disconnect: v1::OnDisconnect::Kill.into(), ..waiting("session-lost") };
    session.start(TaskId::new().as_bytes(), killed, 1024).await;
    let mut task = hub.task().await;
    ready(&mut task).await;
    drop(session);
    gone("session-lost").await;
}

/// A command that counts up to 100 in lines of its own pace, driven by a file it waits for.
#[tokio::test]
async fn a_command_outlives_its_stream_and_its_session_and_goes_on_at_the_exact_byte() {
    let (mut hub, agent, session) = connected(v1::Mode::Permissive, "permissive", CALM).await;
    let (go, id) = (agent.path("go"), TaskId::new());
    let spec = v1::TaskSpec {
        mode: v1::Mode::Permissive.into(),
        stdin: true,
        ..shell(&format!(
            "echo abcdef; read x; echo got $x; while [ ! -e {} ]; do sleep 0.02; done; echo end; exit 3",
            go.display()
        ))
    };
    session.start(id.as_bytes(), spec, 1024).await;
    let mut task = hub.task().await;
    while !matches!(task.next().await, task_io_up::Frame::Output(_)) {}
    drop(task);

    // Its stream alone broke: another one in the same session, from the third byte on.
    let mut task = hub.task().await;
    assert!(task.hello.resume && task.task_id == id.as_bytes());
    task.resume(3, 1021).await;
    let stdin = v1::Stdin { data: "in\n".into(), end: false };
    task.send(task_io_down::Frame::Stdin(stdin)).await;
    let mut text = Vec::new();
    while !text.ends_with(b"got in\n") {
        if let task_io_up::Frame::Output(output) = task.next().await {
            assert_eq!(output.offset, 3 + text.len() as u64);
            text.extend_from_slice(&output.data);
        }
    }
    assert_eq!(text, b"def\ngot in\n");

    // The session is lost, and the command ends meanwhile.
    drop((session, task));
    std::fs::write(&go, "").unwrap();
    let mut session = hub.session().await;
    assert_eq!(session.hello.held_tasks, [id.as_bytes().to_vec()]);
    let task = hub.task().await;
    assert_eq!((task.hello.stdin_received, task.hello.stdin_taken), (3, 3));
    task.resume(14, 1024).await;
    let (text, exit) = task.read_to_exit().await;
    assert_eq!((text.as_slice(), exit.exit_code, exit.stdout_bytes), (&b"end\n"[..], 3, 18));

    // Not acknowledged: it is told again, by whatever process, until it is.
    let mut agent = agent;
    agent.kill();
    drop(session);
    agent.run();
    session = hub.session().await;
    let node_frame::Frame::TaskOutcome(outcome) = session.next().await else { panic!() };
    assert_eq!(outcome.exit.unwrap(), exit);
    let task_id = || id.as_bytes().to_vec().into();
    session.send(hub_frame::Frame::TaskAck(v1::TaskAck { task_id: task_id() })).await;
    // Once an order after it is answered, it has been read.
    session.start(id.as_bytes(), shell("true"), 1024).await;
    let node_frame::Frame::TaskRefused(refused) = session.next().await else { panic!() };
    assert!(refused.exit.unwrap().reason.contains("run before"));
    drop(session);
    let session = hub.session().await;
    assert!(session.hello.held_tasks.is_empty());
}

#[tokio::test]
async fn a_task_that_the_hub_cannot_take_up_yet_is_offered_again() {
    let (mut hub, _agent, session) = connected(v1::Mode::Permissive, "permissive", CALM).await;
    let spec = v1::TaskSpec {
        mode: v1::Mode::Permissive.into(),
        stdin: true,
        ..shell("echo ready; read x; echo got $x")
    };
    session.start(TaskId::new().as_bytes(), spec, 1024).await;
    let mut task = hub.task().await;
    while !matches!(task.next().await, task_io_up::Frame::Output(_)) {}
    hub.set(|script| script.refuse_tasks = Some("task_not_reached"));
    drop(task);
    hub.seen(|script| (script.refused > 1).then_some(())).await;
    hub.set(|script| script.refuse_tasks = None);
    let task = hub.task().await;
    assert!(task.hello.resume);
    task.resume(6, 1024).await;
    let stdin = v1::Stdin { data: "in\n".into(), end: false };
    task.send(task_io_down::Frame::Stdin(stdin)).await;
    assert_eq!(
        task.read_to_exit().await.0,
        b"got in\n",
        "neither its input nor its output is lost"
    );
}

#[tokio::test]
async fn what_the_hub_gave_up_runs_to_its_end_and_is_reported() {
    let (mut hub, agent, session) = connected(v1::Mode::Permissive, "permissive", CALM).await;
    let done = agent.path("done");
    let spec = v1::TaskSpec {
        mode: v1::Mode::Permissive.into(),
        ..shell(&format!("echo ready; head -c 300000 /dev/zero; touch {}; exit 4", done.display()))
    };
    session.start(TaskId::new().as_bytes(), spec, 1024).await;
    let mut task = hub.task().await;
    while !matches!(task.next().await, task_io_up::Frame::Output(_)) {}
    hub.set(|script| script.refuse_tasks = Some("task_unknown"));
    drop((task, session));
    let mut session = hub.session().await;
    let node_frame::Frame::TaskOutcome(outcome) = session.next().await else { panic!() };
    assert_eq!(outcome.exit.unwrap().exit_code, 4);
    assert!(done.exists(), "nobody took its output, and it ended all the same");
}

#[tokio::test]
async fn a_node_that_hears_that_it_was_revoked_ends_what_it_runs() {
    let (mut hub, agent, session) = connected(v1::Mode::Permissive, "permissive", CALM).await;
    let ended = agent.path("ended");
    let script =
        format!("trap 'touch {}; exit' TERM; echo ready; sleep 600 & wait", ended.display());
    let spec = v1::TaskSpec { mode: v1::Mode::Permissive.into(), ..shell(&script) };
    session.start(TaskId::new().as_bytes(), spec, 1024).await;
    let mut task = hub.task().await;
    while !matches!(task.next().await, task_io_up::Frame::Output(_)) {}
    hub.set(|script| script.refuse_session = Some(refusal("node_revoked", "revoked")));
    drop((task, session));
    support::until(|| ended.exists()).await;
}

#[tokio::test]
async fn sigterm_ends_running_commands_and_reports_them_before_leaving() {
    let mut hub = Hub::start(v1::Mode::Permissive, CALM).await;
    let mut agent = Agent::joined(&hub, "permissive").await;
    let session = hub.session().await;
    let spec = v1::TaskSpec { mode: v1::Mode::Permissive.into(), ..shell("echo ready; sleep 600") };
    session.start(TaskId::new().as_bytes(), spec, 1024).await;
    let mut task = hub.task().await;
    while !matches!(task.next().await, task_io_up::Frame::Output(_)) {}
    rustix::process::kill_process(agent.process_id(), rustix::process::Signal::TERM).unwrap();
    let (_, exit) = task.read_to_exit().await;
    assert_eq!(exit.verdict, i32::from(v1::TaskVerdict::Failed), "nobody cancelled it");
    assert!(exit.reason.contains("stopped"), "{}", exit.reason);
    assert!(agent.end_of_daemon().await.success());
    assert!(!agent.path("state/agent.sock").exists());
}

#[tokio::test]
async fn second_daemon_on_the_same_state_is_refused() {
    let (_hub, agent, _session) = connected(v1::Mode::Strict, "strict", CALM).await;
    let mut second = agent.command();
    second.arg("run");
    assert_eq!(run(second).await.status.code(), Some(7));
}
