//! Much output, slow readers and floods: complete, and nobody else's trouble.
//!
//! `scripts/stress` runs these with larger numbers.

use std::time::{Duration, Instant};

use cortex_tests::mesh::{As, Mesh, Operator};
use cortex_tests::process::Outcome;
use cortex_tests::reader::{Pace, Reader, printed_by, resident_kib, size};
use cortex_tests::wait;

use crate::exec::runs;

const MIB: u64 = 1024 * 1024;

/// A script that prints so many bytes, each piece of them different.
fn print(bytes: u64) -> String {
    format!("seq 1 1000000000 | head -c {bytes}")
}

/// The most memory that processes have had since they were first looked at, beside what they had then.
struct Memory(Vec<(&'static str, u32, u64, u64)>);

impl Memory {
    fn of(processes: &[(&'static str, u32)]) -> Self {
        let first = |&(name, pid): &(&'static str, u32)| {
            let now = resident_kib(pid);
            (name, pid, now, now)
        };
        Self(processes.iter().map(first).collect())
    }

    fn look(&mut self) {
        for (_, pid, _, most) in &mut self.0 {
            *most = resident_kib(*pid).max(*most);
        }
    }

    fn grew_at_most(&self, kib: u64) {
        for (name, _, first, most) in &self.0 {
            eprintln!("{name}: {first} KiB at first, {most} KiB at most");
            assert!(most - first <= kib, "{name} grew from {first} to {most} KiB");
        }
    }
}

#[test]
fn a_throttled_reader_gets_every_byte_and_costs_neither_hub_nor_agent_memory() {
    let mut mesh = Mesh::start();
    let operator = mesh.operator("operator");
    let mut node = mesh.node("a", As::Me);
    let bytes = size("CORTEX_STRESS_THROTTLED_MIB", 100) * MIB;
    let command = operator.command(&["exec", "a", "-s", &print(bytes)]);
    let reader = Reader::start(command, Pace::BytesPerSecond(20_000_000), &mesh.path("client.log"));
    let begun = Instant::now();
    // What a first command of this size sets up, each of them has then.
    reader.has_seen(bytes / 8);
    let mut memory = Memory::of(&[("hub", mesh.hub().id()), ("agent", node.daemon().id())]);
    for part in 9..=64 {
        reader.has_seen(bytes / 64 * part);
        memory.look();
    }
    let ended = reader.end();
    eprintln!("{bytes} bytes in {:?}", begun.elapsed());
    assert_eq!((ended.code, ended.bytes), (Some(0), bytes), "{}", ended.errors);
    assert_eq!(ended.hash, printed_by(&print(bytes)).1);
    // What waits for the disk at the hub is bounded at 32 MiB; all of the output is twice this.
    memory.grew_at_most(48 * 1024);
}

#[test]
fn a_hub_killed_in_the_middle_of_200_mib_once_or_twice_loses_no_byte() {
    let bytes = size("CORTEX_STRESS_RESTART_MIB", 200) * MIB;
    let expected = printed_by(&print(bytes)).1;
    for kills in [[2].as_slice(), &[1, 2]] {
        let mut mesh = Mesh::start();
        let operator = mesh.operator("operator");
        let _node = mesh.node("a", As::Me);
        let script = format!("{}; exit 7", print(bytes));
        let command = operator.command(&["exec", "a", "-s", &script]);
        // So that what is left when the hub is killed takes a second or more.
        let pace = Pace::BytesPerSecond(100_000_000);
        let reader = Reader::start(command, pace, &mesh.path("client.log"));
        for quarter in kills {
            reader.has_seen(bytes / 4 * quarter);
            mesh.kill_hub();
            // It ran on until then, but not to its end.
            assert!(reader.seen() < bytes, "killed too late");
            mesh.start_hub();
        }
        reader.set_pace(Pace::Full);
        let ended = reader.end();
        assert_eq!((ended.code, ended.bytes), (Some(7), bytes), "{}", ended.errors);
        assert_eq!(ended.hash, expected, "{kills:?}");
        let again = ended.errors.matches("connected to the hub again").count();
        assert_eq!(again, kills.len(), "{}", ended.errors);
        let task = &operator.agent(&["task", "list", "-o", "json"]).ok().json()[0];
        assert_eq!((&task["state"], &task["exit_code"]), (&"finished".into(), &7.into()));
    }
}

fn running(operator: &Operator) -> Vec<String> {
    let list = operator.agent(&["task", "list", "--status", "running", "-o", "json"]).ok().json();
    let ids = list.as_array().unwrap().iter().map(|task| task["task_id"].as_str().unwrap());
    ids.map(str::to_owned).collect()
}

#[test]
fn of_fifty_commands_ten_are_never_read_and_the_others_end_as_if_alone() {
    let mut mesh = Mesh::start();
    let operator = mesh.operator("operator");
    let _node = mesh.node("a", As::Me);
    let mark = format!("cortex-mark-{}", rand::random::<u64>());
    let flood = format!("exec -a {mark} yes");
    let start = |name: &str, script: &str, pace| {
        let command = operator.command(&["exec", "a", "-s", script]);
        Reader::start(command, pace, &mesh.path(&format!("{name}.log")))
    };
    let unread: Vec<Reader> =
        (0..10).map(|n| start(&format!("unread{n}"), &flood, Pace::Stalled)).collect();
    let mut ids = Vec::new();
    wait::until("that the ten run", || {
        ids = running(&operator);
        ids.len() == 10 && runs(&mark)
    });
    let script = print(2 * MIB);
    let expected = printed_by(&script);
    let read: Vec<Reader> =
        (0..40).map(|n| start(&format!("read{n}"), &script, Pace::Full)).collect();
    for reader in read {
        let ended = reader.end();
        assert_eq!(ended.code, Some(0), "{}", ended.errors);
        assert_eq!((ended.bytes, ended.hash), expected);
    }
    assert_eq!(running(&operator).len(), 10, "those that nobody reads wait");
    for id in &ids {
        let _cancelled: Outcome = operator.agent(&["task", "cancel", id, "--grace", "10s"]).ok();
    }
    wait::until("the end of the ten", || !runs(&mark));
    for id in &ids {
        // They obeyed the request, and did not have to be killed.
        assert_eq!(operator.agent(&["task", "wait", id]).code, 143);
        let task = operator.agent(&["task", "show", id, "-o", "json"]).ok().json();
        assert_eq!(task["state"], "cancelled", "{task}");
    }
    drop(unread);
}

#[test]
fn a_stalled_viewer_keeps_neither_the_reader_nor_another_viewer_waiting() {
    let keep = 256 * MIB;
    let mut mesh = Mesh::start_with(&["--task-output", &keep.to_string()]);
    let operator = mesh.operator("operator");
    let _node = mesh.node("a", As::Me);
    // Less than waits for the disk at most: one that is busy may leave a gap for viewers, and says so.
    let bytes = size("CORTEX_STRESS_VIEWED_MIB", 12) * MIB;
    // Begins once everybody watches.
    let script = format!("read; {}", print(bytes));
    let expected = printed_by(&print(bytes));
    let mut command = operator.command(&["exec", "a", "-i", "-s", &script]);
    let (stdin, keyboard) = std::io::pipe().unwrap();
    command.stdin(stdin);
    let reader = Reader::start_with_input(command, Pace::Full, &mesh.path("client.log"));
    let mut ids = Vec::new();
    wait::until("that it runs", || {
        ids = running(&operator);
        ids.len() == 1
    });
    let id = ids.remove(0);
    let view = |name: &str, pace, how: &[&str]| {
        let command = operator.command(&[&["task"], how].concat());
        Reader::start(command, pace, &mesh.path(&format!("{name}.log")))
    };
    let watching = view("watching", Pace::Full, &["logs", "-f", &id]);
    let attached = view("attached", Pace::Full, &["attach", &id]);
    let stalled = view("stalled", Pace::Stalled, &["logs", "-f", &id]);
    std::io::Write::write_all(&mut &keyboard, b"go\n").unwrap();
    drop(keyboard);
    for (who, reader) in [("reader", reader), ("logs -f", watching), ("attach", attached)] {
        let ended = reader.end();
        assert_eq!((ended.code, ended.bytes), (Some(0), bytes), "{who}: {}", ended.errors);
        assert_eq!(ended.hash, expected.1, "{who}");
    }
    // The one that stood still finds all of it, too: it was kept.
    assert!(stalled.seen() < bytes / 2);
    stalled.set_pace(Pace::Full);
    let ended = stalled.end();
    assert_eq!((ended.code, ended.bytes, ended.hash), (Some(0), bytes, expected.1));
}

#[test]
fn a_flood_leaves_heartbeats_other_commands_and_the_hubs_memory_alone() {
    let mut mesh = Mesh::start();
    let operator = mesh.operator("operator");
    let mut node = mesh.node("a", As::Me);
    let flood = operator.command(&["exec", "a", "--", "yes"]);
    let flood = Reader::start(flood, Pace::Full, &mesh.path("flood.log"));
    let enough = size("CORTEX_STRESS_FLOOD_MIB", 256) * MIB;
    flood.has_seen(enough / 8);
    let shown = || operator.agent(&["node", "show", "a", "-o", "json"]).ok().json();
    let epoch = shown()["session_epoch"].clone();
    assert!(epoch.is_u64(), "{epoch}");
    let mut memory = Memory::of(&[("hub", mesh.hub().id()), ("agent", node.daemon().id())]);
    let (mut worst, mut count) = (Duration::ZERO, 0);
    while flood.seen() < enough || count < 10 {
        let begun = Instant::now();
        let outcome = operator.agent(&["exec", "a", "--", "echo", "here"]);
        assert_eq!((outcome.code, outcome.text().as_str()), (0, "here\n"), "{}", outcome.stderr);
        worst = worst.max(begun.elapsed());
        count += 1;
        memory.look();
        let shown = shown();
        assert_eq!((&shown["online"], &shown["session_epoch"]), (&true.into(), &epoch), "{shown}");
    }
    eprintln!("{count} commands beside {} bytes of flood, the slowest {worst:?}", flood.seen());
    // Far more than it takes, on a machine that runs all these tests at once.
    assert!(worst < Duration::from_secs(10), "{worst:?}");
    // What waits for the disk at the hub is bounded at 32 MiB.
    memory.grew_at_most(64 * 1024);
}
