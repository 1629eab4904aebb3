//! Sending, and what became of it.

use axum::Json;
use axum::extract::rejection::{JsonRejection, PathRejection};
use axum::extract::{Path, State};
use axum::http::{HeaderMap, StatusCode};
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::explain::{Surroundings, why};
use super::problem::{Code, Problem};
use super::{ApiState, endpoint_exists};
use crate::cache::Response;
use crate::clock::Timestamp;
use crate::delivery;
use crate::intake::{self, BATCH_MAX, Fault, IntakeError};
use crate::message::{Attempt, Message, MessageId, NewMessage};
use crate::store::Inserted;

/// A message to send.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub struct SendMessage {
    /// To whom: 1 to 1024 characters.
    #[schema(example = "+905551111111", min_length = 1, max_length = 1024)]
    recipient: String,
    /// What: at most 1 MiB.
    #[schema(example = "Hello", max_length = 1_048_576)]
    content: String,
    /// The endpoint it goes to; `default` when left out.
    #[schema(example = "default")]
    endpoint: Option<String>,
    /// Left out: the standard JSON envelope is sent. Else the content itself is the body, with this type.
    #[schema(example = "text/plain", min_length = 1, max_length = 255)]
    content_type: Option<String>,
    /// Further request headers: an object of texts.
    #[schema(value_type = Option<Object>, example = json!({"x-tenant": "7"}))]
    headers: Option<serde_json::Value>,
    /// Messages of one key belong together.
    #[schema(example = "order-4711", min_length = 1, max_length = 255)]
    ordering_key: Option<String>,
    /// From -100 to 100.
    #[serde(default)]
    #[schema(example = 0, minimum = -100, maximum = 100)]
    priority: i16,
    /// Not before this time.
    #[schema(value_type = Option<String>, format = DateTime, example = "2030-01-01T09:00:00Z")]
    send_at: Option<Timestamp>,
    /// Not after this time.
    #[schema(value_type = Option<String>, format = DateTime, example = "2030-01-02T09:00:00Z")]
    expires_at: Option<Timestamp>,
    /// A key of the sender's: the same key and message again is the first message. The header
    /// `Idempotency-Key` says the same.
    #[schema(example = "order-4711-paid", min_length = 1, max_length = 255)]
    idempotency_key: Option<String>,
    /// An object of the sender's, for finding messages again.
    #[schema(value_type = Option<Object>, example = json!({"campaign": "spring"}))]
    tags: Option<serde_json::Value>,
}

impl From<SendMessage> for NewMessage {
    fn from(message: SendMessage) -> NewMessage {
        NewMessage {
            endpoint: message.endpoint,
            recipient: message.recipient,
            content: message.content,
            content_type: message.content_type,
            headers: message.headers,
            ordering_key: message.ordering_key,
            priority: message.priority,
            send_at: message.send_at,
            expires_at: message.expires_at,
            idempotency_key: message.idempotency_key,
            tags: message.tags,
        }
    }
}

