//! Verbs of `workspace` that are for this node alone, over its local socket. Each answers within a
//! second, whatever the network does.

use std::ffi::OsString;
use std::os::unix::ffi::OsStrExt as _;
use std::time::Duration;

use clap::Subcommand;
use cortex_proto::v1;
use serde::Serialize;

use crate::cli::error::{CliError, Exit};
use crate::cli::units::parse_duration;
use crate::cli::{Global, Output, hub, local, printer};

#[derive(Debug, Subcommand)]
pub(super) enum NodeVerb {
    /// Stop syncing a workspace on this node, until `resume`; over restarts, too
    Pause {
        /// The workspace
        name: String,
    },
    /// Go on with a workspace that was paused
    Resume {
        /// The workspace
        name: String,
    },
    /// Look at everything now; done once this node and the hub are equal
    ///
    /// Ends with 6 if the hub cannot be reached, or is silent for longer than --patience. Nothing is
    /// lost by that: what was changed here follows by itself.
    Flush {
        /// The workspace; all of this node without it
        name: Option<String>,
        /// How long the hub may be silent
        #[arg(long, value_name = "DURATION", value_parser = parse_duration, default_value = "800ms")]
        patience: Duration,
        #[command(flatten)]
        output: Output,
    },
    /// Say why a path is, or is not, the same here and at the hub
    Explain {
        /// The workspace
        name: String,
        /// The path, relative to the workspace
        path: OsString,
        #[command(flatten)]
        output: Output,
    },
    /// Show or choose what this node does with its own changes and those of others
    ///
    /// two-way: changes go both ways. send-only: changes of others stay away from here. receive-only:
    /// what is changed here stays here. mirror: an exact copy; what is changed here is undone, and
    /// files that are here alone go to the trash.
    Mode {
        /// The workspace
        name: String,
        /// The mode from now on
        #[arg(value_parser = ["two-way", "send-only", "receive-only", "mirror"])]
        mode: Option<String>,
        #[command(flatten)]
        output: Output,
    },
}

/// What is special about one member now, beside how far it is.
#[derive(Clone, Debug, Serialize)]
pub(super) struct Condition {
    mode: &'static str,
    lag: u64,
    held_deletions: u64,
    kept: u64,
    withheld: u64,
    bytes_per_second: u64,
    eta_ms: Option<u64>,
    pub(super) next_retry_ms: Option<i64>,
}

impl Condition {
    pub(super) fn of(status: &v1::SyncStatus) -> Self {
        Self {
            mode: mode_name(status.mode),
            lag: status.head_seq.saturating_sub(status.applied_seq),
            held_deletions: status.held_deletions,
            kept: status.kept,
            withheld: status.withheld,
            bytes_per_second: status.bytes_per_second,
            eta_ms: (status.eta_ms > 0).then_some(status.eta_ms),
            next_retry_ms: (status.next_retry_ms > 0).then_some(status.next_retry_ms),
        }
    }

    /// The same for people, each with a comma before it; nothing if nothing is special.
    pub(super) fn words(&self) -> String {
        let mut text = String::new();
        if self.mode != "two-way" {
            text.push_str(&format!(", {}", self.mode));
        }
        for (count, what) in [
            (self.held_deletions, "deletions held"),
            (self.kept, "directories kept"),
            (self.withheld, "paths left different by the mode"),
        ] {
            if count > 0 {
                text.push_str(&format!(", {count} {what}"));
            }
        }
        if self.bytes_per_second > 0 {
            text.push_str(&format!(", {}/s", printer::size(self.bytes_per_second)));
        }
        if let Some(eta) = self.eta_ms {
            text.push_str(&format!(", {} s left", eta.div_ceil(1000)));
        }
        if let Some(at) = self.next_retry_ms {
            text.push_str(&format!(", tries again at {}", printer::time(at)));
        }
        text
    }
}

fn mode_name(mode: i32) -> &'static str {
    match v1::MemberMode::try_from(mode) {
        // An older agent knows no other.
        Ok(v1::MemberMode::TwoWay | v1::MemberMode::Unspecified) => "two-way",
        Ok(v1::MemberMode::SendOnly) => "send-only",
        Ok(v1::MemberMode::ReceiveOnly) => "receive-only",
        Ok(v1::MemberMode::Mirror) => "mirror",
        Err(_) => "unknown",
    }
}

#[derive(Serialize)]
struct FlushedJson {
    flushed: Vec<String>,
    problems: Vec<FlushProblemJson>,
}

#[derive(Serialize)]
struct FlushProblemJson {
    workspace: String,
    code: String,
    message: String,
}

#[derive(Serialize)]
struct ExplainedJson {
    workspace: String,
    path: String,
    code: String,
    text: String,
    details: Vec<String>,
    here: Option<String>,
    hub: Option<String>,
    agreed: Option<String>,
    problems: Vec<ExplainedProblem>,
}

#[derive(Serialize)]
struct ExplainedProblem {
    path: String,
    code: String,
    message: String,
    first_seen_ms: i64,
}

#[derive(Serialize)]
struct ModeJson {
    workspace: String,
    mode: &'static str,
}

pub(super) async fn run(global: &Global, verb: NodeVerb) -> Result<(), CliError> {
    match verb {
        NodeVerb::Pause { name } => pause(global, name, true).await,
        NodeVerb::Resume { name } => pause(global, name, false).await,
        NodeVerb::Flush { name, patience, output } => flush(global, name, patience, output).await,
        NodeVerb::Explain { name, path, output } => explain(global, name, path, output).await,
        NodeVerb::Mode { name, mode, output } => choose_mode(global, name, mode, output).await,
    }
}

