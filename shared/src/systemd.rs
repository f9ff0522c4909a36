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

use jiff::civil::DateTime;
use jiff::tz::TimeZone;

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
    /// Restarts those of these units that do not run with what is there, and with any of them the last, which is
    /// given what the others hold. The service manager is asked for all of it at once: it is done also if what
    /// asked goes away, such as the terminal of an administrator.
    Restart(Vec<Unit>),
    /// A command that is a courtesy: failing, it is said and no more.
    Try(Vec<String>),
    /// Lets this user's services run while he is not logged in. Who may not ask for it is told what follows, and
    /// who may.
    Linger,
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
                let command = command.join(" ");
                write!(f, "run {command} unless it is up to date: {}", names(units).join(", "))
            }
            Self::Restart(units) => {
                write!(f, "restart unless it is up to date: {}", names(units).join(", "))
            }
            Self::Linger => write!(f, "run {}", loginctl(&["enable-linger"]).join(" ")),
        }
    }
}

fn names(units: &[Unit]) -> Vec<&'static str> {
    units.iter().map(|unit| unit.name).collect()
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
struct UnitState {
    /// Whether it runs, or is about to.
    active: bool,
    /// Its process, if it has one.
    process: Option<u32>,
    /// When it started, in seconds since the Unix epoch.
    started_s: Option<i64>,
}

/// Which program a process runs.
enum Running {
    /// The file with this device and inode.
    File(u64, u64),
    /// This user may not look: so it is with one that hides its memory, as the hub does.
    Hidden,
}

impl Unit {
    /// How it is.
    ///
    /// # Errors
    /// If systemd cannot be asked.
    fn state(&self) -> io::Result<UnitState> {
        let asked = "--property=ActiveState,MainPID,ExecMainStartTimestamp,ActiveEnterTimestamp";
        // Times are in this zone's words; a number is told by the newest versions only.
        let environment = [("TZ", "UTC"), ("LC_ALL", "C")];
        let text = output_with(&systemctl(self.scope, &["show", asked, self.name]), &environment)?;
        Ok(parse_state(&text, self.program.is_some()))
    }

    /// Whether it runs with the program and the files that are there now. Where that cannot be told, it does
    /// not: a restart too many is better than one too few.
    fn is_current(&self) -> bool {
        let Ok(UnitState { active: true, process, started_s: Some(started_s) }) = self.state()
        else {
            return false;
        };
        let unchanged = |file: &PathBuf| {
            std::fs::metadata(file).is_ok_and(|metadata| metadata.mtime() <= started_s)
        };
        let same_program = |program: &Path| {
            let running = process.and_then(running_program);
            running.is_some_and(|running| is_program(&running, program, started_s))
        };
        self.program.as_deref().is_none_or(same_program) && self.files.iter().all(unchanged)
    }
}

/// What this process runs; nothing if there is no such process.
fn running_program(process: u32) -> Option<Running> {
    match std::fs::metadata(format!("/proc/{process}/exe")) {
        Ok(running) => Some(Running::File(running.dev(), running.ino())),
        Err(error) if error.kind() == io::ErrorKind::PermissionDenied => Some(Running::Hidden),
        Err(_) => None,
    }
}

/// Whether that is this program, for a process that started at this second.
fn is_program(running: &Running, program: &Path, started_s: i64) -> bool {
    let Ok(there) = std::fs::metadata(program) else { return false };
    match *running {
        Running::File(device, inode) => (device, inode) == (there.dev(), there.ino()),
        // Putting a program into place changes this time, whatever time its file had.
        Running::Hidden => there.ctime() < started_s,
    }
}

/// The process of a service, if it has one.
///
/// # Errors
/// If systemd cannot be asked.
pub fn main_process(scope: Scope, name: &str) -> io::Result<Option<u32>> {
    let process = output_of(&systemctl(scope, &["show", "--property=MainPID", "--value", name]))?;
    Ok(process.trim().parse().ok().filter(|process| *process != 0))
}

