//! What operators decide, over real connections.

use cortex_proto::v1;
use tonic::{Code, Status};

use super::support::{TestHub, permissive, script, word};
use super::*;
use crate::store::AuditLine;

/// The audit log as `(actor, action, target)`, and whole.
pub(super) async fn audit(hub: &TestHub) -> (Vec<(String, String, String)>, Vec<AuditLine>) {
    let lines = hub.hub.store.audit_page(None, 1000).await.unwrap();
    let short = |l: &AuditLine| (l.actor.clone(), l.action.clone(), l.target.clone());
    (lines.iter().map(short).collect(), lines)
}

pub(super) fn line(actor: &str, action: &str, target: &str) -> (String, String, String) {
    (actor.into(), action.into(), target.into())
}

fn revoke(node: &str) -> v1::RevokeNodeRequest {
    v1::RevokeNodeRequest { node: node.into(), reason: "stolen".into() }
}

fn policy(node: &str, mode: v1::Mode, reason: &str, for_ms: u64) -> v1::SetNodePolicyRequest {
    let (node, reason) = (node.to_owned(), reason.to_owned());
    v1::SetNodePolicyRequest { node, mode: mode.into(), reason, for_ms, network: 0 }
}

async fn names(
    client: &mut v1::operator_client::OperatorClient<tonic::transport::Channel>,
) -> Vec<String> {
    let nodes = client.list_nodes(v1::ListNodesRequest::default()).await.unwrap();
    nodes.into_inner().nodes.into_iter().map(|node| node.name).collect()
}

#[tokio::test]
async fn a_revoked_node_loses_its_session_and_its_commands_at_once_and_for_good() {
    let hub = TestHub::start().await;
    let node = hub.join("box", &[]).await;
    let mut session = node.connect(&hub).await.unwrap();
    let mut admin = hub.local().await;
    let running = hub.exec(&mut admin, "box", script()).await.unwrap();
    session.start_task().await;
    let info = admin.revoke_node(revoke("box")).await.unwrap().into_inner();
    assert!(info.revoked_at_ms > 0);
    let exit = running.end().await.unwrap();
    assert_eq!(exit.verdict(), v1::TaskVerdict::Cancelled);
    assert!(exit.reason.contains("revoked"), "{}", exit.reason);
    // The node is told to end the command before the session ends.
    assert_eq!(session.cancel_task().await.unwrap().grace_ms, 0);
    assert!(session.cancel_task().await.is_none(), "the session has ended");
    assert_eq!(word(&node.connect(&hub).await.err().unwrap()), "node_revoked");
    let hub = hub.restart().await;
    assert_eq!(word(&node.connect(&hub).await.err().unwrap()), "node_revoked");
    let (short, lines) = audit(&hub).await;
    let at = short.iter().position(|l| *l == line("local", "node.revoked", "box")).unwrap();
    let detail: serde_json::Value = serde_json::from_str(&lines[at].detail).unwrap();
    assert_eq!(detail["reason"], "stolen");
    assert!(detail["uid"].is_number(), "who sat at the socket");
    hub.hub.shutdown().await;
}

