//! What a command may not do, and what it must be able to do.

use std::os::unix::fs::{MetadataExt as _, PermissionsExt};
use std::path::Path;

use cortex_agent::exec::{CommandRequest, CommandVerdict, RequestedLimits};
use cortex_agent::sandbox::Network;
use tempfile::TempDir;

use crate::support::{in_workspace, launcher, run, script, succeeds_outside, token};

/// A process outside that must survive; ended by its id when dropped.
struct Victim(std::process::Child);

impl Drop for Victim {
    fn drop(&mut self) {
        self.0.kill().ok();
        self.0.wait().ok();
    }
}

#[tokio::test]
async fn what_succeeds_outside_is_denied_inside() {
    let host = TempDir::new().unwrap();
    std::fs::set_permissions(host.path(), PermissionsExt::from_mode(0o777)).unwrap();
    let workspace = TempDir::new().unwrap();
    let secret = host.path().join("secret");
    std::fs::write(&secret, "CANARY").unwrap();
    let victim = Victim(std::process::Command::new("sleep").arg("300").spawn().unwrap());
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let socket = host.path().join("socket");
    let _unix = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let abstract_name = token("abstract");
    let _abstract = {
        use std::os::linux::net::SocketAddrExt as _;
        let address = std::os::unix::net::SocketAddr::from_abstract_name(&abstract_name).unwrap();
        std::os::unix::net::UnixListener::bind_addr(&address).unwrap()
    };
    let (outside, secret, pid) = (host.path().display(), secret.display(), victim.0.id());
    let connect = |address: &str| {
        format!(
            "perl -MSocket -e 'socket(my $s, AF_UNIX, SOCK_STREAM, 0) or die; \
             connect($s, pack_sockaddr_un(\"{address}\")) or die \"$!\\n\"'"
        )
    };
    let trace = "perl -e '$p = fork; if (!$p) { sleep 9; exit } $r = syscall(101, 16, $p, 0, 0); \
                 kill 9, $p; exit($r == 0 ? 0 : 1)'";
    let cases = [
        ("read a file", format!("grep -q CANARY {secret}")),
        ("read through a link", format!("ln -sf {secret} l && grep -q CANARY l")),
        ("write a file", format!("echo x > {outside}/written")),
        ("write through a link", format!("ln -sfn {outside} d && echo x > d/linked")),
        ("take a file by a hard link", format!("ln {secret} hard && grep -q CANARY hard")),
        ("see a process", format!("grep -aq sleep /proc/{pid}/cmdline")),
        ("signal a process", format!("kill -0 {pid} && grep -aq sleep /proc/{pid}/cmdline")),
        ("reach the loopback", format!("exec 7<>/dev/tcp/127.0.0.1/{port}")),
        ("reach a socket", connect(&socket.display().to_string())),
        ("reach an abstract socket", connect(&format!("\\0{abstract_name}"))),
        ("see the agent's environment", "test -n \"$CORTEX_TEST_CANARY\"".to_owned()),
        ("make a set-user-id program", "cp /bin/true t && chmod u+s t".to_owned()),
        ("create a user namespace", "unshare -U true".to_owned()),
        ("trace a process", trace.to_owned()),
    ];
    for (act, text) in cases {
        let possible = succeeds_outside(&text, workspace.path());
        for name in ["l", "d", "hard", "t"] {
            std::fs::remove_file(workspace.path().join(name)).ok();
        }
        for name in ["written", "linked"] {
            std::fs::remove_file(host.path().join(name)).ok();
        }
        if !possible {
            eprintln!("skipped: {act}: not possible outside either on this machine");
            continue;
        }
        let inside = run(in_workspace(&text, workspace.path())).await;
        assert_eq!(inside.exit.verdict, CommandVerdict::Exited, "{act}: {inside:?}");
        assert!(!inside.succeeded(), "{act} succeeded inside");
    }
    assert_eq!(std::fs::read_dir(host.path()).unwrap().count(), 2, "something was written outside");
    let set_id = std::fs::read_dir(workspace.path())
        .unwrap()
        .flatten()
        .any(|entry| entry.metadata().is_ok_and(|meta| meta.mode() & 0o6000 != 0));
    assert!(!set_id, "a set-user-id file was left in the workspace");
}

