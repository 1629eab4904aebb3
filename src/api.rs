//! The HTTP API: routes, and the OpenAPI document that is generated from their types.

mod document;
mod endpoints;
mod explain;
mod guard;
mod messages;
mod metrics;
mod operate;
mod problem;
mod search;
mod status;

use std::collections::HashMap;
use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::DefaultBodyLimit;
use axum::http::header::CONTENT_TYPE;
use axum::response::{Html, IntoResponse};
use axum::routing::get;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::net::TcpListener;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tower_http::catch_panic::CatchPanicLayer;
use utoipa::{Modify, OpenApi};
use utoipa_axum::router::{OpenApiRouter, UtoipaMethodRouterExt};
use utoipa_axum::routes;
use utoipa_swagger_ui::SwaggerUi;

use crate::intake::Intake;
use crate::service::Context;
use crate::shortage::Shortage;

pub use guard::{Access, Guard};
pub use messages::SendMessage;
use metrics::Survey;
pub use problem::errors_page;
use problem::{Code, Problem};

/// Bytes of a request's body.
const BODY_MAX: usize = 2 << 20;
/// Bytes of a batch call's body.
const BATCH_BODY_MAX: usize = 64 << 20;
/// Connections at once, however many files may be open.
pub const CONNECTIONS: usize = 4_096;
/// How long nothing is accepted after an accept failed: others must end first.
const PAUSE: Duration = Duration::from_millis(100);
/// About how many bytes a request's head may have; a longer one is answered 431.
const HEAD_MAX: usize = 64 << 10;
/// How long a client may take over a request's head.
const HEAD: Duration = Duration::from_secs(10);
/// How long a whole call may take, the arrival of its body with it: longer than the store's own bounds,
/// so that only a client that sends slowly meets it.
const CALL: Duration = Duration::from_secs(60);
/// How long a stop waits for requests under way.
const DRAIN: Duration = Duration::from_secs(10);

/// What the calls need.
#[derive(Clone)]
pub struct ApiState {
    context: Context,
    intake: Intake,
    guard: Guard,
    survey: Survey,
}

impl ApiState {
    /// The state of an API beside these parts, behind this guard. `tells_all`: its metrics tell of the whole
    /// installation as well as of this process.
    pub fn new(context: &Context, intake: Intake, guard: Guard, tells_all: bool) -> ApiState {
        ApiState { context: context.clone(), intake, guard, survey: Survey::new(tells_all) }
    }
}

#[derive(OpenApi)]
#[openapi(
    info(
        title = "AMS",
        description = "The automatic message system: an INSERT is a send. Errors are `application/problem+json` \
                       with a stable `code`.",
        license(name = "Apache-2.0", identifier = "Apache-2.0"),
    ),
    tags(
        (name = "messages", description = "Send messages and see what became of them"),
        (name = "endpoints", description = "Where messages go"),
        (name = "system", description = "How the system is"),
    )
)]
struct Document;

fn documented() -> OpenApiRouter<ApiState> {
    let mut router = routes_of_the_document();
    document::Keys.modify(router.get_openapi_mut());
    router
}

fn routes_of_the_document() -> OpenApiRouter<ApiState> {
    OpenApiRouter::with_openapi(Document::openapi())
        .routes(routes!(messages::send))
        .routes(routes!(messages::send_batch).layer(DefaultBodyLimit::max(BATCH_BODY_MAX)))
        .routes(routes!(search::list))
        .routes(routes!(search::dead_reasons))
        .routes(routes!(operate::redrive_many))
        .routes(routes!(operate::cancel_many))
        .routes(routes!(messages::show))
        .routes(routes!(messages::attempts))
        .routes(routes!(messages::response))
        .routes(routes!(operate::cancel))
        .routes(routes!(operate::redrive))
        .routes(routes!(operate::operation))
        .routes(routes!(endpoints::list))
        .routes(routes!(endpoints::create))
        .routes(routes!(endpoints::show))
        .routes(routes!(endpoints::change))
        .routes(routes!(endpoints::delete))
        .routes(routes!(operate::producer))
        .routes(routes!(operate::pause))
        .routes(routes!(operate::resume))
        .routes(routes!(status::status))
        .routes(routes!(status::livez))
        .routes(routes!(status::readyz))
        .routes(routes!(metrics::metrics))
}

/// The OpenAPI document, as JSON.
pub fn openapi() -> String {
    let document = documented().split_for_parts().1;
    // A document of maps, lists and texts always serializes.
    document.to_pretty_json().unwrap_or_default()
}

/// The whole API.
pub fn router(state: ApiState) -> Router {
    let (router, document) = documented().split_for_parts();
    router
        .route("/", get(front_page))
        .merge(SwaggerUi::new("/swagger").url("/openapi.json", document))
        .fallback(|| async { Problem::new(Code::NotFound, "no such path; GET / names what is here") })
        .method_not_allowed_fallback(|| async {
            Problem::new(Code::MethodNotAllowed, "this path has other methods")
        })
        .layer(DefaultBodyLimit::max(BODY_MAX))
        .layer(axum::middleware::from_fn_with_state(state.guard.clone(), guard::guard))
        .layer(axum::middleware::from_fn(|request, next| in_time(CALL, request, next)))
        .layer(CatchPanicLayer::custom(|_| Problem::internal("a handler panicked").into_response()))
        .with_state(state)
}

