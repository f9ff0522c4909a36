//! Invites: what they ask, what rides on them, and what a repetition comes to.

use std::net::IpAddr;

use super::super::super::SourceRange;
use super::*;

fn from(address: &str) -> Caller {
    Caller { address: Some(address.parse::<IpAddr>().unwrap()) }
}

fn as_operator(token: &InviteToken, key: u8) -> OperatorRedemption {
    OperatorRedemption {
        invite: token.id().clone(),
        secret_hash: token.secret_hash(),
        key: [key; 32],
        caller: CALLER,
        now_ms: 10,
    }
}

#[tokio::test]
async fn repeated_redemption_with_the_same_key_gives_the_same_node_and_uses_nothing_up() {
    let (_folder, store) = store().await;
    let token = InviteToken::generate();
    store.create_invite(invite(&token, InviteKind::Node), audit(0)).await.unwrap();
    let first = store.redeem_node(redemption(&token, 1)).await.unwrap().unwrap();
    // Even after its time: the reply may have been lost.
    let late = NodeRedemption { now_ms: 5_000, ..redemption(&token, 1) };
    let again = store.redeem_node(late).await.unwrap().unwrap();
    assert_eq!(first.id, again.id);
    assert_eq!(store.invites().await.unwrap()[0].uses, 1);
    assert_eq!(
        store.redeem_node(redemption(&token, 2)).await.unwrap().unwrap_err(),
        RedeemRefusal::UsedUp
    );
    assert_eq!(first.labels["env"], "prod", "the invite's label wins over the node's own");
}

#[tokio::test]
async fn refusals_name_their_reason_only_to_who_knows_the_secret() {
    let (_folder, store) = store().await;
    let token = InviteToken::generate();
    store.create_invite(invite(&token, InviteKind::Node), audit(0)).await.unwrap();
    let expired = NodeRedemption { now_ms: 1_000, ..redemption(&token, 1) };
    let guess =
        NodeRedemption { secret_hash: InviteToken::generate().secret_hash(), ..expired.clone() };
    assert_eq!(store.redeem_node(expired).await.unwrap().unwrap_err(), RedeemRefusal::Expired);
    assert_eq!(store.redeem_node(guess).await.unwrap().unwrap_err(), RedeemRefusal::Unknown);
    store.revoke_invite(token.id().clone(), 20, audit(20)).await.unwrap();
    assert_eq!(
        store.redeem_node(redemption(&token, 1)).await.unwrap().unwrap_err(),
        RedeemRefusal::Revoked
    );
    let unknown = store.redeem_node(redemption(&InviteToken::generate(), 1)).await.unwrap();
    assert_eq!(unknown.unwrap_err(), RedeemRefusal::Unknown);
}

#[tokio::test]
async fn an_invite_admits_only_what_it_is_for() {
    let (_folder, store) = store().await;
    let (node, operator) = (InviteToken::generate(), InviteToken::generate());
    store.create_invite(invite(&node, InviteKind::Node), audit(0)).await.unwrap();
    let mut for_operator = invite(&operator, InviteKind::Operator(Role::Viewer));
    for_operator.name_pattern = "ann".into();
    store.create_invite(for_operator, audit(0)).await.unwrap();
    let as_operator = |token: &InviteToken| OperatorRedemption {
        invite: token.id().clone(),
        secret_hash: token.secret_hash(),
        key: [1; 32],
        caller: CALLER,
        now_ms: 10,
    };
    assert_eq!(
        store.redeem_operator(as_operator(&node)).await.unwrap(),
        Err(RedeemRefusal::Unknown)
    );
    assert_eq!(
        store.redeem_node(redemption(&operator, 1)).await.unwrap().unwrap_err(),
        RedeemRefusal::Unknown
    );
    let ann = Operator { name: "ann".into(), role: Role::Viewer, scope: Labels::new() };
    for _ in 0..2 {
        assert_eq!(store.redeem_operator(as_operator(&operator)).await.unwrap(), Ok(ann.clone()));
    }
}

