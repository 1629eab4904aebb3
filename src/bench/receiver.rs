//! The benchmark's receiver: a process of its own that answers at once, counts what arrives, and
//! says how old it was.

use std::convert::Infallible;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::{Method, Request, Response};
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use super::stack::Stack;
use super::{Latency, failed};
use crate::app::{self, Result};
use crate::clock::{Clock, Timestamp};

/// Below the ephemeral range, so that no client can take the port first.
const PORTS: std::ops::Range<u16> = 21_000..21_100;
/// Without a single new arrival for this long, the rest is believed lost.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long nothing is accepted after an accept failed.
const PAUSE: Duration = Duration::from_millis(50);

/// The receiver's process, seen from the benchmark.
pub(super) struct Receiver {
    child: Child,
    port: u16,
    clock: Clock,
}

/// What has arrived since the last reset.
#[derive(Clone, Debug, Default, serde::Serialize, serde::Deserialize)]
pub(super) struct Arrived {
    pub(super) arrivals: usize,
    pub(super) distinct: usize,
    first_us: i64,
    last_us: i64,
    /// Ages in µs, sorted; at most a million are kept.
    #[serde(default)]
    ages_us: Vec<i64>,
}

impl Arrived {
    pub(super) fn per_s(&self) -> f64 {
        let took = Duration::from_micros(u64::try_from(self.last_us - self.first_us).unwrap_or(0).max(1));
        self.arrivals as f64 / took.as_secs_f64()
    }

    pub(super) fn latency(&self) -> Latency {
        let at = |share: f64| {
            let index = (self.ages_us.len().saturating_sub(1)) as f64 * share;
            self.ages_us.get(index as usize).map_or(0.0, |us| *us as f64 / 1000.0)
        };
        Latency { p50: at(0.5), p99: at(0.99), max: at(1.0) }
    }
}

