//! Sending chunks again that the hub has lost.

use std::collections::{HashMap, HashSet};

use cortex_shared::chunk::ChunkRef;
use cortex_shared::entry::{Digest, Entry};
use cortex_shared::wire_path::WirePath;
use tokio_util::sync::CancellationToken;

use super::Session;
use super::packing::{Parcel, send_packs};
use crate::sync::core::SyncError;
use crate::sync::hub::Hub;
use crate::sync::index::{Index, IndexError};
use crate::sync::scan::Scope;

/// Rows read from the index at once.
const PAGE_ROWS: u32 = 1024;

/// Sends those of the wanted chunks that are in files here. Returns where files were not what the
/// index says.
pub(in crate::sync) async fn supply<H: Hub>(
    session: &mut Session<'_, H>,
    wanted: &[Digest],
) -> Result<Vec<Scope>, SyncError> {
    let mut missing: HashSet<Digest> = wanted.iter().copied().collect();
    let (hashes, cancel) = (missing.clone(), session.cancel.clone());
    let files = session.core.run(move |core| holders(&core.index, hashes, &cancel)).await?;
    let here: HashSet<Digest> =
        files.iter().flat_map(|(_, chunks)| chunks).map(|chunk| chunk.hash).collect();
    missing.retain(|hash| here.contains(hash));
    if missing.is_empty() {
        return Ok(Vec::new());
    }
    tracing::info!(chunks = missing.len(), "sending content that the hub has lost");
    let root = session.core.run(|core| Ok::<_, IndexError>(core.root.clone())).await?;
    let parcel = Parcel { files, missing };
    let blocking = session.core.blocking();
    let failed =
        send_packs(session.hub, session.workspace, blocking, root, session.cancel, parcel).await?;
    Ok(failed.into_iter().map(|path| Scope::Children(path.parent())).collect())
}

/// Files here that hold some of the chunks; for each chunk one of them, as far as there is one.
fn holders(
    index: &Index,
    mut wanted: HashSet<Digest>,
    cancel: &CancellationToken,
) -> Result<Vec<(WirePath, Vec<ChunkRef>)>, IndexError> {
    let mut files: HashMap<WirePath, Vec<ChunkRef>> = HashMap::new();
    let mut take = |path: WirePath, entry: Option<Entry>, wanted: &mut HashSet<Digest>| {
        let Some(Entry::File(file)) = entry else { return };
        let before = wanted.len();
        for chunk in file.chunks() {
            wanted.remove(&chunk.hash);
        }
        if wanted.len() < before {
            files.insert(path, file.chunks().collect());
        }
    };
    // The content of a small file is its only chunk.
    for hash in wanted.clone() {
        for found in index.with_content(&hash, 1)? {
            take(found.row.path, found.row.local, &mut wanted);
        }
    }
    // Which large files hold a chunk only their rows tell.
    let mut after = None;
    while !wanted.is_empty() && !cancel.is_cancelled() {
        let rows = index.below(None, after.as_ref(), PAGE_ROWS)?;
        let Some(last) = rows.last() else { break };
        after = Some(last.row.path.clone());
        for found in rows {
            take(found.row.path, found.row.local, &mut wanted);
        }
    }
    Ok(files.into_iter().collect())
}