#[tokio::test]
async fn names_are_unique_and_obey_the_pattern() {
    let (_folder, store) = store().await;
    let token = InviteToken::generate();
    let many =
        NewInvite { max_uses: 9, name_pattern: "box*".into(), ..invite(&token, InviteKind::Node) };
    store.create_invite(many, audit(0)).await.unwrap();
    let first = store.redeem_node(redemption(&token, 1)).await.unwrap().unwrap();
    let second = store.redeem_node(redemption(&token, 2)).await.unwrap().unwrap();
    assert_eq!((first.name.as_str(), second.name.as_str()), ("box", "box-2"));
    let named =
        |name: &str, key| NodeRedemption { wanted_name: name.into(), ..redemption(&token, key) };
    let taken = store.redeem_node(named("box", 3)).await.unwrap().unwrap_err();
    assert_eq!(taken, RedeemRefusal::NameTaken { name: "box".into() });
    let outside = store.redeem_node(named("web", 3)).await.unwrap().unwrap_err();
    assert!(matches!(outside, RedeemRefusal::NameNotAllowed { .. }));
    assert_eq!(store.invites().await.unwrap()[0].uses, 2, "a refusal uses nothing up");
}

#[tokio::test]
async fn an_invite_is_good_only_from_where_it_says() {
    let (_folder, store) = store().await;
    let token = InviteToken::generate();
    let sources = ["10.1.0.0/16", "192.0.2.7", "2001:db8::/32"];
    let limited = NewInvite {
        max_uses: 9,
        sources: sources.iter().map(|s| s.parse::<SourceRange>().unwrap()).collect(),
        ..invite(&token, InviteKind::Node)
    };
    store.create_invite(limited, audit(0)).await.unwrap();
    let cases = [
        (from("10.1.255.3"), true),
        (from("::ffff:10.1.0.1"), true),
        (from("192.0.2.7"), true),
        (from("2001:db8:1::5"), true),
        (from("10.2.0.1"), false),
        (from("192.0.2.8"), false),
        (from("::ffff:10.2.0.1"), false),
        (from("2001:db9::1"), false),
        (from("::1"), false),
        // No address is no address of these.
        (CALLER, false),
    ];
    for (key, (caller, allowed)) in (1..).zip(cases) {
        let redeemed =
            store.redeem_node(NodeRedemption { caller, ..redemption(&token, key) }).await.unwrap();
        match redeemed {
            Ok(_) => assert!(allowed, "{caller:?}"),
            Err(refusal) => {
                assert!(!allowed, "{caller:?}: {refusal}");
                assert_eq!(refusal.word(), "source_not_allowed");
                assert_eq!(refusal, RedeemRefusal::SourceNotAllowed { address: caller.shown() });
            }
        }
    }
    assert_eq!(store.invites().await.unwrap()[0].uses, 4);
    // Nor does the source tell a guesser anything.
    let secret_hash = InviteToken::generate().secret_hash();
    let guess = NodeRedemption { caller: CALLER, secret_hash, ..redemption(&token, 99) };
    assert_eq!(store.redeem_node(guess).await.unwrap().unwrap_err(), RedeemRefusal::Unknown);
}

#[tokio::test]
async fn who_does_not_know_the_secret_hears_the_same_whatever_became_of_the_invite() {
    let (_folder, store) = store().await;
    let (used_up, revoked, limited) =
        (InviteToken::generate(), InviteToken::generate(), InviteToken::generate());
    for token in [&used_up, &revoked] {
        store.create_invite(invite(token, InviteKind::Node), audit(0)).await.unwrap();
    }
    let sources = ["192.0.2.0/24".parse().unwrap()].into();
    let elsewhere = NewInvite { sources, ..invite(&limited, InviteKind::Node) };
    store.create_invite(elsewhere, audit(0)).await.unwrap();
    store.redeem_node(redemption(&used_up, 1)).await.unwrap().unwrap();
    store.revoke_invite(revoked.id().clone(), 5, audit(5)).await.unwrap();
    let known = [&used_up, &revoked, &limited];
    for (token, word) in
        known.into_iter().zip(["invite_used_up", "invite_revoked", "source_not_allowed"])
    {
        let proved = store.redeem_node(redemption(token, 2)).await.unwrap().unwrap_err();
        assert_eq!(proved.word(), word);
        // Not even the key that has redeemed it helps a guesser.
        for key in [1, 2] {
            let secret_hash = InviteToken::generate().secret_hash();
            let guess = NodeRedemption { secret_hash, ..redemption(token, key) };
            let refused = store.redeem_node(guess).await.unwrap().unwrap_err();
            assert_eq!(refused, RedeemRefusal::Unknown);
        }
    }
}

