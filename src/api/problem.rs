//! What a client is told when something is wrong: `application/problem+json`, RFC 9457.

use axum::Json;
use axum::extract::rejection::{JsonRejection, PathRejection};
use axum::http::StatusCode;
use axum::http::header::{CONTENT_TYPE, RETRY_AFTER};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use utoipa::ToSchema;

use crate::intake::{Fault, IntakeError};
use crate::store::StoreError;

/// Every error code, with its status and title. The codes are stable.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Code {
    InvalidJson,
    InvalidMessage,
    InvalidPath,
    IdempotencyConflict,
    NotFound,
    MethodNotAllowed,
    UnsupportedMediaType,
    TooLarge,
    TooSlow,
    Busy,
    Unavailable,
    Internal,
}

impl Code {
    fn parts(self) -> (StatusCode, &'static str, &'static str) {
        match self {
            Code::InvalidJson => {
                (StatusCode::BAD_REQUEST, "invalid_json", "The body is not the JSON that is expected")
            }
            Code::InvalidMessage => {
                (StatusCode::UNPROCESSABLE_ENTITY, "invalid_message", "A message can't be accepted")
            }
            Code::InvalidPath => (StatusCode::BAD_REQUEST, "invalid_path", "The path can't be understood"),
            Code::IdempotencyConflict => (
                StatusCode::UNPROCESSABLE_ENTITY,
                "idempotency_conflict",
                "The idempotency key was used for another message",
            ),
            Code::NotFound => (StatusCode::NOT_FOUND, "not_found", "There is no such thing"),
            Code::MethodNotAllowed => {
                (StatusCode::METHOD_NOT_ALLOWED, "method_not_allowed", "Not with this method")
            }
            Code::UnsupportedMediaType => (
                StatusCode::UNSUPPORTED_MEDIA_TYPE,
                "unsupported_media_type",
                "The body must be application/json",
            ),
            Code::TooLarge => (StatusCode::PAYLOAD_TOO_LARGE, "too_large", "The body is too large"),
            Code::TooSlow => {
                (StatusCode::REQUEST_TIMEOUT, "too_slow", "The request did not arrive or end in time")
            }
            Code::Busy => (StatusCode::SERVICE_UNAVAILABLE, "busy", "Too much is waiting to be stored"),
            Code::Unavailable => {
                (StatusCode::SERVICE_UNAVAILABLE, "unavailable", "The store can't be reached")
            }
            Code::Internal => (StatusCode::INTERNAL_SERVER_ERROR, "internal", "AMS failed; its log says how"),
        }
    }
}

/// An error, as a client sees it.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(super) struct Problem {
    /// Names the kind of problem.
    #[schema(example = "about:blank")]
    r#type: &'static str,
    /// What kind of problem this is, for people.
    #[schema(example = "A message can't be accepted")]
    title: &'static str,
    /// The answer's status.
    #[schema(example = 422)]
    status: u16,
    /// The kind of problem, for programs; it does not change.
    #[schema(example = "invalid_message")]
    code: &'static str,
    /// What is wrong this time and how to mend it.
    #[schema(example = "1 of 1 messages can't be accepted")]
    detail: String,
    /// Each fault by field, and in a batch by index.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    errors: Vec<FieldProblem>,
}

/// One fault.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(super) struct FieldProblem {
    /// The message's place in the batch, from 0.
    #[schema(example = 0)]
    #[serde(skip_serializing_if = "Option::is_none")]
    index: Option<usize>,
    /// The field that is wrong.
    #[schema(example = "recipient")]
    field: &'static str,
    /// What is wrong with it and how to mend it.
    #[schema(example = "must have from 1 to 1024 characters")]
    detail: String,
}

impl Problem {
    pub(super) fn new(code: Code, detail: &str) -> Problem {
        let (status, word, title) = code.parts();
        Problem {
            r#type: "about:blank",
            title,
            status: status.as_u16(),
            code: word,
            detail: detail.to_owned(),
            errors: Vec::new(),
        }
    }

    /// Faults of messages; `index` stands with each in a batch.
    pub(super) fn faults(faults: Vec<(Option<usize>, Fault)>) -> Problem {
        let errors: Vec<_> = faults
            .into_iter()
            .map(|(index, fault)| FieldProblem { index, field: fault.field, detail: fault.detail })
            .collect();
        let detail = match errors.first() {
            Some(first) => format!("{} {}", first.field, first.detail),
            None => "it breaks a rule".to_owned(),
        };
        Problem { errors, ..Problem::new(Code::InvalidMessage, &detail) }
    }

    /// A defect of ours: told to the log, not to the client.
    pub(super) fn internal(what: &str) -> Problem {
        tracing::error!("a request failed: {what}");
        Problem::new(Code::Internal, "the log says more")
    }
}

impl IntoResponse for Problem {
    fn into_response(self) -> Response {
        let status = StatusCode::from_u16(self.status).unwrap_or(StatusCode::INTERNAL_SERVER_ERROR);
        let retry = (status == StatusCode::SERVICE_UNAVAILABLE).then_some([(RETRY_AFTER, "1")]);
        let mut response = (status, retry, Json(self)).into_response();
        let problem = axum::http::HeaderValue::from_static("application/problem+json");
        response.headers_mut().insert(CONTENT_TYPE, problem);
        response
    }
}

impl From<StoreError> for Problem {
    fn from(error: StoreError) -> Problem {
        match error {
            StoreError::Refused(why) => {
                // Our own check should have said it first, in words that are not the database's.
                tracing::warn!("the store refused a message that the intake let through: {why}");
                Problem::new(Code::InvalidMessage, "the store refused it; the log of AMS says why")
            }
            StoreError::Unavailable(_) | StoreError::Version(_) => {
                tracing::warn!("a request had to be turned away: {error}");
                Problem::new(Code::Unavailable, "try again in a moment; /readyz says more")
            }
            StoreError::Internal(why) => Problem::internal(&why),
        }
    }
}

impl From<IntakeError> for Problem {
    fn from(error: IntakeError) -> Problem {
        match error {
            IntakeError::Busy => Problem::new(Code::Busy, "try again in a moment"),
            IntakeError::Conflicts(places) => Problem::faults(
                places
                    .into_iter()
                    .map(|index| {
                        let detail = "was used for another message; use a new key".to_owned();
                        (Some(index), Fault { field: "idempotency_key", detail })
                    })
                    .collect(),
            ),
            IntakeError::Store(error) => error.into(),
        }
    }
}

impl From<JsonRejection> for Problem {
    fn from(rejection: JsonRejection) -> Problem {
        let code = match rejection.status() {
            StatusCode::UNSUPPORTED_MEDIA_TYPE => Code::UnsupportedMediaType,
            StatusCode::PAYLOAD_TOO_LARGE => Code::TooLarge,
            _ => Code::InvalidJson,
        };
        Problem::new(code, &rejection.body_text())
    }
}

impl From<PathRejection> for Problem {
    fn from(_: PathRejection) -> Problem {
        Problem::new(Code::InvalidPath, "a message's id is a whole number")
    }
}
