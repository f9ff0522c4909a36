//! `skill list|show|versions|remove|restore|place`, and `workspace promote`: the library that every node has.

use std::ffi::OsString;
use std::path::Path;

use clap::{Args, Subcommand};
use cortex_proto::v1;
use cortex_shared::clock::unix_ms;
use cortex_shared::ids::NodeId;
use cortex_shared::text::hex;
use serde::Serialize;

use super::error::CliError;
use super::printer::{self, Row};
use super::workspace::{SyncRow, wire_path};
use super::{Global, Output, hub, node};
use crate::config::{LibraryPlace, Settings};

/// The library: directories of workspaces that every node has, read-only
#[derive(Debug, Args)]
#[command(after_help = "\
A skill is made by `workspace promote`. On every node it stands in the library (WORKSPACE-ROOT/.library
unless the node's owner chose another place), and commands see it at /library, which is also what the
variable CORTEX_LIBRARY says.

Examples:
  cortex-agent workspace promote app tools/lint --as lint
  cortex-agent exec build-1 -s '$CORTEX_LIBRARY/lint/run.sh'
  cortex-agent skill restore lint --version 2")]
pub(crate) struct SkillArgs {
    #[command(subcommand)]
    verb: SkillVerb,
}

#[derive(Debug, Subcommand)]
enum SkillVerb {
    /// List the skills
    List {
        /// Those that were removed as well
        #[arg(long)]
        removed: bool,
        #[command(flatten)]
        output: Output,
    },
    /// Show a skill: what is current, and which nodes have it
    Show {
        /// Its name
        skill: String,
        #[command(flatten)]
        output: Output,
    },
    /// List the versions of a skill, newest first
    Versions {
        /// Its name
        skill: String,
        #[command(flatten)]
        output: Output,
    },
    /// Take a skill out of the library; it can be restored for a while
    Remove {
        /// Its name
        skill: String,
        /// Only if this version is current
        #[arg(long, value_name = "VERSION")]
        expect: Option<u64>,
        /// Do not ask
        #[arg(long)]
        yes: bool,
        #[command(flatten)]
        output: Output,
    },
    /// Make an earlier version the next one
    #[command(disable_version_flag = true)]
    Restore {
        /// Its name
        skill: String,
        /// Which one [default: the one before, or the last one of a skill that was removed]
        #[arg(long, value_name = "VERSION")]
        version: Option<u64>,
        /// Only if this version is current; 0 for none
        #[arg(long, value_name = "VERSION")]
        expect: Option<u64>,
        #[command(flatten)]
        output: Output,
    },
    /// On this node: show or choose where the library is placed
    Place {
        /// A directory, `off` for nowhere, or `default`; counts once the agent is started again
        place: Option<OsString>,
        #[command(flatten)]
        output: Output,
    },
}

#[derive(Serialize)]
struct SkillRow {
    skill: String,
    version: u64,
    current: bool,
    /// Absent where it is not for the caller to know, or the workspace is no more.
    workspace: Option<String>,
    path: Option<String>,
    restored_from: Option<u64>,
    entries: u64,
    content_bytes: u64,
    promoted_by: String,
    promoted_at_ms: i64,
    ended_at_ms: Option<i64>,
    kept_until_ms: Option<i64>,
    digest: String,
}

impl SkillRow {
    fn of(version: v1::SkillVersion) -> Self {
        let known = !version.workspace.is_empty();
        let path = || String::from_utf8_lossy(&version.path).into_owned();
        Self {
            path: known.then(path),
            workspace: known.then_some(version.workspace),
            skill: version.skill,
            version: version.version,
            current: version.current,
            restored_from: (version.restored_from > 0).then_some(version.restored_from),
            entries: version.entries,
            content_bytes: version.content_bytes,
            promoted_by: version.promoted_by,
            promoted_at_ms: version.promoted_at_ms,
            ended_at_ms: (version.ended_at_ms > 0).then_some(version.ended_at_ms),
            kept_until_ms: (version.kept_until_ms > 0).then_some(version.kept_until_ms),
            digest: hex(&version.digest),
        }
    }

    fn origin(&self) -> String {
        let place = match (&self.workspace, &self.path) {
            (Some(workspace), Some(path)) => format!("{workspace}/{path}"),
            _ => "-".to_owned(),
        };
        match self.restored_from {
            Some(version) => format!("{place} (version {version})"),
            None => place,
        }
    }

    fn state(&self) -> String {
        match self.kept_until_ms {
            _ if self.current => "current".to_owned(),
            Some(until) if until > unix_ms() => format!("kept until {}", printer::time(until)),
            _ => "no longer kept".to_owned(),
        }
    }
}

impl Row for SkillRow {
    const COLUMNS: &'static [&'static str] =
        &["SKILL", "VERSION", "FROM", "ENTRIES", "SIZE", "BY", "TIME", "STATE"];

    fn cells(&self) -> Vec<String> {
        vec![
            self.skill.clone(),
            self.version.to_string(),
            self.origin(),
            self.entries.to_string(),
            printer::size(self.content_bytes),
            self.promoted_by.clone(),
            printer::time(self.promoted_at_ms),
            self.state(),
        ]
    }
}

#[derive(Serialize)]
struct NodeJson {
    node_id: String,
    node: String,
    online: bool,
    up_to_date: bool,
    status: Option<SyncRow>,
}

impl NodeJson {
    fn of(node: v1::SkillNode) -> Self {
        let id = NodeId::from_slice(&node.node_id);
        Self {
            node_id: id.map(|id| id.to_string()).unwrap_or_default(),
            node: node.node_name,
            online: node.online,
            up_to_date: node.up_to_date,
            status: node.status.as_ref().map(SyncRow::of),
        }
    }

