//! From messages to domain types, checked once.

use std::borrow::Cow;
use std::net::SocketAddr;

use cortex_proto::v1;
use cortex_shared::clock::unix_ms;
use cortex_shared::ids::{NodeId, TaskId, WorkspaceId};
use cortex_shared::labels::{self, Labels, SELF_LABEL_PREFIX};
use cortex_shared::policy::{Bound, Mode, Network};
use cortex_shared::secret::InviteToken;
use cortex_shared::text::{is_printable, shorten};
use tonic::{Code, Status};

use super::status::{invalid, refuse};
use crate::enroll::authorities::Ring;
use crate::enroll::ca::{CertificateRequest, Issued};
use crate::enroll::validator::{JoinRequest, RenewalRequest};
use crate::node::registry::Arrival;
use crate::store::{Caller, CloneSuspicion, Facts, Machine, Node, ShownCommand};

/// Most workspaces one report may speak of.
const MAX_REPORTED_WORKSPACES: usize = 1024;
/// Longest text a node may say of itself in one field.
const MAX_FACT_BYTES: usize = 256;
/// Longest reason for a decision.
const MAX_REASON_BYTES: usize = 500;
/// Longest single argument or variable.
const MAX_ARGUMENT_BYTES: usize = 64 * 1024;
/// All arguments and variables together.
const MAX_ARGUMENTS_BYTES: usize = 1024 * 1024;
/// Longest script.
const MAX_SCRIPT_BYTES: usize = 4 * 1024 * 1024;
/// Longest kind of terminal.
const MAX_TERM_BYTES: usize = 64;
/// Longest command line in the journal.
const MAX_SHOWN_COMMAND_BYTES: usize = 1024;

/// A mode on the wire; anything unknown is strict.
#[must_use]
pub fn mode(value: i32) -> Mode {
    match v1::Mode::try_from(value) {
        Ok(v1::Mode::Permissive) => Mode::Permissive,
        Ok(v1::Mode::Strict) | Err(_) => Mode::Strict,
    }
}

/// What somebody lets commands do at most; what is not known allows nothing.
#[must_use]
pub fn bound(mode: i32, network: i32) -> Bound {
    let network = match v1::Network::try_from(network) {
        Ok(v1::Network::Full) => Network::Full,
        Ok(v1::Network::None) | Err(_) => Network::None,
    };
    Bound { mode: self::mode(mode), network }
}

/// A network for the wire.
#[must_use]
pub fn wire_network(network: Network) -> v1::Network {
    match network {
        Network::None => v1::Network::None,
        Network::Full => v1::Network::Full,
    }
}

/// A mode for the wire.
#[must_use]
pub fn wire_mode(mode: Mode) -> v1::Mode {
    match mode {
        Mode::Strict => v1::Mode::Strict,
        Mode::Permissive => v1::Mode::Permissive,
    }
}

/// An invite token.
///
/// # Errors
/// `invalid_token`, as for one that is well formed but wrong.
pub fn token(text: &str) -> Result<InviteToken, Status> {
    if text.len() > 128 {
        return Err(refuse(Code::PermissionDenied, "invalid_token", "not an invite token"));
    }
    text.parse().map_err(|error: cortex_shared::secret::InvalidToken| {
        refuse(Code::PermissionDenied, "invalid_token", error.to_string())
    })
}

/// A certificate request.
///
/// # Errors
/// If it is none.
pub fn certificate_request(der: &[u8]) -> Result<CertificateRequest, Status> {
    CertificateRequest::parse(der).map_err(|error| invalid(error.to_string()))
}

/// Labels.
///
/// # Errors
/// If one is invalid or there are too many.
pub fn checked_labels(labels: std::collections::HashMap<String, String>) -> Result<Labels, Status> {
    labels::check_labels(&labels).map_err(|error| invalid(error.to_string()))?;
    Ok(labels.into_iter().collect())
}

/// Labels that an operator sets: any but those that only a node gives itself.
///
/// # Errors
/// As [`checked_labels`], and for a key that begins with [`SELF_LABEL_PREFIX`].
pub fn set_labels(labels: std::collections::HashMap<String, String>) -> Result<Labels, Status> {
    match labels.keys().find(|key| key.starts_with(SELF_LABEL_PREFIX)) {
        Some(key) => Err(invalid(format!(
            "the label {key:?} is the node's own: only the node sets what begins with {SELF_LABEL_PREFIX:?}"
        ))),
        None => checked_labels(labels),
    }
}

