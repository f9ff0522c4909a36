//! The table of routes, its document, and what answers without a hub.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::body::{Body, to_bytes};
use http::{Request, Response, StatusCode};
use serde_json::Value;
use tower::ServiceExt as _;

use super::door::{self, Door};
use super::openapi::document;
use super::provision::Agents;
use super::routes::{ROUTES, Who};
use crate::authority::sessions::Sessions;
use crate::config::HttpConfig;
use crate::grpc::auth::{Level, Peer, TABLE};

fn door() -> Arc<Door> {
    let sessions = Arc::new(Sessions::new(Duration::from_secs(60)));
    let folder = std::env::temp_dir().join("no such folder");
    Arc::new(Door::new(&HttpConfig::default(), sessions, Agents::new(Some(folder), 1), None))
}

async fn ask(router: &Router, method: &str, path: &str) -> Response<Body> {
    let address = "192.0.2.1:1".parse().unwrap();
    let request = Request::builder().method(method).uri(path).extension(Peer::Anonymous(address));
    router.clone().oneshot(request.body(Body::empty()).unwrap()).await.unwrap()
}

async fn text(response: Response<Body>) -> String {
    let bytes = to_bytes(response.into_body(), 1 << 20).await.unwrap();
    String::from_utf8(bytes.to_vec()).unwrap()
}

