//! `cortex-agent exec` against a hub that tells the truth, and one that does not.

#![allow(clippy::unwrap_used)]

mod support;

use std::io::{Read as _, Write as _};
use std::process::{Child, Output, Stdio};
use std::time::Duration;

use cortex_proto::v1::{self, exec_down, exec_up};
use support::{Agent, Exec, Hub, within};
use tonic::Status;

struct Mesh {
    hub: Hub,
    agent: Agent,
}

impl Mesh {
    async fn new() -> Self {
        let hub = Hub::start(v1::Mode::Strict, Duration::from_secs(60)).await;
        let agent = Agent::unjoined();
        agent.login(&hub).await;
        Self { hub, agent }
    }

    fn spawn(&self, args: &[&str]) -> Child {
        let mut command = self.agent.command();
        command.arg("exec").args(args);
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
        command.spawn().unwrap()
    }

    async fn run(&self, args: &[&str]) -> Output {
        let mut command = self.agent.command();
        command.args(args);
        support::run(command).await
    }

    /// Starts `exec n1 -- x` and gives the hub's end.
    async fn exec(&mut self) -> (Child, Exec) {
        let child = self.spawn(&["n1", "--", "x"]);
        (child, self.hub.exec().await)
    }
}

async fn end(child: Child) -> Output {
    within(tokio::task::spawn_blocking(move || child.wait_with_output())).await.unwrap().unwrap()
}

fn signal(child: &Child, signal: rustix::process::Signal) {
    rustix::process::kill_process(rustix::process::Pid::from_child(child), signal).unwrap();
}

fn exit(stdout: &[u8]) -> v1::TaskExit {
    v1::TaskExit {
        verdict: v1::TaskVerdict::Exited.into(),
        stdout_bytes: stdout.len() as u64,
        stdout_hash: blake3::hash(stdout).as_bytes().to_vec().into(),
        stderr_hash: blake3::hash(b"").as_bytes().to_vec().into(),
        ..Default::default()
    }
}

#[tokio::test]
async fn what_a_command_left_behind_is_said_whatever_way_it_ended() {
    let mut mesh = Mesh::new().await;
    let cases = [
        (v1::TaskExit { hint: "look at .envrc".into(), ..exit(b"") }, 0),
        (v1::TaskExit { hint: "look at .envrc".into(), exit_code: 3, ..exit(b"") }, 3),
        (
            v1::TaskExit {
                verdict: v1::TaskVerdict::Signalled.into(),
                signal: 9,
                hint: "it ran out of memory".into(),
                ..exit(b"")
            },
            137,
        ),
    ];
    for (exit, code) in cases {
        let expected = format!("hint: {}\n", exit.hint);
        let (child, exec) = mesh.exec().await;
        exec.send(exec_down::Frame::Exit(exit)).await;
        let output = end(child).await;
        let said = String::from_utf8(output.stderr).unwrap();
        assert_eq!((output.status.code(), said), (Some(code), expected));
    }
}

#[tokio::test]
async fn output_passes_byte_for_byte_and_the_commands_exit_code_is_ours() {
    let mut mesh = Mesh::new().await;
    let (child, exec) = mesh.exec().await;
    assert_eq!(exec.start.spec.as_ref().unwrap().argv, ["x"]);
    let bytes: Vec<u8> = (0..=255).collect();
    exec.output(0, &bytes[..100]).await;
    exec.output(100, &bytes[100..]).await;
    let stderr =
        v1::Output { stream: v1::OutputStream::Stderr.into(), data: "e".into(), offset: 0 };
    exec.send(exec_down::Frame::Output(stderr)).await;
    let exit = v1::TaskExit {
        exit_code: 42,
        stderr_bytes: 1,
        stderr_hash: blake3::hash(b"e").as_bytes().to_vec().into(),
        ..exit(&bytes)
    };
    exec.send(exec_down::Frame::Exit(exit)).await;
    let output = end(child).await;
    assert_eq!(
        (output.status.code(), output.stdout, output.stderr),
        (Some(42), bytes, b"e".to_vec())
    );
}

