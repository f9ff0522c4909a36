//! The session with the hub, and what it makes this node do.
//!
//! | module | subject |
//! |---|---|
//! | [`session`] | owns the `Link` stream: hello, heartbeats, reconnecting |
//! | `end` | why a session ended, and what that means for the next attempt |
//! | [`renewal`] | the certificate: renewed in time, recovered when that was missed |
//! | [`cut_off`] | how long commands go on without a hub |
//! | [`dispatch`] | what each frame of the hub means here |
//! | [`authority`] | how much a command may do, whatever the hub says |
//! | `task`, `carrier` | one command through any number of streams: who runs it, and the books |
//! | `files` | an operation on files, through its stream |
//! | `request` | whether a command may run at all |
//! | `journal` | which tasks have been begun, so that none runs twice, and how they ended |
//! | [`workspaces`], `report` | the sync engine of each workspace this node is a member of, and its state |
//!
//! Nothing of a session outlives the process but the journal of tasks and the last list of
//! memberships, which are on disk before they count. Tasks outlive their session: the next one takes
//! them up. A stop of the process ends them.

pub mod authority;
mod carrier;
pub mod cut_off;
pub mod dispatch;
mod end;
mod files;
mod journal;
mod permit;
mod policy_log;
pub mod renewal;
pub(crate) mod report;
mod report_pace;
mod request;
mod running;
pub mod session;
mod task;
pub mod workspaces;

use cortex_proto::v1;
use cortex_shared::policy::{Bound, Mode, Network};

/// A mode as the protocol writes it.
#[must_use]
pub fn proto_mode(mode: Mode) -> v1::Mode {
    match mode {
        Mode::Strict => v1::Mode::Strict,
        Mode::Permissive => v1::Mode::Permissive,
    }
}

/// A network as the protocol writes it.
#[must_use]
pub fn proto_network(network: Network) -> v1::Network {
    match network {
        Network::None => v1::Network::None,
        Network::Full => v1::Network::Full,
    }
}

/// What somebody lets commands do, as the protocol writes it; what this agent does not know allows
/// nothing.
#[must_use]
pub fn bound_of(mode: i32, network: i32) -> Bound {
    Bound { mode: mode_of(mode), network: network_of(network) }
}

/// A network as the protocol writes it; a value this agent does not know is none.
#[must_use]
pub fn network_of(value: i32) -> Network {
    match v1::Network::try_from(value) {
        Ok(v1::Network::Full) => Network::Full,
        Ok(v1::Network::None) | Err(_) => Network::None,
    }
}

/// A mode as the protocol writes it; a value this agent does not know is strict.
#[must_use]
pub fn mode_of(value: i32) -> Mode {
    match v1::Mode::try_from(value) {
        Ok(v1::Mode::Permissive) => Mode::Permissive,
        Ok(v1::Mode::Strict) | Err(_) => Mode::Strict,
    }
}

/// Every hint that this room gives, for the test that they name commands that exist.
#[cfg(test)]
pub(crate) fn hints() -> Vec<String> {
    use authority::{Missing, Party, Wanted};

    use crate::sandbox::exposed::ExposeRefusal;
    let parties = [Party::Role(None), Party::Policy, Party::PolicyEnded(0), Party::Ceiling];
    let not_permitted = |wanted| {
        let missing = parties.map(|party| Missing { wanted, party }).to_vec();
        request::Refusal::NotPermitted { wanted, missing }
    };
    let refusals = [
        not_permitted(Wanted::Permissive),
        not_permitted(Wanted::Network),
        request::Refusal::NotRecorded,
        request::Refusal::NoSuchWorkspace { name: "w".to_owned() },
        request::Refusal::WorkspaceUnusable { reason: String::new() },
        request::Refusal::NotShown(ExposeRefusal::Special { path: "/x".into() }),
    ];
    let mut hints: Vec<String> = refusals.iter().map(request::Refusal::hint).collect();
    hints.push(renewal::this_machine());
    hints
}
