//! `invite create|list|revoke`: who may join.

use std::collections::BTreeMap;
use std::time::Duration;

use clap::{Args, Subcommand};
use cortex_proto::v1;
use serde::Serialize;

use super::error::CliError;
use super::printer::Row;
use super::units::parse_duration;
use super::{Global, Output, hub, join, printer};

/// Who may join
#[derive(Debug, Args)]
pub(crate) struct InviteArgs {
    #[command(subcommand)]
    verb: InviteVerb,
}

#[derive(Debug, Subcommand)]
enum InviteVerb {
    /// Make an invite, and print the line to run on the node
    #[command(after_help = "\
The token is shown once. What rides on the invite (labels, workspaces) becomes the node's when it
joins.

Example:
  cortex-agent invite create --uses 10 --ttl 1d --label env=ci --name-pattern 'ci-*'")]
    Create(CreateArgs),
    /// List invites, used up and expired ones included
    List {
        #[command(flatten)]
        output: Output,
    },
    /// End an invite; nodes that joined with it stay
    Revoke {
        /// Its id: the 8 characters in the middle of the token
        id: String,
    },
}

#[derive(Debug, Args)]
struct CreateArgs {
    /// How many nodes it admits [default: 1]
    #[arg(long)]
    uses: Option<u32>,
    /// How long it is valid, such as 30m, 1h or 7d [default: 1h]
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    ttl: Option<Duration>,
    /// A label for each node; may be repeated
    #[arg(long = "label", value_name = "KEY=VALUE")]
    labels: Vec<String>,
    /// Names the nodes may take, with * and ?
    #[arg(long, value_name = "PATTERN")]
    name_pattern: Option<String>,
    /// A workspace each node becomes a member of; may be repeated
    #[arg(long = "workspace", value_name = "W")]
    workspaces: Vec<String>,
    /// Source addresses it is good from, such as 10.0.0.0/8; may be repeated
    #[arg(long, value_name = "CIDR")]
    from: Vec<String>,
    /// Who the nodes belong to; shown with them
    #[arg(long)]
    owner: Option<String>,
    #[command(flatten)]
    output: Output,
}

#[derive(Serialize)]
struct Created {
    token: String,
    id: String,
    ca_pin: String,
    expires_at: String,
    expires_at_ms: i64,
    command: String,
    join_command: String,
}

#[derive(Serialize)]
struct InviteRow {
    id: String,
    kind: String,
    uses: u32,
    max_uses: u32,
    created_at_ms: i64,
    expires_at_ms: i64,
    created_by: String,
    revoked: bool,
    labels: BTreeMap<String, String>,
    name_pattern: String,
    workspaces: Vec<String>,
    source_cidrs: Vec<String>,
    owner: String,
}

impl Row for InviteRow {
    const COLUMNS: &'static [&'static str] = &["ID", "KIND", "USES", "EXPIRES", "BY", "STATE"];

    fn cells(&self) -> Vec<String> {
        let state = if self.revoked {
            "revoked"
        } else if self.expires_at_ms < cortex_shared::clock::unix_ms() {
            "expired"
        } else if self.uses >= self.max_uses {
            "used up"
        } else {
            "open"
        };
        vec![
            self.id.clone(),
            self.kind.clone(),
            format!("{}/{}", self.uses, self.max_uses),
            printer::time(self.expires_at_ms),
            self.created_by.clone(),
            state.to_owned(),
        ]
    }
}

pub(crate) async fn invite(global: &Global, args: InviteArgs) -> Result<(), CliError> {
    match args.verb {
        InviteVerb::Create(args) => create(global, args).await,
        InviteVerb::List { output } => {
            let mut client = hub::operator(global).await?;
            let answer = client.list_invites(hub::question(v1::ListInvitesRequest {})).await?;
            let rows: Vec<InviteRow> = answer
                .into_inner()
                .invites
                .into_iter()
                .map(|invite| InviteRow {
                    id: invite.id,
                    kind: invite.kind,
                    uses: invite.uses,
                    max_uses: invite.max_uses,
                    created_at_ms: invite.created_at_ms,
                    expires_at_ms: invite.expires_at_ms,
                    created_by: invite.created_by,
                    revoked: invite.revoked,
                    labels: invite.labels.into_iter().collect(),
                    name_pattern: invite.name_pattern,
                    workspaces: invite.workspaces,
                    source_cidrs: invite.source_cidrs,
                    owner: invite.owner,
                })
                .collect();
            global.printer(output).list(&rows)
        }
        InviteVerb::Revoke { id } => {
            let mut client = hub::operator(global).await?;
            client.revoke_invite(hub::question(v1::RevokeInviteRequest { id })).await?;
            Ok(())
        }
    }
}

async fn create(global: &Global, args: CreateArgs) -> Result<(), CliError> {
    let labels = join::parse_labels(&args.labels)?;
    if args.uses == Some(0) {
        return Err(CliError::usage("--uses 0 admits nobody"));
    }
    let request = v1::CreateInviteRequest {
        uses: args.uses.unwrap_or(0),
        ttl_ms: args.ttl.map_or(0, super::units::millis),
        labels: labels.into_iter().collect(),
        name_pattern: args.name_pattern.unwrap_or_default(),
        workspaces: args.workspaces,
        source_cidrs: args.from,
        owner: args.owner.unwrap_or_default(),
    };
    let mut client = hub::operator(global).await?;
    let answer = client.create_invite(hub::question(request)).await?.into_inner();
    let created = Created {
        token: answer.token,
        id: answer.id,
        ca_pin: answer.ca_pin,
        expires_at: printer::time(answer.expires_at_ms),
        expires_at_ms: answer.expires_at_ms,
        command: answer.command,
        join_command: answer.join_command,
    };
    let installed = match created.join_command == created.command {
        true => String::new(),
        false => created.join_command.clone(),
    };
    let mut lines = vec![
        ("token", created.token.clone()),
        ("id", created.id.clone()),
        ("ca pin", created.ca_pin.clone()),
        ("valid until", printer::time(created.expires_at_ms)),
        ("on the node", created.command.clone()),
        ("where the agent is", installed),
    ];
    lines.retain(|(_, value)| !value.is_empty());
    global.printer(args.output).show(&created, &lines)
}
