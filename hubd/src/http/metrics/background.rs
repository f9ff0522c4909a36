//! Numbers of what nobody asks for: events, and the hub's workers by their names.

use prometheus::core::Collector as _;
use prometheus::proto::MetricFamily;
use prometheus::{GaugeVec, Opts};

use super::{Api, count, counter, gauge, single};
use crate::worker::{LastRun, WorkerStatus};

/// What has become of events.
pub(super) fn of_events(api: &Api) -> prometheus::Result<Vec<MetricFamily>> {
    let counters = api.service.events.bus.counters();
    let subscriptions = i64::try_from(counters.subscriptions).unwrap_or(i64::MAX);
    Ok([
        count("cortex_events_total", "Events that happened.", counters.published)?,
        count(
            "cortex_events_unwritten_total",
            "Events that were lost because the disk did not take them in time.",
            counters.unwritten,
        )?,
        count(
            "cortex_events_missed_total",
            "Events that those who follow were told they missed.",
            counters.missed,
        )?,
        single(
            "cortex_event_subscriptions",
            "How many times events are followed, over gRPC and HTTP.",
            subscriptions,
        )?,
    ]
    .concat())
}

/// Workers, by name: names are the hub's own.
pub(super) fn of_workers(api: &Api) -> prometheus::Result<Vec<MetricFamily>> {
    let workers = api.service.workers.list();
    let counted = |value: fn(&WorkerStatus) -> u64| -> Vec<(&str, u64)> {
        workers.iter().map(|worker| (worker.name, value(worker))).collect()
    };
    let last = |name: &str, help: &str, value: fn(&LastRun) -> f64| {
        let gauges = GaugeVec::new(Opts::new(name, help), &["worker"])?;
        for worker in &workers {
            // Of one that has not run yet there is no number.
            let Some(last) = &worker.last else { continue };
            gauges.get_metric_with_label_values(&[worker.name])?.set(value(last));
        }
        Ok::<_, prometheus::Error>(gauges.collect())
    };
    let failed: Vec<_> = workers
        .iter()
        .filter_map(|worker| {
            let last = worker.last.as_ref()?;
            Some((worker.name, usize::from(last.error_id.is_some())))
        })
        .collect();
    Ok([
        counter(
            "cortex_worker_runs_total",
            "Runs that have ended.",
            "worker",
            &counted(|worker| worker.runs),
        )?,
        counter(
            "cortex_worker_failures_total",
            "Runs that failed, panics among them.",
            "worker",
            &counted(|worker| worker.failures),
        )?,
        counter(
            "cortex_worker_panics_total",
            "Runs that panicked.",
            "worker",
            &counted(|worker| worker.panics),
        )?,
        gauge("cortex_worker_last_run_failed", "Whether the last run failed.", "worker", &failed)?,
        last("cortex_worker_last_run_duration_seconds", "How long the last run took.", |last| {
            last.took.as_secs_f64()
        })?,
        last(
            "cortex_worker_last_run_timestamp_seconds",
            "When the last run ended, in seconds since the Unix epoch.",
            |last| seconds(last.began_ms) + last.took.as_secs_f64(),
        )?,
    ]
    .concat())
}

/// Whole seconds: what is exact in this type for longer than anybody waits.
fn seconds(ms: i64) -> f64 {
    u32::try_from(ms / 1000).map_or(f64::from(u32::MAX), f64::from)
}
