//! The command line: a verb a file, each with its arguments, its help and its work.
//!
//! Results go through [`printer`], failures through [`error`]; a verb returns the exit code.

mod audit;
mod ceiling;
mod completion;
mod context;
mod doctor;
pub mod error;
mod events;
mod exec;
mod files;
mod history;
mod hub;
mod identity;
mod invite;
mod join;
mod leave;
mod local;
mod login;
mod login_link;
mod node;
mod persist;
mod policy;
pub mod printer;
mod run;
mod service;
mod skill;
mod status;
mod task;
mod token;
mod units;
mod version;
mod watch;
mod whoami;
mod workspace;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, CommandFactory as _, Parser, Subcommand};

use crate::config::StateDir;
use crate::config::contexts::ConfigDir;
use error::{CliError, Exit};
use printer::{ColorWhen, Format, Printer};

/// What every verb knows.
#[derive(Debug, Args)]
pub(crate) struct Global {
    /// This node's identity, index and socket; several agents may run on one machine
    #[arg(long, global = true, env = "CORTEX_STATE", value_name = "DIR")]
    state: Option<PathBuf>,
    /// Which login to use instead of the current one
    #[arg(long, global = true, env = "CORTEX_CONTEXT", value_name = "NAME")]
    context: Option<String>,
    /// When to use colour
    #[arg(long, global = true, value_enum, default_value_t, value_name = "WHEN")]
    color: ColorWhen,
}

impl Global {
    fn state(&self) -> Result<StateDir, CliError> {
        Ok(StateDir::resolve(self.state.clone())?)
    }

    fn config(&self) -> Result<ConfigDir, CliError> {
        Ok(ConfigDir::resolve()?)
    }

    fn printer(&self, output: Output) -> Printer {
        Printer::stdout(output.format, self.color)
    }
}

/// Shape of the output, on everything that lists or shows.
#[derive(Clone, Copy, Debug, Args)]
pub(crate) struct Output {
    /// Shape of the output
    #[arg(short = 'o', long = "output", value_enum, default_value_t, value_name = "FORMAT")]
    format: Format,
}

/// cortex mesh: the same files on every machine, and a safe shell on any of them.
///
/// On a node, `join` admits this machine to a mesh and `run` is the daemon that keeps it there.
/// Anywhere, `login` makes you an operator, who lists nodes, runs commands on them and manages
/// workspaces.
#[derive(Debug, Parser)]
#[command(name = "cortex-agent", version, propagate_version = true, max_term_width = 100)]
#[command(after_help = "\
Examples:
  cortex-agent join hub.example.org:7443 --ca sha256:… --token-file invite
  cortex-agent login hub.example.org:7443 --ca sha256:… --token-stdin < token
  cortex-agent node list --online
  cortex-agent exec build-1 -s 'uname -a; nproc'

Exit codes: 0 ok, 1 failed, 2 usage, 3 not found, 4 not logged in, 5 forbidden, 6 unreachable or
timed out, 7 conflict. `exec` ends with the command's own; see `cortex-agent exec --help`.")]
struct Cli {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    verb: Verb,
}

#[derive(Debug, Subcommand)]
enum Verb {
    Join(join::JoinArgs),
    Run(run::RunArgs),
    Leave(leave::LeaveArgs),
    Service(service::ServiceArgs),
    Identity(identity::IdentityArgs),
    Ceiling(ceiling::CeilingArgs),
    Status(status::StatusArgs),
    Doctor(doctor::DoctorArgs),
    Login(login::LoginArgs),
    LoginLink(login_link::LoginLinkArgs),
    Logout(context::LogoutArgs),
    Whoami(whoami::WhoamiArgs),
    Context(context::ContextArgs),
    Node(node::NodeArgs),
    Exec(Box<exec::ExecArgs>),
    Task(task::TaskArgs),
    History(history::HistoryArgs),
    Shell(exec::ShellArgs),
    Ls(files::LsArgs),
    Cat(files::CatArgs),
    Stat(files::StatArgs),
    Write(files::WriteArgs),
    Rm(files::RmArgs),
    Mkdir(files::MkdirArgs),
    Workspace(workspace::WorkspaceArgs),
    Skill(skill::SkillArgs),
    Invite(invite::InviteArgs),
    Policy(policy::PolicyArgs),
    Audit(audit::AuditArgs),
    Events(events::EventsArgs),
    Version(version::VersionArgs),
    Completion(completion::CompletionArgs),
}

