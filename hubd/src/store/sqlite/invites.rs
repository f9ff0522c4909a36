//! Invites, and redeeming them.

use std::collections::BTreeSet;

use cortex_shared::ids::WorkspaceId;
use cortex_shared::labels;
use cortex_shared::secret::{InviteId, SecretHash};
use rusqlite::{Connection, OptionalExtension as _, Row, params};

use serde_json::json;

use super::super::{
    Caller, CertificateState, Invite, InviteKind, KeyHash, NewAudit, NewInvite, Node, NodePolicy,
    NodeRedemption, Operator, OperatorRedemption, RedeemRefusal, StoreError,
};
use super::{audit, damaged, from_json, nodes, to_json, workspaces};

const COLUMNS: &str = "id, secret_hash, kind, uses, max_uses, expires_at, created_at, created_by, \
                       labels, name_pattern, workspaces, revoked_at, source_cidrs, owner, scope";

fn read(row: &Row<'_>) -> Result<Invite, StoreError> {
    let kind = row.get::<_, String>(2)?;
    let kind = match kind.as_str() {
        "node" => InviteKind::Node,
        role => InviteKind::Operator(role.parse().map_err(|_| damaged("invite kind"))?),
    };
    Ok(Invite {
        invite: NewInvite {
            id: row.get::<_, String>(0)?.parse().map_err(|_| damaged("invite id"))?,
            secret_hash: SecretHash::from_slice(&row.get::<_, Vec<u8>>(1)?)
                .ok_or(damaged("secret hash"))?,
            kind,
            max_uses: row.get(4)?,
            expires_at_ms: row.get(5)?,
            created_at_ms: row.get(6)?,
            created_by: row.get(7)?,
            labels: from_json(&row.get::<_, String>(8)?, "labels")?,
            name_pattern: row.get(9)?,
            workspaces: from_json::<BTreeSet<WorkspaceId>>(
                &row.get::<_, String>(10)?,
                "workspaces",
            )?,
            sources: from_json(&row.get::<_, String>(12)?, "source addresses")?,
            owner: row.get(13)?,
            scope: from_json(&row.get::<_, String>(14)?, "scope")?,
        },
        uses: row.get(3)?,
        revoked_at_ms: row.get(11)?,
    })
}

pub(super) fn create(t: &Connection, invite: &NewInvite, new: &NewAudit) -> Result<(), StoreError> {
    t.execute(
        &format!("INSERT INTO invites ({COLUMNS}) VALUES (?,?,?,0,?,?,?,?,?,?,?,NULL,?,?,?)"),
        params![
            invite.id.as_str(),
            invite.secret_hash.as_bytes().as_slice(),
            invite.kind.to_string(),
            invite.max_uses,
            invite.expires_at_ms,
            invite.created_at_ms,
            invite.created_by,
            to_json(&invite.labels)?,
            invite.name_pattern,
            to_json(&invite.workspaces)?,
            to_json(&invite.sources)?,
            invite.owner,
            to_json(&invite.scope)?,
        ],
    )?;
    audit::append(t, new)
}

pub(super) fn list(connection: &Connection) -> Result<Vec<Invite>, StoreError> {
    let mut statement =
        connection.prepare(&format!("SELECT {COLUMNS} FROM invites ORDER BY created_at DESC"))?;
    statement.query_and_then([], read)?.collect()
}

pub(super) fn revoke(
    t: &Connection,
    id: &InviteId,
    now_ms: i64,
    new: &NewAudit,
) -> Result<(), StoreError> {
    let changed = t.execute(
        "UPDATE invites SET revoked_at = ?2 WHERE id = ?1 AND revoked_at IS NULL",
        params![id.as_str(), now_ms],
    )?;
    if changed > 0 {
        return audit::append(t, new);
    }
    // One that is revoked stays so since it was, without another line in the log.
    let known = t.prepare_cached("SELECT 1 FROM invites WHERE id = ?")?.exists([id.as_str()])?;
    if known { Ok(()) } else { Err(StoreError::NotFound { what: "invite", name: id.to_string() }) }
}

