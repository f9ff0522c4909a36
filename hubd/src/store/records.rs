//! The records of the store.

mod authority;
mod skills;
mod tasks;

use std::collections::BTreeSet;
use std::fmt;
use std::net::IpAddr;

use cortex_shared::ids::{NodeId, WorkspaceId};
use cortex_shared::labels::Labels;
use cortex_shared::policy::{Bound, Role};
use cortex_shared::secret::{InviteId, SecretHash};

use super::identity::{CertificateState, CloneSuspicion, Machine, NewCertificate};
use super::source::SourceRange;
pub use authority::{Actor, LabelChange, LabelRefusal, NodePolicy, OperatorRecord, Scope};
pub use skills::{SkillOrigin, SkillVersion};
pub use tasks::{
    Acceptance, IdempotencyKey, LateOutcome, LateReport, NewTask, ShownCommand, TaskEnd,
    TaskEndState, TaskQuery, TaskRecord, Verdict,
};

/// SHA-256 of a public key (its SubjectPublicKeyInfo).
pub type KeyHash = [u8; 32];

/// Whom an invite admits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum InviteKind {
    /// Nodes.
    Node,
    /// One operator, with this role.
    Operator(Role),
}

impl fmt::Display for InviteKind {
    /// `node`, or the operator's role: as it is stored and shown.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Node => f.write_str("node"),
            Self::Operator(role) => role.fmt(f),
        }
    }
}

/// An invite to be recorded.
#[derive(Clone, Debug)]
pub struct NewInvite {
    /// The public part of the token.
    pub id: InviteId,
    /// What is kept of the secret part.
    pub secret_hash: SecretHash,
    /// Whom it admits.
    pub kind: InviteKind,
    /// How often it can be used.
    pub max_uses: u32,
    /// When it ends.
    pub expires_at_ms: i64,
    /// When it was made.
    pub created_at_ms: i64,
    /// Who made it.
    pub created_by: String,
    /// Labels its nodes get.
    pub labels: Labels,
    /// Names it allows (a shell pattern); for an operator the very name. Empty for any.
    pub name_pattern: String,
    /// Workspaces its nodes become members of.
    pub workspaces: BTreeSet<WorkspaceId>,
    /// Where it is good from; empty for anywhere.
    pub sources: BTreeSet<SourceRange>,
    /// Who its nodes belong to; shown, not interpreted.
    pub owner: String,
    /// Labels that a node must have for the operator to see or command it; for an operator's invite.
    pub scope: Labels,
}

/// A recorded invite.
#[derive(Clone, Debug)]
pub struct Invite {
    /// What was recorded.
    pub invite: NewInvite,
    /// How often it has been used.
    pub uses: u32,
    /// When it was revoked.
    pub revoked_at_ms: Option<i64>,
}

/// A node.
#[derive(Clone, Debug)]
pub struct Node {
    /// Its identity.
    pub id: NodeId,
    /// Its unique name.
    pub name: String,
    /// Labels set by operators and invites.
    pub labels: Labels,
    /// Its public key.
    pub key: KeyHash,
    /// The hub's policy for it.
    pub policy: NodePolicy,
    /// It gets no new commands.
    pub cordoned: bool,
    /// What it last said of its own ceiling.
    pub ceiling: Bound,
    /// When it joined.
    pub joined_at_ms: i64,
    /// When a session of it last began or ended; 0 for never.
    pub last_seen_ms: i64,
    /// When it was revoked.
    pub revoked_at_ms: Option<i64>,
    /// What it last said of its machine.
    pub facts: Facts,
    /// Who it belongs to, by the invite.
    pub owner: String,
    /// Its newest certificate.
    pub certificate: CertificateState,
    /// The machine it last connected from.
    pub machine: Machine,
    /// The last suspicion that its identity was copied.
    pub clone: Option<CloneSuspicion>,
}

/// What a node says of itself. Never used to decide what anyone may do.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Facts {
    /// Host name.
    pub hostname: String,
    /// Operating system.
    pub os: String,
    /// Processor architecture.
    pub arch: String,
    /// Version of the agent.
    pub agent_version: String,
}

/// A request to turn an invite into a node.
#[derive(Clone, Debug)]
pub struct NodeRedemption {
    /// From the token.
    pub invite: InviteId,
    /// From the token.
    pub secret_hash: SecretHash,
    /// The key the node made.
    pub key: KeyHash,
    /// The id it is given if it is new.
    pub new_id: NodeId,
    /// The name it wants; empty to have one made of the host name.
    pub wanted_name: String,
    /// Its own labels; those of the invite win.
    pub labels: Labels,
    /// Its own ceiling.
    pub ceiling: Bound,
    /// Its machine.
    pub facts: Facts,
    /// The same, as it is told from others.
    pub machine: Machine,
    /// The certificate that it is to get.
    pub certificate: NewCertificate,
    /// Where the request comes from.
    pub caller: Caller,
    /// The hub's clock.
    pub now_ms: i64,
}

/// Who asks to redeem an invite, as far as that is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Caller {
    /// The address at the other end of the connection; none for the administration socket.
    pub address: Option<IpAddr>,
}

