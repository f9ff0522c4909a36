//! What went wrong, for people and scripts: a text, its causes, the command that helps, and the
//! exit code.

use std::error::Error as StdError;
use std::fmt::Write as _;
use std::io::ErrorKind;
use std::path::Path;

use cortex_proto::{CODE_TRAILER, HINT_TRAILER};
use cortex_shared::text::is_printable;
use tonic::{Code, Status};

use crate::audit::AuditError;
use crate::client::{ConnectError, certificate_refusal, connect_error_in};
use crate::config::ConfigError;
use crate::identity::live::IdentityError;
use crate::link::renewal::{FORK, RenewError};

/// Exit codes of every command but `exec`, whose own code is [`Exit::Code`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// 0: the reader of the output went away, which is no failure of ours.
    ReaderGone,
    /// 1
    Failed,
    /// 2
    Usage,
    /// 3
    NotFound,
    /// 4
    NotLoggedIn,
    /// 5
    Forbidden,
    /// 6
    Unreachable,
    /// 7
    Conflict,
    /// Another one.
    Code(u8),
}

impl Exit {
    /// The number the process ends with.
    #[must_use]
    pub fn code(self) -> u8 {
        match self {
            Self::ReaderGone => 0,
            Self::Failed => 1,
            Self::Usage => 2,
            Self::NotFound => 3,
            Self::NotLoggedIn => 4,
            Self::Forbidden => 5,
            Self::Unreachable => 6,
            Self::Conflict => 7,
            Self::Code(code) => code,
        }
    }
}

/// An error of the command line.
#[derive(Debug)]
pub struct CliError {
    exit: Exit,
    message: String,
    source: Option<Box<dyn StdError + Send + Sync>>,
    hint: Option<String>,
}

impl CliError {
    /// An error with an exit code of its own.
    #[must_use]
    pub fn new(exit: Exit, message: impl Into<String>) -> Self {
        Self { exit, message: message.into(), source: None, hint: None }
    }

    /// Wrong use of the command line.
    #[must_use]
    pub fn usage(message: impl Into<String>) -> Self {
        Self::new(Exit::Usage, message)
    }

    /// Adds the command that helps.
    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    /// Adds the cause.
    #[must_use]
    pub fn because(mut self, source: impl StdError + Send + Sync + 'static) -> Self {
        self.source = Some(Box::new(source));
        self
    }

    /// The same error with another exit code.
    #[must_use]
    pub fn with_exit(mut self, exit: Exit) -> Self {
        if self.exit != Exit::ReaderGone {
            self.exit = exit;
        }
        self
    }

    /// What went wrong, in a line, without its causes.
    #[must_use]
    pub fn message(&self) -> String {
        printable(&self.message)
    }

    /// The command that helps.
    #[must_use]
    pub fn help(&self) -> Option<String> {
        self.hint.as_deref().map(printable)
    }

    /// What the process ends with.
    #[must_use]
    pub fn exit(&self) -> Exit {
        self.exit
    }

    /// Everything there is to say, a line each: `error: …`, `cause: …`, `hint: …`. Texts from
    /// elsewhere are stripped of control characters, so that they cannot play with the terminal.
    #[must_use]
    pub fn render(&self) -> String {
        let mut text = format!("error: {}\n", printable(&self.message));
        let mut next = self.source.as_deref().map(|source| source as &(dyn StdError + 'static));
        let mut said = self.message.clone();
        while let Some(cause) = next {
            let cause_text = cause.to_string();
            // Some errors repeat their cause in their own text.
            if !said.contains(&cause_text) {
                writeln!(text, "cause: {}", printable(&cause_text))
                    .expect("writing to a string succeeds");
            }
            said = cause_text;
            next = cause.source();
        }
        if let Some(hint) = &self.hint {
            writeln!(text, "hint: {}", printable(hint)).expect("writing to a string succeeds");
        }
        text
    }
}

/// Text from elsewhere, fit for a terminal: control characters become spaces, and characters that
/// change how others are shown are written out, as in `\u{202e}`.
#[must_use]
pub fn printable(text: &str) -> String {
    let mut shown = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            c if is_printable(c) => shown.push(c),
            c if c.is_control() => shown.push(' '),
            c => shown.extend(c.escape_unicode()),
        }
    }
    shown
}

