//! `ca pin|status|rotate`.

use cortex_proto::v1;
use serde_json::json;

use super::admin::connect;
use super::output::{self, Format};
use super::{CaCommand, serve};

/// What nobody can count for the user.
pub(super) const OPERATORS: &str = "\
Only nodes can be counted. An operator learns of the new authority, and gets a certificate of it, with
any command of cortex-agent between `ca rotate issue` and `ca rotate retire` (and has to have run one
between `prepare` and `trust-only` to believe the hub after that). Who ran none logs in again:
cortex-hubd operator create.";

pub(super) async fn ca(command: CaCommand) -> anyhow::Result<()> {
    match command {
        CaCommand::Pin(data) => serve::pin(&data.config()).await,
        CaCommand::Status { data, format } => {
            let request = v1::CaStatusRequest {};
            let status = connect(&data.config()).await?.ca_status(request).await?.into_inner();
            show(format, &status);
            Ok(())
        }
        CaCommand::Rotate { stage, force, data, format } => {
            let request = v1::RotateCaRequest { stage, force };
            let status = connect(&data.config()).await?.rotate_ca(request).await?.into_inner();
            show(format, &status);
            Ok(())
        }
    }
}

fn show(format: Format, status: &v1::CaStatusResponse) {
    let other = Some(&status.other_pin).filter(|pin| !pin.is_empty());
    let document = json!({
        "stage": status.stage,
        "current_pin": status.current_pin,
        "other_pin": other,
        "nodes_moved": status.nodes_moved,
        "nodes_total": status.nodes_total,
        "nodes_not_moved": status.nodes_not_moved,
    });
    let mut text =
        format!("stage          {}\nsigns members  {}\n", status.stage, status.current_pin);
    if let Some(other) = other {
        text.push_str(&format!("other          {other}\n"));
    }
    text.push_str(&format!(
        "nodes          {} of {} have a certificate of the one that signs",
        status.nodes_moved, status.nodes_total
    ));
    if !status.nodes_not_moved.is_empty() {
        text.push_str(&format!("\nnot moved      {}", status.nodes_not_moved.join(", ")));
        let named = u32::try_from(status.nodes_not_moved.len()).unwrap_or(u32::MAX);
        if status.nodes_total - status.nodes_moved > named {
            text.push_str(", …");
        }
    }
    output::show(format, &document, &text);
}
