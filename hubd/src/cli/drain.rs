//! `drain`: the running hub takes no new commands, waits for those that run, and stops.

use std::os::fd::OwnedFd;
use std::time::Duration;

use clap::Args;
use cortex_proto::v1;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};
use serde_json::json;
use tokio::net::UnixStream;

use super::admin::{connect, connect_for_long, time};
use super::output::{self, Format, Unreachable};
use super::{DataArg, parse_duration};
use crate::config::{DataLayout, HubConfig};

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
    let process = process_of(&config).await?;
    let over = hub.drain_hub(request).await?.into_inner();
    if args.undo {
        let document = json!({ "draining": false, "running_tasks": over.running_tasks });
        output::show(args.format, &document, "new commands are taken again");
        return Ok(());
    }
    if over.undone {
        anyhow::bail!("somebody took it back: new commands are taken again");
    }
    let next = end_of(&config, started, process).await?;
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

/// The process of the hub that runs; none if it cannot be told, as from within another container.
async fn process_of(config: &HubConfig) -> anyhow::Result<Option<OwnedFd>> {
    let socket = UnixStream::connect(DataLayout::new(&config.data).socket()).await?;
    let pid = socket.peer_cred()?.pid().and_then(Pid::from_raw);
    Ok(pid.and_then(|pid| pidfd_open(pid, PidfdFlags::empty()).ok()))
}

/// Waits until that hub is gone. Returns when the next one started, if there is one already.
async fn end_of(
    config: &HubConfig,
    started: i64,
    process: Option<OwnedFd>,
) -> anyhow::Result<Option<i64>> {
    loop {
        // Each time anew: a connection outlives nothing that this waits for.
        let mut hub = match connect(config).await {
            Ok(hub) => hub,
            // It takes no calls any more. Its directory is free once it has ended.
            Err(error) if error.is::<Unreachable>() => {
                if let Some(process) = process {
                    tokio::task::spawn_blocking(move || {
                        poll(&mut [PollFd::new(&process, PollFlags::IN)], None)
                    })
                    .await??;
                }
                return Ok(None);
            }
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