#[tokio::test]
async fn a_revoked_operators_calls_and_commands_end_at_once_until_it_logs_in_anew() {
    let hub = TestHub::start().await;
    let node = hub.join("box", &[]).await;
    let mut session = node.connect(&hub).await.unwrap();
    let login = hub.login("ann", "admin").await;
    let mut ann = hub.operator(&login).await;
    let mut watch = ann.watch_nodes(v1::ListNodesRequest::default()).await.unwrap().into_inner();
    watch.message().await.unwrap().unwrap();
    let running = hub.exec(&mut ann, "box", script()).await.unwrap();
    session.start_task().await;
    // An invite in her name that was not used yet would let her in again.
    let mut admin = hub.local().await;
    let create = v1::CreateOperatorRequest {
        name: "ann".into(),
        role: "admin".into(),
        ..Default::default()
    };
    let unused = admin.create_operator(create).await.unwrap().into_inner().token;

    let revoke = v1::RevokeOperatorRequest { name: "ann".into() };
    admin.revoke_operator(revoke.clone()).await.unwrap();
    let revoked = |status: Status| assert_eq!(word(&status), "operator_revoked", "{status:?}");
    revoked(running.end().await.unwrap_err());
    revoked(loop {
        // What was under way comes first.
        if let Err(status) = watch.message().await {
            break status;
        }
    });
    assert_eq!(session.cancel_task().await.unwrap().grace_ms, 0);
    let who = |mut client: v1::operator_client::OperatorClient<_>| async move {
        client.who_am_i(v1::WhoAmIRequest {}).await
    };
    revoked(who(ann).await.unwrap_err());
    let hub = hub.restart().await;
    revoked(who(hub.operator(&login).await).await.unwrap_err());
    assert_eq!(word(&hub.redeem_operator(unused).await.err().unwrap()), "invite_revoked");

    let anew = hub.login("ann", "viewer").await;
    let me = who(hub.operator(&anew).await).await.unwrap().into_inner();
    assert_eq!((me.name.as_str(), me.role.as_str()), ("ann", "viewer"));
    let old = who(hub.operator(&login).await).await.unwrap_err();
    assert_eq!(word(&old), "login_replaced", "the certificate that was revoked stays so");
    let missing = v1::RevokeOperatorRequest { name: "nobody".into() };
    let missing = hub.local().await.revoke_operator(missing).await.unwrap_err();
    assert_eq!(missing.code(), Code::NotFound);
    let list = hub.local().await.list_operators(v1::ListOperatorsRequest {}).await.unwrap();
    let list = list.into_inner().operators;
    assert_eq!((list.len(), list[0].role.as_str(), list[0].revoked_at_ms), (1, "viewer", 0));
    hub.hub.shutdown().await;
}

#[tokio::test]
async fn a_revoked_nodes_transfer_of_content_ends_in_the_midst_of_it() {
    let hub = TestHub::start().await;
    let node = hub.join("box", &[]).await;
    let mut admin = hub.local().await;
    let name = || "w".to_owned();
    let created = admin.create_workspace(v1::CreateWorkspaceRequest { name: name() }).await;
    let workspace_id = created.unwrap().into_inner().workspace_id;
    let attach = v1::AttachWorkspaceRequest { workspace: name(), node: "box".into() };
    admin.attach_workspace(attach).await.unwrap();
    let channel = hub.channel(Some(&node.login)).await.unwrap();
    let mut sync = v1::sync_client::SyncClient::new(channel);
    // A stream that neither side ends by itself.
    let (_packs, receiver) = tokio::sync::mpsc::channel(1);
    let mut acks = sync.put_packs(ReceiverStream::new(receiver)).await.unwrap().into_inner();
    admin.revoke_node(revoke("box")).await.unwrap();
    let ended = tokio::time::timeout(Duration::from_secs(20), acks.message()).await;
    assert_eq!(word(&ended.unwrap().unwrap_err()), "node_revoked");
    let refused = sync.head(v1::HeadRequest { workspace_id, known: None }).await.unwrap_err();
    assert_eq!(word(&refused), "node_revoked", "on the connection that it still has");
    hub.hub.shutdown().await;
}

#[tokio::test]
async fn a_forgotten_node_is_unknown_and_its_name_is_free() {
    let hub = TestHub::start().await;
    let node = hub.join("box", &[]).await;
    let session = node.connect(&hub).await.unwrap();
    let mut admin = hub.local().await;
    let forget = || v1::ForgetNodeRequest { node: "box".into() };
    let online = admin.forget_node(forget()).await.unwrap_err();
    assert_eq!(word(&online), "node_online");
    admin.revoke_node(revoke("box")).await.unwrap();
    admin.forget_node(forget()).await.unwrap();
    drop(session);
    assert_eq!(word(&node.connect(&hub).await.err().unwrap()), "node_unknown");
    let again = hub.join("box", &[]).await;
    assert_ne!(again.id, node.id);
    let hub = hub.restart().await;
    assert_eq!(word(&node.connect(&hub).await.err().unwrap()), "node_unknown");
    again.connect(&hub).await.unwrap();
    hub.hub.shutdown().await;
}

