//! From commit to arrival at a steady rate and at rest, and what the system costs while nothing is sent.

use std::collections::BTreeMap;

use super::measure::{Latency, medians};
use super::receiver::Receiver;
use super::stack::{Stack, endpoint};
use super::steady::{Phase, idle, rest, steady};
use super::testbed::Testbed;
use super::writer::Rows;
use super::{BenchOptions, note};
use crate::app::Result;

/// Messages that go through first: nobody measures a program that has just started.
const WARM: usize = 5_000;

/// What was measured. Figures are medians over the rounds.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Report {
    /// `embedded` or `full`.
    pub stack: &'static str,
    pub rate: usize,
    pub payload_bytes: usize,
    pub rounds: usize,
    /// From commit to arrival, at `rate` messages a second.
    pub latency_ms: Latency,
    /// From commit to arrival of single rows, four a second, on a system that has nothing else to do.
    pub rest_latency_ms: Latency,
    /// CPU time while nothing is sent, in per cent of one core.
    pub idle_cpu_percent: BTreeMap<String, f64>,
    pub lost: usize,
    pub duplicates: usize,
}

/// Measures all rounds on one system.
///
/// # Errors
/// When a part can't be started or reached, or messages stop arriving.
pub(super) async fn run(testbed: &Testbed, receiver: &Receiver, options: &BenchOptions) -> Result<Report> {
    let mut stack = Stack::set_up(testbed, "latency", &[endpoint("default", &receiver.url("/"))]).await?;
    receiver.reset().await?;
    stack.start()?;
    stack.writer().insert(Rows { count: WARM, ..options.rows() }).await?;
    receiver.wait_for("", WARM, &stack).await?;
    stack.recorded(WARM).await?;
    let (mut steadies, mut rests, mut idles) = (Vec::new(), Vec::new(), Vec::new());
    for round in 1..=options.rounds {
        note(&format!("round {round} of {}: {} messages a second, then rest", options.rounds, options.rate));
        steadies.push(steady(&stack, receiver, options).await?);
        idles.push(idle(&stack, receiver, options.steady).await);
        rests.push(rest(&stack, receiver, options).await?);
    }
    stack.tear_down().await?;
    let latencies = |phases: &[Phase]| phases.iter().map(|phase| phase.latency).collect::<Vec<_>>();
    Ok(Report {
        stack: testbed.kind(),
        rate: options.rate,
        payload_bytes: options.payload_bytes,
        rounds: options.rounds,
        latency_ms: Latency::median(&latencies(&steadies)),
        rest_latency_ms: Latency::median(&latencies(&rests)),
        idle_cpu_percent: medians(&idles),
        lost: steadies.iter().chain(&rests).map(|phase| phase.lost).sum(),
        duplicates: steadies.iter().chain(&rests).map(|phase| phase.duplicates).sum(),
    })
}

impl Report {
    /// The report for a person.
    pub fn text(&self) -> String {
        let line = |what: &str, Latency { p50, p99, max }: Latency| {
            format!("commit to arrival {what}: p50 {p50:.1} ms, p99 {p99:.1} ms, max {max:.1} ms\n")
        };
        let mut text = format!("{} stack, median of {} rounds\n", self.stack, self.rounds);
        text += &line(&format!("at {}/s", self.rate), self.latency_ms);
        text += &line("at rest", self.rest_latency_ms);
        text += &format!("lost {}, duplicates {}\n", self.lost, self.duplicates);
        for (name, percent) in &self.idle_cpu_percent {
            text += &format!("  {name:<18} {percent:5.1} % of a core while nothing is sent\n");
        }
        text
    }
}
