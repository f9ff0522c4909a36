//! Installing a program as a systemd service: a plan of steps that can be shown before it is carried
//! out, and carried out again at any time.
//!
//! Each step leaves either what was there or what should be there; an installation that was
//! interrupted is completed by running it again.

use std::fmt;
use std::io;
use std::path::{Path, PathBuf};
use std::process::Command;

use crate::durable;

/// Whose service it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scope {
    /// The machine's: started at boot.
    System,
    /// This user's.
    User,
}

/// One step of a plan.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Step {
    /// A system user without a login, who owns `home`.
    CreateUser {
        /// Its name, and that of its group.
        name: &'static str,
        /// Its home directory, which is not created by this step.
        home: PathBuf,
    },
    /// A file with this text, replaced whole.
    Write {
        /// Where.
        path: PathBuf,
        /// What.
        text: String,
    },
    /// The same, unless there is one: it is its owner's to change.
    WriteNew {
        /// Where.
        path: PathBuf,
        /// What.
        text: String,
    },
    /// No file there.
    Remove(PathBuf),
    /// No directory there, nor anything in it.
    RemoveTree(PathBuf),
    /// A command that has to succeed.
    Run(Vec<String>),
    /// A command that only makes sense where systemd runs.
    RunWithSystemd(Vec<String>),
    /// A command that is a courtesy: failing, it is said and no more.
    Try(Vec<String>),
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::CreateUser { name, home } => {
                write!(f, "create system user {name} ({})", home.display())
            }
            Self::Write { path, .. } => write!(f, "write {}", path.display()),
            Self::WriteNew { path, .. } => write!(f, "write {} if it is not there", path.display()),
            Self::Remove(path) | Self::RemoveTree(path) => write!(f, "remove {}", path.display()),
            Self::Run(command) | Self::RunWithSystemd(command) | Self::Try(command) => {
                write!(f, "run {}", command.join(" "))
            }
        }
    }
}

/// What became of a step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Done now.
    Done,
    /// There was nothing to do.
    Unchanged,
    /// Left out, and why.
    Skipped(String),
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Done => f.write_str("done"),
            Self::Unchanged => f.write_str("nothing to do"),
            Self::Skipped(why) => write!(f, "left out: {why}"),
        }
    }
}

/// A step that failed.
#[derive(Debug, thiserror::Error)]
#[error("cannot {step}")]
pub struct StepError {
    /// Which.
    pub step: String,
    /// Why.
    #[source]
    pub source: io::Error,
}

/// Where unit files go.
///
/// # Errors
/// For a user without a home directory.
pub fn unit_folder(scope: Scope) -> io::Result<PathBuf> {
    match scope {
        Scope::System => Ok(PathBuf::from("/etc/systemd/system")),
        Scope::User => Ok(user_configuration()?.join("systemd/user")),
    }
}

/// Where the configuration of the mesh's programs goes.
///
/// # Errors
/// For a user without a home directory.
pub fn configuration_folder(scope: Scope) -> io::Result<PathBuf> {
    match scope {
        Scope::System => Ok(PathBuf::from("/etc/cortex")),
        Scope::User => Ok(user_configuration()?.join("cortex")),
    }
}

fn user_configuration() -> io::Result<PathBuf> {
    let variable =
        |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
    variable("XDG_CONFIG_HOME")
        .or_else(|| variable("HOME").map(|home| home.join(".config")))
        .ok_or_else(|| io::Error::new(io::ErrorKind::NotFound, "this user has no home directory"))
}

/// `systemctl` for this scope with these arguments.
#[must_use]
pub fn systemctl(scope: Scope, arguments: &[&str]) -> Vec<String> {
    let user = (scope == Scope::User).then_some("--user");
    ["systemctl"]
        .into_iter()
        .chain(user)
        .chain(arguments.iter().copied())
        .map(str::to_owned)
        .collect()
}

/// Carries out a plan, or only shows it; `tell` hears of each step, with what became of it.
///
/// # Errors
/// The first step that failed; those after it were not tried.
pub fn carry_out(
    steps: &[Step],
    dry_run: bool,
    mut tell: impl FnMut(&Step, Option<&Outcome>),
) -> Result<(), StepError> {
    for step in steps {
        if dry_run {
            tell(step, None);
            continue;
        }
        let outcome = perform(step)?;
        tell(step, Some(&outcome));
    }
    Ok(())
}

