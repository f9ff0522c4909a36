-- Certificates, clones, policy, scopes, and the audit log.

ALTER TABLE nodes ADD COLUMN owner TEXT NOT NULL DEFAULT '';
ALTER TABLE nodes ADD COLUMN cordoned INTEGER NOT NULL DEFAULT 0;
ALTER TABLE nodes ADD COLUMN policy_until INTEGER;
ALTER TABLE nodes ADD COLUMN policy_reason TEXT NOT NULL DEFAULT '';
-- Counts the certificates issued to this identity. The boot id is of the machine that the newest was
-- issued to; `connected` says whether a certificate of the newest generation has ever connected.
ALTER TABLE nodes ADD COLUMN generation INTEGER NOT NULL DEFAULT 1;
ALTER TABLE nodes ADD COLUMN generation_boot_id TEXT NOT NULL DEFAULT '';
ALTER TABLE nodes ADD COLUMN generation_connected INTEGER NOT NULL DEFAULT 0;
ALTER TABLE nodes ADD COLUMN certificate_not_after INTEGER NOT NULL DEFAULT 0;
-- SHA-256 of the key of the authority that signed the newest certificate.
ALTER TABLE nodes ADD COLUMN certificate_ca BLOB NOT NULL DEFAULT x'';
ALTER TABLE nodes ADD COLUMN machine TEXT NOT NULL DEFAULT '{}';
-- The last suspicion that the identity was copied, as JSON; NULL for none.
ALTER TABLE nodes ADD COLUMN clone TEXT;

ALTER TABLE invites ADD COLUMN source_cidrs TEXT NOT NULL DEFAULT '[]';
ALTER TABLE invites ADD COLUMN owner TEXT NOT NULL DEFAULT '';
-- For an operator's invite: the labels of its scope.
ALTER TABLE invites ADD COLUMN scope TEXT NOT NULL DEFAULT '{}';

ALTER TABLE operators ADD COLUMN scope TEXT NOT NULL DEFAULT '{}';

-- Append-only. `hash` is BLAKE3 over the previous line's hash and every other column, so that an
-- edited or removed line is found.
CREATE TABLE audit (
    seq        INTEGER PRIMARY KEY,
    at         INTEGER NOT NULL,
    actor      TEXT NOT NULL,
    action     TEXT NOT NULL,
    target     TEXT NOT NULL,
    detail     TEXT NOT NULL,
    prev_hash  BLOB NOT NULL,
    hash       BLOB NOT NULL
) STRICT;
