//! Endpoints: where messages go, and how.

use std::collections::HashMap;
use std::time::Duration;

use axum::Json;
use axum::extract::rejection::{JsonRejection, PathRejection};
use axum::extract::{Path, State};
use axum::http::StatusCode;
use serde::{Deserialize, Serialize};
use utoipa::ToSchema;

use super::ApiState;
use super::problem::{Code, Problem};
use crate::breaker::Breaker;
use crate::clock::Timestamp;
use crate::delivery;
use crate::intake::Fault;
use crate::rate::Rate;
use crate::store::Endpoint;
use crate::store::operate::Deletion;

/// Bounds of an endpoint's settings.
const NAME_MAX: usize = 255;
const TIMEOUT_MAX_MS: u64 = 600_000;
const IN_FLIGHT_MAX: u32 = 100_000;
const RATE_COUNT_MAX: u32 = 1_000_000;
const RATE_INTERVAL_MS: std::ops::RangeInclusive<u64> = 1_000..=86_400_000;
const FINAL_STATUSES_MAX: usize = 100;

/// An HTTP destination.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(super) struct EndpointView {
    /// Its name, which messages use.
    #[schema(example = "sms")]
    name: String,
    /// Where requests go.
    #[schema(example = "https://example.org/hook")]
    url: String,
    /// One deadline over connect, head and body of a try, in milliseconds.
    #[schema(example = 15000)]
    timeout_ms: u64,
    /// Tries in flight at once, in each consumer process.
    #[schema(example = 1024)]
    in_flight_max: u32,
    /// Attempts at it in any `rate_interval_ms`, over all consumers together; null: as many as it takes.
    #[schema(example = 100)]
    rate_count: Option<u64>,
    /// The interval of its rate, in milliseconds.
    #[schema(example = 1000)]
    rate_interval_ms: u64,
    /// Statuses after which a message is dead at once.
    #[schema(example = json!([410]))]
    final_statuses: Vec<u16>,
    /// Whether it takes messages; those of a disabled one are held.
    #[schema(example = true)]
    enabled: bool,
    /// Whether requests are signed. The secret itself is never shown.
    #[schema(example = false)]
    signed: bool,
    /// Its circuit breaker, when it is not closed: the endpoint has failed for long or asked for a pause.
    breaker: Option<BreakerView>,
}

/// A circuit breaker that is not closed.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(super) struct BreakerView {
    /// `open`: no attempt is made, and what is due is held. `half_open`: one attempt at a time probes the endpoint.
    #[schema(example = "open")]
    state: &'static str,
    /// `failing`: only failures have come for long. `retry_after`: the endpoint asked for a pause.
    #[schema(example = "failing")]
    cause: &'static str,
    /// Since when it has not been closed.
    #[schema(value_type = String, format = DateTime, example = "2030-01-01T09:00:00Z")]
    since: Timestamp,
    /// Until when it is open.
    #[schema(value_type = String, format = DateTime, example = "2030-01-01T09:00:05Z")]
    until: Timestamp,
    /// How often it was opened since then.
    #[schema(example = 1)]
    openings: i32,
    /// What the last attempt came to.
    #[schema(example = "status 503")]
    reason: String,
    /// All this in words.
    #[schema(
        example = "endpoint sms has failed for long (last: status 503); it is probed from 2030-01-01T09:00:05Z on"
    )]
    detail: String,
}

impl BreakerView {
    pub(super) fn new(endpoint: &str, breaker: &Breaker, now: Timestamp) -> BreakerView {
        BreakerView {
            state: if breaker.is_open(now) { "open" } else { "half_open" },
            cause: breaker.cause.as_str(),
            since: breaker.since,
            until: breaker.until,
            openings: breaker.openings,
            reason: breaker.reason.clone(),
            detail: breaker.explain(endpoint),
        }
    }
}

impl EndpointView {
    fn with(self, breaker: Option<&Breaker>, now: Timestamp) -> EndpointView {
        let breaker = breaker.map(|breaker| BreakerView::new(&self.name, breaker, now));
        EndpointView { breaker, ..self }
    }
}

