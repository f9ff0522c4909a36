-- What a strict command may see of the network, by the hub's policy and by the node's own ceiling.
ALTER TABLE nodes ADD COLUMN policy_network TEXT NOT NULL DEFAULT 'none';
ALTER TABLE nodes ADD COLUMN ceiling_network TEXT NOT NULL DEFAULT 'none';