/// `exec` alone, as [`Cli`] has it: it is what is run most, and describing all verbs to clap takes
/// longer than many a command.
#[derive(Debug, Parser)]
#[command(name = "cortex-agent")]
struct ExecAlone {
    #[command(flatten)]
    global: Global,
    #[command(subcommand)]
    verb: ExecVerb,
}

#[derive(Debug, Subcommand)]
enum ExecVerb {
    Exec(Box<exec::ExecArgs>),
}

/// What the arguments mean. Whatever is not right, and all help, is told by the whole [`Cli`].
fn parse() -> Result<Cli, clap::Error> {
    if std::env::args_os().nth(1).is_some_and(|verb| verb == "exec")
        && let Ok(ExecAlone { global, verb: ExecVerb::Exec(args) }) = ExecAlone::try_parse()
    {
        return Ok(Cli { global, verb: Verb::Exec(args) });
    }
    Cli::try_parse()
}

/// Reads the arguments, does the work, and says what the process ends with.
pub(crate) fn main() -> ExitCode {
    let cli = match parse() {
        Ok(cli) => cli,
        Err(error) => {
            // Help and version go to standard output with 0, mistakes to standard error with 2.
            let code = if error.use_stderr() { Exit::Usage.code() } else { 0 };
            error.print().ok();
            return ExitCode::from(code);
        }
    };
    let color = cli.global.color;
    match dispatch(cli) {
        Ok(code) => ExitCode::from(code),
        Err(error) => {
            if error.exit() != Exit::ReaderGone {
                printer::complain(&error.render(), color);
            }
            ExitCode::from(error.exit().code())
        }
    }
}

