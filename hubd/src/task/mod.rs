//! Commands: journalled, relayed, never interpreted.

pub mod limits;
pub mod mailbox;
pub mod relay;
mod verdicts;
