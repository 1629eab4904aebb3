//! Millions of messages that wait when the services start: how soon the first arrives, and whether they slow down the
//! others.

use std::collections::BTreeMap;

use super::drain::{Drained, drain};
use super::measure::{Spread, medians};
use super::receiver::Receiver;
use super::stack::{Stack, endpoint};
use super::testbed::Testbed;
use super::writer::Rows;
use super::{BenchOptions, note};
use crate::app::Result;

/// Messages over which the rate is measured, and all that wait in the comparison.
const SAMPLE: usize = 200_000;

/// What was measured. Figures are medians over the rounds.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Report {
    /// `embedded` or `full`.
    pub stack: &'static str,
    /// Messages that wait.
    pub messages: usize,
    /// Messages over which the rate is measured.
    pub sample: usize,
    pub rounds: usize,
    /// From the start of the services to the first arrival.
    pub first_delivery_s: f64,
    /// Messages a second while all of them wait.
    pub delivered_per_s: f64,
    /// Messages a second when no more than the sample wait.
    pub alone_per_s: f64,
    /// The first divided by the second.
    pub ratio: f64,
    /// Lowest and highest of figures named here.
    pub spread: BTreeMap<&'static str, [f64; 2]>,
    /// The largest resident memory of each process, in MB.
    pub memory_mb: BTreeMap<String, f64>,
    pub duplicates: usize,
}

/// Measures both in turn.
///
/// # Errors
/// When a part can't be started or reached, or messages are not recorded.
pub(super) async fn run(testbed: &Testbed, receiver: &Receiver, options: &BenchOptions) -> Result<Report> {
    let sample = SAMPLE.min(options.messages);
    let (mut all, mut alone) = (Vec::new(), Vec::new());
    for round in 1..=options.rounds {
        note(&format!("round {round} of {}: {sample} messages wait", options.rounds));
        alone.push(one(testbed, receiver, options, (&format!("sample{round}"), sample, sample)).await?);
        note(&format!("round {round} of {}: {} messages wait", options.rounds, options.messages));
        all.push(
            one(testbed, receiver, options, (&format!("backlog{round}"), options.messages, sample)).await?,
        );
    }
    let rate = |drains: &[Drained]| Spread::of(drains.iter().map(|drained| drained.per_s));
    let (delivered, small) = (rate(&all), rate(&alone));
    let first = Spread::of(all.iter().map(|drained| drained.first_after.as_secs_f64()));
    Ok(Report {
        stack: testbed.kind(),
        messages: options.messages,
        sample,
        rounds: options.rounds,
        first_delivery_s: first.median,
        delivered_per_s: delivered.median,
        alone_per_s: small.median,
        ratio: delivered.median / small.median,
        spread: BTreeMap::from([
            ("first_delivery_s", first.range()),
            ("delivered_per_s", delivered.range()),
            ("alone_per_s", small.range()),
        ]),
        memory_mb: medians(all.iter().map(|drained| &drained.memory)),
        duplicates: all.iter().chain(&alone).map(|drained| drained.duplicates).sum(),
    })
}

/// Lets `waiting` messages wait and delivers the first `sample` of them.
async fn one(
    testbed: &Testbed,
    receiver: &Receiver,
    options: &BenchOptions,
    (name, waiting, sample): (&str, usize, usize),
) -> Result<Drained> {
    let mut stack = Stack::set_up(testbed, name, &[endpoint("default", &receiver.url("/"))]).await?;
    stack.writer().insert(Rows { count: waiting, ..options.rows() }).await?;
    let drained = drain(&mut stack, receiver, sample).await?;
    stack.tear_down().await?;
    Ok(drained)
}

impl Report {
    /// The report for a person.
    pub fn text(&self) -> String {
        let Report { stack, messages, sample, rounds, .. } = self;
        let mut text = format!("{stack} stack, median of {rounds} rounds\n");
        text += &format!(
            "{messages} messages wait: the first arrives {:.2} s after the start\n",
            self.first_delivery_s
        );
        text += &format!("delivered {:.0}/s (the first {sample})\n", self.delivered_per_s);
        text +=
            &format!("when no more than {sample} wait: {:.0}/s; ratio {:.2}\n", self.alone_per_s, self.ratio);
        for (name, mb) in &self.memory_mb {
            text += &format!("  {name:<18} {mb:6.0} MB\n");
        }
        text
    }
}