/// Labels that a node gives itself. They are kept apart from those that operators and invites set,
/// and count for no scope.
///
/// # Errors
/// As [`checked_labels`].
fn own_labels(labels: std::collections::HashMap<String, String>) -> Result<Labels, Status> {
    let own = |key: String| {
        if key.starts_with(SELF_LABEL_PREFIX) { key } else { format!("{SELF_LABEL_PREFIX}{key}") }
    };
    // The key first: with the prefix, an empty one would look like one.
    checked_labels(labels)
        .and_then(|labels| checked_labels(labels.into_iter().map(|(k, v)| (own(k), v)).collect()))
}

/// A reason that somebody gives, for the record.
///
/// # Errors
/// If it is too long or holds control characters.
pub fn reason(text: String) -> Result<String, Status> {
    if text.len() > MAX_REASON_BYTES || !text.chars().all(is_printable) {
        return Err(invalid(format!(
            "a reason is at most {MAX_REASON_BYTES} bytes long and holds no control characters"
        )));
    }
    Ok(text.trim().to_owned())
}

/// A name for a node, workspace or operator.
///
/// # Errors
/// If it is not valid.
pub fn name(name: String) -> Result<String, Status> {
    labels::check_new_name(&name).map_err(|error| invalid(error.to_string()))?;
    Ok(name)
}

fn fact(text: String) -> Result<String, Status> {
    if text.len() > MAX_FACT_BYTES || !text.chars().all(is_printable) {
        return Err(invalid("a text about the machine is too long or holds control characters"));
    }
    Ok(text)
}

/// What a node says of its sandbox, cut to what can be shown: one node must not make the list of all
/// nodes too long to be sent.
#[must_use]
pub fn sandbox_report(mut report: v1::SandboxReport) -> v1::SandboxReport {
    const MAX_PIECES: usize = 32;
    const MAX_TEXT_BYTES: usize = 512;
    report.missing.truncate(MAX_PIECES);
    let texts = report.missing.iter_mut().flat_map(|p| [&mut p.what, &mut p.why, &mut p.remedy]);
    for text in texts.chain([&mut report.cgroup]) {
        text.retain(is_printable);
        shorten(text, MAX_TEXT_BYTES);
    }
    report
}

/// A frame of a node's session; the texts of a report are cut to what can be shown.
#[must_use]
pub fn node_frame(mut frame: v1::NodeFrame) -> v1::NodeFrame {
    if let Some(v1::node_frame::Frame::SyncReport(report)) = &mut frame.frame {
        let reports = std::mem::take(&mut report.workspaces);
        report.workspaces =
            reports.into_iter().take(MAX_REPORTED_WORKSPACES).map(sync_status).collect();
    }
    frame
}

/// A member's report of one workspace, cut likewise.
fn sync_status(mut status: v1::SyncStatus) -> v1::SyncStatus {
    const MAX_PROBLEMS: usize = 32;
    const MAX_TEXT_BYTES: usize = 512;
    const MAX_PATH_BYTES: usize = 4096;
    status.problems.truncate(MAX_PROBLEMS);
    for problem in &mut status.problems {
        problem.path.truncate(MAX_PATH_BYTES);
        for text in [&mut problem.code, &mut problem.message] {
            shorten(text, MAX_TEXT_BYTES);
        }
    }
    status.root_path.truncate(MAX_PATH_BYTES);
    for text in [&mut status.workspace, &mut status.halted_reason] {
        shorten(text, MAX_TEXT_BYTES);
    }
    status
}

/// The tasks a node says it holds; what is no id is none of ours.
#[must_use]
pub fn held_tasks(ids: &[bytes::Bytes]) -> Vec<TaskId> {
    const MAX_HELD_TASKS: usize = 8192;
    ids.iter().take(MAX_HELD_TASKS).filter_map(|id| TaskId::from_slice(id).ok()).collect()
}

/// A caller's idempotency key; `None` for an empty one.
///
/// # Errors
/// If it is too long, or not printable.
pub fn idempotency_key(key: String) -> Result<Option<String>, Status> {
    const MAX_KEY_BYTES: usize = 128;
    if key.len() > MAX_KEY_BYTES || !key.bytes().all(|byte| byte.is_ascii_graphic()) {
        return Err(invalid(format!(
            "an idempotency key has at most {MAX_KEY_BYTES} printable ASCII characters"
        )));
    }
    Ok((!key.is_empty()).then_some(key))
}

