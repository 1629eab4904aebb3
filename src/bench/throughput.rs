//! Floor and system in turn: messages a second, and CPU time a message by process, of both.

use std::collections::BTreeMap;

use super::drain::{Drained, drain};
use super::floor::{self, Floor};
use super::measure::{Latency, Spread, medians};
use super::receiver::Receiver;
use super::stack::{Stack, endpoint};
use super::steady::{Phase, steady};
use super::testbed::Testbed;
use super::writer::Rows;
use super::{BenchOptions, note};
use crate::app::Result;

/// Floors that differ by more than this were measured on a machine that was busy with something else.
const FLOORS_DIFFER: f64 = 0.10;
/// Messages of the floor at most: its cost does not depend on their number.
const FLOOR_MESSAGES: usize = 200_000;

/// What was measured. Figures are medians over the rounds.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Report {
    /// `embedded` or `full`.
    pub stack: &'static str,
    pub messages: usize,
    pub payload_bytes: usize,
    pub rounds: usize,
    /// From the first arrival to the last record.
    pub delivered_per_s: f64,
    /// What the floor's CPU time would allow on all processors.
    pub limit_per_s: f64,
    /// Delivered divided by limit.
    pub ratio: f64,
    /// The floor's CPU time divided by the system's; `None` when the floors differ too much to tell.
    pub floor_ratio: Option<f64>,
    /// Lowest and highest of figures named here.
    pub spread: BTreeMap<&'static str, [f64; 2]>,
    /// From commit to arrival, at `rate` messages a second, in the last round.
    pub latency_ms: Latency,
    pub rate: usize,
    /// Messages that never arrived, over all rounds.
    pub lost: usize,
    /// Arrivals beyond the first of each message, over all rounds.
    pub duplicates: usize,
    pub cpu_us_per_message: BTreeMap<String, f64>,
    pub floor_us_per_message: BTreeMap<String, f64>,
    /// The floor by stage, over all processes.
    pub floor_stages_us: BTreeMap<String, f64>,
    pub sql_statements_per_message: Option<f64>,
    pub memory_mb: BTreeMap<String, f64>,
}

/// Measures floor and system in turn.
///
/// # Errors
/// When a part can't be started or reached, or messages are not recorded.
pub(super) async fn run(testbed: &Testbed, receiver: &Receiver, options: &BenchOptions) -> Result<Report> {
    let (mut floors, mut drains, mut last) = (Vec::new(), Vec::new(), Phase::default());
    for round in 1..=options.rounds {
        note(&format!("round {round} of {}: floor", options.rounds));
        let count = options.messages.min(FLOOR_MESSAGES);
        floors.push(floor::measure(testbed, receiver, count, options.payload_bytes).await?);
        note(&format!("round {round} of {}: system", options.rounds));
        let endpoints = [endpoint("default", &receiver.url("/"))];
        let mut stack = Stack::set_up(testbed, &format!("throughput{round}"), &endpoints).await?;
        stack.writer().insert(Rows { count: options.messages, ..options.rows() }).await?;
        drains.push(drain(&mut stack, receiver, options.messages).await?);
        if round == options.rounds {
            note(&format!("{} messages a second for {:?}", options.rate, options.steady));
            last = steady(&stack, receiver, options).await?;
        }
        stack.tear_down().await?;
    }
    Ok(report(testbed.kind(), options, &floors, &drains, &last))
}

fn report(
    stack: &'static str,
    options: &BenchOptions,
    floors: &[Floor],
    drains: &[Drained],
    last: &Phase,
) -> Report {
    let cores = std::thread::available_parallelism().map_or(1.0, |cores| cores.get() as f64);
    let (floor, system) =
        (Spread::of(floors.iter().map(Floor::us)), Spread::of(drains.iter().map(Drained::us)));
    let delivered = Spread::of(drains.iter().map(|drained| drained.per_s));
    let limit_per_s = cores * 1e6 / floor.median;
    let statements: Option<Vec<f64>> = drains.iter().map(|drained| drained.statements).collect();
    Report {
        stack,
        messages: options.messages,
        payload_bytes: options.payload_bytes,
        rounds: options.rounds,
        delivered_per_s: delivered.median,
        limit_per_s,
        ratio: delivered.median / limit_per_s,
        floor_ratio: floor.is_within(FLOORS_DIFFER).then(|| floor.median / system.median),
        spread: BTreeMap::from([
            ("delivered_per_s", delivered.range()),
            ("cpu_us_per_message", system.range()),
            ("floor_us_per_message", floor.range()),
        ]),
        latency_ms: last.latency,
        rate: options.rate,
        lost: drains.iter().map(|drained| drained.lost).sum::<usize>() + last.lost,
        duplicates: drains.iter().map(|drained| drained.duplicates).sum::<usize>() + last.duplicates,
        cpu_us_per_message: medians(drains.iter().map(|drained| &drained.cpu)),
        floor_us_per_message: medians(floors.iter().map(|floor| &floor.processes)),
        floor_stages_us: medians(floors.iter().map(|floor| &floor.stages)),
        sql_statements_per_message: statements.map(|all| Spread::of(all).median),
        memory_mb: medians(drains.iter().map(|drained| &drained.memory)),
    }
}

