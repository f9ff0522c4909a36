//! Standard input.

use bytes::Bytes;
use cortex_agent::exec::{CommandControl, CommandRequest};
use cortex_shared::policy::Mode;
use sha2::Digest as _;

use crate::support::{PLENTY, Running, run, script};

const BOTH: [Mode; 2] = [Mode::Strict, Mode::Permissive];

#[tokio::test]
async fn standard_input_is_end_of_file_unless_asked_for() {
    for mode in BOTH {
        let ran = run(CommandRequest { mode, ..script("cat; echo end") }).await;
        assert_eq!(ran.stdout, "end\n", "{ran:?}");
    }
}

#[tokio::test]
async fn standard_input_arrives_whole_and_is_acknowledged() {
    for mode in BOTH {
        let request = CommandRequest { mode, stdin: true, ..script("sha256sum") };
        let mut running = Running::start(request, PLENTY);
        running.until_started().await;
        let frame = Bytes::from(vec![b'z'; 64 * 1024]);
        let mut sent = 0;
        for number in 0..64 {
            // A window of 256 KiB, as a sender keeps it.
            while sent - running.taken > 256 * 1024 {
                running.next().await.unwrap();
            }
            sent += frame.len() as u64;
            running.order(CommandControl::Stdin { data: frame.clone(), end: number == 63 }).await;
        }
        let ran = running.finish().await;
        let hash = sha2::Sha256::digest(vec![b'z'; 64 * 64 * 1024]);
        let hash: String = hash.iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(ran.stdout, format!("{hash}  -\n"), "{ran:?}");
        assert_eq!(ran.taken, sent);
    }
}

#[tokio::test]
async fn a_command_that_ignores_its_input_still_ends() {
    let text = "exec 0<&-; echo up; sleep 0.2; exit 5";
    let mut running = Running::start(CommandRequest { stdin: true, ..script(text) }, PLENTY);
    running.until_output("up").await;
    let data = Bytes::from(vec![0; 64 * 1024]);
    running.order(CommandControl::Stdin { data, end: false }).await;
    assert_eq!(running.finish().await.exit.exit_code, 5);
}