/// A message with its state.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(super) struct MessageView {
    /// Its number, in insert order.
    #[schema(example = 1)]
    id: i64,
    /// Where it stands: pending, queued, processing, sent, retrying, dead, cancelled or expired.
    #[schema(schema_with = super::document::status)]
    status: String,
    /// What it waits for and until when, or why it ended as it did.
    #[schema(example = "due at 2030-01-01T09:00:03Z; last: status 500")]
    why: Option<String>,
    /// The endpoint it goes to.
    #[schema(example = "default")]
    endpoint: String,
    /// To whom.
    #[schema(example = "+905551111111")]
    recipient: String,
    /// What.
    #[schema(example = "Hello")]
    content: String,
    /// The body's type, when the content itself is the body.
    #[schema(example = "text/plain")]
    content_type: Option<String>,
    /// Further request headers.
    #[schema(value_type = Option<Object>, example = json!({"x-tenant": "7"}))]
    headers: Option<serde_json::Value>,
    /// Its ordering key.
    #[schema(example = "order-4711")]
    ordering_key: Option<String>,
    /// Its priority.
    #[schema(example = 0)]
    priority: i16,
    /// Not before this time.
    #[schema(value_type = Option<String>, format = DateTime, example = "2030-01-01T09:00:00Z")]
    send_at: Option<Timestamp>,
    /// Not after this time.
    #[schema(value_type = Option<String>, format = DateTime, example = "2030-01-02T09:00:00Z")]
    expires_at: Option<Timestamp>,
    /// The sender's key.
    #[schema(example = "order-4711-paid")]
    idempotency_key: Option<String>,
    /// The sender's tags.
    #[schema(value_type = Option<Object>, example = json!({"campaign": "spring"}))]
    tags: Option<serde_json::Value>,
    /// Tries so far.
    #[schema(example = 1)]
    attempts: i32,
    /// When it was stored.
    #[schema(value_type = String, format = DateTime, example = "2030-01-01T09:00:00Z")]
    created_at: Timestamp,
    /// When the next try is due.
    #[schema(value_type = Option<String>, format = DateTime, example = "2030-01-01T09:00:03Z")]
    due_at: Option<Timestamp>,
    /// When it became final.
    #[schema(value_type = Option<String>, format = DateTime, example = "2030-01-01T09:00:09Z")]
    finished_at: Option<Timestamp>,
}

impl MessageView {
    pub(super) fn of(message: Message, around: &Surroundings) -> MessageView {
        MessageView {
            why: why(&message, around),
            id: message.id.0,
            status: message.status.to_string(),
            endpoint: message.endpoint,
            recipient: message.recipient,
            content: message.content,
            content_type: message.content_type,
            headers: message.headers,
            ordering_key: message.ordering_key,
            priority: message.priority,
            send_at: message.send_at,
            expires_at: message.expires_at,
            idempotency_key: message.idempotency_key,
            tags: message.tags,
            attempts: message.attempts,
            created_at: message.created_at,
            due_at: message.due_at,
            finished_at: message.finished_at,
        }
    }
}

/// Up to 10,000 messages that are stored together or not at all.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct SendBatch {
    /// The messages, at least one.
    #[schema(min_items = 1, max_items = 10_000)]
    messages: Vec<SendMessage>,
}

/// The ids of a batch.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(super) struct BatchView {
    /// In the order of the messages.
    #[schema(example = json!([1, 2, 3]))]
    ids: Vec<i64>,
    /// How many of them were stored before, by their idempotency keys.
    #[schema(example = 0)]
    existing: usize,
}

/// One try.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(super) struct AttemptView {
    /// Its number, from 1, over all lanes.
    #[schema(example = 1)]
    attempt: i32,
    /// The lane it was made on.
    #[schema(example = "messages")]
    lane: String,
    /// What it came to: accepted, rejected, invalid, refused, timeout, reset or bad_answer.
    #[schema(example = "rejected")]
    class: String,
    /// The answer's status.
    #[schema(example = 500)]
    status: Option<u16>,
    /// Where the request went.
    #[schema(example = "http://localhost:3000/")]
    address: String,
    /// What went wrong.
    #[schema(example = "connection refused")]
    error: Option<String>,
    /// The first 4 KiB of the answer.
    #[schema(example = "{\"message\":\"Accepted\"}")]
    answer: String,
    /// The receiver's own id of the message.
    #[schema(example = "67f2f8a8-ea58-4ed0-a6f9-ff217df4d849")]
    provider_message_id: Option<String>,
    /// When it began.
    #[schema(value_type = String, format = DateTime, example = "2030-01-01T09:00:00Z")]
    started_at: Timestamp,
    /// Name look-up, TCP and TLS, in milliseconds; 0 on a kept connection.
    #[schema(example = 0.4)]
    connect_ms: f64,
    /// Until the answer's head, in milliseconds.
    #[schema(example = 12.5)]
    head_ms: f64,
    /// Until the answer's end, in milliseconds.
    #[schema(example = 0.1)]
    body_ms: f64,
}

