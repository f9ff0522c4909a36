//! An agent's process.

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};

use cortex_shared::secret::InviteToken;

use super::{Hub, run, within};

/// An agent process with a state of its own, ended with the test.
pub struct Agent {
    pub folder: tempfile::TempDir,
    daemon: Option<Child>,
}

impl Agent {
    /// Joined to the hub, with the daemon running.
    pub async fn joined(hub: &Hub, ceiling: &str) -> Self {
        let mut agent = Self { folder: tempfile::tempdir().unwrap(), daemon: None };
        let output = agent.join(hub, ceiling).await;
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        agent.run();
        agent
    }

    /// Starts the daemon of an agent that has joined.
    pub fn run(&mut self) {
        self.daemon = Some(self.command().arg("run").stdout(Stdio::null()).spawn().unwrap());
    }

    /// Ends the daemon at once, as a crash does.
    pub fn kill(&mut self) {
        if let Some(mut daemon) = self.daemon.take() {
            daemon.kill().unwrap();
            daemon.wait().unwrap();
        }
    }

    /// Runs a verb and reads the JSON it prints.
    pub async fn json(&self, arguments: &[&str]) -> serde_json::Value {
        let mut command = self.command();
        command.args(arguments).args(["-o", "json"]);
        let output = run(command).await;
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        serde_json::from_slice(&output.stdout).unwrap()
    }

    /// The lines of the local audit files with this action.
    pub fn audit(&self, action: &str) -> Vec<serde_json::Value> {
        let files = ["state/audit.jsonl", "state/audit-hub.jsonl"];
        let text =
            files.map(|file| std::fs::read_to_string(self.path(file)).unwrap_or_default()).concat();
        text.lines()
            .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap())
            .filter(|line| line["action"] == action)
            .collect()
    }

    /// Writes a new token, and says where.
    pub fn token(&self) -> PathBuf {
        let token = self.path("token");
        std::fs::write(&token, InviteToken::generate().expose()).unwrap();
        token
    }

    pub fn unjoined() -> Self {
        Self { folder: tempfile::tempdir().unwrap(), daemon: None }
    }

    pub async fn join(&self, hub: &Hub, ceiling: &str) -> std::process::Output {
        let token = self.token();
        let mut command = self.command();
        command
            .arg("join")
            .arg(hub.address.to_string())
            .args(["--ca", &hub.ca.pin().to_string(), "--name", "n1", "--ceiling", ceiling])
            .arg("--token-file")
            .arg(token)
            .arg("--workspace-root")
            .arg(self.path("workspaces"));
        run(command).await
    }

    pub async fn login(&self, hub: &Hub) {
        let token = self.path("operator-token");
        std::fs::write(&token, InviteToken::generate().expose()).unwrap();
        let mut command = self.command();
        command
            .arg("login")
            .arg(hub.address.to_string())
            .args(["--ca", &hub.ca.pin().to_string(), "--token-file"])
            .arg(token);
        let output = run(command).await;
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    }

    pub fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    pub fn command(&self) -> Command {
        let mut command = Command::new(env!("CARGO_BIN_EXE_cortex-agent"));
        command
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap())
            .env("HOME", self.folder.path())
            .env("CORTEX_STATE", self.path("state"))
            .env("CORTEX_CONFIG_DIR", self.path("config"))
            .stdin(Stdio::null());
        command
    }

    pub fn process_id(&self) -> rustix::process::Pid {
        rustix::process::Pid::from_child(self.daemon.as_ref().unwrap())
    }

    pub async fn end_of_daemon(&mut self) -> std::process::ExitStatus {
        let mut daemon = self.daemon.take().unwrap();
        within(tokio::task::spawn_blocking(move || daemon.wait())).await.unwrap().unwrap()
    }
}

impl Drop for Agent {
    fn drop(&mut self) {
        if let Some(daemon) = &mut self.daemon {
            daemon.kill().ok();
            daemon.wait().ok();
        }
    }
}
