//! `service install` and `service uninstall`: the hub as a systemd service.

use std::net::SocketAddr;
use std::path::PathBuf;

use anyhow::Context as _;
use clap::{Args, Subcommand};
use cortex_shared::systemd::{self, Scope, Step, systemctl};

use super::output;
use crate::config::http::DEFAULT_HTTP_PORT;
use crate::config::{DEFAULT_GRPC_PORT, HubConfig, settings};

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
Run again after an upgrade, or to change --grpc; nothing that is there is lost.")]
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
            (install(&args, &program.display().to_string())?, args.dry_run)
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

fn install(args: &InstallArgs, program: &str) -> anyhow::Result<Vec<Step>> {
    let scope = scope(args.user)?;
    let units = systemd::unit_folder(scope)?;
    let mut config = HubConfig::new(PathBuf::new());
    config.advertise.clone_from(&args.advertise);
    let listen = args.grpc.unwrap_or_else(|| SocketAddr::from(([127, 0, 0, 1], DEFAULT_GRPC_PORT)));
    config.grpc = listen;
    let http = args.http.unwrap_or_else(|| SocketAddr::new(listen.ip(), DEFAULT_HTTP_PORT));
    config.http.listen = Some(http);
    let service = match scope {
        Scope::System => SYSTEM_SERVICE,
        Scope::User => USER_SERVICE,
    };
    let file = systemd::configuration_folder(scope)?.join("hubd.toml");
    let socket = units.join("cortex-hubd.socket");
    let http_socket = units.join("cortex-hubd-http.socket");
    let mut steps = Vec::new();
    if scope == Scope::System {
        steps.push(Step::CreateUser { name: USER, home: PathBuf::from(DATA) });
    }
    let text = settings::document(&config);
    steps.push(Step::WriteNew { path: file, text });
    let text = service.replace("@PROGRAM@", program);
    steps.push(Step::Write { path: units.join("cortex-hubd.service"), text });
    let text = SOCKET.replace("@LISTEN@", &listen.to_string());
    // Without --grpc, an installation that is there keeps its address.
    steps.push(match args.grpc {
        Some(_) => Step::Write { path: socket, text },
        None => Step::WriteNew { path: socket, text },
    });
    let text = HTTP_SOCKET.replace("@LISTEN@", &http.to_string());
    steps.push(match args.http.or(args.grpc) {
        Some(_) => Step::Write { path: http_socket, text },
        None => Step::WriteNew { path: http_socket, text },
    });
    steps.push(Step::RunWithSystemd(systemctl(scope, &["daemon-reload"])));
    let [grpc, http, service] = UNITS;
    steps.push(Step::Run(systemctl(scope, &["enable", grpc, http, service])));
    if scope == Scope::User {
        steps.push(Step::Try(vec!["loginctl".to_owned(), "enable-linger".to_owned()]));
    }
    // A socket is bound anew only while nothing uses it, and one that is new only while the service is down;
    // connections wait in those that stay.
    let down: &[&str] = match args.grpc.or(args.http) {
        Some(_) => &["stop", service, grpc, http],
        None => &["stop", service],
    };
    steps.push(Step::RunWithSystemd(systemctl(scope, down)));
    steps.push(Step::RunWithSystemd(systemctl(scope, &["start", grpc, http])));
    steps.push(Step::RunWithSystemd(systemctl(scope, &["restart", service])));
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
        Step::RunWithSystemd(systemctl(scope, &["daemon-reload"])),
    ];
    if args.purge {
        steps.push(Step::Remove(systemd::configuration_folder(scope)?.join("hubd.toml")));
        let data = match scope {
            Scope::System => PathBuf::from(DATA),
            Scope::User => HubConfig::default_data(),
        };
        steps.push(Step::RemoveTree(data));
        if scope == Scope::System {
            steps.push(Step::Try(vec!["userdel".to_owned(), USER.to_owned()]));
        }
    }
    Ok(steps)
}