impl From<Attempt> for AttemptView {
    fn from(attempt: Attempt) -> AttemptView {
        let ms = |us: i32| f64::from(us) / 1000.0;
        AttemptView {
            attempt: attempt.attempt,
            lane: attempt.lane,
            class: attempt.class.as_str().to_owned(),
            status: attempt.status,
            address: delivery::shown_url(&attempt.address),
            error: attempt.error,
            answer: attempt.answer,
            provider_message_id: attempt.provider_message_id,
            started_at: attempt.started_at,
            connect_ms: ms(attempt.times.connect_us),
            head_ms: ms(attempt.times.head_us),
            body_ms: ms(attempt.times.body_us),
        }
    }
}

/// The tries of a message, oldest first.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(super) struct AttemptList {
    /// The tries.
    data: Vec<AttemptView>,
    /// Always null: a message's tries are one page.
    #[schema(example = json!(null))]
    next_cursor: Option<String>,
}

/// The receiver's answer.
#[derive(Clone, Debug, Serialize, ToSchema)]
#[serde(rename_all = "camelCase")]
pub(super) struct ResponseView {
    /// What it said.
    #[schema(example = "Accepted")]
    message: Option<String>,
    /// Its own id of the message.
    #[schema(example = "67f2f8a8-ea58-4ed0-a6f9-ff217df4d849")]
    message_id: Option<String>,
    /// The answer's status.
    #[schema(example = 200)]
    status: u16,
    /// When it answered.
    #[schema(value_type = String, format = DateTime, example = "2030-01-01T09:00:00Z")]
    timestamp: Timestamp,
}

impl From<Response> for ResponseView {
    fn from(response: Response) -> ResponseView {
        ResponseView {
            message: response.message,
            message_id: response.message_id,
            status: response.status,
            timestamp: response.timestamp,
        }
    }
}