/// What a node says of itself.
///
/// # Errors
/// If a text is too long.
pub fn facts(
    hostname: String,
    os: String,
    arch: String,
    agent_version: String,
) -> Result<Facts, Status> {
    Ok(Facts {
        hostname: fact(hostname)?,
        os: fact(os)?,
        arch: fact(arch)?,
        agent_version: fact(agent_version)?,
    })
}

/// What tells a node's machine from another.
///
/// # Errors
/// If a text is too long.
pub fn machine(machine: v1::MachineFacts) -> Result<Machine, Status> {
    Ok(Machine {
        machine_id: fact(machine.machine_id)?,
        boot_id: fact(machine.boot_id)?,
        hostname: fact(machine.hostname)?,
    })
}

/// A request to join.
///
/// # Errors
/// The first thing that is not valid.
pub fn join_request(
    token: InviteToken,
    caller: Caller,
    request: v1::JoinNodeRequest,
) -> Result<JoinRequest, Status> {
    Ok(JoinRequest {
        token,
        caller,
        certificate: certificate_request(&request.csr_der)?,
        name: if request.name.is_empty() { String::new() } else { name(request.name)? },
        labels: own_labels(request.labels)?,
        ceiling: bound(request.ceiling, request.ceiling_network),
        facts: facts(request.hostname, request.os, request.arch, request.agent_version)?,
        machine: machine(request.machine.unwrap_or_default())?,
    })
}

/// A request of a node that has proved itself for its next certificate.
///
/// # Errors
/// The first thing that is not valid.
pub fn renewal(
    node: NodeId,
    request: v1::RenewRequest,
    address: Option<SocketAddr>,
) -> Result<RenewalRequest, Status> {
    Ok(RenewalRequest {
        node,
        certificate: certificate_request(&request.csr_der)?,
        generation: request.generation,
        machine: machine(request.machine.unwrap_or_default())?,
        address,
    })
}

/// The same of a caller that has proved nothing yet.
///
/// # Errors
/// As [`renewal`].
pub fn recovery(
    request: v1::RecoverNodeRequest,
    address: Option<SocketAddr>,
) -> Result<RenewalRequest, Status> {
    let node = NodeId::from_slice(&request.node_id).map_err(|e| invalid(e.to_string()))?;
    let v1::RecoverNodeRequest { csr_der, generation, machine, .. } = request;
    renewal(node, v1::RenewRequest { csr_der, generation, machine }, address)
}

/// What a node says of itself at the beginning of a session. `signed` is the generation that its
/// certificate carries, which counts for more than its word.
///
/// # Errors
/// If a text is too long.
pub fn arrival(
    hello: v1::Hello,
    signed: Option<u64>,
    address: Option<SocketAddr>,
) -> Result<Arrival, Status> {
    let skew_ms = unix_ms().saturating_sub(hello.node_time_ms);
    Ok(Arrival {
        machine: Machine {
            machine_id: fact(hello.machine_id)?,
            boot_id: fact(hello.boot_id)?,
            hostname: fact(hello.hostname.clone())?,
        },
        facts: facts(hello.hostname, hello.os, hello.arch, hello.agent_version)?,
        ceiling: bound(hello.ceiling, hello.ceiling_network),
        sandbox: hello.sandbox.map(sandbox_report),
        address,
        generation: signed.unwrap_or(hello.generation),
        generation_is_signed: signed.is_some(),
        skew_ms: (hello.node_time_ms != 0).then_some(skew_ms),
    })
}

/// What tells a machine from others, for people.
#[must_use]
pub fn wire_machine(machine: &Machine) -> v1::MachineFacts {
    v1::MachineFacts {
        machine_id: machine.machine_id.clone(),
        boot_id: machine.boot_id.clone(),
        hostname: machine.hostname.clone(),
    }
}

/// A machine that was refused, for people.
#[must_use]
pub fn wire_suspicion(suspicion: CloneSuspicion) -> v1::CloneSuspicion {
    v1::CloneSuspicion {
        at_ms: suspicion.at_ms,
        machine: Some(wire_machine(&suspicion.machine)),
        remote_address: suspicion.address,
        presented_generation: suspicion.presented_generation,
        current_generation: suspicion.current_generation,
    }
}

