//! What a consumer asks of the store: to begin deliveries, and to record what their attempts came to.

use std::sync::Arc;

use async_trait::async_trait;

#[cfg(doc)]
use super::Scheduling;
use super::{InstanceId, Mask, Result};
use crate::clock::Timestamp;
use crate::message::{Held, MessageId, Outcome, Verdict};
use crate::ticket::{BatchId, Ticket};

/// A lease's number, chosen at random by the consumer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct LeaseId(pub i64);

impl LeaseId {
    /// A number for a new lease.
    pub fn random() -> LeaseId {
        LeaseId(fastrand::i64(1..))
    }
}

/// Tickets of one batch that a consumer wants to work on.
#[derive(Clone, Debug, PartialEq)]
pub struct Wanted {
    /// The lease that they are to stand in.
    pub lease: LeaseId,
    pub batch: BatchId,
    pub positions: Mask,
}

/// One call of [`Execution::begin`].
#[derive(Clone, Debug)]
pub struct Begin<'a> {
    /// Each batch at most once.
    pub wanted: &'a [Wanted],
    /// Whether this very call was made before and its answer was lost: if it happened after all, the
    /// answer is then what it began.
    pub repeated: bool,
    pub owner: InstanceId,
}

/// What a begin call took of one batch: these deliveries are `processing` now. A ticket that is not among them is
/// stale.
#[derive(Clone, Debug, PartialEq)]
pub struct Begun {
    pub lease: LeaseId,
    pub batch: BatchId,
    /// The first batch that these deliveries were in.
    pub root: BatchId,
    pub positions: Mask,
}

/// What one attempt came to and what was decided.
#[derive(Clone, Debug)]
pub struct Record {
    pub ticket: Arc<Ticket>,
    /// The lane it was made on.
    pub lane: Arc<str>,
    pub lease: LeaseId,
    /// As [`Begun::root`].
    pub root: BatchId,
    /// `None` with [`Verdict::Release`] and [`Verdict::Expired`]: there was no attempt.
    pub outcome: Option<Arc<Outcome>>,
    pub verdict: Verdict,
    /// When that was decided.
    pub judged_at: Timestamp,
}

impl Record {
    /// Attempts made so far, with this one if it was made.
    pub(super) fn attempts(&self) -> i32 {
        self.ticket.attempt - i32::from(self.outcome.is_none())
    }
}

/// One write of records.
#[derive(Clone, Copy, Debug)]
pub struct Records<'a> {
    pub records: &'a [Record],
    pub now: Timestamp,
}

/// A dead message whose record has still to reach the dead-letter lane.
#[derive(Clone, Debug)]
pub struct DeadLetter {
    pub ticket: Ticket,
    pub lane: String,
    pub reason: String,
    pub attempts: i32,
    pub last_status: Option<u16>,
    pub last_error: Option<String>,
    pub dead_at: Timestamp,
}

/// What consumers begin, record and hold, and the dead letters that come of it.
#[async_trait]
pub trait Execution: Send + Sync {
    /// Begins deliveries: those whose bits are still in their batch come into leases. Answers in any order, and
    /// nothing for a batch of which nothing was begun.
    async fn begin(&self, begin: &Begin<'_>) -> Result<Vec<Begun>>;

    /// Writes what attempts came to, and the dead letters with them, in one transaction. Returns the ids whose verdict
    /// was refused: failures of deliveries that no longer stand in their lease. A success is never refused.
    async fn record(&self, records: &Records<'_>) -> Result<Vec<MessageId>>;

    /// Holds deliveries that still stand in their batch on this lane: they are not claimed again until
    /// [`Scheduling::unhold`]. Returns how many those were.
    async fn hold(&self, lane: &str, tickets: &[Ticket], held: Held, now: Timestamp) -> Result<u64>;

    /// Dead letters written before `before` that are not marked as published, oldest first.
    async fn dead_letters(&self, before: Timestamp, limit: usize) -> Result<Vec<DeadLetter>>;

    /// Marks dead letters as published.
    async fn dead_lettered(&self, ids: &[MessageId]) -> Result<()>;
}
