//! A healthy endpoint beside others that hang: its throughput and its latency, against those without the others.

use std::collections::BTreeMap;

use super::measure::{Latency, Spread};
use super::receiver::{HANG, Receiver};
use super::stack::{Stack, endpoint};
use super::steady::at_rate;
use super::testbed::Testbed;
use super::writer::Rows;
use super::{BenchOptions, note};
use crate::app::Result;
use crate::store::Endpoint;

/// The healthy endpoint's path.
const HEALTHY: &str = "/healthy";
/// Rows of the healthy endpoint that are written before others get theirs.
const TURN: usize = 500;

/// What was measured. Figures are medians over the rounds.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Report {
    /// `embedded` or `full`.
    pub stack: &'static str,
    /// Messages of the healthy endpoint.
    pub messages: usize,
    /// Endpoints that hang, and messages of each.
    pub hanging: usize,
    pub each: usize,
    pub rounds: usize,
    /// Messages a second of the healthy endpoint, alone and beside the others, from its first to its last arrival.
    pub alone_per_s: f64,
    pub beside_per_s: f64,
    /// The second divided by the first.
    pub throughput_ratio: f64,
    /// From commit to arrival at `rate` messages a second, alone and beside as many of those that hang.
    pub rate: usize,
    pub alone_latency_ms: Latency,
    pub beside_latency_ms: Latency,
    /// The second p99 divided by the first.
    pub p99_ratio: f64,
    /// Lowest and highest of figures named here.
    pub spread: BTreeMap<&'static str, [f64; 2]>,
    /// Healthy messages that never arrived.
    pub lost: usize,
    pub duplicates: usize,
}

/// What one system came to.
struct One {
    per_s: f64,
    latency: Latency,
    lost: usize,
    duplicates: usize,
}

/// Measures both in turn.
///
/// # Errors
/// When a part can't be started or reached.
pub(super) async fn run(testbed: &Testbed, receiver: &Receiver, options: &BenchOptions) -> Result<Report> {
    let (mut alone, mut beside) = (Vec::new(), Vec::new());
    for round in 1..=options.rounds {
        note(&format!("round {round} of {}: the healthy endpoint alone", options.rounds));
        alone.push(one(testbed, receiver, options, (&format!("alone{round}"), 0)).await?);
        note(&format!("round {round} of {}: beside {} that hang", options.rounds, options.hanging));
        beside.push(one(testbed, receiver, options, (&format!("beside{round}"), options.hanging)).await?);
    }
    let rate = |all: &[One]| Spread::of(all.iter().map(|one| one.per_s));
    let latency = |all: &[One]| Latency::median(&all.iter().map(|one| one.latency).collect::<Vec<_>>());
    let (alone_rate, beside_rate) = (rate(&alone), rate(&beside));
    let (alone_latency_ms, beside_latency_ms) = (latency(&alone), latency(&beside));
    Ok(Report {
        stack: testbed.kind(),
        messages: options.messages,
        hanging: options.hanging,
        each: options.each,
        rounds: options.rounds,
        alone_per_s: alone_rate.median,
        beside_per_s: beside_rate.median,
        throughput_ratio: beside_rate.median / alone_rate.median,
        rate: options.rate,
        alone_latency_ms,
        beside_latency_ms,
        p99_ratio: beside_latency_ms.p99 / alone_latency_ms.p99,
        spread: BTreeMap::from([("alone_per_s", alone_rate.range()), ("beside_per_s", beside_rate.range())]),
        lost: alone.iter().chain(&beside).map(|one| one.lost).sum(),
        duplicates: alone.iter().chain(&beside).map(|one| one.duplicates).sum(),
    })
}

