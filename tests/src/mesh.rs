//! A hub, its nodes and an operator.

use std::net::{IpAddr, SocketAddr, TcpListener};
use std::os::fd::OwnedFd;
use std::os::unix::fs::PermissionsExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::fs::{Mode, StatVfsMountFlags};
use rustix::net::{self, AddressFamily, SocketFlags, SocketType};
use serde_json::Value;
use tempfile::TempDir;

use crate::process::{Daemon, Outcome, run};
use crate::{is_root, program};

/// The user that unprivileged agents run as when the tests run as root. Any number that owns
/// nothing will do.
const UNPRIVILEGED: u32 = 54_321;

/// As whom an agent runs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum As {
    /// As the user of the tests.
    Me,
    /// As a user without any rights, which only root can start.
    Unprivileged,
}

/// See the module.
pub struct Mesh {
    scratch: TempDir,
    hub: Option<Daemon>,
    /// The hub's ports, kept from everybody else while it does not run.
    _ports: Vec<OwnedFd>,
    address: String,
    http: String,
    operators: u32,
    serve: Vec<String>,
    hub_log: Option<String>,
    /// The port, if it is kept open for the hub as a service manager does.
    socket: Option<TcpListener>,
}

impl Mesh {
    /// Starts a hub.
    ///
    /// # Panics
    /// If it does not come up.
    #[must_use]
    pub fn start() -> Self {
        Self::start_with(&[])
    }

    /// Starts a hub with these further arguments of `serve`.
    ///
    /// # Panics
    /// If it does not come up.
    #[must_use]
    pub fn start_with(arguments: &[&str]) -> Self {
        Self::start_as("127.0.0.1", arguments, None)
    }

    /// Starts a hub that listens on this address of the machine, with these further arguments of `serve`.
    ///
    /// # Panics
    /// If it does not come up.
    #[must_use]
    pub fn start_at(address: &str, arguments: &[&str]) -> Self {
        Self::start_as(address, arguments, None)
    }

    /// Starts a hub that logs what this filter lets through.
    ///
    /// # Panics
    /// If it does not come up.
    #[must_use]
    pub fn start_logging(filter: &str) -> Self {
        Self::start_as("127.0.0.1", &[], Some(filter.to_owned()))
    }

    /// Starts a hub whose port is kept open while it restarts, as systemd does: a connection made
    /// meanwhile waits, and is not refused.
    ///
    /// # Panics
    /// If it does not come up.
    #[must_use]
    pub fn start_with_socket(arguments: &[&str]) -> Self {
        let mut mesh = Self::prepare("127.0.0.1", arguments, None);
        mesh.socket = Some(TcpListener::bind("127.0.0.1:0").expect("loopback has a free port"));
        mesh.start_hub();
        mesh
    }

    fn start_as(address: &str, arguments: &[&str], hub_log: Option<String>) -> Self {
        let mut mesh = Self::prepare(address, arguments, hub_log);
        mesh.start_hub();
        mesh
    }

    fn prepare(address: &str, arguments: &[&str], hub_log: Option<String>) -> Self {
        // What the tests write is for agents of another user to read, whatever the user's own shell says.
        rustix::process::umask(Mode::from_raw_mode(0o022));
        // Agents of another user live below it, too.
        let scratch = tempfile::Builder::new()
            .prefix("cortex-test-")
            .permissions(std::fs::Permissions::from_mode(0o755))
            .tempdir()
            .expect("there is room for scratch files");
        assert_usable(scratch.path());
        let serve = arguments.iter().map(|argument| (*argument).to_owned()).collect();
        let (ports, addresses): (Vec<_>, Vec<_>) =
            (0..2).map(|_| reserve(address.parse().expect("an address"))).unzip();
        let [address, http] = [0, 1].map(|port: usize| addresses[port].to_string());
        Self {
            scratch,
            hub: None,
            _ports: ports,
            address,
            http,
            operators: 0,
            serve,
            hub_log,
            socket: None,
        }
    }

    /// Starts the hub, on the ports it had before if it ran before.
    ///
    /// # Panics
    /// If it does not come up.
    pub fn start_hub(&mut self) {
        self.start_hub_with(&[]);
    }

