//! What a janitor asks of the store: recovery, the reconciliation, and the retention.

use std::time::Duration;

use async_trait::async_trait;

use super::{InstanceId, LeaseId, Result};
use crate::clock::Timestamp;
use crate::message::MessageId;

/// What a recovery looks at.
#[derive(Clone, Copy, Debug)]
pub struct Recovery<'a> {
    pub now: Timestamp,
    /// No lease ends later that was renewed by now.
    pub latest: Timestamp,
    /// Instances of [`Recovered::ahead`] that have not renewed their lease for as long as one lasts, by the caller's
    /// own watch. They are dead, too, although their lease has not run out.
    pub silent: &'a [InstanceId],
}

/// What a recovery found.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Recovered {
    /// How many instances were dead.
    pub instances: u64,
    /// Leases that have no living owner, to be issued again; at most 1,000 of them.
    pub leases: Vec<LeaseId>,
    /// Instances whose lease ends later than any can, and when they renewed it last: their clock was ahead.
    pub ahead: Vec<(InstanceId, Timestamp)>,
}

/// One call of [`Upkeep::remove_old`].
#[derive(Clone, Copy, Debug)]
pub struct Removal {
    /// What became final before this time goes.
    pub before: Timestamp,
    /// Messages are removed one by one only when they became final before this time, because a partition that is old as
    /// a whole costs nothing to remove.
    pub rows_before: Timestamp,
    /// Where the last call ended.
    pub from: MessageId,
    /// Rows looked at, at most.
    pub limit: usize,
}

/// What a removal came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Removed {
    /// Whole partitions, with their deliveries and attempts.
    pub partitions: u64,
    pub messages: u64,
    /// Where the next call goes on; `None`: it begins anew.
    pub next: Option<MessageId>,
}

/// What a piece of the reconciliation came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reconciled {
    /// Messages looked at.
    pub checked: u64,
    /// Those that had no place: they wait now, due at once.
    pub repaired: u64,
    /// Whether all messages have been looked at since the reconciliation began at the first one.
    pub finished: bool,
    /// Whether feeds were made anew and messages before them may still lack a place: then the next piece has no time to lose.
    pub urgent: bool,
}

/// How the reconciliation stands.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Reconciliation {
    /// Everything up to this message has been looked at in this round.
    pub at: MessageId,
    /// Messages looked at, and those that had no place, since the store was made.
    pub checked: u64,
    pub repaired: u64,
    /// When the last round ended.
    pub finished_at: Option<Timestamp>,
    /// When the feeds were last made anew, because the database had come from another server.
    pub feeds_made_at: Option<Timestamp>,
}

/// The janitor's part.
#[async_trait]
pub trait Upkeep: Send + Sync {
    /// Takes away the instances whose lease has run out or that are silent, and lists what they, and instances
    /// that have retired, had begun and not recorded.
    async fn recover(&self, recovery: &Recovery<'_>) -> Result<Recovered>;

    /// Removes final messages that are old, with their deliveries and attempts; and what else is as old: idempotency keys,
    /// statistics, and bulk changes that have ended.
    async fn remove_old(&self, removal: &Removal) -> Result<Removed>;

    /// Makes the feeds anew when what they remember means nothing here: the database has come from another server, whose
    /// transactions had other numbers. Whether it did. Messages that have no place are then found by the reconciliation.
    async fn check_feeds(&self, now: Timestamp) -> Result<bool>;

    /// Looks at the next `limit` messages that the feeds have passed: each must have a place. One that has none comes to
    /// wait, due at once.
    async fn reconcile(&self, now: Timestamp, limit: usize) -> Result<Reconciled>;

    /// How the reconciliation stands.
    async fn reconciliation(&self) -> Result<Reconciliation>;

    /// Brings what waits for another attempt forward by `by`, and nothing to before `now`: the clock that its time was
    /// written by has been set back by so much. What its sender has scheduled stays. Does nothing where the store has a
    /// clock of its own, which no process sets. The one call that may not be repeated: retries would come too early.
    async fn bring_forward(&self, by: Duration, now: Timestamp) -> Result<()>;

    /// Makes partitions ahead of the ids in use. Does nothing where tables are not partitioned.
    async fn make_partitions(&self) -> Result<()>;
}
