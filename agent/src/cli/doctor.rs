//! `doctor`: what would keep this node, or this user's login, from working, each with what helps.

use std::io;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;
use cortex_proto::v1;
use cortex_shared::clock::unix_ms;
use serde::Serialize;

use super::error::CliError;
use super::node::skew_text;
use super::printer::Row;
use super::{Global, Output, hub, local, printer};
use crate::client::{ConnectError, Purpose, certificate_refusal};
use crate::config::{Ceiling, ConfigError, Settings, StateDir};
use crate::identity::NodeIdentity;
use crate::link::session::MAX_SKEW_MS;
use crate::sandbox::{Launcher, exposed};

/// Free disk below which it is worth a word.
const LOW_DISK_BYTES: u64 = 1024 * 1024 * 1024;
/// Watches below which a large tree is polled instead of watched.
const FEW_WATCHES: u64 = 65_536;
/// Life of a certificate below which it should have been renewed.
const SHORT_LIFE: Duration = Duration::from_secs(2 * 60 * 60);
const STATE_DIRECTORY: &str = "state directory";
/// Life of a login below which somebody should make a new one.
const SHORT_LOGIN: Duration = Duration::from_secs(3 * 24 * 60 * 60);

/// Look for what keeps this node, or your login, from working, and say what helps
#[derive(Debug, Args)]
#[command(after_help = "\
Checks the state directory, the identity, the way to the hub, the clock, what the kernel can enforce,
file watching and the disk; and, where you are logged in, the way to the hub as an operator. Changes
nothing. Ends with 1 if anything fails.")]
pub(crate) struct DoctorArgs {
    #[command(flatten)]
    output: Output,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
enum Level {
    Ok,
    Warn,
    Fail,
}

#[derive(Debug, Serialize)]
struct Finding {
    check: &'static str,
    result: Level,
    detail: String,
    hint: Option<String>,
}

impl Finding {
    fn new(check: &'static str, result: Level, detail: impl Into<String>) -> Self {
        Self { check, result, detail: detail.into(), hint: None }
    }

    fn hint(mut self, hint: impl Into<String>) -> Self {
        let hint = hint.into();
        self.hint = (!hint.is_empty()).then_some(hint);
        self
    }
}

impl Row for Finding {
    const COLUMNS: &'static [&'static str] = &["RESULT", "CHECK", "DETAIL"];

    fn cells(&self) -> Vec<String> {
        let result = match self.result {
            Level::Ok => "ok",
            Level::Warn => "warn",
            Level::Fail => "fail",
        };
        let detail = match &self.hint {
            Some(hint) => format!("{} (hint: {hint})", self.detail),
            None => self.detail.clone(),
        };
        vec![result.to_owned(), self.check.to_owned(), detail]
    }
}

/// Looks; the result is the exit code.
pub(crate) async fn doctor(global: &Global, args: DoctorArgs) -> Result<u8, CliError> {
    let state = global.state()?;
    let mut findings = login(global).await;
    // An operator's machine need not be a node. What would keep one from working is said all the same.
    let may_be_none = !findings.is_empty() && global.state.is_none();
    let mut is_none = false;
    findings.push(state_permissions(&state));
    let settings = Settings::load(&state);
    findings.extend(ceiling(&state));
    match NodeIdentity::load(&state) {
        Ok(Some(identity)) => {
            findings.push(Finding::new(
                "identity",
                Level::Ok,
                format!("{} ({})", identity.name, identity.node_id),
            ));
            findings.push(certificate(&identity, unix_ms()));
            match settings {
                Ok(settings) => {
                    findings.extend(hub_findings(&identity, &settings).await);
                    findings.push(disk("workspace disk", existing(&settings.workspace_root)));
                    findings.extend(shown(&state, &settings));
                }
                Err(error) => findings.push(failed("settings", error.into())),
            }
            findings.extend(agent(global).await);
        }
        Ok(None) if may_be_none => {
            is_none = true;
            findings.retain(|finding| finding.check != STATE_DIRECTORY);
            let text = "this machine is no node, and need not be one for a login";
            findings.push(Finding::new("identity", Level::Ok, text));
        }
        Ok(None) => {
            let not_joined = ConfigError::NotJoined { state: state.path().into() };
            findings.push(failed("identity", not_joined.into()));
        }
        Err(error) => findings.push(failed("identity", error.into())),
    }
    let hidden = [state.path().to_owned()];
    let require_cgroup = Settings::load(&state).is_ok_and(|own| own.sandbox.require_cgroup);
    let found = Launcher::default().probe(&hidden, require_cgroup).await;
    let mut sandbox = sandbox(&(&found).into());
    for finding in sandbox.iter_mut().filter(|finding| is_none && finding.result == Level::Fail) {
        finding.result = Level::Warn;
    }
    findings.extend(sandbox);
    findings.push(inotify());
    findings.push(disk("state disk", existing(state.path())));
    global.printer(args.output).list(&findings)?;
    Ok(u8::from(findings.iter().any(|finding| finding.result == Level::Fail)))
}

