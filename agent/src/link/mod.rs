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
mod request;
pub mod session;
mod task;
pub mod workspaces;

use cortex_proto::v1;
use cortex_shared::policy::Mode;

/// A mode as the protocol writes it.
#[must_use]
pub fn proto_mode(mode: Mode) -> v1::Mode {
    match mode {
        Mode::Strict => v1::Mode::Strict,
        Mode::Permissive => v1::Mode::Permissive,
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
    use authority::Missing;
    let missing =
        vec![Missing::Role(None), Missing::Policy, Missing::PolicyEnded(0), Missing::Ceiling];
    let refusals = [
        request::Refusal::NotPermitted { missing },
        request::Refusal::NotRecorded,
        request::Refusal::NoSuchWorkspace { name: "w".to_owned() },
        request::Refusal::WorkspaceUnusable { reason: String::new() },
    ];
    let mut hints: Vec<String> = refusals.iter().map(request::Refusal::hint).collect();
    hints.push(renewal::this_machine());
    hints
}