#[tokio::test]
async fn output_that_is_not_complete_is_never_a_success() {
    type Pieces = &'static [(u64, &'static [u8])];
    let cases: [(&str, Pieces); 4] = [
        ("missing", &[(0, b"ab")]),
        ("changed", &[(0, b"abX")]),
        ("gap", &[(0, b"a"), (2, b"c")]),
        ("nothing", &[]),
    ];
    let mut mesh = Mesh::new().await;
    for (what, pieces) in cases {
        let (child, exec) = mesh.exec().await;
        for (offset, data) in pieces {
            exec.output(*offset, data).await;
        }
        exec.send(exec_down::Frame::Exit(exit(b"abc"))).await;
        let output = end(child).await;
        assert_eq!(output.status.code(), Some(125), "{what}");
        assert!(String::from_utf8_lossy(&output.stderr).contains("incomplete"), "{what}");
    }
}

#[tokio::test]
async fn failures_of_the_mesh_are_125_and_refusals_126() {
    let mut mesh = Mesh::new().await;
    let accepted = || {
        let task_id = vec![1; 16].into();
        exec_down::Frame::Accepted(v1::ExecAccepted { task_id, ..Default::default() })
    };
    // A start that nobody answered is repeated, by the same key: it is not begun twice.
    let (child, exec) = mesh.exec().await;
    let key = exec.start.idempotency_key.clone();
    exec.fail(Status::unavailable("the hub stops")).await;
    let exec = mesh.hub.exec().await;
    assert!(!key.is_empty());
    assert_eq!(exec.start.idempotency_key, key);
    // The stream ends, or breaks, before the exit of what was accepted.
    exec.send(accepted()).await;
    drop(exec);
    assert_eq!(end(child).await.status.code(), Some(125));
    let (child, exec) = mesh.exec().await;
    exec.send(accepted()).await;
    exec.fail(Status::unavailable("the hub stops")).await;
    assert_eq!(end(child).await.status.code(), Some(125));
    // Verdicts without a run.
    for (verdict, code) in [
        (v1::TaskVerdict::Refused, 126),
        (v1::TaskVerdict::NotFound, 127),
        (v1::TaskVerdict::TimeLimit, 124),
        (v1::TaskVerdict::StreamLost, 125),
    ] {
        let (child, exec) = mesh.exec().await;
        let reason = "because\u{1b}[31m".to_owned();
        let exit = v1::TaskExit { verdict: verdict.into(), reason, ..Default::default() };
        exec.send(exec_down::Frame::Exit(exit)).await;
        let output = end(child).await;
        assert_eq!(output.status.code(), Some(code));
        let text = String::from_utf8(output.stderr).unwrap();
        assert!(text.contains("because [31m") && !text.contains('\u{1b}'), "{text}");
    }
    assert_eq!(end(mesh.spawn(&["nobody", "--", "x"])).await.status.code(), Some(125));
    assert_eq!(end(mesh.spawn(&["forbidden", "--", "x"])).await.status.code(), Some(126));
    assert_eq!(end(mesh.spawn(&["n1"])).await.status.code(), Some(2));
}