impl Caller {
    /// The address as text; empty if there is none.
    #[must_use]
    pub fn shown(&self) -> String {
        self.address.map(|address| address.to_string()).unwrap_or_default()
    }
}

/// A request to turn an invite into an operator.
#[derive(Clone, Debug)]
pub struct OperatorRedemption {
    /// From the token.
    pub invite: InviteId,
    /// From the token.
    pub secret_hash: SecretHash,
    /// The key the operator made.
    pub key: KeyHash,
    /// Where the request comes from.
    pub caller: Caller,
    /// The hub's clock.
    pub now_ms: i64,
}

/// An operator that has logged in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Operator {
    /// Its unique name.
    pub name: String,
    /// What it may do.
    pub role: Role,
    /// Labels that a node must have for it to see or command it; empty for all nodes.
    pub scope: Labels,
}

/// Why an invite was not redeemed. Only a caller that knew the secret is told which.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RedeemRefusal {
    /// No such invite, or the secret is wrong, or it admits something else.
    #[error("this invite token is not valid here")]
    Unknown,
    /// Past its time.
    #[error("this invite has expired")]
    Expired,
    /// Used as often as it may be.
    #[error("this invite has been used up")]
    UsedUp,
    /// Revoked by an operator.
    #[error("this invite has been revoked")]
    Revoked,
    /// Not good from this address.
    #[error("this invite is not valid from the address {address}")]
    SourceNotAllowed {
        /// Where the request came from.
        address: String,
    },
    /// The invite does not allow this name.
    #[error("this invite allows only names like {pattern:?}, not {name:?}")]
    NameNotAllowed {
        /// The name that was wanted.
        name: String,
        /// The pattern of the invite.
        pattern: String,
    },
    /// Another node has this name.
    #[error("another node is named {name:?}")]
    NameTaken {
        /// The name that was wanted.
        name: String,
    },
}

impl RedeemRefusal {
    /// The stable word of the reason.
    #[must_use]
    pub fn word(&self) -> &'static str {
        match self {
            Self::Unknown => "invalid_token",
            Self::Expired => "invite_expired",
            Self::UsedUp => "invite_used_up",
            Self::Revoked => "invite_revoked",
            Self::SourceNotAllowed { .. } => "source_not_allowed",
            Self::NameNotAllowed { .. } => "name_not_allowed",
            Self::NameTaken { .. } => "name_taken",
        }
    }
}

/// A workspace and its members.
#[derive(Clone, Debug)]
pub struct Workspace {
    /// Its identity.
    pub id: WorkspaceId,
    /// Its unique name.
    pub name: String,
    /// When it was made.
    pub created_at_ms: i64,
    /// The scope of whoever made it: whose it is while it has no members.
    pub scope: Scope,
    /// The nodes that hold a copy.
    pub members: BTreeSet<NodeId>,
}

/// A line for the audit log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NewAudit {
    /// When.
    pub at_ms: i64,
    /// Who: an operator's name, `local`, `node:NAME` or `hub`.
    pub actor: String,
    /// What, such as `node.joined`.
    pub action: &'static str,
    /// To what: a node, operator, task or invite.
    pub target: String,
    /// The particulars, a JSON object. Never a secret, never file content.
    pub detail: String,
}

/// Number and hash of the last line of the audit log.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AuditHead {
    /// 0 for an empty log.
    pub seq: u64,
    /// 32 zero bytes for an empty log.
    pub hash: [u8; 32],
}

/// A line of the audit log.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct AuditLine {
    /// Its number, one above the line before.
    pub seq: u64,
    /// When.
    pub at_ms: i64,
    /// Who.
    pub actor: String,
    /// What.
    pub action: String,
    /// To what.
    pub target: String,
    /// The particulars, a JSON object.
    pub detail: String,
    /// Hash of the line before.
    pub prev_hash: [u8; 32],
    /// Hash of this line.
    pub hash: [u8; 32],
}

impl AuditLine {
    /// The line that follows `head`.
    #[must_use]
    pub fn after(head: AuditHead, new: &NewAudit) -> Self {
        let mut line = Self {
            seq: head.seq + 1,
            at_ms: new.at_ms,
            actor: new.actor.clone(),
            action: new.action.to_owned(),
            target: new.target.clone(),
            detail: new.detail.clone(),
            prev_hash: head.hash,
            hash: [0; 32],
        };
        line.hash = line.computed_hash();
        line
    }

    /// The hash that this line must have.
    #[must_use]
    pub fn computed_hash(&self) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new_derive_key("cortex.v1 audit line");
        hasher.update(&self.prev_hash);
        hasher.update(&self.seq.to_be_bytes());
        hasher.update(&self.at_ms.to_be_bytes());
        for text in [&self.actor, &self.action, &self.target, &self.detail] {
            // The length comes first, so that no two lines give the same bytes.
            hasher.update(&(text.len() as u64).to_be_bytes());
            hasher.update(text.as_bytes());
        }
        *hasher.finalize().as_bytes()
    }
}