#[tokio::test]
async fn an_operators_invite_is_good_only_from_where_it_says() {
    let (_folder, store) = store().await;
    let token = InviteToken::generate();
    let limited = NewInvite {
        name_pattern: "ann".into(),
        sources: ["127.0.0.0/8".parse().unwrap()].into(),
        ..invite(&token, InviteKind::Operator(Role::Admin))
    };
    store.create_invite(limited, audit(0)).await.unwrap();
    let away = OperatorRedemption { caller: from("192.0.2.1"), ..as_operator(&token, 1) };
    let refused = store.redeem_operator(away).await.unwrap().unwrap_err();
    assert_eq!(refused.word(), "source_not_allowed");
    let here = OperatorRedemption { caller: from("::ffff:127.0.0.1"), ..as_operator(&token, 1) };
    assert!(store.redeem_operator(here).await.unwrap().is_ok());
}

#[tokio::test]
async fn what_rides_on_an_invite_is_kept_and_given() {
    let (_folder, store) = store().await;
    let workspace = |name: &str| Workspace {
        id: WorkspaceId::new(),
        name: name.into(),
        created_at_ms: 1,
        scope: crate::store::Scope::default(),
        members: BTreeSet::new(),
    };
    let (given, other) = (workspace("given"), workspace("other"));
    for workspace in [&given, &other] {
        store.create_workspace(workspace.clone(), audit(1)).await.unwrap();
    }
    let (token, for_operator) = (InviteToken::generate(), InviteToken::generate());
    let rich = NewInvite {
        owner: "team storage".into(),
        sources: ["10.0.0.0/8".parse().unwrap()].into(),
        workspaces: [given.id].into(),
        ..invite(&token, InviteKind::Node)
    };
    store.create_invite(rich, audit(0)).await.unwrap();
    let scope: Labels = [("env".to_owned(), "prod".to_owned())].into();
    let scoped = NewInvite {
        scope: scope.clone(),
        name_pattern: "ann".into(),
        created_at_ms: 1,
        ..invite(&for_operator, InviteKind::Operator(Role::Operator))
    };
    store.create_invite(scoped, audit(0)).await.unwrap();

    let [second, first] = <[_; 2]>::try_from(store.invites().await.unwrap()).unwrap();
    assert_eq!((second.invite.scope, first.invite.owner.as_str()), (scope.clone(), "team storage"));
    assert_eq!(
        first.invite.sources.iter().map(ToString::to_string).collect::<Vec<_>>(),
        ["10.0.0.0/8"]
    );
    let redeem = NodeRedemption { caller: from("10.1.2.3"), ..redemption(&token, 1) };
    let node = store.redeem_node(redeem).await.unwrap().unwrap();
    assert_eq!(node.owner, "team storage");
    assert_eq!(store.memberships(node.id).await.unwrap(), [given.id].into());
    assert_eq!(store.nodes().await.unwrap()[0].owner, "team storage");
    let ann = store.redeem_operator(as_operator(&for_operator, 1)).await.unwrap().unwrap();
    assert_eq!((ann.scope, ann.role), (scope.clone(), Role::Operator));
    assert_eq!(store.operators().await.unwrap()[0].scope.0, scope);
}

#[tokio::test]
async fn a_repetition_after_the_node_has_renewed_is_a_copys_and_is_refused() {
    let (_folder, store) = store().await;
    let token = InviteToken::generate();
    store.create_invite(invite(&token, InviteKind::Node), audit(0)).await.unwrap();
    let node = store.redeem_node(redemption(&token, 1)).await.unwrap().unwrap();
    let id = node.id;
    let renewed = "UPDATE nodes SET generation = 2 WHERE id = ?";
    store
        .database
        .write(move |c| Ok::<_, StoreError>(c.execute(renewed, [id.as_bytes().as_slice()])?))
        .await
        .unwrap();
    let again = store.redeem_node(redemption(&token, 1)).await.unwrap();
    assert_eq!(again.unwrap_err(), RedeemRefusal::UsedUp);
    assert_eq!(store.invites().await.unwrap()[0].uses, 1);
}

