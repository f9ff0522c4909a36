//! This node's own audit files: what changed authority here, and what ran outside the sandbox or was
//! refused to.
//!
//! `STATE/audit.jsonl` has what was done here: joining, leaving, the ceiling, certificates, commands
//! outside the sandbox. `STATE/audit-hub.jsonl` has what the hub alone can cause as often as it
//! likes, policies and refused commands, so that this cannot push the other lines out.
//!
//! The hub has a log of its own; this one is for the day on which the hub is not believed. Lines
//! are only ever appended, each is durable before [`Audit::append`] returns, and writers (the
//! daemon and the commands of the owner) follow one another by a lock. The size is bounded: a full
//! file becomes `audit.1.jsonl` (`audit-hub.1.jsonl`) and so on, four of each, and the oldest goes. A
//! crash loses at most the line being written, and what is left of it is set apart by the next one.
//! What a hub sends by the thousand is counted instead of listed.

use std::fs::File;
use std::io::{self, Read as _, Seek as _, SeekFrom, Write as _};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use cortex_shared::clock::unix_ms;
use rustix::fs::OFlags;
use serde::Serialize;

use crate::config::{Folder, StateDir};

/// A file of this size is full.
const MAX_FILE_BYTES: u64 = 2 * 1024 * 1024;
/// Full files that are kept beside each current one: 20 MiB in all.
const KEPT_FILES: u32 = 4;
/// Longest text in one field; more is cut. Much of it comes from elsewhere.
const MAX_TEXT_BYTES: usize = 1024;
/// Refused commands that get a line of their own in one [`REFUSAL_PERIOD`].
const MAX_REFUSALS: u32 = 60;
const REFUSAL_PERIOD: Duration = Duration::from_secs(60);

/// A line could not be written durably.
#[derive(Debug, thiserror::Error)]
#[error("cannot write the audit file {}", path.display())]
pub struct AuditError {
    path: PathBuf,
    source: io::Error,
}

/// What is written down. The tag is the stable name of the action.
#[derive(Clone, Debug, Serialize)]
#[serde(tag = "action")]
pub enum AuditEvent {
    /// This machine became a node.
    #[serde(rename = "node.joined")]
    Joined {
        /// Its id.
        node_id: String,
        /// Its name.
        name: String,
        /// Its mesh.
        mesh_id: String,
        /// The hub it joined at.
        hub: String,
        /// The authorities it believes from now on, as pins.
        authorities: Vec<String>,
        /// The owner's bound at that time.
        ceiling: String,
    },
    /// This machine left its mesh.
    #[serde(rename = "node.left")]
    Left {
        /// Its id.
        node_id: String,
        /// Whether the hub knows of it.
        hub_told: bool,
    },
    /// A new certificate was stored.
    #[serde(rename = "identity.renewed")]
    Renewed {
        /// Its number.
        generation: u64,
        /// Its end.
        not_after_ms: i64,
        /// Whether the one before had expired.
        recovered: bool,
    },
    /// The hub says that another machine uses this identity.
    #[serde(rename = "identity.cloned")]
    Cloned {
        /// What it says.
        reason: String,
    },
    /// This machine took an identity of its own.
    #[serde(rename = "identity.forked")]
    Forked {
        /// The id that was put aside.
        old_node_id: String,
        /// The new one.
        node_id: String,
        /// Its name.
        name: String,
    },
    /// The hub named other authorities to believe.
    #[serde(rename = "hub.authorities")]
    Authorities {
        /// Those before, as pins.
        before: Vec<String>,
        /// Those the hub named.
        named: Vec<String>,
        /// Whether they count from now on.
        accepted: bool,
    },
    /// The owner changed the bound.
    #[serde(rename = "ceiling.set")]
    Ceiling {
        /// Before.
        before: String,
        /// After.
        after: String,
    },
    /// The hub told another policy for this node.
    #[serde(rename = "policy.received")]
    Policy {
        /// strict or permissive, and `, network full` where it allows that.
        policy: String,
        /// Its end; 0 for none.
        until_ms: i64,
        /// What a request that asks for everything gets with it, written in the same way.
        effective: String,
        /// Policies before this one that have no line of their own.
        #[serde(skip_serializing_if = "is_zero")]
        not_listed: u64,
    },
    /// A command runs outside the sandbox.
    #[serde(rename = "command.permissive")]
    Permissive(CommandLine),
    /// A command that was written down as running outside the sandbox did not start after all.
    #[serde(rename = "command.not_run")]
    NotRun {
        /// Which.
        #[serde(flatten)]
        command: CommandLine,
        /// Why.
        reason: String,
    },
    /// A command was to run outside the sandbox and did not.
    #[serde(rename = "command.refused")]
    Refused {
        /// Which.
        #[serde(flatten)]
        command: CommandLine,
        /// What was missing.
        reason: String,
        /// Refusals before this one that have no line of their own.
        #[serde(skip_serializing_if = "is_zero")]
        not_listed: u64,
    },
}