/// A request that is repeated after that finds nothing of itself; nobody waits so long.
pub(super) fn forget(t: &Connection, before_ms: i64) -> Result<u64, StoreError> {
    const OVER: &str = "expires_at < ?1 OR revoked_at < ?1";
    let uses =
        format!("DELETE FROM invite_uses WHERE invite IN (SELECT id FROM invites WHERE {OVER})");
    t.execute(&uses, [before_ms])?;
    let gone = t.execute(&format!("DELETE FROM invites WHERE {OVER}"), [before_ms])?;
    Ok(gone as u64)
}

/// What a valid token leads to.
enum Found {
    /// This key has redeemed it before: the recorded result.
    Redeemed(Vec<u8>),
    /// It can be redeemed now.
    Fresh(Box<Invite>),
}

/// Looks an invite up and checks it in an order that tells a caller without the secret nothing.
fn find(
    t: &Connection,
    id: &InviteId,
    secret: &SecretHash,
    key: &KeyHash,
    admits: impl Fn(InviteKind) -> bool,
    caller: &Caller,
    now_ms: i64,
) -> Result<Result<Found, RedeemRefusal>, StoreError> {
    let mut statement = t.prepare_cached(&format!("SELECT {COLUMNS} FROM invites WHERE id = ?"))?;
    let mut rows = statement.query([id.as_str()])?;
    let Some(row) = rows.next()? else { return Ok(Err(RedeemRefusal::Unknown)) };
    let invite = read(row)?;
    if invite.invite.secret_hash != *secret || !admits(invite.invite.kind) {
        return Ok(Err(RedeemRefusal::Unknown));
    }
    if !good_from(&invite.invite, caller) {
        return Ok(Err(RedeemRefusal::SourceNotAllowed { address: caller.shown() }));
    }
    let earlier: Option<Vec<u8>> = t
        .query_row(
            "SELECT result FROM invite_uses WHERE invite = ? AND key = ?",
            params![id.as_str(), key.as_slice()],
            |row| row.get(0),
        )
        .optional()?;
    Ok(match earlier {
        _ if invite.revoked_at_ms.is_some() => Err(RedeemRefusal::Revoked),
        Some(result) => Ok(Found::Redeemed(result)),
        None if invite.invite.expires_at_ms <= now_ms => Err(RedeemRefusal::Expired),
        None if invite.uses >= invite.invite.max_uses => Err(RedeemRefusal::UsedUp),
        None => Ok(Found::Fresh(Box::new(invite))),
    })
}

/// Whether an invite may be redeemed from where the caller is. One without an address is a process of
/// the hub's own machine, and no invite that names addresses means that.
fn good_from(invite: &NewInvite, caller: &Caller) -> bool {
    let within = |address| invite.sources.iter().any(|range| range.contains(address));
    invite.sources.is_empty() || caller.address.is_some_and(within)
}

fn record_use(
    t: &Connection,
    id: &InviteId,
    key: &KeyHash,
    result: &[u8],
    now_ms: i64,
) -> Result<(), StoreError> {
    t.execute("UPDATE invites SET uses = uses + 1 WHERE id = ?", [id.as_str()])?;
    t.execute(
        "INSERT INTO invite_uses VALUES (?,?,?,?)",
        params![id.as_str(), key.as_slice(), result, now_ms],
    )?;
    Ok(())
}

