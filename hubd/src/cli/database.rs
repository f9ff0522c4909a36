//! `db backup`, `db restore` and `db verify`: on the hub's files, whether it runs or not.

use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::bail;
use clap::Subcommand;
use indicatif::{ProgressBar, ProgressStyle};
use serde_json::json;

use super::DataArg;
use super::admin::time;
use super::output::{self, Format};
use crate::backup::{self, Manifest, StoreFiles};
use crate::config::DataLayout;
use crate::store::Actor;

/// Problems that are listed; all are counted.
const LISTED: usize = 1000;

#[derive(Subcommand)]
pub(super) enum DbCommand {
    /// Copy everything durable to a folder, while the hub runs or not
    #[command(after_help = "\
FILE is a folder, which is made. Made again in the same folder, a backup copies only the content that is
new, and replaces the one before once it is complete; interrupted, it leaves the one before. It takes the
rights of the hub's user or of root, and holds the keys of the mesh's authority: keep it as you keep those.
The settings (/etc/cortex/hubd.toml), the output of commands that can still be read and the latest events
are not in it.

Exit codes: 0 all is in it, 1 it was not made, or lacks content that the hub has lost.")]
    Backup {
        /// The folder, here or on another disk
        file: PathBuf,
        #[command(flatten)]
        data: DataArg,
        #[command(flatten)]
        format: Format,
    },
    /// Put a backup back into a data directory where nothing is
    #[command(after_help = "\
Start the hub afterwards: nodes come back by themselves, also with certificates that are newer than the
backup, and members of workspaces merge what they have and delete nothing. What was decided since the backup
is not known: revoke again what was revoked, and admit again who joined. Invites that were open are revoked.

Interrupted, it leaves a directory on which no hub starts; run it again.")]
    Restore {
        /// The backup
        file: PathBuf,
        #[command(flatten)]
        data: DataArg,
        #[command(flatten)]
        format: Format,
    },
    /// Check databases, content and audit log, of the hub or of a backup; changes nothing
    #[command(after_help = "\
Exit codes: 0 all is sound, 1 something is not, and was told.")]
    Verify {
        /// A backup, instead of the hub's data
        file: Option<PathBuf>,
        #[command(flatten)]
        data: DataArg,
        #[command(flatten)]
        format: Format,
    },
}

pub(super) async fn db(command: DbCommand) -> anyhow::Result<()> {
    match command {
        DbCommand::Backup { file, data, format } => {
            let layout = DataLayout::new(&data.config().data);
            let bar = Bar::new();
            let tell = bar.clone();
            let made = tokio::task::spawn_blocking(move || {
                backup::back_up(&layout, &file, &mut |what, done, all| tell.tell(what, done, all))
            });
            let made = made.await??;
            bar.end();
            let manifest = &made.manifest;
            let document = json!({
                "mesh": manifest.mesh.to_string(),
                "created_at": time(manifest.created_at_ms),
                "workspaces": manifest.workspaces.len(),
                "packs": made.packs,
                "packs_copied": made.packs_copied,
                "bytes_copied": made.bytes_copied,
                "packs_lost": made.lost.len(),
            });
            let text = format!(
                "{} workspaces, {} packs, of which {} were new ({} bytes)",
                manifest.workspaces.len(),
                made.packs,
                made.packs_copied,
                made.bytes_copied,
            );
            output::show(format, &document, &text);
            for (workspace, pack) in made.lost.iter().take(LISTED) {
                output::warn(&format!("workspace {workspace}: the hub has lost pack {pack}"));
            }
            if !made.lost.is_empty() {
                bail!(
                    "the backup was made, but the hub has lost {} packs (hint: it asks its members for \
                     them when it reads them; cortex-hubd db verify)",
                    made.lost.len()
                );
            }
        }
        DbCommand::Restore { file, data, format } => {
            let layout = DataLayout::new(&data.config().data);
            let by =
                Actor { name: "local".to_owned(), uid: Some(rustix::process::geteuid().as_raw()) };
            let bar = Bar::new();
            let mut tell = |what: &str, done, all| bar.tell(what, done, all);
            let restored = backup::restore(&file, &layout, &by, &mut tell).await?;
            bar.end();
            let manifest = &restored.manifest;
            let document = json!({
                "mesh": manifest.mesh.to_string(),
                "created_at": time(manifest.created_at_ms),
                "workspaces": manifest.workspaces.len(),
                "packs": restored.packs,
                "packs_lost": restored.lost,
                "invites_revoked": restored.invites_revoked.iter().map(ToString::to_string).collect::<Vec<_>>(),
            });
            let text = format!(
                "restored to what it was at {}: {} workspaces, {} packs; {} open invites are revoked",
                time(manifest.created_at_ms).unwrap_or_default(),
                manifest.workspaces.len(),
                restored.packs,
                restored.invites_revoked.len(),
            );
            output::show(format, &document, &text);
            if restored.lost > 0 {
                output::warn(&format!(
                    "{} packs are not in the backup, or are damaged there: the hub will ask its members",
                    restored.lost
                ));
            }
        }
        DbCommand::Verify { file, data, format } => verify(file, &data, format).await?,
    }
    Ok(())
}

