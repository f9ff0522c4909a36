-- What may still run, as far as its node has said, of each caller: looked for when one is revoked.
CREATE INDEX tasks_unresolved ON tasks (actor) WHERE stdout_hash IS NULL AND late_outcome IS NULL;
