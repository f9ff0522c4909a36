//! `completion`: a script that teaches a shell our words.

use clap::{Args, Command};
use clap_complete::Shell;

use super::Global;
use super::error::CliError;
use super::printer::{Format, Printer};

/// Print a completion script for a shell
#[derive(Debug, Args)]
#[command(after_help = "\
Example:
  cortex-agent completion bash > /etc/bash_completion.d/cortex-agent")]
pub(crate) struct CompletionArgs {
    /// The shell
    shell: Shell,
}

pub(crate) fn completion(
    global: &Global,
    args: CompletionArgs,
    command: &mut Command,
) -> Result<(), CliError> {
    let mut script = Vec::new();
    clap_complete::generate(args.shell, command, "cortex-agent", &mut script);
    Printer::stdout(Format::Table, global.color).raw(&script)
}
