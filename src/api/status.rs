//! How the system is: status for people and programs, liveness, readiness.

use std::collections::BTreeMap;
use std::time::Duration;

use axum::Json;
use axum::extract::State;
use axum::http::StatusCode;
use axum::response::IntoResponse;
use serde::Serialize;
use utoipa::ToSchema;

use super::endpoints::BreakerView;
use super::operate::ProducerView;
use super::problem::Problem;
use super::{ApiState, typed};
use crate::clock::Timestamp;
use crate::queue::Depth;
use crate::service::Context;
use crate::telemetry::Lasting;

/// A part that has not answered by then counts as away.
pub(super) const ANSWER: Duration = Duration::from_secs(1);

/// Breakers that are shown, at most: a glance is not for thousands.
const BREAKERS_MAX: usize = 100;

/// The whole system at a glance.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(super) struct StatusView {
    /// This program's version.
    #[schema(example = "0.1.0")]
    version: &'static str,
    /// Every process, with its last heartbeat.
    services: Vec<ServiceView>,
    /// How many messages have each status; counting stops at 10,000.
    counts: BTreeMap<String, CountView>,
    /// How long the oldest due message has waited, in seconds.
    #[schema(example = 0.2)]
    oldest_due_age_s: Option<f64>,
    /// Records of each lane that its group has not taken up.
    #[schema(example = json!({"messages": 12}))]
    lag: BTreeMap<String, i64>,
    /// What the producers do.
    producer: ProducerView,
    /// Health of store, queue and cache.
    parts: BTreeMap<&'static str, PartView>,
    /// What the process that answers is short of.
    shortages: Vec<ShortageView>,
    /// Circuit breakers that are not closed, by endpoint; at most 100 of them.
    breakers: BTreeMap<String, BreakerView>,
    /// The proof that every message has a place.
    reconciliation: ReconciliationView,
}

/// How far the reconciliation has come, and what it has found.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(super) struct ReconciliationView {
    /// Every message up to this id has been looked at in this round.
    #[schema(example = 0)]
    at: i64,
    /// Messages looked at since the store was made.
    #[schema(example = 1200000)]
    checked: u64,
    /// Those that had no place: each was sent all the same, and each is a defect of ours or a restore.
    #[schema(example = 0)]
    repaired: u64,
    /// When the last round ended.
    #[schema(value_type = Option<String>, format = DateTime, example = "2030-01-01T09:00:00Z")]
    finished_at: Option<Timestamp>,
    /// When the feeds were made anew, because the database had come from another server.
    #[schema(value_type = Option<String>, format = DateTime, example = json!(null))]
    feeds_made_at: Option<Timestamp>,
}

impl From<crate::store::Reconciliation> for ReconciliationView {
    fn from(stands: crate::store::Reconciliation) -> ReconciliationView {
        ReconciliationView {
            at: stands.at.0,
            checked: stands.checked,
            repaired: stands.repaired,
            finished_at: stands.finished_at,
            feeds_made_at: stands.feeds_made_at,
        }
    }
}

/// A process.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(super) struct ServiceView {
    /// What it runs.
    #[schema(example = "consumer")]
    service: String,
    /// Where.
    #[schema(example = "host-1")]
    host: String,
    /// Its version.
    #[schema(example = "0.1.0")]
    version: String,
    /// Since when.
    #[schema(value_type = String, format = DateTime, example = "2030-01-01T09:00:00Z")]
    started_at: Timestamp,
    /// Its last heartbeat.
    #[schema(value_type = String, format = DateTime, example = "2030-01-01T09:00:00Z")]
    seen_at: Timestamp,
    /// Whether its lease holds.
    #[schema(example = true)]
    alive: bool,
}

/// A count that stops counting.
#[derive(Clone, Copy, Debug, Serialize, ToSchema)]
pub(super) struct CountView {
    /// How many, at least.
    #[schema(example = 10000)]
    count: u64,
    /// Whether there are more.
    #[schema(example = true)]
    more: bool,
}

/// A part's health.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(super) struct PartView {
    /// Which backend it is.
    #[schema(example = "postgres")]
    kind: &'static str,
    /// Whether it answers.
    #[schema(example = true)]
    up: bool,
    /// How long it took to answer, in milliseconds.
    #[schema(example = 0.7)]
    latency_ms: f64,
    /// What is wrong, when it does not answer.
    #[schema(example = "no answer within 1s")]
    error: Option<String>,
}

/// Whether this process can do its work.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(super) struct ReadyView {
    /// Whether all that it needs is there; the cache is not needed.
    #[schema(example = true)]
    ready: bool,
    /// Each part.
    parts: BTreeMap<&'static str, PartView>,
    /// What this process is short of: deliveries or clients wait for it, and everything else goes on.
    shortages: Vec<ShortageView>,
}

/// What a process is short of when it opens or accepts connections.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(super) struct ShortageView {
    /// What is used up: descriptors, ports or memory.
    #[schema(example = "descriptors")]
    of: &'static str,
    /// Why, and how to mend it.
    #[schema(example = "this process has no file descriptor left; raise its limit of open files")]
    why: String,
    /// Since when.
    #[schema(value_type = String, format = DateTime, example = "2030-01-01T09:00:00Z")]
    since: Timestamp,
}

