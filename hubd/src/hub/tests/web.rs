//! The HTTP side over real connections.

mod listings;
mod stream;
mod tasks;

use cortex_proto::v1;
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;
use tokio_rustls::client::TlsStream;

use super::support::{Login, TestHub, shake, tls};
use super::*;
use crate::config::HttpConfig;
use crate::grpc::auth::expected::may_call;
use crate::store::fault::{Fault, FaultStore, Faults};

/// An answer.
#[derive(Debug)]
struct Answer {
    status: u16,
    headers: String,
    body: String,
}

impl Answer {
    fn json(&self) -> Value {
        serde_json::from_str(&self.body).unwrap_or_else(|_| panic!("no JSON: {self:?}"))
    }

    fn code(&self) -> String {
        assert!(self.headers.contains("application/problem+json"), "{self:?}");
        self.json()["code"].as_str().unwrap().to_owned()
    }

    fn ok(self) -> Self {
        assert_eq!(self.status, 200, "{self:?}");
        self
    }

    /// The cookie that it sets, as it is sent back.
    fn cookie(&self) -> String {
        let line = self.headers.lines().find(|line| line.starts_with("set-cookie: ")).unwrap();
        let cookie = line.trim_start_matches("set-cookie: ");
        for attribute in ["HttpOnly", "Secure", "SameSite=Strict", "Path=/"] {
            assert!(cookie.contains(attribute), "{cookie}");
        }
        cookie.split(';').next().unwrap().to_owned()
    }
}

/// A connection to the HTTP side, which has to be that of the mesh's authority.
async fn dial(hub: &TestHub, login: Option<&Login>) -> TlsStream<TcpStream> {
    let connector = tls(&[hub.authority()], login, b"http/1.1");
    shake(hub.hub.http().unwrap().address(), "localhost", connector).await
}

/// Sends a request on a connection of its own, and reads the answer.
async fn send(
    hub: &TestHub,
    login: Option<&Login>,
    method: &str,
    path: &str,
    headers: &[&str],
    body: &str,
) -> Answer {
    let stream = dial(hub, login).await;
    let answer = send_on(stream, method, path, headers, body).await;
    answer.unwrap_or_else(|| panic!("no answer to {method} {path}"))
}

/// The same on this connection; nothing if it is closed instead.
async fn send_on(
    mut stream: TlsStream<TcpStream>,
    method: &str,
    path: &str,
    headers: &[&str],
    body: &str,
) -> Option<Answer> {
    let mut request =
        format!("{method} {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n");
    for header in headers {
        request.push_str(&format!("{header}\r\n"));
    }
    if !body.is_empty() {
        request.push_str("content-type: application/json\r\n");
    }
    request.push_str(&format!("content-length: {}\r\n\r\n{body}", body.len()));
    // It may be closed by now.
    stream.write_all(request.as_bytes()).await.ok();
    let mut bytes = Vec::new();
    // A server that closes at once may leave out the farewell of TLS.
    stream.read_to_end(&mut bytes).await.ok();
    let text = String::from_utf8(bytes).unwrap();
    let (headers, body) = text.split_once("\r\n\r\n")?;
    let status = headers.split(' ').nth(1).unwrap().parse().unwrap();
    Some(Answer { status, headers: headers.to_owned(), body: body.to_owned() })
}

async fn get(hub: &TestHub, path: &str, headers: &[&str]) -> Answer {
    send(hub, None, "GET", path, headers, "").await
}

/// A code from a login link of this operator; of the hub's own administrator without one.
async fn code(hub: &TestHub, login: Option<&Login>) -> String {
    let mut client = match login {
        Some(login) => hub.operator(login).await,
        None => hub.local().await,
    };
    let link = client.create_login_link(v1::CreateLoginLinkRequest {}).await.unwrap().into_inner();
    assert!(link.url.starts_with("https://127.0.0.1:") && link.url.ends_with(&link.code));
    assert!(link.url.contains("/login#") && link.http_pin.starts_with("sha256//"));
    link.code
}

/// A session of this operator, as the header that shows it.
async fn bearer(hub: &TestHub, login: Option<&Login>) -> String {
    let body = json!({ "code": code(hub, login).await, "bearer": true }).to_string();
    let answer = send(hub, None, "POST", "/api/v1/session", &[], &body).await.ok();
    assert!(!answer.headers.contains("set-cookie"));
    format!("authorization: Bearer {}", answer.json()["token"].as_str().unwrap())
}

