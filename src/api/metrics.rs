//! `/metrics`: what this process has counted, and, asked at the scrape, how the parts and the whole
//! installation are. Nobody scrapes, nothing is asked.

use std::sync::Arc;
use std::time::Duration;

use axum::extract::State;
use axum::response::IntoResponse;

use super::status::{depths, parts};
use super::{ApiState, typed};
use crate::clock::Stopwatch;
use crate::service::Parts;
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
    async fn take(&self, state: &Parts) -> String {
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
async fn installation(parts: &Parts) -> Installation {
    let (known, depths) = tokio::join!(tokio::time::timeout(ANSWER, of_store(parts)), depths(parts));
    let lag = depths.into_iter().flat_map(|(lane, depths)| {
        depths.into_iter().map(move |depth| (lane.clone(), depth.partition, depth.end - depth.position))
    });
    let known = known.ok().and_then(Result::ok).unwrap_or_default();
    Installation { lag: lag.collect(), ..known }
}

async fn of_store(parts: &Parts) -> Result<Installation, StoreError> {
    let now = parts.clock.now();
    let overview = parts.store.overview(now).await?;
    let control = parts.store.control(now).await?;
    let waiting = overview.counts.iter().filter(|count| !count.status.is_final());
    Ok(Installation {
        backlog: waiting.map(|count| (count.status.as_str(), count.count)).collect(),
        oldest_due: Some(overview.oldest_due_at.map_or(Duration::ZERO, |due| now.since(due))),
        active: Some(control.active),
        paused: Some(control.paused),
        lag: Vec::new(),
    })
}

/// Metrics for Prometheus
#[utoipa::path(
    get, path = "/metrics", tag = "system",
    responses((status = 200, description = "Prometheus text", body = String, content_type = "text/plain"))
)]
pub(super) async fn metrics(State(state): State<ApiState>) -> impl IntoResponse {
    typed(TEXT, state.survey.take(&state.parts).await)
}
