//! How fast messages get in: single posts to the API against the same kind of server that stores nothing, and batches
//! against bare inserts of the same rows.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use axum::routing::post;
use axum::{Json, Router};
use tokio::net::{TcpListener, TcpStream};
use tokio_util::sync::CancellationToken;

use super::floor::http::Client;
use super::measure::Spread;
use super::receiver::{Receiver, free_port};
use super::stack::{Stack, endpoint};
use super::testbed::Testbed;
use super::writer::{Rows, Writer};
use super::{BenchOptions, failed, note};
use crate::app::{self, AppError, Result};
use crate::clock::Clock;

/// Connections that post single messages, and those that post batches.
const SINGLES: usize = 64;
const BATCHES: usize = 4;
/// Messages in a batch.
const BATCH: usize = 1_000;
/// How long a server may take to listen.
const LISTENS: Duration = Duration::from_secs(20);

/// What was measured. Rates are medians over the rounds, in messages a second.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Report {
    /// `embedded` or `full`.
    pub stack: &'static str,
    pub messages: usize,
    pub payload_bytes: usize,
    pub rounds: usize,
    /// Single posts over 64 connections.
    pub singles_per_s: f64,
    /// The same to a server that stores nothing.
    pub stores_nothing_per_s: f64,
    pub singles_ratio: f64,
    /// Batches of 1,000 over 4 connections.
    pub batches_per_s: f64,
    /// Inserts of 1,000 rows by SQL, over as many connections.
    pub inserts_per_s: f64,
    pub batches_ratio: f64,
    /// Lowest and highest of figures named here.
    pub spread: BTreeMap<&'static str, [f64; 2]>,
}

/// Measures all in turn. No service but the API runs.
///
/// # Errors
/// When a server can't be started or does not accept.
pub(super) async fn run(testbed: &Testbed, receiver: &Receiver, options: &BenchOptions) -> Result<Report> {
    let (port, sink_port) =
        (free_port(receiver.address().port() + 1).await?, free_port(receiver.address().port() + 2).await?);
    let mut stack = Stack::set_up(testbed, "ingest", &[endpoint("default", &receiver.url("/"))]).await?;
    stack.start_service("api", &[("PORT", port.to_string())])?;
    let sink = Sink::start(sink_port)?;
    let (api, nothing) = (local(port), local(sink_port));
    for address in [api, nothing] {
        listens(address).await?;
    }
    let batches = (options.messages / BATCH).max(BATCHES);
    let mut rates: BTreeMap<&'static str, Vec<f64>> = BTreeMap::new();
    for round in 1..=options.rounds {
        note(&format!("round {round} of {}", options.rounds));
        let mut keep = |name, count: usize, took: Duration| {
            rates.entry(name).or_default().push(count as f64 / took.as_secs_f64());
        };
        keep("stores_nothing_per_s", options.messages, singles(nothing, options).await?);
        keep("singles_per_s", options.messages, singles(api, options).await?);
        keep("inserts_per_s", batches * BATCH, inserts(&stack, options, batches).await?);
        keep("batches_per_s", batches * BATCH, post_batches(api, options, batches).await?);
    }
    drop(sink);
    stack.tear_down().await?;
    let spread = |name| Spread::of(rates.get(name).into_iter().flatten().copied());
    let [singles, nothing, batches, inserts] =
        ["singles_per_s", "stores_nothing_per_s", "batches_per_s", "inserts_per_s"].map(spread);
    Ok(Report {
        stack: testbed.kind(),
        messages: options.messages,
        payload_bytes: options.payload_bytes,
        rounds: options.rounds,
        singles_per_s: singles.median,
        stores_nothing_per_s: nothing.median,
        singles_ratio: singles.median / nothing.median,
        batches_per_s: batches.median,
        inserts_per_s: inserts.median,
        batches_ratio: batches.median / inserts.median,
        spread: rates
            .iter()
            .map(|(name, rates)| (*name, Spread::of(rates.iter().copied()).range()))
            .collect(),
    })
}

fn local(port: u16) -> SocketAddr {
    SocketAddr::from(([127, 0, 0, 1], port))
}

