-- Versions of skills, the directories of the library. The library's tree is a workspace's, with a database
-- of its own; a version is pending until both that and the workspace it came from have been changed, and
-- whoever starts the hub finishes or undoes it. ended_at: when another took its place, or it was removed;
-- of each skill at most one live version has none.
CREATE TABLE skill_versions (
    skill          TEXT NOT NULL,
    version        INTEGER NOT NULL,
    id             BLOB NOT NULL UNIQUE,
    workspace      BLOB,
    path           BLOB,
    restored_from  INTEGER,
    digest         BLOB NOT NULL,
    entries        INTEGER NOT NULL,
    content_bytes  INTEGER NOT NULL,
    by_name        TEXT NOT NULL,
    by_uid         INTEGER,
    at             INTEGER NOT NULL,
    pending        INTEGER NOT NULL,
    ended_at       INTEGER,
    PRIMARY KEY (skill, version)
) STRICT, WITHOUT ROWID;
CREATE UNIQUE INDEX current_skills ON skill_versions (skill) WHERE pending = 0 AND ended_at IS NULL;
CREATE INDEX pending_skills ON skill_versions (at) WHERE pending = 1;
