//! Invites over real connections: limits, crowds, and what is recorded.

use std::collections::HashSet;
use std::time::Duration;

use cortex_proto::v1;
use cortex_shared::secret::InviteToken;
use tokio::time::timeout;
use tonic::Code;

use super::joining::retry_after_ms;
use super::support::{TestHub, request, word};
use super::*;
use crate::rate::Rate;
use crate::store::AuditLine;
use crate::store::fault::{FaultStore, Faults};

async fn hub(join_rate: Option<Rate>) -> (TestHub, Faults) {
    let folder = tempfile::tempdir().unwrap();
    let config = HubConfig { join_rate, ..config(folder.path()) };
    let faults = Faults::default();
    let handle = faults.clone();
    let hub = Hub::start_on(config, |store| Arc::new(FaultStore::new(store, handle))).await;
    (TestHub { hub: hub.unwrap(), folder }, faults)
}

async fn audit(hub: &TestHub, action: &str) -> Vec<(AuditLine, serde_json::Value)> {
    let lines = hub.hub.store.audit_page(None, 1000).await.unwrap();
    let lines = lines.into_iter().filter(|line| line.action == action);
    lines.map(|l| (l.clone(), serde_json::from_str(&l.detail).unwrap())).collect()
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn of_a_crowd_that_joins_at_once_exactly_as_many_get_in_as_the_invite_says() {
    let (hub, _) = hub(None).await;
    let mut admin = hub.local().await;
    admin.create_workspace(v1::CreateWorkspaceRequest { name: "w".into() }).await.unwrap();
    let invite =
        v1::CreateInviteRequest { uses: 100, workspaces: vec!["w".into()], ..Default::default() };
    let token = hub.invite(invite).await;
    let hub = Arc::new(hub);
    let crowd: Vec<_> = (0..500)
        .map(|_| {
            let (hub, token) = (Arc::clone(&hub), token.clone());
            tokio::spawn(async move { hub.begin_join(&token).await.first().await })
        })
        .collect();
    let (mut ids, mut names, mut used_up) = (HashSet::new(), HashSet::new(), 0);
    for one in crowd {
        match timeout(Duration::from_secs(120), one).await.unwrap().unwrap() {
            Ok(joined) => {
                assert!(ids.insert(joined.node_id) && names.insert(joined.name));
            }
            Err(status) => {
                assert_eq!(word(&status), "invite_used_up", "{status:?}");
                used_up += 1;
            }
        }
    }
    assert_eq!((ids.len(), used_up), (100, 400));
    assert_eq!(hub.hub.store.invites().await.unwrap()[0].uses, 100);
    assert_eq!(hub.hub.store.nodes().await.unwrap().len(), 100);
    // What is in memory is what is in the store, in whatever order they came.
    let list = admin.list_workspaces(v1::ListWorkspacesRequest {}).await.unwrap().into_inner();
    assert_eq!(list.workspaces[0].members.len(), 100);
    Arc::into_inner(hub).unwrap().hub.shutdown().await;
}

#[tokio::test]
async fn an_address_that_tries_too_often_is_turned_away_before_any_work() {
    let rate = Rate { burst: 3, per_second: 0.01 };
    let (hub, faults) = hub(Some(rate)).await;
    let token = hub.invite(v1::CreateInviteRequest { uses: 9, ..Default::default() }).await;
    // Not even a certificate request that is none is looked at any more.
    let nonsense = |token: &str| v1::JoinNodeRequest {
        token: token.into(),
        csr_der: vec![0; 100].into(),
        ..Default::default()
    };
    for _ in 0..3 {
        let refused = hub.join_again(nonsense(&token)).await.first().await.unwrap_err();
        assert_eq!(refused.code(), Code::InvalidArgument, "{refused:?}");
    }
    let limited = hub.join_again(nonsense(&token)).await.first().await.unwrap_err();
    assert_eq!((word(&limited), limited.code()), ("rate_limited", Code::ResourceExhausted));
    assert!((90_000..=100_000).contains(&retry_after_ms(&limited)), "{limited:?}");
    let limited = hub.begin_join(&token).await.first().await.unwrap_err();
    assert_eq!(word(&limited), "rate_limited");
    let limited = hub.redeem_operator(token).await.err().unwrap();
    assert_eq!(word(&limited), "rate_limited", "logins count as well");
    assert_eq!((faults.calls("redeem_node"), faults.calls("redeem_operator")), (0, 0));
    hub.hub.shutdown().await;
}

#[tokio::test]
async fn an_invite_whose_secret_is_guessed_at_is_frozen_and_no_other() {
    let (hub, faults) = hub(None).await;
    let token = hub.invite(v1::CreateInviteRequest { uses: 9, ..Default::default() }).await;
    let other = hub.invite(v1::CreateInviteRequest::default()).await;
    let id = token.parse::<InviteToken>().unwrap().id().to_string();
    let guess = || format!("cxi_{id}_{}", &InviteToken::generate().expose()[13..]);
    for _ in 0..10 {
        let refused = hub.begin_join(&guess()).await.first().await.unwrap_err();
        assert_eq!((word(&refused), refused.code()), ("invalid_token", Code::PermissionDenied));
    }
    let before = faults.calls("redeem_node");
    for token in [guess(), token.clone()] {
        let frozen = hub.begin_join(&token).await.first().await.unwrap_err();
        assert_eq!((word(&frozen), frozen.code()), ("rate_limited", Code::ResourceExhausted));
        assert!((590_000..=600_000).contains(&retry_after_ms(&frozen)), "{frozen:?}");
    }
    assert_eq!(faults.calls("redeem_node"), before, "the store is not asked any more");
    hub.begin_join(&other).await.first().await.unwrap();
    let refused = audit(&hub, "invite.refused").await;
    assert_eq!(refused.len(), 10);
    let (line, detail) = &refused[0];
    assert_eq!((line.actor.as_str(), line.target.as_str()), ("hub", id.as_str()));
    assert_eq!(detail["reason"], "invalid_token");
    assert_eq!(detail["address"], "127.0.0.1");
    assert_eq!(audit(&hub, "invite.frozen").await.len(), 1);
    hub.hub.shutdown().await;
}

#[tokio::test]
async fn what_becomes_of_an_invite_is_in_the_audit_log_without_its_secret() {
    let (hub, _) = hub(None).await;
    let ann = hub.login("ann", "admin").await;
    let mut ann = hub.operator(&ann).await;
    let invite = v1::CreateInviteRequest {
        source_cidrs: vec!["127.0.0.0/8".into()],
        owner: " lab ".into(),
        uses: 2,
        ..Default::default()
    };
    let created = ann.create_invite(invite).await.unwrap().into_inner();
    let joined = hub.begin_join(&created.token).await.first().await.unwrap();
    let revoke = || v1::RevokeInviteRequest { id: created.id.clone() };
    ann.revoke_invite(revoke()).await.unwrap();
    ann.revoke_invite(revoke()).await.unwrap();
    let revoked = hub.begin_join(&created.token).await.first().await.unwrap_err();
    assert_eq!(word(&revoked), "invite_revoked");
    let elsewhere =
        v1::CreateInviteRequest { source_cidrs: vec!["192.0.2.0/24".into()], ..Default::default() };
    let elsewhere = hub.invite(elsewhere).await;
    let refused = hub.begin_join(&elsewhere).await.first().await.unwrap_err();
    assert_eq!((word(&refused), refused.code()), ("source_not_allowed", Code::PermissionDenied));
    assert!(refused.message().contains("127.0.0.1"), "{refused:?}");
    let hint = refused.metadata().get(cortex_proto::HINT_TRAILER).unwrap().to_str().unwrap();
    assert!(hint.ends_with("cortex-hubd invite create --from CIDR"), "{hint}");

    let [(line, detail), ..] = &audit(&hub, "invite.created").await[1..] else { panic!() };
    assert_eq!((line.actor.as_str(), line.target.as_str()), ("ann", created.id.as_str()));
    assert_eq!((&detail["owner"], &detail["uses"]), (&"lab".into(), &2.into()));
    assert_eq!(detail["sources"][0], "127.0.0.0/8");
    let revoked = audit(&hub, "invite.revoked").await;
    assert_eq!(revoked.len(), 1, "the first time stands");
    assert_eq!((revoked[0].0.actor.as_str(), &revoked[0].0.target), ("ann", &created.id));
    let [(line, detail)] = &audit(&hub, "node.joined").await[..] else { panic!() };
    assert_eq!(line.target, joined.name);
    assert_eq!((&detail["invited_by"], &detail["address"]), (&"ann".into(), &"127.0.0.1".into()));
    assert_eq!(detail["owner"], "lab");
    let logins = audit(&hub, "operator.login").await;
    assert_eq!((logins[0].0.actor.as_str(), &logins[0].1["address"]), ("ann", &"127.0.0.1".into()));
    let reasons: Vec<_> = audit(&hub, "invite.refused").await.into_iter().map(|l| l.1).collect();
    assert_eq!(reasons[0]["reason"], "invite_revoked");
    assert_eq!(reasons[1]["reason"], "source_not_allowed");
    let listed = ann.list_invites(v1::ListInvitesRequest {}).await.unwrap().into_inner().invites;
    let listed = listed.iter().find(|invite| invite.id == created.id).unwrap();
    assert_eq!(
        (listed.owner.as_str(), &listed.source_cidrs[..]),
        ("lab", &["127.0.0.0/8".to_owned()][..])
    );
    for line in hub.hub.store.audit_page(None, 1000).await.unwrap() {
        for token in [&created.token, &elsewhere] {
            assert!(!format!("{line:?}").contains(&token[13..]), "{line:?}");
        }
    }
    hub.hub.shutdown().await;
}

#[tokio::test]
async fn a_repeated_login_gives_the_same_operator_and_uses_nothing_up() {
    let (hub, _) = hub(None).await;
    let operator = v1::CreateOperatorRequest {
        name: "ann".into(),
        role: "viewer".into(),
        ..Default::default()
    };
    let token = hub.local().await.create_operator(operator).await.unwrap().into_inner().token;
    let (_, csr_der) = request();
    let ask = || v1::LoginOperatorRequest { token: token.clone(), csr_der: csr_der.clone().into() };
    let channel = hub.channel(None).await.unwrap();
    let mut enroll = cortex_proto::v1::enroll_client::EnrollClient::new(channel);
    for _ in 0..2 {
        assert_eq!(enroll.login_operator(ask()).await.unwrap().into_inner().name, "ann");
    }
    assert_eq!(hub.hub.store.invites().await.unwrap()[0].uses, 1);
    let other = hub.redeem_operator(token.clone()).await.err().unwrap();
    assert_eq!(word(&other), "invite_used_up");
    hub.hub.shutdown().await;
}
