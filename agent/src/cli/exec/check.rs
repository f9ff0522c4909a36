//! Whether all output has arrived, and which exit code an end means. Pure.

use cortex_proto::v1::{TaskExit, TaskInterrupted, TaskVerdict};

/// What was received of one stream: counted, hashed, and whether a piece was missing.
#[derive(Debug, Default)]
pub(in crate::cli) struct StreamCheck {
    bytes: u64,
    hasher: blake3::Hasher,
    gap: Option<Gap>,
}

/// A piece that did not follow the one before.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
struct Gap {
    expected: u64,
    got: u64,
}

impl StreamCheck {
    /// Takes the next piece.
    pub(in crate::cli) fn take(&mut self, offset: u64, data: &[u8]) {
        if offset != self.bytes && self.gap.is_none() {
            self.gap = Some(Gap { expected: self.bytes, got: offset });
        }
        self.bytes = self.bytes.saturating_add(u64::try_from(data.len()).unwrap_or(u64::MAX));
        self.hasher.update(data);
    }

    /// What is wrong, compared with what the node says the command wrote.
    fn problem(&self, name: &str, bytes: u64, hash: &[u8]) -> Option<String> {
        if let Some(Gap { expected, got }) = self.gap {
            return Some(format!("{name}: byte {expected} was due, byte {got} came"));
        }
        if self.bytes != bytes {
            return Some(format!("{name}: {} of {bytes} bytes arrived", self.bytes));
        }
        // Nothing needs no hash: a command that did not run has none.
        if bytes > 0 && self.hasher.finalize().as_bytes() != hash {
            return Some(format!("{name}: the bytes that arrived are not those that were written"));
        }
        None
    }
}

/// Both streams of one command.
#[derive(Debug, Default)]
pub(in crate::cli) struct OutputCheck {
    pub(in crate::cli) stdout: StreamCheck,
    pub(in crate::cli) stderr: StreamCheck,
}

impl OutputCheck {
    /// Why the output is not complete; `None` if it is.
    pub(in crate::cli) fn incomplete(&self, exit: &TaskExit) -> Option<String> {
        // Where the mesh itself does not know the end, it does not know the counts either; nor where the
        // hub ended the command and did not wait for what the node has to say, as in a revocation.
        let unknown = match verdict(exit.verdict) {
            TaskVerdict::StreamLost | TaskVerdict::Unspecified => true,
            TaskVerdict::Cancelled | TaskVerdict::Failed => !is_nodes_word(exit),
            TaskVerdict::Exited
            | TaskVerdict::Signalled
            | TaskVerdict::TimeLimit
            | TaskVerdict::Refused
            | TaskVerdict::NotFound => false,
        };
        if unknown {
            return None;
        }
        self.stdout
            .problem("stdout", exit.stdout_bytes, &exit.stdout_hash)
            .or_else(|| self.stderr.problem("stderr", exit.stderr_bytes, &exit.stderr_hash))
    }
}

/// Whether the node itself said how it ended: the hub knows no hashes.
pub(in crate::cli) fn is_nodes_word(exit: &TaskExit) -> bool {
    !exit.stdout_hash.is_empty()
}

/// What to say where the session with the node is lost.
pub(in crate::cli) fn interruption(news: &TaskInterrupted) -> String {
    let reason = super::super::error::printable(&news.reason);
    match news.resume_within_ms {
        0 => reason,
        ms => {
            let wait = std::time::Duration::from_millis(ms);
            format!("{reason}; waiting up to {wait:?} for it to come back")
        }
    }
}

fn verdict(value: i32) -> TaskVerdict {
    TaskVerdict::try_from(value).unwrap_or(TaskVerdict::Unspecified)
}

/// The exit code of this process for an end that is complete and was not interrupted here.
pub(in crate::cli) fn exit_code(exit: &TaskExit) -> u8 {
    let of_signal = |signal: u32| u8::try_from(128 + signal.min(127)).unwrap_or(255);
    match verdict(exit.verdict) {
        TaskVerdict::Exited => u8::try_from(exit.exit_code).unwrap_or(255),
        TaskVerdict::Signalled => of_signal(exit.signal),
        TaskVerdict::TimeLimit => 124,
        // By somebody else: told as the signal it ended by.
        TaskVerdict::Cancelled if exit.signal > 0 => of_signal(exit.signal),
        TaskVerdict::Cancelled => of_signal(15),
        TaskVerdict::Refused => 126,
        TaskVerdict::NotFound => 127,
        TaskVerdict::Failed | TaskVerdict::StreamLost | TaskVerdict::Unspecified => 125,
    }
}

/// The code that the command itself ended with, if it did.
pub(in crate::cli) fn own_exit_code(exit: &TaskExit) -> Option<u32> {
    (verdict(exit.verdict) == TaskVerdict::Exited).then_some(exit.exit_code)
}

/// The verdict in JSON.
pub(in crate::cli) fn verdict_name(value: i32) -> &'static str {
    match verdict(value) {
        TaskVerdict::Exited => "exited",
        TaskVerdict::Signalled => "signalled",
        TaskVerdict::TimeLimit => "time_limit",
        TaskVerdict::Cancelled => "cancelled",
        TaskVerdict::Refused => "refused",
        TaskVerdict::NotFound => "not_found",
        TaskVerdict::Failed => "failed",
        TaskVerdict::StreamLost => "stream_lost",
        TaskVerdict::Unspecified => "unknown",
    }
}

