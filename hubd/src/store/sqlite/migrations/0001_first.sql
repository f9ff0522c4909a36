-- Times are milliseconds since the Unix epoch by the hub's clock; ids are 16 bytes.

CREATE TABLE meta (
    key   TEXT PRIMARY KEY,
    value BLOB NOT NULL
) STRICT;

CREATE TABLE invites (
    id            TEXT PRIMARY KEY,
    secret_hash   BLOB NOT NULL,
    -- 'node', or the role of an operator
    kind          TEXT NOT NULL,
    uses          INTEGER NOT NULL DEFAULT 0,
    max_uses      INTEGER NOT NULL,
    expires_at    INTEGER NOT NULL,
    created_at    INTEGER NOT NULL,
    created_by    TEXT NOT NULL,
    labels        TEXT NOT NULL,
    name_pattern  TEXT NOT NULL,
    workspaces    TEXT NOT NULL,
    revoked_at    INTEGER
) STRICT;

-- Who redeemed an invite, by key: a repeated request finds its own earlier result here.
CREATE TABLE invite_uses (
    invite   TEXT NOT NULL REFERENCES invites (id),
    key      BLOB NOT NULL,
    -- id of the node, or name of the operator
    result   BLOB NOT NULL,
    used_at  INTEGER NOT NULL,
    PRIMARY KEY (invite, key)
) STRICT, WITHOUT ROWID;

CREATE TABLE nodes (
    id             BLOB PRIMARY KEY,
    name           TEXT NOT NULL UNIQUE,
    labels         TEXT NOT NULL,
    key            BLOB NOT NULL,
    policy         TEXT NOT NULL,
    ceiling        TEXT NOT NULL,
    joined_at      INTEGER NOT NULL,
    last_seen      INTEGER NOT NULL,
    revoked_at     INTEGER,
    hostname       TEXT NOT NULL,
    os             TEXT NOT NULL,
    arch           TEXT NOT NULL,
    agent_version  TEXT NOT NULL
) STRICT;

CREATE TABLE operators (
    name        TEXT PRIMARY KEY,
    role        TEXT NOT NULL,
    key         BLOB NOT NULL,
    created_at  INTEGER NOT NULL,
    revoked_at  INTEGER
) STRICT;

CREATE TABLE tasks (
    id            BLOB PRIMARY KEY,
    node          BLOB NOT NULL,
    actor         TEXT NOT NULL,
    command       TEXT NOT NULL,
    workspace     TEXT NOT NULL,
    mode          TEXT NOT NULL,
    -- accepted, finished, failed, cancelled
    state         TEXT NOT NULL,
    verdict       TEXT,
    exit_code     INTEGER,
    signal        INTEGER,
    reason        TEXT,
    stdout_bytes  INTEGER,
    stderr_bytes  INTEGER,
    accepted_at   INTEGER NOT NULL,
    ended_at      INTEGER
) STRICT;
CREATE INDEX tasks_open ON tasks (id) WHERE ended_at IS NULL;

CREATE TABLE workspaces (
    id          BLOB PRIMARY KEY,
    name        TEXT NOT NULL UNIQUE,
    created_at  INTEGER NOT NULL
) STRICT;

CREATE TABLE members (
    workspace    BLOB NOT NULL REFERENCES workspaces (id),
    node         BLOB NOT NULL REFERENCES nodes (id),
    attached_at  INTEGER NOT NULL,
    PRIMARY KEY (workspace, node)
) STRICT, WITHOUT ROWID;
