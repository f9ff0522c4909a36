//! Scenarios with real processes, a file per subject.

#![allow(clippy::unwrap_used, clippy::cast_possible_truncation)]

mod exec;
mod join;
mod sandbox;
mod secrets;
mod sync;