/// Which command, and who asked for it.
#[derive(Clone, Debug, Serialize)]
pub struct CommandLine {
    /// Its id.
    pub task_id: String,
    /// Who asked, as the hub says.
    pub actor: String,
    /// The role the hub says the actor has.
    pub role: String,
    /// The beginning of what was to run.
    pub command: String,
}

#[allow(clippy::trivially_copy_pass_by_ref)] // serde's signature
fn is_zero(number: &u64) -> bool {
    *number == 0
}

impl AuditEvent {
    /// The file it belongs to.
    fn file(&self) -> &'static str {
        match self {
            Self::Policy { .. } | Self::Refused { .. } => "audit-hub",
            _ => "audit",
        }
    }
}

#[derive(Serialize)]
struct Line<'a> {
    at_ms: i64,
    /// The user that did it: the owner's commands, or the daemon.
    uid: u32,
    process_id: u32,
    #[serde(flatten)]
    event: &'a AuditEvent,
}

/// The audit file of one state. Clones share the count of refusals.
#[derive(Clone, Debug)]
pub struct Audit {
    folder: PathBuf,
    refusals: Arc<Mutex<Refusals>>,
}

#[derive(Debug)]
struct Refusals {
    since: Instant,
    listed: u32,
    not_listed: u64,
}

impl Audit {
    /// The audit file of a state. Nothing is opened before the first line.
    #[must_use]
    pub fn of(state: &StateDir) -> Self {
        let refusals = Refusals { since: Instant::now(), listed: 0, not_listed: 0 };
        Self { folder: state.path().to_owned(), refusals: Arc::new(Mutex::new(refusals)) }
    }

    /// Appends a line; it is durable when this returns. Blocks for the disk.
    ///
    /// # Errors
    /// If the file system refuses. The caller decides whether the deed may happen without it.
    pub fn append(&self, event: &AuditEvent) -> Result<(), AuditError> {
        self.try_append(event).map_err(|source| {
            let path = self.folder.join(format!("{}.jsonl", event.file()));
            AuditError { path, source }
        })
    }

    /// Appends a line, or says in the log what could not be written: for deeds that have happened.
    pub fn note(&self, event: &AuditEvent) {
        if let Err(error) = self.append(event) {
            tracing::error!(error = %error.source, path = %error.path.display(), ?event, "an audit line is lost");
        }
    }

    /// As [`Audit::note`], for a refused command. Of a flood only the beginning is listed; the next
    /// line after it says how many are not.
    pub fn note_refusal(&self, command: CommandLine, reason: String) {
        let not_listed = {
            let mut refusals = self.refusals.lock().unwrap_or_else(PoisonError::into_inner);
            if refusals.since.elapsed() >= REFUSAL_PERIOD {
                refusals.since = Instant::now();
                refusals.listed = 0;
            }
            if refusals.listed >= MAX_REFUSALS {
                refusals.not_listed += 1;
                return;
            }
            refusals.listed += 1;
            std::mem::take(&mut refusals.not_listed)
        };
        self.note(&AuditEvent::Refused { command, reason, not_listed });
    }

    fn try_append(&self, event: &AuditEvent) -> io::Result<()> {
        let line = Line {
            at_ms: unix_ms(),
            uid: rustix::process::getuid().as_raw(),
            process_id: std::process::id(),
            event,
        };
        let mut text = serde_json::to_vec(&line)?;
        text.push(b'\n');
        let folder = Folder::open(&self.folder)?;
        // The lock is on a file of its own, because the audit file itself is renamed.
        let lock = folder.file("audit.lock", OFlags::WRONLY)?;
        lock.lock()?;
        let stem = event.file();
        let name = format!("{stem}.jsonl");
        let open = || folder.file(&name, OFlags::RDWR | OFlags::APPEND);
        let mut file = open()?;
        let mut length = file.metadata()?.len();
        let new = length == 0;
        if length + u64::try_from(text.len()).unwrap_or(u64::MAX) > MAX_FILE_BYTES && !new {
            rotate(&folder, stem)?;
            file = open()?;
            length = 0;
        }
        if length > 0 && !ends_with_newline(&mut file)? {
            // What a crash left of a line must not take this one with it.
            text.insert(0, b'\n');
        }
        file.write_all(&text)?;
        file.sync_all()?;
        if length == 0 {
            folder.sync()?;
        }
        Ok(())
    }
}

/// Makes room: each full file becomes one older, and the oldest is written over.
fn rotate(folder: &Folder, stem: &str) -> io::Result<()> {
    let full = |number: u32| format!("{stem}.{number}.jsonl");
    for number in (1..KEPT_FILES).rev() {
        match folder.rename(&full(number), &full(number + 1)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
            Ok(()) | Err(_) => {}
        }
    }
    folder.rename(&format!("{stem}.jsonl"), &full(1))
}