impl From<ConfigError> for CliError {
    fn from(error: ConfigError) -> Self {
        let (exit, hint) = match &error {
            ConfigError::NoHome { .. } => (Exit::Usage, None),
            ConfigError::Read { path, source } | ConfigError::Write { path, source } => {
                (Exit::Failed, Some(file_hint(path, source.kind())))
            }
            ConfigError::Refused { .. } => (
                Exit::Failed,
                Some(
                    "nothing was changed. Is this the right hub? `cortex-agent context list` shows its address, `cortex-hubd ca pin` on its machine the right pin"
                        .to_owned(),
                ),
            ),
            ConfigError::Damaged { .. } => (
                Exit::Failed,
                Some("restore the file from a backup, or join or log in anew elsewhere".to_owned()),
            ),
            ConfigError::NotOwner { owner, .. } => (
                Exit::Forbidden,
                Some(format!("only root and user {owner} decide about it; use sudo")),
            ),
            ConfigError::TooOpen { path, .. } => {
                (Exit::Failed, Some(format!("chmod 600 {}", path.display())))
            }
            ConfigError::NoSuchContext(_) => {
                (Exit::NotFound, Some("cortex-agent context list".to_owned()))
            }
            ConfigError::NotLoggedIn => (
                Exit::NotLoggedIn,
                Some(
                    "cortex-agent login HUB:PORT --ca sha256:PIN --token-file FILE; an admin makes the token with `cortex-hubd operator create`"
                        .to_owned(),
                ),
            ),
            ConfigError::NotJoined { .. } => (
                Exit::NotLoggedIn,
                Some(
                    "cortex-agent join HUB:PORT --ca sha256:PIN --token-file FILE; `cortex-agent invite create` prints the whole line"
                        .to_owned(),
                ),
            ),
        };
        Self { exit, hint, ..Self::from_source(error) }
    }
}

/// What helps where a file of ours can be neither read nor written.
fn file_hint(path: &Path, kind: ErrorKind) -> String {
    let shown = path.display();
    match kind {
        ErrorKind::PermissionDenied => format!(
            "run as the user whose file it is (`ls -ld {shown}`), or name your own directory: --state, CORTEX_CONFIG_DIR"
        ),
        ErrorKind::StorageFull | ErrorKind::QuotaExceeded => format!("make room: df {shown}"),
        _ => format!("look at it: ls -ld {shown}; df {shown}"),
    }
}

impl CliError {
    fn from_source(error: impl StdError + Send + Sync + 'static) -> Self {
        Self::new(Exit::Failed, error.to_string()).because(error)
    }
}

impl From<IdentityError> for CliError {
    fn from(error: IdentityError) -> Self {
        match error {
            IdentityError::Config(error) => error.into(),
            IdentityError::Connect(error) => error.into(),
            IdentityError::Wrong(_) | IdentityError::Sign(_) => Self::from_source(error),
        }
    }
}

impl From<RenewError> for CliError {
    fn from(error: RenewError) -> Self {
        match error {
            RenewError::Connect(error) => error.into(),
            RenewError::Identity(error) => error.into(),
            RenewError::Cloned { .. } => {
                Self::from_source(error).with_exit(Exit::Conflict).hint(FORK)
            }
            RenewError::Refused { .. } => Self::from_source(error).with_exit(Exit::Forbidden),
            RenewError::Busy { after, .. } => Self::from_source(error)
                .with_exit(Exit::Unreachable)
                .hint(format!("try again in {} s", after.as_millis().div_ceil(1000))),
            RenewError::Failed { .. } => Self::from_source(error)
                .with_exit(Exit::Unreachable)
                .hint("`cortex-agent doctor` looks closer"),
        }
    }
}

impl From<AuditError> for CliError {
    fn from(error: AuditError) -> Self {
        Self::from_source(error).hint("make room on the disk; nothing has been changed")
    }
}

impl From<ConnectError> for CliError {
    fn from(error: ConnectError) -> Self {
        let hint = error.hint();
        Self::from_source(error).with_exit(Exit::Unreachable).hint(hint)
    }
}