#[tokio::test]
async fn a_login_link_opens_one_session_that_ends_when_it_is_closed() {
    let hub = TestHub::start().await;
    let ann = hub.login("ann", "viewer").await;
    assert_eq!(get(&hub, "/api/v1/nodes", &[]).await.code(), "not_logged_in");
    let body = json!({ "code": code(&hub, Some(&ann)).await }).to_string();
    let opened = send(&hub, None, "POST", "/api/v1/session", &[], &body).await.ok();
    assert_eq!((&opened.json()["name"], &opened.json()["role"]), (&json!("ann"), &json!("viewer")));
    let cookie = format!("cookie: {}", opened.cookie());
    let again = send(&hub, None, "POST", "/api/v1/session", &[], &body).await;
    assert_eq!((again.status, again.code().as_str()), (403, "invalid_code"));
    let shown = get(&hub, "/api/v1/session", &[&cookie]).await.ok().json();
    assert_eq!(shown["name"], "ann");
    assert!(shown["expires_at_ms"].as_i64().unwrap() > unix_ms());
    get(&hub, "/api/v1/nodes", &[&cookie]).await.ok();
    // What another site's page makes the browser send.
    for origin in ["origin: https://evil.example", "origin: null", "x-none: 1"] {
        let refused = send(&hub, None, "DELETE", "/api/v1/session", &[&cookie, origin], "").await;
        assert_eq!((refused.status, refused.code().as_str()), (403, "foreign_origin"), "{origin}");
    }
    let own = "origin: https://localhost";
    let closed = send(&hub, None, "DELETE", "/api/v1/session", &[&cookie, own], "").await.ok();
    assert!(closed.headers.contains("Max-Age=0"));
    assert_eq!(get(&hub, "/api/v1/session", &[&cookie]).await.code(), "not_logged_in");
    let lines = hub.hub.store.audit_page(None, 1000).await.unwrap();
    let actions: Vec<_> = lines.iter().map(|line| line.action.as_str()).collect();
    for action in ["session.offered", "session.opened", "session.closed"] {
        assert!(actions.contains(&action), "{actions:?}");
    }
    hub.hub.shutdown().await;
}

#[tokio::test]
async fn whoever_asks_again_is_told_that_nothing_has_changed_until_something_has() {
    let hub = TestHub::start().await;
    let session = bearer(&hub, None).await;
    let tag = |answer: &Answer| {
        let line = answer.headers.lines().find(|line| line.starts_with("etag: ")).unwrap();
        line.replace("etag", "if-none-match")
    };
    let first = get(&hub, "/api/v1/nodes", &[&session]).await.ok();
    assert!(first.headers.contains("cache-control: no-store"));
    let tag = tag(&first);
    let same = get(&hub, "/api/v1/nodes", &[&session, &tag]).await;
    assert_eq!((same.status, same.body.as_str()), (304, ""));
    // Without a session the tag is worth nothing.
    assert_eq!(get(&hub, "/api/v1/nodes", &[&tag]).await.code(), "not_logged_in");
    let _node = hub.join("south", &[]).await;
    let other = get(&hub, "/api/v1/nodes", &[&session, &tag]).await.ok();
    assert_eq!(other.json()["nodes"][0]["name"], "south");
    hub.hub.shutdown().await;
}

/// The words of those who were not let in to a call.
const REFUSALS: [&str; 4] =
    ["not_logged_in", "wrong_kind_of_caller", "role_too_low", "scope_too_narrow"];

