//! The local socket, `STATE/agent.sock`: the machine's owner asks and tells its own agent.
//!
//! Answered are root and the agent's own user, told apart by the credentials the kernel gives; the
//! socket's mode 0600 is the first barrier, the check the second. Holds no state of its own.

use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::net::UnixListener as StdListener;
use std::path::{Path, PathBuf};
use std::time::Duration;

use cortex_proto::v1::control_server::{Control, ControlServer};
use cortex_proto::v1::{self};
use cortex_proto::{CODE_TRAILER, HINT_TRAILER};
use cortex_shared::labels;
use cortex_shared::tasks::TaskScope;
use cortex_shared::wire_path::WirePath;
use tokio::net::{UnixListener, UnixStream};
use tokio::sync::watch;
use tokio_stream::StreamExt as _;
use tokio_stream::wrappers::UnixListenerStream;
use tokio_util::sync::CancellationToken;
use tonic::{Code, Request, Response, Status};

use crate::config::ConfigError;
use crate::identity::live::LiveIdentity;
use crate::link::dispatch::Dispatcher;
use crate::link::renewal::{self, RenewError};
use crate::link::session::LinkState;
use crate::link::workspaces::{PlaceError, Workspaces};
use crate::link::{proto_mode, proto_network, report};
use crate::sync::FlushError;

/// How long the hub may take to answer a question passed on to it.
const HUB_TIMEOUT: Duration = Duration::from_secs(20);
/// The same where the owner wants to get rid of something: he is answered within a second.
const DETACH_TIMEOUT: Duration = Duration::from_millis(800);
/// How long the hub may be silent during a flush unless the caller says otherwise: whoever asks gets
/// an answer within a second.
const FLUSH_PATIENCE: Duration = Duration::from_millis(800);
/// The longest silence a caller may ask for.
const LONGEST_PATIENCE: Duration = Duration::from_secs(3600);

/// Why there is no local socket.
#[derive(Debug, thiserror::Error)]
#[error("cannot open the local socket {}", path.display())]
pub struct ControlError {
    path: PathBuf,
    source: std::io::Error,
}

/// What the local socket answers from.
pub struct LocalControl {
    /// Who this node is.
    pub identity: LiveIdentity,
    /// The latest state of the connection.
    pub link: watch::Receiver<LinkState>,
    /// What runs.
    pub dispatcher: Dispatcher,
    /// Its workspaces.
    pub workspaces: Workspaces,
    /// Ends the agent: this node has left its mesh.
    pub left: CancellationToken,
}

/// Opens the socket and answers until the scope is cancelled.
///
/// # Errors
/// If the socket cannot be bound. A left-over socket is replaced: the caller holds the state's
/// lock, so no other agent uses it.
pub fn serve(control: LocalControl, path: &Path, scope: &TaskScope) -> Result<(), ControlError> {
    let failed = |source| ControlError { path: path.to_owned(), source };
    let listener = bind(path).map_err(failed)?;
    let stop = scope.token().clone();
    let connections =
        UnixListenerStream::new(listener).filter(|accepted| accepted.as_ref().is_ok_and(may_ask));
    scope.spawn("local socket", async move {
        let server = tonic::transport::Server::builder()
            .add_service(ControlServer::new(control))
            .serve_with_incoming_shutdown(connections, stop.clone().cancelled_owned());
        // The orderly end waits for clients, which must not keep the daemon.
        let limit = async {
            stop.cancelled().await;
            tokio::time::sleep(Duration::from_secs(1)).await;
        };
        tokio::select! {
            result = server => if let Err(error) = result {
                tracing::error!(%error, "the local socket failed");
            },
            () = limit => {}
        }
    });
    Ok(())
}

fn bind(path: &Path) -> std::io::Result<UnixListener> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
        Ok(()) | Err(_) => {}
    }
    // Between bind and chmod others could connect, which is why each caller is also checked.
    let listener = StdListener::bind(path)?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600))?;
    listener.set_nonblocking(true)?;
    UnixListener::from_std(listener)
}

fn may_ask(stream: &UnixStream) -> bool {
    let own = rustix::process::geteuid().as_raw();
    let allowed = stream.peer_cred().is_ok_and(|peer| peer.uid() == 0 || peer.uid() == own);
    if !allowed {
        tracing::warn!("another user tried the local socket");
    }
    allowed
}