/// The way to the hub as an operator; nothing where nobody is logged in.
async fn login(global: &Global) -> Vec<Finding> {
    const CHECK: &str = "login";
    let Ok(config) = global.config() else { return Vec::new() };
    let loaded = config.choose(global.context.as_deref()).and_then(|context| {
        let credentials = config.credentials(&context)?;
        Ok((context, credentials))
    });
    let (context, credentials) = match loaded {
        Ok(loaded) => loaded,
        Err(ConfigError::NotLoggedIn) => return Vec::new(),
        Err(error) => return vec![failed(CHECK, error.into())],
    };
    let who = format!("{} ({}), context {:?}", context.operator, context.role, context.name);
    let mut findings = vec![login_life(&who, credentials.not_after_ms(), unix_ms())];
    match context.client(credentials) {
        Ok(client) => {
            let address = context.hub.to_string();
            findings.push(reached(&client, &address).await);
            if findings.iter().all(|finding| finding.result != Level::Fail) {
                findings.push(login_accepted(global).await);
            }
        }
        Err(error) => findings.push(failed("certificate and key", error.into())),
    }
    findings
}

/// Nobody renews a login but its owner.
fn login_life(who: &str, not_after_ms: i64, now_ms: i64) -> Finding {
    const CHECK: &str = "login";
    let end = printer::time(not_after_ms);
    let anew = "an admin makes a new one with `cortex-hubd operator create`; compare the clock with `date -u`";
    let left = u64::try_from(not_after_ms.saturating_sub(now_ms)).map(Duration::from_millis);
    match left {
        Err(_) => Finding::new(CHECK, Level::Fail, format!("{who}: ended at {end}")).hint(anew),
        Ok(left) => {
            let level = if left < SHORT_LOGIN { Level::Warn } else { Level::Ok };
            let finding = Finding::new(CHECK, level, format!("{who}, until {end}"));
            if level == Level::Ok { finding } else { finding.hint(anew) }
        }
    }
}

async fn login_accepted(global: &Global) -> Finding {
    const CHECK: &str = "hub accepts login";
    let asked = async {
        let mut client = hub::operator(global).await?;
        client.who_am_i(hub::question(v1::WhoAmIRequest {})).await?;
        Ok::<_, CliError>(())
    };
    match asked.await {
        Ok(()) => Finding::new(CHECK, Level::Ok, "yes"),
        Err(error) => failed(CHECK, error),
    }
}

fn failed(check: &'static str, error: CliError) -> Finding {
    let text = error.render();
    let mut hint = String::new();
    let mut detail = Vec::new();
    for line in text.lines() {
        match line.split_once(": ") {
            Some(("hint", rest)) => rest.clone_into(&mut hint),
            Some(("error" | "cause", rest)) => detail.push(rest),
            _ => detail.push(line),
        }
    }
    Finding::new(check, Level::Fail, detail.join(": ")).hint(hint)
}

/// What the owner shows to strict commands.
fn shown(state: &StateDir, settings: &Settings) -> Vec<Finding> {
    const CHECK: &str = "read-only path";
    let apart = settings.apart(state);
    let look = |path: &PathBuf| match exposed::check(path, &apart) {
        Ok(true) => Finding::new(CHECK, Level::Ok, path.display().to_string()),
        Ok(false) => {
            let text = format!("{} is not there, and is not shown to commands", path.display());
            Finding::new(CHECK, Level::Warn, text)
                .hint("mount or create it, or take it out of sandbox.read_only_paths in agent.json")
        }
        Err(refusal) => {
            let text = format!("{refusal}; strict commands are refused");
            Finding::new(CHECK, Level::Fail, text)
                .hint("take it out of sandbox.read_only_paths in agent.json")
        }
    };
    settings.sandbox.read_only_paths.iter().map(look).collect()
}

fn state_permissions(state: &StateDir) -> Finding {
    const CHECK: &str = STATE_DIRECTORY;
    let path = state.path();
    let metadata = match std::fs::metadata(path) {
        Ok(metadata) => metadata,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            return Finding::new(CHECK, Level::Warn, format!("{} does not exist", path.display()))
                .hint("`cortex-agent join` creates it; or name another with --state");
        }
        Err(error) => {
            return Finding::new(CHECK, Level::Fail, format!("{}: {error}", path.display()));
        }
    };
    let mode = metadata.permissions().mode() & 0o7777;
    let own = rustix::process::geteuid().as_raw();
    if metadata.uid() != own {
        let detail = format!("{} belongs to user {}", path.display(), metadata.uid());
        return Finding::new(CHECK, Level::Fail, detail).hint("run as that user");
    }
    if mode & 0o077 != 0 {
        return Finding::new(
            CHECK,
            Level::Warn,
            format!("{} may be entered by others (mode {mode:o})", path.display()),
        )
        .hint(format!("chmod 700 {}", path.display()));
    }
    Finding::new(CHECK, Level::Ok, path.display().to_string())
}

