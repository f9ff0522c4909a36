//! How a node arrives: which certificate it presents, from which machine, and whether that machine has a
//! claim to the identity. Nothing here waits for the store; what has to be recorded is handed out.

use std::collections::VecDeque;
use std::net::SocketAddr;
use std::time::Duration;

use cortex_proto::v1::SandboxReport;
use cortex_shared::clock::unix_ms;
use cortex_shared::ids::NodeId;
use cortex_shared::policy::Bound;
use tokio::time::Instant;

use super::{Known, NodeRefusal, Registry};
use crate::store::{CertificateState, CloneSuspicion, Facts, Machine, Node, Presented};

/// So many sessions may be taken over by another machine within [`TAKEOVER_WINDOW`]. One more by a machine
/// that had it before, and both have the newest certificate: the identity was copied.
const MAX_TAKEOVERS: usize = 3;
/// See [`MAX_TAKEOVERS`].
const TAKEOVER_WINDOW: Duration = Duration::from_secs(60);

/// What a node says of itself when it begins a session, and what is seen of it.
#[derive(Clone, Debug, Default)]
pub struct Arrival {
    /// Its machine, for lists.
    pub facts: Facts,
    /// Its machine, as it is told from others.
    pub machine: Machine,
    /// Its own ceiling.
    pub ceiling: Bound,
    /// What its kernel can enforce.
    pub sandbox: Option<SandboxReport>,
    /// Where its connection comes from.
    pub address: Option<SocketAddr>,
    /// Generation of the certificate it presents.
    pub generation: u64,
    /// Whether the certificate itself says so, and not only the node.
    pub generation_is_signed: bool,
    /// The hub's clock minus the node's; none if the node did not tell its time.
    pub skew_ms: Option<i64>,
}

/// Why no session begins.
#[derive(Clone, Debug, thiserror::Error)]
pub enum ArrivalRefusal {
    /// The node may not call at all.
    #[error(transparent)]
    Node(#[from] NodeRefusal),
    /// The identity belongs to another machine.
    #[error("the identity of {name:?} is in use on another machine")]
    Cloned {
        /// The node's name.
        name: String,
        /// Who was refused.
        suspicion: Box<CloneSuspicion>,
        /// The machine that keeps the identity, as it was last seen.
        holder: Machine,
        /// Whether this is to be recorded: it was not, a short time ago.
        news: bool,
    },
}

/// What is known of a node's connection, in memory only.
#[derive(Clone, Debug, Default)]
pub(super) struct Arrived {
    /// Where its last session came from.
    pub(super) address: Option<SocketAddr>,
    /// The hub's clock minus the node's, as last measured.
    pub(super) skew_ms: i64,
    /// Generation of the certificate that its last session began with.
    pub(super) generation: u64,
    /// When a machine took the session over from another, the last few times.
    takeovers: VecDeque<Instant>,
    /// The machine from which it was taken over last.
    displaced: Option<Machine>,
}

impl Arrived {
    /// Whether the newcomer and the machine that has the session take it from each other in turns.
    fn alternate(&mut self, newcomer: &Machine, holder: &Machine, now: Instant) -> bool {
        if !newcomer.differs_from(holder) {
            return false;
        }
        self.takeovers.retain(|at| now.saturating_duration_since(*at) < TAKEOVER_WINDOW);
        let back = self.displaced.as_ref().is_some_and(|machine| machine == newcomer);
        if back && self.takeovers.len() >= MAX_TAKEOVERS {
            return true;
        }
        self.takeovers.push_back(now);
        // What is older than the last few decides nothing.
        while self.takeovers.len() > MAX_TAKEOVERS {
            self.takeovers.pop_front();
        }
        self.displaced = Some(holder.clone());
        false
    }
}

impl Known {
    /// Decides whether this arrival may have the session, and how its certificate stands to the newest.
    pub(super) fn judge(&mut self, arrival: &Arrival) -> Result<Presented, ArrivalRefusal> {
        let presented = self.node.certificate.judge(arrival.generation, &arrival.machine);
        let flapping = self.session.is_some()
            && presented != Presented::Overtaken
            && self.arrived.alternate(&arrival.machine, &self.node.machine, Instant::now());
        if presented != Presented::Overtaken && !flapping {
            return Ok(presented);
        }
        let suspicion = CloneSuspicion {
            at_ms: unix_ms(),
            address: arrival.address.map(|address| address.to_string()).unwrap_or_default(),
            machine: arrival.machine.clone(),
            presented_generation: arrival.generation,
            current_generation: self.node.certificate.generation,
        };
        let news = !self.node.clone.as_ref().is_some_and(|earlier| suspicion.repeats(earlier));
        if news {
            self.node.clone = Some(suspicion.clone());
        }
        Err(ArrivalRefusal::Cloned {
            name: self.node.name.clone(),
            suspicion: Box::new(suspicion),
            holder: self.node.machine.clone(),
            news,
        })
    }

    /// Takes over what is known of a node that has just begun a session.
    pub(super) fn arrive(&mut self, arrival: Arrival, presented: Presented) {
        let certificate = &mut self.node.certificate;
        match presented {
            Presented::Newest => certificate.connected = true,
            // The hub's data is older than this certificate. From now on it is the newest; the store
            // learns it with the next one.
            Presented::Ahead if arrival.generation_is_signed => {
                certificate.generation = arrival.generation;
                certificate.boot_id.clone_from(&arrival.machine.boot_id);
                certificate.connected = true;
            }
            Presented::Ahead | Presented::MissedAnswer | Presented::Overtaken => {}
        }
        self.node.facts = arrival.facts;
        self.node.machine = arrival.machine;
        self.node.ceiling = arrival.ceiling;
        self.sandbox = arrival.sandbox;
        self.arrived.address = arrival.address;
        self.arrived.generation = arrival.generation;
        self.arrived.skew_ms = arrival.skew_ms.unwrap_or_default();
    }