/// Carries out one step.
///
/// # Errors
/// What the system said.
fn perform(step: &Step) -> Result<Outcome, StepError> {
    let outcome = match step {
        Step::CreateUser { name, home } => create_user(name, home),
        Step::Write { path, text } => write(path, text),
        Step::WriteNew { path, .. } if path.exists() => Ok(Outcome::Unchanged),
        Step::WriteNew { path, text } => write(path, text),
        Step::Remove(path) => removed(std::fs::remove_file(path)),
        Step::RemoveTree(path) => removed(std::fs::remove_dir_all(path)),
        Step::Run(command) => run(command),
        Step::RunWithSystemd(_) if !is_running() => {
            Ok(Outcome::Skipped("systemd does not run here".to_owned()))
        }
        Step::RunWithSystemd(command) => run(command),
        Step::Try(command) => {
            Ok(run(command).unwrap_or_else(|error| Outcome::Skipped(error.to_string())))
        }
    };
    outcome.map_err(|source| StepError { step: step.to_string(), source })
}

/// Whether systemd is this machine's service manager, as `sd_booted(3)` says it.
fn is_running() -> bool {
    Path::new("/run/systemd/system").is_dir()
}

fn create_user(name: &str, home: &Path) -> io::Result<Outcome> {
    if std::fs::read_to_string("/etc/passwd")?
        .lines()
        .any(|line| line.split(':').next() == Some(name))
    {
        return Ok(Outcome::Unchanged);
    }
    let home = home.display().to_string();
    run(&[
        "useradd",
        "--system",
        "--user-group",
        "--no-create-home",
        "--home-dir",
        &home,
        "--shell",
        "/usr/sbin/nologin",
        name,
    ]
    .map(str::to_owned))
}

fn write(path: &Path, text: &str) -> io::Result<Outcome> {
    if std::fs::read(path).is_ok_and(|old| old == text.as_bytes()) {
        return Ok(Outcome::Unchanged);
    }
    if let Some(folder) = path.parent() {
        std::fs::create_dir_all(folder)?;
    }
    durable::write_file(path, text.as_bytes(), 0o644)?;
    Ok(Outcome::Done)
}

fn removed(result: io::Result<()>) -> io::Result<Outcome> {
    match result {
        Ok(()) => Ok(Outcome::Done),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(Outcome::Unchanged),
        Err(error) => Err(error),
    }
}

fn run(command: &[String]) -> io::Result<Outcome> {
    let (program, arguments) = command
        .split_first()
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "an empty command"))?;
    let output =
        Command::new(program).args(arguments).stdin(std::process::Stdio::null()).output()?;
    if output.status.success() {
        return Ok(Outcome::Done);
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let said = said.trim().lines().last().unwrap_or_default();
    Err(io::Error::other(format!("{} ({said})", output.status)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plan_can_be_carried_out_again_and_taken_back() {
        let folder = tempfile::tempdir().unwrap();
        let unit = folder.path().join("units/x.service");
        let settings = folder.path().join("x.toml");
        let steps = |text: &str| {
            [
                Step::Write { path: unit.clone(), text: text.to_owned() },
                Step::WriteNew { path: settings.clone(), text: text.to_owned() },
            ]
        };
        let all = |steps: &[Step]| -> Vec<Outcome> {
            steps.iter().map(|step| perform(step).unwrap()).collect()
        };
        assert_eq!(all(&steps("a")), [Outcome::Done, Outcome::Done]);
        assert_eq!(all(&steps("a")), [Outcome::Unchanged, Outcome::Unchanged]);
        assert_eq!(all(&steps("b")), [Outcome::Done, Outcome::Unchanged]);
        assert_eq!(std::fs::read_to_string(&unit).unwrap(), "b");
        assert_eq!(std::fs::read_to_string(&settings).unwrap(), "a");
        let back = [Step::Remove(unit.clone()), Step::RemoveTree(folder.path().join("units"))];
        assert_eq!(all(&back), [Outcome::Done, Outcome::Done]);
        assert_eq!(all(&back), [Outcome::Unchanged, Outcome::Unchanged]);
    }

    #[test]
    fn a_command_that_fails_is_an_error_with_what_it_said_unless_it_is_a_courtesy() {
        let command: Vec<String> =
            ["sh", "-c", "echo first >&2; echo no room >&2; exit 3"].map(str::to_owned).to_vec();
        let error = perform(&Step::Run(command.clone())).unwrap_err();
        assert!(error.source.to_string().contains("no room"), "{error:?}");
        let outcome = perform(&Step::Try(command)).unwrap();
        assert!(matches!(outcome, Outcome::Skipped(why) if why.contains("no room")));
    }
}