#[tokio::test]
async fn permissive_needs_a_reason_and_ends_by_itself() {
    use v1::Mode::{Permissive, Strict};
    let hub = TestHub::start().await;
    let node = hub.join("box", &[]).await;
    let mut session = node.connect(&hub).await.unwrap();
    assert_eq!(session.welcome.policy(), Strict);
    let login = hub.login("ann", "operator").await;
    let mut ann = hub.operator(&login).await;
    let mut admin = hub.local().await;
    let refused = hub.exec(&mut ann, "box", permissive()).await.err().unwrap();
    assert_eq!(word(&refused), "mode_not_allowed");
    let hint = refused.metadata().get(cortex_proto::HINT_TRAILER).unwrap().to_str().unwrap();
    assert!(hint.contains("cortex-hubd policy set box permissive"), "{hint}");

    let refused = admin.set_node_policy(policy("box", Permissive, " ", 0)).await.unwrap_err();
    assert_eq!(word(&refused), "reason_needed");
    let too_long = 31 * 24 * 3600 * 1000;
    let refused = admin.set_node_policy(policy("box", Permissive, "x", too_long)).await;
    assert_eq!(refused.unwrap_err().code(), Code::InvalidArgument);

    // One hour unless told otherwise.
    let before = unix_ms();
    let info = admin.set_node_policy(policy("box", Permissive, "debug", 0)).await.unwrap();
    let info = info.into_inner();
    assert_eq!((info.policy(), info.policy_reason.as_str()), (Permissive, "debug"));
    assert!((before + 3_600_000..=unix_ms() + 3_600_000).contains(&info.policy_until_ms));
    let told = session.policy().await;
    assert_eq!((told.policy(), told.until_ms), (Permissive, info.policy_until_ms));
    hub.exec(&mut ann, "box", permissive()).await.unwrap();
    let start = session.start_task().await;
    assert_eq!((start.actor.as_str(), start.role.as_str()), ("ann", "operator"));
    assert_eq!(node.connect(&hub).await.unwrap().welcome.policy_until_ms, info.policy_until_ms);

    // A short one falls back, and everyone hears of it.
    let mut session = node.connect(&hub).await.unwrap();
    admin.set_node_policy(policy("box", Permissive, "debug", 1_500)).await.unwrap();
    assert_eq!(session.policy().await.policy(), Permissive);
    let told = session.policy().await;
    assert_eq!((told.policy(), told.until_ms), (Strict, 0));
    let refused = hub.exec(&mut ann, "box", permissive()).await.err().unwrap();
    assert_eq!(word(&refused), "mode_not_allowed");

    // And one that ends while the hub is down.
    admin.set_node_policy(policy("box", Permissive, "debug", 1)).await.unwrap();
    let hub = hub.restart().await;
    assert_eq!(node.connect(&hub).await.unwrap().welcome.policy(), Strict);
    let mut admin = hub.local().await;
    admin.set_node_policy(policy("box", Strict, "", 0)).await.unwrap();
    let (short, _) = audit(&hub).await;
    for expected in [
        line("local", "policy.set", "box"),
        line("hub", "policy.ended", "box"),
        line("ann", "task.refused", "box"),
    ] {
        assert!(short.contains(&expected), "{expected:?} in {short:?}");
    }
    hub.hub.shutdown().await;
}

#[tokio::test]
async fn the_network_is_a_part_of_the_policy_with_its_own_reason_and_end() {
    use v1::Network::{Full, None};
    let hub = TestHub::start().await;
    let node = hub.join("box", &[]).await;
    let mut session = node.connect(&hub).await.unwrap();
    assert_eq!(session.welcome.policy_network(), None);
    let login = hub.login("ann", "operator").await;
    let mut ann = hub.operator(&login).await;
    let mut admin = hub.local().await;
    let online =
        || v1::TaskSpec { argv: vec!["true".into()], network: Full.into(), ..Default::default() };
    let refused = hub.exec(&mut ann, "box", online()).await.err().unwrap();
    assert_eq!(word(&refused), "network_not_allowed");
    let set = |mode: v1::Mode, reason: &str, for_ms| v1::SetNodePolicyRequest {
        network: Full.into(),
        ..policy("box", mode, reason, for_ms)
    };
    let refused = admin.set_node_policy(set(v1::Mode::Strict, "", 0)).await.unwrap_err();
    assert_eq!(word(&refused), "reason_needed");

    admin.set_node_policy(policy("box", v1::Mode::Permissive, "debug", 0)).await.unwrap();
    assert_eq!(session.policy().await.policy(), v1::Mode::Permissive);
    let info = admin.set_node_policy(set(v1::Mode::Strict, "builds", 0)).await.unwrap();
    let info = info.into_inner();
    assert_eq!((info.policy_network(), info.policy_until_ms), (Full, 0));
    assert_eq!((info.policy(), info.policy_reason.as_str()), (v1::Mode::Strict, "builds"));
    // What is taken away does not wait for the store.
    let told = session.policy().await;
    assert_eq!((told.policy(), told.network()), (v1::Mode::Strict, None));
    let told = session.policy().await;
    assert_eq!((told.policy(), told.network(), told.until_ms), (v1::Mode::Strict, Full, 0));
    // Both halves: this node's own ceiling says nothing of the network.
    let refused = hub.exec(&mut ann, "box", online()).await.err().unwrap();
    assert!(refused.message().contains("ceiling") && !refused.message().contains("policy"));

    // Over a restart it is still there, and one with an end goes by itself.
    let hub = hub.restart().await;
    let mut session = node.connect(&hub).await.unwrap();
    assert_eq!(session.welcome.policy_network(), Full);
    let mut admin = hub.local().await;
    admin.set_node_policy(set(v1::Mode::Strict, "builds", 1_500)).await.unwrap();
    assert_eq!(session.policy().await.network(), Full);
    assert_eq!(session.policy().await.network(), None);
    hub.hub.shutdown().await;
}

