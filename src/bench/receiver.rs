//! The benchmark's receiver: a process of its own that answers at once, counts what arrives, and
//! says how old it was. Here as the benchmark sees it; `server` is what that process does.

mod server;

use std::process::{Child, Command, Stdio};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{Method, Request};
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;

pub use self::server::serve;
use super::stack::Stack;
use super::{Latency, failed};
use crate::app::Result;
use crate::clock::Clock;

/// Below the ephemeral range, so that no client can take the port first.
const PORTS: std::ops::Range<u16> = 21_000..21_100;
/// Without a single new arrival for this long, the rest is believed lost.
const PATIENCE: Duration = Duration::from_secs(20);

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
