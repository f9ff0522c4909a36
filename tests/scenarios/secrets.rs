//! The secret part of a token is nowhere but in the hands of those it was given to.

use std::fs::File;
use std::net::TcpListener;
use std::os::unix::fs::FileExt as _;
use std::path::Path;
use std::process::Command;

use cortex_tests::mesh::{As, Mesh, Node};
use cortex_tests::process::{Daemon, Outcome, run};
use cortex_tests::{is_root, program};

/// Places below a directory where a text is found: in files, and in their names.
fn found_in_files(folder: &Path, wanted: &[u8]) -> Vec<String> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in there(std::fs::read_dir(&folder)).into_iter().flatten().map(Result::unwrap) {
            let Some(kind) = there(entry.file_type()) else { continue };
            let path = entry.path();
            let in_name = contains(path.as_os_str().as_encoded_bytes(), wanted);
            if kind.is_dir() {
                folders.push(path.clone());
            }
            let holds = || there(std::fs::read(&path)).is_some_and(|it| contains(&it, wanted));
            if in_name || (kind.is_file() && holds()) {
                found.push(path.display().to_string());
            }
        }
    }
    found
}

/// `None` of what a living process has renamed or removed since it was listed.
fn there<T>(looked_at: std::io::Result<T>) -> Option<T> {
    match looked_at {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
        looked_at => Some(looked_at.unwrap()),
    }
}

fn contains(text: &[u8], wanted: &[u8]) -> bool {
    memchr::memmem::find(text, wanted).is_some()
}

/// Processes whose command line holds a text.
fn found_in_command_lines(wanted: &[u8]) -> Vec<String> {
    let processes = std::fs::read_dir("/proc").unwrap().map(Result::unwrap);
    let lines = processes.filter_map(|entry| {
        let id = entry.file_name().into_string().ok()?.parse::<u32>().ok()?;
        // A process may end at any moment.
        Some((id, std::fs::read(format!("/proc/{id}/cmdline")).ok()?))
    });
    let found = lines.filter(|(_, line)| contains(line, wanted));
    found.map(|(id, line)| format!("{id}: {}", String::from_utf8_lossy(&line))).collect()
}

/// Where in the memory of a process a text stands: what a core image of it would hold.
fn found_in_memory(process: u32, wanted: &[u8]) -> Vec<String> {
    let memory = File::open(format!("/proc/{process}/mem")).unwrap();
    let maps = std::fs::read_to_string(format!("/proc/{process}/maps")).unwrap();
    let mut found = Vec::new();
    for map in maps.lines() {
        let (range, rest) = map.split_once(' ').unwrap();
        // Shared code and the kernel's own pages are nobody's secrets, and some cannot be read.
        if !rest.starts_with("rw") {
            continue;
        }
        let (start, end) = range.split_once('-').unwrap();
        let address = |hex| u64::from_str_radix(hex, 16).unwrap();
        let (start, end) = (address(start), address(end));
        let mut bytes = vec![0; usize::try_from(end - start).unwrap()];
        if memory.read_exact_at(&mut bytes, start).is_ok() && contains(&bytes, wanted) {
            found.push(map.to_owned());
        }
    }
    found
}

/// The part of a token that nobody may know.
fn secret(token: &str) -> &str {
    &token[13..]
}

struct Run {
    mesh: Mesh,
    hub: u32,
    nodes: Vec<Node>,
    tokens: Vec<String>,
}