#[tokio::test]
async fn a_cordoned_node_keeps_what_it_runs_and_gets_nothing_new() {
    let hub = TestHub::start().await;
    let node = hub.join("box", &[]).await;
    let mut session = node.connect(&hub).await.unwrap();
    let mut admin = hub.local().await;
    let _running = hub.exec(&mut admin, "box", script()).await.unwrap();
    session.start_task().await;
    let cordon = |cordoned| v1::CordonNodeRequest { node: "box".into(), cordoned };
    assert!(admin.cordon_node(cordon(true)).await.unwrap().into_inner().cordoned);
    let refused = hub.exec(&mut admin, "box", script()).await.err().unwrap();
    assert_eq!(word(&refused), "node_cordoned");
    let nodes = admin.list_nodes(v1::ListNodesRequest::default()).await.unwrap().into_inner();
    assert_eq!((nodes.nodes[0].running_tasks, nodes.nodes[0].online), (1, true));
    let hub = hub.restart().await;
    let mut admin = hub.local().await;
    let _session = node.connect(&hub).await.unwrap();
    let refused = hub.exec(&mut admin, "box", script()).await.err().unwrap();
    assert_eq!(word(&refused), "node_cordoned", "after a restart as before");
    admin.cordon_node(cordon(false)).await.unwrap();
    hub.exec(&mut admin, "box", script()).await.unwrap();
    hub.hub.shutdown().await;
}