#[tokio::test]
async fn a_repetition_is_refused_once_the_invite_or_its_node_is_revoked() {
    let (_folder, store) = store().await;
    for revoke_node in [true, false] {
        let token = InviteToken::generate();
        store.create_invite(invite(&token, InviteKind::Node), audit(0)).await.unwrap();
        let node = store.redeem_node(redemption(&token, 1)).await.unwrap().unwrap();
        if revoke_node {
            store.revoke_node(node.id, 20, audit(20)).await.unwrap();
        } else {
            store.revoke_invite(token.id().clone(), 20, audit(20)).await.unwrap();
        }
        let again = store.redeem_node(redemption(&token, 1)).await.unwrap();
        assert_eq!(again.unwrap_err(), RedeemRefusal::Revoked);
    }
}

#[tokio::test]
async fn joins_and_logins_are_in_the_audit_log_with_who_and_where() {
    let (_folder, store) = store().await;
    let (token, for_operator) = (InviteToken::generate(), InviteToken::generate());
    let owned = NewInvite { owner: "lab".into(), ..invite(&token, InviteKind::Node) };
    store.create_invite(owned, audit(0)).await.unwrap();
    let ann = NewInvite {
        name_pattern: "ann".into(),
        ..invite(&for_operator, InviteKind::Operator(Role::Viewer))
    };
    store.create_invite(ann, audit(0)).await.unwrap();
    let caller = from("192.0.2.9");
    let node = NodeRedemption { caller, ..redemption(&token, 1) };
    let id = store.redeem_node(node.clone()).await.unwrap().unwrap().id;
    let login = OperatorRedemption { caller, ..as_operator(&for_operator, 1) };
    store.redeem_operator(login.clone()).await.unwrap().unwrap();
    // Repetitions are no further joins.
    store.redeem_node(node).await.unwrap().unwrap();
    store.redeem_operator(login).await.unwrap().unwrap();
    let lines = store.audit_page(None, 100).await.unwrap();
    let [joined, logged_in] = &lines[2..] else { panic!("{lines:?}") };
    let detail = |line: &super::super::super::AuditLine| -> serde_json::Value {
        serde_json::from_str(&line.detail).unwrap()
    };
    assert_eq!((joined.action.as_str(), joined.target.as_str()), ("node.joined", "box"));
    let said = detail(joined);
    assert_eq!(said["node_id"], id.to_string());
    assert_eq!(said["invite"], token.id().as_str());
    assert_eq!((&said["invited_by"], &said["address"]), (&"local".into(), &"192.0.2.9".into()));
    assert_eq!(said["owner"], "lab");
    assert_eq!((logged_in.action.as_str(), logged_in.actor.as_str()), ("operator.login", "ann"));
    assert_eq!(detail(logged_in)["address"], "192.0.2.9");
    assert_eq!(detail(logged_in)["role"], "viewer");
}

#[tokio::test]
async fn invites_that_were_of_no_use_for_long_enough_are_forgotten_and_what_they_admitted_stays() {
    let (_folder, store) = store().await;
    let tokens: Vec<InviteToken> = (0..4).map(|_| InviteToken::generate()).collect();
    for (token, expires_at_ms) in tokens.iter().zip([100, 100, 500, 900]) {
        let invite = NewInvite { expires_at_ms, ..invite(token, InviteKind::Node) };
        store.create_invite(invite, audit(0)).await.unwrap();
    }
    let node = store.redeem_node(redemption(&tokens[0], 1)).await.unwrap().unwrap();
    store.revoke_invite(tokens[2].id().clone(), 200, audit(200)).await.unwrap();
    assert_eq!(store.forget_invites(100).await.unwrap(), 0, "not at that very moment");
    assert_eq!(store.forget_invites(300).await.unwrap(), 3);
    let left = store.invites().await.unwrap();
    assert_eq!(left.len(), 1);
    assert_eq!(left[0].invite.id, *tokens[3].id());
    assert_eq!(store.nodes().await.unwrap()[0].id, node.id);
    let again = store.redeem_node(redemption(&tokens[0], 1)).await.unwrap();
    assert!(matches!(again, Err(RedeemRefusal::Unknown)), "{again:?}");
}
