//! What both daemons of cortex mesh agree on: types and pure logic, no protocol, no store, no
//! command line.
//!
//! | module | subject |
//! |---|---|
//! | [`ids`] | identifiers, a type each |
//! | [`labels`], [`policy`] | names, labels, modes and roles |
//! | [`secret`], [`peer`] | invite tokens; identities in certificates |
//! | [`wire_path`], [`entry`] | names, paths, entries and tree digests of a workspace |
//! | [`library`] | names of the mesh-wide library of skills |
//! | [`chunk`], [`pack`] | how content is cut, and the unit in which it travels and rests |
//! | [`mass_delete`] | when deletions wait for somebody's word |
//! | [`replay`] | output under way, which can be sent again |
//! | [`durable`], [`crash`] | files that survive a crash; crashing on purpose |
//! | [`systemd`] | installing a program as a service |
//! | [`dead_line`] | connections whose other end is gone |
//! | [`backoff`], [`patience`], [`tasks`], [`clock`], [`text`], [`telemetry`] | retrying, supervised tasks, the time, text, logs |
//!
//! Invariants: nothing here opens a socket or knows the generated protocol, and only [`systemd`] starts
//! a process; everything that parses is bounded and refuses rather than guesses.

#![warn(missing_docs)]
#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod backoff;
pub mod chunk;
pub mod clock;
pub mod crash;
pub mod dead_line;
pub mod durable;
pub mod entry;
pub mod ids;
pub mod labels;
pub mod library;
pub mod mass_delete;
pub mod pack;
pub mod patience;
pub mod peer;
pub mod policy;
pub mod read_ahead;
pub mod replay;
pub mod secret;
pub mod systemd;
pub mod tasks;
pub mod telemetry;
pub mod text;
pub mod wire_path;