/// What to say about an end, beside its exit code; `None` where the code says it all.
pub(in crate::cli) fn complaint(exit: &TaskExit) -> Option<String> {
    let what = match verdict(exit.verdict) {
        // The command's own end; what it left behind is still worth a word.
        TaskVerdict::Exited | TaskVerdict::Signalled => {
            return (!exit.hint.is_empty()).then(|| hint(exit));
        }
        TaskVerdict::TimeLimit => "the command ran into its time limit",
        TaskVerdict::Cancelled => "the command was cancelled",
        TaskVerdict::Refused => "the node refused the command; it has not run",
        TaskVerdict::NotFound => "the command was not found on the node, or cannot be executed",
        TaskVerdict::Failed => "the command failed in the mesh",
        TaskVerdict::StreamLost => "the node's session was lost; the command's end is not known",
        TaskVerdict::Unspecified => "the command ended in a way this program does not know",
    };
    let mut text = format!("error: {what}\n");
    if !exit.reason.is_empty() {
        text.push_str(&format!("cause: {}\n", super::super::error::printable(&exit.reason)));
    }
    if !exit.hint.is_empty() {
        text.push_str(&hint(exit));
    }
    Some(text)
}

fn hint(exit: &TaskExit) -> String {
    format!("hint: {}\n", super::super::error::printable(&exit.hint))
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;

    fn exit(verdict: TaskVerdict) -> TaskExit {
        TaskExit { verdict: verdict.into(), ..Default::default() }
    }

    fn written(stdout: &[u8], stderr: &[u8]) -> TaskExit {
        let hash = |bytes: &[u8]| Bytes::copy_from_slice(blake3::hash(bytes).as_bytes());
        TaskExit {
            stdout_bytes: stdout.len() as u64,
            stdout_hash: hash(stdout),
            stderr_bytes: stderr.len() as u64,
            stderr_hash: hash(stderr),
            ..exit(TaskVerdict::Exited)
        }
    }

    #[test]
    fn complete_output_is_complete_in_whatever_pieces() {
        let mut check = OutputCheck::default();
        assert_eq!(check.incomplete(&written(b"", b"")), None);
        check.stdout.take(0, b"ab");
        check.stderr.take(0, b"x");
        check.stdout.take(2, b"c");
        assert_eq!(check.incomplete(&written(b"abc", b"x")), None);
    }

    #[test]
    fn anything_missing_doubled_changed_or_shifted_is_incomplete() {
        type Pieces = &'static [(u64, &'static [u8])];
        let cases: [(&str, Pieces); 6] = [
            ("nothing came", &[]),
            ("the end is missing", &[(0, b"ab")]),
            ("a piece in the middle is missing", &[(0, b"a"), (2, b"c")]),
            ("a piece came twice", &[(0, b"abc"), (0, b"abc")]),
            ("a byte changed", &[(0, b"abd")]),
            ("the beginning is missing", &[(1, b"bc")]),
        ];
        for (what, pieces) in cases {
            let mut check = OutputCheck::default();
            for (offset, data) in pieces {
                check.stdout.take(*offset, data);
            }
            assert!(check.incomplete(&written(b"abc", b"")).is_some(), "{what}");
        }
        let mut check = OutputCheck::default();
        check.stdout.take(0, b"abc");
        check.stderr.take(0, b"y");
        assert!(check.incomplete(&written(b"abc", b"x")).unwrap().starts_with("stderr"));
    }

    #[test]
    fn an_end_that_counted_nothing_says_nothing_of_the_output() {
        let mut check = OutputCheck::default();
        check.stdout.take(0, b"abc");
        for (verdict, known) in [
            (TaskVerdict::Exited, true),
            (TaskVerdict::TimeLimit, true),
            (TaskVerdict::Cancelled, false),
            (TaskVerdict::Failed, false),
            (TaskVerdict::StreamLost, false),
        ] {
            assert_eq!(check.incomplete(&exit(verdict)).is_some(), known, "{verdict:?}");
        }
        // The node's own word counts.
        let ended =
            |verdict: TaskVerdict| TaskExit { verdict: verdict.into(), ..written(b"", b"") };
        assert!(check.incomplete(&ended(TaskVerdict::Cancelled)).is_some());
    }

    #[test]
    fn every_end_has_its_exit_code() {
        let cases = [
            (TaskExit { exit_code: 0, ..exit(TaskVerdict::Exited) }, 0),
            (TaskExit { exit_code: 42, ..exit(TaskVerdict::Exited) }, 42),
            (TaskExit { exit_code: 255, ..exit(TaskVerdict::Exited) }, 255),
            (TaskExit { exit_code: 300, ..exit(TaskVerdict::Exited) }, 255),
            (TaskExit { signal: 9, ..exit(TaskVerdict::Signalled) }, 137),
            (exit(TaskVerdict::TimeLimit), 124),
            (TaskExit { signal: 15, ..exit(TaskVerdict::Cancelled) }, 143),
            (exit(TaskVerdict::Cancelled), 143),
            (exit(TaskVerdict::Refused), 126),
            (exit(TaskVerdict::NotFound), 127),
            (exit(TaskVerdict::Failed), 125),
            (exit(TaskVerdict::StreamLost), 125),
            (TaskExit { verdict: 99, ..Default::default() }, 125),
        ];
        for (exit, code) in cases {
            assert_eq!(exit_code(&exit), code, "{exit:?}");
        }
    }
}
