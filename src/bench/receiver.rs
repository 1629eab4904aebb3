//! The benchmark's receiver: a process of its own that answers at once, counts what arrives, and
//! says how old it was. Here as the benchmark sees it; `server` is what that process does.

mod server;

use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::{Method, Request};
use hyper_util::rt::TokioIo;
use tokio::net::TcpListener;

pub use self::server::serve;
use super::failed;
use super::measure::Latency;
use super::stack::Stack;
use crate::app::Result;
use crate::clock::Clock;

/// Below the ephemeral range, so that no client can take the port first.
const PORTS: std::ops::Range<u16> = 21_000..21_100;
/// Messages on paths that begin like this are never answered.
pub(super) const HANG: &str = "/hang";
/// Messages on paths that begin like this are answered after so many milliseconds as follow.
pub(super) const WAIT: &str = "/wait/";
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
    /// When the first and the last came, in µs of the epoch.
    pub(super) first_us: i64,
    pub(super) last_us: i64,
    /// Ages in µs, sorted; at most a million of each path are kept.
    #[serde(default)]
    pub(super) ages_us: Vec<i64>,
}

impl Arrived {
    /// How old they were.
    pub(super) fn latency(&self) -> Latency {
        Latency::of_sorted(&self.ages_us)
    }

    /// Arrivals beyond the first of each message.
    pub(super) fn repeats(&self) -> usize {
        self.arrivals - self.distinct
    }
}

impl Receiver {
    pub(super) async fn start(clock: &Clock) -> Result<Receiver> {
        let port = free_port(PORTS.start).await?;
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

    /// Where messages of `path`, which begins with a slash, are sent to.
    pub(super) fn url(&self, path: &str) -> String {
        format!("http://{}{path}", self.address())
    }

    pub(super) fn address(&self) -> SocketAddr {
        SocketAddr::from(([127, 0, 0, 1], self.port))
    }

    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Forgets what has arrived.
    pub(super) async fn reset(&self) -> Result<()> {
        self.ask(Method::DELETE, "/").await.map(drop)
    }

    /// What has arrived on `path`, or on all when it is empty.
    pub(super) async fn arrived(&self, path: &str) -> Result<Arrived> {
        self.parsed(&format!("/ages{path}")).await
    }

    /// Waits until `wanted` distinct messages have arrived on `path`, or on all when it is empty, or nothing has for a
    /// while.
    pub(super) async fn wait_for(&self, path: &str, wanted: usize, stack: &Stack<'_>) -> Result<Arrived> {
        let (mut last, mut watch) = (0, self.clock.stopwatch());
        loop {
            let seen: Arrived = self.parsed(&format!("/counts{path}")).await?;
            if seen.arrivals != last {
                (last, watch) = (seen.arrivals, self.clock.stopwatch());
            }
            if seen.distinct >= wanted || watch.elapsed() > PATIENCE {
                return self.arrived(path).await;
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

/// The first free port from this one on.
pub(super) async fn free_port(first: u16) -> Result<u16> {
    for port in first..PORTS.end {
        if TcpListener::bind(("127.0.0.1", port)).await.is_ok() {
            return Ok(port);
        }
    }
    Err(failed("no port is free")(&format!("{PORTS:?}")))
}
