//! The hub's HTTP side as others use it: installing a node with the line that an invite prints, curl,
//! and Prometheus' own checks.

use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use cortex_tests::mesh::{Mesh, Operator};
use cortex_tests::process::{Daemon, Outcome, run};
use cortex_tests::{is_root, program};
use serde_json::Value;

/// Whether a program is on this machine.
fn has(program: &str) -> bool {
    let mut command = Command::new("sh");
    command.args(["-c", "command -v \"$0\"", program]);
    run(&mut command, b"").code == 0
}

/// A hub that gives out the agent that is tested.
fn hub_with_agent(folder: &Path, arguments: &[&str]) -> Mesh {
    let agent = folder.join("cortex-agent");
    std::fs::copy(program("agent-under-test"), &agent).unwrap();
    std::fs::set_permissions(&agent, std::fs::Permissions::from_mode(0o755)).unwrap();
    let folder = folder.display().to_string();
    Mesh::start_with(&[&["--http-agents", &folder], arguments].concat())
}

/// What curl says of the hub, by its key.
fn curl(mesh: &Mesh, path: &str, arguments: &[&str]) -> Outcome {
    let pin = status(mesh)["http_pin"].as_str().unwrap().to_owned();
    let mut command = Command::new("curl");
    command.args(["-sS", "-k", "--pinnedpubkey", &pin]).args(arguments);
    command.arg(format!("https://{}{path}", mesh.http()));
    run(&mut command, b"")
}

fn status(mesh: &Mesh) -> Value {
    mesh.hubd(&["status", "-o", "json"]).ok().json()
}

/// A user without rights, with a home of its own, where the tests are root's.
struct Somebody {
    home: PathBuf,
    user: Option<u32>,
}

impl Somebody {
    fn new(mesh: &Mesh, name: &str) -> Self {
        let home = mesh.path(name);
        std::fs::create_dir(&home).unwrap();
        let user = is_root().then_some(54_322);
        if let Some(user) = user {
            std::os::unix::fs::chown(&home, Some(user), Some(user)).unwrap();
        }
        Self { home, user }
    }

    /// A command in its home, with nothing of the tests' environment.
    fn command(&self, arguments: &[&str]) -> Command {
        use std::os::unix::process::CommandExt as _;
        let mut command = Command::new(arguments[0]);
        command.args(&arguments[1..]).env_clear().current_dir(&self.home);
        command.env("PATH", "/usr/local/bin:/usr/bin:/bin").env("HOME", &self.home);
        if let Some(user) = self.user {
            command.uid(user).gid(user);
        }
        command
    }

    /// Pastes a line into a shell.
    fn paste(&self, line: &str) -> Outcome {
        run(&mut self.command(&["sh"]), line.as_bytes())
    }
}

