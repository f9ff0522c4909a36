//! Learning what changed at the hub.

use futures_util::StreamExt as _;

use super::Session;
use crate::sync::core::{SyncError, waiting};
use crate::sync::hub::{Head, Hub, HubError};
use crate::sync::index::Cursor;

/// Brings Remote up to the head. Returns the head that was reached.
///
/// If the hub's history is not the one known here (it was restored from a backup, or the index is
/// new), everything known of it is forgotten first.
pub(in crate::sync) async fn refresh<H: Hub>(
    session: &mut Session<'_, H>,
) -> Result<Cursor, SyncError> {
    let Head { epoch, seq } = waiting(session.cancel, session.hub.head(session.workspace)).await?;
    let known = session.core.run(|core| core.index.cursor()).await?;
    let mut cursor = match known {
        Some(cursor) if cursor.epoch == epoch && cursor.seq <= seq => cursor,
        _ => {
            if known.is_some() {
                tracing::warn!(?known, %epoch, seq, "history at the hub was replaced: merging anew");
            }
            let cursor = Cursor { epoch, seq: 0 };
            session
                .core
                .run(move |core| {
                    core.index.batch(|writer| {
                        writer.forget_history()?;
                        writer.set_cursor(cursor)
                    })
                })
                .await?;
            cursor
        }
    };
    if cursor.seq == seq {
        return Ok(cursor);
    }
    let mut pages =
        waiting(session.cancel, session.hub.changes(session.workspace, cursor.seq)).await?;
    let next = async |pages: &mut crate::sync::hub::Answers<_>| pages.next().await.transpose();
    while let Some(page) = waiting(session.cancel, next(&mut pages)).await? {
        if page.last_seq < cursor.seq || page.last_seq > page.head_seq {
            return Err(HubError::protocol("pages of changes do not advance").into());
        }
        cursor.seq = page.last_seq;
        session
            .core
            .run(move |core| {
                let ignore = &core.ignore;
                core.index.batch(|writer| {
                    // What is left out here is not accepted from others either.
                    for change in page.changes {
                        if !ignore.ignores(&change.path) {
                            writer.set_remote(&change.path, change.entry)?;
                        }
                    }
                    writer.set_cursor(cursor)
                })
            })
            .await?;
        session.progress.head(page.head_seq);
        if cursor.seq == page.head_seq {
            break;
        }
    }
    Ok(cursor)
}
