//! A store that has grown: whether finished messages, a transaction that stays open, or a partition that is dropped slow
//! down those that come. On the full stack.

use std::collections::BTreeMap;

use super::drain::{Drained, drain};
use super::measure::Spread;
use super::receiver::Receiver;
use super::stack::{Stack, endpoint};
use super::testbed::Testbed;
use super::writer::{Rows, Writer};
use super::{BenchOptions, note};
use crate::app::{AppError, Result};

/// Finished messages that are made by one statement.
const STEP: usize = 500_000;
/// Finished messages are so old: older than the retention that drops them.
const AGE: &str = "interval '40 days'";

/// What was measured. Rates are medians over the rounds, in messages a second.
#[derive(Clone, Debug, serde::Serialize)]
pub struct Report {
    pub stack: &'static str,
    /// Messages that are finished before.
    pub finished: usize,
    /// Messages in each drain.
    pub messages: usize,
    pub rounds: usize,
    /// By what is different: `empty`, `grown`, `open transaction`, `partitions dropped`.
    pub delivered_per_s: BTreeMap<&'static str, f64>,
    pub spread: BTreeMap<&'static str, [f64; 2]>,
    /// Each divided by `empty`.
    pub ratio: BTreeMap<&'static str, f64>,
    /// Partitions of `messages` before and after they were dropped.
    pub partitions: [i64; 2],
    pub lost: usize,
    pub duplicates: usize,
}

/// Measures all in turn.
///
/// # Errors
/// When a part can't be started or reached, or messages are not recorded; embedded, there are no partitions.
pub(super) async fn run(testbed: &Testbed, receiver: &Receiver, options: &BenchOptions) -> Result<Report> {
    if !testbed.is_full() {
        return Err(AppError(
            "`ams bench growth` needs PostgreSQL and Kafka; set DATABASE_URL and KAFKA_BROKERS".to_owned(),
        ));
    }
    let endpoints = [endpoint("default", &receiver.url("/"))];
    let mut empty = Stack::set_up(testbed, "empty", &endpoints).await?;
    let mut grown = Stack::set_up(testbed, "grown", &endpoints).await?;
    note(&format!("writing {} finished messages", options.finished));
    finish(grown.writer(), options).await?;
    grown.set("RETENTION", "0");
    let mut drains: BTreeMap<&'static str, Vec<Drained>> = BTreeMap::new();
    for round in 1..=options.rounds {
        note(&format!("round {round} of {}", options.rounds));
        let mut keep = |name, drained| drains.entry(name).or_default().push(drained);
        keep("empty", one(&mut empty, receiver, options).await?);
        keep("grown", one(&mut grown, receiver, options).await?);
        let open = other(&grown).await?;
        open.run("begin; select pg_current_xact_id()").await?;
        keep("open transaction", one(&mut grown, receiver, options).await?);
        drop(open);
    }
    note("dropping what is old");
    let before = partitions(&grown).await?;
    grown.set("RETENTION", "30d");
    drains.entry("partitions dropped").or_default().push(one(&mut grown, receiver, options).await?);
    let partitions = [before, partitions(&grown).await?];
    empty.tear_down().await?;
    grown.tear_down().await?;
    Ok(report(options, &drains, partitions))
}

