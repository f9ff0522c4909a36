//! Commands that eat everything they can, and very many of them: machine and agent stay well.
//!
//! What would hurt outside looks first whether it is inside.

use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use cortex_agent::exec::{CommandRequest, CommandVerdict, RequestedLimits};
use cortex_shared::policy::Mode;
use tempfile::TempDir;

use crate::support::{apart, in_workspace, launcher, processes_named, run, script, token};

const WAVES: usize = 20;
const IN_A_WAVE: usize = 25;
/// Ends a script that is not in a sandbox.
const ONLY_INSIDE: &str = "test $$ = 2 && test ! -e /root && test ! -e /sys || exit 99;";

#[tokio::test]
async fn a_fork_bomb_is_contained_and_leaves_nothing() {
    let token = token("bomb");
    let text = format!(
        "{ONLY_INSIDE} bomb() {{ bomb | bomb & }}; (exec -a {token} sleep 300) & bomb; sleep 300"
    );
    let request = CommandRequest {
        limits: RequestedLimits { processes: Some(100), ..RequestedLimits::default() },
        time_limit: Some(Duration::from_secs(2)),
        ..script(&text)
    };
    let bomb = tokio::spawn(run(request));
    // Meanwhile another command runs as if nothing were.
    let begun = Instant::now();
    let ran = run(script("echo well")).await;
    assert!(ran.succeeded() && begun.elapsed() < Duration::from_secs(30), "{ran:?}");
    let ran = bomb.await.unwrap();
    assert_eq!(ran.exit.exit_code, 124, "{:?}", ran.exit);
    assert_eq!(processes_named(&token), [] as [i32; 0]);
}

#[tokio::test]
async fn deleting_everything_deletes_the_workspace_only() {
    let host = TempDir::new().unwrap();
    std::fs::set_permissions(host.path(), PermissionsExt::from_mode(0o777)).unwrap();
    std::fs::write(host.path().join("kept"), "x").unwrap();
    let workspace = TempDir::new().unwrap();
    std::fs::create_dir_all(workspace.path().join("a/b")).unwrap();
    let text = format!("{ONLY_INSIDE} rm -rf --no-preserve-root / 2>/dev/null; echo still here");
    let ran = run(in_workspace(&text, workspace.path())).await;
    assert_eq!(ran.stdout, "still here\n", "{ran:?}");
    assert!(host.path().join("kept").exists() && std::path::Path::new("/usr/bin/env").exists());
    assert_eq!(std::fs::read_dir(workspace.path()).unwrap().count(), 0, "rm did nothing");
    assert!(run(script("true")).await.succeeded());
}

#[tokio::test]
async fn a_memory_hog_is_ended_alone() {
    for text in [
        "perl -e 'my @x; push @x, \"y\" x (1 << 20) while 1'",
        // Private files are memory too.
        "cat /dev/zero > /tmp/zero; exit 3",
    ] {
        let memory_bytes = Some(256 << 20);
        let limits = RequestedLimits { memory_bytes, ..RequestedLimits::default() };
        let text = format!("{ONLY_INSIDE} {text}");
        let hog = tokio::spawn(run(CommandRequest { limits, ..script(&text) }));
        let neighbour = run(script("echo well")).await;
        assert!(neighbour.succeeded(), "{neighbour:?}");
        let ran = hog.await.unwrap();
        let ended = [CommandVerdict::Exited, CommandVerdict::Signalled];
        assert!(!ran.succeeded() && ended.contains(&ran.exit.verdict), "{ran:?}");
        assert_ne!(ran.exit.exit_code, 99, "not in a sandbox");
    }
}

#[tokio::test]
async fn five_hundred_commands_leave_nothing_behind() {
    let (succeeded, text) = apart(&[], "abuse::apart_waves", &[]).await;
    assert!(succeeded, "{text}");
}

/// What this process holds that could leak.
#[derive(Debug, PartialEq, Eq)]
struct Held {
    descriptors: Vec<String>,
    mounts: String,
    children: String,
    groups: usize,
}

impl Held {
    fn now() -> Self {
        let mut descriptors: Vec<String> = std::fs::read_dir("/proc/self/fd")
            .unwrap()
            .flatten()
            .filter_map(|entry| std::fs::read_link(entry.path()).ok())
            // Which number a pipe has is of no interest.
            .map(|path| path.to_string_lossy().split(':').next().unwrap().to_owned())
            .collect();
        descriptors.sort();
        // Zombies are listed too.
        let children = std::fs::read_dir("/proc/self/task")
            .unwrap()
            .flatten()
            .filter_map(|thread| std::fs::read_to_string(thread.path().join("children")).ok())
            .collect();
        let prefix = format!("cortex-command-{}-", std::process::id());
        let groups = walkdir::WalkDir::new("/sys/fs/cgroup")
            .max_depth(6)
            .into_iter()
            .flatten()
            .filter(|entry| entry.file_name().to_string_lossy().starts_with(&prefix))
            .count();
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        Self { descriptors, mounts, children, groups }
    }
}

#[tokio::test]
#[ignore = "run by the test above, in a process that does nothing else"]
async fn apart_waves() {
    let token = token("wave");
    let workspace = TempDir::new().unwrap();
    launcher();
    // The first in a workspace may make a user namespace that is kept.
    assert!(run(in_workspace("true", workspace.path())).await.succeeded());
    let before = Held::now();
    assert_eq!((before.children.as_str(), before.groups), ("", 0));
    for wave in 0..WAVES {
        let text = |number: usize| {
            format!(
                "(setsid bash -c 'exec -a {token} sleep 300' &); (exec -a {token} sleep 300) & \
                 echo {number}; exit {number}"
            )
        };
        let batch: Vec<_> = (0..IN_A_WAVE)
            .map(|number| {
                let mode = if number % 5 == 4 { Mode::Permissive } else { Mode::Strict };
                // Some in a control group of their own, where there are any.
                let processes = (number % 5 == 3 && wave % 4 == 0).then_some(64);
                let limits = RequestedLimits { processes, ..RequestedLimits::default() };
                let request = in_workspace(&text(number), workspace.path());
                tokio::spawn(run(CommandRequest { mode, limits, ..request }))
            })
            .collect();
        for (number, ran) in batch.into_iter().enumerate() {
            let ran = ran.await.unwrap();
            assert_eq!(ran.stdout, format!("{number}\n"), "{ran:?}");
            assert_eq!(usize::from(ran.exit.exit_code), number);
        }
    }
    assert_eq!(processes_named(&token), [] as [i32; 0], "processes are left");
    assert_eq!(Held::now(), before);
    assert_eq!(std::fs::read_dir(workspace.path()).unwrap().count(), 0);
}
