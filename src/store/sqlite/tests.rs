use std::sync::Arc;

use super::*;

mod inline {
    use super::*;
    use crate::store::conformance::store_conformance;

    async fn make() -> Arc<dyn Store> {
        Arc::new(SqliteStore::in_memory().unwrap())
    }

    store_conformance!(make);
}

mod file {
    use super::*;
    use crate::store::conformance::store_conformance;

    /// A store in a file whose folder is unlinked at once: the open files live on, and nothing is left behind.
    async fn make() -> Arc<dyn Store> {
        let folder = tempfile::tempdir().unwrap();
        let store = SqliteStore::open(&folder.path().join("ams.db")).unwrap();
        store.migrate().await.unwrap();
        Arc::new(store)
    }

    store_conformance!(make);
}