pub(super) fn redeem_node(
    t: &Connection,
    redemption: NodeRedemption,
) -> Result<Result<Node, RedeemRefusal>, StoreError> {
    let NodeRedemption { invite: id, key, caller, now_ms, .. } = &redemption;
    let admits = |kind| kind == InviteKind::Node;
    let invite = match find(t, id, &redemption.secret_hash, key, admits, caller, *now_ms)? {
        Err(refusal) => return Ok(Err(refusal)),
        Ok(Found::Redeemed(node)) => return repeat_join(t, &node, &redemption),
        Ok(Found::Fresh(invite)) => invite.invite,
    };
    let name = match choose_name(t, &redemption, &invite.name_pattern)? {
        Ok(name) => name,
        Err(refusal) => return Ok(Err(refusal)),
    };
    record_use(t, id, key, redemption.new_id.as_bytes(), *now_ms)?;
    let detail = json!({
        "node_id": redemption.new_id.to_string(),
        "invite": id.as_str(),
        "invited_by": invite.created_by,
        "address": caller.shown(),
        "machine": redemption.machine,
        "owner": invite.owner,
    });
    let line = NewAudit {
        at_ms: *now_ms,
        actor: format!("node:{name}"),
        action: "node.joined",
        target: name.clone(),
        detail: detail.to_string(),
    };
    let certificate = first_certificate(&redemption);
    let mut labels = redemption.labels;
    labels.extend(invite.labels);
    let node = Node {
        id: redemption.new_id,
        name,
        labels,
        key: redemption.key,
        policy: NodePolicy::default(),
        cordoned: false,
        ceiling: redemption.ceiling,
        joined_at_ms: redemption.now_ms,
        last_seen_ms: 0,
        revoked_at_ms: None,
        facts: redemption.facts,
        owner: invite.owner,
        certificate,
        machine: redemption.machine,
        clone: None,
    };
    nodes::insert(t, &node)?;
    for workspace in invite.workspaces {
        match workspaces::attach(t, workspace, node.id, node.joined_at_ms) {
            // It was deleted since the invite was made, which is no reason to turn the node away.
            Ok(_) | Err(StoreError::NotFound { .. }) => {}
            Err(error) => return Err(error),
        }
    }
    audit::append(t, &line)?;
    Ok(Ok(node))
}

fn first_certificate(redemption: &NodeRedemption) -> CertificateState {
    CertificateState {
        generation: 1,
        boot_id: redemption.machine.boot_id.clone(),
        connected: false,
        not_after_ms: redemption.certificate.not_after_ms,
        authority: redemption.certificate.authority,
    }
}

/// The node that this key joined as, whose answer was lost. A node that has renewed has had it; a
/// repetition is then a copy's, and an invite is no way around [`super::identity::renew`].
fn repeat_join(
    t: &Connection,
    id: &[u8],
    redemption: &NodeRedemption,
) -> Result<Result<Node, RedeemRefusal>, StoreError> {
    let Some(mut node) = nodes::get(t, id)? else { return Ok(Err(RedeemRefusal::UsedUp)) };
    if node.revoked_at_ms.is_some() {
        return Ok(Err(RedeemRefusal::Revoked));
    }
    if node.certificate.generation > 1 {
        return Ok(Err(RedeemRefusal::UsedUp));
    }
    node.certificate =
        CertificateState { connected: node.certificate.connected, ..first_certificate(redemption) };
    node.machine = redemption.machine.clone();
    nodes::certify(t, &node)?;
    Ok(Ok(node))
}

/// The wanted name if it is free and allowed; one made of the host name and made unique if none is
/// wanted.
fn choose_name(
    t: &Connection,
    redemption: &NodeRedemption,
    pattern: &str,
) -> Result<Result<String, RedeemRefusal>, StoreError> {
    let allowed = |name: &str| pattern.is_empty() || labels::pattern_matches(pattern, name);
    let refuse =
        |name: String| Ok(Err(RedeemRefusal::NameNotAllowed { name, pattern: pattern.to_owned() }));
    if !redemption.wanted_name.is_empty() {
        let name = redemption.wanted_name.clone();
        return if !allowed(&name) {
            refuse(name)
        } else if nodes::exists(t, &name)? {
            Ok(Err(RedeemRefusal::NameTaken { name }))
        } else {
            Ok(Ok(name))
        };
    }
    let base = labels::name_from_hostname(&redemption.facts.hostname);
    if !allowed(&base) {
        return refuse(base);
    }
    if !nodes::exists(t, &base)? {
        return Ok(Ok(base));
    }
    let numbered = |number: u64| format!("{base}-{number}");
    let name = numbered(free_number(|number| nodes::exists(t, &numbered(number)))?);
    if allowed(&name) { Ok(Ok(name)) } else { refuse(name) }
}

/// A number from 2 on that is not taken: the next one, if they were given without gaps. Asks little even
/// where thousands of machines have one host name.
fn free_number(mut taken: impl FnMut(u64) -> Result<bool, StoreError>) -> Result<u64, StoreError> {
    // Taken, or not to be given; free.
    let (mut low, mut high) = (1, 2);
    while taken(high)? {
        (low, high) = (high, high * 2);
    }
    while high - low > 1 {
        let middle = low + (high - low) / 2;
        if taken(middle)? {
            low = middle;
        } else {
            high = middle;
        }
    }
    Ok(high)
}

