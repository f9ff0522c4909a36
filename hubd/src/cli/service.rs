//! `service install` and `service uninstall`: the hub as a systemd service.

use std::io::ErrorKind;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use clap::{Args, Subcommand};
use cortex_shared::systemd::{self, Scope, Step, Unit, systemctl};

use super::output;
use crate::config::http::DEFAULT_HTTP_PORT;
use crate::config::rewrite::with_setting;
use crate::config::settings::{self, ConfigError};
use crate::config::{DEFAULT_GRPC_PORT, HubConfig};

const USER: &str = "cortex-hubd";
const DATA: &str = "/var/lib/cortex-hubd";
const SYSTEM_SERVICE: &str = include_str!("../../../packaging/systemd/cortex-hubd.service");
const USER_SERVICE: &str = include_str!("../../../packaging/systemd/cortex-hubd.user.service");
const SOCKET: &str = include_str!("../../../packaging/systemd/cortex-hubd.socket");
const HTTP_SOCKET: &str = include_str!("../../../packaging/systemd/cortex-hubd-http.socket");

/// The units: two sockets, and the service that is given both.
const UNITS: [&str; 3] = ["cortex-hubd.socket", "cortex-hubd-http.socket", "cortex-hubd.service"];

#[derive(Subcommand)]
pub(super) enum ServiceCommand {
    /// Run this program as a service, now and at every start of the machine
    #[command(after_help = "\
As root: a service of the machine, with a user of its own (cortex-hubd), settings in
/etc/cortex/hubd.toml and everything else in /var/lib/cortex-hubd. With --user: a service of this user.
Run again after an upgrade, or to change an address or --advertise: those that are named are changed in the
settings and the sockets, and nothing else that is there. It restarts if something has changed; commands that
run go on meanwhile.")]
    Install(InstallArgs),
    /// Stop the service and remove it; settings and data stay, unless --purge
    Uninstall(UninstallArgs),
}

#[derive(Args)]
pub(super) struct InstallArgs {
    /// A service of this user, not of the machine
    #[arg(long)]
    user: bool,
    /// Address and port that nodes and operators dial [default: 127.0.0.1:7443]
    #[arg(long, value_name = "ADDR:PORT")]
    grpc: Option<SocketAddr>,
    /// Address and port of the HTTP side: installing nodes, API, web page [default: the address of
    /// --grpc, port 7480]
    #[arg(long, value_name = "ADDR:PORT")]
    http: Option<SocketAddr>,
    /// Host name or address that invites tell nodes to dial, if another than --grpc
    #[arg(long, value_name = "HOST")]
    advertise: Option<String>,
    /// Show every step and do none
    #[arg(long)]
    dry_run: bool,
}

#[derive(Args)]
pub(super) struct UninstallArgs {
    /// The service of this user, not that of the machine
    #[arg(long)]
    user: bool,
    /// Also remove settings, certificate authority, workspaces and everything else
    #[arg(long)]
    purge: bool,
    /// Show every step and do none
    #[arg(long)]
    dry_run: bool,
}

pub(super) fn service(command: ServiceCommand) -> anyhow::Result<()> {
    let (steps, dry_run) = match command {
        ServiceCommand::Install(args) => {
            let program = std::env::current_exe().context("cannot find this program")?;
            (install(&args, &program)?, args.dry_run)
        }
        ServiceCommand::Uninstall(args) => (uninstall(&args)?, args.dry_run),
    };
    systemd::carry_out(&steps, dry_run, |step, outcome| match outcome {
        Some(outcome) => output::print(&format!("{step}: {outcome}")),
        None => output::print(&step.to_string()),
    })?;
    Ok(())
}

fn scope(user: bool) -> anyhow::Result<Scope> {
    if user {
        return Ok(Scope::User);
    }
    anyhow::ensure!(
        rustix::process::geteuid().is_root(),
        "a service of the machine is root's to install (hint: sudo, or --user for one of your own)"
    );
    Ok(Scope::System)
}

/// What an installation says: the addresses, and the settings with them.
struct Said {
    grpc: SocketAddr,
    http: SocketAddr,
    /// Whether the HTTP side's address is to be this one, whatever it was.
    http_asked: bool,
    /// The file of settings, and what has to be in it.
    file: PathBuf,
    settings: Step,
}