/// A hub that logs everything, three nodes that join in the three ways there are, and an operator.
fn full_run() -> Run {
    let mut mesh = Mesh::start_logging("trace");
    let hub = mesh.hub().id();
    let (pin, address) = (mesh.pin(), mesh.address().to_owned());
    let mut tokens: Vec<String> = (0..3).map(|_| mesh.invite(&["--label", "env=test"])).collect();
    let mut nodes = Vec::new();
    for (way, token) in ["environment", "file", "stdin"].into_iter().zip(&tokens) {
        let mut node = mesh.new_node(way, As::Me);
        let arguments = ["join", &address, "--ca", &pin, "--name", way];
        let _joined: Outcome = match way {
            "environment" => run(node.command(&arguments).env("CORTEX_TOKEN", token), b"").ok(),
            "file" => {
                let file = mesh.path("token");
                std::fs::write(&file, token).unwrap();
                let by_file = [&arguments[..], &["--token-file", file.to_str().unwrap()]].concat();
                let joined = run(&mut node.command(&by_file), b"").ok();
                std::fs::remove_file(file).unwrap();
                joined
            }
            _ => {
                let by_stdin = [&arguments[..], &["--token-stdin"]].concat();
                run(&mut node.command(&by_stdin), token.as_bytes()).ok()
            }
        };
        node.run();
        mesh.wait_online(way);
        nodes.push(node);
    }
    let created = mesh.hubd(&["operator", "create", "ann", "--role", "admin", "-o", "json"]).ok();
    tokens.push(created.json()["token"].as_str().unwrap().to_owned());
    let mut login = nodes[0].command(&["login", &address, "--ca", &pin, "--token-stdin"]);
    let _logged_in: Outcome = run(&mut login, tokens[3].as_bytes()).ok();
    // An invite that an operator makes goes over the network.
    let created = nodes[0].agent(&["invite", "create", "-o", "json"]).ok();
    tokens.push(created.json()["token"].as_str().unwrap().to_owned());
    Run { mesh, hub, nodes, tokens }
}

#[test]
#[allow(clippy::print_stderr)] // a skipped test says so
fn a_token_is_in_no_file_no_log_no_command_line_and_no_memory_afterwards() {
    let Run { mesh, hub, mut nodes, tokens } = full_run();
    let processes: Vec<u32> =
        std::iter::once(hub).chain(nodes.iter_mut().map(|node| node.daemon().id())).collect();
    let scratch = mesh.path("");

    // What is to be found is found by the same searches.
    let id = &tokens[0][4..12];
    assert!(!found_in_files(&scratch.join("hub"), id.as_bytes()).is_empty());
    assert!(contains(&std::fs::read(mesh.path("hub.log")).unwrap(), id.as_bytes()));
    let data = mesh.path("hub");
    let data = data.to_str().unwrap();
    assert!(!found_in_command_lines(data.as_bytes()).is_empty());
    if is_root() {
        assert!(!found_in_memory(hub, data.as_bytes()).is_empty());
    }

    for token in &tokens {
        let secret = secret(token).as_bytes();
        // Logs, databases with their logs of changes, states of agents and configurations.
        assert_eq!(found_in_files(&scratch, secret), [""; 0]);
        assert_eq!(found_in_command_lines(secret), [""; 0]);
        for process in &processes {
            // What only root may read is safe from others.
            let environment = std::fs::read(format!("/proc/{process}/environ")).unwrap_or_default();
            assert!(!contains(&environment, secret), "environment of {process}");
            assert!(!is_root() || !environment.is_empty());
        }
    }
    if !is_root() {
        eprintln!("skipped: only root reads the memory of other processes");
        return;
    }
    for token in &tokens {
        for process in &processes {
            let found = found_in_memory(*process, secret(token).as_bytes());
            assert_eq!(found, [""; 0], "memory of {process}, the hub being {hub}");
        }
    }
}

#[test]
fn a_token_is_not_on_the_command_line_while_a_join_is_under_way() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let mesh = Mesh::start();
    let (token, pin) = (mesh.invite(&[]), mesh.pin());
    let file = mesh.path("token");
    std::fs::write(&file, &token).unwrap();
    let mut command = Command::new(program("agent-under-test"));
    command.args(["join", &address, "--ca", &pin, "--token-file"]).arg(&file);
    command.env("CORTEX_STATE", mesh.path("state"));
    let joining = Daemon::start("join", &mut command, &mesh.path("join.log"));
    // It has read the token, and waits for a hub that says nothing.
    let _connection = listener.accept().unwrap();
    assert_eq!(found_in_command_lines(address.as_bytes()).len(), 1, "the search finds it");
    assert_eq!(found_in_command_lines(secret(&token).as_bytes()), [""; 0]);
    drop(joining);
}
