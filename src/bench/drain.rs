//! One drain of a backlog: from the start of the services to the last recorded message.

use std::collections::BTreeMap;
use std::time::Duration;

use super::cpu::Usage;
use super::receiver::Receiver;
use super::stack::Stack;
use crate::app::Result;

/// What a drain came to.
#[derive(Clone, Debug, Default)]
pub(super) struct Drained {
    /// Messages a second, from the first arrival to the last record.
    pub(super) per_s: f64,
    /// From the start of the services to the first arrival.
    pub(super) first_after: Duration,
    /// CPU µs a message, by process.
    pub(super) cpu: BTreeMap<String, f64>,
    /// SQL statements a message, where the server counts them.
    pub(super) statements: Option<f64>,
    /// The largest resident memory of each process, in MB.
    pub(super) memory: BTreeMap<String, f64>,
    pub(super) lost: usize,
    pub(super) duplicates: usize,
}

impl Drained {
    /// CPU µs a message, in all.
    pub(super) fn us(&self) -> f64 {
        self.cpu.values().sum()
    }
}

/// Starts the services and waits until all `count` messages of the backlog are recorded.
///
/// # Errors
/// When a service ends, or messages are not recorded although they have arrived.
pub(super) async fn drain(stack: &mut Stack<'_>, receiver: &Receiver, count: usize) -> Result<Drained> {
    receiver.reset().await?;
    let recorded_before = stack.writer().recorded().await?;
    let statements_before = stack.statements().await?;
    let used_before = Usage::of(&stack.processes(receiver));
    let started = stack.clock().now();
    stack.start()?;
    let arrived = receiver.wait_for("", count, stack).await?;
    let recorded = stack.recorded(recorded_before + arrived.distinct.min(count)).await? - recorded_before;
    let ended = stack.clock().now();
    let after = Usage::of(&stack.processes(receiver));
    let statements = stack.statements().await?;
    let took = Duration::from_micros((ended.as_micros() - arrived.first_us).max(1).unsigned_abs());
    // More than were asked for, where more wait.
    let messages = recorded.max(1) as f64;
    Ok(Drained {
        per_s: messages / took.as_secs_f64(),
        first_after: Duration::from_micros((arrived.first_us - started.as_micros()).max(0).unsigned_abs()),
        cpu: after.cpu_us_since(&used_before).into_iter().map(|(name, us)| (name, us / messages)).collect(),
        statements: statements
            .zip(statements_before)
            .map(|(after, before)| (after - before) as f64 / messages),
        memory: after.memory_mb(),
        lost: count.saturating_sub(arrived.distinct),
        duplicates: arrived.repeats(),
    })
}