/// A ceiling that is not believed. What cannot be read is a finding of the settings.
fn ceiling(state: &StateDir) -> Option<Finding> {
    let ceiling = state.owner().and_then(|owner| Ceiling::load(state, owner)).ok()?;
    let problem = ceiling.problem?;
    Some(Finding::new("ceiling", Level::Warn, problem.to_string()).hint(problem.hint()))
}

fn certificate(identity: &NodeIdentity, now_ms: i64) -> Finding {
    const CHECK: &str = "certificate";
    let not_after = identity.credentials.not_after_ms();
    let detail = format!("valid until {}", printer::time(not_after));
    let left = u64::try_from(not_after.saturating_sub(now_ms)).map(Duration::from_millis);
    match left {
        Err(_) => {
            Finding::new(CHECK, Level::Fail, format!("expired at {}", printer::time(not_after)))
                .hint("the agent recovers it by itself, and so does `cortex-agent identity recover`; compare the clock with `date -u`")
        }
        Ok(left) if left < SHORT_LIFE => Finding::new(CHECK, Level::Warn, detail)
            .hint("it is renewed while the agent is connected"),
        Ok(_) => Finding::new(CHECK, Level::Ok, detail),
    }
}

async fn hub_findings(identity: &NodeIdentity, settings: &Settings) -> Vec<Finding> {
    let client = match identity.client(settings.hub.clone()) {
        Ok(client) => client,
        Err(error) => return vec![failed("certificate and key", error.into())],
    };
    let mut findings = vec![reached(&client, &settings.hub.to_string()).await];
    if findings.iter().all(|finding| finding.result != Level::Fail) {
        findings.push(accepted(&client).await);
    }
    findings
}

/// Whether the hub is there, and is this mesh's.
async fn reached(client: &crate::client::HubClient, address: &str) -> Finding {
    match client.probe().await {
        Ok(_) => Finding::new("hub identity", Level::Ok, format!("{address} is this mesh's")),
        Err(error) => {
            let check = match error {
                ConnectError::Resolve { .. } => "hub name",
                ConnectError::Unreachable { .. } | ConnectError::TimedOut { .. } => "hub address",
                _ => "hub identity",
            };
            failed(check, error.into())
        }
    }
}

/// Whether the hub accepts this node. In TLS 1.3 its refusal arrives with the first answer, so
/// something has to be asked: a workspace that cannot exist, which changes nothing.
async fn accepted(client: &crate::client::HubClient) -> Finding {
    const CHECK: &str = "hub accepts node";
    let channel = match client.connect(Purpose::Control).await {
        Ok(channel) => channel,
        Err(error) => return failed(CHECK, error.into()),
    };
    let mut node = cortex_proto::v1::node_client::NodeClient::new(channel);
    let nothing = v1::RequestAttachRequest { workspace: String::new() };
    match node.request_attach(hub::question(nothing)).await {
        Err(status) if certificate_refusal(&status).is_some() => failed(CHECK, status.into()),
        Err(status) if status.code() == tonic::Code::Unauthenticated => {
            failed(CHECK, status.into())
        }
        Err(status) if status.code() == tonic::Code::Unavailable => failed(CHECK, status.into()),
        Ok(_) | Err(_) => Finding::new(CHECK, Level::Ok, "yes"),
    }
}

async fn agent(global: &Global) -> Vec<Finding> {
    const CHECK: &str = "agent";
    let asked = async {
        let mut agent = local::agent(global).await?;
        let question = hub::question(v1::AgentStatusRequest {});
        Ok::<_, CliError>(agent.agent_status(question).await?.into_inner())
    };
    let status = match asked.await {
        Ok(status) => status,
        Err(error) => return vec![Finding { result: Level::Warn, ..failed(CHECK, error) }],
    };
    let mut findings = vec![if status.connected {
        Finding::new(CHECK, Level::Ok, format!("process {}, connected", status.process_id))
    } else {
        Finding::new(CHECK, Level::Warn, format!("not connected: {}", status.link_problem))
    }];
    if status.connected {
        findings.push(clock(status.clock_skew_ms));
    }
    if !status.identity_problem.is_empty() {
        findings.push(Finding::new("renewal", Level::Fail, status.identity_problem));
    }
    findings
}

fn clock(skew_ms: i64) -> Finding {
    let detail = format!("this machine's clock is {}", skew_text(skew_ms));
    if skew_ms.unsigned_abs() <= MAX_SKEW_MS {
        return Finding::new("clock", Level::Ok, detail);
    }
    Finding::new("clock", Level::Warn, detail)
        .hint("certificates may seem expired; `timedatectl set-ntp true` keeps it right")
}