#[tokio::test]
async fn the_kernel_confirms_what_the_command_lacks() {
    let text = "cat /proc/self/status; readlink /proc/self/ns/*; cat /proc/self/uid_map";
    let ran = run(script(text)).await;
    assert!(ran.succeeded(), "{ran:?}");
    for fact in [
        "CapInh:\t0000000000000000",
        "CapPrm:\t0000000000000000",
        "CapEff:\t0000000000000000",
        "CapBnd:\t0000000000000000",
        "CapAmb:\t0000000000000000",
        "NoNewPrivs:\t1",
        "Seccomp:\t2",
    ] {
        assert!(ran.stdout.contains(fact), "{fact:?} is missing in {}", ran.stdout);
    }
    for kind in ["user", "mnt", "pid", "net", "ipc", "uts", "cgroup"] {
        let outer = std::fs::read_link(format!("/proc/self/ns/{kind}")).unwrap();
        assert!(ran.stdout.contains(&format!("{kind}:[")));
        assert!(!ran.stdout.contains(outer.to_str().unwrap()), "the {kind} namespace is shared");
    }
    let map = ran.stdout.lines().last().unwrap();
    assert!(map.split_whitespace().all(|number| number != "0"), "user 0 is mapped: {map}");
}

#[tokio::test]
async fn programs_find_what_they_expect() {
    let workspace = TempDir::new().unwrap();
    let text = "set -e; echo x > a; mkdir d e; mv a d/a; mv d/a e/a; ln e/a d/b; ln -s e l
        echo x > /tmp/t; echo x > ~/t; echo x > /dev/shm/t; echo x > /dev/null
        test \"$(cat <(echo y))\" = y; echo z > /dev/stdout; echo w > /dev/stderr
        test \"$(whoami)\" = cortex; test \"$PWD\" = /workspace; test -w .
        head -c 4 /dev/urandom > r; chmod 755 e/a; test ! -e /root; test ! -e /sys
        touch -d yesterday e/a; mkfifo f; tar cf t.tar d";
    let ran = run(in_workspace(text, workspace.path())).await;
    assert!(ran.succeeded(), "{ran:?}");
    assert_eq!((ran.stdout.as_str(), ran.stderr.as_str()), ("z\n", "w\n"));
    let root = workspace.path().metadata().unwrap();
    let file = workspace.path().join("e/a").metadata().unwrap();
    assert_eq!((file.uid(), file.gid()), (root.uid(), root.gid()), "it belongs to somebody else");
}

#[tokio::test]
async fn the_owner_of_the_workspace_owns_what_commands_create() {
    if rustix::process::geteuid().as_raw() != 0 {
        eprintln!("skipped: only root can give a directory away");
        return;
    }
    let workspace = TempDir::new().unwrap();
    let path = |name: &str| workspace.path().join(name);
    std::fs::write(path("mine"), "x").unwrap();
    std::fs::write(path("roots"), "x").unwrap();
    for path in [workspace.path().to_owned(), path("mine")] {
        std::os::unix::fs::chown(path, Some(1234), Some(4321)).unwrap();
    }
    let text = "echo y >> mine && echo z > new && stat -c %U . mine new; echo q > roots";
    let ran = run(in_workspace(text, workspace.path())).await;
    assert_eq!(ran.stdout, "cortex\ncortex\ncortex\n");
    assert_eq!(ran.exit.exit_code, 1, "{ran:?}");
    let new = path("new").metadata().unwrap();
    assert_eq!((new.uid(), new.gid()), (1234, 4321));
    assert_eq!(std::fs::read_to_string(path("roots")).unwrap(), "x", "root's file was changed");
}

