//! The settings of the hub: one table, from which its flags, its environment variables, its file and
//! their documentation are made.
//!
//! What is not here is not a matter of taste: sizes that both ends of the protocol rely on, bounds of one
//! message, and what follows from other settings. Its reason stands beside it in the code.
//!
//! A value is looked for in this order: flag, environment variable, file, default. Each is checked
//! where it is read; a key that is not in the table is an error.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::ops::RangeInclusive;
use std::path::{Path, PathBuf};
use std::time::Duration;

use cortex_shared::policy::LONGEST_POLICY;
use cortex_shared::telemetry::LogFormat;

use super::HubConfig;
use super::http::HttpUrl;
use crate::enroll::ca::NODE_CERTIFICATE_LIVES;
use crate::rate::Rate;
use crate::task::limits::NODE_COMMANDS;

/// Largest configuration file that is read.
const MAX_FILE_BYTES: u64 = 1024 * 1024;

/// A pack has to fit, with some room for the next.
const MIN_CONTENT_MEMORY: u32 = 16 << 20;

/// One line of the table.
pub struct Setting {
    /// Its key in the file; with dashes, its flag; in capitals after `CORTEX_HUB_`, its variable.
    pub name: &'static str,
    /// The kind of value, as help shows it.
    pub kind: &'static str,
    /// What it means and why its default is what it is.
    pub help: &'static str,
    show: fn(&HubConfig) -> String,
    set: fn(&mut HubConfig, &str) -> Result<(), String>,
}

/// Why a configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file.
    #[error("cannot read {}", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// What the system said.
        #[source]
        source: std::io::Error,
    },
    /// It is not TOML, or too large.
    #[error("{} is not a configuration: {problem}", path.display())]
    Syntax {
        /// Which.
        path: PathBuf,
        /// Where and why.
        problem: String,
    },
    /// A key that means nothing.
    #[error("{}: there is no setting {name:?}{}", path.display(), meant.as_ref().map_or_else(String::new, |name| format!("; did you mean {name:?}?")))]
    Unknown {
        /// Which file.
        path: PathBuf,
        /// The key.
        name: String,
        /// The nearest there is.
        meant: Option<String>,
    },
    /// A value that cannot be.
    #[error("{place}: {name}: {problem}")]
    Value {
        /// The file, or the environment.
        place: String,
        /// Which setting.
        name: &'static str,
        /// Why not.
        problem: String,
    },
}

