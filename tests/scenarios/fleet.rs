//! More nodes than a test can start as processes: emulated by `cortex-hubd bench`, which every user has.

use std::process::Command;

use cortex_tests::process::run;
use cortex_tests::program;
use cortex_tests::reader::size;
use serde_json::Value;

fn bench(arguments: &[&str]) -> Value {
    let mut command = Command::new(program("hubd-under-test"));
    command.args(["bench"]).args(arguments).args(["-o", "json"]);
    let report = run(&mut command, b"").ok().json();
    eprintln!("{report}");
    report
}

#[test]
fn one_command_reaches_three_hundred_nodes() {
    let count = size("CORTEX_STRESS_NODES", 300);
    let report = bench(&["fanout", "--count", &count.to_string(), "--rounds", "2"]);
    assert_eq!((&report["completed"], &report["failed"]), (&(2 * count).into(), &0.into()));
    assert_eq!(report["sessions_lost"], 0);
}

#[test]
fn every_emulated_node_comes_back_to_a_hub_that_was_killed() {
    let count = size("CORTEX_STRESS_NODES", 100);
    let report = bench(&["reconnect", "--count", &count.to_string()]);
    assert!(report["returned"]["count"].as_u64() >= Some(count), "{report}");
    assert!(report["operator_calls"]["count"].as_u64() >= Some(1), "{report}");
}

#[test]
fn each_load_is_measured_and_loses_nothing() {
    let nodes = bench(&["nodes", "--count", "30", "--duration", "1s"]);
    assert!(nodes["hub_bytes_per_node"].is_u64() && nodes["sessions_lost"] == 0, "{nodes}");
    let exec = bench(&["exec", "--count", "5", "--rate", "20", "--duration", "1s"]);
    assert_eq!((&exec["completed"], &exec["offered"]), (&20.into(), &20.into()), "{exec}");
    let flood = bench(&["flood", "--count", "2", "--duration", "1s"]);
    assert!(flood["bytes"].as_u64() > Some(1 << 20), "{flood}");
    assert!(flood["beside"]["count"].as_u64() >= Some(1) && flood["failed"] == 0, "{flood}");
}
