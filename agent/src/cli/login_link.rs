//! `login-link`: from this login to a browser's, or to a program's that speaks HTTP.

use clap::Args;
use cortex_proto::v1;
use serde::Serialize;

use super::error::CliError;
use super::{Global, Output, hub, printer};

/// Print a link that logs a browser in at the hub, once and within five minutes
#[derive(Debug, Args)]
#[command(after_help = "\
The browser may do there what you may do here. A program takes the code instead, and gets a token for
`Authorization: Bearer`:
  curl -k --pinnedpubkey PIN --json '{\"code\": \"CODE\", \"bearer\": true}' URL/api/v1/session")]
pub(crate) struct LoginLinkArgs {
    #[command(flatten)]
    output: Output,
}

#[derive(Serialize)]
struct Link {
    url: String,
    code: String,
    expires_at_ms: i64,
    /// What the key of the hub's HTTP side hashes to, as curl takes it; empty where something else stands
    /// before it.
    http_pin: String,
}

pub(crate) async fn login_link(global: &Global, args: LoginLinkArgs) -> Result<(), CliError> {
    let mut client = hub::operator(global).await?;
    let request = hub::question(v1::CreateLoginLinkRequest {});
    let answer = client.create_login_link(request).await?.into_inner();
    let link = Link {
        url: answer.url,
        code: answer.code,
        expires_at_ms: answer.expires_at_ms,
        http_pin: answer.http_pin,
    };
    let lines = [
        ("link", link.url.clone()),
        ("valid until", printer::time(link.expires_at_ms)),
        ("key", link.http_pin.clone()),
    ];
    global.printer(args.output).show(&link, &lines)
}