impl Report {
    /// The report for a person.
    pub fn text(&self) -> String {
        let Report { stack, messages, payload_bytes, rounds, .. } = self;
        let range = |name| self.spread.get(name).copied().unwrap_or_default();
        let [low, high] = range("delivered_per_s");
        let sum = |by_process: &BTreeMap<String, f64>| by_process.values().sum::<f64>();
        let mut lines = vec![
            format!("{stack} stack, {messages} messages of {payload_bytes} bytes, median of {rounds} rounds"),
            format!("delivered {:.0}/s ({low:.0} to {high:.0}), to the last record", self.delivered_per_s),
            format!("floor {:.0}/s; delivered is {:.2} of it", self.limit_per_s, self.ratio),
        ];
        let [low, high] = range("floor_us_per_message");
        lines.push(match self.floor_ratio {
            Some(ratio) => format!("floor ratio {ratio:.2}: CPU time of the floor divided by the system's"),
            None => format!(
                "no floor ratio: the floors differ too much ({low:.1} to {high:.1} µs); the machine is busy"
            ),
        });
        let Latency { p50, p99, max } = self.latency_ms;
        lines.push(format!(
            "commit to arrival at {}/s: p50 {p50:.1} ms, p99 {p99:.1} ms, max {max:.1} ms",
            self.rate
        ));
        lines.push(format!("lost {}, duplicates {}", self.lost, self.duplicates));
        if let Some(statements) = self.sql_statements_per_message {
            lines.push(format!("SQL statements per message: {statements:.4}"));
        }
        lines.push(format!("CPU per message: {:.1} µs", sum(&self.cpu_us_per_message)));
        for (name, us) in &self.cpu_us_per_message {
            let memory = self.memory_mb.get(name).copied().unwrap_or_default();
            lines.push(format!("  {name:<18} {us:6.1} µs   {memory:.0} MB"));
        }
        lines.push(format!("CPU per message of the floor: {:.1} µs", sum(&self.floor_us_per_message)));
        for (name, us) in self.floor_us_per_message.iter().chain(&self.floor_stages_us) {
            lines.push(format!("  {name:<18} {us:6.1} µs"));
        }
        lines.iter().map(|line| format!("{line}\n")).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn floor(us: f64) -> Floor {
        let one = |name: &str| BTreeMap::from([(name.to_owned(), us)]);
        Floor { stages: one("claim"), processes: one("client") }
    }

    fn drained(per_s: f64, us: f64) -> Drained {
        Drained { per_s, cpu: BTreeMap::from([("up".to_owned(), us)]), ..Drained::default() }
    }

    #[test]
    fn the_ratio_is_the_floors_time_by_the_systems() {
        let drains = [drained(10.0, 40.0), drained(30.0, 20.0), drained(20.0, 50.0)];
        let told = |floors: [f64; 3]| {
            report("full", &BenchOptions::default(), &floors.map(floor), &drains, &Phase::default())
        };
        let report = told([20.0, 19.0, 20.5]);
        assert_eq!((report.floor_ratio, report.delivered_per_s), (Some(0.5), 20.0));
        assert_eq!(report.spread["cpu_us_per_message"], [20.0, 50.0]);
        assert!(report.text().contains("floor ratio 0.50"), "{}", report.text());
        let report = told([20.0, 22.5, 20.0]);
        assert_eq!(report.floor_ratio, None);
        assert!(report.text().contains("no floor ratio"), "{}", report.text());
    }
}
