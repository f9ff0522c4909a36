//! Channels to the hub for the verbs.

use std::time::{Duration, Instant};

use cortex_proto::v1::enroll_client::EnrollClient;
use cortex_proto::v1::operator_client::OperatorClient;
use cortex_proto::{MAX_MESSAGE_BYTES, v1};
use cortex_shared::patience::Patience;
use cortex_shared::peer::CaPin;
use rustls_pki_types::CertificateDer;
use tonic::transport::Channel;
use tonic::{Code, Request, Status};

use super::error::{CliError, Exit, printable};
use super::{Global, printer};
use crate::client::{HubAddress, HubClient, Purpose, Trust};
use crate::config::contexts::{ConfigDir, Context};
use crate::identity::authorities_of;

/// How long a question to the hub may take. Streams have no such limit.
const QUESTION_TIMEOUT: Duration = Duration::from_secs(30);

/// How long one attempt at joining or logging in may take; the hub answers from its database.
const ENROLL_TIMEOUT: Duration = Duration::from_secs(60);

/// How long attempts are repeated where the hub is busy or the answer was lost. Repeating is harmless:
/// the hub recognises the key. A hub that asks for more time than is left is not waited for.
const ENROLL_PATIENCE: Duration = Duration::from_secs(120);

/// How long an answer may keep the command waiting that is only asked for the next commands' sake.
const REFRESH_TIMEOUT: Duration = Duration::from_secs(5);

/// Connects as the operator of the chosen context.
pub(crate) async fn operator(global: &Global) -> Result<OperatorClient<Channel>, CliError> {
    let config = global.config()?;
    let context = config.choose(global.context.as_deref())?;
    let credentials = config.credentials(&context)?;
    let known = credentials.authorities.clone();
    let hub = context.client(credentials)?;
    let channel = hub.connect(Purpose::Control).await?;
    let client = OperatorClient::new(channel)
        .max_decoding_message_size(MAX_MESSAGE_BYTES)
        .max_encoding_message_size(MAX_MESSAGE_BYTES);
    let shown = hub.authorities_shown();
    if shown.len() > 1 || shown.iter().any(|authority| !known.contains(authority)) {
        // The mesh replaces its authority. The command itself can do without.
        if let Err(error) = refresh(&config, &context, client.clone()).await {
            tracing::warn!(error = %error.render().trim_end(), "the login does not follow the mesh's new authority");
        }
    }
    Ok(client)
}

/// Takes over what the hub says of its authorities, and the certificate that a new one has signed.
async fn refresh(
    config: &ConfigDir,
    context: &Context,
    mut client: OperatorClient<Channel>,
) -> Result<(), CliError> {
    let mut request = Request::new(v1::WhoAmIRequest {});
    request.set_timeout(REFRESH_TIMEOUT);
    let me = client.who_am_i(request).await?.into_inner();
    let named = authorities_of(me.trusted_cas_der.iter().map(AsRef::as_ref))
        .map_err(|problem| CliError::new(Exit::Failed, format!("the hub's answer: {problem}")))?;
    let certificate =
        (!me.certificate_der.is_empty()).then(|| CertificateDer::from(me.certificate_der.to_vec()));
    Ok(config.follow(context, named, certificate)?)
}

/// A question that must be answered within [`QUESTION_TIMEOUT`].
pub(crate) fn question<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(QUESTION_TIMEOUT);
    request
}

/// A question to the local agent that makes it ask the hub in turn.
pub(crate) fn long_question<T>(message: T) -> Request<T> {
    let mut request = Request::new(message);
    request.set_timeout(ENROLL_TIMEOUT + QUESTION_TIMEOUT);
    request
}

/// Asks to be admitted, repeating where that is of use. `call` is told the deadline.
pub(crate) async fn enroll<T, F>(
    hub: HubAddress,
    trust: Trust,
    mut call: impl FnMut(EnrollClient<Channel>, Duration) -> F,
) -> Result<T, CliError>
where
    F: Future<Output = Result<T, Status>>,
{
    let client = HubClient::new(hub, trust, None)?;
    let mut patience = Patience::new(ENROLL_PATIENCE, Instant::now());
    loop {
        let channel = client.connect(Purpose::Control).await?;
        let status = match call(EnrollClient::new(channel), ENROLL_TIMEOUT).await {
            Ok(answer) => return Ok(answer),
            Err(status) => status,
        };
        let busy = matches!(status.code(), Code::ResourceExhausted | Code::Unavailable);
        let delay = busy.then(|| {
            patience.next_delay(cortex_proto::retry_after(status.metadata()), Instant::now())
        });
        let Some(delay) = delay.flatten() else { return Err(status.into()) };
        // Nobody should have to guess why nothing happens. Ctrl-C ends the wait as it ends everything.
        let seconds = delay.as_secs_f64();
        let waiting = format!("{}; trying again in {seconds:.1} s", status.message());
        printer::complain(&printable(&waiting), printer::ColorWhen::Auto);
        tokio::time::sleep(delay).await;
    }
}

/// Reads `sha256:HEX[,sha256:HEX…]`.
pub(crate) fn parse_pins(text: &str) -> Result<Vec<CaPin>, CliError> {
    text.split(',')
        .map(|pin| {
            pin.parse().map_err(|error| {
                CliError::usage(format!("--ca {pin}: {error}"))
                    .hint("`cortex-hubd ca pin` on the hub's machine shows it")
            })
        })
        .collect()
}

/// Reads an address given as an argument.
pub(crate) fn parse_address(text: &str) -> Result<HubAddress, CliError> {
    text.parse().map_err(|error| CliError::usage(format!("{error}")))
}