/// The answer to a node that was admitted.
#[must_use]
pub fn joined(ring: &Ring, node: Node, issued: &Issued) -> v1::JoinNodeResponse {
    v1::JoinNodeResponse {
        node_id: node.id.as_bytes().to_vec().into(),
        name: node.name,
        certificate_der: issued.der.to_vec().into(),
        ca_der: ring.serving().certificate().to_vec().into(),
        mesh_id: ring.serving().mesh().to_string(),
        not_after_ms: issued.not_after_ms,
        generation: node.certificate.generation,
        trusted_cas_der: ring.trusted_der(),
    }
}

/// A workspace id.
///
/// # Errors
/// If it is none.
pub fn workspace_id(bytes: &[u8]) -> Result<WorkspaceId, Status> {
    WorkspaceId::from_slice(bytes).map_err(|error| invalid(error.to_string()))
}

/// Checks the limits of a command. It travels on as it came: only the node opens it.
///
/// # Errors
/// If there is no command, or one of its parts is too large.
pub fn check_task_spec(spec: &v1::TaskSpec) -> Result<(), Status> {
    if spec.argv.is_empty() == spec.script.is_empty() {
        return Err(invalid("a command is either arguments or a script, and not empty"));
    }
    if spec.script.len() > MAX_SCRIPT_BYTES {
        return Err(invalid(format!("the script is larger than {MAX_SCRIPT_BYTES} bytes")));
    }
    let variables = spec.env.iter().flat_map(|variable| [&variable.name, &variable.value]);
    let mut total = 0;
    for part in spec.argv.iter().chain(variables).chain([&spec.cwd]) {
        if part.len() > MAX_ARGUMENT_BYTES {
            return Err(invalid(format!(
                "an argument or variable is larger than {MAX_ARGUMENT_BYTES} bytes"
            )));
        }
        if part.contains(&0) {
            return Err(invalid("an argument or variable holds a NUL byte"));
        }
        total += part.len() + 1;
    }
    if total > MAX_ARGUMENTS_BYTES {
        return Err(invalid(format!(
            "arguments and variables are larger than {MAX_ARGUMENTS_BYTES} bytes together"
        )));
    }
    if spec.terminal.as_ref().is_some_and(|terminal| terminal.term.len() > MAX_TERM_BYTES) {
        return Err(invalid(format!("the kind of terminal is longer than {MAX_TERM_BYTES} bytes")));
    }
    if spec.env.iter().any(|v| v.name.is_empty() || v.name.contains(&b'=')) {
        return Err(invalid("a variable's name is empty or holds '='"));
    }
    Ok(())
}

/// A command as it stands in the journal.
#[must_use]
pub fn shown_command(spec: &v1::TaskSpec) -> ShownCommand {
    const CUT: &str = " … (cut)";
    let mut hasher = blake3::Hasher::new();
    let (mut text, mut bytes) = (String::new(), 0_u64);
    if spec.argv.is_empty() {
        bytes = spec.script.len() as u64;
        hasher.update(&spec.script);
        // More than is shown, so that it is known to be cut.
        let beginning = &spec.script[..spec.script.len().min(MAX_SHOWN_COMMAND_BYTES + 4)];
        text = String::from_utf8_lossy(beginning).into_owned();
    }
    for argument in &spec.argv {
        bytes += argument.len() as u64;
        hasher.update(argument).update(&[0]);
        if text.len() <= MAX_SHOWN_COMMAND_BYTES {
            if !text.is_empty() {
                text.push(' ');
            }
            text.push_str(&quoted(&String::from_utf8_lossy(argument)));
        }
    }
    if text.len() > MAX_SHOWN_COMMAND_BYTES {
        shorten(&mut text, MAX_SHOWN_COMMAND_BYTES - CUT.len());
        text.push_str(CUT);
    }
    ShownCommand { text, bytes, hash: *hasher.finalize().as_bytes() }
}