#[tokio::test]
async fn an_operator_sees_and_commands_its_scope_and_cannot_widen_it() {
    let hub = TestHub::start().await;
    let dev = hub.join("dev", &[("env", "dev")]).await;
    let prod = hub.join("prod", &[("env", "prod")]).await;
    let (_dev, _prod) = (dev.connect(&hub).await.unwrap(), prod.connect(&hub).await.unwrap());
    let mut admin = hub.local().await;
    for (name, nodes) in
        [("shared", &["dev", "prod"][..]), ("hidden", &["prod"]), ("own", &["dev"])]
    {
        admin.create_workspace(v1::CreateWorkspaceRequest { name: name.into() }).await.unwrap();
        for node in nodes {
            let (workspace, node) = (name.to_owned(), (*node).to_owned());
            let attach = v1::AttachWorkspaceRequest { workspace, node };
            admin.attach_workspace(attach).await.unwrap();
        }
    }
    let ann = hub.login_scoped("ann", "operator", &[("env", "dev")]).await;
    let root = hub.login("root", "admin").await;
    let (mut ann, mut root) = (hub.operator(&ann).await, hub.operator(&root).await);
    assert_eq!(names(&mut ann).await, ["dev"]);
    assert_eq!(names(&mut root).await, ["dev", "prod"]);
    let mut watch = ann.watch_nodes(v1::ListNodesRequest::default()).await.unwrap().into_inner();
    assert_eq!(watch.message().await.unwrap().unwrap().nodes.len(), 1);
    let status = ann.hub_status(v1::HubStatusRequest {}).await.unwrap().into_inner();
    assert_eq!((status.nodes_known, status.nodes_online, status.workspaces), (1, 1, 2));

    // What is outside is not there, not even as a similar name.
    hub.exec(&mut ann, "dev", script()).await.unwrap();
    for wanted in ["prod", "prud", &prod.id.to_string()] {
        let refused = hub.exec(&mut ann, wanted, script()).await.err().unwrap();
        assert_eq!(word(&refused), "node_not_found");
        let hint = refused.metadata().get(cortex_proto::HINT_TRAILER).unwrap();
        assert!(!hint.to_str().unwrap().contains("prod"), "{hint:?}");
    }
    let rename = v1::RenameNodeRequest { node: "prod".into(), name: "mine".into() };
    assert_eq!(word(&ann.rename_node(rename).await.unwrap_err()), "node_not_found");

    // Workspaces: those within, with the members within; none is drawn in from outside.
    let list = ann.list_workspaces(v1::ListWorkspacesRequest {}).await.unwrap().into_inner();
    let seen: Vec<_> = list.workspaces.iter().map(|w| (w.name.as_str(), w.members.len())).collect();
    assert_eq!(seen, [("own", 1), ("shared", 1)]);
    let attach = |workspace: &str| v1::AttachWorkspaceRequest {
        workspace: workspace.into(),
        node: "dev".into(),
    };
    let refused = ann.attach_workspace(attach("hidden")).await.unwrap_err();
    assert_eq!(word(&refused), "workspace_not_found");
    let refused = ann.attach_workspace(attach("shared")).await.unwrap_err();
    assert_eq!(word(&refused), "scope_too_narrow");

    // Labels of a scope are for administrators without one; others are for everyone.
    let label = |node: &str, key: &str, value: &str| v1::LabelNodeRequest {
        node: node.into(),
        set: [(key.to_owned(), value.to_owned())].into(),
        remove: vec![],
    };
    let refused = ann.label_node(label("dev", "env", "prod")).await.unwrap_err();
    assert_eq!(word(&refused), "label_protected");
    let remove = v1::LabelNodeRequest {
        node: "dev".into(),
        remove: vec!["env".into()],
        ..Default::default()
    };
    assert_eq!(word(&ann.label_node(remove).await.unwrap_err()), "label_protected");
    ann.label_node(label("dev", "gpu", "yes")).await.unwrap();
    let refused = root.label_node(label("dev", "self/gpu", "no")).await.unwrap_err();
    assert_eq!(refused.code(), Code::InvalidArgument);
    root.label_node(label("prod", "env", "dev")).await.unwrap();
    assert_eq!(names(&mut ann).await, ["dev", "prod"], "moved into her scope by an administrator");
    hub.hub.shutdown().await;
}

#[tokio::test]
async fn labels_that_a_node_brings_count_for_no_scope() {
    let hub = TestHub::start().await;
    let login = hub.login_scoped("ann", "operator", &[("env", "dev")]).await;
    let token = {
        let invite = v1::CreateInviteRequest::default();
        hub.local().await.create_invite(invite).await.unwrap().into_inner().token
    };
    hub.join_with(token, "liar", &[("env", "dev")]).await;
    assert!(names(&mut hub.operator(&login).await).await.is_empty());
    let nodes = hub.local().await.list_nodes(v1::ListNodesRequest::default()).await.unwrap();
    let labels = &nodes.into_inner().nodes[0].labels;
    assert_eq!(labels.iter().collect::<Vec<_>>(), [(&"self/env".to_owned(), &"dev".to_owned())]);
    hub.hub.shutdown().await;
}

#[tokio::test]
async fn an_agent_token_stays_strict_within_workspaces_and_has_no_authority() {
    let hub = TestHub::start().await;
    let node = hub.join("box", &[]).await;
    let mut session = node.connect(&hub).await.unwrap();
    let mut admin = hub.local().await;
    admin.set_node_policy(policy("box", v1::Mode::Permissive, "x", 0)).await.unwrap();
    admin.create_workspace(v1::CreateWorkspaceRequest { name: "w".into() }).await.unwrap();
    let attach = v1::AttachWorkspaceRequest { workspace: "w".into(), node: "box".into() };
    admin.attach_workspace(attach).await.unwrap();
    let mut bot = hub.operator(&hub.login("bot", "agent-token").await).await;
    let inside = || v1::TaskSpec { workspace: "w".into(), ..script() };
    for (spec, refusal) in [
        (script(), "workspace_needed"),
        (v1::TaskSpec { network: v1::Network::Full.into(), ..inside() }, "network_not_allowed"),
        (v1::TaskSpec { workspace: "w".into(), ..permissive() }, "mode_not_allowed"),
    ] {
        let refused = hub.exec(&mut bot, "box", spec).await.err().unwrap();
        assert_eq!(word(&refused), refusal);
    }
    let mut running = Vec::new();
    for _ in 0..crate::task::limits::CommandLimits::default().agent_token {
        running.push(hub.exec(&mut bot, "box", inside()).await.unwrap());
        assert_eq!(session.start_task().await.role, "agent-token");
    }
    let refused = hub.exec(&mut bot, "box", inside()).await.err().unwrap();
    assert_eq!(word(&refused), "too_many_commands");
    hub.hub.shutdown().await;
}

