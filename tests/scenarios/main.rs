//! Scenarios with real processes, a file per subject.

#![allow(clippy::unwrap_used, clippy::print_stderr, clippy::cast_possible_truncation)]

mod authority;
mod backup;
mod endings;
mod events;
mod exec;
mod faults;
mod files;
mod fleet;
mod flow;
mod identity;
mod join;
mod page;
mod partition;
mod sandbox;
mod secrets;
mod settings;
mod skills;
mod sync;
mod sync_crash;
mod sync_hub;
mod sync_rules;
mod targets;
mod task_crash;
mod tasks;
mod terminal;
mod units;
mod upgrade;
mod web;