impl From<&Endpoint> for EndpointView {
    fn from(endpoint: &Endpoint) -> EndpointView {
        EndpointView {
            breaker: None,
            name: endpoint.name.clone(),
            url: delivery::shown_url(&endpoint.url),
            timeout_ms: u64::try_from(endpoint.timeout.as_millis()).unwrap_or(u64::MAX),
            in_flight_max: endpoint.in_flight_max,
            rate_count: endpoint.rate.map(|rate| rate.count as u64),
            rate_interval_ms: interval_ms(endpoint),
            final_statuses: endpoint.final_statuses.clone(),
            enabled: endpoint.enabled,
            signed: endpoint.secret.is_some(),
        }
    }
}

/// All endpoints, by name.
#[derive(Clone, Debug, Serialize, ToSchema)]
pub(super) struct EndpointList {
    /// The endpoints.
    data: Vec<EndpointView>,
    /// Always null: all endpoints are one page.
    #[schema(example = json!(null))]
    next_cursor: Option<String>,
}

/// What of an endpoint is to be changed; what is left out stays.
#[derive(Clone, Debug, Default, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct EndpointBody {
    /// Where requests go.
    #[schema(example = "https://example.org/hook")]
    url: Option<String>,
    /// One deadline over connect, head and body of a try, in milliseconds: 1 to 600,000.
    #[schema(example = 15000, minimum = 1, maximum = 600_000)]
    timeout_ms: Option<u64>,
    /// Tries in flight at once, in each consumer process: 1 to 100,000.
    #[schema(example = 1024, minimum = 1, maximum = 100_000)]
    in_flight_max: Option<u32>,
    /// Attempts at it in any `rate_interval_ms`, over all consumers together: up to 1,000,000; 0: as many as it takes.
    #[schema(example = 100, maximum = 1_000_000)]
    rate_count: Option<u32>,
    /// The interval of its rate, in milliseconds: 1,000 to 86,400,000, a day.
    #[schema(example = 1000, minimum = 1_000, maximum = 86_400_000)]
    rate_interval_ms: Option<u64>,
    /// Statuses after which a message is dead at once: from 300 to 599.
    #[schema(example = json!([410]), max_items = 100)]
    final_statuses: Option<Vec<u16>>,
    /// Whether it takes messages; those of a disabled one are held.
    #[schema(example = true)]
    enabled: Option<bool>,
    /// Standard Webhooks secret, `whsec_` and base64, to sign requests with; empty: they are not signed.
    #[schema(example = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", pattern = "^(whsec_[A-Za-z0-9+/]+=*)?$")]
    secret: Option<String>,
}

/// A new endpoint.
///
/// Its fields are spelled out: a document that joins two closed objects describes what nothing can match.
#[derive(Clone, Debug, Deserialize, ToSchema)]
#[serde(deny_unknown_fields)]
pub(super) struct NewEndpoint {
    /// Its name: 1 to 255 letters, digits, `-`, `_` and `.`.
    #[schema(example = "sms", min_length = 1, max_length = 255, pattern = "^[A-Za-z0-9_.-]+$")]
    name: String,
    /// Where requests go.
    #[schema(example = "https://example.org/hook")]
    url: String,
    /// One deadline over connect, head and body of a try, in milliseconds: 1 to 600,000.
    #[schema(example = 15000, minimum = 1, maximum = 600_000)]
    timeout_ms: Option<u64>,
    /// Tries in flight at once, in each consumer process: 1 to 100,000.
    #[schema(example = 1024, minimum = 1, maximum = 100_000)]
    in_flight_max: Option<u32>,
    /// Attempts at it in any `rate_interval_ms`, over all consumers together: up to 1,000,000; 0: as many as it takes.
    #[schema(example = 100, maximum = 1_000_000)]
    rate_count: Option<u32>,
    /// The interval of its rate, in milliseconds: 1,000 to 86,400,000, a day.
    #[schema(example = 1000, minimum = 1_000, maximum = 86_400_000)]
    rate_interval_ms: Option<u64>,
    /// Statuses after which a message is dead at once: from 300 to 599.
    #[schema(example = json!([410]), max_items = 100)]
    final_statuses: Option<Vec<u16>>,
    /// Whether it takes messages; those of a disabled one are held.
    #[schema(example = true)]
    enabled: Option<bool>,
    /// Standard Webhooks secret, `whsec_` and base64, to sign requests with; empty: they are not signed.
    #[schema(example = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw", pattern = "^(whsec_[A-Za-z0-9+/]+=*)?$")]
    secret: Option<String>,
}

