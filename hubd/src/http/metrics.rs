//! What the hub does, in the text format of Prometheus.
//!
//! Everything is counted or looked up when it is asked for; nothing here is named by what a node, a
//! caller or a request sent. Numbers tell how busy a mesh is, so that not everybody gets them: programs on
//! this machine do, operators who see everything, and whoever shows the token.

mod background;

use std::io;
use std::path::Path;

use axum::body::Body;
use cortex_proto::v1::TaskState;
use http::header::{CACHE_CONTROL, CONTENT_TYPE};
use http::{HeaderMap, HeaderValue, Response};
use prometheus::core::Collector;
use prometheus::proto::{Bucket, Histogram, Metric, MetricFamily, MetricType};
use prometheus::{Encoder as _, IntCounterVec, IntGaugeVec, Opts, TextEncoder};
use sha2::Digest as _;
use subtle::ConstantTimeEq as _;
use tokio::time::Instant;

use super::api::Api;
use super::credentials::bearer;
use super::error::{Problem, internal};
use super::health::Phase;
use crate::counters::{self, TIME_BOUNDS, Times};
use crate::grpc::auth::Peer;

/// Longest token.
const MAX_TOKEN_BYTES: usize = 1024;
/// Shortest token: one that nobody guesses.
const MIN_TOKEN_BYTES: usize = 16;

/// The hash of what has to be shown.
pub(super) struct MetricsToken([u8; 32]);

/// Reads the token.
///
/// # Errors
/// If there is none, or one that is too short or too long.
pub(super) fn token(path: &Path) -> io::Result<MetricsToken> {
    let text = std::fs::read_to_string(path)?;
    let token = text.trim();
    if !(MIN_TOKEN_BYTES..=MAX_TOKEN_BYTES).contains(&token.len()) {
        let text = format!("a token has {MIN_TOKEN_BYTES} to {MAX_TOKEN_BYTES} characters");
        return Err(io::Error::new(io::ErrorKind::InvalidData, text));
    }
    Ok(MetricsToken(sha2::Sha256::digest(token).into()))
}

/// Whether a request may see the numbers without being an operator's.
pub(super) fn may_see(
    token: Option<&MetricsToken>,
    connection: &Peer,
    headers: &HeaderMap,
) -> bool {
    let local =
        connection.address().is_some_and(|address| address.ip().to_canonical().is_loopback());
    let shown = bearer(headers).map(sha2::Sha256::digest);
    let knows = match (token, shown) {
        (Some(token), Some(shown)) => bool::from(token.0.ct_eq(&shown)),
        _ => false,
    };
    local || knows
}

/// Everything.
pub(super) fn response(api: &Api, phase: Phase) -> Result<Response<Body>, Problem> {
    let mut families = of_state(api, phase).map_err(|error| internal(&error))?;
    families.extend(background::of_events(api).map_err(|error| internal(&error))?);
    families.extend(background::of_workers(api).map_err(|error| internal(&error))?);
    families.extend(of_counters().map_err(|error| internal(&error))?);
    families.sort_by(|a, b| a.name().cmp(b.name()));
    let (encoder, mut text) = (TextEncoder::new(), Vec::new());
    encoder.encode(&families, &mut text).map_err(|error| internal(&error))?;
    let mut response = Response::new(Body::from(text));
    let headers = response.headers_mut();
    let kind = HeaderValue::from_str(encoder.format_type()).map_err(|error| internal(&error))?;
    headers.insert(CONTENT_TYPE, kind);
    headers.insert(CACHE_CONTROL, HeaderValue::from_static("no-store"));
    Ok(response)
}

/// A gauge with one label; `values` has what is said and how many.
fn gauge(
    name: &str,
    help: &str,
    label: &str,
    values: &[(&str, usize)],
) -> prometheus::Result<Vec<MetricFamily>> {
    let gauges = IntGaugeVec::new(Opts::new(name, help), &[label])?;
    for (value, count) in values {
        let count = i64::try_from(*count).unwrap_or(i64::MAX);
        gauges.get_metric_with_label_values(&[value])?.set(count);
    }
    Ok(gauges.collect())
}

fn single(name: &str, help: &str, value: i64) -> prometheus::Result<Vec<MetricFamily>> {
    let gauge = prometheus::IntGauge::new(name, help)?;
    gauge.set(value);
    Ok(gauge.collect())
}

fn counter(
    name: &str,
    help: &str,
    label: &str,
    values: &[(&str, u64)],
) -> prometheus::Result<Vec<MetricFamily>> {
    let counters = IntCounterVec::new(Opts::new(name, help), &[label])?;
    for (value, count) in values {
        counters.get_metric_with_label_values(&[value])?.inc_by(*count);
    }
    Ok(counters.collect())
}

fn count(name: &str, help: &str, value: u64) -> prometheus::Result<Vec<MetricFamily>> {
    let counter = prometheus::IntCounter::new(name, help)?;
    counter.inc_by(value);
    Ok(counter.collect())
}

