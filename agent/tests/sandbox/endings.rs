//! How commands end, and that nothing of them is left.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::time::{Duration, Instant};

use cortex_agent::exec::{CancelCause, CommandControl, CommandRequest, CommandVerdict};
use cortex_shared::policy::Mode;
use tempfile::TempDir;
use tokio::sync::mpsc;

use crate::support::{
    PATIENCE, PLENTY, Running, holds, in_workspace, launcher, processes_named, program, run,
    script, succeeds_outside, token,
};

const BOTH: [Mode; 2] = [Mode::Strict, Mode::Permissive];

#[tokio::test]
async fn exit_codes_are_those_of_the_command() {
    use CommandVerdict::{Exited, NotFound, Signalled};
    for (request, verdict, code) in [
        (script("exit 0"), Exited, 0),
        (script("exit 7"), Exited, 7),
        (script("exit 255"), Exited, 255),
        (script("kill -9 $$"), Signalled, 137),
        (script("kill -TERM $$"), Signalled, 143),
        (program(&["sh", "-c", "exit 4"]), Exited, 4),
        (program(&["no-such-program"]), NotFound, 127),
        (program(&["/etc/passwd"]), NotFound, 127),
        (program(&["/"]), NotFound, 127),
        (script("no-such-program"), Exited, 127),
    ] {
        for mode in BOTH {
            let ran = run(CommandRequest { mode, ..request.clone() }).await;
            assert_eq!((ran.exit.verdict, ran.exit.exit_code), (verdict, code), "{mode} {ran:?}");
        }
    }
}

#[tokio::test]
async fn the_time_limit_ends_everything() {
    for mode in BOTH {
        let token = token(&format!("limit-{mode}"));
        let text = format!(
            "trap '' TERM; (setsid bash -c 'exec -a {token} sleep 300') & \
             (exec -a {token} sleep 300) & echo up; wait"
        );
        // Long enough for a busy machine to get as far as the output.
        let time_limit = Some(Duration::from_secs(2));
        let ran = run(CommandRequest { mode, time_limit, ..script(&text) }).await;
        assert_eq!(ran.exit.verdict, CommandVerdict::TimeLimit, "{ran:?}");
        assert_eq!((ran.exit.exit_code, ran.stdout.as_str()), (124, "up\n"));
        assert_eq!(processes_named(&token), [] as [i32; 0]);
    }
}

#[tokio::test]
async fn cancelling_is_polite_first_and_final_after_the_grace() {
    let polite = "trap 'echo bye; exit 3' TERM; echo up; while :; do sleep 0.05; done";
    let deaf = "trap '' TERM; echo up; while :; do sleep 0.05; done";
    let short = Duration::from_millis(100);
    for (text, grace, output, code) in
        [(polite, PATIENCE, "up\nbye\n", 3), (deaf, short, "up\n", 137)]
    {
        for mode in BOTH {
            let mut running = Running::start(CommandRequest { mode, ..script(text) }, PLENTY);
            running.until_output("up").await;
            running
                .order(CommandControl::Cancel { signal: 0, grace, cause: CancelCause::Requested })
                .await;
            let ran = running.finish().await;
            assert_eq!(ran.exit.verdict, CommandVerdict::Cancelled, "{ran:?}");
            assert_eq!((ran.stdout.as_str(), ran.exit.exit_code), (output, code), "{mode}");
        }
    }
}

#[tokio::test]
async fn signals_reach_the_command() {
    let text = "trap 'echo hup' HUP; echo up; while :; do sleep 0.05; done";
    for mode in BOTH {
        let mut running = Running::start(CommandRequest { mode, ..script(text) }, PLENTY);
        running.until_output("up").await;
        running.order(CommandControl::Signal(libc::SIGHUP)).await;
        running.until_output("hup").await;
        running.order(CommandControl::Signal(libc::SIGKILL)).await;
        let ran = running.finish().await;
        assert_eq!((ran.exit.verdict, ran.exit.signal), (CommandVerdict::Signalled, Some(9)));
    }
}

#[tokio::test]
async fn nothing_outlives_the_command_nor_delays_its_end() {
    for mode in BOTH {
        let token = token(&format!("left-{mode}"));
        let text = format!(
            "(exec -a {token} sleep 300) & (setsid bash -c 'exec -a {token} sleep 300' &)
             nohup bash -c 'exec -a {token} sleep 300' & echo done"
        );
        let begun = Instant::now();
        let ran = run(CommandRequest { mode, ..script(&text) }).await;
        assert!(ran.succeeded(), "{ran:?}");
        assert_eq!(ran.stdout, "done\n");
        assert!(begun.elapsed() < Duration::from_secs(30), "it waited for what was left behind");
        assert_eq!(processes_named(&token), [] as [i32; 0]);
    }
}

#[tokio::test]
async fn a_pipe_held_by_a_process_outside_does_not_delay_the_end() {
    if !succeeds_outside("test -x /usr/bin/python3", Path::new("/")) {
        eprintln!("skipped: no python3 in /usr/bin");
        return;
    }
    let workspace = TempDir::new().unwrap();
    let path = workspace.path().join("holder");
    let listener = std::os::unix::net::UnixListener::bind(&path).unwrap();
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o777)).unwrap();
    // The thread ends with the test process if nobody connects.
    let (kept, keeper) = std::sync::mpsc::channel();
    std::thread::spawn(move || kept.send(receive_descriptors(&listener)));
    let text = "/usr/bin/python3 -c 'import socket,array