#[tonic::async_trait]
impl Control for LocalControl {
    async fn agent_status(
        &self,
        _: Request<v1::AgentStatusRequest>,
    ) -> Result<Response<v1::AgentStatusResponse>, Status> {
        let link = self.link.borrow().clone();
        let session = link.session;
        let identity = self.identity.snapshot();
        let (policy, policy_until_ms) = self.dispatcher.policy();
        let ceiling = self.dispatcher.ceiling().await;
        Ok(Response::new(v1::AgentStatusResponse {
            node_id: identity.node_id.as_bytes().to_vec().into(),
            name: session
                .as_ref()
                .map_or_else(|| identity.name.clone(), |session| session.name.clone()),
            mesh_id: identity.mesh.to_string(),
            hub: self.identity.client().address().to_string(),
            connected: session.is_some(),
            link_problem: link.problem.unwrap_or_default(),
            next_attempt_ms: link.next_attempt_ms,
            connected_since_ms: session.as_ref().map_or(0, |session| session.since_ms),
            session_epoch: session.as_ref().map_or(0, |session| session.epoch),
            certificate_not_after_ms: identity.credentials.not_after_ms(),
            ceiling: proto_mode(ceiling.mode).into(),
            ceiling_network: proto_network(ceiling.network).into(),
            policy: proto_mode(policy.mode).into(),
            policy_network: proto_network(policy.network).into(),
            workspaces: self.workspaces.statuses(),
            running_tasks: u32::try_from(self.dispatcher.running_tasks()).unwrap_or(u32::MAX),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            process_id: std::process::id(),
            policy_until_ms,
            generation: identity.generation,
            renew_at_ms: self.identity.renew_at_ms(),
            clock_skew_ms: self.identity.skew_ms(),
            identity_problem: self.identity.problem().unwrap_or_default(),
        }))
    }

    async fn renew_local(
        &self,
        request: Request<v1::RenewLocalRequest>,
    ) -> Result<Response<v1::RenewLocalResponse>, Status> {
        let renewed = if request.into_inner().recover {
            renewal::recover(&self.identity).await
        } else {
            renewal::renew(&self.identity, self.session()?).await
        };
        if let Err(error) = renewed {
            return Err(renewal_status(&error));
        }
        self.identity.retry_now();
        let identity = self.identity.snapshot();
        Ok(Response::new(v1::RenewLocalResponse {
            generation: identity.generation,
            not_after_ms: identity.credentials.not_after_ms(),
        }))
    }

    async fn leave_local(
        &self,
        _: Request<v1::LeaveLocalRequest>,
    ) -> Result<Response<v1::LeaveLocalResponse>, Status> {
        let told = async {
            let mut client = self.session()?;
            let mut request = Request::new(v1::LeaveRequest {});
            request.set_timeout(HUB_TIMEOUT);
            match tokio::time::timeout(HUB_TIMEOUT, client.leave(request)).await {
                Ok(answer) => answer.map(drop),
                Err(_) => Err(Status::deadline_exceeded("the hub did not answer in time")),
            }
        };
        let hub_problem = match told.await {
            Ok(()) => String::new(),
            Err(status) => status.message().to_owned(),
        };
        // The answer is still sent: the server ends in order.
        self.left.cancel();
        Ok(Response::new(v1::LeaveLocalResponse { hub_problem }))
    }

    async fn ceiling_local(
        &self,
        _: Request<v1::CeilingLocalRequest>,
    ) -> Result<Response<v1::CeilingLocalResponse>, Status> {
        let offline = !self.dispatcher.report_ceiling().await;
        Ok(Response::new(v1::CeilingLocalResponse { offline }))
    }