#[tokio::test]
async fn every_route_lets_in_whom_its_call_lets_in_over_grpc() {
    let hub = TestHub::start().await;
    let mut callers = vec![("nobody".to_owned(), None, '-')];
    for (name, role, scope, letter) in [
        ("viewer", "viewer", &[][..], 'v'),
        ("bot", "agent-token", &[], 't'),
        ("operator", "operator", &[], 'o'),
        ("scoped", "admin", &[("env", "dev")], 's'),
        ("admin", "admin", &[], 'a'),
    ] {
        let login = hub.login_scoped(name, role, scope).await;
        let session = bearer(&hub, Some(&login)).await;
        callers.push((name.to_owned(), Some(session), letter));
    }
    let document = get(&hub, "/api/v1/openapi.json", &[]).await.ok().json();
    let mut checked = 0;
    for (path, verbs) in document["paths"].as_object().unwrap() {
        for (verb, operation) in verbs.as_object().unwrap() {
            // Those that end the session come elsewhere.
            let Some(call) = operation["x-cortex-call"]
                .as_str()
                .filter(|_| verb != "delete" || path != "/api/v1/session")
            else {
                continue;
            };
            let mut path = path.replace('{', "x").replace('}', "");
            if operation.pointer("/responses/200/content/text~1event-stream").is_some() {
                // Whoever is let in is told that there are none, instead of a stream without an end.
                path.push_str("?kinds=none");
            }
            for (name, session, letter) in &callers {
                let headers: Vec<&str> = session.iter().map(String::as_str).collect();
                let body = if operation.get("requestBody").is_some() { "{}" } else { "" };
                let answer = send(&hub, None, &verb.to_uppercase(), &path, &headers, body).await;
                let let_in = answer.status < 400 || !REFUSALS.contains(&answer.code().as_str());
                assert_eq!(let_in, may_call(call, *letter), "{verb} {path} by {name}: {answer:?}");
                assert!(answer.status < 500, "{verb} {path} by {name}: {answer:?}");
                checked += 1;
            }
        }
    }
    assert!(checked >= 80, "{checked}");
    hub.hub.shutdown().await;
}

#[tokio::test]
async fn a_certificate_is_as_good_as_a_session_and_a_nodes_is_not() {
    let hub = TestHub::start().await;
    let ann = hub.login("ann", "admin").await;
    let node = hub.join("box", &[]).await;
    let shown = send(&hub, Some(&ann), "GET", "/api/v1/session", &[], "").await.ok().json();
    assert_eq!(shown["name"], "ann");
    let refused = send(&hub, Some(&node.login), "GET", "/api/v1/nodes", &[], "").await;
    assert_eq!((refused.status, refused.code().as_str()), (403, "wrong_kind_of_caller"));
    // A session that is not good is not made good by the connection.
    let bad = "authorization: Bearer cxs_AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA";
    let refused = send(&hub, Some(&ann), "GET", "/api/v1/nodes", &[bad], "").await;
    assert_eq!((refused.status, refused.code().as_str()), (401, "not_logged_in"));
    hub.hub.shutdown().await;
}

#[tokio::test]
async fn a_revoked_operators_session_and_code_are_worth_nothing_at_once() {
    let hub = TestHub::start().await;
    let ann = hub.login("ann", "admin").await;
    let session = bearer(&hub, Some(&ann)).await;
    let code = code(&hub, Some(&ann)).await;
    get(&hub, "/api/v1/nodes", &[&session]).await.ok();
    let request = v1::RevokeOperatorRequest { name: "ann".into() };
    hub.local().await.revoke_operator(request).await.unwrap();
    assert_eq!(get(&hub, "/api/v1/nodes", &[&session]).await.code(), "operator_revoked");
    assert_eq!(get(&hub, "/api/v1/nodes", &[&session]).await.code(), "not_logged_in");
    let body = json!({ "code": code }).to_string();
    let refused = send(&hub, None, "POST", "/api/v1/session", &[], &body).await;
    assert_eq!(refused.code(), "invalid_code");
    hub.hub.shutdown().await;
}