macro_rules! settings {
    ($($(#[doc = $help:literal])+ $name:ident: $kind:literal $(in $range:expr)? => $($field:ident).+;)+) => {
        /// Every setting, in the order in which the file shows them.
        pub const SETTINGS: &[Setting] = &[$(Setting {
            name: stringify!($name),
            kind: $kind,
            help: concat!($($help, "\n"),+),
            show: |config| config.$($field).+.show(),
            set: |config, text| {
                let value = Value::parse(text)?;
                $(within(&value, &$range)?;)?
                config.$($field).+ = value;
                Ok(())
            },
        }),+];
    };
}

settings! {
    /// Address and port of the gRPC side, which nodes and operators dial; port 0 takes a free one.
    /// Loopback unless told otherwise: a hub is opened to a network by somebody who wants that.
    grpc: "ADDR:PORT" => grpc;
    /// Host name or address that invites tell nodes to dial, if another than that of `grpc`.
    advertise: "HOST" => advertise;
    /// Address and port of the HTTP side: installing nodes, health, metrics, API and web page; port 0 takes
    /// a free one, and `off` has none. Loopback unless told otherwise.
    http: "ADDR:PORT" => http.listen;
    /// Where the HTTP side is reached, if a proxy or another name stands before it, such as
    /// https://hub.example.org. Lines that invites print then rely on the certificate of that place, and
    /// pin no key.
    http_url: "URL" => http.url;
    /// File with the certificate chain of the HTTP side, in PEM, instead of one that the mesh's authority
    /// signs; with `http_key`. Read again on SIGHUP.
    http_certificate: "FILE" => http.certificate;
    /// File with the key of `http_certificate`, in PEM.
    http_key: "FILE" => http.key;
    /// Folder with the agents that nodes download (`cortex-agent`, or `cortex-agent-linux-x86_64` and the
    /// like). Without a value, the folder of the hub's own program, then /usr/lib/cortex.
    http_agents: "DIR" => http.agents;
    /// Connections to the HTTP side at the same time; one more is closed. A thousand machines may install
    /// at once.
    http_connections: "N" in 8..=1_000_000 => http.connections;
    /// Connections to the HTTP side that one address (of version 6, one network of 64 bits) may have at the
    /// same time; one more is closed, and the others find some left. Behind a proxy all come from one address:
    /// as many as `http_connections` then.
    http_address_connections: "N" in 8..=1_000_000 => http.address_connections;
    /// Agents that are downloaded at the same time, a quarter of them by one address; whoever asks for one
    /// more is told to come again in a few seconds, as install.sh does. Each takes some memory.
    http_downloads: "N" in 4..=10_000 => http.downloads;
    /// How long a connection may go on downloading an agent; it is closed then. So nobody keeps the place of
    /// others by reading slowly.
    http_download_time: "DURATION" in Duration::from_secs(1)..=Duration::from_secs(86_400) => http.download_time;
    /// Largest header of a request over HTTP, in bytes.
    http_header_bytes: "N" in 8192..=1_048_576 => http.header_bytes;
    /// Largest body of a request over HTTP, in bytes; nothing that is sent is large.
    http_request_bytes: "N" in 1024..=16_777_216 => http.request_bytes;
    /// How long a request over HTTP may take, downloads and streams aside.
    http_request_time: "DURATION" in Duration::from_millis(100)..=Duration::from_secs(600) => http.request_time;
    /// How long a connection over HTTP has for the header of its first request, and an HTTP/1.1 one for that
    /// of each that follows; it is closed then, however slowly bytes come.
    http_header_time: "DURATION" in Duration::from_millis(100)..=Duration::from_secs(600) => http.header_time;
    /// How long a connection over HTTP is kept on which nothing moves, beyond the time that a request may
    /// take: a peer that takes nothing of what it asked for. Streams and HTTP/2 give signs of life every 15
    /// to 20 s.
    http_idle_time: "DURATION" in Duration::from_secs(20)..=Duration::from_secs(3600) => http.idle_time;
    /// How long a login of a browser lasts at most; it ends after an hour without use. A working day.
    http_session_life: "DURATION" in Duration::from_secs(60)..=Duration::from_secs(7 * 86_400) => http.session_life;
    /// File with a token by which /metrics is read from elsewhere than this machine, sent as
    /// `Authorization: Bearer`.
    http_metrics_token: "FILE" => http.metrics_token;
    /// How long a node may say nothing before it sends a heartbeat. A session from which nothing came
    /// for three times as long has ended. Below the 60 s after which common NAT boxes forget a
    /// connection.
    heartbeat: "DURATION" in Duration::from_secs(1)..=Duration::from_secs(300) => heartbeat;
    /// How long somebody who joins or logs in waits for an answer at most.
    join_deadline: "DURATION" in Duration::from_millis(100)..=Duration::from_secs(600) => join_deadline;
    /// Joins and logins that wait for the store at the same time; more are told when to come back.
    join_queue: "N" in 1..=1_000_000 => join_queue;
    /// Joins and logins a second that one address may try, with four times as many at once; 0 for no
    /// limit. A rack that boots behind one address gets in within seconds; a guesser gets nowhere.
    join_rate: "N" => join_rate;
    /// How long a node's certificate lives; nodes renew it at half of that.
    node_certificate_life: "DURATION" in NODE_CERTIFICATE_LIVES => node_certificate_life;
    /// How long a command waits to be journalled before it is refused, certainly not begun. Longer than
    /// a slow disk takes, shorter than people wait.
    accept_deadline: "DURATION" in Duration::from_millis(100)..=Duration::from_secs(600) => accept_deadline;
    /// How long a node has to begin a command that it was given.
    task_start_deadline: "DURATION" in Duration::from_millis(100)..=Duration::from_secs(600) => task_start_deadline;
    /// How long a node or a caller that was cut off has to come back to its commands; 0s ends them at
    /// once. A restart of the hub, or a change of networks, takes some seconds.
    resume_grace: "DURATION" in Duration::ZERO..=Duration::from_secs(3600) => resume_grace;
    /// Output kept of one command, for those who read it later. The oldest goes first.
    task_output: "SIZE" in 65_536..=u64::MAX => spool.task_bytes;
    /// Output kept of all commands together. That of the oldest command goes first.
    all_output: "SIZE" in 1_048_576..=u64::MAX => spool.total_bytes;
    /// Commands whose output is kept; that of the oldest goes first, whatever its size.
    kept_commands: "N" in 1..=1_000_000 => spool.tasks;
    /// Output kept of each node in its history.
    history_bytes: "SIZE" in 65_536..=u64::MAX => history.bytes;
    /// Pieces of output kept of each node in its history.
    history_pieces: "N" in 100..=u64::MAX => history.segments;
    /// Events in memory. Who follows events more slowly than they come is served from the disk.
    events_in_memory: "N" in 16..=1_000_000 => events.in_memory;
    /// Events kept on disk, for those who come back; some hundred bytes each.
    events_kept: "N" in 100..=100_000_000 => events.kept;
    /// How long they are kept.
    events_keep_for: "DURATION" in Duration::from_secs(60)..=Duration::from_secs(366 * 24 * 3600) => events.keep_for;
    /// How often one operator may follow events at the same time.
    event_subscriptions: "N" in 1..=100_000 => events.subscriptions;
    /// Least time between two times that the mesh monitor writes down when nodes were last seen.
    worker_mesh_monitor: "DURATION" in Duration::from_millis(100)..=Duration::from_secs(3600) => workers.mesh_monitor;
    /// How often the mark of the audit log is moved. Younger lines can be cut off unseen if the hub is
    /// killed.
    worker_audit_anchor: "DURATION" in Duration::from_secs(1)..=Duration::from_secs(86_400) => workers.audit_anchor;
    /// How often content is looked for that nothing names any more. Each look reads all entries.
    worker_pack_collection: "DURATION" in Duration::from_secs(60)..=Duration::from_secs(30 * 86_400) => workers.pack_collection;
    /// How often the history of forgotten nodes and old events are removed.
    worker_history_trim: "DURATION" in Duration::from_secs(60)..=Duration::from_secs(30 * 86_400) => workers.history_trim;
    /// How often invites are forgotten that are of no use any more.
    worker_invite_expiry: "DURATION" in Duration::from_secs(60)..=Duration::from_secs(30 * 86_400) => workers.invite_expiry;
    /// How long an invite that expired or was revoked is still listed.
    invite_keep: "DURATION" in Duration::from_secs(3600)..=Duration::from_secs(3660 * 86_400) => workers.invite_keep;
    /// How often certificates are looked for that expired while their nodes were away.
    worker_certificate_sweep: "DURATION" in Duration::from_secs(60)..=Duration::from_secs(30 * 86_400) => workers.certificate_sweep;
    /// How often what is left of deleted workspaces is removed.
    worker_mirror_cleanup: "DURATION" in Duration::from_secs(60)..=Duration::from_secs(30 * 86_400) => workers.mirror_cleanup;
    /// Commands that run at once, of all nodes; each takes some tens of kilobytes without its output.
    commands: "N" in 1..=1_000_000 => commands.hub;
    /// Commands that run at once on one node, of all callers; its agent runs 256 at most.
    node_commands: "N" in 1..=NODE_COMMANDS => commands.node;
    /// Commands that one agent token has running at once. A program works through a handful of things at
    /// a time; one that starts more is in a loop.
    token_commands: "N" in 1..=NODE_COMMANDS => commands.agent_token;
    /// Output that one command of an agent token may write. The logs of a large build fit.
    token_output: "SIZE" in 65_536..=u64::MAX => commands.agent_token_output;
    /// Output that waits in memory for readers that do not take it, of all commands. With less, commands
    /// with slow readers wait more.
    output_memory: "SIZE" in 16_777_216..=u64::MAX => commands.hub_memory;
    /// The same of one node's commands, so that one node does not take all of it.
    node_output_memory: "SIZE" in 4_194_304..=u64::MAX => commands.node_memory;
    /// Longest time for which an administrator may allow a node's commands more than STRICT, or the
    /// network until an end; 30 days at most, since nodes take nothing for longer.
    permissive_longest: "DURATION" in Duration::from_secs(60)..=LONGEST_POLICY => permissive_longest;
    /// Content of workspaces on its way in that is in memory, of all members; some fifty packs keep a
    /// disk busy.
    content_memory: "SIZE" in MIN_CONTENT_MEMORY..=u32::MAX => content.hub_bytes;
    /// The same of one member, and as much again on its way out: six packs are enough for 1 Gbit/s with a
    /// quarter of a second of round trip.
    member_content_memory: "SIZE" in MIN_CONTENT_MEMORY..=u32::MAX => content.member_bytes;
    /// What stays free on the disk: no content of workspaces is taken beyond it. Without a value a
    /// hundredth of the disk, 2 GiB at most.
    disk_reserve: "SIZE" => content.reserve_bytes;
    /// How long a version of a skill can be restored after another took its place, or it was removed.
    skills_keep_for: "DURATION" in Duration::ZERO..=Duration::from_secs(100 * 365 * 24 * 3600) => skills_keep_for;
    /// How long a stop waits for open calls, and again for the databases.
    shutdown_grace: "DURATION" in Duration::from_millis(100)..=Duration::from_secs(600) => shutdown_grace;
    /// How long `cortex-hubd drain` waits for commands that run before the hub stops. Those that still do
    /// then go on, and are handed to the next hub; so a short wait loses nothing.
    drain_wait: "DURATION" in Duration::from_millis(1)..=Duration::from_secs(86_400) => drain_wait;
    /// Nodes come back within this time after a stop, spread evenly; more than 1,000 need some more. It
    /// should be well below `resume_grace`.
    reconnect_spread: "DURATION" in Duration::ZERO..=Duration::from_secs(300) => reconnect_spread;
    /// What is logged: error, warn, info, debug, trace, or a list such as info,cortex_hubd=debug. Read
    /// again on SIGHUP. The environment variable CORTEX_LOG goes before the file and CORTEX_HUB_LOG.
    log: "FILTER" => log.filter;
    /// How log lines look: text, or json with one object a line.
    log_format: "FORMAT" => log.format;
}

impl Setting {
    /// The environment variable that sets it.
    #[must_use]
    pub fn variable(&self) -> String {
        format!("CORTEX_HUB_{}", self.name.to_ascii_uppercase())
    }

    /// The flag that sets it, without its two dashes.
    #[must_use]
    pub fn flag(&self) -> String {
        self.name.replace('_', "-")
    }

    /// Its value in a configuration; empty for one that is not set.
    #[must_use]
    pub fn show(&self, config: &HubConfig) -> String {
        (self.show)(config)
    }

    /// Changes a configuration.
    ///
    /// # Errors
    /// What is wrong with the text, for people; the configuration is as it was.
    pub fn set(&self, config: &mut HubConfig, text: &str) -> Result<(), String> {
        (self.set)(config, text)
    }
}

/// Changes `config` to what the file says.
///
/// # Errors
/// If the file cannot be read, has a key that is not in the table, or a value that cannot be.
pub fn apply_file(config: &mut HubConfig, path: &Path) -> Result<(), ConfigError> {
    apply_document(config, path, &read_file(path)?)
}

/// What is in a file of settings.
///
/// # Errors
/// If it cannot be read, or is larger than any such file.
pub fn read_file(path: &Path) -> Result<String, ConfigError> {
    let read = |source| ConfigError::Read { path: path.to_owned(), source };
    if std::fs::metadata(path).map_err(read)?.len() > MAX_FILE_BYTES {
        let problem = format!("larger than {MAX_FILE_BYTES} bytes");
        return Err(ConfigError::Syntax { path: path.to_owned(), problem });
    }
    std::fs::read_to_string(path).map_err(read)
}

/// Changes `config` to what this text says, which was read from that file.
///
/// # Errors
/// If it has a key that is not in the table, or a value that cannot be.
pub fn apply_document(config: &mut HubConfig, path: &Path, text: &str) -> Result<(), ConfigError> {
    let syntax = |problem: String| ConfigError::Syntax { path: path.to_owned(), problem };
    let table: toml::Table =
        text.parse().map_err(|error: toml::de::Error| syntax(error.to_string()))?;
    for (name, value) in table {
        let Some(setting) = SETTINGS.iter().find(|setting| setting.name == name) else {
            let names = SETTINGS.iter().map(|setting| setting.name);
            let meant = crate::node::registry::most_similar(&name, names);
            return Err(ConfigError::Unknown { path: path.to_owned(), name, meant });
        };
        let text = match value {
            toml::Value::String(text) => Ok(text),
            toml::Value::Integer(number) => Ok(number.to_string()),
            other => Err(format!("expected a string or a number, not a {}", other.type_str())),
        };
        text.and_then(|text| setting.set(config, &text)).map_err(|problem| ConfigError::Value {
            place: path.display().to_string(),
            name: setting.name,
            problem,
        })?;
    }
    Ok(())
}

/// Changes `config` to what was said by flags or variables, by the settings' names.
///
/// # Errors
/// If a value cannot be.
pub fn apply_texts(
    config: &mut HubConfig,
    texts: &BTreeMap<&'static str, String>,
) -> Result<(), ConfigError> {
    for setting in SETTINGS {
        if let Some(text) = texts.get(setting.name) {
            setting.set(config, text).map_err(|problem| ConfigError::Value {
                place: "flags and environment".to_owned(),
                name: setting.name,
                problem,
            })?;
        }
    }
    Ok(())
}

/// The file with every setting as it is in `config`, each explained. Those that are at their default are
/// commented out.
#[must_use]
pub fn document(config: &HubConfig) -> String {
    let default = HubConfig::new(config.data.clone());
    let mut text = String::from(
        "# Configuration of cortex-hubd. A flag or an environment variable goes before it:\n\
         # --resume-grace, CORTEX_HUB_RESUME_GRACE. Durations: 500ms, 10s, 5m, 24h, 7d. Sizes: 65536,\n\
         # 64 KiB, 16 MiB, 1 GiB. `cortex-hubd check --config FILE` says whether it can be used.\n",
    );
    for setting in SETTINGS {
        text.push('\n');
        for line in setting.help.lines() {
            text.push_str("# ");
            text.push_str(line.trim());
            text.push('\n');
        }
        let value = setting.show(config);
        let commented = if value == setting.show(&default) { "# " } else { "" };
        let quoted = toml::Value::String(value);
        text.push_str(&format!("{commented}{} = {quoted}\n", setting.name));
    }
    text
}

/// A kind of value.
trait Value: Sized {
    fn parse(text: &str) -> Result<Self, String>;
    fn show(&self) -> String;
}

fn within<T: Value + PartialOrd>(value: &T, range: &RangeInclusive<T>) -> Result<(), String> {
    if range.contains(value) {
        return Ok(());
    }
    Err(format!("expected {} to {}", range.start().show(), range.end().show()))
}

impl Value for SocketAddr {
    fn parse(text: &str) -> Result<Self, String> {
        text.parse().map_err(|_| "expected an address and a port, such as 0.0.0.0:7443".to_owned())
    }

    fn show(&self) -> String {
        self.to_string()
    }
}

impl Value for Option<SocketAddr> {
    fn parse(text: &str) -> Result<Self, String> {
        if text == "off" { Ok(None) } else { SocketAddr::parse(text).map(Some) }
    }

    fn show(&self) -> String {
        self.map_or_else(|| "off".to_owned(), |address| address.to_string())
    }
}

impl Value for Option<HttpUrl> {
    fn parse(text: &str) -> Result<Self, String> {
        if text.is_empty() { Ok(None) } else { text.parse().map(Some) }
    }

    fn show(&self) -> String {
        self.as_ref().map_or_else(String::new, |url| url.as_str().to_owned())
    }
}

impl Value for Option<PathBuf> {
    fn parse(text: &str) -> Result<Self, String> {
        Ok((!text.is_empty()).then(|| PathBuf::from(text)))
    }

    fn show(&self) -> String {
        self.as_ref().map_or_else(String::new, |path| path.display().to_string())
    }
}

impl Value for Option<String> {
    fn parse(text: &str) -> Result<Self, String> {
        Ok((!text.is_empty()).then(|| text.to_owned()))
    }

    fn show(&self) -> String {
        self.clone().unwrap_or_default()
    }
}

impl Value for String {
    fn parse(text: &str) -> Result<Self, String> {
        Ok(text.to_owned())
    }

    fn show(&self) -> String {
        self.clone()
    }
}

impl Value for usize {
    fn parse(text: &str) -> Result<Self, String> {
        text.parse().map_err(|_| "expected a whole number".to_owned())
    }

    fn show(&self) -> String {
        self.to_string()
    }
}

/// A number, or a size with a unit.
impl Value for u64 {
    fn parse(text: &str) -> Result<Self, String> {
        let digits = text.len() - text.trim_start_matches(|c: char| c.is_ascii_digit()).len();
        let problem = || "expected a number, or a size such as 64 KiB or 16 MiB".to_owned();
        let number: Self = text[..digits].parse().map_err(|_| problem())?;
        let shift = match text[digits..].trim() {
            "" | "B" => 0,
            "KiB" => 10,
            "MiB" => 20,
            "GiB" => 30,
            "TiB" => 40,
            _ => return Err(problem()),
        };
        number.checked_mul(1 << shift).ok_or_else(problem)
    }

    fn show(&self) -> String {
        let units = [(40, "TiB"), (30, "GiB"), (20, "MiB"), (10, "KiB")];
        let whole = |shift: &u32| *self > 0 && self.trailing_zeros() >= *shift;
        units
            .iter()
            .find(|(shift, _)| whole(shift))
            .map_or_else(|| self.to_string(), |(shift, unit)| format!("{} {unit}", self >> shift))
    }
}

/// The same, for what is counted in fewer bits.
impl Value for u32 {
    fn parse(text: &str) -> Result<Self, String> {
        let most = || format!("expected at most {}", Self::MAX.show());
        Self::try_from(u64::parse(text)?).map_err(|_| most())
    }

    fn show(&self) -> String {
        u64::from(*self).show()
    }
}

impl Value for Option<u64> {
    fn parse(text: &str) -> Result<Self, String> {
        if text.is_empty() { Ok(None) } else { u64::parse(text).map(Some) }
    }

    fn show(&self) -> String {
        self.as_ref().map_or_else(String::new, Value::show)
    }
}

impl Value for Duration {
    fn parse(text: &str) -> Result<Self, String> {
        if matches!(text, "0" | "0s") { Ok(Self::ZERO) } else { crate::cli::parse_duration(text) }
    }

    fn show(&self) -> String {
        let ms = self.as_millis();
        let units = [(86_400_000, "d"), (3_600_000, "h"), (60_000, "m"), (1000, "s")];
        let whole = units.iter().find(|(size, _)| ms.is_multiple_of(*size) && ms > 0);
        match whole {
            _ if ms == 0 => "0s".to_owned(),
            // Days are for lives of weeks; everybody says 24h.
            Some((size, "d")) if ms / size < 2 => format!("{}h", ms / 3_600_000),
            Some((size, unit)) => format!("{}{unit}", ms / size),
            None => format!("{ms}ms"),
        }
    }
}

impl Value for Option<Rate> {
    fn parse(text: &str) -> Result<Self, String> {
        let per_second = text.parse().map_err(|_| "expected a whole number".to_owned())?;
        Ok(crate::enroll::limits::join_rate(per_second))
    }

    fn show(&self) -> String {
        self.map_or_else(|| "0".to_owned(), |rate| rate.per_second.to_string())
    }
}

impl Value for LogFormat {
    fn parse(text: &str) -> Result<Self, String> {
        match text {
            "text" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            _ => Err("expected text or json".to_owned()),
        }
    }

    fn show(&self) -> String {
        match self {
            Self::Text => "text".to_owned(),
            Self::Json => "json".to_owned(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn config() -> HubConfig {
        HubConfig::new(PathBuf::from("/data"))
    }

    fn file(text: &str) -> (tempfile::TempDir, PathBuf) {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("hubd.toml");
        std::fs::write(&path, text).unwrap();
        (folder, path)
    }

    #[test]
    fn what_is_shown_of_each_setting_sets_it() {
        for setting in SETTINGS {
            let mut config = config();
            let shown = setting.show(&config);
            assert_eq!(setting.set(&mut config, &shown), Ok(()), "{}", setting.name);
            assert_eq!(setting.show(&config), shown, "{}", setting.name);
            assert!(setting.help.len() > 20, "{} is not explained", setting.name);
        }
    }

    #[test]
    fn the_documented_file_is_a_file_that_changes_nothing_until_it_is_changed() {
        let text = document(&config());
        let (_folder, path) = file(&text);
        let mut read = config();
        apply_file(&mut read, &path).unwrap();
        assert_eq!(document(&read), text);
        let (_folder, path) = file(
            &text
                .replace("# ", "")
                .lines()
                .filter(|l| l.contains(" = \""))
                .collect::<Vec<_>>()
                .join("\n"),
        );
        apply_file(&mut read, &path).unwrap();
        assert_eq!(document(&read), text, "every line can be taken into use as it stands");
    }

    #[test]
    fn mistakes_in_a_file_are_named() {
        for (text, said) in [
            ("resume_grac = \"5s\"", "did you mean \"resume_grace\"?"),
            ("resume_grace = \"5 parsecs\"", "resume_grace: expected a unit"),
            ("resume_grace = true", "not a boolean"),
            ("node_certificate_life = \"1s\"", "expected 10s to 30d"),
            // Nodes would take no policy for longer.
            ("permissive_longest = \"31d\"", "to 30d"),
            ("join_queue = 0", "expected 1 to 1000000"),
            ("task_output = \"1 KB\"", "such as 64 KiB"),
            ("grpc = \"example.org\"", "an address and a port"),
            ("grpc = ", "not a configuration"),
        ] {
            let (_folder, path) = file(text);
            let error = apply_file(&mut config(), &path).unwrap_err().to_string();
            assert!(error.contains(said), "{text}: {error}");
        }
    }

    #[test]
    fn values_are_taken_from_the_nearest_place() {
        let (_folder, path) = file("resume_grace = \"5s\"\ntask_output = 131072\njoin_rate = 7");
        let mut config = config();
        apply_file(&mut config, &path).unwrap();
        apply_texts(&mut config, &BTreeMap::from([("resume_grace", "0s".to_owned())])).unwrap();
        assert_eq!(config.resume_grace, Duration::ZERO);
        assert_eq!(config.spool.task_bytes, 128 << 10);
        assert_eq!(config.join_rate.map(|rate| (rate.burst, rate.per_second)), Some((28, 7.0)));
    }
}
