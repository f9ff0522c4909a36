//! Which workers a hub has, and what each does.

use std::collections::HashSet;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use cortex_shared::clock::unix_ms;
use cortex_shared::ids::NodeId;
use cortex_shared::telemetry;

use super::certificates::{Expired, expired_certificates};
use super::supervisor::{Due, Plan, Report, Supervisor};
use crate::authority::audit::AuditLog;
use crate::authority::nodes::NodeDecisions;
use crate::authority::operators::Operators;
use crate::events::{EventBus, Kind, NewEvent};
use crate::node::registry::Registry;
use crate::store::Store;
use crate::sync::Workspaces;
use crate::sync::members::Members;
use crate::task::history::History;

/// How often the hub's workers run when nothing else makes them, and what they keep.
#[derive(Clone, Copy, Debug)]
pub struct Periods {
    /// Between two times that "last seen" is written.
    pub mesh_monitor: Duration,
    /// Between two moves of the mark of the audit log.
    pub audit_anchor: Duration,
    /// Between two collections of content that nothing names.
    pub pack_collection: Duration,
    /// Between two looks for what history and events need not keep.
    pub history_trim: Duration,
    /// Between two looks for invites that are of no use any more.
    pub invite_expiry: Duration,
    /// How long such an invite is still listed.
    pub invite_keep: Duration,
    /// Between two looks at the certificates of nodes that are away.
    pub certificate_sweep: Duration,
    /// Between two attempts to remove what is left of deleted workspaces.
    pub mirror_cleanup: Duration,
}

impl Default for Periods {
    fn default() -> Self {
        const HOUR: Duration = Duration::from_secs(3600);
        Self {
            // People look at it; a database does not mind a line a second.
            mesh_monitor: Duration::from_secs(1),
            // What can be cut off from the log unseen, if the hub is killed.
            audit_anchor: Duration::from_secs(60),
            // Rarely against the days for which content is kept, since each look reads all entries.
            pack_collection: HOUR,
            history_trim: HOUR,
            invite_expiry: HOUR,
            // As long as somebody may still ask what became of it.
            invite_keep: 30 * 24 * HOUR,
            certificate_sweep: HOUR,
            mirror_cleanup: HOUR,
        }
    }
}

/// What the workers work on.
pub struct WorkOf {
    /// Nodes.
    pub registry: Arc<Registry>,
    /// What is remembered.
    pub store: Arc<dyn Store>,
    /// Decisions about nodes.
    pub decisions: Arc<NodeDecisions>,
    /// Operators.
    pub operators: Arc<Operators>,
    /// The audit log.
    pub audit: Arc<AuditLog>,
    /// Workspace content.
    pub content: Arc<Workspaces>,
    /// Workspaces and their members.
    pub members: Arc<Members>,
    /// The history of nodes.
    pub history: Arc<History>,
    /// Events.
    pub events: Arc<EventBus>,
}

/// The longest time in which a worker looks again that otherwise waits for something to happen: clocks are
/// set.
const LOOK_AGAIN: Duration = Duration::from_secs(60);

/// Has the supervisor keep every worker of a hub.
pub fn register(supervisor: &Supervisor, of: WorkOf, periods: Periods) {
    mesh_monitor(supervisor, Arc::clone(&of.registry), Arc::clone(&of.store), periods);
    policy_end(supervisor, Arc::clone(&of.registry), of.decisions);
    revocations(supervisor, &of.operators);
    audit_anchor(supervisor, of.audit, periods);
    pack_collection(supervisor, of.content, periods);
    mirror_cleanup(supervisor, of.members, periods);
    invite_expiry(supervisor, of.store, periods);
    let (registry, events) = (Arc::clone(&of.registry), Arc::clone(&of.events));
    history_trim(supervisor, registry, of.history, events, periods);
    certificate_sweep(supervisor, of.registry, of.events, periods);
    log_repeats(supervisor);
}

