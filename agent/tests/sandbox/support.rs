//! Running a command and gathering what it does.

use std::path::Path;
use std::sync::LazyLock;
use std::time::{Duration, Instant};

use cortex_agent::exec::{
    CommandControl, CommandEvent, CommandExit, CommandRequest, CommandVerdict, Executor,
    MAX_FRAME_BYTES, OutputStream, WorkspaceView,
};
use cortex_agent::sandbox::Launcher;
use tokio::sync::mpsc;

/// Credit that never runs out.
pub(crate) const PLENTY: u64 = 1 << 40;
/// Nothing here takes this long unless it hangs.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// One for all tests, as a process has one.
pub(crate) fn launcher() -> Launcher {
    static LAUNCHER: LazyLock<Launcher> = LazyLock::new(|| {
        Launcher::with_stage(env!("CARGO_BIN_EXE_cortex-agent")).with_control_groups()
    });
    LAUNCHER.clone()
}

pub(crate) fn script(text: &str) -> CommandRequest {
    CommandRequest { script: Some(text.as_bytes().to_vec()), ..CommandRequest::default() }
}

pub(crate) fn program(arguments: &[&str]) -> CommandRequest {
    CommandRequest {
        argv: arguments.iter().map(|text| text.as_bytes().to_vec()).collect(),
        ..CommandRequest::default()
    }
}

pub(crate) fn view(host_root: &Path, cwd: &str) -> Option<WorkspaceView> {
    Some(WorkspaceView { host_root: host_root.to_owned(), cwd: cwd.into() })
}

pub(crate) fn in_workspace(text: &str, root: &Path) -> CommandRequest {
    CommandRequest { workspace: view(root, ""), ..script(text) }
}

/// A running command and what was seen of it.
pub(crate) struct Running {
    pub(crate) control: mpsc::Sender<CommandControl>,
    pub(crate) events: mpsc::Receiver<CommandEvent>,
    pub(crate) stdout: Vec<u8>,
    pub(crate) stderr: Vec<u8>,
    pub(crate) taken: u64,
    /// When it was asked for.
    pub(crate) begun: Instant,
}

#[derive(Debug)]
pub(crate) struct Finished {
    pub(crate) exit: CommandExit,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
    pub(crate) taken: u64,
}

impl Finished {
    pub(crate) fn succeeded(&self) -> bool {
        self.exit.verdict == CommandVerdict::Exited && self.exit.exit_code == 0
    }
}

impl Running {
    pub(crate) fn start(request: CommandRequest, credit: u64) -> Self {
        Self::with(launcher(), request, credit)
    }

    /// With a launcher of its own.
    pub(crate) fn with(launcher: Launcher, request: CommandRequest, credit: u64) -> Self {
        let executor = Executor::new(launcher);
        let begun = Instant::now();
        let (control, orders) = mpsc::channel(16);
        let (sender, events) = mpsc::channel(4);
        tokio::spawn(async move { executor.run(request, credit, orders, sender).await });
        Self { control, events, stdout: Vec::new(), stderr: Vec::new(), taken: 0, begun }
    }

    /// The next event; output is gathered and checked on the way.
    pub(crate) async fn next(&mut self) -> Option<CommandEvent> {
        let event = tokio::time::timeout(PATIENCE, self.events.recv())
            .await
            .unwrap_or_else(|_| panic!("it hangs after {}", String::from_utf8_lossy(&self.stdout)));
        match &event {
            Some(CommandEvent::Output { stream, offset, data }) => {
                assert!(!data.is_empty() && data.len() <= MAX_FRAME_BYTES);
                let sink = match stream {
                    OutputStream::Stdout => &mut self.stdout,
                    OutputStream::Stderr => &mut self.stderr,
                };
                assert_eq!(*offset, sink.len() as u64, "a gap in the output");
                sink.extend_from_slice(data);
            }
            Some(CommandEvent::StdinTaken(bytes)) => self.taken += bytes,
            _ => {}
        }
        event
    }