#[tokio::test]
async fn credit_comes_back_only_for_what_was_written() {
    let mut mesh = Mesh::new().await;
    let (mut child, mut exec) = mesh.exec().await;
    let window = usize::try_from(exec.start.initial_credit).unwrap();
    // Nobody reads the pipe: it takes 64 KiB, and so much credit may come back at most.
    let piece = vec![b'x'; 64 * 1024];
    for n in 0..window / piece.len() {
        exec.output((n * piece.len()) as u64, &piece).await;
    }
    let mut credit = 0;
    let early = tokio::time::timeout(Duration::from_millis(500), async {
        while let Some(exec_up::Frame::Credit(more)) = exec.next().await {
            credit += more.bytes;
        }
    });
    assert!(early.await.is_err());
    assert!(credit <= 2 * 64 * 1024, "{credit}");
    let mut stdout = child.stdout.take().unwrap();
    let reader = tokio::task::spawn_blocking(move || {
        let mut bytes = Vec::new();
        stdout.read_to_end(&mut bytes).unwrap();
        bytes.len()
    });
    // The rest is not worth a frame of its own.
    while credit < window as u64 * 7 / 8 {
        let Some(exec_up::Frame::Credit(more)) = exec.next().await else { panic!("no credit") };
        credit += more.bytes;
    }
    exec.send(exec_down::Frame::Exit(exit(&vec![b'x'; window]))).await;
    assert_eq!(end(child).await.status.code(), Some(0));
    assert_eq!(reader.await.unwrap(), window);
}

#[tokio::test]
async fn hub_that_sends_more_than_was_granted_is_left() {
    let mut mesh = Mesh::new().await;
    let (child, mut exec) = mesh.exec().await;
    let piece = vec![b'x'; 1024 * 1024];
    let granted = cortex_proto::DEFAULT_OUTPUT_CREDIT / piece.len() as u64;
    for n in 0..granted + 2 {
        let data = v1::Output {
            stream: v1::OutputStream::Stdout.into(),
            offset: n * piece.len() as u64,
            data: piece.clone().into(),
        };
        exec.send(exec_down::Frame::Output(data)).await;
    }
    // Nobody reads the pipe, so the call can only end because of the excess; the process does once somebody
    // has read what came before.
    while exec.next().await.is_some() {}
    let read = tokio::task::spawn_blocking(move || child.wait_with_output());
    let output = within(read).await.unwrap().unwrap();
    assert_eq!(output.status.code(), Some(125), "{}", stderr(&output));
}

#[tokio::test]
async fn interrupt_cancels_and_waits_and_a_second_one_leaves() {
    let mut mesh = Mesh::new().await;
    for kind in [rustix::process::Signal::INT, rustix::process::Signal::TERM] {
        let (child, mut exec) = mesh.exec().await;
        exec.output(0, b"x").await;
        signal(&child, kind);
        let Some(exec_up::Frame::Cancel(cancel)) = exec.next().await else { panic!("no cancel") };
        assert_eq!((cancel.signal, cancel.grace_ms), (15, 2000));
        exec.output(1, b"last words").await;
        let exit = v1::TaskExit {
            verdict: v1::TaskVerdict::Cancelled.into(),
            signal: 15,
            ..exit(b"xlast words")
        };
        exec.send(exec_down::Frame::Exit(exit)).await;
        let output = end(child).await;
        assert_eq!((output.status.code(), output.stdout), (Some(130), b"xlast words".to_vec()));
    }
    let (child, mut exec) = mesh.exec().await;
    exec.output(0, b"x").await;
    signal(&child, rustix::process::Signal::INT);
    assert!(matches!(exec.next().await, Some(exec_up::Frame::Cancel(_))));
    signal(&child, rustix::process::Signal::INT);
    assert_eq!(end(child).await.status.code(), Some(130));
}

#[tokio::test]
async fn reader_that_goes_away_cancels_the_command() {
    let mut mesh = Mesh::new().await;
    let (mut child, mut exec) = mesh.exec().await;
    drop(child.stdout.take());
    exec.output(0, b"x").await;
    loop {
        match exec.next().await {
            Some(exec_up::Frame::Cancel(_)) => break,
            Some(exec_up::Frame::Credit(_)) => {}
            other => panic!("{other:?}"),
        }
    }
    exec.send(exec_down::Frame::Exit(exit(b"x"))).await;
    assert_eq!(end(child).await.status.code(), Some(141));
}

