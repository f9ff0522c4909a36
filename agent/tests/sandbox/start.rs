//! What the start of a command costs does not grow with the agent, and little of it has to be waited
//! for.

use std::path::Path;
use std::process::Stdio;
use std::time::{Duration, Instant};

use cortex_agent::exec::CommandRequest;
use cortex_agent::sandbox::Launcher;
use tempfile::TempDir;

use crate::support::{
    PLENTY, Running, apart, holds, in_workspace, launcher, program, run, succeeds_outside, view,
};

const SMALL_MIB: usize = 64;
const LARGE_MIB: usize = 512;
const ROUNDS: usize = 4;
const STARTS_IN_A_ROUND: usize = 8;

#[tokio::test]
async fn starting_a_command_costs_a_large_agent_no_more_than_a_small_one() {
    let (succeeded, text) = apart(&[], "start::apart_by_memory", &[]).await;
    assert!(succeeded, "{text}");
}

/// Prints the figures, for `scripts/bench`.
#[tokio::test]
#[ignore = "run by the test above, in a process of its own size"]
#[allow(clippy::print_stdout)]
async fn apart_by_memory() {
    let small_memory = touched(SMALL_MIB);
    let (mut small, mut large) = (Starts::default(), Starts::default());
    for _ in 0..ROUNDS {
        small.more().await;
        let more_memory = touched(LARGE_MIB - SMALL_MIB);
        large.more().await;
        drop(more_memory);
    }
    drop(small_memory);
    println!(
        "start of a command: {SMALL_MIB} MiB {:.3} ms, {LARGE_MIB} MiB {:.3} ms, of which {:.3} and \
         {:.3} ms are the agent's own processor time",
        small.best().as_secs_f64() * 1e3,
        large.best().as_secs_f64() * 1e3,
        small.own_time_of_one().as_secs_f64() * 1e3,
        large.own_time_of_one().as_secs_f64() * 1e3
    );
    // A copy of the page tables of the difference takes about 10 ms of the agent's own processor
    // time, which other programs on the machine hardly change.
    let (small, large) = (small.own_time_of_one(), large.own_time_of_one());
    let limit = small * 2 + Duration::from_millis(2);
    assert!(large < limit, "{small:?} of processor time with little memory, {large:?} with much");
}

#[tokio::test]
async fn a_sandbox_made_beforehand_is_used_once_and_only_where_it_fits() {
    let private = ["unshare", "-m", "--propagation", "private"];
    let can_mount = succeeds_outside("unshare -m true", Path::new("/"));
    let (before, mounts) = if can_mount { (private.as_slice(), "1") } else { (&[][..], "") };
    let (succeeded, text) = apart(before, "start::apart_spares", &[("MOUNTS", mounts)]).await;
    assert!(succeeded, "{text}");
}

#[tokio::test]
#[ignore = "run by the test above, in a process that does nothing else"]
async fn apart_spares() {
    let workspace = TempDir::new().unwrap();
    let wish = || in_workspace("echo here; exit 3", workspace.path());
    // The process of a command, which ran as it should.
    let process_of = async |request: CommandRequest| {
        let mut running = Running::start(request, PLENTY);
        let process = running.until_started().await;
        let ran = running.finish().await;
        assert_eq!((ran.stdout.as_str(), ran.exit.exit_code), ("here\n", 3), "{ran:?}");
        process
    };
    let next = async || {
        assert!(holds(|| children_of(std::process::id()).len() == 1).await, "none is made");
        children_of(std::process::id())[0]
    };

    process_of(wish()).await;
    let made = next().await;
    assert_eq!(process_of(wish()).await, made, "it was not used");

    let made = next().await;
    kill(made);
    assert_ne!(process_of(wish()).await, made, "it was dead");

    let made = next().await;
    let other = CommandRequest { read_only_paths: vec!["/usr/share".into()], ..wish() };
    assert_ne!(process_of(other).await, made, "it was made for something else");
    assert!(holds(|| !children_of(std::process::id()).contains(&made)).await, "it is left over");

    let made = next().await;
    if std::env::var("MOUNTS").unwrap().is_empty() {
        eprintln!("skipped: nobody but root can change the mounts");
    } else {
        let mount = ["-t", "tmpfs", "none"];
        let place = TempDir::new().unwrap();
        let mut command = std::process::Command::new("mount");
        assert!(command.args(mount).arg(place.path()).status().unwrap().success());
        assert_ne!(process_of(wish()).await, made, "it knows the former mounts");
    }

    next().await;
    launcher().close().await;
    assert_eq!(children_of(std::process::id()), [] as [u32; 0]);
    process_of(wish()).await;
}

