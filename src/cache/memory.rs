//! The cache in this process: bounded in number, size and time.

use async_trait::async_trait;
use moka::sync::Cache as Moka;

use super::{Cache, Response, Result, TIME_TO_LIVE};
use crate::message::MessageId;

/// The most answers that are kept: a few hundred bytes each.
const ANSWERS_MAX: u64 = 50_000;

/// A cache that lives and dies with its process.
pub struct MemoryCache {
    answers: Moka<MessageId, Response>,
}

impl MemoryCache {
    /// An empty cache.
    pub fn new() -> MemoryCache {
        MemoryCache { answers: Moka::builder().max_capacity(ANSWERS_MAX).time_to_live(TIME_TO_LIVE).build() }
    }
}

impl Default for MemoryCache {
    fn default() -> MemoryCache {
        MemoryCache::new()
    }
}

#[async_trait]
impl Cache for MemoryCache {
    fn kind(&self) -> &'static str {
        "memory"
    }

    async fn put(&self, responses: &[(MessageId, Response)]) -> Result<()> {
        for (id, response) in responses {
            self.answers.insert(*id, response.clone());
        }
        Ok(())
    }

    async fn get(&self, id: MessageId) -> Result<Option<Response>> {
        Ok(self.answers.get(&id))
    }

    async fn ping(&self) -> Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::conformance;

    #[tokio::test]
    async fn conforms() {
        conformance::all(&MemoryCache::new()).await;
    }
}