    /// Starts the hub again, to kill itself when it passes this point (`cortex_shared::crash`).
    ///
    /// # Panics
    /// If it does not come up.
    pub fn start_hub_that_crashes_at(&mut self, point: &str) {
        self.start_hub_with(&[(cortex_shared::crash::CRASH_AT, point)]);
    }

    fn start_hub_with(&mut self, environment: &[(&str, &str)]) {
        let mut command = self.hub_program();
        command.args(["serve", "--grpc", &self.address, "--http", &self.http, "--data"]);
        command.arg(self.path("hub"));
        command.args(&self.serve).envs(environment.iter().copied());
        if let Some(filter) = &self.hub_log {
            command.env("CORTEX_LOG", filter);
        }
        let mut hub = match &self.socket {
            None => Daemon::start("hub", &mut command, &self.path("hub.log")),
            Some(socket) => {
                let socket = socket.try_clone().expect("a descriptor is free");
                Daemon::start_with(
                    "hub",
                    &mut command,
                    &self.path("hub.log"),
                    OwnedFd::from(socket).into(),
                )
            }
        };
        self.address = hub
            .line("its address", |line| line.strip_prefix("grpc listening on ").map(str::to_owned));
        self.http = hub.line("its web side", |line| {
            line.strip_prefix("http listening on ").map(str::to_owned)
        });
        self.hub = Some(hub);
    }

    /// The hub's program; where its port is kept open, behind a shell that hands its standard input over
    /// as systemd would.
    fn hub_program(&self) -> Command {
        let hubd = program("hubd-under-test");
        if self.socket.is_none() {
            return Command::new(hubd);
        }
        let hand_over = r#"LISTEN_FDS=1 LISTEN_PID=$$ exec "$0" "$@" 3<&0 </dev/null"#;
        let mut command = Command::new("sh");
        command.args(["-c", hand_over]).arg(hubd);
        command
    }

    /// The hub's process.
    ///
    /// # Panics
    /// If it does not run.
    pub fn hub(&mut self) -> &mut Daemon {
        self.hub.as_mut().expect("the hub runs")
    }

    /// `kill -9` to the hub.
    pub fn kill_hub(&mut self) {
        self.hub().kill();
    }

    /// Address and port of the hub.
    #[must_use]
    pub fn address(&self) -> &str {
        &self.address
    }

    /// Address and port of the hub's HTTP side.
    #[must_use]
    pub fn http(&self) -> &str {
        &self.http
    }

    /// A path in the scratch directory.
    #[must_use]
    pub fn path(&self, name: &str) -> PathBuf {
        self.scratch.path().join(name)
    }

    /// Runs a command of `cortex-hubd` for this hub.
    #[must_use]
    pub fn hubd(&self, arguments: &[&str]) -> Outcome {
        run(&mut self.hubd_command(arguments), b"")
    }

