//! Events over HTTP.

use tokio::io::{AsyncBufReadExt as _, BufReader};

use super::*;

/// A stream of events.
pub(super) struct Follower {
    stream: BufReader<TlsStream<TcpStream>>,
    headers: String,
}

/// A piece of it.
#[derive(Debug, Default)]
pub(super) struct Piece {
    pub(super) id: String,
    event: String,
    data: String,
}

impl Piece {
    pub(super) fn json(&self) -> Value {
        serde_json::from_str(&self.data).unwrap_or_else(|_| panic!("no JSON: {self:?}"))
    }
}

impl Follower {
    async fn start(hub: &TestHub, login: Option<&Login>, query: &str, headers: &[&str]) -> Self {
        Self::of(hub, login, &format!("/api/v1/events{query}"), headers).await
    }

    pub(super) async fn of(
        hub: &TestHub,
        login: Option<&Login>,
        path: &str,
        headers: &[&str],
    ) -> Self {
        let mut stream = BufReader::new(dial(hub, login).await);
        let headers: String = headers.iter().map(|header| format!("{header}\r\n")).collect();
        let request = format!("GET {path} HTTP/1.1\r\nhost: localhost\r\n{headers}\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut headers = String::new();
        while !headers.ends_with("\r\n\r\n") {
            assert!(stream.read_line(&mut headers).await.unwrap() > 0, "{headers}");
        }
        assert!(headers.starts_with("HTTP/1.1 200"), "{headers}");
        Self { stream, headers }
    }

    /// The next piece, each of which is a chunk; nothing after the last.
    pub(super) async fn next(&mut self) -> Option<Piece> {
        let mut length = String::new();
        self.stream.read_line(&mut length).await.unwrap();
        let length = usize::from_str_radix(length.trim(), 16).unwrap();
        let mut chunk = vec![0; length + 2];
        self.stream.read_exact(&mut chunk).await.unwrap();
        if length == 0 {
            return None;
        }
        let text = String::from_utf8(chunk).unwrap();
        let text = text.strip_suffix("\n\n\r\n").unwrap_or_else(|| panic!("{text:?}"));
        let mut piece = Piece::default();
        for line in text.lines() {
            let (name, value) = line.split_once(": ").unwrap();
            let field = match name {
                "id" => &mut piece.id,
                "event" => &mut piece.event,
                "data" => &mut piece.data,
                _ => panic!("{line}"),
            };
            assert_eq!(std::mem::replace(field, value.to_owned()), "", "{text}");
        }
        Some(piece)
    }

    /// The next news.
    pub(super) async fn news(&mut self) -> Piece {
        loop {
            let piece = self.next().await.expect("it goes on");
            assert_eq!(piece.event, "", "{piece:?}");
            if !piece.data.is_empty() {
                return piece;
            }
        }
    }

    /// The next news of this kind.
    async fn news_of(&mut self, kind: &str) -> Piece {
        let found = async {
            loop {
                let piece = self.news().await;
                if piece.json()["kind"] == kind {
                    return piece;
                }
            }
        };
        soon(found).await
    }

    /// Why it ends, after whatever else it tells.
    pub(super) async fn end(mut self) -> Value {
        let end = async {
            loop {
                let piece = self.next().await.expect("the last says why");
                if piece.event == "problem" {
                    assert!(self.next().await.is_none());
                    return piece.json();
                }
            }
        };
        soon(end).await
    }
}

/// What comes within a minute, if it comes at all.
async fn soon<T>(what: impl Future<Output = T>) -> T {
    tokio::time::timeout(Duration::from_secs(60), what).await.expect("it comes")
}

async fn until_nobody_follows(hub: &TestHub) {
    let nobody = async {
        while hub.hub.events.counters().subscriptions > 0 {
            tokio::task::yield_now().await;
        }
    };
    soon(nobody).await;
}

#[tokio::test]
async fn events_come_within_the_callers_scope_and_go_on_after_the_last_one() {
    let hub = TestHub::start().await;
    let ann = hub.login("ann", "admin").await;
    let dev = hub.login_scoped("dev", "admin", &[("env", "dev")]).await;
    let mut all = Follower::start(&hub, Some(&ann), "?kinds=node.joined", &[]).await;
    for header in ["text/event-stream", "no-store", "nosniff"] {
        assert!(all.headers.contains(header), "{}", all.headers);
    }
    let place = all.next().await.unwrap();
    assert!(place.data.is_empty() && place.id.parse::<u64>().is_ok(), "{place:?}");
    let session = bearer(&hub, Some(&dev)).await;
    let mut some = Follower::start(&hub, None, "?after=0", &[&session]).await;
    for (name, env) in [("prod-1", "prod"), ("dev-1", "dev"), ("prod-2", "prod"), ("dev-2", "dev")]
    {
        hub.join(name, &[("env", env)]).await;
    }

    let mut pieces = Vec::new();
    for name in ["prod-1", "dev-1", "prod-2", "dev-2"] {
        let piece = all.news().await;
        let event = piece.json();
        assert_eq!((&event["node"], &event["kind"]), (&json!(name), &json!("node.joined")));
        assert_eq!(event["cursor"].to_string(), piece.id);
        pieces.push(piece);
    }
    // As the command line writes them.
    let fields: Vec<String> = pieces[0].json().as_object().unwrap().keys().cloned().collect();
    let expected = [
        "actor",
        "at_ms",
        "cursor",
        "detail",
        "kind",
        "node",
        "node_id",
        "task_id",
        "workspace",
        "workspace_id",
    ];
    assert_eq!(fields, expected);
    assert!(pieces[0].data.starts_with("{\"cursor\":"));
    for (name, known) in [("dev-1", &pieces[1]), ("dev-2", &pieces[3])] {
        let piece = some.news_of("node.joined").await;
        assert_eq!(piece.json()["node"], name);
        assert_eq!((&piece.id, &piece.data), (&known.id, &known.data));
    }

    // A browser comes back with the same query, and says how far it got.
    drop(all);
    let header = format!("last-event-id: {}", pieces[1].id);
    let query = "?after=0&kinds=node.joined";
    let mut back = Follower::start(&hub, Some(&ann), query, &[&header]).await;
    assert_eq!(back.news().await.data, pieces[2].data);
    assert_eq!(back.news().await.data, pieces[3].data);
    let query = format!("?after={}", pieces[2].id);
    let mut back = Follower::start(&hub, Some(&ann), &query, &[]).await;
    assert_eq!(back.news_of("node.joined").await.data, pieces[3].data);

    // Also to the next hub.
    let hub = hub.restart().await;
    assert_eq!(back.end().await["code"], "shutting_down");
    let header = format!("last-event-id: {}", pieces[3].id);
    let mut back = Follower::start(&hub, Some(&ann), "?kinds=hub", &[&header]).await;
    assert_eq!(back.news().await.json()["kind"], "hub.stopping");
    assert_eq!(back.news().await.json()["kind"], "hub.started");
    // One that this hub never gave.
    let header = format!("last-event-id: {}", u64::MAX);
    let mut lost = Follower::start(&hub, Some(&ann), "", &[&header]).await;
    assert_eq!(lost.news().await.json()["missed"], Value::Null);
    hub.hub.shutdown().await;
}

#[tokio::test]
async fn a_stream_ends_with_the_right_to_it_and_says_why() {
    let hub = TestHub::start().await;
    let ann = hub.login("ann", "viewer").await;
    let session = bearer(&hub, Some(&ann)).await;
    let by_certificate = Follower::start(&hub, Some(&ann), "", &[]).await;
    let by_session = Follower::start(&hub, None, "", &[&session]).await;
    let other = bearer(&hub, Some(&ann)).await;
    let logged_out = Follower::start(&hub, None, "", &[&other]).await;
    assert_eq!(hub.hub.events.counters().subscriptions, 3);
    send(&hub, None, "DELETE", "/api/v1/session", &[&other], "").await.ok();
    assert_eq!(logged_out.end().await["code"], "not_logged_in");
    let request = v1::RevokeOperatorRequest { name: "ann".into() };
    hub.local().await.revoke_operator(request).await.unwrap();
    for follower in [by_certificate, by_session] {
        let problem = follower.end().await;
        assert_eq!(problem["code"], "operator_revoked");
        assert_eq!(problem["type"], "urn:cortex:problem:operator_revoked");
    }
    until_nobody_follows(&hub).await;
    hub.hub.shutdown().await;
}

#[tokio::test]
async fn followers_that_hang_up_are_forgotten_and_one_too_many_is_refused() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = config(folder.path());
    config.events.subscriptions = 2;
    let hub = TestHub { hub: Hub::start(config).await.unwrap(), folder };
    let session = bearer(&hub, None).await;
    for _ in 0..3 {
        let mut open = Vec::new();
        for _ in 0..2 {
            open.push(Follower::start(&hub, None, "", &[&session]).await);
        }
        let refused = get(&hub, "/api/v1/events", &[&session]).await;
        assert_eq!((refused.status, refused.code().as_str()), (429, "too_many_subscriptions"));
        drop(open);
        until_nobody_follows(&hub).await;
    }
    for (path, headers) in [
        ("/api/v1/events?kinds=nodes", &[session.as_str()][..]),
        ("/api/v1/events?after=x", &[&session]),
        ("/api/v1/events?follow=true", &[&session]),
        ("/api/v1/events", &[&session, "last-event-id: x"]),
        ("/api/v1/events", &[&session, "last-event-id: -1"]),
        ("/api/v1/events", &[&session, "last-event-id: 18446744073709551616"]),
        ("/api/v1/events", &[&session, "last-event-id: \u{e9}"]),
    ] {
        let refused = get(&hub, path, headers).await;
        assert_eq!((refused.status, refused.code().as_str()), (400, "invalid_argument"), "{path}");
    }
    assert_eq!(get(&hub, "/api/v1/events", &[]).await.code(), "not_logged_in");
    assert_eq!(hub.hub.events.counters().subscriptions, 0);
    hub.hub.shutdown().await;
}

#[tokio::test]
async fn a_stream_goes_on_beyond_the_time_of_a_request() {
    let (hub, faults) = hub_with(|http| http.request_time = Duration::from_millis(200)).await;
    let session = bearer(&hub, None).await;
    let mut follower = Follower::start(&hub, None, "", &[&session]).await;
    // Takes its time, which began later.
    faults.set(Fault::Stall);
    assert_eq!(get(&hub, "/api/v1/tasks", &[&session]).await.code(), "deadline");
    faults.set(Fault::None);
    hub.join("box", &[]).await;
    assert_eq!(follower.news_of("node.joined").await.json()["node"], "box");
    hub.hub.shutdown().await;
}
