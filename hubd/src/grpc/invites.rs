//! Invites for nodes and operators. The token is in the answer to whoever made it, and nowhere else.

use std::collections::BTreeSet;
use std::time::Duration;

use cortex_proto::v1;
use cortex_shared::clock::unix_ms;
use cortex_shared::labels::Labels;
use cortex_shared::policy::{Role, UnknownWord};
use cortex_shared::secret::{InviteId, InviteToken};
use cortex_shared::text::is_printable;
use serde_json::json;
use tonic::Status;

use super::auth::AdmittedOperator;
use super::operator::OperatorService;
use super::status::{from_store, invalid};
use super::{convert, workspaces};
use crate::events::{Kind, NewEvent};
use crate::store::{Invite, InviteKind, NewInvite, SourceRange, StoreError};

/// Life of an invite unless told otherwise.
const DEFAULT_TTL: Duration = Duration::from_secs(3600);
/// Longest life of an invite.
const MAX_TTL: Duration = Duration::from_secs(7 * 24 * 3600);
/// Most uses of one invite.
const MAX_USES: u32 = 10_000;
/// Most ranges of source addresses of one invite.
const MAX_SOURCES: usize = 64;
/// Longest name of an owner.
const MAX_OWNER_BYTES: usize = 128;

pub(super) async fn create(
    service: &OperatorService,
    caller: &AdmittedOperator,
    request: v1::CreateInviteRequest,
) -> Result<v1::CreateInviteResponse, Status> {
    if request.name_pattern.len() > 63 {
        return Err(invalid("the name pattern is longer than 63 characters"));
    }
    let mut workspaces = BTreeSet::new();
    for name in &request.workspaces {
        workspaces.insert(workspaces::find(service, name, caller)?.id);
    }
    let (token, mut invite) = blank(InviteKind::Node, request.ttl_ms, request.uses, caller)?;
    invite.labels = convert::set_labels(request.labels)?;
    invite.name_pattern = request.name_pattern;
    invite.workspaces = workspaces;
    invite.sources = sources(&request.source_cidrs)?;
    invite.owner = owner(request.owner)?;
    let expires_at_ms = invite.expires_at_ms;
    record(service, caller, invite).await?;
    let ca_pin = service.authorities.pins();
    Ok(v1::CreateInviteResponse {
        token: token.expose(),
        id: token.id().to_string(),
        command: install_line(service, &token, &ca_pin)
            .unwrap_or_else(|| line(service, "join", &token, &ca_pin)),
        join_command: line(service, "join", &token, &ca_pin),
        ca_pin,
        expires_at_ms,
    })
}

pub(super) async fn create_operator(
    service: &OperatorService,
    caller: &AdmittedOperator,
    request: v1::CreateOperatorRequest,
) -> Result<v1::CreateOperatorResponse, Status> {
    let name = convert::name(request.name)?;
    if matches!(name.as_str(), "local" | "hub") {
        return Err(invalid(format!("the name {name:?} is the hub's own in the audit log")));
    }
    // One that is still to be recorded would take this invite along.
    service.operators.record_revocation(&name).await.map_err(from_store)?;
    let role: Role = request.role.parse().map_err(|e: UnknownWord| invalid(e.to_string()))?;
    let (token, mut invite) = blank(InviteKind::Operator(role), request.ttl_ms, 1, caller)?;
    invite.name_pattern = name;
    invite.scope = convert::set_labels(request.scope)?;
    let expires_at_ms = invite.expires_at_ms;
    record(service, caller, invite).await?;
    let ca_pin = service.authorities.pins();
    Ok(v1::CreateOperatorResponse {
        token: token.expose(),
        command: line(service, "login", &token, &ca_pin),
        ca_pin,
        expires_at_ms,
    })
}

pub(super) async fn list(service: &OperatorService) -> Result<v1::ListInvitesResponse, Status> {
    let invites = service.store.invites().await.map_err(from_store)?;
    let invites = invites.into_iter().map(|invite| info(service, invite)).collect();
    Ok(v1::ListInvitesResponse { invites })
}

pub(super) async fn revoke(
    service: &OperatorService,
    caller: &AdmittedOperator,
    request: v1::RevokeInviteRequest,
) -> Result<v1::RevokeInviteResponse, Status> {
    let id: InviteId = request.id.parse().map_err(|_| {
        let name = request.id.chars().take(16).collect();
        from_store(StoreError::NotFound { what: "invite", name })
    })?;
    let now = unix_ms();
    let line = caller.actor().audit(now, "invite.revoked", id.to_string(), json!({}));
    service.store.revoke_invite(id.clone(), now, line).await.map_err(from_store)?;
    tracing::info!(invite = %id, by = %caller.name, "invite revoked");
    let about = NewEvent::of_mesh().by(&caller.actor()).with("invite", id.to_string());
    service.events.bus.publish(Kind::InviteRevoked, about);
    Ok(v1::RevokeInviteResponse {})
}