/// Reads the settings that are there, if there are any, and says what becomes of them.
fn said(args: &InstallArgs, file: &Path) -> anyhow::Result<Said> {
    let mut config = HubConfig::new(PathBuf::new());
    // A link is its owner's: what it leads to is changed.
    let file = file.canonicalize().unwrap_or_else(|_| file.to_owned());
    let text = match settings::read_file(&file) {
        Ok(text) => {
            settings::apply_document(&mut config, &file, &text)?;
            Some(text)
        }
        Err(ConfigError::Read { source, .. }) if source.kind() == ErrorKind::NotFound => None,
        Err(error) => return Err(error.into()),
    };
    let default = SocketAddr::from(([127, 0, 0, 1], DEFAULT_GRPC_PORT));
    let grpc = args.grpc.unwrap_or(if text.is_some() { config.grpc } else { default });
    let port = config.http.listen.map_or(DEFAULT_HTTP_PORT, |http| http.port());
    // It goes where the other one goes, unless there is to be none.
    let follows = args.grpc.is_some() && config.http.listen.is_some();
    let http = args.http.unwrap_or_else(|| match config.http.listen {
        Some(http) if text.is_some() && !follows => http,
        _ => SocketAddr::new(grpc.ip(), port),
    });
    let http_asked = args.http.is_some() || follows;
    let settings = match text {
        None => {
            config.grpc = grpc;
            config.http.listen = Some(http);
            config.advertise.clone_from(&args.advertise);
            Step::WriteNew { path: file.clone(), text: settings::document(&config) }
        }
        Some(mut text) => {
            let wanted = [
                ("grpc", args.grpc.map(|address| address.to_string())),
                ("http", http_asked.then(|| http.to_string())),
                ("advertise", args.advertise.clone()),
            ];
            for (name, value) in wanted {
                let Some(value) = value else { continue };
                text = with_setting(&text, name, &value).map_err(|problem| {
                    anyhow::anyhow!("{name} cannot be changed in {}: {problem}", file.display())
                })?;
            }
            Step::Write { path: file.clone(), text }
        }
    };
    Ok(Said { grpc, http, http_asked, file, settings })
}

fn install(args: &InstallArgs, program: &Path) -> anyhow::Result<Vec<Step>> {
    let scope = scope(args.user)?;
    let folder = systemd::configuration_folder(scope)?;
    plan(args, scope, program, &systemd::unit_folder(scope)?, &folder.join("hubd.toml"))
}

fn plan(
    args: &InstallArgs,
    scope: Scope,
    program: &Path,
    units: &Path,
    file: &Path,
) -> anyhow::Result<Vec<Step>> {
    let said = said(args, file)?;
    let service_text = match scope {
        Scope::System => SYSTEM_SERVICE,
        Scope::User => USER_SERVICE,
    };
    let mut steps = Vec::new();
    if scope == Scope::System {
        steps.push(Step::CreateUser { name: USER, home: PathBuf::from(DATA) });
    }
    steps.push(said.settings);
    let [grpc, http, service] = UNITS;
    let text = service_text
        .replace("@PROGRAM@", &systemd::in_quotes(program))
        .replace("@STATE@", &systemd::in_quotes(&HubConfig::user_data()));
    steps.push(Step::Write { path: units.join(service), text });
    for (name, template, address, asked) in [
        (grpc, SOCKET, said.grpc, args.grpc.is_some()),
        (http, HTTP_SOCKET, said.http, said.http_asked),
    ] {
        let (path, text) = (units.join(name), template.replace("@LISTEN@", &address.to_string()));
        // One that is there keeps its address, unless another was asked for.
        steps.push(match asked {
            true => Step::Write { path, text },
            false => Step::WriteNew { path, text },
        });
    }
    steps.push(Step::RunWithSystemd(systemctl(scope, &["daemon-reload"])));
    steps.push(Step::Run(systemctl(scope, &["enable", grpc, http, service])));
    if scope == Scope::User {
        steps.push(Step::Linger);
    }
    let socket = |name| Unit { scope, name, program: None, files: vec![units.join(name)] };
    let hub = Unit {
        scope,
        name: service,
        program: Some(program.to_owned()),
        files: vec![units.join(service), said.file],
    };
    // A socket is bound anew only while nothing uses it, and one that is new only while the service is down;
    // connections wait in those that stay.
    steps.push(Step::Restart(vec![socket(grpc), socket(http), hub]));
    // Waits for what began already.
    steps.push(Step::RunWithSystemd(systemctl(scope, &["start", grpc, http, service])));
    Ok(steps)
}