    /// A command of `cortex-hubd` for this hub.
    #[must_use]
    pub fn hubd_command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(program("hubd-under-test"));
        command.args(arguments).arg("--data").arg(self.path("hub"));
        command
    }

    /// The pin of the mesh's authority.
    #[must_use]
    pub fn pin(&self) -> String {
        self.hubd(&["ca", "pin"]).ok().text().trim().to_owned()
    }

    /// A token that admits nodes, made with these further arguments of `invite create`.
    ///
    /// # Panics
    /// If the hub gives none.
    #[must_use]
    pub fn invite(&self, arguments: &[&str]) -> String {
        let all = [&["invite", "create", "-o", "json"], arguments].concat();
        self.hubd(&all).ok().json()["token"].as_str().expect("a token").to_owned()
    }

    /// A node that has not joined.
    #[must_use]
    pub fn new_node(&self, name: &str, user: As) -> Node {
        let home = self.path(name);
        std::fs::create_dir(&home).expect("the scratch directory is writable");
        let user = match user {
            As::Me => None,
            As::Unprivileged => {
                std::os::unix::fs::chown(&home, Some(UNPRIVILEGED), Some(UNPRIVILEGED))
                    .expect("root gives files away");
                Some(UNPRIVILEGED)
            }
        };
        let program = self.readable_agent();
        let log = self.path(&format!("{name}.log"));
        let name = name.to_owned();
        let node = Node { name, home, user, program, network: None, log, daemon: None };
        std::fs::File::create(&node.log).expect("the scratch directory is writable");
        node
    }

    /// A node that has joined and is connected.
    ///
    /// # Panics
    /// If it cannot join.
    #[must_use]
    pub fn node(&self, name: &str, user: As) -> Node {
        let mut node = self.new_node(name, user);
        let _joined: Outcome = self.join(&node, &self.invite(&[]), &self.pin()).ok();
        node.run();
        self.wait_online(name);
        node
    }

    /// A node as the hub shows it.
    ///
    /// # Panics
    /// If there is none of this name.
    #[must_use]
    pub fn shown(&self, name: &str) -> Value {
        self.hubd(&["node", "show", name, "-o", "json"]).ok().json()
    }

    /// The particulars of all lines of an action in the audit log.
    ///
    /// # Panics
    /// If the hub does not list it.
    #[must_use]
    pub fn audit(&self, action: &str) -> Vec<Value> {
        let lines = self.hubd(&["audit", "list", "--action", action, "-o", "json"]).ok().json();
        let lines = lines.as_array().expect("a list").clone();
        lines.into_iter().map(|mut line| line["detail"].take()).collect()
    }

    /// A machine with a copy of everything that is in a node's state, as a disk image has it.
    ///
    /// # Panics
    /// If it cannot be copied.
    #[must_use]
    pub fn copy_of(&self, node: &Node, name: &str) -> Node {
        let copy = self.new_node(name, As::Me);
        copy_files(&node.home.join("state"), &copy.home.join("state"));
        copy
    }

    /// A node that has joined, and dials the hub at this address: that of a proxy.
    ///
    /// # Panics
    /// If it cannot join.
    #[must_use]
    pub fn node_through(&self, name: &str, address: &str) -> Node {
        let mut node = self.new_node(name, As::Me);
        let _joined: Outcome = join_at(&node, address, &self.invite(&[]), &self.pin()).ok();
        node.run();
        self.wait_online(name);
        node
    }

    /// A node that has joined and is connected, in a network namespace of its own.
    ///
    /// # Panics
    /// If it cannot join.
    #[must_use]
    pub fn node_within(&self, name: &str, network: PathBuf) -> Node {
        let mut node = self.new_node(name, As::Me);
        node.network = Some(network);
        let _joined: Outcome = self.join(&node, &self.invite(&[]), &self.pin()).ok();
        node.run();
        self.wait_online(name);
        node
    }

    /// Joins a node with this token and pin.
    #[must_use]
    pub fn join(&self, node: &Node, token: &str, pin: &str) -> Outcome {
        join_at(node, &self.address, token, pin)
    }

    /// Waits until the hub knows a node as connected.
    ///
    /// # Panics
    /// If it never is.
    pub fn wait_online(&self, name: &str) {
        // An agent whose hub was killed again and again tries once a minute, and `run` waits for two.
        let wait = ["node", "wait", name, "--for", "online", "--timeout", "110s"];
        let _online: Outcome = self.admin_context().agent(&wait).ok();
    }

    fn admin_context(&self) -> Operator {
        let folder = self.path("admin");
        if !folder.exists() {
            return self.log_in("admin", &["--role", "admin"], folder);
        }
        Operator { config: folder }
    }

    /// A new operator that has logged in.
    ///
    /// # Panics
    /// If it cannot.
    #[must_use]
    pub fn operator(&mut self, role: &str) -> Operator {
        self.operator_with(role, &[])
    }

    /// The same, created with these further arguments.
    ///
    /// # Panics
    /// If it cannot.
    #[must_use]
    pub fn operator_with(&mut self, role: &str, arguments: &[&str]) -> Operator {
        self.operators += 1;
        let name = format!("{role}-{}", self.operators);
        let folder = self.path(&name);
        self.log_in(&name, &[&["--role", role], arguments].concat(), folder)
    }

    /// The same, that dials the hub at this address: that of a proxy.
    ///
    /// # Panics
    /// If it cannot.
    #[must_use]
    pub fn operator_through(&mut self, role: &str, address: &str) -> Operator {
        self.operators += 1;
        let name = format!("{role}-{}", self.operators);
        let folder = self.path(&name);
        self.log_in_at(address, &name, &["--role", role], folder)
    }

    fn log_in(&self, name: &str, arguments: &[&str], config: PathBuf) -> Operator {
        self.log_in_at(&self.address, name, arguments, config)
    }

    fn log_in_at(&self, at: &str, name: &str, arguments: &[&str], config: PathBuf) -> Operator {
        let create = [&["operator", "create", name, "-o", "json"], arguments].concat();
        let created = self.hubd(&create).ok();
        let created: Value = created.json();
        let text = |field: &str| created[field].as_str().expect("a text").to_owned();
        let operator = Operator { config };
        let mut command =
            operator.command(&["login", at, "--ca", &text("ca_pin"), "--token-stdin"]);
        let _logged_in: Outcome = run(&mut command, text("token").as_bytes()).ok();
        operator
    }

    /// A copy of the agent that every user can execute: the build directory may be private.
    fn readable_agent(&self) -> PathBuf {
        self.readable("cortex-agent", "agent-under-test")
    }

    /// The same of the hub.
    ///
    /// # Panics
    /// If there is no room for it.
    #[must_use]
    pub fn readable_hubd(&self) -> PathBuf {
        self.readable("cortex-hubd", "hubd-under-test")
    }

    fn readable(&self, name: &str, built: &str) -> PathBuf {
        let copy = self.path(name);
        if !copy.exists() {
            // Written by a process of its own: a file that this one had open for writing would be busy
            // for as long as a child that another test is just starting holds that descriptor, too.
            let mut install = Command::new("install");
            install.args(["-m", "755"]).arg(program(built)).arg(&copy);
            let _copied: Outcome = run(&mut install, b"").ok();
        }
        copy
    }
}

