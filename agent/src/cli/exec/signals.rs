//! Signals that end commands: Ctrl-C here, being asked to end, and the end of our terminal.

use tokio::signal::unix::{Signal, SignalKind, signal};

use crate::cli::error::{CliError, Exit};

/// Listens from its creation on; until then the signals end this process.
pub(in crate::cli) struct Signals {
    interrupt: Option<Signal>,
    terminate: Option<Signal>,
    hangup: Option<Signal>,
}

impl Signals {
    pub(in crate::cli) fn new() -> Result<Self, CliError> {
        // Listening would take the place of being ignored, which somebody asked for: `nohup` of the
        // end of the terminal, a script of Ctrl-C for what it runs in the background.
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let ignored = ignored(&status);
        let listen = |kind: SignalKind| {
            if ignored & (1 << (kind.as_raw_value() - 1)) != 0 {
                return Ok(None);
            }
            signal(kind).map(Some).map_err(|error| {
                CliError::new(Exit::Code(125), "cannot listen to signals").because(error)
            })
        };
        Ok(Self {
            interrupt: listen(SignalKind::interrupt())?,
            terminate: listen(SignalKind::terminate())?,
            hangup: listen(SignalKind::hangup())?,
        })
    }

    /// The next of them.
    pub(in crate::cli) async fn next(&mut self) {
        tokio::select! {
            () = heard(&mut self.interrupt) => {}
            () = heard(&mut self.terminate) => {}
            () = heard(&mut self.hangup) => {}
        }
    }
}

async fn heard(signal: &mut Option<Signal>) {
    match signal {
        Some(signal) => drop(signal.recv().await),
        None => std::future::pending().await,
    }
}

/// The signals that a process ignores, a bit for each, by its `/proc/PID/status`; none where that does not
/// say.
fn ignored(status: &str) -> u64 {
    let line = status.lines().find_map(|line| line.strip_prefix("SigIgn:"));
    line.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok()).unwrap_or(0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_a_process_ignores_is_read_from_its_status() {
        for (line, mask) in [
            ("SigIgn:\t0000000000001001", 0x1001),
            ("SigIgn:\t0000000000000000", 0),
            ("SigCgt:\t0000000000000001", 0),
            ("SigIgn:\tnonsense", 0),
        ] {
            assert_eq!(ignored(&format!("Name:\tx\n{line}\nThreads:\t1\n")), mask, "{line}");
        }
    }
}