/// Health and metrics, for services other than the API.
pub fn health_router(state: ApiState) -> Router {
    Router::new()
        .route("/livez", get(status::livez))
        .route("/readyz", get(status::readyz))
        .route("/metrics", get(metrics::metrics))
        .fallback(|| async { Problem::new(Code::NotFound, "here are /livez, /readyz and /metrics") })
        .method_not_allowed_fallback(|| async {
            Problem::new(Code::MethodNotAllowed, "this path has other methods")
        })
        .with_state(state)
}

/// Ends a call that takes longer than `bound`.
async fn in_time(
    bound: Duration,
    request: axum::extract::Request,
    next: axum::middleware::Next,
) -> axum::response::Response {
    let too_slow = |_| Problem::new(Code::TooSlow, "send the body faster, or try again").into_response();
    tokio::time::timeout(bound, next.run(request)).await.unwrap_or_else(too_slow)
}

async fn front_page() -> Html<&'static str> {
    Html(
        "<!doctype html><html lang=en><meta charset=utf-8><title>AMS</title><link rel=icon href=data:,>\
         <style>body{font:16px/1.6 system-ui;margin:4rem auto;max-width:40rem;padding:0 1rem}</style>\
         <h1>AMS, the automatic message system</h1><p>An <code>INSERT</code> is a send.</p>\
         <ul><li><a href=/swagger/index.html>Swagger UI</a>: try the API\
         <li><a href=/v1/status>Status</a>: services, counts, lag, health\
         <li><a href=/metrics>Metrics</a> for Prometheus\
         <li><a href=/openapi.json>OpenAPI document</a>\
         <li><a href=/readyz>Readiness</a></ul></html>",
    )
}

/// Serves `router` on at most so many `connections` until `stop`, then lets requests under way end.
pub async fn serve(
    listener: TcpListener,
    router: Router,
    context: Context,
    connections: usize,
    stop: CancellationToken,
) {
    let places = Arc::new(Semaphore::new(connections));
    loop {
        let place = tokio::select! {
            () = stop.cancelled() => break,
            place = Arc::clone(&places).acquire_owned() => place,
        };
        let stream = tokio::select! {
            () = stop.cancelled() => break,
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => stream,
                Err(error) => {
                    not_accepted(&error, &context);
                    // The stop is seen again above.
                    let _ = tokio::time::timeout(PAUSE, stop.cancelled()).await;
                    continue;
                }
            },
        };
        // The log says when a shortage is over, also in a process that has no other timer for it.
        context.metrics.shortages(context.clock.instant());
        // A connection without it only answers later; it still answers.
        let _ = stream.set_nodelay(true);
        let (router, stop) = (router.clone(), stop.clone());
        tokio::spawn(async move {
            let _place = place;
            converse(stream, router, stop).await;
        });
    }
    let all = u32::try_from(connections).unwrap_or(u32::MAX);
    // What has not ended by then is cut off.
    let _ = tokio::time::timeout(DRAIN, places.acquire_many(all)).await;
}

/// Says why no connection could be accepted: what this process is short of, or that a client went away meanwhile.
fn not_accepted(error: &std::io::Error, context: &Context) {
    match Shortage::in_error(error) {
        Some(shortage) => context.metrics.put_off(&shortage, context.clock.reading()),
        None => tracing::debug!("a connection could not be accepted: {error}"),
    }
}

async fn converse(stream: tokio::net::TcpStream, router: Router, stop: CancellationToken) {
    let service = hyper::service::service_fn(move |request: hyper::Request<hyper::body::Incoming>| {
        let mut router = router.clone();
        async move {
            let response = tower_service(&mut router, request).await;
            Ok::<_, Infallible>(response)
        }
    });
    let connection = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD)
        .max_buf_size(HEAD_MAX)
        .serve_connection(TokioIo::new(stream), service);
    tokio::pin!(connection);
    let ended = tokio::select! {
        ended = connection.as_mut() => ended,
        () = stop.cancelled() => {
            connection.as_mut().graceful_shutdown();
            connection.await
        }
    };
    if let Err(error) = ended {
        tracing::debug!("a connection ended early: {error}");
    }
}

async fn tower_service(
    router: &mut Router,
    request: hyper::Request<hyper::body::Incoming>,
) -> axum::response::Response {
    use axum::body::Body;
    use tower_service::Service;
    match router.call(request.map(Body::new)).await {
        Ok(response) => response,
        Err(never) => match never {},
    }
}

/// A text answer of a type of its own.
fn typed(content_type: &'static str, body: String) -> impl IntoResponse {
    ([(CONTENT_TYPE, content_type)], body)
}

/// The endpoints' names as they are known, asked anew when one is missing.
async fn endpoint_exists(state: &ApiState, names: &[&str]) -> HashMap<String, bool> {
    let known = |name: &str| state.context.directory.snapshot().endpoints.contains_key(name);
    if !names.iter().all(|name| known(name))
        && let Err(error) = state.context.directory.refresh().await
    {
        tracing::debug!("endpoints could not be looked up: {error}");
    }
    names.iter().map(|name| ((*name).to_owned(), known(name))).collect()
}

#[cfg(test)]
mod tests;