async fn listens(address: SocketAddr) -> Result<()> {
    let clock = Clock::system();
    let watch = clock.stopwatch();
    while TcpStream::connect(address).await.is_err() {
        if watch.elapsed() > LISTENS {
            return Err(AppError(format!("nobody listens on {address} after {LISTENS:?}")));
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    Ok(())
}

async fn singles(address: SocketAddr, options: &BenchOptions) -> Result<Duration> {
    let body = message(options.payload_bytes);
    let client = Client { address, connections: SINGLES, count: options.messages };
    client.run(move |_, request| write_post(request, address, "/v1/messages", &body)).await
}

async fn post_batches(address: SocketAddr, options: &BenchOptions, count: usize) -> Result<Duration> {
    let messages = vec![message(options.payload_bytes); BATCH];
    let body = format!(r#"{{"messages":[{}]}}"#, messages.join(","));
    let client = Client { address, connections: BATCHES, count };
    client.run(move |_, request| write_post(request, address, "/v1/messages/batch", &body)).await
}

/// Inserts as many rows by SQL, over as many connections. SQLite has one writer at a time.
async fn inserts(stack: &Stack<'_>, options: &BenchOptions, batches: usize) -> Result<Duration> {
    let mut writers = Vec::new();
    if let Some(scratch) = stack.scratch() {
        for _ in 0..BATCHES {
            writers.push(Writer::postgres(scratch).await?);
        }
    }
    let writers: Vec<&Writer> =
        if writers.is_empty() { vec![stack.writer()] } else { writers.iter().collect() };
    let watch = stack.clock().stopwatch();
    let each = batches.div_ceil(writers.len());
    let all = writers.iter().map(|writer| async move {
        for _ in 0..each {
            writer.insert(Rows { count: BATCH, ..options.rows() }).await?;
        }
        Ok(())
    });
    futures_util::future::join_all(all).await.into_iter().collect::<Result<Vec<()>>>()?;
    Ok(watch.elapsed().mul_f64(batches as f64 / (each * writers.len()) as f64))
}

/// A message as the API takes it.
fn message(payload_bytes: usize) -> String {
    format!(r#"{{"recipient":"+905551111111","content":"{}"}}"#, "x".repeat(payload_bytes))
}

fn write_post(request: &mut Vec<u8>, to: SocketAddr, path: &str, body: &str) {
    let length = body.len();
    let head = format!(
        "POST {path} HTTP/1.1\r\nhost: {to}\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n"
    );
    request.extend_from_slice(head.as_bytes());
    request.extend_from_slice(body.as_bytes());
}

/// The process that stores nothing.
struct Sink(Child);

impl Sink {
    fn start(port: u16) -> Result<Sink> {
        let program =
            std::env::current_exe().map_err(|error| failed("our own program is not found")(&error))?;
        let mut command = Command::new(program);
        command.args(["bench-sink", "--port", &port.to_string()]).stdout(Stdio::null());
        command
            .spawn()
            .map(Sink)
            .map_err(|error| failed("the server that stores nothing can't be started")(&error))
    }
}

impl Drop for Sink {
    fn drop(&mut self) {
        // It may be gone already, which is as good.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Takes messages as the API does, with the same library, reads them and forgets them. Until `stop`.
///
/// # Errors
/// When the port can't be listened on.
pub async fn serve_sink(port: u16, stop: CancellationToken) -> Result<()> {
    #[derive(serde::Deserialize)]
    struct Taken {
        recipient: String,
        content: String,
    }
    #[derive(serde::Serialize)]
    struct Told {
        id: usize,
        status: &'static str,
        recipient: String,
    }
    let take = post(|Json(taken): Json<Taken>| async move {
        let told = Told { id: taken.content.len(), status: "pending", recipient: taken.recipient };
        (axum::http::StatusCode::ACCEPTED, Json(told))
    });
    let listener: TcpListener = app::listen("127.0.0.1", port, "--port").await?;
    let served = axum::serve(listener, Router::new().route("/v1/messages", take));
    let ended = served.with_graceful_shutdown(async move { stop.cancelled().await }).await;
    ended.map_err(|error| failed("the server that stores nothing failed")(&error))
}

impl Report {
    /// The report for a person.
    pub fn text(&self) -> String {
        let Report { stack, messages, payload_bytes, rounds, .. } = self;
        let mut text = format!(
            "{stack} stack, {messages} messages of {payload_bytes} bytes, median of {rounds} rounds\n"
        );
        let mut pair = |what: &str, (of, than): (f64, f64), ratio: f64| {
            text += &format!("{what}: {of:.0}/s against {than:.0}/s; ratio {ratio:.2}\n");
        };
        pair(
            "single posts, and a server that stores nothing",
            (self.singles_per_s, self.stores_nothing_per_s),
            self.singles_ratio,
        );
        pair(
            "batches of 1,000, and inserts by SQL",
            (self.batches_per_s, self.inserts_per_s),
            self.batches_ratio,
        );
        text
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_server_that_stores_nothing_takes_what_the_api_takes() {
        let port = free_port(21_090).await.unwrap();
        let stop = CancellationToken::new();
        let serving = tokio::spawn(serve_sink(port, stop.clone()));
        listens(local(port)).await.unwrap();
        let options = BenchOptions { messages: 10, ..BenchOptions::default() };
        singles(local(port), &options).await.unwrap();
        let refused = post_batches(local(port), &options, 1).await.unwrap_err();
        assert!(refused.to_string().contains("404"), "{refused}");
        stop.cancel();
        serving.await.unwrap().unwrap();
    }
}