fn report(
    options: &BenchOptions,
    drains: &BTreeMap<&'static str, Vec<Drained>>,
    partitions: [i64; 2],
) -> Report {
    let rate =
        |(name, drains): (&&'static str, &Vec<Drained>)| (*name, Spread::of(drains.iter().map(|d| d.per_s)));
    let rates: BTreeMap<&'static str, Spread> = drains.iter().map(rate).collect();
    let empty = rates.get("empty").copied().unwrap_or_default().median;
    let of = |figure: &dyn Fn(&Spread) -> f64| {
        rates.iter().map(|(name, spread)| (*name, figure(spread))).collect()
    };
    Report {
        stack: "full",
        finished: options.finished,
        messages: options.messages,
        rounds: options.rounds,
        delivered_per_s: of(&|spread| spread.median),
        spread: rates.iter().map(|(name, spread)| (*name, spread.range())).collect(),
        ratio: of(&|spread| spread.median / empty),
        partitions,
        lost: drains.values().flatten().map(|drained| drained.lost).sum(),
        duplicates: drains.values().flatten().map(|drained| drained.duplicates).sum(),
    }
}

/// One drain; the services are stopped afterwards.
async fn one(stack: &mut Stack<'_>, receiver: &Receiver, options: &BenchOptions) -> Result<Drained> {
    stack.writer().insert(Rows { count: options.messages, ..options.rows() }).await?;
    let drained = drain(stack, receiver, options.messages).await?;
    stack.stop().await;
    Ok(drained)
}

/// A further connection to the store.
async fn other(stack: &Stack<'_>) -> Result<Writer> {
    match stack.scratch() {
        Some(scratch) => Writer::postgres(scratch).await,
        None => Err(AppError("there is no PostgreSQL here".to_owned())),
    }
}

async fn partitions(stack: &Stack<'_>) -> Result<i64> {
    stack.writer().number("select count(*) from pg_inherits where inhparent = 'messages'::regclass").await
}

/// Writes messages that have been sent long ago, as the system would have left them.
async fn finish(writer: &Writer, options: &BenchOptions) -> Result<()> {
    let mut left = options.finished;
    while left > 0 {
        let count = left.min(STEP);
        // Each call makes one partition, if one is missing.
        while writer.number("select make_partitions()::int::bigint").await? > 0 {}
        writer
            .run(&format!(
                "with m as (insert into messages (recipient, content, created_at) \
                     select '+905551111111', repeat('x', {}), now() - {AGE} from generate_series(1, {count}) returning id) \
                 insert into deliveries (message_id, endpoint_id, status, attempts, lane, finished_at, batch, started_at, \
                     connect_us, head_us, body_us, http_status, address, provider_message_id, answer) \
                 select m.id, e.id, 'sent', 1, 'messages', now() - {AGE}, 1, now() - {AGE}, 10, 200, 10, 200, e.url, \
                     gen_random_uuid()::text, 'Accepted' from m, endpoints e where e.name = 'default'",
                options.payload_bytes
            ))
            .await?;
        left -= count;
    }
    // The feeds have passed them.
    writer.run("update feed set done = pg_current_snapshot(), upto = pg_current_snapshot(), at_tx = null, at_id = null").await?;
    writer.run("analyze messages; analyze deliveries; checkpoint").await
}

impl Report {
    /// The report for a person.
    pub fn text(&self) -> String {
        let Report { finished, messages, rounds, .. } = self;
        let mut text =
            format!("{finished} finished messages, {messages} in each drain, median of {rounds} rounds\n");
        for (name, per_s) in &self.delivered_per_s {
            let [low, high] = self.spread.get(name).copied().unwrap_or_default();
            let ratio = self.ratio.get(name).copied().unwrap_or_default();
            text += &format!("  {name:<20} {per_s:8.0}/s ({low:.0} to {high:.0})   ratio {ratio:.2}\n");
        }
        let [before, after] = self.partitions;
        text += &format!("partitions of messages before and after: {before}, {after}\n");
        text + &format!("lost {}, duplicates {}\n", self.lost, self.duplicates)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_rate_is_compared_with_the_empty_stores() {
        let drained = |per_s| vec![Drained { per_s, lost: 1, ..Drained::default() }];
        let drains = BTreeMap::from([("empty", drained(200.0)), ("grown", drained(150.0))]);
        let report = report(&BenchOptions::default(), &drains, [4, 1]);
        assert_eq!((report.ratio["grown"], report.ratio["empty"], report.lost), (0.75, 1.0, 2));
    }
}