/// A port of this address that nobody else is given, with what keeps it. It takes no connections, so
/// whoever names the port may listen there (and sets `SO_REUSEADDR`, as servers do): a hub, again and again.
fn reserve(address: IpAddr) -> (OwnedFd, SocketAddr) {
    let domain = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let socket = net::socket_with(domain, SocketType::STREAM, SocketFlags::CLOEXEC, None)
        .expect("descriptors are left");
    net::sockopt::set_socket_reuseaddr(&socket, true).expect("our own socket");
    net::bind(&socket, &SocketAddr::new(address, 0)).expect("the address has a free port");
    let bound = net::getsockname(&socket).expect("it is bound");
    (socket, bound.try_into().expect("an address of the internet"))
}

/// Says what is wrong with the directory for temporary files where it cannot hold a mesh: nothing else would
/// say it clearly.
fn assert_usable(scratch: &Path) {
    // A socket's path has at most 107 bytes; of ours, the longest below is that of a node's state.
    let longest = scratch.join("a-node-of-twelve/state/agent.sock");
    assert!(
        longest.as_os_str().len() <= 107,
        "{}: too long a path for the sockets below; set TMPDIR to a shorter one",
        scratch.display()
    );
    let mount = rustix::fs::statvfs(scratch).expect("it was just made");
    assert!(
        !mount.f_flag.contains(StatVfsMountFlags::NOEXEC),
        "{}: nothing can be executed there (noexec); set TMPDIR to another place",
        scratch.display()
    );
}

/// Copies files and directories with their modes, as far as they stay there while a process lives in them;
/// sockets and locks of a running agent are left.
fn copy_files(from: &Path, to: &Path) {
    std::fs::create_dir(to).expect("the scratch directory is writable");
    let mode = std::fs::metadata(from).expect("it exists").permissions();
    std::fs::set_permissions(to, mode).expect("our own directory");
    for entry in std::fs::read_dir(from).expect("it is a directory") {
        let entry = entry.expect("it can be listed");
        let (kind, target) = (entry.file_type().expect("it exists"), to.join(entry.file_name()));
        if kind.is_dir() {
            copy_files(&entry.path(), &target);
        } else if kind.is_file() {
            match std::fs::copy(entry.path(), target) {
                Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
                copied => drop(copied.expect("there is room for a copy")),
            }
        }
    }
}

fn join_at(node: &Node, address: &str, token: &str, pin: &str) -> Outcome {
    let arguments = ["join", address, "--ca", pin, "--token-stdin", "--name", &node.name];
    run(&mut node.command(&arguments), token.as_bytes())
}

