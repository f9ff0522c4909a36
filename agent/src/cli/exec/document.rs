//! The end of a command as a document for programs.

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use cortex_proto::v1;
use cortex_shared::ids::{NodeId, TaskId};
use serde::Serialize;

use super::check::{own_exit_code, verdict_name};
use super::writer::Captured;
use crate::cli::error::CliError;

/// One command on one node.
#[derive(Debug, Default, Serialize)]
pub(super) struct Document {
    pub(super) task_id: String,
    pub(super) node: String,
    pub(super) node_id: String,
    /// How it ended; `not_reached`, `not_started` or `refused` where it did not begin, `unknown` where that
    /// is not known.
    pub(super) verdict: &'static str,
    /// What `exec` ends with if this is its only target.
    pub(super) code: u8,
    /// The command's own; null where it has none.
    pub(super) exit_code: Option<u32>,
    pub(super) signal: u32,
    /// All output has arrived.
    pub(super) complete: bool,
    /// Not all of it is in this document; the counts are of all, as far as that is known.
    pub(super) truncated: bool,
    pub(super) stdout_bytes: u64,
    pub(super) stderr_bytes: u64,
    pub(super) duration_ms: u64,
    pub(super) reason: String,
    pub(super) hint: String,
    /// Where it is no text, as far as it is.
    pub(super) stdout: String,
    pub(super) stderr: String,
    /// The bytes of one that is no text; absent otherwise.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) stdout_base64: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(super) stderr_base64: Option<String>,
}

fn base64_unless_text(bytes: &[u8]) -> Option<String> {
    std::str::from_utf8(bytes).is_err().then(|| STANDARD.encode(bytes))
}

impl Document {
    /// Of a command that the hub accepted. Its exit is absent where it is not known.
    pub(super) fn new(
        accepted: &v1::ExecAccepted,
        exit: Option<&v1::TaskExit>,
        captured: &Captured,
        complete: bool,
        code: u8,
    ) -> Self {
        let id = |text: Option<String>| text.unwrap_or_default();
        let length = |kept: &[u8]| u64::try_from(kept.len()).unwrap_or(u64::MAX);
        let unknown = v1::TaskExit {
            stdout_bytes: length(&captured.stdout),
            stderr_bytes: length(&captured.stderr),
            ..v1::TaskExit::default()
        };
        let exit = exit.unwrap_or(&unknown);
        Self {
            task_id: id(TaskId::from_slice(&accepted.task_id).ok().map(|id| id.to_string())),
            node: accepted.node_name.clone(),
            node_id: id(NodeId::from_slice(&accepted.node_id).ok().map(|id| id.to_string())),
            verdict: verdict_name(exit.verdict),
            code,
            exit_code: own_exit_code(exit),
            signal: exit.signal,
            complete,
            truncated: captured.truncated,
            stdout_bytes: exit.stdout_bytes,
            stderr_bytes: exit.stderr_bytes,
            duration_ms: exit.duration_ms,
            reason: exit.reason.clone(),
            hint: exit.hint.clone(),
            stdout: String::from_utf8_lossy(&captured.stdout).into_owned(),
            stderr: String::from_utf8_lossy(&captured.stderr).into_owned(),
            stdout_base64: base64_unless_text(&captured.stdout),
            stderr_base64: base64_unless_text(&captured.stderr),
        }
    }

    /// The same where there is an error in place of an end.
    pub(super) fn with_error(self, error: &CliError) -> Self {
        let verdict = match self.code {
            _ if !self.task_id.is_empty() => self.verdict,
            126 => "refused",
            // Who left before an answer came does not know.
            130 => "unknown",
            _ => "not_reached",
        };
        let hint = error.help().unwrap_or_default();
        Self { verdict, reason: error.message(), hint, ..self }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn captured(stdout: &[u8]) -> serde_json::Value {
        let captured = Captured { stdout: stdout.to_vec(), ..Captured::default() };
        let document = Document::new(&v1::ExecAccepted::default(), None, &captured, false, 125);
        serde_json::to_value(document).unwrap()
    }

    #[test]
    fn bytes_that_are_no_text_are_there_beside_what_can_be_shown_of_them() {
        let text = captured("äö\0\u{1b}\n".as_bytes());
        assert_eq!(text["stdout"], "äö\0\u{1b}\n");
        assert!(text.get("stdout_base64").is_none() && text.get("stderr_base64").is_none());
        let bytes = captured(b"a\xff\xfeb");
        assert_eq!(bytes["stdout"], "a\u{fffd}\u{fffd}b");
        assert_eq!(bytes["stdout_base64"], "Yf/+Yg==");
        assert!(bytes.get("stderr_base64").is_none());
    }
}
