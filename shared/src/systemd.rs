//! Installing a program as a systemd service: a plan of steps that can be shown before it is carried
//! out, and carried out again at any time.
//!
//! Each step leaves either what was there or what should be there; an installation that was
//! interrupted is completed by running it again.

use std::collections::HashSet;
use std::fmt;
use std::io;
use std::os::unix::fs::MetadataExt as _;
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
    /// The same, left out where each of these units runs with what is there. What it says is told.
    Renew {
        /// The command.
        command: Vec<String>,
        /// What has to run with it.
        units: Vec<Unit>,
    },
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
            Self::Renew { command, units } => {
                let names: Vec<&str> = units.iter().map(|unit| unit.name).collect();
                let command = command.join(" ");
                write!(f, "run {command} unless it is up to date: {}", names.join(", "))
            }
        }
    }
}

/// What became of a step.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Outcome {
    /// Done now.
    Done,
    /// Done now, with these words.
    Said(String),
    /// There was nothing to do.
    Unchanged,
    /// Left out, and why.
    Skipped(String),
}

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Done => f.write_str("done"),
            Self::Said(words) => f.write_str(words),
            Self::Unchanged => f.write_str("nothing to do"),
            Self::Skipped(why) => write!(f, "left out: {why}"),
        }
    }
}

/// A unit of systemd, and what it is made of.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unit {
    /// Whose.
    pub scope: Scope,
    /// Its name.
    pub name: &'static str,
    /// The program that it runs; none for a socket.
    pub program: Option<PathBuf>,
    /// Files that it is given once, when it starts.
    pub files: Vec<PathBuf>,
}

/// What systemd says of a unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct UnitState {
    /// Whether it runs, or is about to.
    pub active: bool,
    /// Its process, if it has one.
    pub process: Option<u32>,
    /// When it started, in seconds since the Unix epoch.
    pub started_s: Option<i64>,
}

impl Unit {
    /// How it is.
    ///
    /// # Errors
    /// If systemd cannot be asked.
    pub fn state(&self) -> io::Result<UnitState> {
        let asked = "--property=ActiveState,MainPID,ExecMainStartTimestamp,ActiveEnterTimestamp";
        let command = systemctl(self.scope, &["show", "--timestamp=unix", asked, self.name]);
        Ok(parse_state(&output_of(&command)?, self.program.is_some()))
    }

    /// Whether it runs with the program and the files that are there now. Where that cannot be told, it does
    /// not: a restart too many is better than one too few.
    fn is_current(&self) -> bool {
        let Ok(UnitState { active: true, process, started_s: Some(started_s) }) = self.state()
        else {
            return false;
        };
        let same_program = |program: &Path, process: Option<u32>| {
            let running = std::fs::metadata(format!("/proc/{}/exe", process?)).ok()?;
            let there = std::fs::metadata(program).ok()?;
            Some((running.dev(), running.ino()) == (there.dev(), there.ino()))
        };
        let unchanged = |file: &PathBuf| {
            std::fs::metadata(file).is_ok_and(|metadata| metadata.mtime() <= started_s)
        };
        self.program.as_deref().is_none_or(|it| same_program(it, process) == Some(true))
            && self.files.iter().all(unchanged)
    }
}

