//! Records of a node's certificates, of machines, and of the authorities that sign.

use cortex_shared::ids::NodeId;
use serde::{Deserialize, Serialize};

use super::{KeyHash, Node};

/// What tells one machine from another for people. Never an identity: all of it is copied along with
/// a disk, but for the boot id.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Machine {
    /// The system's machine id.
    pub machine_id: String,
    /// Made anew by the kernel at each start of the machine.
    pub boot_id: String,
    /// Host name.
    pub hostname: String,
}

impl Machine {
    /// Whether the two are certainly not one running machine. What is not known differs from nothing.
    #[must_use]
    pub fn differs_from(&self, other: &Self) -> bool {
        let differ = |a: &str, b: &str| !a.is_empty() && !b.is_empty() && a != b;
        differ(&self.boot_id, &other.boot_id) || differ(&self.machine_id, &other.machine_id)
    }
}

/// The certificate last issued to a node.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct CertificateState {
    /// Counts the certificates of this identity, beginning with 1.
    pub generation: u64,
    /// Boot id of the machine that it was issued to.
    pub boot_id: String,
    /// Whether a certificate of this generation has ever connected.
    pub connected: bool,
    /// End of its life, milliseconds since the Unix epoch.
    pub not_after_ms: i64,
    /// Key of the authority that signed it.
    pub authority: KeyHash,
}

/// How the generation that somebody presents stands to the newest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Presented {
    /// The newest.
    Newest,
    /// The one before, by somebody who may not have got the newest: its answer was lost.
    MissedAnswer,
    /// One that the hub has no memory of: its database is older than that certificate.
    Ahead,
    /// Overtaken: the newest belongs to somebody else, so this is a copy of the identity.
    Overtaken,
}

/// Generations above this are made up: at two a day it is reached in the year 5,000,000.
const HIGHEST_GENERATION: u64 = 1 << 32;

impl CertificateState {
    /// Judges a generation that a machine presents.
    #[must_use]
    pub fn judge(&self, generation: u64, machine: &Machine) -> Presented {
        if generation == self.generation {
            return Presented::Newest;
        }
        if generation > self.generation {
            // A made-up number would be the newest for ever after.
            let plausible = generation <= HIGHEST_GENERATION;
            return if plausible { Presented::Ahead } else { Presented::Overtaken };
        }
        let one_before = generation + 1 == self.generation;
        let same_boot = !self.boot_id.is_empty() && self.boot_id == machine.boot_id;
        if one_before && (same_boot || !self.connected) {
            Presented::MissedAnswer
        } else {
            Presented::Overtaken
        }
    }
}

/// What is recorded of a certificate before it is handed out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NewCertificate {
    /// End of its life, milliseconds since the Unix epoch.
    pub not_after_ms: i64,
    /// Key of the authority that signs it.
    pub authority: KeyHash,
}

/// Somebody presented an identity that belongs to another machine, and was refused.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CloneSuspicion {
    /// When, milliseconds since the Unix epoch.
    pub at_ms: i64,
    /// Where it came from; empty if that is not known.
    pub address: String,
    /// The machine that was refused.
    pub machine: Machine,
    /// What it presented.
    pub presented_generation: u64,
    /// The newest.
    pub current_generation: u64,
}

impl CloneSuspicion {
    /// One machine that keeps trying is recorded once in this time, so that it cannot fill the log.
    const QUIET_MS: i64 = 10 * 60 * 1000;
    /// And one that calls itself another machine each time, once in this.
    const QUIET_FOR_ALL_MS: i64 = 10 * 1000;

    /// Whether it says nothing that is worth a line of its own after an earlier one.
    #[must_use]
    pub fn repeats(&self, earlier: &Self) -> bool {
        let quiet_ms =
            if self.machine == earlier.machine { Self::QUIET_MS } else { Self::QUIET_FOR_ALL_MS };
        (self.at_ms - earlier.at_ms).abs() < quiet_ms
    }
}