fn dispatch(cli: Cli) -> Result<u8, CliError> {
    let Cli { global, verb } = cli;
    // The daemon has a runtime of several threads; a single command is there faster without.
    let runtime = match verb {
        Verb::Run(_) => tokio::runtime::Builder::new_multi_thread().enable_all().build(),
        _ => tokio::runtime::Builder::new_current_thread().enable_all().build(),
    }
    .map_err(|error| CliError::new(Exit::Failed, "cannot start the runtime").because(error))?;
    let done = |result: Result<(), CliError>| result.map(|()| 0);
    let result = runtime.block_on(async {
        match verb {
            Verb::Join(args) => done(Box::pin(join::join(&global, args)).await),
            Verb::Run(args) => done(Box::pin(run::run(&global, args)).await),
            Verb::Leave(args) => done(Box::pin(leave::leave(&global, args)).await),
            Verb::Service(args) => done(service::service(&global, &args).await),
            Verb::Identity(args) => done(Box::pin(identity::identity(&global, args)).await),
            Verb::Ceiling(args) => done(Box::pin(ceiling::ceiling(&global, args)).await),
            Verb::Status(args) => done(Box::pin(status::status(&global, args)).await),
            Verb::Doctor(args) => Box::pin(doctor::doctor(&global, args)).await,
            Verb::Login(args) => done(Box::pin(login::login(&global, args)).await),
            Verb::LoginLink(args) => done(login_link::login_link(&global, args).await),
            Verb::Logout(args) => done(context::logout(&global, args)),
            Verb::Whoami(args) => done(Box::pin(whoami::whoami(&global, args)).await),
            Verb::Context(args) => done(context::context(&global, args)),
            Verb::Node(args) => done(Box::pin(node::node(&global, args)).await),
            Verb::Exec(args) => Box::pin(exec::exec(&global, *args)).await,
            Verb::Task(args) => Box::pin(task::task(&global, args)).await,
            Verb::History(args) => done(Box::pin(history::history(&global, args)).await),
            Verb::Shell(args) => Box::pin(exec::shell(&global, args)).await,
            Verb::Ls(args) => done(Box::pin(files::ls(&global, args)).await),
            Verb::Cat(args) => done(Box::pin(files::cat(&global, args)).await),
            Verb::Stat(args) => done(Box::pin(files::stat(&global, args)).await),
            Verb::Write(args) => done(Box::pin(files::write(&global, args)).await),
            Verb::Rm(args) => done(Box::pin(files::rm(&global, args)).await),
            Verb::Mkdir(args) => done(Box::pin(files::mkdir(&global, args)).await),
            Verb::Workspace(args) => done(Box::pin(workspace::workspace(&global, args)).await),
            Verb::Skill(args) => done(Box::pin(skill::skill(&global, args)).await),
            Verb::Invite(args) => done(Box::pin(invite::invite(&global, args)).await),
            Verb::Policy(args) => done(Box::pin(policy::policy(&global, args)).await),
            Verb::Audit(args) => done(Box::pin(audit::audit(&global, args)).await),
            Verb::Events(args) => done(Box::pin(events::events(&global, args)).await),
            Verb::Version(args) => done(version::version(&global, args)),
            Verb::Completion(args) => {
                done(completion::completion(&global, args, &mut Cli::command()))
            }
        }
    });
    // A thread that still waits for standard input must not keep the process.
    runtime.shutdown_background();
    result
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_command_line_is_consistent() {
        Cli::command().debug_assert();
        ExecAlone::command().debug_assert();
    }

    /// Every command that a hint of ours names: "cortex-agent VERB SUBVERB".
    fn commands_in(hint: &str) -> Vec<Vec<&str>> {
        let named = hint.match_indices("cortex-agent ").map(|(at, name)| &hint[at + name.len()..]);
        named
            .map(|rest| {
                let word = |c: char| c.is_ascii_lowercase() || c == '-' || c == ' ';
                let words = rest.split(|c| !word(c)).next().unwrap_or_default();
                words.split(' ').take_while(|word| !word.is_empty()).take(2).collect()
            })
            .collect()
    }

    #[test]
    fn hints_are_ascii_and_name_commands_that_exist() {
        use crate::client::{ConnectError, HubRefused};
        use crate::config::ConfigError;
        let address: crate::client::HubAddress = "hub:1".parse().unwrap();
        let io = || std::sync::Arc::new(std::io::Error::from(std::io::ErrorKind::TimedOut));
        let path = std::path::PathBuf::from("/s");
        let refused = |source| ConnectError::HubRefused { address: address.clone(), source };
        let connect = [
            ConnectError::Resolve { address: address.clone(), source: io() },
            ConnectError::Unreachable { address: address.clone(), source: io() },
            ConnectError::TimedOut { address: address.clone() },
            ConnectError::Tls { address: address.clone(), source: io() },
            refused(HubRefused::NotThisMesh),
            refused(HubRefused::NotAHub("")),
            refused(HubRefused::Pin { expected: Vec::new(), shown: None }),
            refused(HubRefused::Expired {
                not_after: String::new(),
                now: String::new(),
                apart: std::time::Duration::ZERO,
            }),
        ];
        let config = [
            ConfigError::NotJoined { state: path.clone() },
            ConfigError::NotLoggedIn,
            ConfigError::NoSuchContext(String::new()),
            ConfigError::TooOpen { path: path.clone(), mode: 0o640 },
            ConfigError::NotOwner { path: path.clone(), owner: 1, own: 2 },
            ConfigError::Damaged { path, problem: String::new() },
        ];
        let mut hints: Vec<String> = connect.iter().map(ConnectError::hint).collect();
        let rendered = config.into_iter().map(|error| CliError::from(error).render());
        hints.extend(rendered.filter_map(|text| Some(text.split_once("hint: ")?.1.to_owned())));
        hints.extend(crate::link::hints());
        let cli = Cli::command();
        let mut named = 0;
        for hint in &hints {
            assert!(hint.is_ascii(), "{hint}");
            for words in commands_in(hint) {
                let verb = cli
                    .find_subcommand(words[0])
                    .unwrap_or_else(|| panic!("no command {:?} in: {hint}", words[0]));
                if verb.has_subcommands() {
                    assert!(verb.find_subcommand(words[1]).is_some(), "{words:?} in: {hint}");
                }
                named += 1;
            }
        }
        assert!(named > 8, "{named}");
    }

    #[test]
    fn contract_of_names_and_flags_parses() {
        for line in [
            "join hub:7443 --ca sha256:00 --token-file F --name n --label a=b --label c=d --workspace-root /w --ceiling strict --ceiling-net full",
            "run",
            "--state /s status -o json",
            "ceiling show -o json",
            "ceiling set permissive",
            "ceiling set strict --net full",
            "doctor -o json",
            "login hub:7443 --ca sha256:00 --token-stdin --context x",
            "logout",
            "whoami -o json",
            "context list",
            "context use x",
            "context remove x",
            "node list @a=b --online -o jsonl",
            "node list --offline",
            "node show n1",
            "node label n1 a=b c-",
            "node rename n1 n2",
            "node cordon n1",
            "node uncordon n1 -o json",
            "node revoke n1 --reason gone --yes",
            "node forget n1",
            "node policy n1",
            "node wait n1 --for online --timeout 2m",
            "policy show n1 -o json",
            "policy set n1 permissive --reason text --for 30m",
            "policy set n1 strict",
            "policy set n1 strict --net full --reason text --for 8h",
            "audit list --after 3 --limit 10 --action policy.set -o jsonl",
            "audit verify -o json",
            "events -f -o jsonl --since 5 --kind node --kind task.ended",
            "events",
            "identity show -o json",
            "identity renew",
            "identity recover",
            "identity fork --token-file F --name n2 --label a=b",
            "leave",
            "leave --purge -o json",
            "exec n1 -- ls -l --color",
            "exec n1 -s ls",
            "exec n1 n2 @env=prod,gpu=a100 --parallel 4 --prefix always --max-fail 2 --max-output 1M -- ls",
            "exec --all --group -s ls",
            "exec --all --output-dir d --dry-run -o jsonl -f -",
            "exec n1 -t -- vi",
            "shell n1 --workspace w --cwd d --mode permissive --net full",
            "exec n1 -i --workspace w --cwd d --env K=V --mode permissive --net full --memory 1G --pids 10 --time-limit 10s -- cat",
            "exec n1 --detach --on-disconnect kill --idempotency-key k -o json -- true",
            "task list --node n --status running --status failed --mine --limit 5 -o jsonl",
            "task show 01234567",
            "task logs 01234567 -f",
            "task attach 01234567",
            "task wait 01234567 89abcdef",
            "task cancel 01234567 --signal INT --grace 5s",
            "task retry 01234567 --detach",
            "history n1 --lines 100 -f --raw",
            "ls n1:w/dir --limit 10 --after x -o jsonl",
            "cat n1:w/f --offset 10 --length 1K",
            "stat n1:w/f --hash -o json",
            "write n1:w/f --from - --mode 640 --if-hash 0000000000000000000000000000000000000000000000000000000000000000",
            "write n1:w/f --from f --if-absent -o json",
            "rm n1:w/f -r",
            "mkdir n1:w/d -p",
            "workspace create w",
            "workspace list",
            "workspace attach w --node n",
            "workspace attach w --path /p",
            "workspace detach w",
            "workspace status w --watch",
            "workspace status",
            "workspace conflicts w",
            "invite create --uses 2 --ttl 1h --label a=b --name-pattern x-* --workspace w -o json",
            "invite list",
            "invite revoke abcdefgh",
            "version",
            "completion bash",
        ] {
            let words = std::iter::once("cortex-agent").chain(line.split(' '));
            if let Err(error) = Cli::try_parse_from(words) {
                panic!("{line}: {error}");
            }
        }
    }
}