fn uninstall(args: &UninstallArgs) -> anyhow::Result<Vec<Step>> {
    let scope = scope(args.user)?;
    let units = systemd::unit_folder(scope)?;
    let [grpc, http, service] = UNITS;
    let mut steps = vec![
        Step::Try(systemctl(scope, &["disable", "--now", service, grpc, http])),
        Step::Remove(units.join(service)),
        Step::Remove(units.join(grpc)),
        Step::Remove(units.join(http)),
    ];
    // Where no service manager could be asked, they are enabled still.
    for name in UNITS {
        steps.push(Step::Remove(systemd::enabling_link(scope, name)?));
    }
    steps.push(Step::RunWithSystemd(systemctl(scope, &["daemon-reload"])));
    if args.purge {
        steps.push(Step::Remove(systemd::configuration_folder(scope)?.join("hubd.toml")));
        let data = match scope {
            Scope::System => PathBuf::from(DATA),
            Scope::User => HubConfig::user_data(),
        };
        steps.push(Step::RemoveTree(data));
        if scope == Scope::System {
            steps.push(Step::Try(vec!["userdel".to_owned(), USER.to_owned()]));
        }
    }
    Ok(steps)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn asking(grpc: Option<&str>, http: Option<&str>, advertise: Option<&str>) -> InstallArgs {
        let address = |text: Option<&str>| text.map(|text| text.parse().unwrap());
        InstallArgs {
            user: true,
            grpc: address(grpc),
            http: address(http),
            advertise: advertise.map(str::to_owned),
            dry_run: false,
        }
    }

    #[test]
    fn installing_again_changes_what_is_named_in_settings_and_sockets_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("hubd.toml");
        let units = folder.path().join("units");
        // Carries out what is about files, and says the addresses in settings and sockets.
        let install = |args: &InstallArgs| {
            let steps = plan(args, Scope::User, Path::new("/opt/hub"), &units, &file)?;
            for step in steps {
                let (path, text) = match step {
                    Step::Write { path, text } => (path, text),
                    Step::WriteNew { path, text } if !path.exists() => (path, text),
                    _ => continue,
                };
                std::fs::create_dir_all(path.parent().unwrap()).unwrap();
                std::fs::write(path, text).unwrap();
            }
            let mut config = HubConfig::new(PathBuf::new());
            settings::apply_file(&mut config, &file)?;
            let listens = |name: &str| {
                let text = std::fs::read_to_string(units.join(name)).unwrap();
                let line = text.lines().find_map(|line| line.strip_prefix("ListenStream="));
                line.unwrap().to_owned()
            };
            assert_eq!(listens("cortex-hubd.socket"), config.grpc.to_string());
            let http = config.http.listen.map(|http| http.to_string()).unwrap_or_default();
            assert_eq!(listens("cortex-hubd-http.socket"), http);
            anyhow::Ok((config.grpc.to_string(), http, config.advertise.unwrap_or_default()))
        };
        let three = |a: &str, b: &str, c: &str| (a.to_owned(), b.to_owned(), c.to_owned());
        let first = install(&asking(None, None, None)).unwrap();
        assert_eq!(first, three("127.0.0.1:7443", "127.0.0.1:7480", ""));
        let text = std::fs::read_to_string(&file).unwrap();
        std::fs::write(&file, format!("# mine\nresume_grace = \"7s\" # why\n{text}")).unwrap();
        let moved = install(&asking(Some("0.0.0.0:9443"), None, Some("hub.example.org"))).unwrap();
        assert_eq!(moved, three("0.0.0.0:9443", "0.0.0.0:7480", "hub.example.org"));
        let port = install(&asking(None, Some("0.0.0.0:9480"), None)).unwrap();
        assert_eq!(port, three("0.0.0.0:9443", "0.0.0.0:9480", "hub.example.org"));
        assert_eq!(install(&asking(None, None, None)).unwrap(), port);
        let back = install(&asking(Some("127.0.0.1:9443"), None, None)).unwrap();
        assert_eq!(back, three("127.0.0.1:9443", "127.0.0.1:9480", "hub.example.org"));
        let text = std::fs::read_to_string(&file).unwrap();
        assert!(text.starts_with("# mine\nresume_grace = \"7s\" # why\n"), "{text}");
        // What cannot be changed is said, with what to do.
        std::fs::write(&file, "\"advertise\" = \"a\"\n").unwrap();
        let refused = install(&asking(None, None, Some("b"))).unwrap_err().to_string();
        assert!(
            refused.contains("hubd.toml") && refused.contains("advertise = \"b\""),
            "{refused}"
        );
    }
}
