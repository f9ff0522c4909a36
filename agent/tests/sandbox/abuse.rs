//! Commands that eat everything they can, and very many of them: machine and agent stay well.
//!
//! What would hurt outside looks first whether it is inside.

use std::os::unix::fs::PermissionsExt;
use std::time::{Duration, Instant};

use cortex_agent::exec::{CommandControl, CommandRequest, CommandVerdict, RequestedLimits};
use cortex_shared::policy::Mode;
use tempfile::TempDir;

use crate::support::{
    PLENTY, Running, apart, holds, in_workspace, launcher, processes_named, run, script,
    succeeds_outside, token,
};

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
        // Private files are memory too: of limited size, or of the command's memory.
        "cat /dev/zero > /tmp/zero; test $(stat -c %s /tmp/zero) -lt 600000000 && exit 3; exit 99",
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
    children: usize,
    groups: usize,
}

impl Held {
    fn now() -> Self {
        let mut descriptors: Vec<String> = std::fs::read_dir("/proc/self/fd")
            .unwrap()
            .flatten()
            .filter_map(|entry| std::fs::read_link(entry.path()).ok())
            // Which number a pipe or a group has is of no interest.
            .map(|path| path.to_string_lossy().split(':').next().unwrap().to_owned())
            .map(|path| path.split("cortex-command").next().unwrap().to_owned())
            .collect();
        descriptors.sort();
        // Zombies are listed too.
        let children = std::fs::read_dir("/proc/self/task")
            .unwrap()
            .flatten()
            .filter_map(|thread| std::fs::read_to_string(thread.path().join("children")).ok())
            .map(|list| list.split_whitespace().count())
            .sum();
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
    // The first in a workspace may make a user namespace that is kept, and after each, a sandbox is
    // made for the next.
    assert!(run(in_workspace("true", workspace.path())).await.succeeded());
    let settled = || holds(|| Held::now().children == 1);
    assert!(settled().await, "no sandbox was made for the next command");
    let before = Held::now();
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
    assert!(settled().await, "{:?}", Held::now());
    assert_eq!(Held::now(), before);
    launcher().close().await;
    let after = Held::now();
    assert_eq!((after.children, after.groups), (0, 0));
    assert_eq!(std::fs::read_dir(workspace.path()).unwrap().count(), 0);
}

/// Descriptors under way and watches are counted by the kernel for the user, who is the agent's where
/// that is not root.
#[tokio::test]
async fn a_command_takes_only_part_of_what_the_kernel_counts_for_a_user() {
    if !succeeds_outside("perl -e 1 && test -x /usr/bin/python3", std::path::Path::new("/")) {
        eprintln!("skipped: no perl and python3 here");
        return;
    }
    let limit = |name: &str| -> Option<u64> {
        std::fs::read_to_string(format!("/proc/sys/user/{name}")).ok()?.trim().parse().ok()
    };
    let Some(instances) = limit("max_inotify_instances").filter(|count| *count >= 64) else {
        eprintln!("skipped: the kernel does not count watchers, or allows next to none");
        return;
    };
    // No more than shows whether there is an end: others use this machine as well.
    let (tries, number) = (instances / 4, libc::SYS_inotify_init1);
    let text = format!(
        "perl -e 'my $n = 0; $n++ while $n < {tries} && syscall({number}, 0) >= 0; print \"$n\\n\"'; \
         cat /proc/sys/user/max_inotify_watches"
    );
    let ran = run(script(&text)).await;
    let told: Vec<u64> = ran.stdout.lines().map(|line| line.parse().unwrap()).collect();
    assert!(told[0] >= 1 && told[0] < tries, "{ran:?}");
    assert!(told[1] <= limit("max_inotify_watches").unwrap() / 4, "{ran:?}");

    let flood = "import array,os,socket,sys,time
a,b=socket.socketpair(socket.AF_UNIX,socket.SOCK_STREAM)
a.setblocking(False)
fds=array.array('i',[os.open('/dev/null',0) for _ in range(250)])
try:
  keep=[]
  for n in range(40):
    s,t=socket.socketpair(socket.AF_UNIX,socket.SOCK_DGRAM); keep.append((s,t))
    s.sendmsg([b'x'],[(socket.SOL_SOCKET,socket.SCM_RIGHTS,fds)])
except OSError as error: print(error.errno,flush=True)
time.sleep(300)";
    let workspace = TempDir::new().unwrap();
    std::fs::write(workspace.path().join("flood.py"), flood).unwrap();
    let mut flooded =
        Running::start(in_workspace("exec /usr/bin/python3 flood.py", workspace.path()), PLENTY);
    flooded.until_output(&format!("{}\n", libc::ETOOMANYREFS)).await;
    // The agent hands descriptors over for each command. A second one, for the first may have been
    // made beforehand.
    for _ in 0..2 {
        let ran = run(script("true")).await;
        assert!(ran.succeeded(), "{ran:?}");
    }
    flooded.order(CommandControl::Signal(libc::SIGKILL)).await;
    flooded.finish().await;
}