#[tokio::test]
async fn nodes_come_in_pages_within_the_callers_scope_and_their_policy_can_be_set() {
    let hub = TestHub::start().await;
    for (name, env) in [("a", "dev"), ("b", "prod"), ("c", "dev"), ("d", "dev")] {
        hub.join(name, &[("env", env)]).await;
    }
    let scoped = hub.login_scoped("scoped", "admin", &[("env", "dev")]).await;
    let session = bearer(&hub, Some(&scoped)).await;
    let (mut names, mut cursor) = (Vec::new(), String::new());
    loop {
        let path = format!("/api/v1/nodes?limit=2&cursor={cursor}");
        let page = get(&hub, &path, &[&session]).await.ok().json();
        let nodes = page["nodes"].as_array().unwrap();
        assert!(nodes.len() <= 2);
        names.extend(nodes.iter().map(|node| node["name"].as_str().unwrap().to_owned()));
        match page["next_cursor"].as_str() {
            Some(next) => cursor = next.to_owned(),
            None => break,
        }
    }
    assert_eq!(names, ["a", "c", "d"]);
    let hidden = get(&hub, "/api/v1/nodes/b", &[&session]).await;
    assert_eq!((hidden.status, hidden.code().as_str()), (404, "node_not_found"));
    let put = async |body: Value| {
        let path = "/api/v1/nodes/c/policy";
        send(&hub, None, "PUT", path, &[&session], &body.to_string()).await
    };
    let refused = put(json!({ "mode": "permissive" })).await;
    assert_eq!((refused.status, refused.code().as_str()), (400, "reason_needed"));
    assert!(refused.json()["hint"].as_str().unwrap().contains("--reason"));
    for bad in [json!({ "mode": "loose" }), json!({}), json!({ "mode": "strict", "more": 1 })] {
        assert_eq!(put(bad).await.code(), "invalid_argument");
    }
    let set = put(json!({ "mode": "permissive", "reason": "a look", "for_ms": 60_000 })).await;
    let node = set.ok().json();
    assert_eq!((&node["policy"], &node["policy_reason"]), (&json!("permissive"), &json!("a look")));
    assert!(node["policy_until_ms"].as_i64().unwrap() > unix_ms());
    let path = "/api/v1/nodes/c/policy";
    let node = send(&hub, None, "DELETE", path, &[&session], "").await.ok().json();
    assert_eq!((&node["policy"], &node["policy_until_ms"]), (&json!("strict"), &Value::Null));
    assert_eq!(get(&hub, "/api/v1/nodes?limt=2", &[&session]).await.code(), "invalid_argument");
    hub.hub.shutdown().await;
}

#[tokio::test]
async fn what_is_too_large_or_no_json_is_refused() {
    let hub = TestHub::start().await;
    let large = json!({ "code": "x".repeat(100_000) }).to_string();
    let refused = send(&hub, None, "POST", "/api/v1/session", &[], &large).await;
    assert_eq!((refused.status, refused.code().as_str()), (413, "too_large"));
    let plain =
        send(&hub, None, "POST", "/api/v1/session", &["content-type: text/plain"], "").await;
    assert_eq!((plain.status, plain.code().as_str()), (415, "not_json"));
    let many = format!("x-large: {}", "x".repeat(64 * 1024));
    let refused = get(&hub, "/healthz", &[&many]).await;
    assert_eq!(refused.status, 431);
    hub.hub.shutdown().await;
}

#[tokio::test]
async fn numbers_are_for_this_machine_and_health_is_for_everybody() {
    let hub = TestHub::start().await;
    hub.join("box", &[]).await;
    let request = v1::RunWorkerRequest { name: "invite-expiry".into() };
    hub.local().await.run_worker(request).await.unwrap();
    assert_eq!(get(&hub, "/readyz", &[]).await.ok().body, "ready\n");
    let numbers = get(&hub, "/metrics", &[]).await.ok();
    assert!(numbers.headers.contains("text/plain; version=0.0.4"));
    for line in [
        "cortex_nodes{state=\"offline\"} 1",
        "cortex_hub_phase{phase=\"ready\"} 1",
        "cortex_tasks_open{state=\"running\"} 0",
        "# TYPE cortex_store_duration_seconds histogram",
        "cortex_event_subscriptions 0",
        "cortex_events_unwritten_total 0",
        "cortex_worker_panics_total{worker=\"policy-end\"} 0",
        "cortex_worker_last_run_failed{worker=\"invite-expiry\"} 0",
    ] {
        assert!(numbers.body.lines().any(|found| found == line), "{line}: {}", numbers.body);
    }
    let number = |name: &str| -> f64 {
        let line = numbers.body.lines().find(|line| line.starts_with(name));
        line.and_then(|line| line.rsplit(' ').next()).unwrap().parse().unwrap()
    };
    assert!(number("cortex_events_total ") >= 2.0);
    assert!(number("cortex_worker_runs_total{worker=\"invite-expiry\"}") >= 1.0);
    assert!(number("cortex_worker_last_run_duration_seconds{worker=\"invite-expiry\"}") < 60.0);
    let ended = number("cortex_worker_last_run_timestamp_seconds{worker=\"invite-expiry\"}");
    assert!((ended * 1000.0 - unix_ms() as f64).abs() < 60_000.0, "{ended}");
    hub.hub.shutdown().await;
}