#[tokio::test]
async fn input_is_sent_within_its_window_and_closed() {
    let mut mesh = Mesh::new().await;
    let mut child = mesh.spawn(&["n1", "-i", "--", "cat"]);
    let mut exec = mesh.hub.exec().await;
    assert!(exec.start.spec.as_ref().unwrap().stdin);
    let total = 1024 * 1024;
    let mut stdin = child.stdin.take().unwrap();
    let writer = tokio::task::spawn_blocking(move || stdin.write_all(&vec![b'x'; total]).unwrap());
    let window = usize::try_from(cortex_proto::STDIN_WINDOW_BYTES).unwrap();
    let mut received = 0;
    while received < window {
        let Some(exec_up::Frame::Stdin(input)) = exec.next().await else { panic!("no input") };
        received += input.data.len();
    }
    assert_eq!(received, window);
    let early = tokio::time::timeout(Duration::from_millis(200), exec.up.message()).await;
    assert!(early.is_err());
    exec.send(exec_down::Frame::StdinCredit(v1::Credit { bytes: total as u64 })).await;
    loop {
        let Some(exec_up::Frame::Stdin(input)) = exec.next().await else { panic!("no input") };
        received += input.data.len();
        if input.end {
            break;
        }
    }
    assert_eq!(received, total);
    writer.await.unwrap();
    exec.send(exec_down::Frame::Exit(exit(b""))).await;
    assert_eq!(end(child).await.status.code(), Some(0));
}

