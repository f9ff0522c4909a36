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
    let (mut small, mut large) = (Starts::default(), Starts::default());
    for _ in 0..ROUNDS {
        small.more().await;
        let more_memory = touched(LARGE_MIB - SMALL_MIB);
        large.more().await;
        drop(more_memory);
    }
    drop(small_memory);
    println!(
        "start of a command: {SMALL_MIB} MiB {:.3} ms, {LARGE_MIB} MiB {:.3} ms, of which {:.3} and \
         {:.3} ms are the agent's own processor time",
        small.best().as_secs_f64() * 1e3,
        large.best().as_secs_f64() * 1e3,
        small.own_time_of_one().as_secs_f64() * 1e3,
        large.own_time_of_one().as_secs_f64() * 1e3
    );
    // A copy of the page tables of the difference takes about 10 ms of the agent's own processor
    // time, which other programs on the machine hardly change.
    let (small, large) = (small.own_time_of_one(), large.own_time_of_one());
    let limit = small * 2 + Duration::from_millis(2);
    assert!(large < limit, "{small:?} of processor time with little memory, {large:?} with much");
}

/// That much memory, every page of it written to.
fn touched(mebibytes: usize) -> Vec<u8> {
    let mut memory = vec![0_u8; mebibytes << 20];
    memory.iter_mut().step_by(4096).for_each(|byte| *byte = 1);
    std::hint::black_box(memory)
}

/// Commands started so far.
#[derive(Default)]
struct Starts {
    times: Vec<Duration>,
    own_time: Duration,
}

impl Starts {
    async fn more(&mut self) {
        for _ in 0..STARTS_IN_A_ROUND {
            let (begun, own) = (Instant::now(), own_time());
            let mut running = Running::start(program(&["true"]), PLENTY);
            running.until_started().await;
            self.times.push(begun.elapsed());
            self.own_time += own_time().saturating_sub(own);
            assert!(running.finish().await.succeeded());
        }
    }

    /// The quickest of all: what others do on this machine only ever adds.
    fn best(&self) -> Duration {
        self.times.iter().min().copied().unwrap()
    }

    fn own_time_of_one(&self) -> Duration {
        self.own_time / u32::try_from(self.times.len()).unwrap()
    }
}

/// The processor time that the threads of this process have had.
fn own_time() -> Duration {
    let threads = std::fs::read_dir("/proc/self/task").unwrap().flatten();
    let nanoseconds = threads
        .filter_map(|thread| std::fs::read_to_string(thread.path().join("schedstat")).ok())
        .filter_map(|text| text.split(' ').next()?.parse::<u64>().ok())
        .sum();
    Duration::from_nanos(nanoseconds)
}