    /// The process that everything ends with.
    pub(crate) async fn until_started(&mut self) -> u32 {
        loop {
            match self.next().await.expect("it ended before it started") {
                CommandEvent::Started { process_id, .. } => return process_id,
                CommandEvent::Exit(exit) => panic!("it ended before it started: {exit:?}"),
                _ => {}
            }
        }
    }

    /// Reads until standard output contains `text`.
    pub(crate) async fn until_output(&mut self, text: &str) {
        while !String::from_utf8_lossy(&self.stdout).contains(text) {
            if let CommandEvent::Exit(exit) = self.next().await.expect("no exit came") {
                panic!("it ended before it said {text:?}: {exit:?}");
            }
        }
    }

    pub(crate) async fn order(&self, order: CommandControl) {
        self.control.send(order).await.unwrap();
    }

    pub(crate) async fn finish(mut self) -> Finished {
        let exit = loop {
            if let CommandEvent::Exit(exit) = self.next().await.expect("no exit came") {
                break exit;
            }
        };
        assert!(self.events.recv().await.is_none(), "an event came after the exit");
        assert_eq!(exit.stdout_bytes, self.stdout.len() as u64);
        assert_eq!(exit.stderr_bytes, self.stderr.len() as u64);
        assert_eq!(exit.stdout_hash, *blake3::hash(&self.stdout).as_bytes());
        assert_eq!(exit.stderr_hash, *blake3::hash(&self.stderr).as_bytes());
        Finished {
            exit,
            stdout: String::from_utf8_lossy(&self.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&self.stderr).into_owned(),
            taken: self.taken,
        }
    }
}

pub(crate) async fn run(request: CommandRequest) -> Finished {
    Running::start(request, PLENTY).finish().await
}

/// Runs one ignored test of this program in a process of its own, by a command in front of it
/// (which may be empty), and gives what it said on standard error.
pub(crate) async fn apart(
    before: &[&str],
    test: &str,
    variables: &[(&str, &str)],
) -> (bool, String) {
    let program = std::env::current_exe().unwrap();
    let mut words: Vec<std::ffi::OsString> = before.iter().map(Into::into).collect();
    words.push(program.into());
    words.extend(["--exact", test, "--ignored", "--nocapture"].map(Into::into));
    let mut command = std::process::Command::new(&words[0]);
    command.args(&words[1..]).envs(variables.iter().copied());
    let output = tokio::task::spawn_blocking(move || command.output()).await.unwrap().unwrap();
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    (output.status.success(), text.into_owned())
}

/// A name for processes that no other test uses.
pub(crate) fn token(name: &str) -> String {
    format!("cortex-test-{name}-{}", std::process::id())
}

/// Processes of the whole machine whose command line begins so.
pub(crate) fn processes_named(token: &str) -> Vec<i32> {
    std::fs::read_dir("/proc")
        .unwrap()
        .flatten()
        .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
        .filter(|pid: &i32| {
            std::fs::read(format!("/proc/{pid}/cmdline"))
                .is_ok_and(|line| line.starts_with(token.as_bytes()))
        })
        .collect()
}

/// Waits until `condition` holds; false if it never does.
pub(crate) async fn holds(condition: impl Fn() -> bool) -> bool {
    let begun = Instant::now();
    while !condition() {
        if begun.elapsed() > PATIENCE {
            return false;
        }
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    true
}

/// Whether a script succeeds outside of any sandbox: the positive control of every denial.
pub(crate) fn succeeds_outside(text: &str, cwd: &Path) -> bool {
    std::process::Command::new("bash")
        .args(["-c", text])
        .current_dir(cwd)
        .env("CORTEX_TEST_CANARY", "leak")
        .stdin(std::process::Stdio::null())
        .output()
        .unwrap()
        .status
        .success()
}