/// An argument as a shell would have to be given it.
fn quoted(argument: &str) -> Cow<'_, str> {
    let plain = |c: char| c.is_ascii_alphanumeric() || "-_./=:,@%+".contains(c);
    if !argument.is_empty() && argument.chars().all(plain) {
        return argument.into();
    }
    format!("'{}'", argument.replace('\'', r"'\''")).into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn unknown_modes_are_strict() {
        assert_eq!(mode(1), Mode::Permissive);
        for value in [0, 2, -1, i32::MAX] {
            assert_eq!(mode(value), Mode::Strict);
        }
    }

    #[test]
    fn what_a_node_says_of_itself_is_kept_apart() {
        let labels = |key: &str| [(key.to_owned(), "x".to_owned())].into();
        for (key, kept) in [("env", "self/env"), ("self/env", "self/env")] {
            assert_eq!(own_labels(labels(key)).unwrap().keys().next().unwrap(), kept);
        }
        for bad in ["", "a b", &"k".repeat(60)] {
            assert!(own_labels(labels(bad)).is_err(), "{bad:?}");
        }
        assert!(set_labels(labels("env")).is_ok());
        assert!(set_labels(labels("self/env")).is_err());
    }

    #[test]
    fn a_reason_shows_as_it_is() {
        assert_eq!(reason(" debug ".into()).unwrap(), "debug");
        for bad in ["a\u{202e}b", "a\u{1b}[2J", "a\u{200b}b"] {
            assert!(reason(bad.into()).is_err(), "{bad:?}");
            assert!(fact(bad.into()).is_err(), "{bad:?}");
        }
    }

    #[test]
    fn commands_are_limited() {
        let spec = |argv: Vec<Vec<u8>>| v1::TaskSpec {
            argv: argv.into_iter().map(Into::into).collect(),
            ..Default::default()
        };
        assert!(check_task_spec(&spec(vec![b"true".to_vec()])).is_ok());
        assert!(check_task_spec(&spec(vec![])).is_err());
        assert!(check_task_spec(&spec(vec![b"a\0b".to_vec()])).is_err());
        assert!(check_task_spec(&spec(vec![vec![b'x'; MAX_ARGUMENT_BYTES + 1]])).is_err());
        assert!(check_task_spec(&spec(vec![vec![b'x'; MAX_ARGUMENT_BYTES]; 17])).is_err());
        let both = v1::TaskSpec { script: "true".into(), ..spec(vec![b"true".to_vec()]) };
        assert!(check_task_spec(&both).is_err());
    }

    #[test]
    fn a_nodes_reports_are_cut_at_the_door() {
        let piece = v1::MissingPiece { what: "ä\u{1b}".repeat(1_000_000), ..Default::default() };
        let report =
            v1::SandboxReport { missing: vec![piece; 100], ..v1::SandboxReport::default() };
        let report = sandbox_report(report);
        assert_eq!(report.missing.len(), 32);
        assert!(report.missing[0].what.len() <= 512 && !report.missing[0].what.contains('\u{1b}'));
    }

    #[test]
    fn a_command_that_is_cut_says_so_and_no_two_have_the_same_hash() {
        let script = |text: &str| {
            let script = text.to_owned().into_bytes().into();
            shown_command(&v1::TaskSpec { script, ..Default::default() })
        };
        let long = script(&"ä".repeat(2000));
        assert!(long.text.len() <= MAX_SHOWN_COMMAND_BYTES && long.text.ends_with("ä … (cut)"));
        assert_eq!(long.bytes, 4000);
        let longer = script(&format!("{}; rm -rf x", "ä".repeat(2000)));
        assert_eq!(long.text, longer.text);
        assert_ne!(long.hash, longer.hash);
        let whole = "x".repeat(MAX_SHOWN_COMMAND_BYTES);
        assert_eq!(script(&whole).text, whole);
        assert!(script(&format!("{whole}y")).text.ends_with("x … (cut)"));
        assert_eq!(script("echo").hash, *blake3::hash(b"echo").as_bytes());
    }

    #[test]
    fn arguments_are_shown_as_a_shell_would_take_them() {
        let shown = |argv: &[&str]| {
            let argv = argv.iter().map(|a| a.as_bytes().to_vec().into()).collect();
            shown_command(&v1::TaskSpec { argv, ..Default::default() })
        };
        for (argv, text) in [
            (&["ls", "-l", "/tmp"][..], "ls -l /tmp"),
            (&["rm", "a b"], "rm 'a b'"),
            (&["rm", "a", "b"], "rm a b"),
            (&["sh", "-c", "echo $x; it's"], r"sh -c 'echo $x; it'\''s'"),
            (&["true", ""], "true ''"),
        ] {
            assert_eq!(shown(argv).text, text);
        }
        assert_ne!(shown(&["rm", "a b"]).hash, shown(&["rm", "a", "b"]).hash);
        let many = shown(&["x"; 2000]);
        assert!(many.text.ends_with(" … (cut)") && many.bytes == 2000, "{many:?}");
    }
}
