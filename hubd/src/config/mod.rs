//! The hub's configuration: what was asked for, and what that comes to.

pub mod http;
pub mod rewrite;
pub mod settings;

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use cortex_shared::policy::LONGEST_POLICY;
use cortex_shared::telemetry::LogFormat;

pub use self::http::HttpConfig;
use crate::enroll::ca::NODE_CERTIFICATE_LIFE;
use crate::enroll::limits::DEFAULT_JOIN_RATE;
use crate::events::EventLimits;
use crate::rate::Rate;
use crate::store::history::HistoryLimits;
use crate::sync::ContentLimits;
use crate::task::limits::CommandLimits;
use crate::task::spool::SpoolLimits;
use crate::worker::Periods;

/// Default port of the gRPC side.
pub const DEFAULT_GRPC_PORT: u16 = 7443;

/// A configuration that cannot be wrong.
#[derive(Clone, Debug)]
pub struct HubConfig {
    /// Where everything durable lives.
    pub data: PathBuf,
    /// Address of the gRPC side. Loopback unless told otherwise.
    pub grpc: SocketAddr,
    /// Host name or address that invites tell nodes to dial.
    pub advertise: Option<String>,
    /// The HTTP side.
    pub http: HttpConfig,
    /// How long a node may say nothing before it sends a heartbeat; more where very many nodes are
    /// connected. A session from which nothing came for three times as long has ended.
    pub heartbeat: Duration,
    /// How long a joining caller waits for an answer at most.
    pub join_deadline: Duration,
    /// Joins that wait for the store at the same time; more are told to come back.
    pub join_queue: usize,
    /// How often one address may try to join or log in; without one, as often as it likes.
    pub join_rate: Option<Rate>,
    /// How long a node's certificate lives; it is renewed at half of that.
    pub node_certificate_life: Duration,
    /// How long a command waits to be journalled before it is given up.
    pub accept_deadline: Duration,
    /// How long a node has to open the output stream of a task it was given.
    pub task_start_deadline: Duration,
    /// How long a node whose session was lost, or a caller whose stream broke, has to come back to its
    /// commands. Zero ends them at once.
    pub resume_grace: Duration,
    /// How much of the output of commands is kept for those who read it later.
    pub spool: SpoolLimits,
    /// How much of the output of each node is kept.
    pub history: HistoryLimits,
    /// How long an old version of a skill is kept.
    pub skills_keep_for: Duration,
    /// How much is kept of events.
    pub events: EventLimits,
    /// How often background work is done.
    pub workers: Periods,
    /// How many commands run at once, and what they may take.
    pub commands: CommandLimits,
    /// Longest time for which a node's commands may be allowed more than STRICT.
    pub permissive_longest: Duration,
    /// How much of workspaces' content may be in memory, and what stays free on the disk.
    pub content: ContentLimits,
    /// How long shutdown waits for open calls.
    pub shutdown_grace: Duration,
    /// How long a drain waits for commands that run, unless its caller says.
    pub drain_wait: Duration,
    /// Within which time nodes come back after a stop, spread evenly.
    pub reconnect_spread: Duration,
    /// What is logged, and how it looks.
    pub log: LogSettings,
}

/// What is logged, and how it looks.
#[derive(Clone, Debug)]
pub struct LogSettings {
    /// In the syntax of `tracing_subscriber::EnvFilter`.
    pub filter: String,
    /// See there.
    pub format: LogFormat,
}