    /// Whether a certificate of this generation still stands for the node: it is not older than the one
    /// its session began with, or, without a session, than the newest that has ever connected.
    pub(super) fn accepts(&self, generation: u64) -> bool {
        let certificate = &self.node.certificate;
        let oldest = match &self.session {
            Some(_) => self.arrived.generation,
            None if certificate.connected => certificate.generation,
            None => 0,
        };
        generation >= oldest
    }
}

impl Registry {
    /// Takes over what the store has recorded of a node's new certificate.
    pub fn renewed(&self, record: &Node) {
        self.change(record.id, |known| {
            let (new, old) = (&record.certificate, &mut known.node.certificate);
            // Two at once may arrive here in another order than they were recorded.
            if new.generation < old.generation {
                return;
            }
            let connected = old.connected && old.generation == new.generation;
            *old = CertificateState { connected, ..new.clone() };
            // A session says of its own machine where it is.
            if known.session.is_none() {
                known.node.machine = record.machine.clone();
            }
        });
    }

    /// Takes over a suspicion that the store has recorded.
    pub fn suspected(&self, id: NodeId, suspicion: &CloneSuspicion) {
        self.change(id, |known| {
            if !known.node.clone.as_ref().is_some_and(|earlier| suspicion.repeats(earlier)) {
                known.node.clone = Some(suspicion.clone());
            }
        });
    }
}

#[cfg(test)]
mod tests {
    use tokio_util::sync::CancellationToken;

    use super::super::tests::node;
    use super::*;

    fn machine(name: &str) -> Machine {
        Machine { boot_id: name.into(), ..Machine::default() }
    }

    fn arrive(registry: &Registry, id: NodeId, generation: u64, from: &str) -> bool {
        let arrival = Arrival { machine: machine(from), generation, ..Arrival::default() };
        registry.begin_session(id, arrival, CancellationToken::new()).is_ok()
    }

    #[test]
    fn machines_that_take_the_session_from_each_other_are_told_apart_from_restarts() {
        // Who comes, one after the other; the last of them is refused, or not.
        for (order, refused) in [
            ("abab", false),
            ("ababa", true),
            // A machine that is started again and again has a boot id of its own each time.
            ("abcdefgh", false),
            ("aaaaaaaa", false),
            // What is not known of a machine makes it no other.
            ("a a a a a", false),
        ] {
            let one = node("a");
            let id = one.id;
            let registry = Registry::new(vec![one]);
            let results: Vec<bool> = order
                .chars()
                .map(|from| arrive(&registry, id, 1, from.to_string().trim()))
                .collect();
            let (last, before) = results.split_last().unwrap();
            assert!(before.iter().all(|begun| *begun), "{order}: {results:?}");
            assert_eq!(*last, !refused, "{order}");
            let clone = registry.get(id).unwrap().node.clone;
            assert_eq!(clone.map(|c| c.machine), refused.then(|| machine("a")), "{order}");
        }
    }

    #[test]
    fn a_move_from_machine_to_machine_and_back_takes_its_time() {
        for (pause, refused) in [(TAKEOVER_WINDOW / 3, false), (TAKEOVER_WINDOW / 10, true)] {
            let (mut arrived, mut now) = (Arrived::default(), Instant::now());
            let mut turns =
                ["b", "a", "b", "a", "b", "a"].into_iter().zip(["a", "b"].into_iter().cycle());
            let any_refused = turns.any(|(newcomer, holder)| {
                now += pause;
                arrived.alternate(&machine(newcomer), &machine(holder), now)
            });
            assert_eq!(any_refused, refused, "every {pause:?}");
        }
    }

    #[test]
    fn a_renewal_counts_in_whatever_order_it_is_heard_of() {
        let one = node("a");
        let id = one.id;
        let registry = Registry::new(vec![one.clone()]);
        assert!(arrive(&registry, id, 1, "a"));
        let record = |generation| Node {
            certificate: CertificateState { generation, ..one.certificate.clone() },
            machine: machine("elsewhere"),
            ..one.clone()
        };
        let state = || registry.get(id).unwrap().node;
        registry.renewed(&record(3));
        registry.renewed(&record(2));
        assert_eq!((state().certificate.generation, state().certificate.connected), (3, false));
        assert_eq!(state().machine, machine("a"), "the session's own word");
        assert!(arrive(&registry, id, 3, "a"));
        registry.renewed(&record(3));
        assert!(state().certificate.connected, "it has connected already");
        // The session has it: what is older no longer stands for the node.
        for (generation, accepted) in [(2, false), (3, true), (4, true)] {
            let admitted = registry.admit(id, &one.key, Some(generation));
            assert_eq!(admitted.is_ok(), accepted, "{generation}");
        }
        assert!(registry.admit(id, &one.key, None).is_ok(), "where something else decides");
    }

    #[test]
    fn a_certificate_that_the_hubs_data_does_not_know_is_the_newest_if_it_is_signed() {
        for signed in [true, false] {
            let one = node("a");
            let id = one.id;
            let registry = Registry::new(vec![one]);
            let arrival =
                Arrival { generation: 9, generation_is_signed: signed, ..Arrival::default() };
            registry.begin_session(id, arrival, CancellationToken::new()).unwrap();
            let newest = registry.get(id).unwrap().node.certificate.generation;
            assert_eq!(newest, if signed { 9 } else { 1 });
        }
    }
}
