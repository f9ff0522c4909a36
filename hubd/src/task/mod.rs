//! Commands: journalled, relayed, never interpreted.

pub mod mailbox;
pub mod relay;