fn ends_with_newline(file: &mut File) -> io::Result<bool> {
    let mut last = [0];
    file.seek(SeekFrom::End(-1))?;
    file.read_exact(&mut last)?;
    Ok(last == *b"\n")
}

/// Text from elsewhere, at most as long as a field of a line may be.
#[must_use]
pub fn cut(text: &str) -> String {
    let whole = (0..=MAX_TEXT_BYTES.min(text.len())).rev().find(|end| text.is_char_boundary(*end));
    text[..whole.unwrap_or(0)].to_owned()
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;

    fn audit() -> (tempfile::TempDir, Audit) {
        let folder = tempfile::tempdir().unwrap();
        let state = StateDir::resolve(Some(folder.path().to_owned())).unwrap();
        (folder, Audit::of(&state))
    }

    impl Audit {
        pub(crate) fn path(&self) -> PathBuf {
            self.folder.join("audit.jsonl")
        }

        fn hub_path(&self) -> PathBuf {
            self.folder.join("audit-hub.jsonl")
        }
    }

    fn lines(path: &Path) -> Vec<serde_json::Value> {
        let text = std::fs::read_to_string(path).unwrap();
        text.lines().filter_map(|line| serde_json::from_str(line).ok()).collect()
    }

    fn command(n: u64) -> CommandLine {
        CommandLine {
            task_id: n.to_string(),
            actor: "ann".into(),
            role: "admin".into(),
            command: "id".into(),
        }
    }

    #[test]
    fn lines_are_appended_with_their_action_and_only_the_owner_may_read_them() {
        use std::os::unix::fs::PermissionsExt as _;
        let (_folder, audit) = audit();
        audit.append(&AuditEvent::Left { node_id: "n".into(), hub_told: true }).unwrap();
        audit.append(&AuditEvent::Permissive(command(1))).unwrap();
        let lines = lines(&audit.path());
        assert_eq!(lines[0]["action"], "node.left");
        assert_eq!(lines[0]["hub_told"], true);
        assert_eq!(lines[1]["action"], "command.permissive");
        assert_eq!(lines[1]["command"], "id");
        assert!(lines[1]["at_ms"].as_i64().unwrap() > 0);
        let mode = std::fs::metadata(audit.path()).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn half_a_line_left_by_a_crash_does_not_spoil_the_next() {
        let (_folder, audit) = audit();
        audit.append(&AuditEvent::Permissive(command(1))).unwrap();
        let whole = std::fs::read(audit.path()).unwrap();
        std::fs::write(audit.path(), &whole[..whole.len() / 2]).unwrap();
        audit.append(&AuditEvent::Permissive(command(2))).unwrap();
        let lines = lines(&audit.path());
        assert_eq!(lines.len(), 1);
        assert_eq!(lines[0]["task_id"], "2");
    }

    #[test]
    fn size_is_bounded_and_the_newest_lines_are_kept() {
        let (folder, audit) = audit();
        let full = vec![b' '; usize::try_from(MAX_FILE_BYTES).unwrap()];
        for n in 0..8 {
            std::fs::write(audit.path(), &full).unwrap();
            audit.append(&AuditEvent::Permissive(command(n))).unwrap();
            assert_eq!(lines(&audit.path())[0]["task_id"], n.to_string());
        }
        let kept = std::fs::read_dir(folder.path()).unwrap().count();
        // The current file, the full ones, the lock.
        assert_eq!(kept, usize::try_from(KEPT_FILES).unwrap() + 2);
    }

    #[test]
    fn flood_of_refusals_is_counted_instead_of_listed() {
        let (_folder, audit) = audit();
        for n in 0..u64::from(MAX_REFUSALS) + 40 {
            audit.note_refusal(command(n), "no".into());
        }
        assert_eq!(lines(&audit.hub_path()).len(), usize::try_from(MAX_REFUSALS).unwrap());
        audit.refusals.lock().unwrap().listed = 0;
        audit.note_refusal(command(0), "no".into());
        assert_eq!(lines(&audit.hub_path()).last().unwrap()["not_listed"], 40);
        // Nothing of it stands where it could push out what was done here.
        assert!(!audit.path().exists());
    }

    #[test]
    fn writers_of_several_threads_keep_their_lines_whole() {
        let (_folder, audit) = audit();
        std::thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for n in 0..10 {
                        audit.append(&AuditEvent::Permissive(command(n))).unwrap();
                    }
                });
            }
        });
        assert_eq!(lines(&audit.path()).len(), 40);
    }

    #[test]
    fn long_text_is_cut_between_characters() {
        let text = "ä".repeat(MAX_TEXT_BYTES);
        assert_eq!(cut(&text).len(), MAX_TEXT_BYTES);
        assert_eq!(cut("short"), "short");
    }
}
