-- What a task needs to be shown, resumed after a restart of the hub, found again by its key, or repeated.

ALTER TABLE tasks ADD COLUMN node_name TEXT NOT NULL DEFAULT '';
ALTER TABLE tasks ADD COLUMN role TEXT NOT NULL DEFAULT 'operator';
ALTER TABLE tasks ADD COLUMN detached INTEGER NOT NULL DEFAULT 0;
-- The encoded specification; NULL if it is too long to be kept or cannot be repeated.
ALTER TABLE tasks ADD COLUMN spec BLOB;
ALTER TABLE tasks ADD COLUMN retry_of BLOB;
-- The caller's key, and BLAKE3 of what was asked for with it.
ALTER TABLE tasks ADD COLUMN idempotency_key TEXT;
ALTER TABLE tasks ADD COLUMN request_hash BLOB;
ALTER TABLE tasks ADD COLUMN started_at INTEGER;
ALTER TABLE tasks ADD COLUMN stdout_hash BLOB;
ALTER TABLE tasks ADD COLUMN stderr_hash BLOB;
ALTER TABLE tasks ADD COLUMN hint TEXT;
ALTER TABLE tasks ADD COLUMN duration_ms INTEGER;
-- Added, once, where the node reported after the verdict; JSON.
ALTER TABLE tasks ADD COLUMN late_outcome TEXT;

CREATE UNIQUE INDEX tasks_key ON tasks (actor, idempotency_key) WHERE idempotency_key IS NOT NULL;
CREATE INDEX tasks_node ON tasks (node, id);
-- People name a task by the end of its id: the beginning is a time.
CREATE INDEX tasks_ending ON tasks (substr(id, 13));
