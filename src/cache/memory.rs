//! The cache in this process: bounded in number, size and time.

use async_trait::async_trait;
use quick_cache::sync::Cache as Answers;

use super::{Cache, Response, Result, TIME_TO_LIVE};
use crate::clock::{Clock, Instant};
use crate::message::MessageId;

/// The most answers that are kept: a few hundred bytes each.
const ANSWERS_MAX: usize = 50_000;

/// A cache that lives and dies with its process.
pub struct MemoryCache {
    /// Each with the time until which it is kept.
    answers: Answers<MessageId, (Instant, Response)>,
    clock: Clock,
}

impl MemoryCache {
    /// An empty cache that goes by `clock`.
    pub fn new(clock: &Clock) -> MemoryCache {
        MemoryCache { answers: Answers::new(ANSWERS_MAX), clock: clock.clone() }
    }
}

#[async_trait]
impl Cache for MemoryCache {
    fn kind(&self) -> &'static str {
        "memory"
    }

    async fn put(&self, responses: &[(MessageId, Response)]) -> Result<()> {
        let until = self.clock.instant().after(TIME_TO_LIVE);
        for (id, response) in responses {
            self.answers.insert(*id, (until, response.clone()));
        }
        Ok(())
    }

    async fn get(&self, id: MessageId) -> Result<Option<Response>> {
        let now = self.clock.instant();
        let live = |(until, response)| (now < until).then_some(response);
        Ok(self.answers.get(&id).and_then(live))
    }

    async fn ping(&self) -> Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::conformance;
    use crate::clock::Timestamp;

    fn response(status: u16) -> Response {
        Response { message: None, message_id: None, status, timestamp: Timestamp::EPOCH }
    }

    #[tokio::test]
    async fn conforms() {
        conformance::all(&MemoryCache::new(&Clock::system())).await;
    }

    #[tokio::test]
    async fn an_answer_lives_for_its_time_from_when_it_was_last_kept() {
        let clock = Clock::manual(Timestamp::EPOCH);
        let cache = MemoryCache::new(&clock);
        let kept = [(MessageId(1), response(200)), (MessageId(2), response(201))];
        cache.put(&kept).await.unwrap();
        clock.advance(TIME_TO_LIVE / 2);
        cache.put(&kept[1..]).await.unwrap();
        clock.advance(TIME_TO_LIVE / 2);
        assert_eq!(cache.get(MessageId(1)).await.unwrap(), None);
        assert_eq!(cache.get(MessageId(2)).await.unwrap(), Some(response(201)));
    }

    #[tokio::test]
    async fn no_more_than_so_many_are_kept() {
        let cache = MemoryCache::new(&Clock::system());
        let all: Vec<_> = (0..3 * ANSWERS_MAX as i64).map(|id| (MessageId(id), response(200))).collect();
        cache.put(&all).await.unwrap();
        assert!(cache.answers.len() <= ANSWERS_MAX, "{} are kept", cache.answers.len());
        assert_eq!(cache.get(all.last().unwrap().0).await.unwrap(), Some(response(200)));
    }
}
