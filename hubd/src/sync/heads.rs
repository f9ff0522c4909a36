//! Telling everybody who asked which workspaces have moved.
//!
//! A subscriber that does not look for a while misses intermediate versions and nothing else: only
//! the newest head of each workspace is kept, so a slow subscriber costs no memory.

use std::collections::HashMap;

use cortex_shared::ids::WorkspaceId;
use tokio::sync::watch;

use crate::store::workspace::Head;

#[derive(Debug, Default)]
struct Board {
    /// Number of the last move.
    moves: u64,
    /// The newest head of each open workspace, and the move that set it.
    heads: HashMap<WorkspaceId, (u64, Head)>,
}

/// Where workspaces announce their heads.
#[derive(Debug, Default)]
pub(super) struct HeadBoard(watch::Sender<Board>);

impl HeadBoard {
    /// Announces a durable head.
    pub(super) fn announce(&self, workspace: WorkspaceId, head: Head) {
        self.0.send_if_modified(|board| {
            if board.heads.get(&workspace).is_some_and(|(_, known)| *known == head) {
                return false;
            }
            board.moves += 1;
            board.heads.insert(workspace, (board.moves, head));
            true
        });
    }

    /// A subscriber that will be told of every later move.
    pub(super) fn subscribe(&self) -> MovedHeads {
        let mut board = self.0.subscribe();
        let seen = board.borrow_and_update().moves;
        MovedHeads { board, seen }
    }
}

/// A subscription to the heads of all workspaces.
#[derive(Debug)]
pub struct MovedHeads {
    board: watch::Receiver<Board>,
    seen: u64,
}

impl MovedHeads {
    /// Waits until a workspace moves, and returns all that moved since the last call with their
    /// newest heads. `None` once the hub's workspaces are closed. May be dropped while it waits.
    pub async fn next(&mut self) -> Option<Vec<(WorkspaceId, Head)>> {
        self.board.changed().await.ok()?;
        let board = self.board.borrow_and_update();
        let seen = std::mem::replace(&mut self.seen, board.moves);
        let moved = board.heads.iter().filter(|(_, (moved, _))| *moved > seen);
        Some(moved.map(|(workspace, (_, head))| (*workspace, *head)).collect())
    }
}

#[cfg(test)]
mod tests {
    use cortex_shared::entry::Digest;
    use cortex_shared::ids::WorkspaceEpoch;

    use super::*;

    #[tokio::test]
    async fn a_slow_subscriber_gets_the_newest_head_of_each_moved_workspace() {
        let board = HeadBoard::default();
        let epoch = WorkspaceEpoch::new();
        let head = |seq| Head { epoch, seq, root: Digest::ZERO };
        let (a, b, c) = (WorkspaceId::new(), WorkspaceId::new(), WorkspaceId::new());
        board.announce(a, head(1));
        let mut moved_heads = board.subscribe();
        board.announce(b, head(1));
        board.announce(c, head(5));
        board.announce(b, head(2));
        let mut moved = moved_heads.next().await.unwrap();
        moved.sort_by_key(|(workspace, _)| *workspace);
        let mut expected = vec![(b, head(2)), (c, head(5))];
        expected.sort_by_key(|(workspace, _)| *workspace);
        assert_eq!(moved, expected);
        board.announce(a, head(2));
        assert_eq!(moved_heads.next().await, Some(vec![(a, head(2))]));
        drop(board);
        assert_eq!(moved_heads.next().await, None);
    }
}
