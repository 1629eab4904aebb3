//! What a producer asks of the store: what is due, claims, batches, and issuing them again.

use async_trait::async_trait;

use super::{InstanceId, LeaseId, Result};
use crate::clock::Timestamp;
use crate::message::{Held, MessageId};
use crate::ticket::{BatchId, Ticket};

/// Deliveries in a batch, at most. A claim of a thousand costs no more per message than a larger one (measured
/// with the prototype: 2,000 save 8 % of the whole), and each mask has as many bits.
pub const BATCH_MAX: usize = 2_048;

/// Bytes of contents and headers in a batch, unless its first message alone has more. A producer and a consumer hold a few
/// batches in memory, so messages of 1 MiB go eight at a time.
pub const BATCH_BYTES: usize = 8 << 20;

/// What a claim looks at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Due<'a> {
    /// Messages that were committed since the last such claim, of one class of priority: each class is read by a
    /// feed of its own, so that an urgent message waits behind no other.
    New(Urgency),
    /// Deliveries that wait on this lane (empty: the fresh lane) for a time that has come by then.
    /// The ticket of one whose time has not come now says when it will.
    Timed { lane: &'a str, by: Timestamp },
}

/// A class of priorities, with a feed of its own.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Urgency {
    /// Above 0.
    Urgent,
    /// 0, the default.
    Normal,
    /// Below 0.
    Bulk,
}

impl Urgency {
    /// All classes, the most urgent first.
    pub const ALL: [Urgency; 3] = [Urgency::Urgent, Urgency::Normal, Urgency::Bulk];

    /// Its number in the table of feeds.
    pub(super) fn number(self) -> i16 {
        match self {
            Urgency::Urgent => 0,
            Urgency::Normal => 1,
            Urgency::Bulk => 2,
        }
    }
}

/// What may be due: see [`Scheduling::due`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DueNow {
    /// Whether there are new messages.
    pub new: bool,
    /// The lanes on which a wait is over by the time asked for, in any order.
    pub lanes: Vec<String>,
}

/// One claim: at most `limit` deliveries come into a new batch for `lane`.
///
/// A message whose time is over ends as `expired`. One that is scheduled, or whose endpoint takes none, comes into
/// `waiting` instead.
#[derive(Clone, Debug)]
pub struct Claim<'a> {
    pub due: Due<'a>,
    /// At most [`BATCH_MAX`].
    pub limit: usize,
    /// The topic the tickets go to.
    pub lane: &'a str,
    /// The number of the new batch.
    pub batch: BatchId,
    /// Endpoints whose new messages are held as [`Held::EndpointBusy`] instead: they would only wait on the lane.
    pub saturated: &'a [String],
    pub owner: InstanceId,
    pub now: Timestamp,
}

/// What a claim took. `tickets` may be empty although `seen` is not: held and expired ones count there.
#[derive(Clone, Debug, Default)]
pub struct Claimed {
    /// In the order of their positions. None: no batch was written either.
    pub tickets: Vec<Ticket>,
    /// Messages or deliveries looked at. None: nothing was due. Fewer than the limit may have been taken because of
    /// [`BATCH_BYTES`].
    pub seen: usize,
    /// Messages that can't be read, by bytes that are no UTF-8 or numbers that no program holds. They are dead now,
    /// with the reason, so that no other waits behind them.
    pub unreadable: Vec<MessageId>,
}

/// Where the broker put a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LogPosition {
    pub partition: i32,
    /// The offset of its last record.
    pub offset: i64,
}

/// A batch as the janitor looks at it.
#[derive(Clone, Debug, PartialEq)]
pub struct Batch {
    pub id: BatchId,
    pub lane: String,
    pub owner: InstanceId,
    /// Where the broker acknowledged it; `None` while it has not.
    pub log_position: Option<LogPosition>,
    /// Whether the owner's lease has run out.
    pub orphaned: bool,
}

/// What is to be published again.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Suspect {
    /// A batch whose tickets are lost, or were never published.
    Batch(BatchId),
    /// A lease whose owner is no more.
    Lease(LeaseId),
}

/// One call of [`Scheduling::reissue`].
#[derive(Clone, Copy, Debug)]
pub struct Reissue {
    pub suspect: Suspect,
    /// The number of the new batch.
    pub batch: BatchId,
    pub owner: InstanceId,
    pub now: Timestamp,
}

/// A batch that was issued again.
#[derive(Clone, Debug)]
pub struct Reissued {
    /// The lane that its tickets go to.
    pub lane: String,
    pub tickets: Vec<Ticket>,
}

/// Held deliveries of an endpoint that are to be freed.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Unhold {
    pub endpoint: String,
    /// How many, at most.
    pub limit: usize,
}

/// What is due, claimed, held and freed.
#[async_trait]
pub trait Scheduling: Send + Sync {
    /// Cheaply tells whether any new row, and which of these lanes' timed rows, may be due by then. May say
    /// yes in vain, never no.
    async fn due(&self, lanes: &[&str], by: Timestamp) -> Result<DueNow>;

    /// Takes what is due, see [`Claim`].
    async fn claim(&self, claim: &Claim<'_>) -> Result<Claimed>;

    /// Notes that the broker has acknowledged a batch.
    async fn acknowledge(&self, batch: BatchId, at: LogPosition) -> Result<()>;

    /// The oldest batches, at most `limit`.
    async fn batches(&self, now: Timestamp, limit: usize) -> Result<Vec<Batch>>;

    /// Makes a new batch of what is left in another, or in a lease without a living owner. `None`: nothing is left,
    /// or the owner of the lease lives.
    async fn reissue(&self, reissue: &Reissue) -> Result<Option<Reissued>>;

    /// Which endpoints have deliveries held, and why.
    async fn held(&self) -> Result<Vec<(String, Held)>>;

    /// Frees held deliveries of some endpoints, of each urgent ones first, then the oldest: due at once, or when they
    /// were due if that is still to come. A quarter, rounded to the nearest number, are of the lowest priority that there is,
    /// so that a flood of urgent ones does not stop it. How many those were, one number for each of `wanted`.
    async fn unhold(&self, wanted: &[Unhold], held: Held, now: Timestamp) -> Result<Vec<u64>>;

    /// Reserves times between these for held deliveries of endpoints with a rate, over all of an endpoint's lanes: urgent ones
    /// first, then the oldest, as far apart as the rate asks for. At its time each is due, and is let past the rate. How
    /// many those were.
    async fn reserve(&self, from: Timestamp, until: Timestamp) -> Result<u64>;

    /// When the next attempt at an endpoint with a rate may begin; `None`: none was reserved yet.
    async fn next_reserved(&self, endpoint: &str) -> Result<Option<Timestamp>>;

    /// Ends at most `limit` waiting deliveries whose time is over, and returns how many.
    async fn expire(&self, now: Timestamp, limit: usize) -> Result<u64>;
}
