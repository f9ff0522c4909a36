//! Invites, and redeeming them.

use std::collections::BTreeSet;

use cortex_shared::ids::WorkspaceId;
use cortex_shared::labels;
use cortex_shared::secret::{InviteId, SecretHash};
use rusqlite::{Connection, OptionalExtension as _, Row, params};

use super::super::{
    Invite, InviteKind, KeyHash, NewInvite, Node, NodePolicy, NodeRedemption, Operator,
    OperatorRedemption, RedeemRefusal, StoreError,
};
use super::{damaged, from_json, nodes, to_json, workspaces};

const COLUMNS: &str = "id, secret_hash, kind, uses, max_uses, expires_at, created_at, created_by, \
                       labels, name_pattern, workspaces, revoked_at";

fn kind_word(kind: InviteKind) -> String {
    match kind {
        InviteKind::Node => "node".to_owned(),
        InviteKind::Operator(role) => role.to_string(),
    }
}

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
        },
        uses: row.get(3)?,
        revoked_at_ms: row.get(11)?,
    })
}

pub(super) fn create(t: &Connection, invite: &NewInvite) -> Result<(), StoreError> {
    t.execute(
        &format!("INSERT INTO invites ({COLUMNS}) VALUES (?,?,?,0,?,?,?,?,?,?,?,NULL)"),
        params![
            invite.id.as_str(),
            invite.secret_hash.as_bytes().as_slice(),
            kind_word(invite.kind),
            invite.max_uses,
            invite.expires_at_ms,
            invite.created_at_ms,
            invite.created_by,
            to_json(&invite.labels)?,
            invite.name_pattern,
            to_json(&invite.workspaces)?,
        ],
    )?;
    Ok(())
}

pub(super) fn list(connection: &Connection) -> Result<Vec<Invite>, StoreError> {
    let mut statement =
        connection.prepare(&format!("SELECT {COLUMNS} FROM invites ORDER BY created_at DESC"))?;
    statement.query_and_then([], read)?.collect()
}

pub(super) fn revoke(t: &Connection, id: &InviteId, now_ms: i64) -> Result<(), StoreError> {
    let changed = t.execute(
        "UPDATE invites SET revoked_at = coalesce(revoked_at, ?2) WHERE id = ?1",
        params![id.as_str(), now_ms],
    )?;
    if changed == 0 {
        return Err(StoreError::NotFound { what: "invite", name: id.to_string() });
    }
    Ok(())
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
    now_ms: i64,
) -> Result<Result<Found, RedeemRefusal>, StoreError> {
    let mut statement = t.prepare_cached(&format!("SELECT {COLUMNS} FROM invites WHERE id = ?"))?;
    let mut rows = statement.query([id.as_str()])?;
    let Some(row) = rows.next()? else { return Ok(Err(RedeemRefusal::Unknown)) };
    let invite = read(row)?;
    if invite.invite.secret_hash != *secret || !admits(invite.invite.kind) {
        return Ok(Err(RedeemRefusal::Unknown));
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
    let NodeRedemption { invite: id, key, now_ms, .. } = &redemption;
    let admits = |kind| kind == InviteKind::Node;
    let invite = match find(t, id, &redemption.secret_hash, key, admits, *now_ms)? {
        Err(refusal) => return Ok(Err(refusal)),
        Ok(Found::Redeemed(node)) => return Ok(Ok(nodes::get(t, &node)?)),
        Ok(Found::Fresh(invite)) => invite.invite,
    };
    let name = match choose_name(t, &redemption, &invite.name_pattern)? {
        Ok(name) => name,
        Err(refusal) => return Ok(Err(refusal)),
    };
    record_use(t, id, key, redemption.new_id.as_bytes(), *now_ms)?;
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
    };
    nodes::insert(t, &node)?;
    for workspace in invite.workspaces {
        workspaces::attach(t, workspace, node.id, node.joined_at_ms)?;
    }
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
    let mut name = base.clone();
    for number in 2.. {
        if !allowed(&name) {
            return refuse(name);
        }
        if !nodes::exists(t, &name)? {
            break;
        }
        name = format!("{base}-{number}");
    }
    Ok(Ok(name))
}

pub(super) fn redeem_operator(
    t: &Connection,
    redemption: &OperatorRedemption,
) -> Result<Result<Operator, RedeemRefusal>, StoreError> {
    let OperatorRedemption { invite: id, key, now_ms, .. } = redemption;
    let admits = |kind| matches!(kind, InviteKind::Operator(_));
    let invite = match find(t, id, &redemption.secret_hash, key, admits, *now_ms)? {
        Err(refusal) => return Ok(Err(refusal)),
        Ok(Found::Redeemed(name)) => {
            let name = String::from_utf8(name).map_err(|_| damaged("operator name"))?;
            let role: String =
                t.query_row("SELECT role FROM operators WHERE name = ?", [&name], |r| r.get(0))?;
            let role = role.parse().map_err(|_| damaged("role"))?;
            return Ok(Ok(Operator { name, role }));
        }
        Ok(Found::Fresh(invite)) => invite.invite,
    };
    let InviteKind::Operator(role) = invite.kind else { return Ok(Err(RedeemRefusal::Unknown)) };
    let name = invite.name_pattern;
    record_use(t, id, key, name.as_bytes(), *now_ms)?;
    // A new login of a known operator replaces its key and role: the invite says who it is for.
    t.execute(
        "INSERT INTO operators (name, role, key, created_at, scope) \
         SELECT ?1, ?2, ?3, ?4, scope FROM invites WHERE id = ?5 ON CONFLICT (name) DO UPDATE \
         SET role = ?2, key = ?3, scope = excluded.scope, revoked_at = NULL",
        params![name, role.to_string(), key.as_slice(), now_ms, id.as_str()],
    )?;
    Ok(Ok(Operator { name, role }))
}