#[tokio::test]
async fn json_holds_the_output_and_the_end() {
    let mut mesh = Mesh::new().await;
    let child = mesh.spawn(&["n1", "-s", "x", "-o", "json"]);
    let exec = mesh.hub.exec().await;
    assert_eq!(exec.start.spec.as_ref().unwrap().script, "x");
    exec.output(0, b"hello\n").await;
    exec.send(exec_down::Frame::Exit(v1::TaskExit { exit_code: 3, ..exit(b"hello\n") })).await;
    let output = end(child).await;
    assert_eq!(output.status.code(), Some(3));
    let document: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(document["stdout"], "hello\n");
    assert_eq!(document["verdict"], "exited");
    assert_eq!(document["exit_code"], 3);
    assert_eq!(document["complete"], true);
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

#[tokio::test]
async fn draining_cordons_and_waits_until_nothing_runs_or_the_time_is_up() {
    let mesh = Mesh::new().await;
    let drain = async |running: &[u32], timeout: &str| {
        mesh.hub.set(|script| {
            script.cordoned = false;
            script.running = running.iter().copied().collect();
        });
        let mut command = mesh.agent.command();
        command.args(["node", "drain", "n1", "--timeout", timeout, "-o", "json"]);
        let output = support::run(command).await;
        mesh.hub.set(|script| assert!(script.cordoned));
        output
    };
    let drained = drain(&[2, 1, 0], "15s").await;
    assert!(drained.status.success(), "{}", String::from_utf8_lossy(&drained.stderr));
    let rows: serde_json::Value = serde_json::from_slice(&drained.stdout).unwrap();
    assert_eq!((&rows[0]["running_tasks"], &rows[0]["cordoned"]), (&0.into(), &true.into()));
    let busy = drain(&[2], "10ms").await;
    assert_eq!(busy.status.code(), Some(6));
    let text = String::from_utf8_lossy(&busy.stderr).into_owned();
    assert!(text.contains("still runs 2 commands") && text.contains("node uncordon n1"), "{text}");
}

#[tokio::test]
async fn draining_goes_on_where_the_hub_starts_anew() {
    let mesh = Mesh::new().await;
    mesh.hub.set(|script| {
        script.running = [2, 0].into_iter().collect();
        script.failing_looks = 2;
    });
    let drained = mesh.run(&["node", "drain", "n1", "--timeout", "15s"]).await;
    assert!(drained.status.success(), "{}", stderr(&drained));
    assert!(stderr(&drained).contains("connected to the hub again"), "{}", stderr(&drained));
}

#[tokio::test]
async fn waiting_for_a_node_goes_on_where_the_hub_starts_anew() {
    use support::Presence::{Behind, Offline};
    let mesh = Mesh::new().await;
    let wait = async |state: &str, timeout: &str, watched: &[&[support::Presence]]| {
        mesh.hub.set(|script| script.watched = watched.iter().map(|one| one.to_vec()).collect());
        mesh.run(&["node", "wait", "n1", "--for", state, "--timeout", timeout]).await
    };
    let online = wait("online", "60s", &[&[Offline], &[Offline], &[Offline, Behind]]).await;
    assert!(online.status.success(), "{}", stderr(&online));
    let offline = wait("offline", "60s", &[&[Behind, Offline]]).await;
    assert!(offline.status.success(), "{}", stderr(&offline));
    // A hub that has started anew has no sessions: that does not mean that a node is away.
    let back = wait("offline", "3s", &[&[Behind], &[Offline, Behind]]).await;
    assert_eq!(back.status.code(), Some(6), "{}", stderr(&back));
    assert!(stderr(&back).contains("n1 was not offline within 3s\nhint: "), "{}", stderr(&back));
    // Nor is a refusal waited for.
    let refused = wait("online", "60s", &[]).await;
    assert_eq!(refused.status.code(), Some(3), "{}", stderr(&refused));
}

#[tokio::test]
async fn a_workspace_is_followed_until_it_is_equal_also_where_the_hub_starts_anew() {
    use support::Presence::{Behind, Equal, Offline};
    let mesh = Mesh::new().await;
    let watch = async |watched: &[&[support::Presence]]| {
        mesh.hub.set(|script| script.watched = watched.iter().map(|one| one.to_vec()).collect());
        // A node that is named by its state is spoken for by itself.
        let mut command = mesh.agent.command();
        command.env_remove("CORTEX_STATE");
        command.args(["workspace", "status", "w", "--watch", "-o", "jsonl"]);
        support::run(command).await
    };
    let steps = |output: &Output| String::from_utf8_lossy(&output.stdout).lines().count();
    // Nobody is online at a hub that has just started, and nothing is equal.
    for broken in [&[Behind][..], &[]] {
        let equal = watch(&[broken, &[Offline, Behind, Equal]]).await;
        assert!(equal.status.success(), "{}", stderr(&equal));
        assert_eq!(steps(&equal), broken.len() + 3, "{}", stderr(&equal));
    }
    // Those that were offline before are not waited for.
    let alone = watch(&[&[Offline]]).await;
    assert_eq!((alone.status.code(), steps(&alone)), (Some(0), 1), "{}", stderr(&alone));
}

#[tokio::test]
async fn following_a_workspace_is_not_taken_for_one_look_at_a_node() {
    let agent = Agent::unjoined();
    let mut command = agent.command();
    command.args(["workspace", "status", "w", "--watch"]);
    let output = support::run(command).await;
    assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
    assert!(stderr(&output).contains("workspace flush w;"), "{}", stderr(&output));
}

#[tokio::test]
async fn nothing_is_revoked_or_forgotten_unasked() {
    let mesh = Mesh::new().await;
    for verb in ["revoke", "forget"] {
        // Standard input is no terminal.
        let output = mesh.run(&["node", verb, "n1"]).await;
        assert_eq!(output.status.code(), Some(2), "{}", stderr(&output));
        let again = format!("hint: cortex-agent node {verb} n1 --yes");
        assert!(stderr(&output).contains(&again), "{}", stderr(&output));
        // This hub knows no such thing, but is asked.
        let asked = mesh.run(&["node", verb, "n1", "--yes"]).await;
        assert!(stderr(&asked).contains("not in this hub"), "{}", stderr(&asked));
    }
}

#[tokio::test]
async fn strict_policy_with_an_end_is_wrong_use() {
    let agent = Agent::unjoined();
    let mut command = agent.command();
    command.args(["policy", "set", "n1", "strict", "--for", "1h"]);
    let output = support::run(command).await;
    assert_eq!(output.status.code(), Some(2));
    assert!(
        String::from_utf8_lossy(&output.stderr)
            .contains("--for goes with permissive or --net full only")
    );
}
