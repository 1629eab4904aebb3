//! `ams bench`: messages a second on this machine, against a limit measured in the same run.
//!
//! The system runs as it does in production: every service a process of its own (one `ams up` when
//! nothing is configured), and the receiver another. First the *limit*: the bare cost of each stage that
//! a message can't do without. Then a *backlog* is drained, and arrivals are counted at the receiver.
//! Then messages come at a steady rate, and the receiver says how old each is when it arrives.

mod cpu;
mod limit;
mod receiver;
mod stack;

use std::collections::BTreeMap;
use std::time::Duration;

use crate::app::{AppError, Result};
use crate::clock::Clock;
use crate::config::Config;
use crate::message::NewMessage;

use cpu::Usage;
use receiver::{Arrived, Receiver};
use stack::Stack;

pub use receiver::serve as serve_receiver;

/// Single rows that are sent at rest.
const REST_ROWS: usize = 40;

/// What to measure.
#[derive(Clone, Debug)]
pub struct BenchOptions {
    /// Messages in the backlog.
    pub messages: usize,
    /// Bytes of each one's content.
    pub payload_bytes: usize,
    /// Messages a second in the latency phase.
    pub rate: usize,
    /// How long that phase lasts.
    pub steady: Duration,
}

/// What was measured.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Report {
    /// `embedded` or `full`.
    pub stack: &'static str,
    pub messages: usize,
    pub payload_bytes: usize,
    pub delivered_per_s: f64,
    pub limit_per_s: f64,
    /// Delivered divided by limit.
    pub ratio: f64,
    /// From commit to arrival, at `rate` messages a second.
    pub latency_ms: Latency,
    pub rate: usize,
    /// From commit to arrival of single rows, four a second, on a system that has nothing else to do.
    pub rest_latency_ms: Latency,
    /// CPU time while nothing is sent, in per cent of one core.
    pub idle_cpu_percent: BTreeMap<String, f64>,
    /// Messages that never arrived, over all phases.
    pub lost: usize,
    /// Arrivals beyond the first of each message.
    pub duplicates: usize,
    pub cpu_us_per_message: BTreeMap<String, f64>,
    pub sql_statements_per_message: Option<f64>,
    /// The largest resident memory of each process while the backlog was drained, in MB.
    pub memory_mb: BTreeMap<String, f64>,
    /// The bare stages behind the limit, in CPU µs a message (embedded: the bare client's rate).
    pub stages: BTreeMap<&'static str, f64>,
}

/// A distribution in three numbers, in milliseconds.
#[derive(Clone, Copy, Debug, Default, serde::Serialize)]
pub struct Latency {
    pub p50: f64,
    pub p99: f64,
    pub max: f64,
}

/// Runs the benchmark on what `config` names.
///
/// # Errors
/// When a part can't be started or reached, or messages stop arriving.
pub async fn run(config: Config, options: &BenchOptions) -> Result<Report> {
    let clock = Clock::system();
    let mut receiver = Receiver::start(&clock).await?;
    let mut stack = Stack::set_up(&config, receiver.url()).await?;
    let limit = limit::measure(&mut stack, &receiver, options).await?;
    receiver.reset().await?;

    eprintln!("filling a backlog of {} messages", options.messages);
    stack.fill(options.messages, options.payload_bytes).await?;
    stack.reset_statements().await?;
    stack.start()?;
    let before = Usage::of(&stack.processes(&receiver));
    let drained = receiver.wait_for(options.messages, &stack).await?;
    stack.settle().await?;
    let after = Usage::of(&stack.processes(&receiver));
    let statements = stack.statements().await?;

    eprintln!("{} messages a second for {:?}", options.rate, options.steady);
    receiver.reset().await?;
    let steady = steady(&clock, &stack, &receiver, options).await?;
    eprintln!("at rest for {:?}, then {REST_ROWS} single rows", options.steady);
    receiver.reset().await?;
    let idle_cpu_percent = idle(&clock, &stack, &receiver, options).await;
    let rest = rest(&stack, &receiver, options).await?;
    let kind = stack.kind();
    stack.tear_down().await?;
    receiver.stop();

    let delivered_per_s = drained.per_s();
    let messages = options.messages as f64;
    Ok(Report {
        stack: kind,
        messages: options.messages,
        payload_bytes: options.payload_bytes,
        delivered_per_s,
        limit_per_s: limit.per_s,
        ratio: delivered_per_s / limit.per_s,
        latency_ms: steady.latency,
        rate: options.rate,
        rest_latency_ms: rest.latency,
        idle_cpu_percent,
        lost: options.messages - drained.distinct + steady.lost + rest.lost,
        duplicates: drained.arrivals - drained.distinct + steady.duplicates + rest.duplicates,
        cpu_us_per_message: after
            .cpu_us_since(&before)
            .into_iter()
            .map(|(k, us)| (k, us / messages))
            .collect(),
        sql_statements_per_message: statements.map(|count| count as f64 / messages),
        memory_mb: after.memory_mb(),
        stages: limit.stages,
    })
}

