-- Somebody wants the command to end: its node is told again in each session that still has it, whatever
-- its verdict here, until it has said itself how the command ended.
ALTER TABLE tasks ADD COLUMN cancel_wanted INTEGER NOT NULL DEFAULT 0;
