//! `version`.

use clap::Args;
use serde::Serialize;

use super::error::CliError;
use super::{Global, Output};

/// Show the version of this program
#[derive(Debug, Args)]
pub(crate) struct VersionArgs {
    #[command(flatten)]
    output: Output,
}

#[derive(Serialize)]
struct Version {
    version: &'static str,
    protocol: &'static str,
    os: &'static str,
    arch: &'static str,
}

pub(crate) fn version(global: &Global, args: VersionArgs) -> Result<(), CliError> {
    let version = Version {
        version: env!("CARGO_PKG_VERSION"),
        protocol: "cortex.v1",
        os: std::env::consts::OS,
        arch: std::env::consts::ARCH,
    };
    global.printer(args.output).say(&format!("cortex-agent {}", version.version), &version)
}