/// An invite that nothing rides on yet, within the limits of time and uses.
fn blank(
    kind: InviteKind,
    ttl_ms: u64,
    uses: u32,
    caller: &AdmittedOperator,
) -> Result<(InviteToken, NewInvite), Status> {
    let ttl = if ttl_ms == 0 { DEFAULT_TTL } else { Duration::from_millis(ttl_ms) };
    if ttl > MAX_TTL {
        return Err(invalid("an invite lives for 7 days at most"));
    }
    if uses > MAX_USES {
        return Err(invalid(format!("an invite has {MAX_USES} uses at most")));
    }
    let token = InviteToken::generate();
    let now = unix_ms();
    let invite = NewInvite {
        id: token.id().clone(),
        secret_hash: token.secret_hash(),
        kind,
        max_uses: uses.max(1),
        expires_at_ms: now + i64::try_from(ttl.as_millis()).unwrap_or(i64::MAX),
        created_at_ms: now,
        created_by: caller.name.clone(),
        labels: Labels::new(),
        name_pattern: String::new(),
        workspaces: BTreeSet::new(),
        sources: BTreeSet::new(),
        owner: String::new(),
        scope: Labels::new(),
    };
    Ok((token, invite))
}

async fn record(
    service: &OperatorService,
    caller: &AdmittedOperator,
    invite: NewInvite,
) -> Result<(), Status> {
    let (id, kind) = (invite.id.to_string(), invite.kind.to_string());
    let detail = json!({
        "kind": kind,
        "uses": invite.max_uses,
        "expires_at_ms": invite.expires_at_ms,
        "labels": invite.labels,
        "name_pattern": invite.name_pattern,
        "workspaces": invite.workspaces,
        "sources": invite.sources,
        "owner": invite.owner,
        "scope": invite.scope,
    });
    let audit = caller.actor().audit(invite.created_at_ms, "invite.created", id.clone(), detail);
    service.store.create_invite(invite, audit).await.map_err(from_store)?;
    tracing::info!(invite = %id, kind, by = %caller.name, "invite created");
    let about = NewEvent::of_mesh().by(&caller.actor()).with("invite", id).with("for", kind);
    service.events.bus.publish(Kind::InviteCreated, about);
    Ok(())
}

/// The line to paste. The token goes in by the environment: arguments are visible to every user.
fn line(service: &OperatorService, verb: &str, token: &InviteToken, pins: &str) -> String {
    let address = &service.address;
    format!("CORTEX_TOKEN={} cortex-agent {verb} {address} --ca {pins}", token.expose())
}

/// The line that installs the agent from here and joins, where the HTTP side can be reached. It accepts the
/// hub's key and no other, for the script and for the program; the shell puts the token into the script's
/// environment.
fn install_line(service: &OperatorService, token: &InviteToken, pins: &str) -> Option<String> {
    let address = &service.address;
    let http = service.http.as_ref().filter(|http| http.is_reached_like(address.bound))?;
    let (url, token) = (http.url(), token.expose());
    let (pinned, pin) = match http.pin() {
        Some(pin) => (format!(" -k --pinnedpubkey {pin}"), format!(" --pin {pin}")),
        None => Default::default(),
    };
    Some(format!(
        "curl -fsS{pinned} {url}/install.sh | CORTEX_TOKEN={token} sh -s -- agent \
         --hub {address} --ca {pins} --from {url}{pin}"
    ))
}

fn sources(texts: &[String]) -> Result<BTreeSet<SourceRange>, Status> {
    if texts.len() > MAX_SOURCES {
        return Err(invalid(format!("an invite has {MAX_SOURCES} ranges of addresses at most")));
    }
    let parsed: Result<_, crate::store::InvalidRange> = texts.iter().map(|t| t.parse()).collect();
    parsed.map_err(|error| invalid(error.to_string()))
}

fn owner(text: String) -> Result<String, Status> {
    if text.len() > MAX_OWNER_BYTES || !text.chars().all(is_printable) {
        return Err(invalid(format!(
            "an owner is at most {MAX_OWNER_BYTES} bytes long and holds no control characters"
        )));
    }
    Ok(text.trim().to_owned())
}

fn info(service: &OperatorService, invite: Invite) -> v1::InviteInfo {
    let Invite { invite, uses, revoked_at_ms } = invite;
    let names = service.members.membership.all();
    v1::InviteInfo {
        id: invite.id.to_string(),
        kind: invite.kind.to_string(),
        uses,
        max_uses: invite.max_uses,
        expires_at_ms: invite.expires_at_ms,
        created_at_ms: invite.created_at_ms,
        created_by: invite.created_by,
        revoked: revoked_at_ms.is_some(),
        labels: invite.labels.into_iter().collect(),
        name_pattern: invite.name_pattern,
        workspaces: names
            .into_iter()
            .filter(|w| invite.workspaces.contains(&w.id))
            .map(|w| w.name)
            .collect(),
        source_cidrs: invite.sources.iter().map(ToString::to_string).collect(),
        owner: invite.owner,
    }
}