    async fn attach_local(
        &self,
        request: Request<v1::AttachLocalRequest>,
    ) -> Result<Response<v1::AttachLocalResponse>, Status> {
        use std::os::unix::ffi::{OsStrExt as _, OsStringExt as _};
        let v1::AttachLocalRequest { workspace, path } = request.into_inner();
        check_workspace(&workspace)?;
        if path.len() > 4096 || path.contains(&0) {
            return Err(Status::invalid_argument("the path is no path"));
        }
        let wanted = (!path.is_empty()).then(|| Path::new(std::ffi::OsStr::from_bytes(&path)));
        let placed = self.workspaces.place(&workspace, wanted).map_err(|error| match error {
            PlaceError::Config(ConfigError::Write { .. }) => {
                tracing::error!(%error, "settings cannot be stored");
                Status::internal(error.to_string())
            }
            PlaceError::NotAbsolute(_) => Status::invalid_argument(error.to_string()),
            _ => Status::failed_precondition(error.to_string()),
        })?;
        let attach = async |mut client: HubClient, request| client.request_attach(request).await;
        self.ask_hub(attach, workspace, HUB_TIMEOUT).await?;
        let path = placed.into_os_string().into_vec().into();
        Ok(Response::new(v1::AttachLocalResponse { path }))
    }

    async fn confirm_deletes_local(
        &self,
        request: Request<v1::ConfirmDeletesLocalRequest>,
    ) -> Result<Response<v1::ConfirmDeletesLocalResponse>, Status> {
        let workspace = request.into_inner().workspace;
        check_workspace(&workspace)?;
        match self.workspaces.confirm_deletions(&workspace) {
            Some(Ok(held)) => Ok(Response::new(v1::ConfirmDeletesLocalResponse { held })),
            Some(Err(error)) => Err(Status::unavailable(error.to_string())),
            None => {
                let text = format!("this node is not a member of workspace {workspace:?}");
                Err(Status::not_found(text))
            }
        }
    }

    async fn pause_local(
        &self,
        request: Request<v1::PauseLocalRequest>,
    ) -> Result<Response<v1::PauseLocalResponse>, Status> {
        let v1::PauseLocalRequest { workspace, paused } = request.into_inner();
        self.check_member(&workspace)?;
        self.workspaces
            .set_options(&workspace, |options| options.paused = paused)
            .map_err(|error| not_stored(&error))?;
        Ok(Response::new(v1::PauseLocalResponse {}))
    }

    async fn flush_local(
        &self,
        request: Request<v1::FlushLocalRequest>,
    ) -> Result<Response<v1::FlushLocalResponse>, Status> {
        let v1::FlushLocalRequest { workspace, patience_ms } = request.into_inner();
        let patience = match patience_ms {
            0 => FLUSH_PATIENCE,
            wanted => Duration::from_millis(wanted.into()).min(LONGEST_PATIENCE),
        };
        let names = if workspace.is_empty() {
            self.workspaces.names()
        } else {
            self.check_member(&workspace)?;
            vec![workspace]
        };
        let flushes = names.into_iter().map(async |name| {
            let result = self.workspaces.flush(&name, patience).await;
            (name, result.unwrap_or(Err(FlushError::Stopped)))
        });
        let mut answer = v1::FlushLocalResponse::default();
        for (workspace, result) in futures_util::future::join_all(flushes).await {
            match result {
                Ok(()) => answer.workspaces.push(workspace),
                Err(error) => answer.problems.push(v1::FlushProblem {
                    workspace,
                    code: flush_code(&error).to_owned(),
                    message: error.to_string(),
                }),
            }
        }
        Ok(Response::new(answer))
    }

    async fn explain_local(
        &self,
        request: Request<v1::ExplainLocalRequest>,
    ) -> Result<Response<v1::ExplainLocalResponse>, Status> {
        let v1::ExplainLocalRequest { workspace, path } = request.into_inner();
        self.check_member(&workspace)?;
        let path = WirePath::new(path.to_vec())
            .map_err(|error| Status::invalid_argument(format!("the path is no path: {error}")))?;
        let workspaces = self.workspaces.clone();
        let found = tokio::task::spawn_blocking(move || workspaces.explain(&workspace, &path))
            .await
            .map_err(|_| Status::internal("it could not be looked up"))?;
        match found {
            Some(Ok(found)) => Ok(Response::new(report::explanation(&found))),
            Some(Err(error)) => {
                tracing::warn!(%error, "a path cannot be explained");
                Err(Status::failed_precondition(error.to_string()))
            }
            None => Err(Status::not_found("this node is not a member any more")),
        }
    }

