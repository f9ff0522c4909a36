//! Authority: what operators may do, what they decide about nodes, and the log of it.
//!
//! Everything that decides on a call stands in memory ([`operators::Operators`],
//! [`crate::node::registry::Registry`]), loaded at start, so that no admission waits for the store. What
//! takes authority away (a revocation, a strict policy) is in force in memory first and recorded after
//! it; what gives authority is recorded first. Changes of one kind are made one after another, so that
//! memory and store end up the same.

pub mod audit;
pub mod nodes;
pub mod operators;
pub mod refused;
pub mod sessions;