#[tokio::test]
async fn a_sandbox_made_beforehand_ends_with_the_agent() {
    let mut agent = std::process::Command::new(std::env::current_exe().unwrap())
        .args(["--exact", "start::apart_idle", "--ignored", "--nocapture"])
        .stdout(Stdio::piped())
        .spawn()
        .unwrap();
    let mut lines = std::io::BufReader::new(agent.stdout.take().unwrap());
    let made = tokio::task::spawn_blocking(move || {
        use std::io::BufRead as _;
        let mut line = String::new();
        while !line.starts_with("made ") {
            line.clear();
            assert!(lines.read_line(&mut line).unwrap() > 0, "it ended");
        }
        line["made ".len()..].trim().parse::<u32>().unwrap()
    });
    let made = made.await.unwrap();
    let init = children_of(made);
    assert_eq!(init.len(), 1, "it is not complete");
    agent.kill().unwrap();
    agent.wait().unwrap();
    for process in [made, init[0]] {
        let gone = || !Path::new(&format!("/proc/{process}/fd")).exists();
        assert!(holds(gone).await, "process {process} outlived the agent");
    }
}

#[tokio::test]
#[ignore = "run by the test above, which kills it"]
#[allow(clippy::print_stdout)]
async fn apart_idle() {
    assert!(run(program(&["true"])).await.succeeded());
    let own = || children_of(std::process::id());
    assert!(holds(|| own().first().is_some_and(|made| children_of(*made).len() == 1)).await);
    println!("\nmade {}", own()[0]);
    std::future::pending::<()>().await;
}

fn kill(process: u32) {
    let pid = rustix::process::Pid::from_raw(process.try_into().unwrap()).unwrap();
    rustix::process::kill_process(pid, rustix::process::Signal::KILL).unwrap();
}

/// Those that have not been waited for, too.
fn children_of(process: u32) -> Vec<u32> {
    let Ok(threads) = std::fs::read_dir(format!("/proc/{process}/task")) else { return Vec::new() };
    threads
        .flatten()
        .filter_map(|thread| std::fs::read_to_string(thread.path().join("children")).ok())
        .flat_map(|list| list.split_whitespace().map(|id| id.parse().unwrap()).collect::<Vec<_>>())
        .collect()
}

/// Measures what a sandbox adds to the start and the end of a command, beside bubblewrap and beside
/// no sandbox, taking turns. Prints the figures in microseconds, for `scripts/bench`.
///
/// Seen by whoever wants the command: from the wish to the first byte of its output, and until
/// everything of it has ended. Between two, there is a pause as between commands of a person or a
/// program that thinks; the sandbox of the next command is made in it. So there is a second figure
/// for a command that finds none.
#[tokio::test(flavor = "multi_thread")]
#[ignore = "run by scripts/bench"]
#[allow(clippy::print_stdout)]
async fn apart_beside_bubblewrap() {
    let rounds = std::env::var("ROUNDS").map_or(20, |rounds| rounds.parse().unwrap());
    let workspace = TempDir::new().unwrap();
    // One makes a sandbox for the command that follows, the other never does. Both know the workspace,
    // so that the figures do not have the making of a map of it.
    let alone = Launcher::with_stage(env!("CARGO_BIN_EXE_cortex-agent"));
    for launcher in [launcher(), alone.clone()] {
        let first = in_workspace("true", workspace.path());
        assert!(Running::with(launcher, first, PLENTY).finish().await.succeeded());
    }
    alone.close().await;
    let wish = || {
        let request = program(&["/bin/echo", "x"]);
        CommandRequest { workspace: view(workspace.path(), ""), ..request }
    };
    for _ in 0..rounds {
        pause().await;
        print_times("cortex mesh, STRICT", times_of(Running::start(wish(), PLENTY)).await);
        pause().await;
        let running = Running::with(alone.clone(), wish(), PLENTY);
        print_times("cortex mesh, STRICT, none made beforehand", times_of(running).await);
        pause().await;
        let wrapped = bubblewrap(workspace.path(), &["/bin/echo", "x"]);
        print_times("bubblewrap", times_outside(wrapped).await);
        pause().await;
        let mut bash = tokio::process::Command::new("bash");
        bash.args(["-c", "exec /bin/echo x"]);
        print_times("no sandbox (bash -c)", times_outside(bash).await);
    }
    launcher().close().await;
}

