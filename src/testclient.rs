//! The simulated external message service: accepts any POST, says what it saw, and misbehaves as told.
//!
//! It is also the counting receiver of tests and of the demo: see [`TestClientOptions::sink`].

mod report;

use std::fmt::Write as _;
use std::pin::pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::header::{ALLOW, CONTENT_TYPE, HeaderValue, RETRY_AFTER};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use crate::clock::{Clock, Timestamp};
use crate::service::Backoff;

/// A larger request is answered 413.
const REQUEST_MAX: usize = 16 * 1024 * 1024;

/// How long answers under way may take once a stop is asked for.
const DRAIN: Duration = Duration::from_secs(1);

/// How long nothing is accepted after an accept failed, as it does when the process has no more files.
const PAUSE: Duration = Duration::from_millis(50);

/// How the test client behaves.
#[derive(Clone)]
pub struct TestClientOptions {
    /// Share of requests that it fails, 0 to 1.
    pub error_rate: f64,
    /// What it answers those with.
    pub status: u16,
    /// Wait before each answer.
    pub latency: Duration,
    /// Share of requests that never get an answer, 0 to 1.
    pub hang: f64,
    /// What failures ask for with `Retry-After`, rounded up to seconds.
    pub retry_after: Option<Duration>,
    /// Prints nothing.
    pub quiet: bool,
    /// Prints in colours.
    pub colour: bool,
    /// Is told of every request once it has arrived whole, before it is answered.
    pub sink: Option<Sink>,
    /// Tells when a request arrived.
    pub clock: Clock,
}

/// Who is told of every request.
pub type Sink = Arc<dyn Fn(Seen) + Send + Sync>;

impl Default for TestClientOptions {
    fn default() -> TestClientOptions {
        TestClientOptions {
            error_rate: 0.0,
            status: 500,
            latency: Duration::ZERO,
            hang: 0.0,
            retry_after: None,
            quiet: false,
            colour: false,
            sink: None,
            clock: Clock::system(),
        }
    }
}

impl TestClientOptions {
    /// Checks what a type can't.
    ///
    /// # Errors
    /// One sentence that names the option, its value and the mend.
    pub fn check(&self) -> Result<(), String> {
        for (name, share) in [("error_rate", self.error_rate), ("hang", self.hang)] {
            if !(0.0..=1.0).contains(&share) {
                return Err(format!("{name} is {share}, which is no share; give a number from 0 to 1"));
            }
        }
        if !(200..=599).contains(&self.status) {
            return Err(format!(
                "status is {}, which can't be answered; give one from 200 to 599",
                self.status
            ));
        }
        Ok(())
    }
}

/// One request that arrived.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Seen {
    /// The message's number: of the standard envelope, else of the `webhook-id`; 0 when neither has one.
    pub id: i64,
    /// The header; empty when there is none.
    pub webhook_id: String,
    /// `ams-attempt`; 0 when there is none.
    pub attempt: i32,
    /// Of the standard envelope; empty when there is none.
    pub recipient: String,
    /// What it is answered with; 0 when it never is.
    pub status: u16,
    /// When it had arrived.
    pub at: Timestamp,
}

/// What the test client has done, told at its end.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TestClientSummary {
    /// Requests answered with a 2xx.
    pub accepted: u64,
    /// Requests answered with anything else.
    pub failed: u64,
    /// Requests never answered.
    pub hung: u64,
}

/// Ends a connection without an answer.
#[derive(Debug, thiserror::Error)]
#[error("stopped before the answer")]
struct Stopped;

/// What all connections share.
struct Service {
    options: TestClientOptions,
    stop: CancellationToken,
    accepted: AtomicU64,
    failed: AtomicU64,
    hung: AtomicU64,
}

/// Answers on `listener` until `stop`. Options that [`TestClientOptions::check`] refuses count as the
/// nearest that it takes.
pub async fn run(
    listener: TcpListener,
    options: TestClientOptions,
    stop: CancellationToken,
) -> TestClientSummary {
    let service = Arc::new(Service {
        options,
        stop,
        accepted: AtomicU64::new(0),
        failed: AtomicU64::new(0),
        hung: AtomicU64::new(0),
    });
    let mut connections = JoinSet::new();
    let mut backoff = Backoff::new("connections to the test client");
    loop {
        tokio::select! {
            biased;
            () = service.stop.cancelled() => break,
            Some(_) = connections.join_next() => {}
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => {
                    backoff.succeeded();
                    connections.spawn(serve(stream, Arc::clone(&service)));
                }
                Err(error) => {
                    // The backoff says it once; a bounded pause is enough.
                    backoff.failed(&error);
                    let _ = tokio::time::timeout(PAUSE, service.stop.cancelled()).await;
                }
            },
        }
    }
    drop(listener);
    // What takes longer is cut off: whoever asked for latency or a hang expects no less.
    let _ = tokio::time::timeout(DRAIN, async { while connections.join_next().await.is_some() {} }).await;
    TestClientSummary {
        accepted: service.accepted.load(Ordering::Relaxed),
        failed: service.failed.load(Ordering::Relaxed),
        hung: service.hung.load(Ordering::Relaxed),
    }
}