/// Times that were counted elsewhere.
fn histogram(name: &str, help: &str, values: &[(&str, &Times)]) -> MetricFamily {
    let mut family = MetricFamily::default();
    family.set_name(name.to_owned());
    family.set_help(help.to_owned());
    family.set_field_type(MetricType::HISTOGRAM);
    let metric = |(operation, times): &(&str, &Times)| {
        let (up_to, all, sum) = times.read();
        let mut histogram = Histogram::default();
        histogram.set_sample_count(all);
        histogram.set_sample_sum(sum);
        let bucket = |(bound, count): (&f64, u64)| {
            let mut bucket = Bucket::default();
            bucket.set_upper_bound(*bound);
            bucket.set_cumulative_count(count);
            bucket
        };
        histogram.set_bucket(TIME_BOUNDS.iter().zip(up_to).map(bucket).collect());
        let mut label = prometheus::proto::LabelPair::default();
        label.set_name("operation".to_owned());
        label.set_value((*operation).to_owned());
        let mut metric = Metric::from_label(vec![label]);
        metric.set_histogram(histogram);
        metric
    };
    family.set_metric(values.iter().map(metric).collect());
    family
}

/// What there is at this moment.
fn of_state(api: &Api, phase: Phase) -> prometheus::Result<Vec<MetricFamily>> {
    let service = &api.service;
    let (mut online, mut offline, mut revoked, mut cordoned) = (0, 0, 0, 0);
    for view in service.registry.all() {
        if view.node.revoked_at_ms.is_some() {
            revoked += 1;
        } else if view.session.is_some() {
            online += 1;
        } else {
            offline += 1;
        }
        cordoned += i64::from(view.node.cordoned);
    }
    let states = service.relay.states();
    let of = |wanted: TaskState| states.iter().filter(|state| **state == wanted).count();
    let phases = [
        ("starting", usize::from(phase == Phase::Starting)),
        ("ready", usize::from(phase == Phase::Ready)),
        ("draining", usize::from(phase == Phase::Draining)),
    ];
    let workspaces = service.members.membership.all().len();
    let info = gauge(
        "cortex_hub_info",
        "The version of the hub.",
        "version",
        &[(env!("CARGO_PKG_VERSION"), 1)],
    )?;
    Ok([
        info,
        gauge("cortex_hub_phase", "Whether the hub starts, is ready or drains.", "phase", &phases)?,
        single(
            "cortex_hub_start_time_seconds",
            "When the hub started, in seconds since the Unix epoch.",
            service.started_at_ms / 1000,
        )?,
        gauge(
            "cortex_nodes",
            "Nodes that the hub knows.",
            "state",
            &[("online", online), ("offline", offline), ("revoked", revoked)],
        )?,
        single("cortex_nodes_cordoned", "Nodes that get no new commands.", cordoned)?,
        gauge(
            "cortex_tasks_open",
            "Commands without a verdict.",
            "state",
            &[
                ("accepted", of(TaskState::Accepted)),
                ("running", of(TaskState::Running)),
                ("interrupted", of(TaskState::Interrupted)),
            ],
        )?,
        single("cortex_workspaces", "Workspaces.", i64::try_from(workspaces).unwrap_or(i64::MAX))?,
        single(
            "cortex_http_logins",
            "Open logins of browsers and programs.",
            i64::try_from(api.sessions.count(Instant::now())).unwrap_or(i64::MAX),
        )?,
        single(
            "cortex_http_connections",
            "Connections to the HTTP side.",
            counters::HTTP_CONNECTIONS.get(),
        )?,
    ]
    .concat())
}

/// What has been done since the hub started.
fn of_counters() -> prometheus::Result<Vec<MetricFamily>> {
    let [finished, failed, cancelled] = [0, 1, 2].map(|n| counters::TASKS_ENDED[n].get());
    let answers = ["1xx", "2xx", "3xx", "4xx", "5xx"];
    let answers: Vec<_> = answers.into_iter().zip(&counters::HTTP_ANSWERS).collect();
    let answers: Vec<(&str, u64)> = answers.into_iter().map(|(c, n)| (c, n.get())).collect();
    let mut families = [
        count(
            "cortex_node_sessions_total",
            "Sessions of nodes that began.",
            counters::SESSIONS_BEGUN.get(),
        )?,
        count(
            "cortex_tasks_accepted_total",
            "Commands that were accepted.",
            counters::TASKS_ACCEPTED.get(),
        )?,
        counter(
            "cortex_tasks_ended_total",
            "Commands that got a verdict.",
            "state",
            &[("finished", finished), ("failed", failed), ("cancelled", cancelled)],
        )?,
        counter(
            "cortex_relay_bytes_total",
            "Bytes of output from nodes, and of standard input from callers.",
            "direction",
            &[("output", counters::OUTPUT_BYTES.get()), ("input", counters::INPUT_BYTES.get())],
        )?,
        count("cortex_sync_commits_total", "Commits of members.", counters::COMMITS.get())?,
        count(
            "cortex_sync_changes_rejected_total",
            "Changes of paths that were rejected.",
            counters::CHANGES_REJECTED.get(),
        )?,
        counter(
            "cortex_sync_pack_bytes_total",
            "Bytes of packs from members, and to members.",
            "direction",
            &[("in", counters::PACK_BYTES_IN.get()), ("out", counters::PACK_BYTES_OUT.get())],
        )?,
        count(
            "cortex_internal_errors_total",
            "Errors of the hub's own; each stands in the log with its id.",
            counters::INTERNAL_ERRORS.get(),
        )?,
        counter("cortex_http_answers_total", "Answers over HTTP.", "status", &answers)?,
        count(
            "cortex_http_turned_away_total",
            "Connections that were closed because there were too many.",
            counters::HTTP_TURNED_AWAY.get(),
        )?,
    ]
    .concat();
    families.push(histogram(
        "cortex_store_duration_seconds",
        "How long the databases took, from being asked to the answer.",
        &[("read", &counters::STORE_READS), ("write", &counters::STORE_WRITES)],
    ));
    Ok(families)
}
