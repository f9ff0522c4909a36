//! The hub of a cortex mesh: admits nodes, relays commands, orders and stores workspace changes, and
//! remembers. It never merges files and never interprets output.
//!
//! ```text
//! main → cli → hub → http → grpc, worker → task, enroll → node, sync → events, store
//! ```
//!
//! | module | subject |
//! |---|---|
//! | `cli` | the command line; everything but `serve` and `init` talks to a running hub |
//! | [`hub`] | the daemon: put together, listening, taken apart in order |
//! | [`http`] | installing nodes, health, metrics, API and web page, by the same authority as gRPC |
//! | [`grpc`] | the only place where protocol and domain meet; who may call what (`auth`) |
//! | [`enroll`] | invites redeemed, and the certificate authority |
//! | [`node`] | known nodes, live sessions, memberships |
//! | [`task`] | commands: journalled, relayed, each with one verdict |
//! | [`sync`] | workspace versions and content |
//! | [`skills`] | the library: directories of workspaces that every node has |
//! | [`events`] | what happens, for those who want to hear of it |
//! | [`worker`] | background work under a supervisor |
//! | [`error_id`] | the hub's own errors: an id for the caller, the chain of causes for the log |
//! | [`store`] | what is remembered, behind traits in words of the domain |
//! | [`counters`] | what the program has done, for metrics |
//! | [`backup`] | all of what is durable: copied while the hub runs, put back, checked |
//! | [`mod@bench`] | emulated nodes that measure a hub of their own; no part of a serving hub |
//!
//! A call passes [`grpc::accept`] (who is it), [`grpc::auth`] (may it) and [`grpc::convert`] (is it
//! well formed) before any other code sees it.
//!
//! Invariants. What is acknowledged is durable. Identity is the certificate's, never a message's. A
//! reconnect with a valid certificate touches no database. Every queue is bounded, in bytes where
//! content is in it. Every stream is read at once by a task that waits for no consumer. Deliberately
//! absent: a lock held across an await, a task nobody owns, and state that a restart may not lose.

#![cfg_attr(test, allow(clippy::unwrap_used))]

use std::alloc::System;

use zeroizing_alloc::ZeroAlloc;

/// The allocator of the program. Memory is wiped when it is freed. A token passes through buffers of TLS, HTTP/2 and the codec that
/// nobody else can wipe, and would stand in a core image of the hub long after it was used; so would keys.
pub const ALLOCATOR: ZeroAlloc<System> = ZeroAlloc(System);

pub mod authority;
pub mod backup;
pub mod bench;
mod cli;
pub mod config;
pub mod counters;
pub mod enroll;
pub mod error_id;
pub mod events;
pub mod grpc;
pub mod http;
pub mod hub;
pub mod node;
pub mod rate;
pub mod service;
mod shares;
pub mod skills;
pub mod store;
pub mod sync;
pub mod task;
pub mod worker;

/// The program, called by `main` and by the test binaries.
#[must_use]
pub fn main_entry() -> std::process::ExitCode {
    cli::run()
}
