//! What networks do to a line while output is under way: nothing of it is lost, and nobody else waits.

use std::time::{Duration, Instant};

use cortex_tests::mesh::{As, Mesh, Operator};
use cortex_tests::proxy::{Fault, Proxy, Towards};
use cortex_tests::reader::{Ended, Pace, Reader, printed_by};

/// About 8 MB.
const PRINT: &str = "seq 1 1000000; seq 1 200000 | sed p";
/// Far more than is ever under way: where a reader has seen some of it, all lines still have to carry some.
const PRINT_LONG: &str = "seq 1 12000000";

struct World {
    mesh: Mesh,
    operator: Operator,
    proxy: Proxy,
    _far: cortex_tests::mesh::Node,
    _near: cortex_tests::mesh::Node,
}

impl World {
    /// A node behind a proxy and one beside the hub.
    fn start(serve: &[&str]) -> Self {
        let mut mesh = Mesh::start_with(serve);
        let operator = mesh.operator("operator");
        let proxy = Proxy::start(mesh.address().parse().unwrap());
        let far = mesh.node_through("far", &proxy.address().to_string());
        let near = mesh.node("near", As::Me);
        Self { mesh, operator, proxy, _far: far, _near: near }
    }

    fn print(&self, script: &str) -> Reader {
        let command = self.operator.command(&["exec", "far", "-s", &format!("{script}; exit 3")]);
        Reader::start(command, Pace::Full, &self.mesh.path("client.log"))
    }

    /// The other node is as quick as ever.
    fn others_work(&self) {
        let outcome = self.operator.agent(&["exec", "near", "-s", "seq 1 100000"]);
        assert_eq!(outcome.code, 0, "{}", outcome.stderr);
        assert_eq!(outcome.stdout.len(), 588_895);
    }
}

fn is_whole(ended: &Ended) {
    is_what_prints(ended, PRINT);
}

fn is_what_prints(ended: &Ended, script: &str) {
    let (bytes, hash) = printed_by(script);
    assert_eq!((ended.code, ended.bytes), (Some(3), bytes), "{}", ended.errors);
    assert_eq!(ended.hash, hash);
}

#[test]
fn a_line_that_stands_still_for_a_while_costs_that_while_only() {
    let world = World::start(&[]);
    let reader = world.print(PRINT_LONG);
    for seen in [1, 2_000_000, 5_000_000] {
        reader.has_seen(seen);
        world.proxy.set(Fault::Stall);
        world.others_work();
        assert!(reader.seen() < 75_000_000, "it stands still");
        world.proxy.set(Fault::None);
    }
    let ended = reader.end();
    is_what_prints(&ended, PRINT_LONG);
    assert!(!ended.errors.contains("lost"), "no session was given up: {}", ended.errors);
}

#[test]
fn a_half_open_line_is_noticed_and_taken_up_again() {
    let world = World::start(&["--resume-grace", "60s"]);
    let reader = world.print(PRINT_LONG);
    reader.has_seen(1_000_000);
    let begun = Instant::now();
    world.proxy.set(Fault::Stall);
    cortex_tests::wait::until("that the waiter hears of it", || {
        reader.said().contains("waiting up to")
    });
    let noticed = begun.elapsed();
    eprintln!("a line that went dead without a word was noticed after {noticed:?}");
    assert!(noticed < Duration::from_secs(60));
    world.others_work();
    world.proxy.set(Fault::None);
    let ended = reader.end();
    is_what_prints(&ended, PRINT_LONG);
    assert!(ended.errors.contains("the node is back"), "{}", ended.errors);
}

#[test]
fn a_slow_line_and_a_narrow_one_carry_everything_and_a_cancel_in_time() {
    let world = World::start(&[]);
    for fault in [Fault::Delay(Duration::from_millis(20)), Fault::Bandwidth(4_000_000)] {
        world.proxy.set(fault);
        let reader = world.print(PRINT);
        reader.has_seen(500_000);
        world.others_work();
        is_whole(&reader.end());
        let flood = world.operator.command(&["exec", "far", "--", "yes"]);
        let flood = Reader::start(flood, Pace::Full, &world.mesh.path("flood.log"));
        flood.has_seen(1_000_000);
        let begun = Instant::now();
        let running = world.operator.agent(&["task", "list", "--status", "running", "-o", "json"]);
        let id = running.ok().json()[0]["task_id"].as_str().unwrap().to_owned();
        assert_eq!(world.operator.agent(&["task", "cancel", &id, "--grace", "10s"]).code, 0);
        let ended = flood.end();
        assert_eq!(ended.code, Some(143), "{}", ended.errors);
        eprintln!("{fault:?}: a flood ended {:?} after its cancel", begun.elapsed());
        // What is under way, up to the reader's window, comes before the end: two seconds of it here.
        assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
    }
}

#[test]
fn a_line_cut_in_the_middle_of_frames_loses_and_doubles_nothing() {
    let seed: u64 = rand::random();
    eprintln!("seed {seed}");
    let mut random = <rand::rngs::StdRng as rand::SeedableRng>::seed_from_u64(seed);
    let mut mesh = Mesh::start();
    // The reader's line is cut as well.
    let fronts: [Proxy; 2] = std::array::from_fn(|_| Proxy::start(mesh.address().parse().unwrap()));
    let [to_node, to_reader] = &fronts;
    let operator = mesh.operator_through("operator", &to_reader.address().to_string());
    let _node = mesh.node_through("far", &to_node.address().to_string());
    let command = operator.command(&["exec", "far", "-s", &format!("{PRINT_LONG}; exit 3")]);
    let reader = Reader::start(command, Pace::Full, &mesh.path("client.log"));
    for step in 0..6_u64 {
        reader.has_seen(1 + step * 1_000_000);
        let proxy = &fronts[(step % 2) as usize];
        // Output goes towards the hub on the node's line, and away from it on the reader's; the other
        // direction carries frames of a few dozen bytes.
        let (towards, most) = match (step % 2, step % 3) {
            (0, 0 | 1) => (Towards::Server, 200_000),
            (0, _) => (Towards::Client, 300),
            (_, 0) => (Towards::Server, 300),
            _ => (Towards::Client, 200_000),
        };
        proxy.cut_after(towards, rand::RngExt::random_range(&mut random, 1..most));
        cortex_tests::wait::until("the cut", || proxy.has_cut());
    }
    let ended = reader.end();
    is_what_prints(&ended, PRINT_LONG);
    assert!(ended.errors.contains("again") && ended.errors.contains("back"), "{}", ended.errors);
}