fn sandbox(report: &v1::SandboxReport) -> Vec<Finding> {
    const CHECK: &str = "sandbox";
    if report.strict_available {
        let detail = format!(
            "strict is enforced (Landlock ABI {}, cgroup {})",
            report.landlock_abi, report.cgroup
        );
        let mut findings = vec![Finding::new(CHECK, Level::Ok, detail)];
        findings.extend(report.missing.iter().map(|piece| {
            Finding::new(CHECK, Level::Warn, format!("{}: {}", piece.what, piece.why))
                .hint(piece.remedy.clone())
        }));
        return findings;
    }
    if report.missing.is_empty() {
        return vec![Finding::new(CHECK, Level::Fail, "strict commands are refused")];
    }
    report
        .missing
        .iter()
        .map(|piece| {
            Finding::new(
                CHECK,
                Level::Fail,
                format!("strict commands are refused: {}: {}", piece.what, piece.why),
            )
            .hint(piece.remedy.clone())
        })
        .collect()
}

fn inotify() -> Finding {
    const CHECK: &str = "file watching";
    let read = |name: &str| {
        std::fs::read_to_string(format!("/proc/sys/fs/inotify/{name}"))
            .ok()
            .and_then(|text| text.trim().parse::<u64>().ok())
    };
    match (read("max_user_watches"), read("max_user_instances")) {
        (Some(watches), Some(instances)) => {
            let detail = format!("{watches} watches, {instances} instances for each user");
            if watches < FEW_WATCHES {
                Finding::new(CHECK, Level::Warn, detail).hint(
                    "sysctl fs.inotify.max_user_watches=524288; larger trees are polled otherwise",
                )
            } else {
                Finding::new(CHECK, Level::Ok, detail)
            }
        }
        _ => Finding::new(CHECK, Level::Warn, "the kernel's limits cannot be read")
            .hint("workspaces are polled if they cannot be watched"),
    }
}

/// The nearest directory above that exists.
fn existing(path: &Path) -> &Path {
    path.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"))
}

fn disk(check: &'static str, path: &Path) -> Finding {
    match rustix::fs::statvfs(path) {
        Ok(stat) => {
            let free = stat.f_bavail.saturating_mul(stat.f_frsize);
            let detail = format!("{} free in {}", printer::size(free), path.display());
            if free < LOW_DISK_BYTES {
                Finding::new(check, Level::Warn, detail).hint("make room before workspaces grow")
            } else {
                Finding::new(check, Level::Ok, detail)
            }
        }
        Err(error) => Finding::new(check, Level::Warn, format!("{}: {error}", path.display())),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_become_findings_with_their_hint() {
        let finding = failed("identity", ConfigError::NotLoggedIn.into());
        assert_eq!(finding.detail, "not logged in");
        assert!(finding.hint.unwrap().starts_with("cortex-agent login"));
    }

    #[test]
    fn a_login_that_ends_soon_or_has_ended_is_said_with_what_helps() {
        let day = 24 * 60 * 60 * 1000;
        for (left, level) in [(29 * day, Level::Ok), (day, Level::Warn), (-1, Level::Fail)] {
            let finding = login_life("ann (admin)", 100 * day + left, 100 * day);
            assert_eq!(finding.result, level, "{left}");
            assert_eq!(finding.hint.is_some(), level != Level::Ok, "{left}");
        }
    }

    #[test]
    fn missing_pieces_of_the_sandbox_fail_only_where_strict_is_lost() {
        let piece = v1::MissingPiece {
            what: "cgroup".into(),
            why: "not delegated".into(),
            remedy: "Delegate=yes".into(),
        };
        let mut report = v1::SandboxReport {
            strict_available: true,
            missing: vec![piece],
            ..Default::default()
        };
        let levels = |report: &v1::SandboxReport| {
            sandbox(report).iter().map(|finding| finding.result).collect::<Vec<_>>()
        };
        assert_eq!(levels(&report), [Level::Ok, Level::Warn]);
        report.strict_available = false;
        assert_eq!(levels(&report), [Level::Fail]);
    }

    #[test]
    fn state_that_others_may_enter_is_noticed() {
        let folder = tempfile::tempdir().unwrap();
        let state = StateDir::resolve(Some(folder.path().join("state"))).unwrap();
        assert_eq!(state_permissions(&state).result, Level::Warn);
        state.create().unwrap();
        assert_eq!(state_permissions(&state).result, Level::Ok);
        let open = std::fs::Permissions::from_mode(0o755);
        std::fs::set_permissions(state.path(), open).unwrap();
        assert_eq!(state_permissions(&state).result, Level::Warn);
    }
}
