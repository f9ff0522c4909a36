//! `drain`: the running hub takes no new commands, waits for those that run, and stops.

use std::time::Duration;

use clap::Args;
use cortex_proto::v1;
use serde_json::json;

use super::admin::{connect, connect_for_long, time};
use super::output::{self, Format, Unreachable};
use super::{DataArg, parse_duration};
use crate::config::HubConfig;

/// How often the hub that stops is asked whether it is still there.
const LOOK: Duration = Duration::from_millis(100);

#[derive(Args)]
pub(super) struct DrainArgs {
    /// How long to wait for commands that run, such as 10m [default: the setting drain_wait]
    #[arg(long, value_name = "DUR", value_parser = parse_duration, conflicts_with = "undo")]
    wait: Option<Duration>,
    /// Take new commands again
    #[arg(long)]
    undo: bool,
    #[command(flatten)]
    data: DataArg,
    #[command(flatten)]
    format: Format,
}

pub(super) async fn drain(args: DrainArgs) -> anyhow::Result<()> {
    let config = args.data.config();
    // As long as commands run.
    let mut hub = connect_for_long(&config).await?;
    let started = hub.hub_status(v1::HubStatusRequest {}).await?.into_inner().started_at_ms;
    let wait_ms = args.wait.map_or(0, |wait| u64::try_from(wait.as_millis()).unwrap_or(u64::MAX));
    let request = v1::DrainHubRequest { wait_ms, undo: args.undo };
    let over = hub.drain_hub(request).await?.into_inner();
    if args.undo {
        let document = json!({ "draining": false, "running_tasks": over.running_tasks });
        output::show(args.format, &document, "new commands are taken again");
        return Ok(());
    }
    if over.undone {
        anyhow::bail!("somebody took it back: new commands are taken again");
    }
    let next = end_of(&config, started).await?;
    let document = json!({
        "stopped": true,
        "handed_over": over.running_tasks,
        "next_started_at": next.and_then(time),
    });
    let left = match over.running_tasks {
        0 => "nothing ran any more".to_owned(),
        left => format!("{left} commands go on and are handed to the next hub"),
    };
    let next = if next.is_some() { "; the next one runs" } else { "" };
    output::show(args.format, &document, &format!("the hub has stopped: {left}{next}"));
    Ok(())
}

/// Waits until that hub is gone. Returns when the next one started, if there is one already.
async fn end_of(config: &HubConfig, started: i64) -> anyhow::Result<Option<i64>> {
    loop {
        // Each time anew: a connection outlives nothing that this waits for.
        let mut hub = match connect(config).await {
            Ok(hub) => hub,
            Err(error) if error.is::<Unreachable>() => return Ok(None),
            Err(error) => return Err(error),
        };
        // One that is just stopping does not answer.
        if let Ok(status) = hub.hub_status(v1::HubStatusRequest {}).await {
            let status = status.into_inner();
            if status.started_at_ms != started {
                return Ok(Some(status.started_at_ms));
            }
        }
        tokio::time::sleep(LOOK).await;
    }
}