async fn pause(global: &Global, workspace: String, paused: bool) -> Result<(), CliError> {
    let mut agent = local::agent(global).await?;
    agent.pause_local(hub::question(v1::PauseLocalRequest { workspace, paused })).await?;
    Ok(())
}

async fn flush(
    global: &Global,
    workspace: Option<String>,
    patience: Duration,
    output: Output,
) -> Result<(), CliError> {
    let mut agent = local::agent(global).await?;
    let patience_ms = u32::try_from(patience.as_millis()).unwrap_or(u32::MAX);
    let request = v1::FlushLocalRequest { workspace: workspace.unwrap_or_default(), patience_ms };
    // Without a time limit: the agent ends it once nothing moves.
    let answer = agent.flush_local(request).await?.into_inner();
    let problem = |problem: v1::FlushProblem| FlushProblemJson {
        workspace: problem.workspace,
        code: problem.code,
        message: problem.message,
    };
    let json = FlushedJson {
        flushed: answer.workspaces,
        problems: answer.problems.into_iter().map(problem).collect(),
    };
    // Also of those that are equal where others are not; for people, nothing if there is none.
    let sentence = match json.flushed.as_slice() {
        [] if !json.problems.is_empty() => String::new(),
        flushed => format!("{}: equal with the hub", flushed.join(", ")),
    };
    global.printer(output).say(&sentence, &json)?;
    not_flushed(&json.problems).map_or(Ok(()), Err)
}

/// What there is to say of those that are not equal with the hub.
fn not_flushed(problems: &[FlushProblemJson]) -> Option<CliError> {
    let first = problems.first()?;
    let is_away = |problem: &FlushProblemJson| matches!(&*problem.code, "offline" | "silent");
    let exit = if problems.iter().all(is_away) { Exit::Unreachable } else { Exit::Failed };
    let each = problems.iter().map(|problem| format!("{}: {}", problem.workspace, problem.message));
    let error = CliError::new(exit, each.collect::<Vec<_>>().join("; "));
    Some(error.hint(match first.code.as_str() {
        "paused" => format!("cortex-agent workspace resume {}", first.workspace),
        _ => format!("cortex-agent workspace status {} --local", first.workspace),
    }))
}

async fn explain(
    global: &Global,
    workspace: String,
    path: OsString,
    output: Output,
) -> Result<(), CliError> {
    let mut agent = local::agent(global).await?;
    let bytes = path.as_bytes();
    let bytes = bytes.strip_prefix(b"./").unwrap_or(bytes);
    let bytes = bytes.strip_suffix(b"/").unwrap_or(bytes).to_vec();
    let request =
        v1::ExplainLocalRequest { workspace: workspace.clone(), path: bytes.clone().into() };
    let found = agent.explain_local(hub::question(request)).await?.into_inner();
    let filled = |text: String| (!text.is_empty()).then_some(text);
    let problem = |problem: v1::SyncProblem| ExplainedProblem {
        path: String::from_utf8_lossy(&problem.path).into_owned(),
        code: problem.code,
        message: problem.message,
        first_seen_ms: problem.first_seen_ms,
    };
    let json = ExplainedJson {
        workspace,
        path: String::from_utf8_lossy(&bytes).into_owned(),
        code: found.code,
        text: found.text,
        details: found.details,
        here: filled(found.here),
        hub: filled(found.hub),
        agreed: filled(found.agreed),
        problems: found.problems.into_iter().map(problem).collect(),
    };
    let nothing = || "nothing".to_owned();
    let mut lines = vec![
        ("state", format!("{}: {}", json.code, json.text)),
        ("here", json.here.clone().unwrap_or_else(nothing)),
        ("hub", json.hub.clone().unwrap_or_else(nothing)),
        ("agreed", json.agreed.clone().unwrap_or_else(nothing)),
    ];
    lines.extend(json.details.iter().map(|detail| ("note", detail.clone())));
    for problem in &json.problems {
        let text = format!("{} ({})", problem.message, problem.code);
        let text = if problem.path.is_empty() { text } else { format!("{}: {text}", problem.path) };
        lines.push(("problem", text));
    }
    global.printer(output).show(&json, &lines)
}

async fn choose_mode(
    global: &Global,
    workspace: String,
    mode: Option<String>,
    output: Output,
) -> Result<(), CliError> {
    let mode = match mode.as_deref() {
        None => v1::MemberMode::Unspecified,
        Some("send-only") => v1::MemberMode::SendOnly,
        Some("receive-only") => v1::MemberMode::ReceiveOnly,
        Some("mirror") => v1::MemberMode::Mirror,
        Some(_) => v1::MemberMode::TwoWay,
    };
    let mut agent = local::agent(global).await?;
    let request = v1::ModeLocalRequest { workspace: workspace.clone(), mode: mode.into() };
    let answer = agent.mode_local(hub::question(request)).await?.into_inner();
    let mode = mode_name(answer.mode);
    global.printer(output).say(mode, &ModeJson { workspace, mode })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_workspace_that_is_not_equal_is_named_and_only_a_hub_that_is_away_is_6() {
        let problem = |workspace: &str, code: &str| FlushProblemJson {
            workspace: workspace.to_owned(),
            code: code.to_owned(),
            message: format!("it is {code}"),
        };
        assert!(not_flushed(&[]).is_none());
        for (second, exit) in [("silent", Exit::Unreachable), ("paused", Exit::Failed)] {
            let error = not_flushed(&[problem("a", "offline"), problem("b", second)]).unwrap();
            assert_eq!(error.message(), format!("a: it is offline; b: it is {second}"));
            assert_eq!(error.exit(), exit);
        }
    }
}