async fn code(response: Response<Body>) -> String {
    let problem: Value = serde_json::from_str(&text(response).await).unwrap();
    problem["code"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn the_document_and_the_router_know_the_same_routes() {
    let document = document();
    let paths = document["paths"].as_object().unwrap();
    let documented: BTreeSet<(String, String)> = paths
        .iter()
        .flat_map(|(path, verbs)| {
            let verbs = verbs.as_object().unwrap().keys();
            verbs.map(|verb| (verb.clone(), path.clone()))
        })
        .collect();
    let table: BTreeSet<(String, String)> =
        ROUTES.iter().map(|route| (route.verb.word().to_owned(), route.path.to_owned())).collect();
    assert_eq!(documented, table);
    assert_eq!(table.len(), ROUTES.len(), "a route stands twice");
    let router = door::router(&door());
    for (verb, path) in &documented {
        let path = path.replace(['{', '}'], "");
        let response = ask(&router, &verb.to_uppercase(), &path).await;
        // The hub behind it is not ready; the route is there.
        assert_eq!(code(response).await, "starting", "{verb} {path}");
    }
}

#[test]
fn every_reference_of_the_document_leads_somewhere() {
    fn references<'a>(value: &'a Value, found: &mut Vec<&'a str>) {
        match value {
            Value::Object(fields) => {
                found.extend(fields.get("$ref").and_then(Value::as_str));
                fields.values().for_each(|value| references(value, found));
            }
            Value::Array(items) => items.iter().for_each(|value| references(value, found)),
            _ => {}
        }
    }
    let document = document();
    let mut found = Vec::new();
    references(&document, &mut found);
    assert!(found.len() > ROUTES.len());
    for reference in found {
        let pointer = reference.strip_prefix('#').unwrap();
        assert!(document.pointer(pointer).is_some(), "{reference}");
    }
    let nodes = &document["paths"]["/api/v1/nodes"]["get"];
    let names: Vec<_> =
        nodes["parameters"].as_array().unwrap().iter().map(|p| &p["name"]).collect();
    assert_eq!(names, ["cursor", "limit", "online", "selector"]);
    let events = &document["paths"]["/api/v1/events"]["get"];
    let names: Vec<_> =
        events["parameters"].as_array().unwrap().iter().map(|p| &p["name"]).collect();
    assert_eq!(names, ["after", "kinds", "Last-Event-ID"]);
    let kinds: Vec<_> = events["responses"]["200"]["content"].as_object().unwrap().keys().collect();
    assert_eq!(kinds, ["text/event-stream"]);
    let shown = document["components"]["schemas"]["Node"]["properties"].as_object().unwrap();
    assert!(shown.contains_key("policy_until_ms") && shown.contains_key("effective_mode"));
}

/// Which call each route is, written down a second time: a wrong one in the table would let in whoever may
/// make that one.
const EXPECTED: [(&str, &str); 20] = [
    ("post /api/v1/session", "-"),
    ("get /api/v1/session", "HubStatus"),
    ("delete /api/v1/session", "HubStatus"),
    ("get /api/v1/hub", "HubStatus"),
    ("get /api/v1/events", "WatchEvents"),
    ("get /api/v1/nodes", "ListNodes"),
    ("get /api/v1/nodes/{node}", "ListNodes"),
    ("put /api/v1/nodes/{node}/policy", "SetNodePolicy"),
    ("delete /api/v1/nodes/{node}/policy", "SetNodePolicy"),
    ("get /api/v1/nodes/{node}/history", "ReadHistory"),
    ("get /api/v1/tasks", "ListTasks"),
    ("post /api/v1/tasks", "Exec"),
    ("get /api/v1/tasks/{task}", "GetTask"),
    ("get /api/v1/tasks/{task}/output", "ReadTask"),
    ("get /api/v1/tasks/{task}/output/stream", "ReadTask"),
    ("post /api/v1/tasks/{task}/cancel", "CancelTask"),
    ("get /api/v1/workspaces", "ListWorkspaces"),
    ("get /api/v1/workspaces/{workspace}", "ShowWorkspace"),
    ("get /api/v1/workspaces/{workspace}/conflicts", "ListConflicts"),
    ("get /api/v1/workspaces/{workspace}/log", "WorkspaceLog"),
];

#[test]
fn each_route_is_the_call_that_is_written_down_for_it() {
    let call = |who: Who| match who {
        Who::Anyone => "-",
        Who::Caller(method) => method.strip_prefix("/cortex.v1.Operator/").unwrap(),
    };
    let table: Vec<(String, &str)> = ROUTES
        .iter()
        .map(|route| (format!("{} {}", route.verb.word(), route.path), call(route.who)))
        .collect();
    let table: Vec<(&str, &str)> =
        table.iter().map(|(route, call)| (route.as_str(), *call)).collect();
    assert_eq!(table, EXPECTED);
}

#[test]
fn each_route_is_a_call_that_operators_may_make() {
    for route in ROUTES {
        match route.who {
            Who::Anyone => assert_eq!(route.path, "/api/v1/session"),
            Who::Caller(method) => {
                let level = TABLE.iter().find(|(known, _)| *known == method).map(|(_, l)| *l);
                assert!(!matches!(level, None | Some(Level::Anyone | Level::Node)), "{method}");
            }
        }
    }
}

#[tokio::test]
async fn before_the_hub_is_ready_it_says_so_and_the_script_is_there() {
    let router = door::router(&door());
    assert_eq!(ask(&router, "GET", "/healthz").await.status(), 200);
    assert_eq!(ask(&router, "GET", "/readyz").await.status(), 503);
    assert_eq!(ask(&router, "GET", "/metrics").await.status(), 503);
    let script = ask(&router, "GET", "/install.sh?x=$(id)").await;
    assert_eq!(script.headers()["x-content-type-options"], "nosniff");
    assert_eq!(
        script.headers()["content-security-policy"],
        "default-src 'none'; frame-ancestors 'none'"
    );
    assert_eq!(text(script).await, include_str!("../../../install.sh"));
}

#[tokio::test]
async fn the_page_is_there_before_the_hub_is_ready_and_may_load_nothing_from_elsewhere() {
    let router = door::router(&door());
    for (path, kind) in [
        ("/", "text/html; charset=utf-8"),
        ("/login", "text/html; charset=utf-8"),
        ("/page/main.js", "text/javascript; charset=utf-8"),
        ("/page/style.css", "text/css; charset=utf-8"),
        ("/page/icon.svg", "image/svg+xml"),
    ] {
        let response = ask(&router, "GET", path).await;
        assert_eq!(response.status(), 200, "{path}");
        let headers = response.headers();
        assert_eq!(headers["content-type"], kind, "{path}");
        assert_eq!(headers["cache-control"], "no-cache");
        assert_eq!(headers["x-frame-options"], "DENY");
        assert_eq!(headers["x-content-type-options"], "nosniff");
        assert_eq!(headers["referrer-policy"], "no-referrer");
        let policy = headers["content-security-policy"].to_str().unwrap().to_owned();
        for part in [
            "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src 'self';",
            "frame-ancestors 'none'; base-uri 'none'; form-action 'self';",
            "require-trusted-types-for 'script'",
        ] {
            assert!(policy.contains(part), "{policy}");
        }
        assert!(!policy.contains("unsafe") && !policy.contains("data:"), "{policy}");
        // The same for everybody, whatever is asked.
        let tag = headers["etag"].clone();
        assert_eq!(ask(&router, "GET", &format!("{path}?x=1")).await.headers()["etag"], tag);
    }
}

#[tokio::test]
async fn what_is_not_there_is_a_problem_and_never_a_page() {
    let router = door::router(&door());
    for (method, path, status, word) in [
        ("GET", "/page/", 404, "no_such_path"),
        ("GET", "/page/../main.js", 404, "no_such_path"),
        ("POST", "/", 405, "method_not_allowed"),
        ("GET", "/api/v2/nodes", 404, "no_such_path"),
        ("POST", "/install.sh", 405, "method_not_allowed"),
        ("PATCH", "/api/v1/nodes", 405, "method_not_allowed"),
        ("GET", "/v1/agent/windows", 404, "unknown_platform"),
        ("GET", "/v1/agent/linux-x86_64", 404, "no_agent"),
        ("GET", "/v1/agent/linux-x86_64.sha256", 404, "no_agent"),
        ("GET", "/v1/agent/..%2f..%2fetc%2fpasswd", 404, "unknown_platform"),
    ] {
        let response = ask(&router, method, path).await;
        assert_eq!(response.status(), StatusCode::from_u16(status).unwrap(), "{method} {path}");
        assert_eq!(response.headers()["content-type"], "application/problem+json", "{path}");
        assert_eq!(code(response).await, word, "{method} {path}");
    }
}