struct Phase {
    latency: Latency,
    lost: usize,
    duplicates: usize,
}

impl Phase {
    fn of(inserted: usize, arrived: &Arrived) -> Phase {
        Phase {
            latency: arrived.latency(),
            lost: inserted - arrived.distinct,
            duplicates: arrived.arrivals - arrived.distinct,
        }
    }
}

/// Inserts at an even rate, in groups of ten milliseconds, and waits for the last to arrive.
async fn steady(clock: &Clock, stack: &Stack, receiver: &Receiver, options: &BenchOptions) -> Result<Phase> {
    const GROUP: Duration = Duration::from_millis(10);
    let group = (options.rate as f64 * GROUP.as_secs_f64()).ceil() as usize;
    let mut tick =
        tokio::time::interval(GROUP.mul_f64(group as f64 / (options.rate as f64 * GROUP.as_secs_f64())));
    let watch = clock.stopwatch();
    let mut inserted = 0;
    while watch.elapsed() < options.steady {
        tick.tick().await;
        stack.fill(group, options.payload_bytes).await?;
        inserted += group;
    }
    let arrived = receiver.wait_for(inserted, stack).await?;
    Ok(Phase::of(inserted, &arrived))
}

/// CPU time while nothing is sent.
async fn idle(
    clock: &Clock,
    stack: &Stack,
    receiver: &Receiver,
    options: &BenchOptions,
) -> BTreeMap<String, f64> {
    let (watch, before) = (clock.stopwatch(), Usage::of(&stack.processes(receiver)));
    tokio::time::sleep(options.steady).await;
    let (elapsed, after) = (watch.elapsed(), Usage::of(&stack.processes(receiver)));
    let used = after.cpu_us_since(&before).into_iter();
    used.map(|(name, us)| (name, us / elapsed.as_secs_f64() / 10_000.0)).collect()
}

/// Inserts single rows, each after everything has come to rest.
async fn rest(stack: &Stack, receiver: &Receiver, options: &BenchOptions) -> Result<Phase> {
    let mut tick = tokio::time::interval(Duration::from_millis(250));
    for _ in 0..REST_ROWS {
        tick.tick().await;
        stack.fill(1, options.payload_bytes).await?;
    }
    let arrived = receiver.wait_for(REST_ROWS, stack).await?;
    Ok(Phase::of(REST_ROWS, &arrived))
}

fn message(payload_bytes: usize) -> NewMessage {
    NewMessage {
        recipient: "+905551111111".into(),
        content: "x".repeat(payload_bytes),
        ..NewMessage::default()
    }
}

fn failed(what: &str) -> impl Fn(&dyn std::fmt::Display) -> AppError {
    move |error| AppError(format!("{what}: {error}"))
}
