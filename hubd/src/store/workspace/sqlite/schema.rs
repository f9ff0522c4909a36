//! The tables, and what a new database begins with.

use cortex_shared::entry::{Digest, DirDigest, Kind};
use cortex_shared::ids::WorkspaceEpoch;
use rusqlite::{Connection, params};

use super::super::StoreError;

/// Row of the root directory.
pub(super) const ROOT_ID: i64 = 1;

/// See [`super::Settings::migrations`].
pub(super) const MIGRATIONS: &[&str] = &[
    "
-- The newest version, and counters that would otherwise need a look at every entry.
CREATE TABLE head (
    one INTEGER PRIMARY KEY CHECK (one = 1),
    epoch BLOB NOT NULL CHECK (length(epoch) = 16),
    seq INTEGER NOT NULL,
    root BLOB NOT NULL CHECK (length(root) = 32),
    entries INTEGER NOT NULL CHECK (entries >= 0),
    content_bytes INTEGER NOT NULL CHECK (content_bytes >= 0)
) STRICT;

-- Recipes by the hash of their own bytes. Not by content: a member that lies about the recipe of
-- some content must not spoil the recipe of another that does not.
CREATE TABLE recipes (
    digest BLOB PRIMARY KEY,
    recipe BLOB NOT NULL
) STRICT, WITHOUT ROWID;

-- kind as in cortex_shared::entry::Kind. digest: identity of a file or link, tree digest of a
-- directory. content, size, mtime_ns, recipe: files; recipe is NULL for a single chunk or none.
CREATE TABLE entries (
    id INTEGER PRIMARY KEY,
    parent_id INTEGER REFERENCES entries (id),
    name BLOB NOT NULL,
    kind INTEGER NOT NULL,
    size INTEGER NOT NULL,
    mtime_ns INTEGER NOT NULL,
    content BLOB,
    recipe BLOB REFERENCES recipes (digest),
    target BLOB,
    digest BLOB NOT NULL,
    seq INTEGER NOT NULL,
    UNIQUE (parent_id, name)
) STRICT;
CREATE INDEX entries_by_seq ON entries (seq);
CREATE INDEX entries_by_recipe ON entries (recipe) WHERE recipe IS NOT NULL;

-- The last deletion of each path at which nothing stands now.
CREATE TABLE deletions (
    path BLOB PRIMARY KEY,
    seq INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE UNIQUE INDEX deletions_by_seq ON deletions (seq);

-- Results of commits by their idempotency key. seqs: 8 bytes each, big-endian.
CREATE TABLE commits (
    commit_id BLOB PRIMARY KEY CHECK (length(commit_id) = 16),
    node BLOB NOT NULL,
    at_ms INTEGER NOT NULL,
    seq INTEGER NOT NULL,
    root BLOB NOT NULL,
    seqs BLOB NOT NULL
) STRICT;
CREATE INDEX commits_by_time ON commits (at_ms);
-- The columns from kind on are those of entries; kind is NULL if the entry is left out.
CREATE TABLE rejections (
    commit_id BLOB NOT NULL REFERENCES commits (commit_id) ON DELETE CASCADE,
    position INTEGER NOT NULL,
    reason INTEGER NOT NULL,
    missing BLOB NOT NULL,
    kind INTEGER,
    size INTEGER,
    mtime_ns INTEGER,
    content BLOB,
    recipe BLOB,
    target BLOB,
    current_seq INTEGER NOT NULL,
    PRIMARY KEY (commit_id, position)
) STRICT, WITHOUT ROWID;
CREATE INDEX rejections_by_recipe ON rejections (recipe) WHERE recipe IS NOT NULL;

CREATE TABLE packs (
    id INTEGER PRIMARY KEY,
    hash BLOB NOT NULL UNIQUE CHECK (length(hash) = 32),
    bytes INTEGER NOT NULL,
    at_ms INTEGER NOT NULL
) STRICT;
-- One row per chunk that is present. touched: when a member last sent it or was
-- told of it, or the tree began or ceased to name it.
CREATE TABLE chunks (
    hash BLOB PRIMARY KEY CHECK (length(hash) = 32),
    len INTEGER NOT NULL,
    pack_id INTEGER NOT NULL REFERENCES packs (id),
    touched INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
CREATE INDEX chunks_by_pack ON chunks (pack_id);

CREATE TABLE cursors (
    node BLOB PRIMARY KEY CHECK (length(node) = 16),
    epoch BLOB NOT NULL,
    applied_seq INTEGER NOT NULL,
    at_ms INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

CREATE TABLE conflicts (
    copy BLOB PRIMARY KEY,
    path BLOB NOT NULL,
    node BLOB NOT NULL,
    at_ms INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
",
    "
-- The heads there have been in this epoch, for as long as they are remembered (see history.rs).
CREATE TABLE versions (
    seq INTEGER PRIMARY KEY,
    root BLOB NOT NULL CHECK (length(root) = 32),
    at_ms INTEGER NOT NULL
) STRICT;
CREATE INDEX versions_by_time ON versions (at_ms);
-- Chunks that were in packs that are lost: members that have them are asked to send them again.
CREATE TABLE wanted (
    hash BLOB PRIMARY KEY CHECK (length(hash) = 32)
) STRICT, WITHOUT ROWID;
INSERT INTO versions (seq, root, at_ms) SELECT seq, root, max(at_ms) FROM commits GROUP BY seq;
INSERT OR IGNORE INTO versions (seq, root, at_ms) SELECT seq, root, 0 FROM head WHERE seq > 0;
",
    "
-- Who put an entry there, and when (see past.rs). author: 16 bytes of a node, or 16 zero bytes and an
-- operator's name; NULL if that was not recorded.
ALTER TABLE entries ADD COLUMN author BLOB;
ALTER TABLE entries ADD COLUMN at_ms INTEGER NOT NULL DEFAULT 0;
ALTER TABLE deletions ADD COLUMN at_ms INTEGER NOT NULL DEFAULT 0;
UPDATE deletions SET at_ms = CAST(unixepoch('subsec') * 1000 AS INTEGER);
-- Deletions up to log_floor may no longer be in their table. The past is complete from history_floor
-- on, but for what stands in thinned.
ALTER TABLE head ADD COLUMN log_floor INTEGER NOT NULL DEFAULT 0;
ALTER TABLE head ADD COLUMN history_floor INTEGER NOT NULL DEFAULT 0;
UPDATE head SET history_floor = seq;

-- What stood at a path from seq on, until ended_seq took its place, or (deleted = 1) took it away. The
-- columns from kind on are those of entries.
CREATE TABLE old_versions (
    seq INTEGER PRIMARY KEY,
    path BLOB NOT NULL,
    kind INTEGER NOT NULL,
    size INTEGER NOT NULL,
    mtime_ns INTEGER NOT NULL,
    content BLOB,
    recipe BLOB REFERENCES recipes (digest),
    target BLOB,
    author BLOB,
    at_ms INTEGER NOT NULL,
    ended_seq INTEGER NOT NULL,
    ended_at_ms INTEGER NOT NULL,
    ended_by BLOB,
    deleted INTEGER NOT NULL
) STRICT;
CREATE UNIQUE INDEX old_versions_by_end ON old_versions (ended_seq);
CREATE INDEX old_versions_by_path ON old_versions (path, seq);
CREATE INDEX old_versions_by_recipe ON old_versions (recipe) WHERE recipe IS NOT NULL;
-- Paths of which old versions went because there were too many: all that ended up to until_seq.
CREATE TABLE thinned (
    path BLOB PRIMARY KEY,
    until_seq INTEGER NOT NULL
) STRICT, WITHOUT ROWID;

-- NULL: the default of the hub, or no limit.
CREATE TABLE settings (
    one INTEGER PRIMARY KEY CHECK (one = 1),
    quota_bytes INTEGER,
    keep_ms INTEGER,
    keep_versions INTEGER
) STRICT;
INSERT INTO settings (one) VALUES (1);
",
    "
-- Whether deleted content is still somewhere else in the tree.
CREATE INDEX entries_by_content ON entries (content) WHERE content IS NOT NULL AND size > 0;
-- What each member deleted within the last minute, by the second (see hold.rs): files whose content was
-- nowhere else, and entries of any kind.
CREATE TABLE recent_losses (
    node BLOB NOT NULL CHECK (length(node) = 16),
    second INTEGER NOT NULL,
    losses INTEGER NOT NULL,
    removed INTEGER NOT NULL,
    PRIMARY KEY (node, second)
) STRICT, WITHOUT ROWID;
-- held_at_ms, held_losses: when deletions of a member were last held back, and how many; NULL if an
-- operator has let them go since. allowed: how many losses such a word still lets go, until
-- allowed_until_ms; untold = 1: the member was not told of it; 2: it was, and has made no use of it.
CREATE TABLE holds (
    node BLOB PRIMARY KEY CHECK (length(node) = 16),
    held_at_ms INTEGER,
    held_losses INTEGER NOT NULL DEFAULT 0,
    allowed INTEGER NOT NULL DEFAULT 0,
    allowed_until_ms INTEGER NOT NULL DEFAULT 0,
    untold INTEGER NOT NULL DEFAULT 0
) STRICT, WITHOUT ROWID;
",
];

/// Fills a new database with an empty tree; one that has a tree stays as it is.
pub(super) fn begin(connection: &Connection) -> Result<(), StoreError> {
    if connection.prepare("SELECT 1 FROM head")?.exists([])? {
        return Ok(());
    }
    connection.execute(
        "INSERT INTO head (one, epoch, seq, root, entries, content_bytes)
         VALUES (1, ?1, 0, ?2, 0, 0)",
        params![WorkspaceEpoch::new().as_bytes(), Digest::ZERO.as_bytes()],
    )?;
    connection.execute(
        "INSERT INTO entries (id, parent_id, name, kind, size, mtime_ns, digest, seq)
         VALUES (?1, NULL, x'', ?2, 0, 0, ?3, 0)",
        params![ROOT_ID, Kind::Dir as u8, DirDigest::new().finish().as_bytes()],
    )?;
    Ok(())
}