pub(super) fn redeem_operator(
    t: &Connection,
    redemption: &OperatorRedemption,
) -> Result<Result<Operator, RedeemRefusal>, StoreError> {
    let OperatorRedemption { invite: id, key, caller, now_ms, .. } = redemption;
    let admits = |kind| matches!(kind, InviteKind::Operator(_));
    let invite = match find(t, id, &redemption.secret_hash, key, admits, caller, *now_ms)? {
        Err(refusal) => return Ok(Err(refusal)),
        Ok(Found::Redeemed(name)) => return repeat_login(t, name, key),
        Ok(Found::Fresh(invite)) => invite.invite,
    };
    let InviteKind::Operator(role) = invite.kind else { return Ok(Err(RedeemRefusal::Unknown)) };
    let name = invite.name_pattern;
    // A key that was revoked stays so: with it the certificate of that time would count again.
    let revoked: bool = t
        .prepare_cached(
            "SELECT 1 FROM operators WHERE name = ? AND key = ? AND revoked_at IS NOT NULL",
        )?
        .exists(params![name, key.as_slice()])?;
    if revoked {
        return Ok(Err(RedeemRefusal::Revoked));
    }
    record_use(t, id, key, name.as_bytes(), *now_ms)?;
    // A new login of a known operator replaces its key and role: the invite says who it is for.
    t.execute(
        "INSERT INTO operators (name, role, key, created_at, scope) VALUES (?1, ?2, ?3, ?4, ?5) \
         ON CONFLICT (name) DO UPDATE SET role = ?2, key = ?3, scope = ?5, revoked_at = NULL",
        params![name, role.to_string(), key.as_slice(), now_ms, to_json(&invite.scope)?],
    )?;
    let detail = json!({
        "role": role.to_string(),
        "scope": invite.scope,
        "invite": id.as_str(),
        "invited_by": invite.created_by,
        "address": caller.shown(),
    });
    let line = NewAudit {
        at_ms: *now_ms,
        actor: name.clone(),
        action: "operator.login",
        target: name.clone(),
        detail: detail.to_string(),
    };
    audit::append(t, &line)?;
    Ok(Ok(Operator { name, role, scope: invite.scope }))
}

/// The operator that this key logged in as, whose answer was lost; unless it has since been revoked,
/// or logged in anew with another key.
fn repeat_login(
    t: &Connection,
    name: Vec<u8>,
    key: &KeyHash,
) -> Result<Result<Operator, RedeemRefusal>, StoreError> {
    let name = String::from_utf8(name).map_err(|_| damaged("operator name"))?;
    let mut statement = t.prepare_cached(
        "SELECT role, scope, key, revoked_at IS NOT NULL FROM operators WHERE name = ?",
    )?;
    let mut rows = statement.query([&name])?;
    let Some(row) = rows.next()? else { return Ok(Err(RedeemRefusal::UsedUp)) };
    if row.get::<_, bool>(3)? {
        return Ok(Err(RedeemRefusal::Revoked));
    }
    if row.get::<_, KeyHash>(2)? != *key {
        return Ok(Err(RedeemRefusal::UsedUp));
    }
    let role = row.get::<_, String>(0)?.parse().map_err(|_| damaged("role"))?;
    let scope = from_json(&row.get::<_, String>(1)?, "scope")?;
    Ok(Ok(Operator { name, role, scope }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_next_free_number_is_found_with_few_questions() {
        for given in [1, 2, 3, 7, 8, 9, 1000, 65_537] {
            let mut questions = 0;
            let found = free_number(|number| {
                questions += 1;
                Ok(number <= given)
            });
            assert_eq!(found.unwrap(), given + 1);
            assert!(questions <= 40, "{questions}");
        }
        // With gaps it is one of them.
        let odd = free_number(|number| Ok(number % 2 == 0 && number < 100)).unwrap();
        assert!(odd >= 2 && (odd % 2 == 1 || odd >= 100));
    }
}
