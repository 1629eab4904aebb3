//! The cache on Redis: one pipelined round trip for a batch, a short deadline, and a moment's rest
//! after a failure, so that a Redis that is slow or away costs the others nothing.

use std::sync::Mutex;
use std::sync::PoisonError;
use std::time::Duration;

use async_trait::async_trait;
use redis::aio::{ConnectionManager, ConnectionManagerConfig};
use tokio::sync::OnceCell;
use tokio::time::timeout;

use super::{Cache, CacheError, Response, Result, TIME_TO_LIVE};
use crate::clock::{Clock, Stopwatch};
use crate::message::MessageId;

/// No call takes longer.
const DEADLINE: Duration = Duration::from_millis(500);
/// After a failure calls fail at once for this long.
const REST: Duration = Duration::from_secs(1);

/// Bytes of a server's complaint that are passed on: one sentence.
const SAID_MAX: usize = 200;

/// A cache in a Redis that may come and go.
pub struct RedisCache {
    client: redis::Client,
    connection: OnceCell<ConnectionManager>,
    clock: Clock,
    /// Since when we rest. A plain lock: held for a look only.
    resting: Mutex<Option<Stopwatch>>,
}

impl RedisCache {
    /// A cache at `url`; connects when it is first used.
    ///
    /// # Errors
    /// When the URL is not one of Redis.
    pub fn open(url: &str) -> Result<RedisCache> {
        // redis asks rustls for the process's default provider; a second installation is refused, and harmless.
        let _ = rustls::crypto::ring::default_provider().install_default();
        let client = redis::Client::open(url)
            .map_err(|error| CacheError(format!("REDIS_URL can't be used: {error}")))?;
        Ok(RedisCache {
            client,
            connection: OnceCell::new(),
            clock: Clock::system(),
            resting: Mutex::default(),
        })
    }

    async fn connection(&self) -> std::result::Result<ConnectionManager, redis::RedisError> {
        let connect = || {
            let config = ConnectionManagerConfig::new()
                .set_connection_timeout(Some(DEADLINE))
                .set_number_of_retries(1);
            self.client.get_connection_manager_with_config(config)
        };
        self.connection.get_or_try_init(connect).await.cloned()
    }

    /// Runs a pipeline within the deadline, unless a failure was a moment ago.
    async fn run<T: redis::FromRedisValue>(&self, pipeline: &redis::Pipeline) -> Result<T> {
        if self.is_resting() {
            return Err(CacheError("it failed a moment ago".to_owned()));
        }
        let call = async { pipeline.query_async(&mut self.connection().await?).await };
        let answer = match timeout(DEADLINE, call).await {
            Ok(answer) => answer.map_err(|error: redis::RedisError| CacheError(brief(error.to_string()))),
            Err(_) => Err(CacheError(format!("no answer within {DEADLINE:?}"))),
        };
        if answer.is_err() {
            *self.resting.lock().unwrap_or_else(PoisonError::into_inner) = Some(self.clock.stopwatch());
        }
        answer
    }

    fn is_resting(&self) -> bool {
        let resting = self.resting.lock().unwrap_or_else(PoisonError::into_inner);
        resting.as_ref().is_some_and(|since| since.elapsed() < REST)
    }
}

/// The start of what a server says: it complains of every command of a pipeline, which fills a page when its memory is full.
fn brief(mut said: String) -> String {
    if said.len() > SAID_MAX {
        said.truncate(said.floor_char_boundary(SAID_MAX));
        said.push('…');
    }
    said
}

fn key(id: MessageId) -> String {
    format!("ams:response:{id}")
}

#[async_trait]
impl Cache for RedisCache {
    fn kind(&self) -> &'static str {
        "redis"
    }

    async fn put(&self, responses: &[(MessageId, Response)]) -> Result<()> {
        if responses.is_empty() {
            return Ok(());
        }
        let mut pipeline = redis::pipe();
        for (id, response) in responses {
            let value = serde_json::to_string(response).map_err(|error| CacheError(error.to_string()))?;
            pipeline.set_ex(key(*id), value, TIME_TO_LIVE.as_secs()).ignore();
        }
        self.run(&pipeline).await
    }

    async fn get(&self, id: MessageId) -> Result<Option<Response>> {
        let mut pipeline = redis::pipe();
        pipeline.get(key(id));
        let (text,): (Option<String>,) = self.run(&pipeline).await?;
        // What somebody else wrote there is no answer of ours.
        Ok(text.and_then(|text| serde_json::from_str(&text).ok()))
    }

    async fn ping(&self) -> Result<()> {
        let mut pipeline = redis::pipe();
        pipeline.ping().ignore();
        self.run(&pipeline).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_url_that_is_not_of_redis_is_refused() {
        assert!(RedisCache::open("http://localhost").is_err());
    }

    #[test]
    fn a_complaint_about_every_command_becomes_a_sentence() {
        assert_eq!(brief("Pipeline failure: é".to_owned()), "Pipeline failure: é");
        let long = brief("é".repeat(1_000));
        assert!(long.len() <= SAID_MAX + '…'.len_utf8() && long.ends_with("é…"), "{long}");
    }

    #[tokio::test]
    async fn a_redis_that_is_away_fails_soon_and_then_at_once() {
        let cache = RedisCache::open("redis://127.0.0.1:1/0").unwrap();
        let watch = Clock::system().stopwatch();
        assert!(cache.ping().await.is_err());
        assert!(watch.elapsed() < Duration::from_secs(1));
        assert!(cache.ping().await.unwrap_err().0.contains("a moment ago"));
    }
}

#[cfg(test)]
mod real {
    use super::*;
    use crate::cache::conformance;

    #[expect(clippy::disallowed_methods, reason = "tests are told by the environment where Redis is")]
    fn url() -> String {
        std::env::var("REDIS_URL")
            .expect("REDIS_URL is set by `make test`, or by `eval \"$(dev/services env)\"`")
    }

    #[tokio::test]
    async fn conforms() {
        conformance::all(&RedisCache::open(&url()).unwrap()).await;
    }

    #[tokio::test]
    async fn keys_and_values_are_the_contracts() {
        let cache = RedisCache::open(&url()).unwrap();
        let id = MessageId(fastrand::i64(1 << 40..1 << 60));
        let response = Response {
            message: Some("Accepted".into()),
            message_id: Some("m-1".into()),
            status: 200,
            timestamp: crate::clock::Timestamp::EPOCH,
        };
        cache.put(&[(id, response)]).await.unwrap();
        let mut pipeline = redis::pipe();
        pipeline.get(format!("ams:response:{id}")).ttl(format!("ams:response:{id}"));
        let (text, ttl): (String, i64) = cache.run(&pipeline).await.unwrap();
        assert_eq!(
            text,
            r#"{"message":"Accepted","messageId":"m-1","status":200,"timestamp":"1970-01-01T00:00:00Z"}"#
        );
        assert!((86_000..=86_400).contains(&ttl));
    }
}
