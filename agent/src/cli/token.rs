//! Invite tokens from a file, standard input or the environment; never from an argument, which
//! every user of the machine can read.

use std::io::{IsTerminal as _, Read};
use std::path::PathBuf;

use clap::Args;
use cortex_shared::secret::InviteToken;
use zeroize::Zeroizing;

use super::error::{CliError, Exit};

/// More than any token is long; the rest of a wrong file is not read.
const MAX_BYTES: u64 = 4096;

/// Where the token is.
#[derive(Debug, Args)]
pub(crate) struct TokenArgs {
    /// Read the invite token from this file
    #[arg(long, value_name = "FILE", conflicts_with = "token_stdin")]
    token_file: Option<PathBuf>,
    /// Read the invite token from standard input
    #[arg(long)]
    token_stdin: bool,
}

impl TokenArgs {
    /// Reads and checks the token. The text is wiped from memory when it is dropped.
    pub(crate) fn read(&self) -> Result<Zeroizing<String>, CliError> {
        let text = if let Some(path) = &self.token_file {
            let failed = |error| {
                CliError::new(Exit::Failed, format!("cannot read {}", path.display()))
                    .because(error)
                    .hint("name a file that this user may read, or give the token by --token-stdin")
            };
            read_bounded(std::fs::File::open(path).map_err(failed)?).map_err(failed)?
        } else if self.token_stdin {
            let stdin = std::io::stdin();
            if stdin.is_terminal() {
                super::printer::complain(
                    "paste the token, then press Enter and Ctrl-D",
                    super::printer::ColorWhen::Auto,
                );
            }
            read_bounded(stdin.lock()).map_err(|error| {
                CliError::new(Exit::Failed, "cannot read standard input")
                    .because(error)
                    .hint("give --token-file FILE, or the variable CORTEX_TOKEN")
            })?
        } else if let Ok(text) = std::env::var("CORTEX_TOKEN") {
            Zeroizing::new(text)
        } else {
            return Err(CliError::usage("no token")
                .hint("give --token-file FILE, --token-stdin, or the variable CORTEX_TOKEN"));
        };
        let text = Zeroizing::new(text.trim().to_owned());
        text.parse::<InviteToken>().map_err(|error| {
            CliError::new(Exit::Usage, error.to_string()).hint(
                "the token is what `cortex-agent invite create` or `cortex-hubd operator create` prints, whole",
            )
        })?;
        Ok(text)
    }
}

fn read_bounded(source: impl Read) -> std::io::Result<Zeroizing<String>> {
    let mut text = Zeroizing::new(String::with_capacity(256));
    source.take(MAX_BYTES).read_to_string(&mut text)?;
    Ok(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn token_is_read_from_a_file_and_anything_else_is_refused_without_showing_it() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("token");
        let args = TokenArgs { token_file: Some(path.clone()), token_stdin: false };
        let token = InviteToken::generate().expose();
        std::fs::write(&path, format!(" {token}\n")).unwrap();
        assert_eq!(args.read().unwrap().as_str(), token);
        std::fs::write(&path, &token[..token.len() - 1]).unwrap();
        let error = args.read().unwrap_err();
        assert_eq!(error.exit(), Exit::Usage);
        assert!(!error.render().contains(&token[13..30]));
        assert!(error.help().is_some());
        std::fs::remove_file(&path).unwrap();
        assert!(args.read().unwrap_err().help().is_some());
    }
}