    fn state(&self) -> String {
        match (self.up_to_date, self.online) {
            (true, _) => "has it".to_owned(),
            (false, true) => "on its way".to_owned(),
            (false, false) => "offline".to_owned(),
        }
    }
}

#[derive(Serialize)]
struct ShownJson {
    #[serde(flatten)]
    newest: SkillRow,
    nodes: Vec<NodeJson>,
}

#[derive(Serialize)]
struct PromotedJson {
    #[serde(flatten)]
    version: SkillRow,
    unchanged: bool,
    link: String,
}

#[derive(Serialize)]
struct RemovedJson {
    skill: String,
    removed_version: u64,
}

#[derive(Serialize)]
struct PlaceJson {
    /// Absent if the library is placed nowhere.
    library: Option<String>,
}

/// `workspace promote`.
pub(crate) async fn promote(
    global: &Global,
    workspace: String,
    path: OsString,
    skill: String,
    expected_version: Option<u64>,
    output: Output,
) -> Result<(), CliError> {
    let path = wire_path(&path);
    if path.is_empty() {
        return Err(CliError::usage(
            "a whole workspace cannot be promoted: name a directory in it",
        ));
    }
    let mut client = hub::operator(global).await?;
    let request = v1::PromoteSkillRequest { workspace, path, skill, expected_version };
    // As long as it takes: all of it is read once at the hub.
    let promoted = client.promote_skill(request).await?.into_inner();
    let version = SkillRow::of(promoted.version.unwrap_or_default());
    let unchanged = promoted.unchanged;
    let link = String::from_utf8_lossy(&promoted.link).into_owned();
    let sentence = match unchanged {
        true => format!("{} is version {} already, and is linked", version.skill, version.version),
        false => format!("{} is at version {} now", version.skill, version.version),
    };
    global.printer(output).say(&sentence, &PromotedJson { version, unchanged, link })
}

pub(crate) async fn skill(global: &Global, args: SkillArgs) -> Result<(), CliError> {
    match args.verb {
        SkillVerb::List { removed, output } => {
            let mut client = hub::operator(global).await?;
            let answer =
                client.list_skills(hub::question(v1::ListSkillsRequest { removed })).await?;
            let skills = answer.into_inner().skills.into_iter();
            global.printer(output).list(&skills.map(SkillRow::of).collect::<Vec<_>>())
        }
        SkillVerb::Show { skill, output } => {
            let shown = ask(global, skill).await?;
            let newest = SkillRow::of(shown.versions.into_iter().next().unwrap_or_default());
            let nodes: Vec<NodeJson> = shown.nodes.into_iter().map(NodeJson::of).collect();
            let json = ShownJson { newest, nodes };
            let newest = &json.newest;
            let size = format!(
                "{} files, links and directories, {}",
                newest.entries,
                printer::size(newest.content_bytes)
            );
            let mut lines = vec![
                ("skill", newest.skill.clone()),
                ("version", format!("{} ({})", newest.version, newest.state())),
                ("from", newest.origin()),
                ("by", newest.promoted_by.clone()),
                ("time", printer::time(newest.promoted_at_ms)),
                ("size", size),
                ("digest", newest.digest.clone()),
            ];
            for node in &json.nodes {
                lines.push(("node", format!("{}: {}", node.node, node.state())));
            }
            global.printer(output).show(&json, &lines)
        }
        SkillVerb::Versions { skill, output } => {
            let versions = ask(global, skill).await?.versions.into_iter();
            global.printer(output).list(&versions.map(SkillRow::of).collect::<Vec<_>>())
        }
        SkillVerb::Remove { skill, expect, yes, output } => {
            let deed = format!("take skill {skill} out of the library of all nodes");
            node::confirm(&deed, yes, &format!("cortex-agent skill remove {skill} --yes"))?;
            let mut client = hub::operator(global).await?;
            let request = v1::RemoveSkillRequest { skill: skill.clone(), expected_version: expect };
            let removed_version = client.remove_skill(request).await?.into_inner().removed_version;
            let sentence = format!(
                "removed {skill}, which was at version {removed_version}; `cortex-agent skill restore \
                 {skill}` brings it back"
            );
            global.printer(output).say(&sentence, &RemovedJson { skill, removed_version })
        }
        SkillVerb::Restore { skill, version, expect, output } => {
            let mut client = hub::operator(global).await?;
            let request = v1::RestoreSkillRequest {
                skill,
                version: version.unwrap_or_default(),
                expected_version: expect,
            };
            let restored = client.restore_skill(request).await?.into_inner();
            let row = SkillRow::of(restored.version.unwrap_or_default());
            let sentence = format!(
                "{} is at version {} now, which is version {} again",
                row.skill,
                row.version,
                row.restored_from.unwrap_or_default()
            );
            global.printer(output).say(&sentence, &row)
        }
        SkillVerb::Place { place, output } => {
            let state = global.state()?;
            let settings = match place {
                Some(place) => {
                    let place = LibraryPlace::parse(Path::new(&place)).map_err(CliError::usage)?;
                    Settings::update(&state, |settings| settings.library = place)?
                }
                None => Settings::load(&state)?,
            };
            let library = settings.library_dir().map(|dir| dir.display().to_string());
            let sentence = library.clone().unwrap_or_else(|| "off".to_owned());
            global.printer(output).say(&sentence, &PlaceJson { library })
        }
    }
}

async fn ask(global: &Global, skill: String) -> Result<v1::ShowSkillResponse, CliError> {
    let mut client = hub::operator(global).await?;
    let request = hub::question(v1::ShowSkillRequest { skill });
    Ok(client.show_skill(request).await?.into_inner())
}