#[tokio::test]
async fn hooks_and_configuration_cannot_be_planted() {
    let workspace = TempDir::new().unwrap();
    let path = |name: &str| workspace.path().join(name);
    for directory in [".git/hooks", ".git/modules/sub/hooks", ".vscode"] {
        std::fs::create_dir_all(path(directory)).unwrap();
    }
    let files = [".git/config", ".git/modules/sub/config", ".envrc"];
    for file in files.into_iter().chain([".git/HEAD", ".git/modules/sub/HEAD"]) {
        std::fs::write(path(file), "original").unwrap();
    }
    let text = "mv .git old; mkdir -p .git/hooks; echo evil > .git/hooks/pre-commit
        echo evil > .git/config; rm -f .git/config; mv .git/config .git/c; rm -rf .git/hooks
        echo evil > .git/modules/sub/config; echo evil > .git/modules/sub/hooks/x
        echo evil > .vscode/tasks.json; echo evil > .envrc; rm -f .envrc; mv .vscode v
        echo new > .git/index; echo ../evil > .git/commondir; true";
    let ran = run(in_workspace(text, workspace.path())).await;
    assert!(ran.succeeded(), "{ran:?}");
    for file in files {
        assert_eq!(std::fs::read_to_string(path(file)).unwrap(), "original", "{file}");
    }
    for directory in [".git/hooks", ".git/modules/sub/hooks", ".vscode"] {
        assert_eq!(std::fs::read_dir(path(directory)).unwrap().count(), 0, "{directory}");
    }
    assert!(!path("old").exists());
    assert!(ran.exit.hint.unwrap().contains(".git/commondir"), "what appeared is not named");
    assert_eq!(std::fs::read_to_string(path(".git/index")).unwrap(), "new\n", "git cannot work");
}

#[tokio::test]
async fn limits_hold() {
    let text = "ulimit -Hn; ulimit -Hc; fallocate -l 1G /tmp/x 2>/dev/null && echo big
        perl -e '$n = 0; for (1..2000) { $p = fork; last unless defined $p; \
            if (!$p) { sleep 20; exit } $n++ } print \"$n\\n\"'";
    let request = CommandRequest {
        limits: RequestedLimits { processes: Some(50), ..RequestedLimits::default() },
        ..script(text)
    };
    let ran = run(request).await;
    let lines: Vec<&str> = ran.stdout.lines().collect();
    assert_eq!(lines[..2], ["4096", "0"], "{ran:?}");
    let forked: u32 = lines[2].parse().unwrap();
    assert!((10..50).contains(&forked), "{forked} processes");

    let eat = "perl -e '$x = \"x\" x (400 << 20); print length $x'";
    assert!(succeeds_outside(eat, Path::new("/")), "too little memory for this test");
    let request = CommandRequest {
        limits: RequestedLimits { memory_bytes: Some(128 << 20), ..RequestedLimits::default() },
        ..script(eat)
    };
    let ran = run(request).await;
    assert!(!ran.succeeded() && ran.stdout.is_empty(), "{ran:?}");
}

#[tokio::test]
async fn no_word_of_a_command_brings_core_dumps_back() {
    // The kernel gives a dump to a program outside at any limit but 1: at 0 as well.
    let text = "ulimit -c 0 && ulimit -c 0 -H && python3 -c 'import resource as r; \
                r.setrlimit(r.RLIMIT_CORE, (0, 0)); print(r.getrlimit(r.RLIMIT_CORE))'";
    let outside = std::process::Command::new("bash").args(["-c", text]).output().unwrap();
    assert_eq!(outside.stdout, b"(0, 0)\n", "{outside:?}");
    let own = rustix::process::getrlimit(rustix::process::Resource::Core).maximum;
    if own == Some(0) && !rustix::process::geteuid().is_root() {
        eprintln!("skipped: only root may raise a limit of 0 to 1");
        return;
    }
    let ran = run(script(text)).await;
    assert_eq!((ran.succeeded(), &*ran.stdout), (true, "(1, 1)\n"), "{ran:?}");
}

/// Of all terminals of the machine there is one number.
#[tokio::test]
async fn a_command_gets_only_some_of_the_terminals() {
    let text = "python3 -c 'import os\nfor n in range(300): os.open(\"/dev/ptmx\", os.O_RDWR | os.O_NOCTTY)'";
    assert!(succeeds_outside(text, Path::new("/")), "too few terminals for this test");
    let ran = run(script(text)).await;
    assert!(ran.exit.exit_code == 1 && ran.stderr.contains("No space left"), "{ran:?}");
}

