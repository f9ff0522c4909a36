//! A node as it is listed and shown.

use std::collections::BTreeMap;
use std::time::Duration;

use cortex_proto::v1;
use cortex_shared::ids::NodeId;
use serde::Serialize;

use crate::cli::printer::{self, Row};
use crate::client::say_skew;
use crate::link::renewal::FORK;
use crate::link::{mode_of, network_of};

/// A node as it is listed; the JSON of scripts.
#[derive(Serialize)]
pub(crate) struct NodeRow {
    node_id: String,
    pub(crate) name: String,
    pub(super) online: bool,
    labels: BTreeMap<String, String>,
    owner: String,
    joined_at_ms: i64,
    last_seen_ms: i64,
    agent_version: String,
    hostname: String,
    os: String,
    arch: String,
    pub(crate) effective_mode: String,
    pub(crate) policy: String,
    pub(crate) policy_network: String,
    pub(crate) policy_until_ms: i64,
    pub(crate) policy_reason: String,
    pub(crate) ceiling: String,
    pub(crate) ceiling_network: String,
    session_epoch: u64,
    pub(super) running_tasks: u32,
    cordoned: bool,
    revoked_at_ms: i64,
    remote_address: String,
    machine: Option<MachineJson>,
    certificate_not_after_ms: i64,
    generation: u64,
    clone: Option<CloneJson>,
    clock_skew_ms: i64,
    strict_available: Option<bool>,
    sandbox: Option<SandboxJson>,
}

#[derive(Serialize)]
struct MachineJson {
    machine_id: String,
    boot_id: String,
    hostname: String,
}

impl MachineJson {
    fn of(machine: v1::MachineFacts) -> Self {
        let v1::MachineFacts { machine_id, boot_id, hostname } = machine;
        Self { machine_id, boot_id, hostname }
    }

    fn sentence(&self) -> String {
        format!("{} (machine id {}, boot id {})", self.hostname, self.machine_id, self.boot_id)
    }
}

/// A second machine that was refused.
#[derive(Serialize)]
struct CloneJson {
    at_ms: i64,
    remote_address: String,
    machine: Option<MachineJson>,
    presented_generation: u64,
    current_generation: u64,
}

#[derive(Serialize)]
struct SandboxJson {
    landlock_abi: u32,
    cgroup: String,
    seccomp: bool,
    user_namespaces: bool,
    root: bool,
    missing: Vec<MissingJson>,
}

#[derive(Serialize)]
struct MissingJson {
    what: String,
    why: String,
    remedy: String,
}

/// What somebody lets commands do, for people.
pub(crate) fn bound_text(mode: &str, network: &str) -> String {
    match network {
        "none" => mode.to_owned(),
        network => format!("{mode}, network {network}"),
    }
}

impl NodeRow {
    /// Its id and its name.
    pub(super) fn into_identity(self) -> (String, String) {
        (self.node_id, self.name)
    }

    pub(crate) fn of(node: v1::NodeInfo) -> Self {
        let strict_available = node.sandbox.as_ref().map(|report| report.strict_available);
        let sandbox = node.sandbox.map(|report| SandboxJson {
            landlock_abi: report.landlock_abi,
            cgroup: report.cgroup,
            seccomp: report.seccomp,
            user_namespaces: report.user_namespaces,
            root: report.root,
            missing: report
                .missing
                .into_iter()
                .map(|piece| MissingJson { what: piece.what, why: piece.why, remedy: piece.remedy })
                .collect(),
        });
        Self {
            node_id: NodeId::from_slice(&node.node_id).map(|id| id.to_string()).unwrap_or_default(),
            name: node.name,
            online: node.online,
            labels: node.labels.into_iter().collect(),
            owner: node.owner,
            joined_at_ms: node.joined_at_ms,
            last_seen_ms: node.last_seen_ms,
            agent_version: node.agent_version,
            hostname: node.hostname,
            os: node.os,
            arch: node.arch,
            effective_mode: mode_of(node.effective_mode).to_string(),
            policy: mode_of(node.policy).to_string(),
            policy_network: network_of(node.policy_network).to_string(),
            policy_until_ms: node.policy_until_ms,
            policy_reason: node.policy_reason,
            ceiling: mode_of(node.ceiling).to_string(),
            ceiling_network: network_of(node.ceiling_network).to_string(),
            session_epoch: node.session_epoch,
            running_tasks: node.running_tasks,
            cordoned: node.cordoned,
            revoked_at_ms: node.revoked_at_ms,
            remote_address: node.remote_address,
            machine: node.machine.map(MachineJson::of),
            certificate_not_after_ms: node.certificate_not_after_ms,
            generation: node.generation,
            clone: node.clone.map(|clone| CloneJson {
                at_ms: clone.at_ms,
                remote_address: clone.remote_address,
                machine: clone.machine.map(MachineJson::of),
                presented_generation: clone.presented_generation,
                current_generation: clone.current_generation,
            }),
            clock_skew_ms: node.clock_skew_ms,
            strict_available,
            sandbox,
        }
    }