/// A hub with this HTTP side, on a store that does as it is told.
async fn hub_with(change: impl FnOnce(&mut HttpConfig)) -> (TestHub, Faults) {
    let folder = tempfile::tempdir().unwrap();
    let (mut config, faults) = (config(folder.path()), Faults::default());
    change(&mut config.http);
    let handle = faults.clone();
    let hub = Hub::start_on(config, |store| Arc::new(FaultStore::new(store, handle))).await;
    (TestHub { hub: hub.unwrap(), folder }, faults)
}

#[tokio::test]
async fn one_connection_too_many_is_closed_and_those_that_are_there_go_on() {
    let (hub, _) = hub_with(|http| http.connections = 1).await;
    let mut first = dial(&hub, None).await;
    let ask = b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n";
    let mut answer = [0; 15];
    for _ in 0..2 {
        first.write_all(ask).await.unwrap();
        first.read_exact(&mut answer).await.unwrap();
        assert_eq!(&answer, b"HTTP/1.1 200 OK");
        let mut byte = [0];
        let mut rest = Vec::new();
        while !rest.ends_with(b"\r\n\r\nok\n") {
            first.read_exact(&mut byte).await.unwrap();
            rest.push(byte[0]);
        }
        let refused = send_on(dial(&hub, None).await, "GET", "/healthz", &[], "").await;
        assert!(refused.is_none(), "{refused:?}");
    }
    drop(first);
    // Its place is free once the hub has seen its end.
    while send_on(dial(&hub, None).await, "GET", "/healthz", &[], "").await.is_none() {}
    hub.hub.shutdown().await;
}

/// Reads until the hub closes the connection; what came.
async fn until_closed(stream: &mut TlsStream<TcpStream>) -> String {
    let mut bytes = Vec::new();
    // A server that closes at once may leave out the farewell of TLS.
    let closed = tokio::time::timeout(Duration::from_secs(60), stream.read_to_end(&mut bytes));
    closed.await.expect("the hub closes it").ok();
    String::from_utf8(bytes).unwrap()
}