#[test]
fn the_line_of_an_invite_makes_a_node_of_whoever_pastes_it() {
    let folder = tempfile::tempdir().unwrap();
    std::fs::set_permissions(folder.path(), std::fs::Permissions::from_mode(0o755)).unwrap();
    let mesh = hub_with_agent(folder.path(), &[]);
    let invite = mesh.hubd(&["invite", "create", "--label", "env=test", "-o", "json"]).ok().json();
    let text = |field: &str| invite[field].as_str().unwrap().to_owned();
    let (line, token) = (text("command"), text("token"));
    assert!(line.starts_with("curl -fsS -k --pinnedpubkey sha256//"), "{line}");
    assert!(text("join_command").contains(" cortex-agent join "), "{}", text("join_command"));
    // The shell puts the token into the environment of the script: it is no program's argument.
    assert_eq!(line.matches(&token).count(), 1);
    assert!(line.contains(&format!("| CORTEX_TOKEN={token} sh -s -- agent ")), "{line}");

    let somebody = Somebody::new(&mesh, "somebody");
    let pasted = somebody.paste(&line).ok();
    let state = somebody.home.join(".local/share/cortex-agent");
    assert!(state.join("agent.json").exists(), "{}\n{}", pasted.text(), pasted.stderr);
    let agent = somebody.home.join(".local/bin/cortex-agent");
    assert_eq!(std::fs::read(&agent).unwrap(), std::fs::read(program("agent-under-test")).unwrap());
    let left: Vec<_> = std::fs::read_dir(somebody.home.join(".local/bin")).unwrap().collect();
    assert_eq!(left.len(), 1, "{left:?}");
    assert!(!format!("{}{}", pasted.text(), pasted.stderr).contains(&token));

    // No systemd serves this user: what it would have started is started here.
    assert!(pasted.text().contains("cortex-agent run"), "{}", pasted.text());
    let mut daemon = somebody.command(&[agent.to_str().unwrap(), "run"]);
    daemon.env("CORTEX_STATE", &state);
    let _node = Daemon::start("node", &mut daemon, &mesh.path("somebody.log"));
    let nodes = mesh.hubd(&["node", "list", "-o", "json"]).ok().json();
    let name = nodes[0]["name"].as_str().unwrap().to_owned();
    mesh.wait_online(&name);
    assert_eq!(mesh.shown(&name)["labels"]["env"], "test");

    // The same line again finds the node there, and uses nothing up.
    let again = somebody.paste(&line).ok();
    assert!(again.text().contains("already joined as"), "{}\n{}", again.text(), again.stderr);
    assert!(again.text().contains("up to date"), "{}", again.text());

    // That of another mesh is refused for as long as it is a node of this one, and says what to do.
    let other = hub_with_agent(folder.path(), &[]);
    let invite = other.hubd(&["invite", "create", "-o", "json"]).ok().json();
    let line = invite["command"].as_str().unwrap();
    let refused = somebody.paste(line);
    assert!(refused.stderr.contains("of another mesh"), "{}\n{}", refused.text(), refused.stderr);
    assert!(refused.stderr.contains("cortex-agent leave"), "{}", refused.stderr);
    let mut leave = somebody.command(&[agent.to_str().unwrap(), "leave"]);
    let _left: Outcome = run(leave.env("CORTEX_STATE", &state), b"").ok();
    assert!(state.join("agent.json").exists(), "it leaves its settings behind");
    let joined = somebody.paste(line).ok();
    assert!(joined.text().contains("\njoined as"), "{}\n{}", joined.text(), joined.stderr);
}

#[test]
fn another_hubs_key_another_agent_or_no_agent_installs_nothing() {
    let folder = tempfile::tempdir().unwrap();
    let mesh = hub_with_agent(folder.path(), &[]);
    let invite = mesh.hubd(&["invite", "create", "-o", "json"]).ok().json();
    let line = invite["command"].as_str().unwrap().to_owned();
    let pin = status(&mesh)["http_pin"].as_str().unwrap().to_owned();
    let other = format!("sha256//{}=", "A".repeat(43));
    let somebody = Somebody::new(&mesh, "somebody");
    let installed = |somebody: &Somebody| somebody.home.join(".local/bin/cortex-agent").exists();

    // The first key is that of the script, the second that of the agent.
    let refused = somebody.paste(&line.replace(&pin, &other));
    assert!(refused.stderr.contains("does not match pinned public key"), "{}", refused.stderr);
    let at = line.rfind(&pin).unwrap();
    let refused = somebody.paste(&format!("{}{other}{}", &line[..at], &line[at + pin.len()..]));
    assert!(refused.stderr.contains("cannot be downloaded"), "{}", refused.stderr);
    assert_ne!(refused.code, 0);

    std::fs::remove_file(folder.path().join("cortex-agent")).unwrap();
    let refused = somebody.paste(&line);
    assert!(refused.stderr.contains("404"), "{}", refused.stderr);
    assert_ne!(refused.code, 0);
    assert!(!installed(&somebody));
    assert!(mesh.hubd(&["node", "list", "-o", "json"]).ok().json().as_array().unwrap().is_empty());

    // What shows that each of these would have worked.
    std::fs::copy(program("agent-under-test"), folder.path().join("cortex-agent")).unwrap();
    let _joined = somebody.paste(&line);
    assert!(installed(&somebody));
}

