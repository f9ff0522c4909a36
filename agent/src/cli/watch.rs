//! `workspace status` of the mesh, and following it until all members are equal.

use cortex_proto::v1;
use indicatif::{ProgressBar, ProgressStyle};

use super::error::{CliError, Exit};
use super::printer::{Format, progress_is_visible};
use super::workspace::WorkspaceRow;
use super::{Global, Output, hub};

pub(super) async fn status(
    global: &Global,
    workspace: String,
    watch: bool,
    output: Output,
) -> Result<(), CliError> {
    let mut client = hub::operator(global).await?;
    let request = v1::WorkspaceStatusRequest { workspace, watch };
    let mut updates = client.workspace_status(request).await?.into_inner();
    let mut printer = global.printer(output);
    let bar = (watch && output.format == Format::Table && progress_is_visible()).then(progress_bar);
    let mut last = None;
    while let Some(update) = updates.message().await? {
        let Some(info) = update.workspace else { continue };
        let row = WorkspaceRow::of(info);
        // A program that follows wants every step; people want the last one, and a bar until then.
        if watch && output.format == Format::Jsonl {
            printer.show(&row, &[])?;
        }
        if let Some(bar) = &bar {
            draw(bar, &row);
        }
        let done = !watch || at_head(&row);
        last = Some(row);
        if done {
            break;
        }
    }
    if let Some(bar) = bar {
        bar.finish_and_clear();
    }
    let row = last.ok_or_else(|| CliError::new(Exit::Unreachable, "the hub sent no status"))?;
    if watch && output.format == Format::Jsonl {
        return Ok(());
    }
    printer.show(&row, &row.lines())
}

/// Whether every member that is online has applied the head and has nothing to send. Members that
/// are offline would keep a watcher for ever.
fn at_head(row: &WorkspaceRow) -> bool {
    row.members.iter().filter(|member| member.online).all(|member| {
        member.status.as_ref().is_some_and(|status| {
            status.state == "idle"
                && status.pending_push == 0
                && status.applied_seq == row.head_seq
                && member.applied_seq == row.head_seq
        })
    })
}

fn progress_bar() -> ProgressBar {
    let style = ProgressStyle::with_template("{bar:30} {pos}/{len} files  {msg}")
        .expect("the template is valid");
    ProgressBar::new(0).with_style(style)
}

fn draw(bar: &ProgressBar, row: &WorkspaceRow) {
    let statuses = || row.members.iter().filter_map(|member| member.status.as_ref());
    bar.set_length(statuses().map(|status| status.files_total).sum());
    bar.set_position(statuses().map(|status| status.files_done).sum());
    let behind = row
        .members
        .iter()
        .filter(|member| member.online && member.applied_seq < row.head_seq)
        .map(|member| super::error::printable(&member.node_name))
        .collect::<Vec<_>>()
        .join(", ");
    bar.set_message(if behind.is_empty() { String::new() } else { format!("behind: {behind}") });
}

#[cfg(test)]
mod tests {
    use super::*;

    fn member(online: bool, applied: u64, status: Option<v1::SyncStatus>) -> v1::WorkspaceMember {
        v1::WorkspaceMember { online, applied_seq: applied, status, ..Default::default() }
    }

    #[test]
    fn watching_ends_when_all_that_are_online_are_at_the_head_with_nothing_to_send() {
        let idle = |applied, pending| {
            Some(v1::SyncStatus {
                applied_seq: applied,
                pending_push: pending,
                ..Default::default()
            })
        };
        let busy = Some(v1::SyncStatus {
            applied_seq: 5,
            state: v1::SyncState::Uploading.into(),
            ..Default::default()
        });
        for (what, members, done) in [
            ("nobody", vec![], true),
            ("all there", vec![member(true, 5, idle(5, 0)), member(true, 5, idle(5, 0))], true),
            ("one behind", vec![member(true, 5, idle(5, 0)), member(true, 4, idle(4, 0))], false),
            ("something to send", vec![member(true, 5, idle(5, 3))], false),
            ("busy", vec![member(true, 5, busy)], false),
            ("not heard of yet", vec![member(true, 5, None)], false),
            ("offline one behind", vec![member(true, 5, idle(5, 0)), member(false, 1, None)], true),
        ] {
            let info = v1::WorkspaceInfo { head_seq: 5, members, ..Default::default() };
            assert_eq!(at_head(&WorkspaceRow::of(info)), done, "{what}");
        }
    }
}