async fn pause() {
    tokio::time::sleep(Duration::from_millis(25)).await;
}

#[allow(clippy::print_stdout)]
fn print_times(who: &str, (to_output, to_end): (Duration, Duration)) {
    println!("{who}\t{}\t{}", to_output.as_micros(), to_end.as_micros());
}

async fn times_of(mut running: Running) -> (Duration, Duration) {
    let begun = running.begun;
    running.until_output("x").await;
    let to_output = begun.elapsed();
    assert!(running.finish().await.succeeded());
    (to_output, begun.elapsed())
}

async fn times_outside(mut command: tokio::process::Command) -> (Duration, Duration) {
    use tokio::io::AsyncReadExt as _;
    let begun = Instant::now();
    let mut child =
        command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().expect("is it installed?");
    let mut stdout = child.stdout.take().unwrap();
    stdout.read_u8().await.unwrap();
    let to_output = begun.elapsed();
    stdout.read_to_end(&mut Vec::new()).await.unwrap();
    assert!(child.wait().await.unwrap().success());
    (to_output, begun.elapsed())
}

/// A command in bubblewrap, with as much of the agent's sandbox as it has.
fn bubblewrap(workspace: &Path, arguments: &[&str]) -> tokio::process::Command {
    let mut command = tokio::process::Command::new("bwrap");
    command.args(["--unshare-all", "--unshare-user", "--die-with-parent", "--new-session"]);
    command.args(["--cap-drop", "ALL", "--uid", "1000", "--gid", "1000", "--hostname", "sandbox"]);
    command.args(["--ro-bind", "/usr", "/usr"]);
    for name in ["/bin", "/sbin", "/lib", "/lib64"] {
        match std::fs::read_link(name) {
            Ok(target) => command.arg("--symlink").arg(target).arg(name),
            Err(_) => command.args(["--ro-bind-try", name, name]),
        };
    }
    command.args(["--ro-bind", "/etc", "/etc", "--proc", "/proc", "--dev", "/dev"]);
    command.args(["--tmpfs", "/tmp", "--tmpfs", "/run", "--bind"]).arg(workspace);
    command.args(["/workspace", "--chdir", "/workspace", "--clearenv"]);
    command.args(["--setenv", "PATH", "/usr/bin:/bin", "--"]).args(arguments);
    command
}

/// That much memory, every page of it written to.
fn touched(mebibytes: usize) -> Vec<u8> {
    let mut memory = vec![0_u8; mebibytes << 20];
    memory.iter_mut().step_by(4096).for_each(|byte| *byte = 1);
    std::hint::black_box(memory)
}

/// Commands started so far.
#[derive(Default)]
struct Starts {
    times: Vec<Duration>,
    own_time: Duration,
}

impl Starts {
    async fn more(&mut self) {
        for _ in 0..STARTS_IN_A_ROUND {
            let (begun, own) = (Instant::now(), own_time());
            let mut running = Running::start(program(&["true"]), PLENTY);
            running.until_started().await;
            self.times.push(begun.elapsed());
            self.own_time += own_time().saturating_sub(own);
            assert!(running.finish().await.succeeded());
        }
    }

    /// The quickest of all: what others do on this machine only ever adds.
    fn best(&self) -> Duration {
        self.times.iter().min().copied().unwrap()
    }

    fn own_time_of_one(&self) -> Duration {
        self.own_time / u32::try_from(self.times.len()).unwrap()
    }
}

/// The processor time that the threads of this process have had.
fn own_time() -> Duration {
    let threads = std::fs::read_dir("/proc/self/task").unwrap().flatten();
    let nanoseconds = threads
        .filter_map(|thread| std::fs::read_to_string(thread.path().join("schedstat")).ok())
        .filter_map(|text| text.split(' ').next()?.parse::<u64>().ok())
        .sum();
    Duration::from_nanos(nanoseconds)
}