#[test]
fn a_dry_run_of_the_line_says_every_step_and_does_none() {
    let folder = tempfile::tempdir().unwrap();
    let mesh = hub_with_agent(folder.path(), &[]);
    let invite = mesh.hubd(&["invite", "create", "-o", "json"]).ok().json();
    let line = format!("{} --dry-run", invite["command"].as_str().unwrap());
    let somebody = Somebody::new(&mesh, "somebody");
    let shown = somebody.paste(&line);
    assert_eq!(shown.code, 0, "{}", shown.stderr);
    for step in ["+ curl ", "/v1/agent/linux-", " join ", "service install"] {
        assert!(shown.text().contains(step), "{step}: {}", shown.text());
    }
    assert!(!shown.text().contains(invite["token"].as_str().unwrap()));
    assert_eq!(std::fs::read_dir(&somebody.home).unwrap().count(), 0);
}

#[test]
fn the_agent_is_what_its_hash_says_and_goes_on_where_it_broke_off() {
    let folder = tempfile::tempdir().unwrap();
    let mesh = hub_with_agent(folder.path(), &[]);
    let path = format!("/v1/agent/linux-{}", std::env::consts::ARCH);
    let target = mesh.path("download");
    let save = ["-o", target.to_str().unwrap()];
    let _part = curl(&mesh, &path, &[&save[..], &["-r", "0-99999"]].concat()).ok();
    assert_eq!(std::fs::metadata(&target).unwrap().len(), 100_000);
    let _rest = curl(&mesh, &path, &[&save[..], &["-C", "-"]].concat()).ok();
    assert_eq!(
        std::fs::read(&target).unwrap(),
        std::fs::read(program("agent-under-test")).unwrap()
    );
    let mut sum = Command::new("sha256sum");
    let sum = run(sum.arg(&target), b"").ok().text();
    let said = curl(&mesh, &format!("{path}.sha256"), &[]).ok().text();
    assert_eq!(said.split(' ').next(), sum.split(' ').next());
    // The script is the program's, whatever is asked.
    let script = curl(&mesh, "/install.sh?$(id)", &[]).ok();
    assert_eq!(script.text(), include_str!("../../install.sh"));
}

fn log_in(mesh: &Mesh, operator: &Operator) -> String {
    let link = operator.agent(&["login-link", "-o", "json"]).ok().json();
    let body = serde_json::json!({ "code": link["code"], "bearer": true }).to_string();
    let json = ["-H", "content-type: application/json", "-d", &body];
    let session = curl(mesh, "/api/v1/session", &json).ok().json();
    format!("authorization: Bearer {}", session["token"].as_str().unwrap())
}

