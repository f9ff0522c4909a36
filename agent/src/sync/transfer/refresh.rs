//! Learning what changed at the hub.

use cortex_shared::entry::Digest;
use futures_util::StreamExt as _;

use super::Session;
use crate::sync::core::{Core, SyncError, waiting};
use crate::sync::hub::{ChangesPage, Commit, Committed, Contact, Head, Hub, HubError};
use crate::sync::ignore::Ignore;
use crate::sync::index::{Cursor, IndexError, SentOp, Unanswered, Writer};

/// How far the hub is known now.
#[derive(Clone, Debug)]
pub(in crate::sync) struct Refreshed {
    pub(in crate::sync) cursor: Cursor,
    /// What was known of the hub was forgotten: both sides are merged anew.
    pub(in crate::sync) anew: bool,
    /// Chunks that the hub has lost.
    pub(in crate::sync) wanted: Vec<Digest>,
}

/// Brings Remote up to the head.
///
/// If the hub's history is not the one known here (it was restored from a backup, or the index is
/// new), everything known of it is forgotten first.
///
/// That somebody lets the deletions go that are held here is not said by the hub for long: `confirmed` is set
/// as soon as it has been, whatever fails after that.
pub(in crate::sync) async fn refresh<H: Hub>(
    session: &mut Session<'_, H>,
    confirmed: &mut bool,
) -> Result<Refreshed, SyncError> {
    ask_for_answer(session).await?;
    let (cursor, known) = session
        .core
        .run(|core| Ok::<_, IndexError>((core.index.cursor()?, core.index.known_head()?)))
        .await?;
    let Contact { head, wanted, confirm_deletes } =
        waiting(session.cancel, session.hub, session.hub.head(session.workspace, known)).await?;
    *confirmed = confirm_deletes;
    let Head { epoch, seq, root } = head;
    let same = cursor.filter(|cursor| cursor.epoch == epoch && cursor.seq <= seq);
    let anew = same.is_none();
    if anew && cursor.is_some() {
        tracing::warn!(?cursor, %epoch, seq, "history at the hub was replaced: merging anew");
    }
    let mut cursor = same.unwrap_or(Cursor { epoch, seq: 0 });
    session
        .core
        .run(move |core| {
            core.index.batch(|writer| {
                if anew {
                    writer.forget_history()?;
                    writer.set_cursor(cursor)?;
                }
                told(writer, known, head)
            })
        })
        .await?;
    if cursor.seq == seq {
        return Ok(Refreshed { cursor, anew, wanted });
    }
    let known = Some(Head { epoch, seq, root });
    let mut pages = waiting(
        session.cancel,
        session.hub,
        session.hub.changes(session.workspace, cursor.seq, known),
    )
    .await?;
    let (mut read_to, mut listing) = (cursor.seq, false);
    let next = async |pages: &mut crate::sync::hub::Answers<_>| pages.next().await.transpose();
    while let Some(page) = waiting(session.cancel, session.hub, next(&mut pages)).await? {
        let ChangesPage { changes, last_seq, head_seq, root, complete } = page;
        let begins = complete && !listing;
        if begins {
            tracing::info!(seq = cursor.seq, "away for too long: reading the whole tree");
            (read_to, listing) = (0, true);
        }
        if last_seq < read_to || last_seq > head_seq || complete != listing {
            return Err(HubError::protocol("pages of changes do not advance").into());
        }
        read_to = last_seq;
        let ends = last_seq == head_seq;
        // A listing that is cut off begins anew: until its end nothing is known to be gone.
        if ends || !listing {
            cursor.seq = last_seq;
        }
        session
            .core
            .run(move |core| {
                let ignore = Ignore::default();
                core.index.batch(|writer| {
                    if begins {
                        writer.begin_listing()?;
                    }
                    // What is always left out is not accepted from others either. What rules leave out
                    // is remembered: they may change.
                    for change in changes {
                        if complete && change.entry.is_some() {
                            writer.list(&change.path)?;
                        }
                        if !ignore.ignores(&change.path, false) {
                            writer.set_remote(&change.path, change.entry)?;
                        }
                    }
                    if complete && ends {
                        writer.end_listing()?;
                    }
                    writer.set_cursor(cursor)?;
                    told(writer, known, Head { epoch, seq: head_seq, root })
                })
            })
            .await?;
        session.progress.head(head_seq);
        if ends {
            break;
        }
    }
    Ok(Refreshed { cursor, anew, wanted })
}

/// Asks what became of a commit whose answer was lost: the hub knows the result of what it has taken by its
/// idempotency key, whatever is asked for under it now, and that is nothing.
async fn ask_for_answer<H: Hub>(session: &mut Session<'_, H>) -> Result<(), SyncError> {
    let noted = |core: &mut Core| {
        let unanswered = core.index.unanswered()?;
        Ok::<_, SyncError>(unanswered.zip(core.index.cursor()?))
    };
    let Some((Unanswered { id, ops }, cursor)) = session.core.run(noted).await? else {
        return Ok(());
    };
    let nothing = Commit { id, epoch: cursor.epoch, ops: Vec::new(), known: None, rules: None };
    let committing = session.hub.commit(session.workspace, nothing);
    let answer = match waiting(session.cancel, session.hub, committing).await {
        Ok(answer) => Some(answer).filter(|answer| answer.seq > cursor.seq),
        Err(SyncError::Hub(error)) if !matches!(error, HubError::Unavailable { .. }) => {
            tracing::info!(%error, "what became of the last commit is not known");
            // Who may not ask now may be let in again. If it is this only, what changed goes on arriving.
            if matches!(error, HubError::Refused { .. }) && !error.is_other_history() {
                return Ok(());
            }
            None
        }
        Err(error) => return Err(error),
    };
    let answered = answer.as_ref().map(|answer| (answer.seq, answer.root));
    let taken = answer.and_then(|answer| taken(ops, &answer)).unwrap_or_default();
    let record = move |core: &mut Core| {
        let known = core.index.known_head()?;
        core.index.batch(|writer| {
            // Should the hub be put back to before it was taken, this is the proof.
            if let Some((seq, root)) = answered.filter(|_| !taken.is_empty())
                && known.is_none_or(|known| known.seq < seq)
            {
                writer.set_known_head(seq, &root)?;
            }
            for (op, seq) in taken {
                // Otherwise it may have come from somebody else, after it had gone here.
                if op.ours && seq != 0 {
                    writer.set_taken(&op.path, op.new)?;
                } else {
                    writer.set_remote(&op.path, op.new)?;
                }
            }
            writer.forget_sent()
        })
    };
    session.core.run(record).await?;
    Ok(())
}

/// Which operations a commit has applied, with their numbers; none if it was never taken.
fn taken(ops: Vec<SentOp>, answer: &Committed) -> Option<Vec<(SentOp, u64)>> {
    let mut applied: Vec<_> = ops.into_iter().map(Some).collect();
    for rejected in &answer.rejected {
        applied.get_mut(rejected.index)?.take()?;
    }
    let applied: Vec<_> = applied.into_iter().flatten().collect();
    let is_it = applied.len() == answer.seqs.len();
    is_it.then(|| applied.into_iter().zip(answer.seqs.iter().copied()).collect())
}

/// Notes the newest head the hub told of: should the hub ever lose it, this is the proof.
fn told(writer: &Writer<'_>, known: Option<Head>, head: Head) -> Result<(), IndexError> {
    if known == Some(head) { Ok(()) } else { writer.set_known_head(head.seq, &head.root) }
}