/// Send one message
#[utoipa::path(
    post, path = "/v1/messages", operation_id = "send_message", tag = "messages", request_body = SendMessage,
    params(("Idempotency-Key" = Option<String>, Header, description = "as the field idempotency_key")),
    responses(
        (status = 202, description = "Stored: it will be sent", body = MessageView),
        (status = 200, description = "The key was used before for this message: here it is", body = MessageView),
        (status = 400, description = "Not the JSON that is expected", body = Problem, content_type = "application/problem+json"),
        (status = 408, description = "The body did not arrive in time", body = Problem, content_type = "application/problem+json"),
        (status = 413, description = "Too large", body = Problem, content_type = "application/problem+json"),
        (status = 415, description = "Not application/json", body = Problem, content_type = "application/problem+json"),
        (status = 422, description = "A field is wrong, or the key was used for another message", body = Problem, content_type = "application/problem+json"),
        (status = 503, description = "The store is away or busy; try again", body = Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn send(
    State(state): State<ApiState>,
    headers: HeaderMap,
    body: Result<Json<SendMessage>, JsonRejection>,
) -> Result<(StatusCode, Json<MessageView>), Problem> {
    let mut message = NewMessage::from(body?.0);
    if let Some(key) = headers.get("idempotency-key") {
        let key = key.to_str().map_err(|_| key_fault("must be plain text"))?.to_owned();
        if message.idempotency_key.as_ref().is_some_and(|other| *other != key) {
            return Err(key_fault("differs from the header Idempotency-Key; send one of them"));
        }
        message.idempotency_key = Some(key);
    }
    let messages = vec![message];
    let faults = faults(&state, &messages).await;
    if !faults.is_empty() {
        return Err(Problem::faults(faults.into_iter().map(|(_, fault)| (None, fault)).collect()));
    }
    let inserted = state.intake.submit(messages.clone()).await?;
    match (inserted.first(), messages.into_iter().next()) {
        // Not read back: what is committed must be answered as such, even if the store goes away now.
        (Some(Inserted::New { id, created_at }), Some(message)) => {
            let around = Surroundings::default();
            Ok((
                StatusCode::ACCEPTED,
                Json(MessageView::of(Message::pending(*id, *created_at, message), &around)),
            ))
        }
        (Some(Inserted::Existing(id)), _) => Ok((StatusCode::OK, Json(seen(&state, *id).await?))),
        (Some(Inserted::Conflict(id)), _) => {
            let detail = format!("message {id} has this key and says something else; use a new key");
            Err(Problem::new(Code::IdempotencyConflict, &detail))
        }
        _ => Err(Problem::internal("the store answered an insert with nothing")),
    }
}

fn key_fault(detail: &str) -> Problem {
    Problem::faults(vec![(None, Fault { field: "idempotency_key", detail: detail.to_owned() })])
}

/// Send up to 10,000 messages, all or none
#[utoipa::path(
    post, path = "/v1/messages/batch", operation_id = "send_messages", tag = "messages", request_body = SendBatch,
    responses(
        (status = 202, description = "Stored: they will be sent", body = BatchView),
        (status = 400, description = "Not the JSON that is expected", body = Problem, content_type = "application/problem+json"),
        (status = 408, description = "The body did not arrive in time", body = Problem, content_type = "application/problem+json"),
        (status = 413, description = "Too large", body = Problem, content_type = "application/problem+json"),
        (status = 415, description = "Not application/json", body = Problem, content_type = "application/problem+json"),
        (status = 422, description = "None is stored; each bad one is named by its index", body = Problem, content_type = "application/problem+json"),
        (status = 503, description = "The store is away or busy; try again", body = Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn send_batch(
    State(state): State<ApiState>,
    body: Result<Json<SendBatch>, JsonRejection>,
) -> Result<(StatusCode, Json<BatchView>), Problem> {
    let messages: Vec<NewMessage> = body?.0.messages.into_iter().map(NewMessage::from).collect();
    if messages.is_empty() || messages.len() > BATCH_MAX {
        let detail = format!("must hold from 1 to {BATCH_MAX} messages; here are {}", messages.len());
        return Err(Problem::faults(vec![(None, Fault { field: "messages", detail })]));
    }
    let faults = faults(&state, &messages).await;
    if !faults.is_empty() {
        return Err(Problem::faults(faults.into_iter().map(|(index, fault)| (Some(index), fault)).collect()));
    }
    let inserted = state.intake.submit(messages).await?;
    let conflicts: Vec<_> =
        (0..inserted.len()).filter(|at| matches!(inserted[*at], Inserted::Conflict(_))).collect();
    if !conflicts.is_empty() {
        // A batch of one: it has shared its transaction with others.
        return Err(IntakeError::Conflicts(conflicts).into());
    }
    let existing = inserted.iter().filter(|inserted| !matches!(inserted, Inserted::New { .. })).count();
    let ids = inserted
        .into_iter()
        .map(|inserted| match inserted {
            Inserted::New { id, .. } | Inserted::Existing(id) | Inserted::Conflict(id) => id.0,
        })
        .collect();
    Ok((StatusCode::ACCEPTED, Json(BatchView { ids, existing })))
}

/// Everything that is wrong with these messages, by index.
async fn faults(state: &ApiState, messages: &[NewMessage]) -> Vec<(usize, Fault)> {
    let mut names: Vec<&str> = messages.iter().filter_map(|message| message.endpoint.as_deref()).collect();
    names.sort_unstable();
    names.dedup();
    let known = endpoint_exists(state, &names).await;
    let exists = |name: &str| known.get(name).copied().unwrap_or(false);
    let now = state.context.clock.now();
    let of =
        |(index, message)| intake::check(message, now, exists).into_iter().map(move |fault| (index, fault));
    messages.iter().enumerate().flat_map(of).collect()
}

/// Show a message, and what it waits for
#[utoipa::path(
    get, path = "/v1/messages/{id}", operation_id = "show_message", tag = "messages", params(("id" = i64, Path, description = "The message's number", example = 1)),
    responses(
        (status = 200, description = "The message", body = MessageView),
        (status = 400, description = "No number", body = Problem, content_type = "application/problem+json"),
        (status = 404, description = "No such message", body = Problem, content_type = "application/problem+json"),
        (status = 503, description = "The store is away; try again", body = Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn show(
    State(state): State<ApiState>,
    id: Result<Path<i64>, PathRejection>,
) -> Result<Json<MessageView>, Problem> {
    Ok(Json(seen(&state, MessageId(id?.0)).await?))
}

/// Show a message's tries, oldest first
#[utoipa::path(
    get, path = "/v1/messages/{id}/attempts", operation_id = "list_attempts", tag = "messages", params(("id" = i64, Path, description = "The message's number", example = 1)),
    responses(
        (status = 200, description = "Its tries", body = AttemptList),
        (status = 400, description = "No number", body = Problem, content_type = "application/problem+json"),
        (status = 404, description = "No such message", body = Problem, content_type = "application/problem+json"),
        (status = 503, description = "The store is away; try again", body = Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn attempts(
    State(state): State<ApiState>,
    id: Result<Path<i64>, PathRejection>,
) -> Result<Json<AttemptList>, Problem> {
    let message = find(&state, MessageId(id?.0)).await?;
    let attempts = state.context.store.attempts(message.id).await?;
    Ok(Json(AttemptList { data: attempts.into_iter().map(AttemptView::from).collect(), next_cursor: None }))
}

/// Show the receiver's answer
#[utoipa::path(
    get, path = "/v1/messages/{id}/response", operation_id = "show_response", tag = "messages", params(("id" = i64, Path, description = "The message's number", example = 1)),
    responses(
        (status = 200, description = "The cached answer, else the stored one", body = ResponseView),
        (status = 400, description = "No number", body = Problem, content_type = "application/problem+json"),
        (status = 404, description = "No such message, or it has no answer yet", body = Problem, content_type = "application/problem+json"),
        (status = 503, description = "The store is away; try again", body = Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn response(
    State(state): State<ApiState>,
    id: Result<Path<i64>, PathRejection>,
) -> Result<Json<ResponseView>, Problem> {
    let id = MessageId(id?.0);
    match state.context.cache.get(id).await {
        Ok(Some(response)) => return Ok(Json(response.into())),
        Ok(None) => {}
        Err(error) => tracing::debug!("the cache could not be asked: {error}"),
    }
    find(&state, id).await?;
    let attempts = state.context.store.attempts(id).await?;
    let last = attempts.into_iter().rev().find_map(|attempt| {
        let status = attempt.status?;
        Some(ResponseView { status, ..stored_response(&attempt) })
    });
    last.map(Json).ok_or_else(|| Problem::new(Code::NotFound, &format!("message {id} has no answer yet")))
}

fn stored_response(attempt: &Attempt) -> ResponseView {
    #[derive(Deserialize)]
    struct Answer {
        message: Option<String>,
    }
    ResponseView {
        message: serde_json::from_str::<Answer>(&attempt.answer).ok().and_then(|answer| answer.message),
        message_id: attempt.provider_message_id.clone(),
        status: attempt.status.unwrap_or_default(),
        timestamp: attempt.started_at,
    }
}

async fn seen(state: &ApiState, id: MessageId) -> Result<MessageView, Problem> {
    let message = find(state, id).await?;
    let around = Surroundings::of_one(state, &message).await;
    Ok(MessageView::of(message, &around))
}

pub(super) async fn find(state: &ApiState, id: MessageId) -> Result<Message, Problem> {
    let message = state.context.store.message(id).await?;
    message.ok_or_else(|| Problem::new(Code::NotFound, &format!("there is no message {id}")))
}