#[test]
fn what_the_command_line_shows_the_api_shows() {
    let mut mesh = Mesh::start();
    let admin = mesh.operator("admin");
    let viewer = mesh.operator("viewer");
    let _node = mesh.node("south", cortex_tests::mesh::As::Me);
    let _made: Outcome = admin.agent(&["workspace", "create", "demo"]).ok();
    let attach = ["workspace", "attach", "demo", "--node", "south"];
    let _attached: Outcome = admin.agent(&attach).ok();
    let _ran: Outcome = admin.agent(&["exec", "south", "-s", "echo over there; exit 3"]);
    let session = log_in(&mesh, &admin);
    let get = |path: &str| curl(&mesh, path, &["-f", "-H", &session]).ok().json();
    assert_eq!(get("/api/v1/nodes")["nodes"][0]["name"], "south");
    assert_eq!(get("/api/v1/nodes/south")["online"], true);
    let tasks = get("/api/v1/tasks?node=south&state=finished");
    let task = &tasks["tasks"][0];
    assert_eq!((&task["state"], &task["end"]["exit_code"]), (&"finished".into(), &3.into()));
    let id = task["task_id"].as_str().unwrap();
    let output = get(&format!("/api/v1/tasks/{id}/output"));
    assert_eq!(output["pieces"][0]["data"], "b3ZlciB0aGVyZQo=");
    assert_eq!(output["task"]["task_id"], id);
    let history = get("/api/v1/nodes/south/history?lines=10");
    assert_eq!(history["pieces"][0]["data"], "b3ZlciB0aGVyZQo=");
    let next = history["next_cursor"].as_u64().unwrap();
    let later = get(&format!("/api/v1/nodes/south/history?cursor={next}"));
    assert_eq!(later["pieces"].as_array().unwrap().len(), 0);
    assert_eq!(get("/api/v1/workspaces")["workspaces"][0]["members"][0]["node_name"], "south");
    assert_eq!(get("/api/v1/workspaces/demo")["workspace"]["name"], "demo");
    assert_eq!(get("/api/v1/hub")["nodes_online"], 1);

    let session = log_in(&mesh, &viewer);
    let put = ["-X", "PUT", "-H", &session, "-H", "content-type: application/json"];
    let body = ["-d", r#"{"mode":"permissive","reason":"x"}"#, "-w", "%{stderr}%{http_code}"];
    let refused = curl(&mesh, "/api/v1/nodes/south/policy", &[&put[..], &body].concat());
    assert_eq!((refused.stderr.as_str(), &refused.json()["code"]), ("403", &"role_too_low".into()));
}

#[test]
fn prometheus_finds_nothing_wrong_with_the_metrics() {
    if !has("promtool") {
        eprintln!("skipped: there is no promtool (scripts/setup promtool)");
        return;
    }
    let mut mesh = Mesh::start();
    let operator = mesh.operator("operator");
    let _node = mesh.node("south", cortex_tests::mesh::As::Me);
    let _ran: Outcome = operator.agent(&["exec", "south", "-s", "seq 1000"]).ok();
    let metrics = curl(&mesh, "/metrics", &["-f"]).ok();
    for wanted in [
        "cortex_nodes{state=\"online\"} 1",
        "cortex_tasks_ended_total{state=\"finished\"} 1",
        "cortex_relay_bytes_total{direction=\"output\"} 3893",
        "cortex_node_sessions_total 1",
    ] {
        assert!(metrics.text().lines().any(|line| line == wanted), "{wanted}\n{}", metrics.text());
    }
    let mut promtool = Command::new("promtool");
    promtool.args(["check", "metrics"]).stdout(Stdio::piped());
    let checked = run(&mut promtool, &metrics.stdout);
    assert_eq!((checked.code, checked.text().as_str()), (0, ""), "{}", checked.stderr);
}

#[test]
fn a_hub_that_comes_back_has_the_same_key_and_no_logins() {
    let mut mesh = Mesh::start();
    let ready = curl(&mesh, "/readyz", &["-f"]).ok();
    assert_eq!(ready.text(), "ready\n");
    let mut operator = mesh.operator("operator");
    let _node = mesh.node("south", cortex_tests::mesh::As::Me);
    let session = log_in(&mesh, &operator);
    let key = status(&mesh)["http_pin"].clone();
    assert!(mesh.hub().terminate().success());
    // A new hub on the same data has the same key, and no logins.
    mesh.start_hub();
    assert_eq!(status(&mesh)["http_pin"], key);
    let refused = curl(&mesh, "/api/v1/nodes", &["-H", &session]).ok().json();
    assert_eq!(refused["code"], "not_logged_in");
    mesh.wait_online("south");
    operator = mesh.operator("operator");
    let _session = log_in(&mesh, &operator);
}

#[test]
fn a_program_runs_commands_over_http_reads_what_they_write_and_ends_them() {
    let mut mesh = Mesh::start();
    let operator = mesh.operator("operator");
    let viewer = mesh.operator("viewer");
    let _node = mesh.node("south", cortex_tests::mesh::As::Me);
    let session = log_in(&mesh, &operator);
    let post = |session: &str, path: &str, body: &Value| {
        let body = body.to_string();
        let json = ["-H", session, "-H", "content-type: application/json", "-d", &body];
        curl(&mesh, path, &json).ok().json()
    };
    let run = |body: Value| post(&session, "/api/v1/tasks", &body);
    // The news of a task's stream, which ends with the task.
    let follow = |task: &Value, more: &[&str]| -> Vec<(String, Value)> {
        let path = format!("/api/v1/tasks/{}/output/stream", task["task_id"].as_str().unwrap());
        let stream = curl(&mesh, &path, &[&["-f", "-N", "-H", &session][..], more].concat()).ok();
        let text = stream.text();
        let pieces = text.split_terminator("\n\n").filter_map(|piece| {
            let (id, data) = piece.strip_prefix("id: ")?.split_once("\ndata: ")?;
            Some((id.to_owned(), serde_json::from_str(data).unwrap()))
        });
        pieces.collect()
    };
    let written = |news: &[(String, Value)], stream: &str| -> Vec<u8> {
        use base64::Engine as _;
        let engine = base64::engine::general_purpose::STANDARD;
        let pieces = news.iter().map(|(_, news)| &news["output"]);
        let pieces = pieces.filter(|piece| piece["stream"] == stream);
        pieces.flat_map(|piece| engine.decode(piece["data"].as_str().unwrap()).unwrap()).collect()
    };

    let script = "for i in $(seq 20); do echo $i; sleep 0.02; done; echo bad >&2; exit 3";
    let body = serde_json::json!({
        "node": "south", "script": script, "env": { "A": "x" }, "idempotency_key": "k1",
    });
    let task = run(body.clone());
    let news = follow(&task, &[]);
    let expected: String = (1..=20).map(|i| format!("{i}\n")).collect();
    assert_eq!(written(&news, "stdout"), expected.as_bytes());
    assert_eq!(written(&news, "stderr"), b"bad\n");
    let (id, last) = news.last().unwrap();
    assert_eq!(
        (&last["task"]["state"], &last["task"]["end"]["exit_code"]),
        (&"finished".into(), &3.into())
    );
    assert_eq!(*id, format!("{}-4", expected.len()));
    // Whoever comes back hears what it lacks.
    let rest = follow(&task, &["-H", &format!("last-event-id: {}-0", expected.len() - 3)]);
    assert_eq!(
        (written(&rest, "stdout"), written(&rest, "stderr")),
        (b"20\n".to_vec(), b"bad\n".to_vec())
    );
    // It ran once, and runs once more when that is asked for.
    assert_eq!(run(body)["task_id"], task["task_id"]);
    let missing = run(serde_json::json!({ "retry_of": task["task_id"] }));
    assert_eq!(missing["code"], "variables_needed");
    let again = run(serde_json::json!({ "retry_of": task["task_id"], "env": { "A": "y" } }));
    assert_ne!(again["task_id"], task["task_id"]);
    assert_eq!(written(&follow(&again, &[]), "stdout"), expected.as_bytes());
    let listed = operator.agent(&["task", "list", "-o", "json"]).ok().json();
    assert_eq!(listed.as_array().unwrap().len(), 2, "{listed}");

    // One that goes on, until somebody ends it.
    let task = run(serde_json::json!({ "node": "south", "argv": ["sleep", "1000"] }));
    let path = format!("/api/v1/tasks/{}/cancel", task["task_id"].as_str().unwrap());
    let session_of_viewer = log_in(&mesh, &viewer);
    let nothing = serde_json::json!({});
    assert_eq!(post(&session_of_viewer, &path, &nothing)["code"], "role_too_low");
    let refused = serde_json::json!({ "node": "south", "script": "true" });
    assert_eq!(post(&session_of_viewer, "/api/v1/tasks", &refused)["code"], "role_too_low");
    assert_eq!(post(&session, &path, &nothing)["task_id"], task["task_id"]);
    let (_, last) = follow(&task, &[]).pop().unwrap();
    assert_eq!(last["task"]["state"], "cancelled", "{last}");
    let lines = mesh.audit("task.accepted");
    assert!(lines.len() == 3 && lines.iter().all(|line| line["role"] == "operator"), "{lines:?}");
}
