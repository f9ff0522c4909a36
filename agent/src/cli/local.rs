//! The way to this node's own agent, over its local socket.

use cortex_proto::v1::control_client::ControlClient;
use hyper_util::rt::TokioIo;
use tokio::net::UnixStream;
use tonic::transport::{Channel, Endpoint};

use super::Global;
use super::error::{CliError, Exit};
use crate::config::StateDir;

/// Connects to the agent of the state that was named.
pub(crate) async fn agent(global: &Global) -> Result<ControlClient<Channel>, CliError> {
    agent_of(&global.state()?).await
}

/// Connects to the agent of this state.
pub(crate) async fn agent_of(state: &StateDir) -> Result<ControlClient<Channel>, CliError> {
    let socket = state.socket();
    let stream = UnixStream::connect(&socket).await.map_err(|error| {
        let (what, hint) = match error.kind() {
            std::io::ErrorKind::NotFound | std::io::ErrorKind::ConnectionRefused => {
                ("no agent runs here", "start it: cortex-agent run")
            }
            std::io::ErrorKind::PermissionDenied => (
                "this user may not ask the agent",
                "use sudo, or name your own agent's state with --state",
            ),
            _ => ("the agent cannot be asked", "cortex-agent doctor"),
        };
        let exit = match error.kind() {
            std::io::ErrorKind::PermissionDenied => Exit::Forbidden,
            _ => Exit::Unreachable,
        };
        CliError::new(exit, format!("{what} ({})", socket.display())).because(error).hint(hint)
    })?;
    // The one connection is made already; it is not made a second time.
    let mut connection = Some(TokioIo::new(stream));
    let connector = tower::service_fn(move |_: http::Uri| {
        let connection = connection.take();
        async move { connection.ok_or_else(|| std::io::Error::from(std::io::ErrorKind::NotConnected)) }
    });
    let channel = Endpoint::from_static("http://agent.local")
        .connect_with_connector(connector)
        .await
        .map_err(|error| CliError::new(Exit::Unreachable, "the agent hung up").because(error))?;
    Ok(ControlClient::new(channel))
}