/// Reads what `systemctl show` prints.
fn parse_state(text: &str, has_program: bool) -> UnitState {
    let value = |name: &str| {
        let mut lines = text.lines().filter_map(|line| line.split_once('='));
        lines.find(|(key, _)| *key == name).map_or("", |(_, value)| value)
    };
    let since = if has_program { "ExecMainStartTimestamp" } else { "ActiveEnterTimestamp" };
    let started = DateTime::strptime("%a %Y-%m-%d %H:%M:%S UTC", value(since));
    UnitState {
        active: matches!(value("ActiveState"), "active" | "activating" | "reloading"),
        process: value("MainPID").parse().ok().filter(|process| *process != 0),
        started_s: (started.and_then(|started| started.to_zoned(TimeZone::UTC)).ok())
            .map(|started| started.timestamp().as_second()),
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
        absent(if user { Scope::User } else { Scope::System }).map(Ok)
    };
    let current =
        |unit: &Unit| !unit.files.iter().any(|file| written.contains(file)) && unit.is_current();
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
            if units.iter().all(current) {
                return Ok(Outcome::Unchanged);
            }
            let said = output_of(command)?;
            match said.trim().lines().last() {
                Some(words) => Ok(Outcome::Said(words.to_owned())),
                None => Ok(Outcome::Done),
            }
        }),
        Step::Restart(units) => match restart_of(units, current) {
            None => Ok(Outcome::Unchanged),
            Some(command) => absent(&command).unwrap_or_else(|| {
                run(&command)?;
                Ok(Outcome::Said(format!("done: {}", command.join(" "))))
            }),
        },
        Step::Try(command) => {
            Ok(run(command).unwrap_or_else(|error| Outcome::Skipped(error.to_string())))
        }
        Step::Linger => Ok(self::absent(Scope::User).unwrap_or_else(linger)),
    };
    outcome.map_err(|source| StepError { step: step.to_string(), source })
}

/// The command that restarts what is to be restarted of these, if anything is.
fn restart_of(units: &[Unit], is_current: impl Fn(&Unit) -> bool) -> Option<Vec<String>> {
    let (last, others) = units.split_last()?;
    let mut names: Vec<&str> =
        others.iter().filter(|unit| !is_current(unit)).map(|unit| unit.name).collect();
    if names.is_empty() && is_current(last) {
        return None;
    }
    names.push(last.name);
    let restart: Vec<&str> = std::iter::once("restart").chain(names).collect();
    Some(systemctl(last.scope, &restart))
}

/// Whether systemd is this machine's service manager, as `sd_booted(3)` says it; for a user, whether it can
/// be asked: without a session there is none.
fn is_running(scope: Scope) -> bool {
    match scope {
        Scope::System => Path::new("/run/systemd/system").is_dir(),
        Scope::User => run(&systemctl(scope, &["show-environment"])).is_ok(),
    }
}

/// What becomes of a step whose service manager is not there.
fn absent(scope: Scope) -> Option<Outcome> {
    let why = match scope {
        _ if is_running(scope) => return None,
        Scope::System => "systemd does not run here",
        Scope::User => "this user has no service manager here",
    };
    Some(Outcome::Skipped(why.to_owned()))
}

fn linger() -> Outcome {
    let lingers = output_of(&loginctl(&["show-user", "--property=Linger", "--value"]));
    if lingers.is_ok_and(|lingers| lingers.trim() == "yes") {
        return Outcome::Unchanged;
    }
    let enable = loginctl(&["enable-linger"]);
    run(&enable).unwrap_or_else(|error| {
        let hint = enable.join(" ");
        Outcome::Skipped(format!(
            "{error}: it stops when this user logs out (hint: {hint}, as root)"
        ))
    })
}

/// About this user, by number: without it, it is the session that is asked for its user, and there may be none, as
/// under `su`.
fn loginctl(arguments: &[&str]) -> Vec<String> {
    let user = rustix::process::getuid().as_raw().to_string();
    let words = ["loginctl"].into_iter().chain(arguments.iter().copied()).chain([&*user]);
    words.map(str::to_owned).collect()
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
    output_with(command, &[])
}