fn log_repeats(supervisor: &Supervisor) {
    let plan = Plan {
        name: "log-repeats",
        purpose: "logs how many repeated lines were left out of the log",
        period: telemetry::WITHIN,
        spacing: telemetry::WITHIN,
        first: Due::AfterPeriod,
    };
    supervisor.keep(plan, || async {
        let left_out = usize::try_from(telemetry::tell_left_out()).unwrap_or(usize::MAX);
        Ok(Report::counted(left_out, "lines left out"))
    });
}

fn mesh_monitor(
    supervisor: &Supervisor,
    registry: Arc<Registry>,
    store: Arc<dyn Store>,
    periods: Periods,
) {
    let plan = Plan {
        name: "mesh-monitor",
        purpose: "writes down when nodes were last seen and what they said of themselves",
        period: LOOK_AGAIN.max(periods.mesh_monitor),
        spacing: periods.mesh_monitor,
        first: Due::AfterPeriod,
    };
    let watched = Arc::clone(&registry);
    let trigger = Box::new(move || {
        let registry = Arc::clone(&watched);
        Box::pin(async move { registry.unsaved().await }) as _
    });
    supervisor.keep_on(plan, trigger, move || {
        let (registry, store) = (Arc::clone(&registry), Arc::clone(&store));
        async move {
            let unsaved = registry.take_unsaved();
            let count = unsaved.len();
            if count > 0 {
                let ids: Vec<NodeId> = unsaved.iter().map(|node| node.id).collect();
                // What is not written is tried again.
                let written = store.touch_nodes(unsaved).await;
                written.inspect_err(|_| registry.save_again(&ids))?;
            }
            let online = registry.online();
            Ok(Report::counted(count, &format!("nodes written down, {online} online")))
        }
    });
}

fn policy_end(supervisor: &Supervisor, registry: Arc<Registry>, decisions: Arc<NodeDecisions>) {
    let plan = Plan {
        name: "policy-end",
        purpose: "writes down the end of policies whose time is over",
        period: LOOK_AGAIN,
        spacing: Duration::ZERO,
        first: Due::Now,
    };
    let trigger = Box::new(move || {
        let registry = Arc::clone(&registry);
        Box::pin(async move { registry.policy_changed().await }) as _
    });
    supervisor.keep_on(plan, trigger, move || {
        let decisions = Arc::clone(&decisions);
        async move {
            let (ended, next) = decisions.end_policies().await?;
            Ok(Report { again_after: next, ..Report::counted(ended, "policies ended") })
        }
    });
}

/// Offers revocations that were not recorded to the store again, until it has them.
pub(crate) fn revocations(supervisor: &Supervisor, operators: &Arc<Operators>) {
    let plan = Plan {
        name: "revocations",
        purpose: "records revocations that the store did not take at once",
        period: LOOK_AGAIN,
        spacing: Duration::ZERO,
        first: Due::AfterPeriod,
    };
    let (waiting, operators) = (Arc::clone(operators), Arc::clone(operators));
    let trigger = Box::new(move || {
        let operators = Arc::clone(&waiting);
        Box::pin(async move { operators.unrecorded().await }) as _
    });
    supervisor.keep_on(plan, trigger, move || {
        let operators = Arc::clone(&operators);
        async move { Ok(Report::counted(operators.record_revocations().await?, "recorded late")) }
    });
}

fn audit_anchor(supervisor: &Supervisor, audit: Arc<AuditLog>, periods: Periods) {
    let plan = Plan {
        name: "audit-anchor",
        purpose: "moves the mark of the audit log to its last line",
        period: periods.audit_anchor,
        spacing: periods.audit_anchor,
        first: Due::Now,
    };
    supervisor.keep(plan, move || {
        let audit = Arc::clone(&audit);
        async move {
            audit.move_mark().await?;
            Ok(Report { summary: "marked".to_owned(), again_after: None })
        }
    });
}

fn pack_collection(supervisor: &Supervisor, content: Arc<Workspaces>, periods: Periods) {
    let plan = Plan {
        name: "pack-collection",
        purpose: "lets old versions, content that nothing names and interrupted uploads go",
        period: periods.pack_collection,
        spacing: Duration::ZERO,
        first: Due::Now,
    };
    let waiting = Arc::clone(&content);
    let trigger = Box::new(move || {
        let content = Arc::clone(&waiting);
        Box::pin(async move { content.pressed_for_room().await }) as _
    });
    supervisor.keep_on(plan, trigger, move || {
        let content = Arc::clone(&content);
        async move {
            let summary = content.collect().await?;
            Ok(Report { summary, again_after: None })
        }
    });
}

