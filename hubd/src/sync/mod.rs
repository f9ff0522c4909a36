//! Workspace versions and content.
