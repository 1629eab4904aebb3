//! What a client is told when something is wrong: `application/problem+json`, RFC 9457.

use axum::Json;
use axum::extract::rejection::{JsonRejection, PathRejection};
use axum::http::StatusCode;
use axum::http::header::{CONTENT_TYPE, RETRY_AFTER, WWW_AUTHENTICATE};
use axum::response::{IntoResponse, Response};
use serde::Serialize;
use utoipa::ToSchema;

use crate::intake::{Fault, IntakeError};
use crate::store::StoreError;

/// Every error code. The codes are stable; `docs/errors.md` is made from them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Code {
    InvalidJson,
    InvalidPath,
    InvalidQuery,
    InvalidMessage,
    InvalidEndpoint,
    InvalidFilter,
    IdempotencyConflict,
    KeyMissing,
    ScopeMissing,
    HostNotAllowed,
    OriginNotAllowed,
    NotFound,
    MethodNotAllowed,
    TooSlow,
    WrongStatus,
    EndpointExists,
    EndpointInUse,
    TooLarge,
    UnsupportedMediaType,
    Internal,
    Busy,
    Unavailable,
}

/// What stands behind a code.
struct Meaning {
    status: StatusCode,
    code: &'static str,
    title: &'static str,
    mend: &'static str,
}

const fn meaning(status: StatusCode, code: &'static str, title: &'static str, mend: &'static str) -> Meaning {
    Meaning { status, code, title, mend }
}

/// In the order of [`Code`].
const MEANINGS: [Meaning; 22] = [
    meaning(
        StatusCode::BAD_REQUEST,
        "invalid_json",
        "The body is not the JSON that is expected",
        "Compare the body with the OpenAPI document; `detail` names the place.",
    ),
    meaning(
        StatusCode::BAD_REQUEST,
        "invalid_path",
        "The path can't be understood",
        "Use the number or name that a list shows.",
    ),
    meaning(
        StatusCode::BAD_REQUEST,
        "invalid_query",
        "A parameter is wrong",
        "`detail` names it; take cursors as they were given.",
    ),
    meaning(
        StatusCode::UNPROCESSABLE_ENTITY,
        "invalid_message",
        "A message can't be accepted",
        "`errors` names each field, and in a batch each message by its index.",
    ),
    meaning(
        StatusCode::UNPROCESSABLE_ENTITY,
        "invalid_endpoint",
        "An endpoint can't be so",
        "`errors` names each field.",
    ),
    meaning(
        StatusCode::UNPROCESSABLE_ENTITY,
        "invalid_filter",
        "The filter asks for what can't be changed",
        "Name a status that the change allows.",
    ),
    meaning(
        StatusCode::UNPROCESSABLE_ENTITY,
        "idempotency_conflict",
        "The idempotency key was used for another message",
        "Use a new key for another message; the same key only to repeat one.",
    ),
    meaning(
        StatusCode::UNAUTHORIZED,
        "key_missing",
        "A valid key is needed",
        "Make one with `ams keys create` and send it as `Authorization: Bearer`.",
    ),
    meaning(
        StatusCode::FORBIDDEN,
        "scope_missing",
        "The key does not allow this",
        "Use a key with the scope that `detail` names.",
    ),
    meaning(
        StatusCode::FORBIDDEN,
        "host_not_allowed",
        "The Host header names somebody else",
        "Call the API by its address, or add its name to `AMS_HOSTS`.",
    ),
    meaning(
        StatusCode::FORBIDDEN,
        "origin_not_allowed",
        "A page of another site has called",
        "Call the API from a program, or from a page that it serves.",
    ),
    meaning(
        StatusCode::NOT_FOUND,
        "not_found",
        "There is no such thing",
        "Look at a list for what there is.",
    ),
    meaning(
        StatusCode::METHOD_NOT_ALLOWED,
        "method_not_allowed",
        "Not with this method",
        "The OpenAPI document names the methods of each path.",
    ),
    meaning(
        StatusCode::REQUEST_TIMEOUT,
        "too_slow",
        "The request did not arrive or end in time",
        "Send the body faster, or in smaller batches.",
    ),
    meaning(
        StatusCode::CONFLICT,
        "wrong_status",
        "The message's status does not allow this",
        "Look at its `status`: what is sent stays so, what waits can be cancelled, what has ended can be redriven.",
    ),
    meaning(
        StatusCode::CONFLICT,
        "endpoint_exists",
        "There is an endpoint of that name",
        "Change it with `PATCH`, or choose another name.",
    ),
    meaning(
        StatusCode::CONFLICT,
        "endpoint_in_use",
        "The endpoint is needed",
        "Disable it instead: its messages are held until it is enabled again.",
    ),
    meaning(
        StatusCode::PAYLOAD_TOO_LARGE,
        "too_large",
        "The body is too large",
        "A message's content may have 1 MiB, a single post 2 MiB, a batch 64 MiB: split it.",
    ),
    meaning(
        StatusCode::UNSUPPORTED_MEDIA_TYPE,
        "unsupported_media_type",
        "The body must be application/json",
        "Send `Content-Type: application/json`.",
    ),
    meaning(
        StatusCode::INTERNAL_SERVER_ERROR,
        "internal",
        "AMS failed; its log says how",
        "Report it with the lines of the log; try again later.",
    ),
    meaning(
        StatusCode::SERVICE_UNAVAILABLE,
        "busy",
        "Too much is waiting to be stored",
        "Try again after `Retry-After` seconds.",
    ),
    meaning(
        StatusCode::SERVICE_UNAVAILABLE,
        "unavailable",
        "The store can't be reached",
        "Try again after `Retry-After` seconds; `/readyz` says what is away.",
    ),
];