impl From<Status> for CliError {
    fn from(status: Status) -> Self {
        if let Some(error) = connect_error_in(&status) {
            return error.into();
        }
        if let Some(refusal) = certificate_refusal(&status) {
            return Self::new(Exit::NotLoggedIn, format!("the hub refused: {refusal}"))
                .hint("compare the clocks (`date -u`); otherwise log in or join again");
        }
        let trailer =
            |name| status.metadata().get(name).and_then(|v| v.to_str().ok()).map(str::to_owned);
        let code = trailer(CODE_TRAILER);
        // What the hub says has no cause on this side: this is of the connection.
        if code.is_none() && StdError::source(&status).is_some() {
            return Self::new(Exit::Unreachable, "the connection to the hub broke")
                .because(status)
                .hint("`cortex-agent doctor` looks closer");
        }
        let (exit, own_hint) = match status.code() {
            Code::InvalidArgument => (Exit::Usage, None),
            Code::NotFound => (Exit::NotFound, None),
            Code::Unauthenticated => (Exit::NotLoggedIn, None),
            Code::PermissionDenied => (
                Exit::Forbidden,
                Some("`cortex-agent whoami` shows who the hub takes you for".to_owned()),
            ),
            Code::Unavailable | Code::DeadlineExceeded => {
                (Exit::Unreachable, Some("`cortex-agent doctor` looks closer".to_owned()))
            }
            Code::ResourceExhausted => {
                let wait = cortex_proto::retry_after(status.metadata());
                let hint =
                    wait.map(|wait| format!("try again in {} s", wait.as_millis().div_ceil(1000)));
                (Exit::Unreachable, hint)
            }
            Code::AlreadyExists | Code::FailedPrecondition | Code::Aborted => {
                (Exit::Conflict, None)
            }
            Code::Unimplemented => {
                (Exit::Failed, Some("the hub is older than this program".to_owned()))
            }
            _ => (Exit::Failed, None),
        };
        let message = match status.message() {
            "" => status.code().description().to_owned(),
            text => text.to_owned(),
        };
        let message = match code {
            Some(code) => format!("{message} ({code})"),
            None => message,
        };
        let mut error = Self::new(exit, message);
        error.hint = trailer(HINT_TRAILER).or(own_hint);
        error
    }
}

/// Writing our own output failed. A reader that went away is no failure.
impl From<std::io::Error> for CliError {
    fn from(error: std::io::Error) -> Self {
        if error.kind() == std::io::ErrorKind::BrokenPipe {
            return Self::new(Exit::ReaderGone, "");
        }
        Self::new(Exit::Failed, "cannot write the output").because(error)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_refusal_has_its_exit_code() {
        for (code, exit) in [
            (Code::InvalidArgument, 2),
            (Code::NotFound, 3),
            (Code::Unauthenticated, 4),
            (Code::PermissionDenied, 5),
            (Code::Unavailable, 6),
            (Code::DeadlineExceeded, 6),
            (Code::ResourceExhausted, 6),
            (Code::AlreadyExists, 7),
            (Code::FailedPrecondition, 7),
            (Code::Aborted, 7),
            (Code::Internal, 1),
            (Code::Unknown, 1),
        ] {
            let error = CliError::from(Status::new(code, "because"));
            assert_eq!(error.exit().code(), exit, "{code:?}");
        }
        assert_eq!(CliError::from(ConfigError::NotLoggedIn).exit().code(), 4);
        assert_eq!(CliError::from(ConfigError::NoSuchContext("x".into())).exit().code(), 3);
        for kind in [ErrorKind::PermissionDenied, ErrorKind::StorageFull, ErrorKind::IsADirectory] {
            let (path, source) = (std::path::PathBuf::from("/a/file"), kind.into());
            let error = CliError::from(ConfigError::Write { path, source });
            assert!(error.help().is_some_and(|hint| hint.contains("/a/file")), "{kind}");
        }
        let gone = std::io::Error::from(std::io::ErrorKind::BrokenPipe);
        assert_eq!(CliError::from(gone).exit().code(), 0);
    }

    #[test]
    fn code_and_hint_of_the_hub_are_shown_without_control_characters() {
        let mut status = Status::not_found("no node matches \"wbe\"\u{1b}[2J\u{202e}");
        status.metadata_mut().insert(CODE_TRAILER, "no_such_node".parse().unwrap());
        status.metadata_mut().insert(HINT_TRAILER, "cortex-agent node list".parse().unwrap());
        assert_eq!(
            CliError::from(status).render(),
            "error: no node matches \"wbe\" [2J\\u{202e} (no_such_node)\nhint: cortex-agent node list\n"
        );
    }

    #[test]
    fn causes_are_listed_once() {
        let address: crate::client::HubAddress = "hub:1".parse().unwrap();
        let refused = std::io::Error::from(std::io::ErrorKind::ConnectionRefused);
        let error = ConnectError::Unreachable { address, source: std::sync::Arc::new(refused) };
        let error = CliError::from(error);
        assert_eq!(error.exit().code(), 6);
        let text = error.render();
        assert!(
            text.starts_with(
                "error: hub hub:1 cannot be reached\ncause: connection refused\nhint: "
            ),
            "{text}"
        );
    }
}
