//! What the start of a command costs does not grow with the agent.

use std::time::{Duration, Instant};

use crate::support::{PLENTY, Running, apart, program};

const SMALL_MIB: usize = 64;
const LARGE_MIB: usize = 512;
const ROUNDS: usize = 4;
const STARTS_IN_A_ROUND: usize = 8;

#[tokio::test]
async fn starting_a_command_costs_a_large_agent_no_more_than_a_small_one() {
    let (succeeded, text) = apart(&[], "start::apart_by_memory", &[]).await;
    assert!(succeeded, "{text}");
}

/// Prints the figures, for `scripts/bench`.
#[tokio::test]
#[ignore = "run by the test above, in a process of its own size"]
#[allow(clippy::print_stdout)]
async fn apart_by_memory() {
    let small_memory = touched(SMALL_MIB);
    let (mut small, mut large) = (Vec::new(), Vec::new());
    for _ in 0..ROUNDS {
        starts(&mut small).await;
        let more_memory = touched(LARGE_MIB - SMALL_MIB);
        starts(&mut large).await;
        drop(more_memory);
    }
    drop(small_memory);
    let (small, large) = (best(small), best(large));
    println!(
        "start of a command: {SMALL_MIB} MiB {:.3} ms, {LARGE_MIB} MiB {:.3} ms",
        small.as_secs_f64() * 1e3,
        large.as_secs_f64() * 1e3
    );
    // A copy of the page tables of the difference takes about 10 ms.
    let limit = small * 3 / 2 + Duration::from_millis(2);
    assert!(large < limit, "{small:?} with little memory, {large:?} with much");
}

/// That much memory, every page of it written to.
fn touched(mebibytes: usize) -> Vec<u8> {
    let mut memory = vec![0_u8; mebibytes << 20];
    memory.iter_mut().step_by(4096).for_each(|byte| *byte = 1);
    std::hint::black_box(memory)
}

async fn starts(times: &mut Vec<Duration>) {
    for _ in 0..STARTS_IN_A_ROUND {
        let begun = Instant::now();
        let mut running = Running::start(program(&["true"]), PLENTY);
        running.until_started().await;
        times.push(begun.elapsed());
        assert!(running.finish().await.succeeded());
    }
}

/// The quickest of all: what others do on this machine only ever adds.
fn best(times: Vec<Duration>) -> Duration {
    times.into_iter().min().unwrap()
}