#[tokio::test]
async fn the_audit_log_tells_the_story_and_a_deletion_in_the_database_is_found() {
    let hub = TestHub::start().await;
    let node = hub.join("box", &[]).await;
    let mut session = node.connect(&hub).await.unwrap();
    let ann = hub.login("ann", "operator").await;
    let mut ann = hub.operator(&ann).await;
    ann.create_workspace(v1::CreateWorkspaceRequest { name: "w".into() }).await.unwrap();
    let (workspace, member) = ("w".to_owned(), "box".to_owned());
    let attach = v1::AttachWorkspaceRequest { workspace: workspace.clone(), node: member.clone() };
    ann.attach_workspace(attach).await.unwrap();
    let running = hub.exec(&mut ann, "box", script()).await.unwrap();
    let task = cortex_shared::ids::TaskId::from_slice(&running.task_id).unwrap().to_string();
    session.start_task().await;
    drop(session);
    assert_eq!(running.end().await.unwrap().verdict(), v1::TaskVerdict::StreamLost);
    let rename = v1::RenameNodeRequest { node: "box".into(), name: "crate".into() };
    ann.rename_node(rename).await.unwrap();
    let detach = v1::DetachWorkspaceRequest { workspace, node: "crate".into() };
    ann.detach_workspace(detach.clone()).await.unwrap();
    ann.detach_workspace(detach).await.unwrap();

    // As operators see it: a page at a time, by number and by action.
    let mut admin = hub.local().await;
    let list = |after_seq, limit, actions: &[&str]| v1::ListAuditRequest {
        after_seq,
        limit,
        actions: actions.iter().map(|a| (*a).to_owned()).collect(),
    };
    let mut read = async |request| {
        let mut stream = admin.list_audit(request).await.unwrap().into_inner();
        let mut lines = Vec::new();
        while let Some(line) = stream.message().await.unwrap() {
            lines.push(line);
        }
        lines
    };
    let all = read(list(0, 0, &[])).await;
    let story: Vec<_> = all
        .iter()
        .filter(|l| l.actor == "ann" && l.action != "operator.login")
        .map(|l| (l.action.as_str(), l.target.as_str()))
        .collect();
    assert_eq!(
        story,
        [
            ("workspace.created", "w"),
            ("workspace.attached", "w"),
            ("task.accepted", task.as_str()),
            ("task.ended", task.as_str()),
            ("node.renamed", "box"),
            ("workspace.detached", "w"),
        ]
    );
    let numbers: Vec<_> = all.iter().map(|l| l.seq).collect();
    assert_eq!(numbers, (1..=all.len() as u64).collect::<Vec<_>>());
    assert_eq!(read(list(2, 2, &[])).await, all[2..4]);
    assert_eq!(read(list(0, 0, &["task.ended"])).await.len(), 1);

    let verify = hub.local().await.verify_audit(v1::VerifyAuditRequest::default()).await.unwrap();
    let verify = verify.into_inner();
    assert!(verify.intact && verify.entries == all.len() as u64, "{verify:?}");
    let database = rusqlite::Connection::open(hub.hub.data.layout.database()).unwrap();
    database.execute("DELETE FROM audit WHERE seq = 3", []).unwrap();
    let verify = hub.local().await.verify_audit(v1::VerifyAuditRequest::default()).await.unwrap();
    let verify = verify.into_inner();
    assert!(!verify.intact && verify.first_bad_seq == 3, "{verify:?}");
    assert!(verify.problem.contains("line 3 is missing"), "{verify:?}");
    hub.hub.shutdown().await;
}