s=socket.socket(socket.AF_UNIX); s.connect(\"holder\")
s.sendmsg([b\"x\"],[(socket.SOL_SOCKET,socket.SCM_RIGHTS,array.array(\"i\",[1]))])
print(\"sent\")'";
    let ran = run(in_workspace(text, workspace.path())).await;
    if !ran.succeeded() {
        eprintln!("skipped: sockets in the workspace are out of reach: {}", ran.stderr);
        return;
    }
    assert_eq!(ran.stdout, "sent\n");
    assert_eq!(keeper.recv_timeout(PATIENCE).unwrap().len(), 1, "nothing held the pipe");
}

fn receive_descriptors(listener: &std::os::unix::net::UnixListener) -> Vec<std::os::fd::OwnedFd> {
    use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags};
    let (stream, _) = listener.accept().unwrap();
    let mut space = [std::mem::MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    let mut slices = [std::io::IoSliceMut::new(&mut byte)];
    rustix::net::recvmsg(&stream, &mut slices, &mut control, RecvFlags::empty()).unwrap();
    control
        .drain()
        .filter_map(|message| match message {
            RecvAncillaryMessage::ScmRights(fds) => Some(fds),
            _ => None,
        })
        .flatten()
        .collect()
}

#[tokio::test]
async fn closing_the_control_channel_ends_the_command() {
    let token = token("closed");
    let text = format!("echo up; exec -a {token} sleep 300");
    let mut running = Running::start(script(&text), PLENTY);
    running.until_output("up").await;
    let (unused, _orders) = mpsc::channel(1);
    drop(std::mem::replace(&mut running.control, unused));
    assert_eq!(running.finish().await.exit.verdict, CommandVerdict::Failed);
    assert_eq!(processes_named(&token), [] as [i32; 0]);
}

#[tokio::test]
async fn a_command_that_nobody_listens_to_is_ended() {
    let token = token("unheard");
    let text = format!("echo up; while :; do echo more; done & exec -a {token} sleep 300");
    let mut running = Running::start(script(&text), PLENTY);
    running.until_output("up").await;
    drop(running.events);
    assert!(holds(|| processes_named(&token).is_empty()).await);
}

#[tokio::test]
async fn the_death_of_the_agent_ends_its_commands() {
    for mode in BOTH {
        let token = token(&format!("orphan-{mode}"));
        let mut agent = std::process::Command::new(std::env::current_exe().unwrap())
            .args(["--exact", "endings::apart_agent", "--ignored", "--nocapture"])
            .env("CORTEX_TEST_TOKEN", &token)
            .env("CORTEX_TEST_MODE", mode.to_string())
            .stdout(std::process::Stdio::null())
            .spawn()
            .unwrap();
        let began = holds(|| processes_named(&token).len() == 2).await;
        agent.kill().unwrap();
        agent.wait().unwrap();
        assert!(began, "the {mode} command did not start");
        let ended = holds(|| processes_named(&token).is_empty()).await;
        assert!(ended, "a {mode} command outlived its agent");
    }
}

#[tokio::test]
#[ignore = "run by the test above, which kills it"]
async fn apart_agent() {
    let token = std::env::var("CORTEX_TEST_TOKEN").unwrap();
    let mode = std::env::var("CORTEX_TEST_MODE").unwrap().parse().unwrap();
    let text = format!("(setsid bash -c 'exec -a {token} sleep 300' &); exec -a {token} sleep 300");
    run(CommandRequest { mode, ..script(&text) }).await;
}

#[tokio::test]
async fn the_death_of_the_monitor_ends_the_command() {
    let token = token("monitor");
    let text = format!(
        "echo up; (setsid bash -c 'exec -a {token} sleep 300' &); exec -a {token} sleep 300"
    );
    let mut running = Running::start(script(&text), PLENTY);
    let process_id = running.until_started().await;
    running.until_output("up").await;
    let pid = rustix::process::Pid::from_raw(process_id.try_into().unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
    let ran = running.finish().await;
    assert_eq!((ran.exit.verdict, ran.exit.exit_code), (CommandVerdict::Failed, 125), "{ran:?}");
    assert!(holds(|| processes_named(&token).is_empty()).await);
}

#[tokio::test]
async fn a_permissive_command_that_ends_its_own_parent_leaves_nothing_in_its_control_group() {
    if launcher().control_groups() == "none" {
        eprintln!("skipped: no control groups for this user, and nothing else finds what is left");
        return;
    }
    let token = token("orphan");
    let text = format!(
        "(setsid setsid bash -c 'exec -a {token} sleep 5555' &); \
         until pgrep -f '^{token}' > /dev/null; do sleep 0.01; done; kill -9 $PPID; sleep 30"
    );
    let request = CommandRequest { mode: Mode::Permissive, ..script(&text) };
    let ran = run(request).await;
    assert_eq!(ran.exit.verdict, CommandVerdict::Failed, "{ran:?}");
    assert!(ran.exit.hint.unwrap().contains("its own parent"));
    assert_eq!(processes_named(&token), [] as [i32; 0]);
}
