//! Partitions by the kernel: packets that are dropped both ways, of which nobody hears.

use std::time::{Duration, Instant};

use cortex_tests::mesh::{Mesh, Operator};
use cortex_tests::partition::Island;
use cortex_tests::reader::{Pace, Reader};
use cortex_tests::wait;

/// A line with a node at its other end, and who commands it; nothing, aloud, where that cannot be had.
fn world(grace: &str) -> Option<(Island, Mesh, Operator)> {
    match Island::make() {
        Ok(island) => {
            let mut mesh = Mesh::start_at(&island.hub_address(), &["--resume-grace", grace]);
            let operator = mesh.operator("operator");
            Some((island, mesh, operator))
        }
        Err(why) => {
            eprintln!("skipped: no partition can be made here: {why}");
            None
        }
    }
}

/// From the cut until a waiter was told at the latest. A dead line gives no sign but that nothing comes.
const TOLD_WITHIN: Duration = Duration::from_secs(60);

#[test]
fn a_partition_is_told_in_time_and_after_it_the_output_goes_on() {
    let Some((island, mesh, operator)) = world("60s") else { return };
    let _node = mesh.node_within("far", island.namespace());
    let script = "for n in $(seq 1 1000); do echo $n; sleep 0.01; done; seq 1 500000; exit 5";
    let command = operator.command(&["exec", "far", "-s", script]);
    let reader = Reader::start(command, Pace::Full, &mesh.path("client.log"));
    reader.has_seen(100);
    let begun = Instant::now();
    island.cut();
    wait::until("that the waiter hears of it", || reader.said().contains("waiting up to"));
    eprintln!("a partition was told after {:?}", begun.elapsed());
    assert!(begun.elapsed() < TOLD_WITHIN);
    let online = operator.agent(&["node", "wait", "far", "--for", "offline", "--timeout", "5s"]);
    assert_eq!(online.code, 0, "{}", online.stderr);
    island.heal();
    let ended = reader.end();
    let (bytes, hash) = cortex_tests::reader::printed_by("seq 1 1000; seq 1 500000");
    assert_eq!((ended.code, ended.bytes), (Some(5), bytes), "{}", ended.errors);
    assert_eq!(ended.hash, hash);
    assert!(ended.errors.contains("the node is back"), "{}", ended.errors);
}

#[test]
fn after_a_partition_longer_than_the_grace_the_nodes_word_is_added() {
    let Some((island, mesh, operator)) = world("1s") else { return };
    let _node = mesh.node_within("far", island.namespace());
    let command = operator.command(&["exec", "far", "-s", "echo started; sleep 6; exit 9"]);
    let reader = Reader::start(command, Pace::Full, &mesh.path("client.log"));
    reader.has_seen(8);
    let begun = Instant::now();
    island.cut();
    let ended = reader.end();
    assert_eq!(ended.code, Some(125), "{}", ended.errors);
    assert!(begun.elapsed() < TOLD_WITHIN + Duration::from_secs(1));
    let shown = || operator.agent(&["task", "list", "-o", "json"]).ok().json()[0].clone();
    let task = shown();
    assert_eq!((&task["state"], &task["verdict"]), (&"failed".into(), &"stream_lost".into()));
    island.heal();
    wait::until("the late outcome", || !shown()["late_outcome"].is_null());
    let task = shown();
    assert_eq!(task["verdict"], "stream_lost", "never rewritten");
    assert_eq!(task["late_outcome"]["exit_code"], 9);
}
