//! `/metrics`: what this process has counted, and, asked at the scrape, how the parts and the whole
//! installation are. Nobody scrapes, nothing is asked.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::response::IntoResponse;

use super::status::{depths, parts};
use super::{ApiState, typed};
use crate::clock::Stopwatch;
use crate::service::Context;
use crate::store::StoreError;
use crate::telemetry::Installation;

/// Answers are good for so long, however many scrape.
const FRESH: Duration = Duration::from_secs(5);
/// A store that has not told of the installation by then is left out of this scrape.
const ANSWER: Duration = Duration::from_secs(3);

/// What Prometheus' text format is called.
const TEXT: &str = "text/plain; version=0.0.4; charset=utf-8";

/// What is asked at a scrape, and when it was asked last.
#[derive(Clone)]
pub(super) struct Survey {
    /// Whether this process tells of the whole installation, too.
    whole: bool,
    /// Held over the questions: of two scrapes at once the second has the answers of the first.
    last: Arc<tokio::sync::Mutex<Option<Stopwatch>>>,
}

impl Survey {
    pub(super) fn new(whole: bool) -> Survey {
        Survey { whole, last: Arc::default() }
    }

    /// Brings the gauges up to date and returns all metrics as text.
    async fn take(&self, state: &Context) -> String {
        let mut last = self.last.lock().await;
        if last.as_ref().is_none_or(|last| last.elapsed() >= FRESH) {
            let whole = async {
                if self.whole {
                    state.metrics.installation(&installation(state).await);
                }
            };
            tokio::join!(parts(state), whole);
            *last = Some(state.clock.stopwatch());
        }
        state.metrics.encode()
    }
}

/// What store and queue say of the whole, as far as they say it in time.
async fn installation(context: &Context) -> Installation {
    let (known, depths) = tokio::join!(tokio::time::timeout(ANSWER, of_store(context)), depths(context));
    let lag = depths.into_iter().flat_map(|(lane, depths)| {
        depths.into_iter().map(move |depth| (lane.clone(), depth.partition, depth.end - depth.position))
    });
    let known = known.ok().and_then(Result::ok).unwrap_or_default();
    Installation { lag: lag.collect(), ..known }
}

async fn of_store(context: &Context) -> Result<Installation, StoreError> {
    let now = context.clock.now();
    let overview = context.store.overview(now).await?;
    let control = context.store.control(now).await?;
    let waiting = overview.counts.iter().filter(|count| !count.status.is_final());
    Ok(Installation {
        backlog: waiting.map(|count| (count.status.as_str(), count.count)).collect(),
        oldest_due: Some(overview.oldest_due_at.map_or(Duration::ZERO, |due| now.since(due))),
        active: Some(control.active),
        paused: Some(control.paused),
        breakers: Some(context.store.breakers().await?.len()),
        lag: Vec::new(),
    })
}

/// Metrics for Prometheus
#[utoipa::path(
    get, path = "/metrics", tag = "system",
    responses((status = 200, description = "Prometheus text", body = String, content_type = "text/plain"))
)]
pub(super) async fn metrics(State(state): State<ApiState>) -> impl IntoResponse {
    typed(TEXT, state.survey.take(&state.context).await)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cache::memory::MemoryCache;
    use crate::clock::{Clock, Timestamp};
    use crate::message::NewMessage;
    use crate::queue::embedded::EmbeddedQueue;
    use crate::service::{Directory, Presence};
    use crate::store::sqlite::SqliteStore;
    use crate::store::{Endpoint, Store};

    async fn context(clock: &Clock) -> Context {
        let store: Arc<dyn Store> = Arc::new(SqliteStore::in_memory().unwrap());
        store.put_endpoint(&Endpoint::new("default", "http://localhost:3000")).await.unwrap();
        Context {
            queue: Arc::new(EmbeddedQueue::new(1, clock.clone())),
            cache: Arc::new(MemoryCache::new(clock)),
            clock: clock.clone(),
            metrics: Arc::default(),
            presence: Arc::new(Presence::new(Arc::clone(&store), clock.clone(), "test", "here")),
            directory: Arc::new(Directory::new(Arc::clone(&store))),
            store,
        }
    }

    #[tokio::test]
    async fn the_whole_is_asked_at_a_scrape_and_its_answer_is_good_for_a_while() {
        let clock = Clock::manual(Timestamp::EPOCH);
        let context = context(&clock).await;
        let message =
            NewMessage { recipient: "+90".into(), content: "Hello".into(), ..NewMessage::default() };
        let survey = Survey::new(true);
        let empty = "ams_backlog_messages{status=\"pending\"} 0.0";
        assert!(survey.take(&context).await.contains(empty));
        context.store.insert(&[message], clock.now()).await.unwrap();
        assert!(survey.take(&context).await.contains(empty), "the answer is good for 5 s");
        clock.advance(FRESH);
        let text = survey.take(&context).await;
        for line in ["ams_backlog_messages{status=\"pending\"} 1.0", "ams_oldest_due_age_seconds{} 5.0"] {
            assert!(text.contains(line), "{line}\n{text}");
        }
        assert!(
            text.contains("ams_active_producers{} 0.0") && text.contains("ams_part_up{part=\"queue\"} 1.0")
        );
    }

    #[tokio::test]
    async fn a_consumer_tells_of_itself_and_its_parts_only() {
        let context = context(&Clock::manual(Timestamp::EPOCH)).await;
        let text = Survey::new(false).take(&context).await;
        assert!(text.contains("ams_part_up{part=\"store\"} 1.0"), "{text}");
        assert!(!text.contains("ams_backlog_messages{") && !text.contains("ams_active_producers{"), "{text}");
    }
}
