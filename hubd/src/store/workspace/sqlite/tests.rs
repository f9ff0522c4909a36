use std::path::Path;

use super::super::contract::{Engine, contract_tests};
use super::*;

struct Sqlite;

impl Engine for Sqlite {
    async fn open(&self, folder: &Path, scope: &TaskScope) -> Arc<dyn WorkspaceStore> {
        Arc::new(SqliteWorkspaceStore::open(folder.join("ws.db"), scope).await.unwrap())
    }
}

contract_tests!(Sqlite);
