//! A steady stream of messages, and single ones at rest: how old each is when it arrives.

use std::collections::BTreeMap;
use std::time::Duration;

use super::BenchOptions;
use super::cpu::Usage;
use super::measure::Latency;
use super::receiver::{Arrived, Receiver};
use super::stack::Stack;
use super::writer::Rows;
use crate::app::Result;

/// Messages of one statement come together; a program that sends more often than this gains nothing.
const GROUP: Duration = Duration::from_millis(10);
/// Single rows that are sent at rest, and the time between two.
const REST_ROWS: usize = 40;
const REST: Duration = Duration::from_millis(250);

/// What a phase came to.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Phase {
    pub(super) latency: Latency,
    pub(super) lost: usize,
    pub(super) duplicates: usize,
}

impl Phase {
    fn of(inserted: usize, arrived: &Arrived) -> Phase {
        let lost = inserted - arrived.distinct.min(inserted);
        Phase { latency: arrived.latency(), lost, duplicates: arrived.repeats() }
    }
}

/// Inserts at an even rate for the time that the options tell, and waits for the last to arrive.
///
/// # Errors
/// When the store or the receiver can't be reached, or a service ends.
pub(super) async fn steady(stack: &Stack<'_>, receiver: &Receiver, options: &BenchOptions) -> Result<Phase> {
    receiver.reset().await?;
    let insert = async |count| stack.writer().insert(Rows { count, ..options.rows() }).await;
    let inserted = at_rate(stack, options, insert).await?;
    let arrived = receiver.wait_for("", inserted, stack).await?;
    Ok(Phase::of(inserted, &arrived))
}

/// Has `insert` called with a number of messages, at an even rate, for the time that the options tell. Returns how many.
///
/// # Errors
/// Those of `insert`.
pub(super) async fn at_rate(
    stack: &Stack<'_>,
    options: &BenchOptions,
    mut insert: impl AsyncFnMut(usize) -> Result<()>,
) -> Result<usize> {
    let wanted = options.rate as f64 * GROUP.as_secs_f64();
    let group = wanted.ceil();
    let mut tick = tokio::time::interval(GROUP.mul_f64(group / wanted));
    let watch = stack.clock().stopwatch();
    let mut inserted = 0;
    while watch.elapsed() < options.steady {
        tick.tick().await;
        insert(group as usize).await?;
        inserted += group as usize;
    }
    Ok(inserted)
}

/// Inserts single rows, each after everything has come to rest.
///
/// # Errors
/// When the store or the receiver can't be reached, or a service ends.
pub(super) async fn rest(stack: &Stack<'_>, receiver: &Receiver, options: &BenchOptions) -> Result<Phase> {
    receiver.reset().await?;
    let mut tick = tokio::time::interval(REST);
    for _ in 0..REST_ROWS {
        tick.tick().await;
        stack.writer().insert(Rows { count: 1, ..options.rows() }).await?;
    }
    let arrived = receiver.wait_for("", REST_ROWS, stack).await?;
    Ok(Phase::of(REST_ROWS, &arrived))
}

/// CPU time by process while nothing is sent, in per cent of one core.
pub(super) async fn idle(stack: &Stack<'_>, receiver: &Receiver, during: Duration) -> BTreeMap<String, f64> {
    let (watch, before) = (stack.clock().stopwatch(), Usage::of(&stack.processes(receiver)));
    tokio::time::sleep(during).await;
    let (elapsed, after) = (watch.elapsed(), Usage::of(&stack.processes(receiver)));
    let used = after.cpu_us_since(&before).into_iter();
    used.map(|(name, us)| (name, us / elapsed.as_secs_f64() / 10_000.0)).collect()
}
