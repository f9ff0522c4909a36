//! `worker`: the hub's background work.

use std::time::Duration;

use anyhow::bail;
use clap::Subcommand;
use cortex_proto::v1;
use serde_json::{Value, json};

use super::admin::{connect, connect_for_long, time};
use super::output::{self, Format, StillWorks};
use super::{DataArg, parse_duration};

#[derive(Subcommand)]
pub(super) enum WorkerCommand {
    /// List the hub's workers: what each is there for, its last run and its next
    List {
        #[command(flatten)]
        data: DataArg,
        #[command(flatten)]
        format: Format,
    },
    /// Run a worker now, and wait until it is done
    Run {
        /// Its name
        name: String,
        /// How long to wait; a run that takes longer goes on without being waited for
        #[arg(long, value_name = "DUR", default_value = "1h", value_parser = parse_duration)]
        timeout: Duration,
        #[command(flatten)]
        data: DataArg,
        #[command(flatten)]
        format: Format,
    },
}

pub(super) async fn worker(command: WorkerCommand) -> anyhow::Result<()> {
    match command {
        WorkerCommand::List { data, format } => {
            let request = v1::ListWorkersRequest {};
            let workers = connect(&data.config()).await?.list_workers(request).await?.into_inner();
            let items = workers.workers.into_iter().map(worker_json).collect();
            let columns =
                ["name", "state", "period", "last_run", "last_took", "next_run", "last_result"];
            output::list(format, &columns, items);
        }
        WorkerCommand::Run { name, timeout, data, format } => {
            let request = v1::RunWorkerRequest { name: name.clone() };
            // Some read everything there is.
            let mut hub = connect_for_long(&data.config()).await?;
            let Ok(ended) = tokio::time::timeout(timeout, hub.run_worker(request)).await else {
                return Err(StillWorks { worker: name, waited: timeout }.into());
            };
            let worker = ended?.into_inner();
            let (name, failed) = (worker.name.clone(), worker.last_failed);
            let (result, id) = (worker.last_result.clone(), worker.error_id.clone());
            output::show(format, &worker_json(worker), &format!("{name}: {result}"));
            if failed {
                bail!("the run failed (hint: the hub's log tells more under error id {id})");
            }
        }
    }
    Ok(())
}

fn worker_json(worker: v1::WorkerInfo) -> Value {
    let span = |ms: u64| format!("{:?}", Duration::from_millis(ms));
    let ended = worker.last_began_ms != 0;
    json!({
        "name": worker.name,
        "purpose": worker.purpose,
        "state": worker.state,
        "period": span(worker.period_ms),
        "period_ms": worker.period_ms,
        "runs": worker.runs,
        "failures": worker.failures,
        "panics": worker.panics,
        "running_since": time(worker.running_since_ms),
        "last_run": time(worker.last_began_ms),
        "last_took": ended.then(|| span(worker.last_took_ms)),
        "last_took_ms": ended.then_some(worker.last_took_ms),
        "last_result": ended.then_some(worker.last_result),
        "last_failed": worker.last_failed,
        "error_id": Some(worker.error_id).filter(|id| !id.is_empty()),
        "next_run": time(worker.next_run_ms),
    })
}
