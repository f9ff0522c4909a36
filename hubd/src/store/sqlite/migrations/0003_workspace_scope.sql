-- The scope of whoever made the workspace, as JSON: whose it is while it has no members. What is older
-- belongs to those without a scope.
ALTER TABLE workspaces ADD COLUMN scope TEXT NOT NULL DEFAULT '{}';