#[tokio::test]
async fn a_workspace_without_members_is_for_the_scope_it_was_made_in() {
    let hub = TestHub::start().await;
    let a = hub.join("a", &[("team", "a")]).await;
    let b = hub.join("b", &[("team", "b")]).await;
    let (_a, session) = (a.connect(&hub).await.unwrap(), b.connect(&hub).await.unwrap());
    let ann = hub.login_scoped("ann", "operator", &[("team", "a")]).await;
    let bob = hub.login_scoped("bob", "admin", &[("team", "b")]).await;
    let mut admin = hub.local().await;
    let create = |name: &str| v1::CreateWorkspaceRequest { name: name.into() };
    let attach = |workspace: &str, node: &str| v1::AttachWorkspaceRequest {
        workspace: workspace.into(),
        node: node.into(),
    };
    hub.operator(&bob).await.create_workspace(create("plans")).await.unwrap();
    admin.create_workspace(create("everyones")).await.unwrap();
    let hidden = async |hub: &TestHub, what: &str| {
        let mut ann = hub.operator(&ann).await;
        for workspace in ["plans", "everyones"] {
            let refused = ann.attach_workspace(attach(workspace, "a")).await.unwrap_err();
            assert_eq!(word(&refused), "workspace_not_found", "{workspace} {what}");
            let status =
                v1::WorkspaceStatusRequest { workspace: workspace.into(), ..Default::default() };
            let refused = ann.workspace_status(status).await.unwrap_err();
            assert_eq!(word(&refused), "workspace_not_found", "{workspace} {what}");
        }
        let list = ann.list_workspaces(v1::ListWorkspacesRequest {}).await.unwrap().into_inner();
        assert_eq!(list.workspaces, [], "{what}");
    };
    hidden(&hub, "while they are new").await;
    let mut bob = hub.operator(&bob).await;
    bob.attach_workspace(attach("plans", "b")).await.unwrap();
    hidden(&hub, "with a member of another team").await;
    admin.revoke_node(revoke("b")).await.unwrap();
    drop(session);
    bob.forget_node(v1::ForgetNodeRequest { node: "b".into() }).await.unwrap();
    hidden(&hub, "when the only member was forgotten").await;
    let list = bob.list_workspaces(v1::ListWorkspacesRequest {}).await.unwrap().into_inner();
    assert_eq!(list.workspaces.len(), 1, "it is still its team's");
    let hub = hub.restart().await;
    hidden(&hub, "after a restart").await;
    let all = hub.local().await.list_workspaces(v1::ListWorkspacesRequest {}).await.unwrap();
    assert_eq!(all.into_inner().workspaces.len(), 2, "whoever has no scope sees all");
    hub.hub.shutdown().await;
}