fn shortages(context: &Context) -> Vec<ShortageView> {
    let lasting = context.metrics.shortages(context.clock.instant()).into_iter();
    let view =
        |Lasting { shortage, since, .. }| ShortageView { of: shortage.of.as_str(), why: shortage.why, since };
    lasting.map(view).collect()
}

/// Services, counts, ages, lag and health
#[utoipa::path(
    get, path = "/v1/status", operation_id = "show_status", tag = "system",
    responses(
        (status = 200, description = "The whole system at a glance", body = StatusView),
        (status = 503, description = "The store is away; try again", body = Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn status(State(state): State<ApiState>) -> Result<Json<StatusView>, Problem> {
    let now = state.context.clock.now();
    let overview = state.context.store.overview(now).await?;
    let control = state.context.store.control(now).await?;
    let reconciliation = state.context.store.reconciliation().await?.into();
    let services: Vec<_> = overview
        .instances
        .into_iter()
        .map(|instance| ServiceView {
            alive: instance.lease_until > now,
            service: instance.service,
            host: instance.host,
            version: instance.version,
            started_at: instance.started_at,
            seen_at: instance.seen_at,
        })
        .collect();
    let breakers = state.context.store.breakers().await?;
    let breakers = breakers.iter().take(BREAKERS_MAX);
    let count = |count: &crate::store::Count| {
        (count.status.to_string(), CountView { count: count.count, more: count.more })
    };
    let (lag, parts) = tokio::join!(lag(&state.context), parts(&state.context));
    Ok(Json(StatusView {
        version: env!("CARGO_PKG_VERSION"),
        counts: overview.counts.iter().map(count).collect(),
        oldest_due_age_s: overview.oldest_due_at.map(|due| now.since(due).as_secs_f64()),
        lag,
        producer: control.into(),
        parts,
        shortages: shortages(&state.context),
        breakers: breakers.map(|(name, b)| (name.clone(), BreakerView::new(name, b, now))).collect(),
        reconciliation,
        services,
    }))
}

/// Records of each lane that its group has not taken up.
async fn lag(context: &Context) -> BTreeMap<String, i64> {
    let depths = depths(context).await.into_iter();
    depths.map(|(lane, d)| (lane, d.iter().map(|depth| depth.end - depth.position).sum())).collect()
}

/// How far each lane's group has come; lanes that can't be asked in time are left out. All are asked at once,
/// so that a broker that is away costs one wait, not one for each lane.
pub(super) async fn depths(context: &Context) -> Vec<(String, Vec<Depth>)> {
    let directory = context.directory.snapshot();
    let depths = directory.lanes.iter().map(|lane| async move {
        let depth = tokio::time::timeout(ANSWER, context.depth(lane)).await;
        Some((lane.topic.clone(), depth.ok()?.ok()?))
    });
    futures_util::future::join_all(depths).await.into_iter().flatten().collect()
}

pub(super) async fn parts(context: &Context) -> BTreeMap<&'static str, PartView> {
    let (store, queue, cache) = tokio::join!(
        ask(context, context.store.kind(), context.store.missing_migrations()),
        ask(context, context.queue.kind(), context.queue.ping()),
        ask(context, context.cache.kind(), context.cache.ping()),
    );
    for (part, view) in [("store", &store), ("queue", &queue), ("cache", &cache)] {
        context.metrics.part(part, view.up, Duration::from_secs_f64(view.latency_ms / 1000.0));
    }
    BTreeMap::from([("store", store), ("queue", queue), ("cache", cache)])
}

async fn ask<T, E: std::fmt::Display>(
    context: &Context,
    kind: &'static str,
    call: impl Future<Output = Result<T, E>>,
) -> PartView {
    let watch = context.clock.stopwatch();
    let error = match tokio::time::timeout(ANSWER, call).await {
        Ok(answer) => answer.err().map(|error| error.to_string()),
        Err(_) => Some(format!("no answer within {ANSWER:?}")),
    };
    let latency_ms = watch.elapsed().as_secs_f64() * 1000.0;
    PartView { kind, up: error.is_none(), latency_ms, error }
}

/// Whether the process is alive
#[utoipa::path(
    get, path = "/livez", tag = "system",
    responses((status = 200, description = "It is", body = String, content_type = "text/plain", example = "alive"))
)]
pub(super) async fn livez() -> impl IntoResponse {
    typed("text/plain; charset=utf-8", "alive\n".to_owned())
}

/// Whether the process can do its work, part by part
#[utoipa::path(
    get, path = "/readyz", tag = "system",
    responses(
        (status = 200, description = "It can", body = ReadyView),
        (status = 503, description = "Something that it needs is away", body = ReadyView),
    )
)]
pub(super) async fn readyz(State(state): State<ApiState>) -> (StatusCode, Json<ReadyView>) {
    let parts = parts(&state.context).await;
    let ready = parts.iter().all(|(part, view)| view.up || *part == "cache");
    let status = if ready { StatusCode::OK } else { StatusCode::SERVICE_UNAVAILABLE };
    (status, Json(ReadyView { ready, parts, shortages: shortages(&state.context) }))
}