/// The same with these variables in its environment.
fn output_with(command: &[String], environment: &[(&str, &str)]) -> io::Result<String> {
    let (program, arguments) = command
        .split_first()
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidInput, "an empty command"))?;
    let output = Command::new(program)
        .args(arguments)
        .envs(environment.iter().copied())
        .stdin(std::process::Stdio::null())
        .output()?;
    if output.status.success() {
        return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(io::Error::other(format!("{} ({})", output.status, what_failed(&said))))
}

/// The line that says what failed: in ours the error, behind which are causes and a hint, and the last in
/// what others print.
fn what_failed(said: &str) -> &str {
    let mut lines = said.lines().map(str::trim);
    let error = lines.clone().find(|line| line.starts_with("error:"));
    error.or_else(|| lines.rfind(|line| !line.is_empty())).unwrap_or_default()
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
    fn of_what_a_failed_command_said_the_error_is_told() {
        for (said, expected) in [
            ("error: no room\n  because: the disk\nhint: buy one\n", "error: no room"),
            ("note: x\nerror: first\nerror: second", "error: first"),
            ("warning\nJob failed.\n\n", "Job failed."),
            ("", ""),
        ] {
            assert_eq!(what_failed(said), expected);
        }
    }

    #[test]
    fn what_systemd_says_of_a_unit() {
        let text = "ActiveState=activating\nMainPID=17\nExecMainStartTimestamp=Tue 2023-11-14 22:13:20 UTC\nActiveEnterTimestamp=\n";
        let state = UnitState { active: true, process: Some(17), started_s: Some(1_700_000_000) };
        assert_eq!(parse_state(text, true), state);
        assert_eq!(parse_state(text, false), UnitState { started_s: None, ..state });
        let nothing = UnitState { active: false, process: None, started_s: None };
        for time in ["", "n/a", "Mon 2026-01-05 10:00:00 CET", "2026-01-05"] {
            let stopped =
                format!("ActiveState=inactive\nMainPID=0\nExecMainStartTimestamp={time}\n");
            assert_eq!(parse_state(&stopped, true), nothing, "{time}");
        }
        assert_eq!(parse_state("", true), nothing);
    }

    #[test]
    fn a_process_runs_a_program_or_it_does_not_also_where_it_cannot_be_looked_at() {
        let folder = tempfile::tempdir().unwrap();
        let other = folder.path().join("other");
        std::fs::write(&other, "x").unwrap();
        let placed_s = std::fs::metadata(&other).unwrap().ctime();
        let this = std::env::current_exe().unwrap();
        let running = running_program(std::process::id()).unwrap();
        assert!(matches!(running, Running::File(..)));
        for (running, program, started_s, expected) in [
            (&running, &this, 0, true),
            (&running, &other, i64::MAX, false),
            // One that was put there in the same second may be another.
            (&Running::Hidden, &other, placed_s + 1, true),
            (&Running::Hidden, &other, placed_s, false),
            (&Running::Hidden, &folder.path().join("none"), i64::MAX, false),
        ] {
            assert_eq!(
                is_program(running, program, started_s),
                expected,
                "{program:?} {started_s}"
            );
        }
        // Beyond the largest number of a process.
        assert!(running_program(u32::MAX).is_none());
    }

    #[test]
    fn what_holds_something_for_a_service_restarts_with_it_and_nothing_else_does() {
        let unit = |name| Unit { scope: Scope::User, name, program: None, files: Vec::new() };
        let units = [unit("a.socket"), unit("b.socket"), unit("x.service")];
        for (stale, expected) in [
            (&[] as &[&str], None),
            (&["x.service"], Some("systemctl --user restart x.service")),
            (&["b.socket"], Some("systemctl --user restart b.socket x.service")),
            (&["a.socket", "x.service"], Some("systemctl --user restart a.socket x.service")),
        ] {
            let command = restart_of(&units, |unit| !stale.contains(&unit.name));
            assert_eq!(command.map(|command| command.join(" ")).as_deref(), expected);
        }
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
