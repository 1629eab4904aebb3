//! A cache whose calls fail, and which is emptied now and then.

use std::sync::{Arc, Mutex};

use ams::cache::memory::MemoryCache;
use ams::cache::{Cache, CacheError, Response, Result};
use ams::clock::Clock;
use ams::message::MessageId;
use async_trait::async_trait;

use super::Part;
use crate::node::Process;
use crate::world::World;

/// The cache that all processes share.
pub struct SharedCache(Mutex<Arc<MemoryCache>>);

impl SharedCache {
    pub fn new(clock: &Clock) -> SharedCache {
        SharedCache(Mutex::new(Arc::new(MemoryCache::new(clock))))
    }

    pub fn now(&self) -> Arc<MemoryCache> {
        Arc::clone(&self.0.lock().unwrap())
    }

    pub fn wipe(&self, clock: &Clock) {
        *self.0.lock().unwrap() = Arc::new(MemoryCache::new(clock));
    }
}

/// The cache that one process sees.
pub struct FaultyCache {
    pub world: Arc<World>,
    pub process: Arc<Process>,
}

impl FaultyCache {
    async fn call<T>(&self, call: impl Future<Output = Result<T>>) -> Result<T> {
        self.world.faults.call(Part::Cache, &self.process, CacheError, call).await
    }
}

#[async_trait]
impl Cache for FaultyCache {
    fn kind(&self) -> &'static str {
        "memory"
    }

    async fn put(&self, responses: &[(MessageId, Response)]) -> Result<()> {
        let cache = self.world.cache.now();
        self.call(cache.put(responses)).await
    }

    async fn get(&self, id: MessageId) -> Result<Option<Response>> {
        let cache = self.world.cache.now();
        self.call(cache.get(id)).await
    }

    async fn ping(&self) -> Result<()> {
        let cache = self.world.cache.now();
        self.call(cache.ping()).await
    }
}