async fn verify(file: Option<PathBuf>, data: &DataArg, format: Format) -> anyhow::Result<()> {
    let (files, manifest) = match &file {
        Some(file) => {
            let manifest = Manifest::read(file)?;
            (StoreFiles::of_backup(file, &manifest), Some(manifest))
        }
        None => (StoreFiles::live(&DataLayout::new(&data.config().data)), None),
    };
    let bar = Bar::new();
    let tell = bar.clone();
    let looking = tokio::task::spawn_blocking(move || {
        let mut problems = Vec::new();
        let found = backup::verify(
            &files,
            manifest.as_ref(),
            &mut |what, done, all| tell.tell(what, done, all),
            &mut |place, what| {
                if problems.len() < LISTED {
                    problems.push((place.to_owned(), what.to_owned()));
                }
            },
        );
        found.map(|found| (found, problems))
    });
    let (found, problems) = looking.await??;
    bar.end();
    let listed = problems.iter().map(|(place, what)| json!({ "place": place, "problem": what }));
    let document = json!({
        "intact": found.problems == 0,
        "databases": found.databases,
        "workspaces": found.workspaces,
        "entries": found.entries,
        "old_versions": found.old_versions,
        "packs": found.packs,
        "pack_bytes": found.pack_bytes,
        "chunks_wanted": found.wanted,
        "audit_lines": found.audit_lines,
        "problems_found": found.problems,
        "problems": listed.collect::<Vec<_>>(),
    });
    let mut text: String =
        problems.iter().map(|(place, what)| format!("{place}: {what}\n")).collect();
    text.push_str(&format!(
        "{} databases, {} workspaces with {} entries and {} old versions, {} packs ({} bytes), {} lines \
         of the audit log: ",
        found.databases,
        found.workspaces,
        found.entries,
        found.old_versions,
        found.packs,
        found.pack_bytes,
        found.audit_lines,
    ));
    text.push_str(&match found.problems {
        0 => "all sound".to_owned(),
        number => format!("{number} problems"),
    });
    output::show(format, &document, &text);
    if found.wanted > 0 {
        output::warn(&format!(
            "{} chunks are known to be lost; the members have been asked for them",
            found.wanted
        ));
    }
    if found.problems > 0 {
        bail!(
            "{} problems (hint: content that is missing or damaged comes back from the members when the \
             hub reads it; for a damaged database, restore a backup)",
            found.problems
        );
    }
    Ok(())
}

/// Progress, on a terminal only.
#[derive(Clone)]
struct Bar {
    bar: ProgressBar,
    what: Arc<Mutex<String>>,
}

impl Bar {
    fn new() -> Self {
        let bar = ProgressBar::no_length();
        if let Ok(style) = ProgressStyle::with_template("{spinner} {msg} {pos}/{len}") {
            bar.set_style(style);
        }
        bar.enable_steady_tick(Duration::from_millis(200));
        Self { bar, what: Arc::default() }
    }

    fn tell(&self, what: &str, done: u64, all: u64) {
        let mut shown = self.what.lock().unwrap_or_else(PoisonError::into_inner);
        if *shown != what {
            what.clone_into(&mut shown);
            self.bar.set_message(what.to_owned());
        }
        self.bar.set_length(all);
        self.bar.set_position(done);
    }

    fn end(&self) {
        self.bar.finish_and_clear();
    }
}