#[tokio::test]
async fn memory_is_limited_for_all_processes_together() {
    let eat = "for i in 1 2 3 4; do perl -e '$x = \"x\" x (60 << 20); sleep 2; print \"$i\\n\"' & \
               done; wait";
    assert!(succeeds_outside(eat, Path::new("/")), "too little memory for this test");
    let groups = launcher().control_groups();
    if groups == "none" {
        eprintln!("skipped: no control groups for this user, so memory is limited by process only");
        return;
    }
    let request = CommandRequest {
        limits: RequestedLimits { memory_bytes: Some(128 << 20), ..RequestedLimits::default() },
        ..script(eat)
    };
    let ran = run(request).await;
    assert!(ran.stdout.lines().count() < 4, "{groups}: {ran:?}");
    assert!(ran.exit.hint.unwrap().contains("memory"));
}

#[tokio::test]
async fn the_network_is_there_only_if_it_was_granted() {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let text = format!("exec 7<>/dev/tcp/127.0.0.1/{port} && echo reached");
    let granted = run(CommandRequest { network: Network::Full, ..script(&text) }).await;
    assert_eq!(granted.stdout, "reached\n", "{granted:?}");
    let denied = run(script(&text)).await;
    assert_eq!(denied.stdout, "", "{denied:?}");
}

#[tokio::test]
async fn on_the_hosts_network_a_command_calls_out_but_listens_on_no_port_of_its_choice() {
    let free = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let listen = |port: u16| {
        format!(
            "perl -MSocket -e 'socket(my $s, AF_INET, SOCK_STREAM, 0) or die; \
             bind($s, pack_sockaddr_in({port}, inet_aton(\"127.0.0.1\"))) or die \"$!\\n\"; \
             listen($s, 1) or die \"$!\\n\"'"
        )
    };
    assert!(succeeds_outside(&listen(free), Path::new("/")), "the port is taken");
    for (network, port, possible) in
        [(Network::None, free, true), (Network::Full, free, false), (Network::Full, 0, true)]
    {
        let ran = run(CommandRequest { network, ..script(&listen(port)) }).await;
        assert_eq!(ran.succeeded(), possible, "port {port} of {network:?}: {ran:?}");
        assert!(possible || ran.stderr.contains("Permission denied"), "{ran:?}");
    }
}

#[tokio::test]
async fn the_command_cannot_end_or_read_its_pid_1() {
    let text = "kill -9 1; kill -TERM 1; kill -STOP 1; cat /proc/1/environ; ls /proc/1/fd/; \
                head -c1 /proc/1/mem; readlink /proc/1/exe; echo alive";
    let ran = run(script(text)).await;
    assert!(ran.succeeded(), "{ran:?}");
    assert_eq!(ran.stdout, "alive\n", "{ran:?}");
}

#[tokio::test]
async fn every_mount_is_as_narrow_as_it_can_be() {
    let workspace = TempDir::new().unwrap();
    let ran = run(in_workspace("cat /proc/self/mountinfo", workspace.path())).await;
    assert!(ran.succeeded(), "{ran:?}");
    let writable =
        ["/workspace", "/tmp", "/home/cortex", "/dev/shm", "/dev/pts", "/proc"].map(Path::new);
    for line in ran.stdout.lines() {
        let fields: Vec<&str> = line.split(' ').collect();
        let (point, options) = (Path::new(fields[4]), fields[5]);
        let has = |option| options.split(',').any(|word| word == option);
        // The covers of /proc are the null device too.
        let device = point.parent() == Some(Path::new("/dev")) || point.starts_with("/proc/");
        assert!(has("nosuid"), "set-user-id counts on {line}");
        assert!(has("nodev") || device || point == Path::new("/dev/pts"), "devices on {line}");
        assert!(has("ro") || device || writable.contains(&point), "writable: {line}");
        assert!(!line.contains("shared:") && !line.contains("master:"), "not private: {line}");
    }
}
