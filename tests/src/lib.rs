//! A real hub and real agents, as processes, for the scenarios beside this library.
//!
//! [`mesh::Mesh`] owns a scratch directory, a hub, nodes and an operator. Everything it starts listens on
//! loopback only and is ended, by process id, when it is dropped, also when a test panics. Tests
//! wait for what the processes themselves announce, with a deadline that only a hang reaches.

pub mod browser;
pub mod mesh;
pub mod network;
pub mod partition;
pub mod process;
pub mod proxy;
pub mod reader;
pub mod terminal;
pub mod tree;
pub mod wait;

use std::path::PathBuf;
use std::time::Duration;

/// When a wait is given up. Nothing takes this long; a test that gets here has found a hang.
pub const DEADLINE: Duration = Duration::from_secs(120);

/// The path of one of this package's own programs, which cargo builds beside the tests.
///
/// # Panics
/// If it is not there.
#[must_use]
pub fn program(name: &str) -> PathBuf {
    let test = std::env::current_exe().expect("a running program has a path");
    let built = test.ancestors().nth(2).expect("tests run in target/PROFILE/deps").join(name);
    assert!(built.exists(), "{} is not built", built.display());
    built
}

/// Whether these tests run as root, and so can start agents as another user.
#[must_use]
pub fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}
