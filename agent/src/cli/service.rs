//! `service install`, `restart` and `uninstall`: this node's agent as a systemd service.
//!
//! A restart ends the commands that run. So one that is asked for while some do is left to the agent, which
//! ends when they have, and systemd starts it again.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, Subcommand};
use cortex_proto::v1;
use cortex_shared::systemd::{self, Scope, Step, StepError, Unit, systemctl};

use super::error::{CliError, Exit};
use super::printer::{Format, Printer};
use super::{Global, hub, local};
use crate::config::StateDir;

const UNIT: &str = "cortex-agent.service";
/// How long an agent may take to say what it runs.
const ANSWER_TIME: Duration = Duration::from_secs(10);
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
The node joins first (`cortex-agent join`). Run again after an upgrade: nothing that is there is lost, and
the agent restarts if something has changed, as `service restart` does.")]
    Install(InstallArgs),
    /// Restart the service as soon as no command runs, so that none is ended by it
    #[command(after_help = "\
With no command running, it restarts at once. Otherwise this does not wait: the agent ends by itself at the
first moment at which none runs, and systemd starts it again, as a new version if one was installed.
Commands are accepted until then. --now ends those that run.")]
    Restart(RestartArgs),
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
struct RestartArgs {
    /// The service of this user, not that of the machine
    #[arg(long)]
    user: bool,
    /// Do not wait for the commands that run: they are ended
    #[arg(long)]
    now: bool,
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

pub(crate) async fn service(global: &Global, args: &ServiceArgs) -> Result<(), CliError> {
    let (steps, dry_run) = match &args.verb {
        ServiceVerb::Install(args) => (install(global, args)?, args.dry_run),
        ServiceVerb::Restart(args) => return restart(global, args).await,
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
    Ok(match (&global.state, scope) {
        (Some(_), _) => global.state()?,
        (None, Scope::System) => StateDir::resolve(Some(PathBuf::from(SYSTEM_STATE)))?,
        (None, Scope::User) => StateDir::of_user()?,
    })
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
        .replace("@PROGRAM@", &systemd::in_quotes(&program))
        .replace("@STATE@", &systemd::in_quotes(state.path()));
    let file = systemd::unit_folder(scope).map_err(no_home)?.join(UNIT);
    let mut steps = vec![
        Step::Write { path: file.clone(), text },
        Step::RunWithSystemd(systemctl(scope, &["daemon-reload"])),
        Step::Run(systemctl(scope, &["enable", UNIT])),
    ];
    if scope == Scope::User {
        steps.push(Step::Linger);
    }
    let mut command = vec![program.display().to_string()];
    if let Some(state) = &global.state {
        command.extend(["--state".to_owned(), state.display().to_string()]);
    }
    command.extend(["service", "restart"].map(str::to_owned));
    command.extend((scope == Scope::User).then(|| "--user".to_owned()));
    let unit = Unit { scope, name: UNIT, program: Some(program), files: vec![file] };
    steps.push(Step::Renew { command, units: vec![unit] });
    Ok(steps)
}

/// Restarts it now if that ends nothing, and as soon as it does not otherwise.
async fn restart(global: &Global, args: &RestartArgs) -> Result<(), CliError> {
    let scope = scope(args.user)?;
    let no_systemd =
        |error| CliError::new(Exit::Failed, "the service manager did not do it").because(error);
    let (way, text) = match systemd::main_process(scope, UNIT).map_err(no_systemd)? {
        Some(process) if !args.now => {
            let running = running(&state(global, scope)?).await;
            gently(waits_for_commands(process), running)
        }
        Some(_) => (Way::Now, "restarted".to_owned()),
        None => (Way::Now, "started".to_owned()),
    };
    let arguments: &[&str] = match way {
        // Also if none runs: only the agent can see to it that none begins before it ends.
        Way::WhenIdle => &["kill", "--kill-who=main", "--signal=USR1", UNIT],
        // It is ready only when the hub has answered: nobody waits for that here.
        Way::Now => &["restart", "--no-block", UNIT],
        Way::NotAtAll => &[],
    };
    if !arguments.is_empty() {
        run(systemctl(scope, arguments)).map_err(no_systemd)?;
    }
    Printer::stdout(Format::Table, global.color).raw(format!("{text}\n").as_bytes())
}

/// How an agent is restarted.
#[derive(Debug, PartialEq, Eq)]
enum Way {
    /// By itself, when nothing is at work.
    WhenIdle,
    /// At once.
    Now,
    /// It would end what runs.
    NotAtAll,
}

/// How an agent is restarted that runs `running` commands, if that can be told, so that none is ended; and the
/// words for it.
fn gently(waits_for_commands: bool, running: Option<u32>) -> (Way, String) {
    let commands = match running {
        Some(1) => "1 command runs".to_owned(),
        Some(running) => format!("{running} commands run"),
        None => "it cannot be told how many commands run".to_owned(),
    };
    let end_them = "`service restart --now` ends them";
    match (waits_for_commands, running) {
        // Files may be copied just then, for which it waits as well.
        (true, Some(0)) => {
            (Way::WhenIdle, "it restarts as soon as nothing is at work here".to_owned())
        }
        (true, _) => {
            let text = format!(
                "it restarts when nothing is at work here any more; {commands} now ({end_them})"
            );
            (Way::WhenIdle, text)
        }
        (false, Some(0)) => (Way::Now, "restarted".to_owned()),
        (false, _) => {
            let text = format!(
                "not restarted: {commands} here, and the agent that runs cannot wait for them; {end_them}"
            );
            (Way::NotAtAll, text)
        }
    }
}

/// How many commands the agent with this state runs, if it answers.
async fn running(state: &StateDir) -> Option<u32> {
    let asked = async {
        let mut agent = local::agent_of(state).await.ok()?;
        let status = agent.agent_status(hub::question(v1::AgentStatusRequest {})).await.ok()?;
        Some(status.into_inner().running_tasks)
    };
    // One that hangs may take the connection and never answer.
    tokio::time::timeout(ANSWER_TIME, asked).await.ok().flatten()
}

/// Whether this agent has something to do on SIGUSR1, which ends one that has not.
fn waits_for_commands(process: u32) -> bool {
    let status =
        std::fs::read_to_string(Path::new("/proc").join(process.to_string()).join("status"));
    status.is_ok_and(|status| catches_user_signal(&status))
}

/// Whether a process with this `/proc/PID/status` catches SIGUSR1.
fn catches_user_signal(status: &str) -> bool {
    let caught = status.lines().find_map(|line| line.strip_prefix("SigCgt:"));
    let caught = caught.and_then(|mask| u64::from_str_radix(mask.trim(), 16).ok());
    // Signals count from 1, and this is the tenth.
    caught.is_some_and(|mask| mask & (1 << 9) != 0)
}

fn run(command: Vec<String>) -> std::io::Result<()> {
    let done = systemd::carry_out(&[Step::Run(command)], false, |_, _| {});
    done.map_err(|error| error.source)
}

fn uninstall(global: &Global, args: &UninstallArgs) -> Result<Vec<Step>, CliError> {
    let scope = scope(args.user)?;
    let units = systemd::unit_folder(scope).map_err(no_home)?;
    let mut steps = vec![
        Step::Try(systemctl(scope, &["disable", "--now", UNIT])),
        Step::Remove(units.join(UNIT)),
        // Where no service manager could be asked, it is enabled still.
        Step::Remove(systemd::enabling_link(scope, UNIT).map_err(no_home)?),
        Step::RunWithSystemd(systemctl(scope, &["daemon-reload"])),
    ];
    if args.purge {
        steps.push(Step::RemoveTree(state(global, scope)?.path().to_owned()));
    }
    Ok(steps)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_restart_ends_no_command_and_says_when_it_is() {
        for (waits, running, way, words) in [
            (true, Some(0), Way::WhenIdle, "as soon as nothing is at work"),
            (
                true,
                Some(1),
                Way::WhenIdle,
                "restarts when nothing is at work here any more; 1 command runs",
            ),
            (true, Some(2), Way::WhenIdle, "2 commands run now (`service restart --now` ends"),
            (true, None, Way::WhenIdle, "cannot be told how many commands run"),
            (false, Some(0), Way::Now, "restarted"),
            (false, Some(1), Way::NotAtAll, "not restarted: 1 command runs here"),
            (
                false,
                None,
                Way::NotAtAll,
                "not restarted: it cannot be told how many commands run here",
            ),
        ] {
            let (found, text) = gently(waits, running);
            assert_eq!(found, way, "{waits} {running:?}");
            assert!(text.contains(words), "{text}");
        }
    }

    #[test]
    fn whether_a_process_catches_the_signal() {
        for (line, catches) in [
            ("SigCgt:\t0000000000000200", true),
            ("SigCgt:\t0000000188004203", true),
            ("SigCgt:\t0000000188004003", false),
            ("SigIgn:\t0000000000000200", false),
            ("SigCgt:\tnonsense", false),
        ] {
            let status = format!("Name:\tcortex-agent\n{line}\nThreads:\t1\n");
            assert_eq!(catches_user_signal(&status), catches, "{line}");
        }
        // A program that catches nothing would be ended by it.
        assert!(!waits_for_commands(0));
    }
}