impl Code {
    fn meaning(self) -> &'static Meaning {
        &MEANINGS[self as usize]
    }
}

/// The page on errors, made from the codes: `docs/errors.md`.
pub fn errors_page() -> String {
    let head = "# Errors\n\n\
        The API answers what it can't do with `application/problem+json`. Programs go by `code`, which does not \
        change; people read `detail`. This page is made from the source.\n\n\
        | status | code | what it means | what to do |\n| --- | --- | --- | --- |\n";
    let line = |m: &Meaning| format!("| {} | `{}` | {} | {} |\n", m.status.as_u16(), m.code, m.title, m.mend);
    std::iter::once(head.to_owned()).chain(MEANINGS.iter().map(line)).collect()
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
        let Meaning { status, code, title, .. } = *code.meaning();
        Problem {
            r#type: "about:blank",
            title,
            status: status.as_u16(),
            code,
            detail: detail.to_owned(),
            errors: Vec::new(),
        }
    }

    /// Faults of messages; `index` stands with each in a batch.
    pub(super) fn faults(faults: Vec<(Option<usize>, Fault)>) -> Problem {
        Problem::of_faults(Code::InvalidMessage, faults)
    }

    /// Faults of an endpoint.
    pub(super) fn endpoint_faults(faults: Vec<Fault>) -> Problem {
        Problem::of_faults(Code::InvalidEndpoint, faults.into_iter().map(|fault| (None, fault)).collect())
    }

    fn of_faults(code: Code, faults: Vec<(Option<usize>, Fault)>) -> Problem {
        let errors: Vec<_> = faults
            .into_iter()
            .map(|(index, fault)| FieldProblem { index, field: fault.field, detail: fault.detail })
            .collect();
        let detail = match errors.first() {
            Some(first) => format!("{} {}", first.field, first.detail),
            None => "it breaks a rule".to_owned(),
        };
        Problem { errors, ..Problem::new(code, &detail) }
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
        let asked = (status == StatusCode::UNAUTHORIZED).then_some([(WWW_AUTHENTICATE, "Bearer")]);
        let mut response = (status, retry, asked, Json(self)).into_response();
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
            StoreError::Unavailable(_) | StoreError::Unsupported(_) => {
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
        Problem::new(
            Code::InvalidPath,
            "a message or an operation goes by its number, an endpoint by its name",
        )
    }
}