/// A request for the next certificate of a node.
#[derive(Clone, Debug)]
pub struct Renewal {
    /// Whose; from its certificate, or, in a recovery, its own word, which its key has to confirm.
    pub node: NodeId,
    /// The key to be certified.
    pub key: KeyHash,
    /// Generation of the certificate it has.
    pub generation: u64,
    /// Its machine.
    pub machine: Machine,
    /// Where it is; empty if that is not known.
    pub address: String,
    /// The certificate that it is to get.
    pub certificate: NewCertificate,
    /// The proof of who asks.
    pub proof: RenewalProof,
    /// The hub's clock.
    pub now_ms: i64,
}

/// What proves who asks for a certificate.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RenewalProof {
    /// A certificate that is valid.
    Certificate,
    /// The key alone, which is enough if the last certificate ended this short a time ago at most.
    Key {
        /// In milliseconds.
        window_ms: i64,
    },
}

/// Why a node gets no certificate.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RenewRefusal {
    /// No such node, or its key is another one.
    #[error("this node is unknown")]
    Unknown,
    /// It is revoked.
    #[error("this node has been revoked")]
    Revoked,
    /// Its last certificate ended too long ago.
    #[error("the last certificate of this node ended too long ago to be recovered")]
    TooLate,
    /// The identity has been copied, and this is not the machine that has its newest certificate.
    #[error(
        "the identity of {name:?} is in use on another machine, which has its newest certificate"
    )]
    Cloned {
        /// The node's name.
        name: String,
        /// What was recorded.
        suspicion: Box<CloneSuspicion>,
        /// The machine that has the newest certificate, as it was last seen.
        holder: Machine,
    },
}

/// What came of a [`Renewal`]: the record with its new generation, or why not.
pub type RenewOutcome = Result<Node, RenewRefusal>;

/// How far the replacement of the certificate authority is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum CaStage {
    /// There is one authority.
    Single,
    /// The next one exists and is trusted; it signs nothing yet.
    Prepared,
    /// The next one signs members; the hub still proves itself by the old one, so that nodes which
    /// have not heard of the next one can still come and be told.
    Issuing,
    /// The next one signs everything; members that the old one signed are still admitted.
    TrustOnly,
}

impl CaStage {
    /// The word on the command line and in the protocol.
    #[must_use]
    pub fn word(self) -> &'static str {
        match self {
            Self::Single => "single",
            Self::Prepared => "prepared",
            Self::Issuing => "issuing",
            Self::TrustOnly => "trust-only",
        }
    }
}

/// Which authorities there are. An authority is named by the files that hold it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CaState {
    /// See [`CaStage`].
    pub stage: CaStage,
    /// The authority before the replacement.
    pub established: String,
    /// The one that replaces it; none while there is one only.
    pub next: Option<String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn machine(boot_id: &str) -> Machine {
        Machine { boot_id: boot_id.into(), ..Machine::default() }
    }

    #[test]
    fn generations_are_judged_by_who_can_have_the_newest() {
        use Presented::{Ahead, MissedAnswer, Newest, Overtaken};
        let table = [
            // newest is connected, presented, presenting machine, verdict
            (true, 7, "a", Newest),
            (true, 7, "b", Newest),
            (true, 6, "a", MissedAnswer),
            (true, 6, "b", Overtaken),
            (true, 6, "", Overtaken),
            (false, 6, "b", MissedAnswer),
            (false, 5, "a", Overtaken),
            (false, 0, "a", Overtaken),
            (true, 8, "b", Ahead),
            (true, u64::MAX, "a", Overtaken),
        ];
        for (connected, generation, boot_id, verdict) in table {
            let state = CertificateState {
                generation: 7,
                boot_id: "a".into(),
                connected,
                ..CertificateState::default()
            };
            let judged = state.judge(generation, &machine(boot_id));
            assert_eq!(judged, verdict, "{generation} by {boot_id:?}, connected: {connected}");
        }
    }

    #[test]
    fn what_is_not_known_of_a_machine_makes_it_no_other() {
        assert!(machine("a").differs_from(&machine("b")));
        assert!(!machine("a").differs_from(&machine("a")));
        assert!(!machine("a").differs_from(&machine("")));
        let copied = Machine { machine_id: "m".into(), ..machine("b") };
        assert!(copied.differs_from(&Machine { machine_id: "m".into(), ..machine("a") }));
    }
}
