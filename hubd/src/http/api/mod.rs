//! Carrying out what the API is asked: each handler makes the call of the Operator service that its
//! line of the table names, and shows the answer as JSON.

pub(super) mod events;
pub(super) mod history;
pub(super) mod hub;
pub(super) mod nodes;
pub(super) mod session;
pub(super) mod tasks;
pub(super) mod view;
pub(super) mod workspaces;

use std::sync::Arc;

use crate::authority::sessions::Sessions;
use crate::grpc::auth::AuthLayer;
use crate::grpc::operator::OperatorService;

/// Items of a page, if the caller does not say.
const PAGE: u32 = 100;
/// Most items of a page.
const MAX_PAGE: u32 = 1000;

/// What handlers work on.
pub(crate) struct Api {
    /// The calls.
    pub(crate) service: OperatorService,
    /// Who may make which.
    pub(crate) auth: AuthLayer,
    /// Who has logged in.
    pub(crate) sessions: Arc<Sessions>,
}

fn page_size(limit: Option<u32>) -> u32 {
    limit.unwrap_or(PAGE).clamp(1, MAX_PAGE)
}
