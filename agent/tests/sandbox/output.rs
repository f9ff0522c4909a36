//! Output and arguments arrive unchanged, and no faster than the reader permits.

use std::time::Duration;

use cortex_agent::exec::{CancelCause, CommandControl, CommandRequest, CommandVerdict};
use cortex_shared::policy::Mode;
use tempfile::TempDir;

use crate::support::{PLENTY, Running, in_workspace, program, run, script, view};

#[tokio::test]
async fn arguments_environment_and_directory_arrive_unchanged() {
    let workspace = TempDir::new().unwrap();
    std::fs::create_dir(workspace.path().join("sub dir")).unwrap();
    let print = "printf '%s|' \"$@\" \"$PWD\" \"$ODD\" \"$PATH\"";
    let request = CommandRequest {
        workspace: view(workspace.path(), "sub dir"),
        env: vec![
            (b"ODD".to_vec(), b"a b\n\xff".to_vec()),
            (b"PATH".to_vec(), b"/usr/bin:/bin".to_vec()),
        ],
        ..program(&["bash", "-c", print, "x", "", "a  b", "*"])
    };
    let mut running = Running::start(request, PLENTY);
    while running.next().await.is_some() {}
    assert_eq!(running.stdout, b"|a  b|*|/workspace/sub dir|a b\n\xff|/usr/bin:/bin|");
}

#[tokio::test]
async fn a_script_of_any_permitted_length_runs() {
    for bytes in [100_000, 130_000, 300_000, 4_000_000] {
        let text = format!("X='{}'\necho ${{#X}}", "y".repeat(bytes));
        let ran = run(script(&text)).await;
        assert_eq!(ran.stdout, format!("{bytes}\n"), "{:?} {}", ran.exit, ran.stderr);
    }
}

#[tokio::test]
async fn a_script_is_never_read_as_options() {
    let text = |begin: &str| format!("{begin} 2>&1\necho \"$0 $#\"");
    for begin in ["-v", "+e", "--", "-"] {
        for mode in [Mode::Strict, Mode::Permissive] {
            let ran = run(CommandRequest { mode, ..script(&text(begin)) }).await;
            let said = format!("{begin}: command not found\nbash 0\n");
            assert!(ran.stdout.ends_with(&said), "{mode} {begin}: {:?} {}", ran.exit, ran.stderr);
        }
    }
}

#[tokio::test]
async fn a_flood_of_output_arrives_whole() {
    let bytes = 64 << 20;
    let ran = run(script(&format!("head -c {bytes} /dev/zero; seq 1 100000 >&2"))).await;
    assert!(ran.succeeded());
    assert_eq!(ran.exit.stdout_bytes, bytes);
    assert!(ran.stderr.ends_with("\n100000\n"));
}

#[tokio::test]
async fn without_credit_the_command_waits() {
    let workspace = TempDir::new().unwrap();
    let marker = workspace.path().join("marker");
    // More than any pipe holds.
    let total: u64 = 4 << 20;
    let text = format!("head -c {total} /dev/zero; touch marker");
    let mut running = Running::start(in_workspace(&text, workspace.path()), 100_000);
    while running.stdout.len() < 100_000 {
        running.next().await.unwrap();
    }
    assert_eq!(running.stdout.len(), 100_000, "more was sent than there was credit for");
    let more = tokio::time::timeout(Duration::from_millis(300), running.events.recv()).await;
    assert!(more.is_err(), "{more:?} was sent without credit");
    assert!(!marker.exists(), "the command did not wait for its reader");
    running.order(CommandControl::Credit(total)).await;
    let ran = running.finish().await;
    assert!(ran.succeeded() && marker.exists());
    assert_eq!(ran.exit.stdout_bytes, total);
}

#[tokio::test]
async fn a_command_that_waits_for_credit_can_be_ended() {
    let mut running = Running::start(script("yes"), 0);
    running.until_started().await;
    let cancel = || CommandControl::Cancel {
        signal: 0,
        grace: Duration::from_secs(30),
        cause: CancelCause::Requested,
    };
    running.order(cancel()).await;
    // What it wrote before may still wait for credit; a cancel after the end of its processes says
    // that nobody wants it. It may be over before that is said.
    while running.control.send(cancel()).await.is_ok() {
        tokio::task::yield_now().await;
    }
    assert_eq!(running.finish().await.exit.verdict, CommandVerdict::Cancelled);

    let text = "head -c 200000 /dev/zero; exec sleep 300";
    let request = CommandRequest { time_limit: Some(Duration::from_secs(1)), ..script(text) };
    let mut running = Running::start(request, 10);
    while running.stdout.len() < 10 {
        running.next().await.unwrap();
    }
    // It cannot be over before the rest of its output was sent.
    running.order(CommandControl::Credit(1 << 20)).await;
    assert_eq!(running.finish().await.exit.verdict, CommandVerdict::TimeLimit);
}

#[tokio::test]
async fn small_writes_become_few_frames() {
    let text = "for i in $(seq 1 2000); do echo $i; done";
    let mut running = Running::start(script(text), PLENTY);
    let mut frames = 0;
    while let Some(event) = running.next().await {
        frames += usize::from(matches!(event, cortex_agent::exec::CommandEvent::Output { .. }));
    }
    assert!(running.stdout.ends_with(b"\n2000\n"));
    assert!(frames < 500, "{frames} frames for 2000 lines");
}
