//! `service install` and `service uninstall`: this node's agent as a systemd service.

use std::path::PathBuf;

use clap::{Args, Subcommand};
use cortex_shared::systemd::{self, Scope, Step, StepError, systemctl};

use super::Global;
use super::error::{CliError, Exit};
use super::printer::{Format, Printer};
use crate::config::StateDir;

const SYSTEM_STATE: &str = "/var/lib/cortex-agent";
const SYSTEM_SERVICE: &str = include_str!("../../../packaging/systemd/cortex-agent.service");
const USER_SERVICE: &str = include_str!("../../../packaging/systemd/cortex-agent.user.service");

/// Run the agent as a systemd service
#[derive(Debug, Args)]
pub(crate) struct ServiceArgs {
    #[command(subcommand)]
    verb: ServiceVerb,
}

#[derive(Debug, Subcommand)]
enum ServiceVerb {
    /// Run the agent now and at every start of the machine
    #[command(after_help = "\
As root: a service of the machine, with its state in /var/lib/cortex-agent. It runs as root, so that it
can give each command a user of its own and keep the owners of files; commands never run as root. With
--user: a service of this user, whose commands run as this user.
The node joins first (`cortex-agent join`). Run again after an upgrade; nothing that is there is lost.")]
    Install(InstallArgs),
    /// Stop the service and remove it; the node stays a member (see `cortex-agent leave`)
    Uninstall(UninstallArgs),
}

#[derive(Debug, Args)]
struct InstallArgs {
    /// A service of this user, not of the machine
    #[arg(long)]
    user: bool,
    /// Show every step and do none
    #[arg(long)]
    dry_run: bool,
}

#[derive(Debug, Args)]
struct UninstallArgs {
    /// The service of this user, not that of the machine
    #[arg(long)]
    user: bool,
    /// Also remove the node's identity, settings and indexes; the files of workspaces stay
    #[arg(long)]
    purge: bool,
    /// Show every step and do none
    #[arg(long)]
    dry_run: bool,
}

pub(crate) fn service(global: &Global, args: &ServiceArgs) -> Result<(), CliError> {
    let (steps, dry_run) = match &args.verb {
        ServiceVerb::Install(args) => (install(global, args)?, args.dry_run),
        ServiceVerb::Uninstall(args) => (uninstall(global, args)?, args.dry_run),
    };
    let mut out = Printer::stdout(Format::Table, global.color);
    let done = systemd::carry_out(&steps, dry_run, |step, outcome| {
        let line = match outcome {
            Some(outcome) => format!("{step}: {outcome}\n"),
            None => format!("{step}\n"),
        };
        // A reader who went away does not stop an installation half-way.
        out.raw(line.as_bytes()).ok();
    });
    done.map_err(|error: StepError| {
        CliError::new(Exit::Failed, error.to_string())
            .because(error)
            .hint("what was done stays; run the same command again when the cause is gone")
    })
}

fn scope(user: bool) -> Result<Scope, CliError> {
    if user {
        return Ok(Scope::User);
    }
    if rustix::process::geteuid().is_root() {
        return Ok(Scope::System);
    }
    Err(CliError::new(Exit::Forbidden, "a service of the machine is root's to install")
        .hint("use sudo, or --user for a service of your own"))
}

fn no_home(error: std::io::Error) -> CliError {
    CliError::new(Exit::Failed, "cannot tell where units go").because(error)
}

/// The state of the service: the one that was named, or this scope's own.
fn state(global: &Global, scope: Scope) -> Result<StateDir, CliError> {
    match scope {
        Scope::System if global.state.is_none() => {
            Ok(StateDir::resolve(Some(PathBuf::from(SYSTEM_STATE)))?)
        }
        _ => global.state(),
    }
}

fn install(global: &Global, args: &InstallArgs) -> Result<Vec<Step>, CliError> {
    let scope = scope(args.user)?;
    let program = std::env::current_exe()
        .map_err(|error| CliError::new(Exit::Failed, "cannot find this program").because(error))?;
    let state = state(global, scope)?;
    let template = match scope {
        Scope::System => SYSTEM_SERVICE,
        Scope::User => USER_SERVICE,
    };
    let text = template
        .replace("@PROGRAM@", &program.display().to_string())
        .replace("@STATE@", &state.path().display().to_string());
    let unit = systemd::unit_folder(scope).map_err(no_home)?.join("cortex-agent.service");
    let mut steps = vec![
        Step::Write { path: unit, text },
        Step::RunWithSystemd(systemctl(scope, &["daemon-reload"])),
        Step::Run(systemctl(scope, &["enable", "cortex-agent.service"])),
    ];
    if scope == Scope::User {
        steps.push(Step::Try(vec!["loginctl".to_owned(), "enable-linger".to_owned()]));
    }
    // It is ready only when the hub has answered: nobody waits for that here.
    let restart = ["restart", "--no-block", "cortex-agent.service"];
    steps.push(Step::RunWithSystemd(systemctl(scope, &restart)));
    Ok(steps)
}

fn uninstall(global: &Global, args: &UninstallArgs) -> Result<Vec<Step>, CliError> {
    let scope = scope(args.user)?;
    let unit = systemd::unit_folder(scope).map_err(no_home)?.join("cortex-agent.service");
    let mut steps = vec![
        Step::Try(systemctl(scope, &["disable", "--now", "cortex-agent.service"])),
        Step::Remove(unit),
        Step::RunWithSystemd(systemctl(scope, &["daemon-reload"])),
    ];
    if args.purge {
        steps.push(Step::RemoveTree(state(global, scope)?.path().to_owned()));
    }
    Ok(steps)
}