/// The healthy endpoint beside so many that hang.
async fn one(
    testbed: &Testbed,
    receiver: &Receiver,
    options: &BenchOptions,
    (name, hanging): (&str, usize),
) -> Result<One> {
    receiver.reset().await?;
    let names: Vec<String> = (0..hanging).map(|i| format!("hangs-{i}")).collect();
    let healthy = endpoint("healthy", &receiver.url(HEALTHY));
    let hang = |name: &String| endpoint(name, &receiver.url(&format!("{HANG}/{name}")));
    let endpoints: Vec<Endpoint> = std::iter::once(healthy).chain(names.iter().map(hang)).collect();
    let mut stack = Stack::set_up(testbed, name, &endpoints).await?;
    write(&stack, options, &names).await?;
    stack.start()?;
    let drained = receiver.wait_for(HEALTHY, options.messages, &stack).await?;
    let took = (drained.last_us - drained.first_us).max(1) as f64 / 1e6;
    let (per_s, mut lost, mut duplicates) =
        (drained.distinct as f64 / took, options.messages - drained.distinct, drained.repeats());

    receiver.reset().await?;
    let inserted = stream(&stack, options, &names).await?;
    let arrived = receiver.wait_for(HEALTHY, inserted, &stack).await?;
    lost += inserted.saturating_sub(arrived.distinct);
    duplicates += arrived.repeats();
    stack.tear_down().await?;
    Ok(One { per_s, latency: arrived.latency(), lost, duplicates })
}

/// Writes the backlog: the healthy endpoint's messages, and among them those of the others.
async fn write(stack: &Stack<'_>, options: &BenchOptions, names: &[String]) -> Result<()> {
    let turns = options.messages.div_ceil(TURN);
    for turn in 0..turns {
        let count = TURN.min(options.messages - turn * TURN);
        stack.writer().insert(Rows { count, endpoint: "healthy", ..options.rows() }).await?;
        // Many come one after the other, each with all that it has; a few have a part in each turn.
        let (of, count) = if names.len() < turns {
            (names, share(options.each, turn, turns).len())
        } else {
            (&names[share(names.len(), turn, turns)], options.each)
        };
        for name in of {
            stack.writer().insert(Rows { count, endpoint: name, ..options.rows() }).await?;
        }
    }
    Ok(())
}

/// The part of `all` that a turn has.
fn share(all: usize, turn: usize, turns: usize) -> std::ops::Range<usize> {
    all * turn / turns..all * (turn + 1) / turns
}

/// Inserts at an even rate for the healthy endpoint, and as much for the others in turn; how many for the first.
async fn stream(stack: &Stack<'_>, options: &BenchOptions, names: &[String]) -> Result<usize> {
    let mut others = names.iter().cycle();
    let insert = async |count| {
        stack.writer().insert(Rows { count, endpoint: "healthy", ..options.rows() }).await?;
        match others.next() {
            Some(name) => stack.writer().insert(Rows { count, endpoint: name, ..options.rows() }).await,
            None => Ok(()),
        }
    };
    at_rate(stack, options, insert).await
}

impl Report {
    /// The report for a person.
    pub fn text(&self) -> String {
        let Report { stack, messages, hanging, each, rounds, rate, .. } = self;
        let mut text = format!("{stack} stack, {messages} messages, median of {rounds} rounds\n");
        text += &format!("alone:  {:.0}/s\n", self.alone_per_s);
        text += &format!(
            "beside {hanging} endpoints that hang, {each} messages each: {:.0}/s\n",
            self.beside_per_s
        );
        text += &format!("throughput ratio {:.2}\n", self.throughput_ratio);
        let (alone, beside) = (self.alone_latency_ms, self.beside_latency_ms);
        text += &format!(
            "commit to arrival at {rate}/s, alone: p50 {:.1} ms, p99 {:.1} ms\n",
            alone.p50, alone.p99
        );
        text += &format!(
            "  and beside: p50 {:.1} ms, p99 {:.1} ms; p99 ratio {:.2}\n",
            beside.p50, beside.p99, self.p99_ratio
        );
        text + &format!("lost {}, duplicates {}\n", self.lost, self.duplicates)
    }
}

#[cfg(test)]
mod tests {
    use super::share;

    #[test]
    fn turns_share_all_of_it() {
        for (all, turns) in [(0, 3), (2, 7), (300, 100), (2_000, 7)] {
            let parts: Vec<usize> = (0..turns).flat_map(|turn| share(all, turn, turns)).collect();
            assert_eq!(parts, (0..all).collect::<Vec<_>>());
        }
    }
}
