-- Workspaces that were deleted and of which content may be left on disk.
CREATE TABLE deleted_workspaces (
    id          BLOB PRIMARY KEY,
    deleted_at  INTEGER NOT NULL
) STRICT, WITHOUT ROWID;
