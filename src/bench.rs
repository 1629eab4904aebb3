//! `ams bench`: what this machine delivers, against a floor measured in the same run.
//!
//! The system runs as it does in production: every service a process of its own (one `ams up` when nothing is
//! configured), and the receiver another. The *floor* is the same job done by the parts alone, by code that shares
//! nothing with the engine. Floor and system run in turn, several times, because machines are noisy; figures are
//! medians, told with their spread.
//!
//! It is a developer's tool. It works on databases, topics and files of its own and removes them.

mod backlog;
mod cpu;
mod drain;
mod floor;
mod growth;
mod ingest;
mod isolation;
mod latency;
mod measure;
mod receiver;
mod stack;
mod steady;
mod testbed;
mod throughput;
mod writer;

use std::fmt::Display;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use crate::app::{AppError, Result};
use crate::clock::Clock;
use crate::config::Config;

use receiver::Receiver;
use testbed::Testbed;
use writer::Rows;

pub use ingest::serve_sink;
pub use receiver::serve as serve_receiver;

/// What is measured.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Scenario {
    /// Floor and system in turn on a backlog, and the latency at a steady rate.
    #[default]
    Throughput,
    /// Latency at a steady rate and at rest, and what the system costs at rest.
    Latency,
    /// Posts to the API against a server that stores nothing, and batches against inserts.
    Ingest,
    /// A backlog of millions: how soon the first arrives, and whether it slows down the others.
    Backlog,
    /// A store with many finished messages, an open transaction, dropped partitions.
    Growth,
    /// A healthy endpoint beside others that hang.
    Isolation,
}

impl Scenario {
    /// All scenarios, by their names.
    pub const ALL: [(&'static str, Scenario); 6] = [
        ("throughput", Scenario::Throughput),
        ("latency", Scenario::Latency),
        ("ingest", Scenario::Ingest),
        ("backlog", Scenario::Backlog),
        ("growth", Scenario::Growth),
        ("isolation", Scenario::Isolation),
    ];
}

/// How to measure.
#[derive(Clone, Debug)]
pub struct BenchOptions {
    /// Messages in a backlog.
    pub messages: usize,
    /// Bytes of each one's content.
    pub payload_bytes: usize,
    /// How often everything is measured; at least 1.
    pub rounds: usize,
    /// Messages a second where a rate is wanted.
    pub rate: usize,
    /// How long such a phase lasts.
    pub steady: Duration,
    /// Messages that are finished before: of `growth`.
    pub finished: usize,
    /// Endpoints that hang: of `isolation`.
    pub hanging: usize,
    /// Messages of each of those.
    pub each: usize,
}

impl Default for BenchOptions {
    fn default() -> BenchOptions {
        BenchOptions {
            messages: 200_000,
            payload_bytes: 300,
            rounds: 3,
            rate: 1_000,
            steady: Duration::from_secs(5),
            finished: 5_000_000,
            hanging: 1,
            each: 1_000,
        }
    }
}

impl BenchOptions {
    /// One message as all are, unless told otherwise.
    fn rows(&self) -> Rows<'_> {
        Rows { count: 1, endpoint: "default", payload: self.payload_bytes }
    }
}

/// What a scenario came to.
#[derive(Clone, Debug, serde::Serialize)]
#[serde(untagged)]
pub enum Report {
    Throughput(throughput::Report),
    Latency(latency::Report),
    Ingest(ingest::Report),
    Backlog(backlog::Report),
    Growth(growth::Report),
    Isolation(isolation::Report),
}

impl Report {
    /// The report for a person.
    pub fn text(&self) -> String {
        match self {
            Report::Throughput(report) => report.text(),
            Report::Latency(report) => report.text(),
            Report::Ingest(report) => report.text(),
            Report::Backlog(report) => report.text(),
            Report::Growth(report) => report.text(),
            Report::Isolation(report) => report.text(),
        }
    }
}

/// Runs a scenario on what `config` names: PostgreSQL and Kafka, and Redis when it is configured, or embedded parts.
/// Ends early at `stop`. What stays behind is said on standard error.
///
/// # Errors
/// When a part can't be started or reached, messages stop arriving, or it was stopped.
pub async fn run(
    config: Config,
    scenario: Scenario,
    options: &BenchOptions,
    stop: &CancellationToken,
) -> Result<Report> {
    let testbed = Testbed::new(&config).await?;
    let mut receiver = Receiver::start(&Clock::system()).await?;
    let measured = stop.run_until_cancelled(measure(scenario, &testbed, &receiver, options)).await;
    receiver.stop();
    if let Err(left) = testbed.clean_up().await {
        // The figures are worth having all the same.
        note(&left.0);
    }
    measured.unwrap_or_else(|| Err(AppError("the benchmark was stopped".to_owned())))
}

async fn measure(
    scenario: Scenario,
    testbed: &Testbed,
    receiver: &Receiver,
    options: &BenchOptions,
) -> Result<Report> {
    match scenario {
        Scenario::Throughput => throughput::run(testbed, receiver, options).await.map(Report::Throughput),
        Scenario::Latency => latency::run(testbed, receiver, options).await.map(Report::Latency),
        Scenario::Ingest => ingest::run(testbed, receiver, options).await.map(Report::Ingest),
        Scenario::Backlog => backlog::run(testbed, receiver, options).await.map(Report::Backlog),
        Scenario::Growth => growth::run(testbed, receiver, options).await.map(Report::Growth),
        Scenario::Isolation => isolation::run(testbed, receiver, options).await.map(Report::Isolation),
    }
}

/// Says how far it is: standard output is for the figures.
fn note(what: &str) {
    eprintln!("{what}");
}

fn failed(what: &str) -> impl Fn(&dyn Display) -> AppError {
    move |error| AppError(format!("{what}: {error}"))
}
