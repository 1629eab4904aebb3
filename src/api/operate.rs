//! Cancel and redrive, one or many, and the pause of the producers.

use std::time::Duration;

use axum::Json;
use axum::extract::rejection::{JsonRejection, PathRejection};
use axum::extract::{Path, State};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::ApiState;
use super::explain::Surroundings;
use super::messages::{MessageView, find};
use super::problem::{Code, Problem};
use super::search::refuse_nul;
use crate::clock::Timestamp;
use crate::janitor::OPERATION_PIECE;
use crate::message::{MessageId, Status};
use crate::store::operate::{Change, Control, Cursor, Filter, Operation, OperationId};

/// How long a call works at its operation itself, which no client should give up on; the janitor does the rest.
const AT_IT: Duration = Duration::from_secs(5);
/// Where a dry run stops counting.
const COUNT_MAX: u64 = 10_000;

/// Which messages a change is for. Everything that is set must hold.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct FilterBody {
    /// Their status. To redrive: dead (when left out), cancelled or expired. To cancel it must be named:
    /// pending, queued, processing or retrying.
    #[schema(schema_with = super::document::status_or_null)]
    status: Option<Status>,
    /// Their endpoint.
    #[schema(example = "default")]
    endpoint: Option<String>,
    /// Their recipient.
    #[schema(example = "+905551111111")]
    recipient: Option<String>,
    /// Why they are dead, word for word.
    #[schema(example = "status 500")]
    reason: Option<String>,
    /// Created then or later.
    #[schema(value_type = Option<String>, format = DateTime, example = "2030-01-01T09:00:00Z")]
    created_after: Option<Timestamp>,
    /// Created earlier.
    #[schema(value_type = Option<String>, format = DateTime, example = "2030-01-02T09:00:00Z")]
    created_before: Option<Timestamp>,
}

/// A change of many messages.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct ChangeMany {
    /// Which messages.
    filter: FilterBody,
    /// Only count them.
    #[serde(default)]
    #[schema(example = true)]
    dry_run: bool,
}

/// What a redrive of many came to.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(super) struct RedriveView {
    /// Messages that matched so far; a dry run stops counting at 10,000.
    #[schema(example = 12)]
    matched: u64,
    /// Messages that are pending again.
    #[schema(example = 12)]
    redriven: u64,
    /// The operation, under which a large redrive goes on after this answer; null for a dry run.
    #[schema(example = 7)]
    operation: Option<i64>,
    /// Whether it is over.
    #[schema(example = true)]
    finished: bool,
}

/// What a cancel of many came to.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(super) struct CancelView {
    /// Messages that matched so far; a dry run stops counting at 10,000.
    #[schema(example = 12)]
    matched: u64,
    /// Messages that are cancelled.
    #[schema(example = 12)]
    cancelled: u64,
    /// The operation, under which a large cancel goes on after this answer; null for a dry run.
    #[schema(example = 7)]
    operation: Option<i64>,
    /// Whether it is over.
    #[schema(example = true)]
    finished: bool,
}

/// A change of many messages and how far it has come.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(super) struct OperationView {
    /// Its number.
    #[schema(example = 7)]
    id: i64,
    /// `cancel` or `redrive`.
    #[schema(example = "redrive")]
    change: &'static str,
    /// Messages that matched so far.
    #[schema(example = 12)]
    matched: u64,
    /// Messages that were changed so far.
    #[schema(example = 12)]
    changed: u64,
    /// When it was asked for; later messages are not its own.
    #[schema(value_type = String, format = DateTime, example = "2030-01-01T09:00:00Z")]
    created_at: Timestamp,
    /// When it last came on.
    #[schema(value_type = String, format = DateTime, example = "2030-01-01T09:00:01Z")]
    updated_at: Timestamp,
    /// When it was done; null while it goes on.
    #[schema(value_type = Option<String>, format = DateTime, example = "2030-01-01T09:00:01Z")]
    finished_at: Option<Timestamp>,
}

/// What the producers do.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(super) struct ProducerView {
    /// `running` or `paused`.
    #[schema(example = "running")]
    state: &'static str,
    /// Whether a producer is there to do it.
    #[schema(example = true)]
    active: bool,
    /// Null: as fast as the endpoints take them.
    pacing: Option<PacingView>,
}

/// At most so many first tries in so long.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(super) struct PacingView {
    /// First tries.
    #[schema(example = 100)]
    batch_count: usize,
    /// Seconds.
    #[schema(example = 1.0)]
    interval_s: f64,
}

impl From<Control> for ProducerView {
    fn from(control: Control) -> ProducerView {
        ProducerView {
            state: if control.paused { "paused" } else { "running" },
            active: control.active,
            pacing: control.pacing.map(|pacing| PacingView {
                batch_count: pacing.count,
                interval_s: pacing.interval.as_secs_f64(),
            }),
        }
    }
}