/// A machine, as far as the mesh can tell: state, workspaces and agent of its own.
pub struct Node {
    /// Its name.
    pub name: String,
    home: PathBuf,
    user: Option<u32>,
    program: PathBuf,
    /// A network namespace that all of it runs in.
    network: Option<PathBuf>,
    log: PathBuf,
    daemon: Option<Daemon>,
}

impl Node {
    /// A command of this node's agent.
    #[must_use]
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = match &self.network {
            None => Command::new(&self.program),
            Some(network) => {
                let mut command = Command::new("nsenter");
                command.arg(format!("--net={}", network.display())).arg(&self.program);
                command
            }
        };
        command.args(arguments);
        self.environment(&mut command);
        command
    }

    fn environment(&self, command: &mut Command) {
        command
            .env_remove("CORTEX_TOKEN")
            .env("HOME", &self.home)
            .env("CORTEX_STATE", self.home.join("state"))
            .env("CORTEX_CONFIG_DIR", self.home.join("config"))
            .current_dir(&self.home);
        if let Some(user) = self.user {
            assert!(is_root(), "only root starts agents as somebody else");
            command.uid(user).gid(user);
        }
    }

    /// Runs a command of this node's agent to its end.
    #[must_use]
    pub fn agent(&self, arguments: &[&str]) -> Outcome {
        run(&mut self.command(arguments), b"")
    }

    /// Starts the daemon.
    pub fn run(&mut self) {
        let mut command = self.command(&["run"]);
        self.daemon = Some(Daemon::start(&self.name, &mut command, &self.log));
    }

    /// Starts the daemon, to kill itself when it passes this point (`cortex_shared::crash`).
    pub fn run_to_crash_at(&mut self, point: &str) {
        let mut command = self.command(&["run"]);
        command.env(cortex_shared::crash::CRASH_AT, point);
        self.daemon = Some(Daemon::start(&self.name, &mut command, &self.log));
    }

    /// The daemon.
    ///
    /// # Panics
    /// If it does not run.
    pub fn daemon(&mut self) -> &mut Daemon {
        self.daemon.as_mut().expect("the agent runs")
    }

    /// `kill -9` to the daemon.
    pub fn kill(&mut self) {
        self.daemon().kill();
    }

    /// Stops the daemon in order.
    ///
    /// # Panics
    /// If it does not stop, or not in order.
    pub fn stop(&mut self) {
        let status = self.daemon().terminate();
        assert!(status.success(), "{} ended with {status}: {}", self.name, self.log());
    }

    /// What it has logged.
    #[must_use]
    pub fn log(&self) -> String {
        std::fs::read_to_string(&self.log).unwrap_or_default()
    }

    /// Its home directory.
    #[must_use]
    pub fn home(&self) -> &Path {
        &self.home
    }

    /// Where a workspace of it lies.
    #[must_use]
    pub fn workspace(&self, name: &str) -> PathBuf {
        self.home.join("cortex").join(name)
    }
}

/// Somebody who commands nodes: a configuration directory with a login.
pub struct Operator {
    config: PathBuf,
}

impl Operator {
    /// A command of this operator.
    #[must_use]
    pub fn command(&self, arguments: &[&str]) -> Command {
        let mut command = Command::new(program("agent-under-test"));
        command
            .args(arguments)
            .env_remove("CORTEX_TOKEN")
            .env_remove("CORTEX_STATE")
            .env("CORTEX_CONFIG_DIR", &self.config);
        command
    }

    /// Starts a command of this operator that says `started` when what it runs has begun, and waits for
    /// that; what it says besides is in `log`.
    ///
    /// # Panics
    /// If it does not say so.
    #[must_use]
    pub fn begin(&self, arguments: &[&str], log: &Path) -> Daemon {
        self.begin_with(arguments, log, Stdio::null())
    }

    /// The same, with this as its standard input.
    ///
    /// # Panics
    /// If it does not say so.
    #[must_use]
    pub fn begin_with(&self, arguments: &[&str], log: &Path, input: Stdio) -> Daemon {
        let mut client = Daemon::start_with("client", &mut self.command(arguments), log, input);
        client.line("that it started", |line| (line == "started").then_some(()));
        client
    }

    /// Runs a command of this operator to its end.
    #[must_use]
    pub fn agent(&self, arguments: &[&str]) -> Outcome {
        run(&mut self.command(arguments), b"")
    }
}
