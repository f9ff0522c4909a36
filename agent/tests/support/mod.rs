//! A hub that does what a test tells it, right or wrong, and an agent process that talks to it.

// Each test binary uses its own part.
#![allow(dead_code, unreachable_pub, unused_imports)]
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod agent;
mod ca;
mod exec;
mod hub;

use std::process::Command;
use std::time::Duration;

use cortex_proto::v1;

pub use agent::Agent;
pub use ca::{Ca, Life};
pub use exec::Exec;
pub use hub::{Hub, Presence, Script, Session, TaskIo, refusal};

/// Longest wait for anything; a hang fails instead of hanging.
pub const PATIENCE: Duration = Duration::from_secs(20);

/// Runs a command to its end without blocking the hub in this process.
pub async fn run(mut command: Command) -> std::process::Output {
    within(tokio::task::spawn_blocking(move || command.output())).await.unwrap().unwrap()
}

/// Waits until something becomes true that announces itself in no other way.
pub async fn until(mut holds: impl FnMut() -> bool) {
    within(async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    })
    .await;
}

pub async fn within<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(PATIENCE, future).await.expect("nothing happened in time")
}

pub fn now_ms() -> i64 {
    jiff::Timestamp::now().as_millisecond()
}

pub fn shell(script: &str) -> v1::TaskSpec {
    v1::TaskSpec { script: script.as_bytes().to_vec().into(), ..Default::default() }
}