/// Cancel a message: no further try is made
///
/// A try that is under way may still succeed; then the message is `sent`.
#[utoipa::path(
    post, path = "/v1/messages/{id}/cancel", operation_id = "cancel_message", tag = "messages", params(("id" = i64, Path, description = "The message's number", example = 1)),
    responses(
        (status = 200, description = "The message, cancelled", body = MessageView),
        (status = 400, description = "No number", body = Problem, content_type = "application/problem+json"),
        (status = 404, description = "No such message", body = Problem, content_type = "application/problem+json"),
        (status = 409, description = "It has ended already", body = Problem, content_type = "application/problem+json"),
        (status = 503, description = "The store is away; try again", body = Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn cancel(
    State(state): State<ApiState>,
    id: Result<Path<i64>, PathRejection>,
) -> Result<Json<MessageView>, Problem> {
    change_one(&state, Change::Cancel, MessageId(id?.0)).await
}

/// Send a dead, cancelled or expired message again
#[utoipa::path(
    post, path = "/v1/messages/{id}/redrive", operation_id = "redrive_message", tag = "messages", params(("id" = i64, Path, description = "The message's number", example = 1)),
    responses(
        (status = 200, description = "The message, pending again", body = MessageView),
        (status = 400, description = "No number", body = Problem, content_type = "application/problem+json"),
        (status = 404, description = "No such message", body = Problem, content_type = "application/problem+json"),
        (status = 409, description = "It is sent, or still on its way", body = Problem, content_type = "application/problem+json"),
        (status = 503, description = "The store is away; try again", body = Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn redrive(
    State(state): State<ApiState>,
    id: Result<Path<i64>, PathRejection>,
) -> Result<Json<MessageView>, Problem> {
    change_one(&state, Change::Redrive, MessageId(id?.0)).await
}

async fn change_one(state: &ApiState, change: Change, id: MessageId) -> Result<Json<MessageView>, Problem> {
    let changed = state.context.store.change(change, &[id], state.context.clock.now()).await?;
    let message = find(state, id).await?;
    if changed.is_empty() {
        let detail = match (change, message.status) {
            (_, Status::Sent) => format!("message {id} is sent, and stays so"),
            (Change::Cancel, status) => format!("message {id} is {status} already"),
            (Change::Redrive, status) => {
                format!("message {id} is {status}: only what is dead, cancelled or expired can be sent again")
            }
        };
        return Err(Problem::new(Code::WrongStatus, &detail));
    }
    let surroundings = Surroundings::of_many(&state.context).await;
    Ok(Json(MessageView::of(message, &surroundings)))
}

/// Send many dead, cancelled or expired messages again
#[utoipa::path(
    post, path = "/v1/messages/redrive", operation_id = "redrive_messages", tag = "messages", request_body = ChangeMany,
    responses(
        (status = 200, description = "What it came to within five seconds; the operation goes on", body = RedriveView),
        (status = 400, description = "Not the JSON that is expected", body = Problem, content_type = "application/problem+json"),
        (status = 408, description = "The body did not arrive in time", body = Problem, content_type = "application/problem+json"),
        (status = 413, description = "Too large", body = Problem, content_type = "application/problem+json"),
        (status = 415, description = "Not application/json", body = Problem, content_type = "application/problem+json"),
        (status = 422, description = "Messages of this status can't be redriven", body = Problem, content_type = "application/problem+json"),
        (status = 503, description = "The store is away; try again", body = Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn redrive_many(
    State(state): State<ApiState>,
    body: Result<Json<ChangeMany>, JsonRejection>,
) -> Result<Json<RedriveView>, Problem> {
    let (matched, redriven, operation, finished) = change_many(&state, Change::Redrive, body?.0).await?;
    Ok(Json(RedriveView { matched, redriven, operation, finished }))
}

/// Cancel many messages
#[utoipa::path(
    post, path = "/v1/messages/cancel", operation_id = "cancel_messages", tag = "messages", request_body = ChangeMany,
    responses(
        (status = 200, description = "What it came to within five seconds; the operation goes on", body = CancelView),
        (status = 400, description = "Not the JSON that is expected", body = Problem, content_type = "application/problem+json"),
        (status = 408, description = "The body did not arrive in time", body = Problem, content_type = "application/problem+json"),
        (status = 413, description = "Too large", body = Problem, content_type = "application/problem+json"),
        (status = 415, description = "Not application/json", body = Problem, content_type = "application/problem+json"),
        (status = 422, description = "Messages of this status can't be cancelled, or none is named", body = Problem, content_type = "application/problem+json"),
        (status = 503, description = "The store is away; try again", body = Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn cancel_many(
    State(state): State<ApiState>,
    body: Result<Json<ChangeMany>, JsonRejection>,
) -> Result<Json<CancelView>, Problem> {
    let (matched, cancelled, operation, finished) = change_many(&state, Change::Cancel, body?.0).await?;
    Ok(Json(CancelView { matched, cancelled, operation, finished }))
}

async fn change_many(
    state: &ApiState,
    change: Change,
    body: ChangeMany,
) -> Result<(u64, u64, Option<i64>, bool), Problem> {
    let filter = filter(change, body.filter)?;
    if body.dry_run {
        return Ok((count(state, &filter).await?, 0, None, true));
    }
    let (store, clock) = (&state.context.store, &state.context.clock);
    let mut operation = store.open_operation(change, &filter, clock.now()).await?;
    let watch = clock.stopwatch();
    while operation.finished_at.is_none() && watch.elapsed() < AT_IT {
        let Some(worked) = store.work_operation(operation.id, OPERATION_PIECE, clock.now()).await? else {
            break;
        };
        operation = worked;
    }
    state.intake.wake();
    Ok((operation.matched, operation.changed, Some(operation.id.0), operation.finished_at.is_some()))
}

/// What the body asks for; it must name a status that the change allows.
fn filter(change: Change, body: FilterBody) -> Result<Filter, Problem> {
    let status = body.status.or((change == Change::Redrive).then_some(Status::Dead));
    let Some(status) = status.filter(|status| change.allows(*status)) else {
        return Err(Problem::new(
            Code::InvalidFilter,
            match change {
                Change::Cancel => "filter.status must be pending, queued, processing or retrying",
                Change::Redrive => "filter.status must be dead, cancelled or expired",
            },
        ));
    };
    let filter = Filter {
        status: Some(status),
        endpoint: body.endpoint,
        recipient: body.recipient,
        reason: body.reason,
        created_after: body.created_after,
        created_before: body.created_before,
    };
    refuse_nul(&filter)?;
    Ok(filter)
}

async fn count(state: &ApiState, filter: &Filter) -> Result<u64, Problem> {
    let (mut counted, mut from) = (0, Some(Cursor::start(filter)));
    while let Some(cursor) = from.filter(|_| counted < COUNT_MAX) {
        let found = state.context.store.search(filter, cursor, OPERATION_PIECE).await?;
        counted += found.ids.len() as u64;
        from = found.next;
    }
    Ok(counted)
}

/// Show how far a change of many messages has come
#[utoipa::path(
    get, path = "/v1/operations/{id}", operation_id = "show_operation", tag = "messages", params(("id" = i64, Path, description = "The operation's number", example = 7)),
    responses(
        (status = 200, description = "The operation", body = OperationView),
        (status = 400, description = "No number", body = Problem, content_type = "application/problem+json"),
        (status = 404, description = "No such operation", body = Problem, content_type = "application/problem+json"),
        (status = 503, description = "The store is away; try again", body = Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn operation(
    State(state): State<ApiState>,
    id: Result<Path<i64>, PathRejection>,
) -> Result<Json<OperationView>, Problem> {
    let id = OperationId(id?.0);
    let operation = state.context.store.operation(id).await?;
    let Operation { change, matched, changed, created_at, updated_at, finished_at, .. } =
        operation.ok_or_else(|| Problem::new(Code::NotFound, &format!("there is no operation {}", id.0)))?;
    let change = change.as_str();
    Ok(Json(OperationView { id: id.0, change, matched, changed, created_at, updated_at, finished_at }))
}

/// Show what the producers do
#[utoipa::path(
    get, path = "/v1/producer", operation_id = "show_producer", tag = "system",
    responses(
        (status = 200, description = "Running or paused, and the pacing", body = ProducerView),
        (status = 503, description = "The store is away; try again", body = Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn producer(State(state): State<ApiState>) -> Result<Json<ProducerView>, Problem> {
    let control = state.context.store.control(state.context.clock.now()).await?;
    Ok(Json(control.into()))
}

/// Pause all producers: no further try starts, over restarts too
///
/// What is on a lane already is still delivered. It takes up to two seconds to be heard.
#[utoipa::path(
    post, path = "/v1/producer/pause", operation_id = "pause_producer", tag = "system",
    responses(
        (status = 200, description = "They are paused", body = ProducerView),
        (status = 503, description = "The store is away; try again", body = Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn pause(State(state): State<ApiState>) -> Result<Json<ProducerView>, Problem> {
    state.context.store.set_paused(true).await?;
    producer(State(state)).await
}

/// Let the producers go on
#[utoipa::path(
    post, path = "/v1/producer/resume", operation_id = "resume_producer", tag = "system",
    responses(
        (status = 200, description = "They run", body = ProducerView),
        (status = 503, description = "The store is away; try again", body = Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn resume(State(state): State<ApiState>) -> Result<Json<ProducerView>, Problem> {
    state.context.store.set_paused(false).await?;
    producer(State(state)).await
}