#[tokio::test]
async fn refusals_for_want_of_authority_stand_in_the_audit_log_and_a_loop_of_them_does_not_fill_it()
{
    let hub = TestHub::start().await;
    let node = hub.join("box", &[]).await;
    let _session = node.connect(&hub).await.unwrap();
    let mut viewer = hub.operator(&hub.login("eve", "viewer").await).await;
    for _ in 0..60 {
        assert_eq!(word(&viewer.revoke_node(revoke("box")).await.unwrap_err()), "role_too_low");
    }
    let ann = hub.login("ann", "operator").await;
    let mut ann = hub.operator(&ann).await;
    let elsewhere = v1::TaskSpec { workspace: "w".into(), ..script() };
    assert_eq!(word(&hub.exec(&mut ann, "box", elsewhere).await.err().unwrap()), "not_a_member");
    let mut admin = hub.local().await;
    let cordon = v1::CordonNodeRequest { node: "box".into(), cordoned: true };
    admin.cordon_node(cordon).await.unwrap();
    assert_eq!(word(&hub.exec(&mut ann, "box", script()).await.err().unwrap()), "node_cordoned");
    let by_ann = v1::RevokeOperatorRequest { name: "ann".into() };
    admin.revoke_operator(by_ann).await.unwrap();
    assert!(ann.who_am_i(v1::WhoAmIRequest {}).await.is_err());
    let hub = hub.restart().await;
    let (short, lines) = audit(&hub).await;
    let count = |line: (String, String, String)| short.iter().filter(|l| **l == line).count();
    assert_eq!(count(line("eve", "call.refused", "RevokeNode")), 20);
    assert_eq!(count(line("ann", "task.refused", "box")), 2);
    assert_eq!(count(line("ann", "call.refused", "WhoAmI")), 1);
    let rest = lines.iter().find(|line| line.action == "refusals.untold").unwrap();
    assert_eq!((rest.actor.as_str(), rest.detail.as_str()), ("eve", r#"{"count":40}"#));
    hub.hub.shutdown().await;
}

#[tokio::test]
async fn what_is_outside_a_scope_shows_in_no_name_and_no_watch() {
    let hub = TestHub::start().await;
    hub.join("secret", &[("team", "b")]).await;
    hub.join("mine", &[("team", "a")]).await;
    let mut admin = hub.local().await;
    for name in ["plans", "own"] {
        admin.create_workspace(v1::CreateWorkspaceRequest { name: name.into() }).await.unwrap();
    }
    let attach = v1::AttachWorkspaceRequest { workspace: "own".into(), node: "mine".into() };
    admin.attach_workspace(attach).await.unwrap();
    let ann = hub.login_scoped("ann", "operator", &[("team", "a")]).await;
    let mut ann = hub.operator(&ann).await;
    let rename = v1::RenameNodeRequest { node: "mine".into(), name: "secret".into() };
    let create = v1::CreateWorkspaceRequest { name: "plans".into() };
    for refused in [
        ann.rename_node(rename.clone()).await.unwrap_err(),
        ann.create_workspace(create).await.unwrap_err(),
    ] {
        assert_eq!(refused.message(), "this name cannot be used");
    }
    let all = admin.rename_node(rename).await.unwrap_err();
    assert!(all.message().contains("secret"), "{all}");
    let long = v1::WorkspaceStatusRequest { workspace: "x".repeat(100_000), watch: false };
    assert_eq!(word(&ann.workspace_status(long).await.unwrap_err()), "workspace_not_found");

    let watch = v1::WorkspaceStatusRequest { workspace: "own".into(), watch: true };
    let mut watch = ann.workspace_status(watch).await.unwrap().into_inner();
    watch.message().await.unwrap().unwrap();
    let label = v1::LabelNodeRequest {
        node: "mine".into(),
        set: [("team".to_owned(), "b".to_owned())].into(),
        remove: vec![],
    };
    admin.label_node(label).await.unwrap();
    let end = loop {
        // What was under way comes first.
        if let Err(status) = watch.message().await {
            break status;
        }
    };
    assert_eq!(word(&end), "workspace_not_found");
    hub.hub.shutdown().await;
}

/// How many lines of this action are in the audit log.
async fn lines_of(hub: &TestHub, action: &str) -> usize {
    audit(hub).await.0.iter().filter(|(_, other, _)| other == action).count()
}

#[tokio::test]
async fn whoever_asks_for_logins_in_a_loop_fills_no_log_and_keeps_nobody_out() {
    let hub = TestHub::start().await;
    let viewer = hub.login("eve", "viewer").await;
    let mut viewer = hub.operator(&viewer).await;
    let link = || v1::CreateLoginLinkRequest {};
    let mut links = 0;
    let refused = loop {
        match viewer.create_login_link(link()).await {
            Ok(_) => links += 1,
            Err(refused) => break refused,
        }
        assert!(links < 1000);
    };
    assert_eq!(word(&refused), "rate_limited");
    hub.local().await.create_login_link(link()).await.unwrap();
    assert_eq!(lines_of(&hub, "session.offered").await, links + 1);
    hub.hub.shutdown().await;
}

#[tokio::test]
async fn whoever_cancels_what_has_ended_writes_nothing_down() {
    let hub = TestHub::start().await;
    let node = hub.join("box", &[]).await;
    let mut session = node.connect(&hub).await.unwrap();
    let mut admin = hub.local().await;
    let running = hub.exec(&mut admin, "box", script()).await.unwrap();
    let task = cortex_shared::ids::TaskId::from_slice(&running.task_id).unwrap();
    let cancel = || v1::CancelTaskRequest { task: task.to_string(), ..Default::default() };
    let command = session.attach_task().await;
    admin.cancel_task(cancel()).await.unwrap();
    command.exit().await;
    running.end().await.unwrap();
    let ended = async {
        while hub.hub.store.task(task).await.unwrap().unwrap().may_run() {
            tokio::task::yield_now().await;
        }
    };
    tokio::time::timeout(Duration::from_secs(20), ended).await.expect("its end is written down");
    for _ in 0..3 {
        admin.cancel_task(cancel()).await.unwrap();
    }
    assert_eq!(lines_of(&hub, "task.cancel").await, 1);
    hub.hub.shutdown().await;
}