    async fn mode_local(
        &self,
        request: Request<v1::ModeLocalRequest>,
    ) -> Result<Response<v1::ModeLocalResponse>, Status> {
        let v1::ModeLocalRequest { workspace, mode } = request.into_inner();
        check_workspace(&workspace)?;
        let options = match report::mode_from_wire(mode) {
            Some(mode) => self
                .workspaces
                .set_options(&workspace, |options| options.mode = mode)
                .map_err(|error| not_stored(&error))?,
            None if mode == v1::MemberMode::Unspecified as i32 => {
                self.workspaces.options(&workspace)
            }
            None => return Err(Status::invalid_argument("this agent does not know the mode")),
        };
        let mode = report::mode_to_wire(options.mode).into();
        Ok(Response::new(v1::ModeLocalResponse { mode }))
    }

    async fn detach_local(
        &self,
        request: Request<v1::DetachLocalRequest>,
    ) -> Result<Response<v1::DetachLocalResponse>, Status> {
        let workspace = request.into_inner().workspace;
        check_workspace(&workspace)?;
        let detach = async |mut client: HubClient, request| client.request_detach(request).await;
        self.ask_hub(detach, workspace, DETACH_TIMEOUT).await?;
        Ok(Response::new(v1::DetachLocalResponse {}))
    }
}

type HubClient = cortex_proto::v1::node_client::NodeClient<tonic::transport::Channel>;

fn renewal_status(error: &RenewError) -> Status {
    let text = error.to_string();
    match error {
        RenewError::Cloned { .. } => {
            with_code(Status::failed_precondition(text), "identity_cloned", renewal::FORK)
        }
        RenewError::Refused { .. } => Status::failed_precondition(text),
        RenewError::Busy { .. } => Status::resource_exhausted(text),
        RenewError::Connect(_) | RenewError::Failed { .. } => {
            with_code(Status::unavailable(text), "no_renewal", "cortex-agent doctor")
        }
        RenewError::Identity(_) => Status::internal(text),
    }
}

impl LocalControl {
    /// Whether this node syncs a workspace.
    fn check_member(&self, workspace: &str) -> Result<(), Status> {
        check_workspace(workspace)?;
        if self.workspaces.names().iter().any(|name| name == workspace) {
            return Ok(());
        }
        Err(Status::not_found(format!("this node is not a member of workspace {workspace:?}")))
    }

    /// The live session's way to the hub.
    fn session(&self) -> Result<HubClient, Status> {
        let session = self.link.borrow().session.clone();
        session.map(|session| session.client).ok_or_else(|| {
            with_code(
                Status::unavailable("this node has no session with its hub"),
                "no_session",
                "cortex-agent status",
            )
        })
    }

    /// Passes a question on to the hub, over the live session.
    async fn ask_hub(
        &self,
        ask: impl AsyncFnOnce(
            HubClient,
            Request<v1::RequestAttachRequest>,
        ) -> Result<Response<v1::RequestAttachResponse>, Status>,
        workspace: String,
        limit: Duration,
    ) -> Result<(), Status> {
        let client = self.session()?;
        let mut request = Request::new(v1::RequestAttachRequest { workspace });
        // Ours ends first: it says what to do.
        request.set_timeout(limit + Duration::from_secs(1));
        match tokio::time::timeout(limit, ask(client, request)).await {
            Ok(answer) => answer.map(drop),
            Err(_) => Err(with_code(
                Status::new(Code::DeadlineExceeded, "the hub did not answer in time"),
                "hub_silent",
                "cortex-agent workspace pause WORKSPACE stops it here meanwhile",
            )),
        }
    }
}

fn not_stored(error: &ConfigError) -> Status {
    tracing::error!(%error, "what was decided about a workspace cannot be stored");
    Status::internal(error.to_string())
}

fn flush_code(error: &FlushError) -> &'static str {
    match error {
        FlushError::Offline => "offline",
        FlushError::Silent => "silent",
        FlushError::Paused => "paused",
        FlushError::Halted { .. } => "halted",
        FlushError::Failed { .. } => "failed",
        FlushError::Stopped => "stopped",
    }
}

fn check_workspace(name: &str) -> Result<(), Status> {
    labels::check_name(name).map_err(|error| Status::invalid_argument(error.to_string()))
}

fn with_code(mut status: Status, code: &'static str, hint: &'static str) -> Status {
    let metadata = status.metadata_mut();
    metadata.insert(CODE_TRAILER, tonic::metadata::MetadataValue::from_static(code));
    metadata.insert(HINT_TRAILER, tonic::metadata::MetadataValue::from_static(hint));
    status
}