impl HubConfig {
    /// The defaults, for everything in `data`.
    #[must_use]
    pub fn new(data: PathBuf) -> Self {
        Self {
            data,
            grpc: SocketAddr::new(IpAddr::V4(Ipv4Addr::LOCALHOST), DEFAULT_GRPC_PORT),
            advertise: None,
            http: HttpConfig::default(),
            // A line that went dead without a word is noticed after 12 s, on both sides. Far below the
            // 60 s after which common NAT boxes forget a connection, too.
            heartbeat: Duration::from_secs(4),
            join_deadline: Duration::from_secs(15),
            join_queue: 1024,
            join_rate: Some(DEFAULT_JOIN_RATE),
            node_certificate_life: NODE_CERTIFICATE_LIFE,
            // Longer than a slow disk takes, shorter than people wait.
            accept_deadline: Duration::from_secs(15),
            task_start_deadline: Duration::from_secs(10),
            // A restart of the hub, or a change of networks, takes some seconds; longer than that people
            // do not want to wait to hear that a machine is gone.
            resume_grace: Duration::from_secs(10),
            spool: SpoolLimits::default(),
            history: HistoryLimits::default(),
            skills_keep_for: Duration::from_secs(90 * 24 * 3600),
            events: EventLimits::default(),
            workers: Periods::default(),
            commands: CommandLimits::default(),
            permissive_longest: LONGEST_POLICY,
            content: ContentLimits::default(),
            shutdown_grace: Duration::from_secs(10),
            drain_wait: Duration::from_secs(30),
            // 500 handshakes a second are half of what one core does: a thousand nodes come back within
            // it, and nobody waits longer than a hub takes to start.
            reconnect_spread: Duration::from_secs(2),
            log: LogSettings { filter: "info".to_owned(), format: LogFormat::Text },
        }
    }

    /// The default place for a hub run by this user.
    #[must_use]
    pub fn default_data() -> PathBuf {
        if rustix::process::geteuid().is_root() {
            return PathBuf::from("/var/lib/cortex-hubd");
        }
        Self::user_data()
    }

    /// This user's own, also if it is root.
    #[must_use]
    pub fn user_data() -> PathBuf {
        directories::ProjectDirs::from("", "", "cortex-hubd").map_or_else(
            || PathBuf::from("cortex-hubd-data"),
            |directories| directories.data_dir().to_path_buf(),
        )
    }
}

/// Files below the data directory.
#[derive(Clone, Debug)]
pub struct DataLayout(PathBuf);

impl DataLayout {
    /// The layout below `data`.
    #[must_use]
    pub fn new(data: &Path) -> Self {
        Self(data.to_path_buf())
    }

    /// The folder itself.
    #[must_use]
    pub fn root(&self) -> &Path {
        &self.0
    }

    /// The main database.
    #[must_use]
    pub fn database(&self) -> PathBuf {
        self.0.join("hub.db")
    }

    /// The certificate authority.
    #[must_use]
    pub fn ca(&self) -> PathBuf {
        self.0.join("ca")
    }

    /// The mark of the audit log.
    #[must_use]
    pub fn audit_mark(&self) -> PathBuf {
        self.0.join("audit.head")
    }

    /// The administration socket.
    #[must_use]
    pub fn socket(&self) -> PathBuf {
        self.0.join("admin.sock")
    }

    /// Held while a hub runs on this data.
    #[must_use]
    pub fn lock(&self) -> PathBuf {
        self.0.join("lock")
    }

    /// The key of the HTTP side's own certificate.
    #[must_use]
    pub fn http_key(&self) -> PathBuf {
        self.0.join("http.key")
    }

    /// The latest output of each task.
    #[must_use]
    pub fn tasks(&self) -> PathBuf {
        self.0.join("tasks")
    }

    /// The history of nodes.
    #[must_use]
    pub fn history(&self) -> PathBuf {
        self.0.join("history.db")
    }

    /// The latest events.
    #[must_use]
    pub fn events(&self) -> PathBuf {
        self.0.join("events.db")
    }

    /// What a restore that has not ended yet has put together; while it is there, no hub starts.
    #[must_use]
    pub fn restoring(&self) -> PathBuf {
        self.0.join("restoring")
    }

    /// Workspace content.
    #[must_use]
    pub fn workspaces(&self) -> PathBuf {
        self.0.join("ws")
    }
}