    fn state(&self) -> String {
        let mut state = if self.online { "online" } else { "offline" }.to_owned();
        if self.revoked_at_ms > 0 {
            state.push_str(",revoked");
        }
        if self.cordoned {
            state.push_str(",cordoned");
        }
        if self.clone.is_some() {
            state.push_str(",cloned");
        }
        state
    }

    fn label_text(&self) -> String {
        self.labels.iter().map(|(k, v)| format!("{k}={v}")).collect::<Vec<_>>().join(",")
    }

    /// The hub's policy with its end and reason.
    pub(crate) fn policy_text(&self) -> String {
        let mut text = bound_text(&self.policy, &self.policy_network);
        if self.policy_until_ms != 0 {
            text.push_str(&format!(" until {}", printer::time(self.policy_until_ms)));
        }
        if !self.policy_reason.is_empty() {
            text.push_str(&format!(": {}", self.policy_reason));
        }
        text
    }

    /// The owner's bound.
    pub(crate) fn ceiling_text(&self) -> String {
        bound_text(&self.ceiling, &self.ceiling_network)
    }

    fn sandbox_text(&self) -> String {
        match (&self.sandbox, self.strict_available) {
            (Some(report), Some(true)) => format!(
                "complete: Landlock ABI {}, {}, system call filter, tried from within",
                report.landlock_abi,
                match report.cgroup.as_str() {
                    "v1" | "v2" => format!("control groups {}", report.cgroup),
                    _ => "no control groups (limits count each process)".to_owned(),
                }
            ),
            (Some(report), _) => {
                let missing: Vec<&str> =
                    report.missing.iter().map(|piece| piece.what.as_str()).collect();
                format!("incomplete: {}; strict commands are refused", missing.join(", "))
            }
            (None, _) => "not reported".to_owned(),
        }
    }

    /// Both machines, and who decides which of them is the copy.
    fn clone_lines(&self) -> Vec<(&'static str, String)> {
        let Some(clone) = &self.clone else { return Vec::new() };
        let unknown = || "an unknown machine".to_owned();
        let own = self.machine.as_ref().map_or_else(unknown, MachineJson::sentence);
        let other = clone.machine.as_ref().map_or_else(unknown, MachineJson::sentence);
        vec![
            (
                "clone suspected",
                format!(
                    "{}: a second machine presented generation {} (current: {}) and was refused",
                    printer::time(clone.at_ms),
                    clone.presented_generation,
                    clone.current_generation
                ),
            ),
            ("accepted machine", format!("{own} at {}", self.remote_address)),
            ("refused machine", format!("{other} at {}", clone.remote_address)),
            ("what helps", format!("on the copy, {FORK}")),
        ]
    }