/// Reads what `systemctl show` prints.
fn parse_state(text: &str, has_program: bool) -> UnitState {
    let value = |name: &str| {
        let mut lines = text.lines().filter_map(|line| line.split_once('='));
        lines.find(|(key, _)| *key == name).map_or("", |(_, value)| value)
    };
    let since = if has_program { "ExecMainStartTimestamp" } else { "ActiveEnterTimestamp" };
    UnitState {
        active: matches!(value("ActiveState"), "active" | "activating" | "reloading"),
        process: value("MainPID").parse().ok().filter(|process| *process != 0),
        started_s: value(since).strip_prefix('@').and_then(|seconds| seconds.parse().ok()),
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

/// The link by which a unit is enabled: what `systemctl disable` removes, where it can be asked.
///
/// # Errors
/// For a user without a home directory.
pub fn enabling_link(scope: Scope, unit: &str) -> io::Result<PathBuf> {
    let target = match scope {
        _ if unit.ends_with(".socket") => "sockets.target.wants",
        Scope::System => "multi-user.target.wants",
        Scope::User => "default.target.wants",
    };
    Ok(unit_folder(scope)?.join(target).join(unit))
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
    let mut written = HashSet::new();
    for step in steps {
        if dry_run {
            tell(step, None);
            continue;
        }
        let outcome = perform(step, &written)?;
        if let (Step::Write { path, .. } | Step::WriteNew { path, .. }, Outcome::Done) =
            (step, &outcome)
        {
            written.insert(path.clone());
        }
        tell(step, Some(&outcome));
    }
    Ok(())
}

/// Carries out one step; `written` are the files that those before it have changed.
///
/// # Errors
/// What the system said.
fn perform(step: &Step, written: &HashSet<PathBuf>) -> Result<Outcome, StepError> {
    let absent = |command: &[String]| {
        // Whose manager it is stands in the command.
        let user = command.iter().any(|argument| argument == "--user");
        let scope = if user { Scope::User } else { Scope::System };
        let why = match scope {
            _ if is_running(scope) => return None,
            Scope::System => "systemd does not run here",
            Scope::User => "this user has no service manager here",
        };
        Some(Ok(Outcome::Skipped(why.to_owned())))
    };
    let outcome = match step {
        Step::CreateUser { name, home } => create_user(name, home),
        Step::Write { path, text } => write(path, text),
        Step::WriteNew { path, .. } if path.exists() => Ok(Outcome::Unchanged),
        Step::WriteNew { path, text } => write(path, text),
        Step::Remove(path) => removed(std::fs::remove_file(path)),
        Step::RemoveTree(path) => removed(std::fs::remove_dir_all(path)),
        Step::Run(command) => run(command),
        Step::RunWithSystemd(command) => absent(command).unwrap_or_else(|| run(command)),
        Step::Renew { command, units } => absent(command).unwrap_or_else(|| {
            let untouched = |unit: &Unit| !unit.files.iter().any(|file| written.contains(file));
            if units.iter().all(|unit| untouched(unit) && unit.is_current()) {
                return Ok(Outcome::Unchanged);
            }
            let said = output_of(command)?;
            match said.trim().lines().last() {
                Some(words) => Ok(Outcome::Said(words.to_owned())),
                None => Ok(Outcome::Done),
            }
        }),
        Step::Try(command) => {
            Ok(run(command).unwrap_or_else(|error| Outcome::Skipped(error.to_string())))
        }
    };
    outcome.map_err(|source| StepError { step: step.to_string(), source })
}

/// Whether systemd is this machine's service manager, as `sd_booted(3)` says it; for a user, whether it can
/// be asked: without a session there is none.
fn is_running(scope: Scope) -> bool {
    match scope {
        Scope::System => Path::new("/run/systemd/system").is_dir(),
        Scope::User => run(&systemctl(scope, &["show-environment"])).is_ok(),
    }
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
    // One that is there keeps its owner, and who may read it.
    let before = std::fs::metadata(path).ok();
    let mode = before.as_ref().map_or(0o644, |before| before.mode() & 0o777);
    durable::write_file(path, text.as_bytes(), mode)?;
    if let Some(before) = before {
        std::os::unix::fs::chown(path, Some(before.uid()), Some(before.gid()))?;
    }
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
    output_of(command).map(|_| Outcome::Done)
}

/// What a command that succeeds prints.
fn output_of(command: &[String]) -> io::Result<String> {
    let (program, arguments) = command
        .split_first()
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "an empty command"))?;
    let output =
        Command::new(program).args(arguments).stdin(std::process::Stdio::null()).output()?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    let said = said.trim().lines().last().unwrap_or_default();
    Err(io::Error::other(format!("{} ({said})", output.status)))
}

/// A path as it stands between quotes in a unit file, where some characters have a meaning.
#[must_use]
pub fn in_quotes(path: &Path) -> String {
    let mut text = String::new();
    for character in path.display().to_string().chars() {
        match character {
            '"' | '\\' => text.extend(['\\', character]),
            // What follows it stands for something that systemd knows.
            '%' => text.push_str("%%"),
            _ => text.push(character),
        }
    }
    text
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
            steps.iter().map(|step| perform(step, &HashSet::new()).unwrap()).collect()
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
        let error = perform(&Step::Run(command.clone()), &HashSet::new()).unwrap_err();
        assert!(error.source.to_string().contains("no room"), "{error:?}");
        let outcome = perform(&Step::Try(command), &HashSet::new()).unwrap();
        assert!(matches!(outcome, Outcome::Skipped(why) if why.contains("no room")));
    }

    #[test]
    fn what_systemd_says_of_a_unit() {
        let text = "ActiveState=activating\nMainPID=17\nExecMainStartTimestamp=@1700000000\nActiveEnterTimestamp=\n";
        let state = UnitState { active: true, process: Some(17), started_s: Some(1_700_000_000) };
        assert_eq!(parse_state(text, true), state);
        assert_eq!(parse_state(text, false), UnitState { started_s: None, ..state });
        let stopped =
            "ActiveState=inactive\nMainPID=0\nExecMainStartTimestamp=Mon 2026-01-05 UTC\n";
        let nothing = UnitState { active: false, process: None, started_s: None };
        assert_eq!(parse_state(stopped, true), nothing);
        assert_eq!(parse_state("", true), nothing);
    }

    #[test]
    fn a_path_in_a_unit_means_itself() {
        for (path, expected) in
            [("/usr/bin/x", "/usr/bin/x"), ("/a b/x", "/a b/x"), (r#"/a"b\c%d"#, r#"/a\"b\\c%%d"#)]
        {
            assert_eq!(in_quotes(Path::new(path)), expected);
        }
    }
}