fn mirror_cleanup(supervisor: &Supervisor, members: Arc<Members>, periods: Periods) {
    let plan = Plan {
        name: "mirror-cleanup",
        purpose: "removes what is left of deleted workspaces",
        period: periods.mirror_cleanup,
        spacing: periods.mirror_cleanup,
        // A hub that starts has done it.
        first: Due::AfterPeriod,
    };
    supervisor.keep(plan, move || {
        let members = Arc::clone(&members);
        async move { Ok(Report::counted(members.finish_deletions().await?, "workspaces removed")) }
    });
}

fn invite_expiry(supervisor: &Supervisor, store: Arc<dyn Store>, periods: Periods) {
    let plan = Plan {
        name: "invite-expiry",
        purpose: "forgets invites that were of no use any more for long enough",
        period: periods.invite_expiry,
        spacing: periods.invite_expiry,
        first: Due::Now,
    };
    let keep_ms = i64::try_from(periods.invite_keep.as_millis()).unwrap_or(i64::MAX);
    supervisor.keep(plan, move || {
        let store = Arc::clone(&store);
        async move {
            let forgotten = store.forget_invites(unix_ms().saturating_sub(keep_ms)).await?;
            let forgotten = usize::try_from(forgotten).unwrap_or(usize::MAX);
            Ok(Report::counted(forgotten, "invites forgotten"))
        }
    });
}

fn history_trim(
    supervisor: &Supervisor,
    registry: Arc<Registry>,
    history: Arc<History>,
    events: Arc<EventBus>,
    periods: Periods,
) {
    let plan = Plan {
        name: "history-trim",
        purpose: "removes the history of forgotten nodes, and events that are too old",
        period: periods.history_trim,
        spacing: periods.history_trim,
        first: Due::Now,
    };
    supervisor.keep(plan, move || {
        let (registry, history) = (Arc::clone(&registry), Arc::clone(&history));
        let events = Arc::clone(&events);
        async move {
            let mut forgotten = 0;
            for node in history.store().nodes().await? {
                if registry.get(node).is_none() {
                    history.store().forget(node).await?;
                    forgotten += 1;
                }
            }
            let trimmed = events.trim().await?;
            let summary = format!("{trimmed} events and the history of {forgotten} nodes removed");
            Ok(Report { summary, again_after: None })
        }
    });
}

fn certificate_sweep(
    supervisor: &Supervisor,
    registry: Arc<Registry>,
    events: Arc<EventBus>,
    periods: Periods,
) {
    let plan = Plan {
        name: "certificate-sweep",
        purpose: "finds nodes whose certificate expired while they were away",
        period: periods.certificate_sweep,
        spacing: periods.certificate_sweep,
        first: Due::Now,
    };
    let told: Arc<Mutex<HashSet<NodeId>>> = Arc::default();
    supervisor.keep(plan, move || {
        let (registry, events, told) =
            (Arc::clone(&registry), Arc::clone(&events), Arc::clone(&told));
        async move {
            let Expired { recoverable, lost } =
                expired_certificates(&registry.all(), unix_ms());
            let now: HashSet<NodeId> = recoverable.iter().chain(&lost).copied().collect();
            let before = {
                let mut told = told.lock().unwrap_or_else(PoisonError::into_inner);
                std::mem::replace(&mut *told, now.clone())
            };
            for view in now.difference(&before).filter_map(|id| registry.get(*id)) {
                let node = &view.node;
                tracing::warn!(node = %node.name, id = %node.id, "the certificate of a node that is away has expired");
                let about = NewEvent::of_node(node);
                let about = about.with("needs_invite", lost.contains(&node.id));
                events.publish(Kind::NodeCertificateExpired, about);
            }
            let (recoverable, lost) = (recoverable.len(), lost.len());
            let summary = format!("{recoverable} expired, {lost} beyond recovery");
            Ok(Report { summary, again_after: None })
        }
    });
}