    /// Everything about it, for people.
    pub(super) fn lines(&self) -> Vec<(&'static str, String)> {
        let mut lines = vec![
            ("name", self.name.clone()),
            ("id", self.node_id.clone()),
            ("state", self.state()),
            ("last seen", printer::time(self.last_seen_ms)),
            ("joined", printer::time(self.joined_at_ms)),
            ("labels", self.label_text()),
        ];
        if !self.owner.is_empty() {
            lines.push(("owner", self.owner.clone()));
        }
        lines.extend([
            ("host", format!("{} ({} {})", self.hostname, self.os, self.arch)),
            ("agent", self.agent_version.clone()),
            ("mode", self.effective_mode.clone()),
            ("hub policy", self.policy_text()),
            ("ceiling", self.ceiling_text()),
            ("sandbox", self.sandbox_text()),
            ("running commands", self.running_tasks.to_string()),
        ]);
        if !self.remote_address.is_empty() {
            lines.push(("address", self.remote_address.clone()));
        }
        if self.certificate_not_after_ms > 0 {
            let end = printer::time(self.certificate_not_after_ms);
            lines.push(("certificate", format!("until {end}, generation {}", self.generation)));
        }
        if self.clock_skew_ms != 0 {
            lines.push(("clock", skew_text(self.clock_skew_ms)));
        }
        if self.revoked_at_ms > 0 {
            lines.push(("revoked", printer::time(self.revoked_at_ms)));
        }
        lines.extend(self.clone_lines());
        lines
    }
}

/// A node's clock against the hub's; `skew_ms` is the hub's minus the node's.
pub(crate) fn skew_text(skew_ms: i64) -> String {
    let apart = Duration::from_millis(skew_ms.unsigned_abs());
    match apart.as_secs() {
        0 => "as the hub's".to_owned(),
        _ if skew_ms > 0 => format!("{} behind the hub's", say_skew(apart)),
        _ => format!("{} ahead of the hub's", say_skew(apart)),
    }
}

impl Row for NodeRow {
    const COLUMNS: &'static [&'static str] =
        &["NAME", "ID", "STATE", "LAST SEEN", "MODE", "TASKS", "LABELS"];

    fn cells(&self) -> Vec<String> {
        vec![
            self.name.clone(),
            self.node_id.clone(),
            self.state(),
            printer::time(self.last_seen_ms),
            self.effective_mode.clone(),
            self.running_tasks.to_string(),
            self.label_text(),
        ]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn suspected_clone_names_both_machines() {
        let machine = |name: &str| v1::MachineFacts {
            machine_id: format!("id-{name}"),
            boot_id: format!("boot-{name}"),
            hostname: name.to_owned(),
        };
        let info = v1::NodeInfo {
            name: "n1".into(),
            machine: Some(machine("original")),
            remote_address: "10.0.0.1:5".into(),
            clone: Some(v1::CloneSuspicion {
                at_ms: 1_900_000_000_000,
                remote_address: "10.0.0.2:6".into(),
                machine: Some(machine("copy")),
                presented_generation: 3,
                current_generation: 5,
            }),
            ..Default::default()
        };
        let row = NodeRow::of(info);
        let text: String = row.lines().iter().map(|(k, v)| format!("{k}: {v}\n")).collect();
        for part in ["id-original", "boot-original", "10.0.0.1", "id-copy", "boot-copy", "10.0.0.2"]
        {
            assert!(text.contains(part), "{part} is not in\n{text}");
        }
        assert!(row.cells()[2].contains("cloned"));
        assert_eq!(serde_json::to_value(&row).unwrap()["clone"]["machine"]["hostname"], "copy");
    }

    #[test]
    fn policy_is_shown_with_its_end_and_reason() {
        let info = v1::NodeInfo {
            policy: v1::Mode::Permissive.into(),
            policy_until_ms: 1_900_000_000_000,
            policy_reason: "driver".into(),
            ..Default::default()
        };
        let text = NodeRow::of(info).policy_text();
        assert!(text.starts_with("permissive until 2030-"), "{text}");
        assert!(text.ends_with(": driver"), "{text}");
        assert_eq!(NodeRow::of(v1::NodeInfo::default()).policy_text(), "strict");
        let info = v1::NodeInfo {
            policy_network: v1::Network::Full.into(),
            policy_reason: "builds".into(),
            ..Default::default()
        };
        assert_eq!(NodeRow::of(info).policy_text(), "strict, network full: builds");
    }

    #[test]
    fn clocks_are_compared_in_words() {
        for (skew_ms, text) in [
            (200, "as the hub's"),
            (45_000, "45 s behind the hub's"),
            (-7_200_000, "2 h ahead of the hub's"),
        ] {
            assert_eq!(skew_text(skew_ms), text);
        }
    }
}
