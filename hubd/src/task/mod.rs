//! Commands: journalled, relayed, never interpreted.
//!
//! | module | subject |
//! |---|---|
//! | [`relay`] | every task without a verdict: between its reader and its node, through lost streams |
//! | [`draining`] | whether new ones are taken |
//! | [`start`] | how one begins, or why it does not |
//! | `unwanted` | those that are to end on a node that was away |
//! | [`running`] | one of them: its two mailboxes and its place |
//! | [`to_reader`], [`to_node`] | the mailboxes |
//! | [`spool`] | the latest output of each task, in files |
//! | [`verdict`] | ends, between the wire and the journal |
//! | [`history`] | the latest output of each node, in the store |
//! | [`budget`] | how much output waits here for readers, in all |
//! | [`limits`] | what a role may have at once |

pub mod budget;
pub mod draining;
pub mod history;
pub mod limits;
pub mod relay;
pub mod running;
pub mod spool;
pub mod start;
pub mod to_node;
pub mod to_reader;
mod unwanted;
pub mod verdict;
mod verdicts;