async fn serve(stream: TcpStream, service: Arc<Service>) {
    // Only slower without it.
    let _ = stream.set_nodelay(true);
    let stop = service.stop.clone();
    let answer = service_fn(move |request| {
        let service = Arc::clone(&service);
        async move { service.answer(request).await }
    });
    let mut connection = pin!(http1::Builder::new().serve_connection(TokioIo::new(stream), answer));
    // How a connection ends is the other side's business.
    tokio::select! {
        biased;
        _ = connection.as_mut() => {}
        () = stop.cancelled() => {
            connection.as_mut().graceful_shutdown();
            let _ = connection.await;
        }
    }
}

impl Service {
    async fn answer(&self, request: Request<Incoming>) -> Result<Response<Full<Bytes>>, Stopped> {
        if request.method() != Method::POST {
            let mut response =
                json(StatusCode::METHOD_NOT_ALLOWED, r#"{"message":"Only POST is answered"}"#.into());
            response.headers_mut().insert(ALLOW, HeaderValue::from_static("POST"));
            return Ok(response);
        }
        let (head, body) = request.into_parts();
        let Ok(body) = Limited::new(body, REQUEST_MAX).collect().await else {
            let text = r#"{"message":"The request is too large or broke off"}"#;
            return Ok(json(StatusCode::PAYLOAD_TOO_LARGE, text.into()));
        };
        let status = self.decide();
        if !self.options.quiet || self.options.sink.is_some() {
            let at = self.options.clock.now();
            let seen =
                report::seen(&head.headers, &body.to_bytes(), status.map_or(0, |status| status.as_u16()), at);
            if !self.options.quiet {
                report::print(&seen, self.options.colour);
            }
            if let Some(sink) = &self.options.sink {
                sink(seen);
            }
        }
        let Some(status) = status else {
            self.hung.fetch_add(1, Ordering::Relaxed);
            // The connection drops this wait when the other side goes.
            self.stop.cancelled().await;
            return Err(Stopped);
        };
        if !self.options.latency.is_zero() {
            tokio::time::sleep(self.options.latency).await;
        }
        let counter = if status.is_success() { &self.accepted } else { &self.failed };
        counter.fetch_add(1, Ordering::Relaxed);
        Ok(self.response(status))
    }

    /// What to answer; `None`: nothing, ever.
    fn decide(&self) -> Option<StatusCode> {
        // The plain case asks for no random number.
        let chance = |share: f64| share > 0.0 && fastrand::f64() < share;
        if chance(self.options.hang) {
            return None;
        }
        if chance(self.options.error_rate) {
            let wanted = StatusCode::from_u16(self.options.status.clamp(200, 599));
            return Some(wanted.unwrap_or(StatusCode::INTERNAL_SERVER_ERROR));
        }
        Some(StatusCode::OK)
    }

    fn response(&self, status: StatusCode) -> Response<Full<Bytes>> {
        let mut body = String::with_capacity(80);
        let message_id = uuid::Builder::from_random_bytes(fastrand::u128(..).to_ne_bytes()).into_uuid();
        write_answer(&mut body, status, message_id);
        let mut response = json(status, body);
        if let Some(wait) = self.options.retry_after
            && !status.is_success()
        {
            let seconds = wait.as_secs() + u64::from(wait.subsec_nanos() > 0);
            response.headers_mut().insert(RETRY_AFTER, HeaderValue::from(seconds));
        }
        response
    }
}

fn write_answer(body: &mut String, status: StatusCode, message_id: Uuid) {
    // Writing to a string can't fail.
    let _ = if status.is_success() {
        write!(body, r#"{{"message":"Accepted","messageId":"{message_id}"}}"#)
    } else {
        body.write_str(r#"{"message":"Failed on purpose"}"#)
    };
}

fn json(status: StatusCode, body: String) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::new(Bytes::from(body)));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

#[cfg(test)]
mod tests;