/// List all endpoints
#[utoipa::path(
    get, path = "/v1/endpoints", operation_id = "list_endpoints", tag = "endpoints",
    responses(
        (status = 200, description = "All endpoints, by name", body = EndpointList),
        (status = 503, description = "The store is away; try again", body = Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn list(State(state): State<ApiState>) -> Result<Json<EndpointList>, Problem> {
    let (store, now) = (&state.context.store, state.context.clock.now());
    let endpoints = store.endpoints().await?;
    let breakers: HashMap<_, _> = store.breakers().await?.into_iter().collect();
    let data = endpoints.iter().map(|e| EndpointView::from(e).with(breakers.get(&e.name), now)).collect();
    Ok(Json(EndpointList { data, next_cursor: None }))
}

/// Show an endpoint
#[utoipa::path(
    get, path = "/v1/endpoints/{name}", operation_id = "show_endpoint", tag = "endpoints", params(("name" = String, Path, description = "Its name", example = "default")),
    responses(
        (status = 200, description = "The endpoint", body = EndpointView),
        (status = 400, description = "The name is no text", body = Problem, content_type = "application/problem+json"),
        (status = 404, description = "No such endpoint", body = Problem, content_type = "application/problem+json"),
        (status = 503, description = "The store is away; try again", body = Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn show(
    State(state): State<ApiState>,
    name: Result<Path<String>, PathRejection>,
) -> Result<Json<EndpointView>, Problem> {
    let name = name?.0;
    let endpoint = find(&state, &name).await?.ok_or_else(|| missing(&name))?;
    shown(&state, &endpoint).await
}

/// Create an endpoint
#[utoipa::path(
    post, path = "/v1/endpoints", operation_id = "create_endpoint", tag = "endpoints", request_body = NewEndpoint,
    responses(
        (status = 201, description = "The endpoint", body = EndpointView),
        (status = 400, description = "Not the JSON that is expected", body = Problem, content_type = "application/problem+json"),
        (status = 408, description = "The body did not arrive in time", body = Problem, content_type = "application/problem+json"),
        (status = 409, description = "There is one of that name", body = Problem, content_type = "application/problem+json"),
        (status = 413, description = "Too large", body = Problem, content_type = "application/problem+json"),
        (status = 415, description = "Not application/json", body = Problem, content_type = "application/problem+json"),
        (status = 422, description = "A field is wrong", body = Problem, content_type = "application/problem+json"),
        (status = 503, description = "The store is away; try again", body = Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn create(
    State(state): State<ApiState>,
    body: Result<Json<NewEndpoint>, JsonRejection>,
) -> Result<(StatusCode, Json<EndpointView>), Problem> {
    let new = body?.0;
    let name = new.name;
    let body = EndpointBody {
        url: Some(new.url),
        timeout_ms: new.timeout_ms,
        in_flight_max: new.in_flight_max,
        rate_count: new.rate_count,
        rate_interval_ms: new.rate_interval_ms,
        final_statuses: new.final_statuses,
        enabled: new.enabled,
        secret: new.secret,
    };
    let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    if name.is_empty() || name.len() > NAME_MAX || !name.chars().all(legal) {
        let detail = "must have from 1 to 255 letters, digits, `-`, `_` and `.`".to_owned();
        return Err(Problem::endpoint_faults(vec![Fault { field: "name", detail }]));
    }
    if find(&state, &name).await?.is_some() {
        let detail = format!("there is an endpoint {name}; change it with PATCH /v1/endpoints/{name}");
        return Err(Problem::new(Code::EndpointExists, &detail));
    }
    let endpoint = changed(Endpoint::new(&name, ""), body)?;
    put(&state, &endpoint).await?;
    Ok((StatusCode::CREATED, Json(EndpointView::from(&endpoint))))
}

/// Change an endpoint
///
/// A change closes the endpoint's breaker. It takes up to two seconds to be heard by every process.
#[utoipa::path(
    patch, path = "/v1/endpoints/{name}", operation_id = "change_endpoint", tag = "endpoints", params(("name" = String, Path, description = "Its name", example = "default")),
    request_body = EndpointBody,
    responses(
        (status = 200, description = "The endpoint as it is now", body = EndpointView),
        (status = 400, description = "Not the JSON that is expected", body = Problem, content_type = "application/problem+json"),
        (status = 404, description = "No such endpoint", body = Problem, content_type = "application/problem+json"),
        (status = 408, description = "The body did not arrive in time", body = Problem, content_type = "application/problem+json"),
        (status = 413, description = "Too large", body = Problem, content_type = "application/problem+json"),
        (status = 415, description = "Not application/json", body = Problem, content_type = "application/problem+json"),
        (status = 422, description = "A field is wrong", body = Problem, content_type = "application/problem+json"),
        (status = 503, description = "The store is away; try again", body = Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn change(
    State(state): State<ApiState>,
    name: Result<Path<String>, PathRejection>,
    body: Result<Json<EndpointBody>, JsonRejection>,
) -> Result<Json<EndpointView>, Problem> {
    let (name, body) = (name?.0, body?.0);
    let endpoint = changed(find(&state, &name).await?.ok_or_else(|| missing(&name))?, body)?;
    put(&state, &endpoint).await?;
    shown(&state, &endpoint).await
}

/// Delete an endpoint that no message names
#[utoipa::path(
    delete, path = "/v1/endpoints/{name}", operation_id = "delete_endpoint", tag = "endpoints", params(("name" = String, Path, description = "Its name", example = "sms")),
    responses(
        (status = 204, description = "It is gone"),
        (status = 400, description = "The name is no text", body = Problem, content_type = "application/problem+json"),
        (status = 404, description = "No such endpoint", body = Problem, content_type = "application/problem+json"),
        (status = 409, description = "Messages name it, or it is `default`", body = Problem, content_type = "application/problem+json"),
        (status = 503, description = "The store is away; try again", body = Problem, content_type = "application/problem+json"),
    )
)]
pub(super) async fn delete(
    State(state): State<ApiState>,
    name: Result<Path<String>, PathRejection>,
) -> Result<StatusCode, Problem> {
    let name = name?.0;
    if name == "default" {
        let detail = "the endpoint default belongs to REQUEST_URL and stays; disable it instead";
        return Err(Problem::new(Code::EndpointInUse, detail));
    }
    if name.contains('\0') {
        return Err(missing(&name));
    }
    match state.context.store.delete_endpoint(&name).await? {
        Deletion::Deleted => {
            heard(&state).await;
            Ok(StatusCode::NO_CONTENT)
        }
        Deletion::Missing => Err(missing(&name)),
        Deletion::Used => {
            let detail = format!("messages name the endpoint {name}; disable it instead");
            Err(Problem::new(Code::EndpointInUse, &detail))
        }
    }
}

/// An endpoint as it stands, with its breaker.
async fn shown(state: &ApiState, endpoint: &Endpoint) -> Result<Json<EndpointView>, Problem> {
    let breakers = state.context.store.breakers().await?;
    let breaker = breakers.iter().find(|(name, _)| *name == endpoint.name).map(|(_, breaker)| breaker);
    Ok(Json(EndpointView::from(endpoint).with(breaker, state.context.clock.now())))
}

async fn find(state: &ApiState, name: &str) -> Result<Option<Endpoint>, Problem> {
    Ok(state.context.store.endpoints().await?.into_iter().find(|endpoint| endpoint.name == name))
}

fn missing(name: &str) -> Problem {
    Problem::new(Code::NotFound, &format!("there is no endpoint {name}"))
}

async fn put(state: &ApiState, endpoint: &Endpoint) -> Result<(), Problem> {
    state.context.store.put_endpoint(endpoint).await?;
    heard(state).await;
    Ok(())
}

/// This process knows at once; the others read the directory every two seconds.
async fn heard(state: &ApiState) {
    if let Err(error) = state.context.directory.refresh().await {
        tracing::debug!("endpoints could not be read anew: {error}");
    }
}

/// The interval of an endpoint's rate, in milliseconds; without one that which a rate has unless another is named.
fn interval_ms(endpoint: &Endpoint) -> u64 {
    let interval = endpoint.rate.map_or(Rate::INTERVAL, |rate| rate.interval);
    u64::try_from(interval.as_millis()).unwrap_or(u64::MAX)
}

/// The endpoint with these changes, or everything that is wrong with them.
fn changed(mut endpoint: Endpoint, body: EndpointBody) -> Result<Endpoint, Problem> {
    let mut faults = Vec::new();
    let mut fault = |field, detail: String| faults.push(Fault { field, detail });
    // One that stands in the table already hinders no other change.
    if let Some(url) = body.url {
        if let Err(why) = delivery::check_url(&url) {
            fault("url", format!("can't be used: {why}"));
        }
        endpoint.url = url;
    }
    if let Some(ms) = body.timeout_ms {
        if !(1..=TIMEOUT_MAX_MS).contains(&ms) {
            fault("timeout_ms", format!("must be from 1 to {TIMEOUT_MAX_MS}"));
        }
        endpoint.timeout = Duration::from_millis(ms);
    }
    if let Some(most) = body.in_flight_max {
        if !(1..=IN_FLIGHT_MAX).contains(&most) {
            fault("in_flight_max", format!("must be from 1 to {IN_FLIGHT_MAX}"));
        }
        endpoint.in_flight_max = most;
    }
    let interval_ms = body.rate_interval_ms.unwrap_or_else(|| interval_ms(&endpoint));
    if body.rate_interval_ms.is_some() && !RATE_INTERVAL_MS.contains(&interval_ms) {
        let (least, most) = (RATE_INTERVAL_MS.start(), RATE_INTERVAL_MS.end());
        fault("rate_interval_ms", format!("must be from {least} to {most}"));
    }
    let count = body.rate_count.map_or(endpoint.rate.map_or(0, |rate| rate.count), |count| count as usize);
    if body.rate_count.is_some_and(|count| count > RATE_COUNT_MAX) {
        fault("rate_count", format!("must be at most {RATE_COUNT_MAX}"));
    }
    let interval = Duration::from_millis(interval_ms);
    endpoint.rate = Some(Rate { count, interval }).filter(|rate| rate.count > 0);
    if let Some(statuses) = body.final_statuses {
        if statuses.len() > FINAL_STATUSES_MAX || !statuses.iter().all(|s| (300..=599).contains(s)) {
            fault("final_statuses", format!("must be at most {FINAL_STATUSES_MAX} numbers from 300 to 599"));
        }
        endpoint.final_statuses = statuses;
    }
    if let Some(secret) = body.secret {
        endpoint.secret = Some(secret).filter(|secret| !secret.is_empty());
        if let Some(Err(why)) = endpoint.secret.as_deref().map(delivery::check_secret) {
            fault("secret", why);
        }
    }
    endpoint.enabled = body.enabled.unwrap_or(endpoint.enabled);
    if faults.is_empty() { Ok(endpoint) } else { Err(Problem::endpoint_faults(faults)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Somebody may have written it into the table.
    #[test]
    fn a_password_in_a_url_is_not_shown_and_hinders_no_other_change() {
        for (url, shown) in [
            ("http://user:planted@host:81/hook", "http://(hidden)@host:81/hook"),
            ("https://planted@host/", "https://(hidden)@host/"),
            ("http://user:pla/planted@host/", "http://(hidden)"),
            ("planted:planted@host", "(hidden)"),
            ("https://example.org/@user/hook?a=b@c", "https://example.org/@user/hook?a=b@c"),
            ("localhost:3000", "localhost:3000"),
        ] {
            let endpoint = Endpoint::new("old", url);
            assert_eq!(EndpointView::from(&endpoint).url, shown);
            let change = EndpointBody { enabled: Some(false), ..EndpointBody::default() };
            let changed = changed(endpoint, change).unwrap();
            assert_eq!((changed.url.as_str(), changed.enabled), (url, false));
        }
    }
}