impl Receiver {
    pub(super) async fn start(clock: &Clock) -> Result<Receiver> {
        let port = free_port().await?;
        let program =
            std::env::current_exe().map_err(|error| failed("our own program is not found")(&error))?;
        let child = Command::new(program)
            .args(["bench-receiver", "--port", &port.to_string()])
            .stdout(Stdio::null())
            .spawn()
            .map_err(|error| failed("the receiver can't be started")(&error))?;
        let receiver = Receiver { child, port, clock: clock.clone() };
        let watch = clock.stopwatch();
        while receiver.ask(Method::DELETE, "/").await.is_err() {
            if watch.elapsed() > Duration::from_secs(10) {
                return Err(failed("the receiver does not answer")(&format!("port {port}")));
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        Ok(receiver)
    }

    pub(super) fn url(&self) -> String {
        format!("http://127.0.0.1:{}/", self.port)
    }

    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Forgets what has arrived.
    pub(super) async fn reset(&self) -> Result<()> {
        self.ask(Method::DELETE, "/").await.map(drop)
    }

    /// Waits until `wanted` distinct messages have arrived, or nothing has for a while.
    pub(super) async fn wait_for(&self, wanted: usize, stack: &Stack) -> Result<Arrived> {
        let (mut last, mut watch) = (0, self.clock.stopwatch());
        loop {
            let seen: Arrived = self.parsed("/counts").await?;
            if seen.arrivals != last {
                (last, watch) = (seen.arrivals, self.clock.stopwatch());
            }
            if seen.distinct >= wanted || watch.elapsed() > PATIENCE {
                return self.parsed("/ages").await;
            }
            stack.assert_running()?;
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    pub(super) fn stop(&mut self) {
        // It may be gone already, which is as good.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }

    async fn parsed(&self, path: &str) -> Result<Arrived> {
        let body = self.ask(Method::GET, path).await?;
        serde_json::from_slice(&body).map_err(|error| failed("the receiver answers nonsense")(&error))
    }

    async fn ask(&self, method: Method, path: &str) -> Result<Bytes> {
        let wrong = failed("the receiver can't be asked");
        let stream =
            tokio::net::TcpStream::connect(("127.0.0.1", self.port)).await.map_err(|error| wrong(&error))?;
        let (mut sender, connection) = hyper::client::conn::http1::handshake(TokioIo::new(stream))
            .await
            .map_err(|error| wrong(&error))?;
        tokio::spawn(connection);
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header("host", "localhost")
            .body(Full::<Bytes>::default())
            .map_err(|error| wrong(&error))?;
        let response = sender.send_request(request).await.map_err(|error| wrong(&error))?;
        response
            .into_body()
            .collect()
            .await
            .map(http_body_util::Collected::to_bytes)
            .map_err(|error| wrong(&error))
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.stop();
    }
}

async fn free_port() -> Result<u16> {
    for port in PORTS {
        if TcpListener::bind(("127.0.0.1", port)).await.is_ok() {
            return Ok(port);
        }
    }
    Err(failed("no port is free")(&format!("{PORTS:?}")))
}

/// What the receiver's process keeps.
#[derive(Default)]
struct Counts {
    arrivals: usize,
    ids: std::collections::HashSet<i64>,
    first_us: i64,
    last_us: i64,
    ages_us: Vec<i64>,
}

/// The receiver's process: `POST` counts, `GET /counts` and `GET /ages` tell, `DELETE` forgets.
///
/// # Errors
/// When the port can't be listened on.
pub async fn serve(port: u16, stop: CancellationToken) -> Result<()> {
    let listener = app::listen("127.0.0.1", port, "--port").await?;
    let clock = Clock::system();
    // One short lock for each request, on a single thread: never waited for.
    let counts: Arc<Mutex<Counts>> = Arc::default();
    loop {
        let stream = tokio::select! {
            () = stop.cancelled() => return Ok(()),
            accepted = listener.accept() => match accepted {
                Ok((stream, _)) => stream,
                // Out of files, most likely: others must end first.
                Err(_) => {
                    let _ = tokio::time::timeout(PAUSE, stop.cancelled()).await;
                    continue;
                }
            },
        };
        // A connection without it only answers later; it still answers.
        let _ = stream.set_nodelay(true);
        let (counts, clock) = (Arc::clone(&counts), clock.clone());
        let service =
            hyper::service::service_fn(move |request| answer(Arc::clone(&counts), clock.clone(), request));
        tokio::spawn(
            hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service),
        );
    }
}

async fn answer(
    counts: Arc<Mutex<Counts>>,
    clock: Clock,
    request: Request<Incoming>,
) -> std::result::Result<Response<Full<Bytes>>, Infallible> {
    #[derive(serde::Deserialize)]
    struct Body {
        id: i64,
        created_at: Timestamp,
    }
    let (method, with_ages) = (request.method().clone(), request.uri().path() == "/ages");
    let body =
        request.into_body().collect().await.map(http_body_util::Collected::to_bytes).unwrap_or_default();
    let mut counts = counts.lock().unwrap_or_else(PoisonError::into_inner);
    let answer = match method {
        Method::POST => {
            if let Ok(body) = serde_json::from_slice::<Body>(&body) {
                let now = clock.now();
                counts.arrivals += 1;
                counts.last_us = now.as_micros();
                if counts.arrivals == 1 {
                    counts.first_us = now.as_micros();
                }
                if counts.ids.insert(body.id) && counts.ages_us.len() < 1_000_000 {
                    counts.ages_us.push(now.as_micros() - body.created_at.as_micros());
                }
            }
            Bytes::from_static(
                br#"{"message":"Accepted","messageId":"00000000-0000-4000-8000-000000000000"}"#,
            )
        }
        Method::GET => told(&mut counts, with_ages),
        _ => {
            *counts = Counts::default();
            Bytes::new()
        }
    };
    Ok(Response::new(Full::new(answer)))
}

fn told(counts: &mut Counts, with_ages: bool) -> Bytes {
    let ages_us = if with_ages {
        counts.ages_us.sort_unstable();
        counts.ages_us.clone()
    } else {
        Vec::new()
    };
    let arrived = Arrived {
        arrivals: counts.arrivals,
        distinct: counts.ids.len(),
        first_us: counts.first_us,
        last_us: counts.last_us,
        ages_us,
    };
    // Numbers always serialize.
    serde_json::to_vec(&arrived).map(Bytes::from).unwrap_or_default()
}
