//! A hub as a process of its own, so that its memory is its own and it can be killed.

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Arc;
use std::time::Duration;

use cortex_proto::v1;
use cortex_proto::v1::operator_client::OperatorClient;
use tokio::io::{AsyncBufReadExt as _, BufReader};
use tokio::process::{Child, Command};
use tonic::transport::Channel;

use super::BenchError;
use super::client::{Key, Login, Target, local};
use super::line::Line;
use crate::config::{DataLayout, HubConfig};
use crate::hub::HubData;

/// How long it has to say that it listens, and to end.
const PATIENCE: Duration = Duration::from_secs(30);
/// Announces the address; see `serve`.
const LISTENING: &str = "grpc listening on ";

/// See the module. Killed, and its directory removed, when dropped.
pub(super) struct HubProcess {
    child: Child,
    target: Arc<Target>,
    folder: tempfile::TempDir,
}

impl HubProcess {
    /// Starts this program as a hub on loopback, in a temporary directory.
    pub(super) async fn start() -> Result<Self, BenchError> {
        let folder = tempfile::Builder::new().prefix("cortex-bench-").tempdir()?;
        let data = HubData::open(&HubConfig::new(folder.path().to_owned())).await?;
        let authority = data.authority_certificate();
        data.close().await;
        let any = SocketAddr::from(([127, 0, 0, 1], 0));
        let (child, address) = serve(folder.path().to_owned(), any).await?;
        let target = Arc::new(Target { address, authority, line: Line::default() });
        Ok(Self { child, target, folder })
    }

    /// How its clients know it.
    pub(super) fn target(&self) -> &Arc<Target> {
        &self.target
    }

    /// `kill -9`, and the next run of it, on the same port.
    pub(super) async fn kill_and_restart(&mut self) -> Result<(), BenchError> {
        self.child.kill().await?;
        let (child, _) = serve(self.folder.path().to_owned(), self.target.address).await?;
        self.child = child;
        Ok(())
    }

    /// Bytes of it that are resident now, as the kernel counts them.
    pub(super) fn resident_bytes(&self) -> u64 {
        let status = self.child.id().and_then(|pid| {
            // It may just have ended, of which its clients tell.
            std::fs::read_to_string(format!("/proc/{pid}/status")).ok()
        });
        let kib = status.as_deref().and_then(|status| {
            let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
            line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()
        });
        kib.unwrap_or_default() * 1024
    }

    /// Its administration.
    pub(super) async fn admin(&self) -> Result<OperatorClient<Channel>, BenchError> {
        Ok(local(DataLayout::new(self.folder.path()).socket()).await?)
    }

    /// An invite for so many nodes.
    pub(super) async fn invite(&self, uses: u32) -> Result<String, BenchError> {
        let request = v1::CreateInviteRequest { uses, ..v1::CreateInviteRequest::default() };
        Ok(self.admin().await?.create_invite(request).await?.into_inner().token)
    }

    /// A new operator's connection.
    pub(super) async fn operator(&self) -> Result<OperatorClient<Channel>, BenchError> {
        self.target.operator(&self.operator_login().await?).await
    }

    /// A new operator.
    pub(super) async fn operator_login(&self) -> Result<Login, BenchError> {
        let request = v1::CreateOperatorRequest {
            name: "bench".to_owned(),
            role: "operator".to_owned(),
            ..v1::CreateOperatorRequest::default()
        };
        let token = self.admin().await?.create_operator(request).await?.into_inner().token;
        let key = Key::make()?;
        let channel = self.target.connect(None).await?;
        self.target.log_in(channel, &token, &key).await
    }

    /// Ends it in order.
    pub(super) async fn stop(mut self) -> Result<(), BenchError> {
        let pid = self.child.id().and_then(|pid| i32::try_from(pid).ok());
        if let Some(pid) = pid.and_then(rustix::process::Pid::from_raw) {
            rustix::process::kill_process(pid, rustix::process::Signal::TERM)
                .map_err(std::io::Error::from)?;
        }
        if tokio::time::timeout(PATIENCE, self.child.wait()).await.is_err() {
            self.child.kill().await?;
        }
        self.folder.close()?;
        Ok(())
    }
}

/// Starts a hub and waits until it listens.
async fn serve(data: PathBuf, address: SocketAddr) -> Result<(Child, SocketAddr), BenchError> {
    let mut child = Command::new(std::env::current_exe()?)
        .args(["serve", "--join-rate", "0", "--http", "off", "--grpc"])
        .args([&address.to_string(), "--data"])
        .arg(data)
        // A line for each of thousands of sessions would be part of what is measured.
        .env("CORTEX_LOG", "error")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .kill_on_drop(true)
        .spawn()?;
    let stdout = child.stdout.take().ok_or(BenchError::HubDied)?;
    let mut lines = BufReader::new(stdout).lines();
    let line = tokio::time::timeout(PATIENCE, lines.next_line()).await;
    let line = line.ok().transpose()?.flatten().ok_or(BenchError::HubDied)?;
    let address = line.strip_prefix(LISTENING).and_then(|address| address.parse().ok());
    Ok((child, address.ok_or(BenchError::HubDied)?))
}