#[tokio::test]
async fn peers_that_say_nothing_too_slowly_or_nothing_more_are_turned_away_and_others_served() {
    let time = Duration::from_millis(500);
    let (hub, _) = hub_with(|http| (http.header_time, http.connections) = (time, 4)).await;
    let session = bearer(&hub, None).await;
    let begun = std::time::Instant::now();
    let mut silent = dial(&hub, None).await;
    let mut asked_once = dial(&hub, None).await;
    asked_once.write_all(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n").await.unwrap();
    let (mut from_slow, mut to_slow) = tokio::io::split(dial(&hub, None).await);
    let slowly = async {
        // Always one byte more, as a header and as the beginning of HTTP/2.
        to_slow.write_all(b"GET /healthz HTTP/1.1\r\nx: ").await?;
        loop {
            to_slow.write_all(b"x").await?;
            tokio::time::sleep(time / 10).await;
        }
    };
    let answered = async {
        let mut bytes = Vec::new();
        from_slow.read_to_end(&mut bytes).await.ok();
        bytes
    };
    let slow = async {
        tokio::select! {
            // It was closed while it wrote.
            ended = slowly => { let _error: std::io::Result<()> = ended; Vec::new() }
            bytes = answered => bytes,
        }
    };
    let (nothing, once, slow) =
        tokio::join!(until_closed(&mut silent), until_closed(&mut asked_once), slow);
    assert!(begun.elapsed() >= time, "they had their time");
    assert_eq!(nothing, "");
    assert!(once.starts_with("HTTP/1.1 200") && once.ends_with("ok\n"), "{once}");
    let slow = String::from_utf8(slow).unwrap();
    assert!(slow.is_empty() || slow.starts_with("HTTP/1.1 408"), "{slow}");
    // Their places are free; each of these is a connection of its own.
    for _ in 0..8 {
        get(&hub, "/api/v1/nodes", &[&session]).await.ok();
    }
    // Whoever listens says nothing either, and stays.
    let mut listening = dial(&hub, None).await;
    let request = format!("GET /api/v1/events HTTP/1.1\r\nhost: localhost\r\n{session}\r\n\r\n");
    listening.write_all(request.as_bytes()).await.unwrap();
    let mut begins = [0; 15];
    listening.read_exact(&mut begins).await.unwrap();
    assert_eq!(&begins, b"HTTP/1.1 200 OK");
    let mut silent = dial(&hub, None).await;
    until_closed(&mut silent).await;
    hub.join("box", &[]).await;
    let mut heard = String::new();
    while !heard.contains("node.joined") {
        let mut bytes = [0; 4096];
        let count = listening.read(&mut bytes).await.unwrap();
        assert!(count > 0, "it was closed: {heard}");
        heard.push_str(std::str::from_utf8(&bytes[..count]).unwrap());
    }
    drop(listening);
    hub.hub.shutdown().await;
}

#[tokio::test]
async fn one_address_has_its_share_of_the_connections() {
    let (hub, _) = hub_with(|http| (http.connections, http.address_connections) = (8, 2)).await;
    let mut held = Vec::new();
    for _ in 0..2 {
        let mut stream = dial(&hub, None).await;
        stream.write_all(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n").await.unwrap();
        let mut begins = [0; 15];
        stream.read_exact(&mut begins).await.unwrap();
        held.push(stream);
    }
    let mut third = dial(&hub, None).await;
    // There are six places left, none of them for it: it is closed, whatever it asks.
    third.write_all(b"GET /healthz HTTP/1.1\r\nhost: localhost\r\n\r\n").await.ok();
    assert_eq!(until_closed(&mut third).await, "");
    held.pop();
    hub.hub.shutdown().await;
}

#[tokio::test]
async fn a_download_that_takes_too_long_is_ended_with_its_connection() {
    let folder = tempfile::tempdir().unwrap();
    let agent = std::fs::File::create(folder.path().join("cortex-agent-linux-aarch64")).unwrap();
    agent.set_len(32 << 20).unwrap();
    let place = folder.path().to_owned();
    let (hub, _) = hub_with(move |http| {
        http.agents = Some(place);
        (http.download_time, http.header_time) =
            (Duration::from_millis(300), Duration::from_millis(300));
    })
    .await;
    let mut slow = dial(&hub, None).await;
    let request = b"GET /v1/agent/linux-aarch64 HTTP/1.1\r\nhost: localhost\r\n\r\n";
    slow.write_all(request).await.unwrap();
    let (begun, mut received) = (std::time::Instant::now(), 0);
    // It always takes a little: it is never silent.
    let mut bytes = vec![0; 16 * 1024];
    while let Ok(count @ 1..) = slow.read(&mut bytes).await {
        received += count;
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert!(begun.elapsed() >= Duration::from_millis(300), "it had its time");
    assert!(received < 32 << 20, "it got all of it");
    hub.hub.shutdown().await;
}

#[tokio::test]
async fn a_store_that_stalls_costs_a_request_its_time_and_nobody_else_any() {
    let (hub, faults) = hub_with(|http| http.request_time = Duration::from_millis(200)).await;
    let session = bearer(&hub, None).await;
    faults.set(Fault::Stall);
    let late = get(&hub, "/api/v1/tasks", &[&session]).await;
    assert_eq!((late.status, late.code().as_str()), (504, "deadline"));
    get(&hub, "/api/v1/nodes", &[&session]).await.ok();
    get(&hub, "/metrics", &[]).await.ok();
    assert_eq!(get(&hub, "/readyz", &[]).await.status, 200);
    faults.set(Fault::Fail);
    let failed = get(&hub, "/api/v1/tasks", &[&session]).await;
    assert_eq!((failed.status, failed.code().as_str()), (500, "internal"));
    assert_eq!(failed.json()["error_id"].as_str().unwrap().len(), 8);
    faults.set(Fault::None);
    get(&hub, "/api/v1/tasks", &[&session]).await.ok();
    hub.hub.shutdown().await;
}
