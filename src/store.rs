//! Where messages live: the contract of the store, and what its words mean.
//!
//! The store is the truth (P3): queue and cache may be emptied at any moment. Everything here is
//! batched; no backend goes to its server for each message. All times come from the caller's clock.
//!
//! A delivery stands in exactly one place, and the place is its status. Every move is one transaction:
//!
//! | place | status | how it comes there |
//! | --- | --- | --- |
//! | only `messages` | `pending` | an `INSERT`, or [`Store::insert`] |
//! | a batch | `queued` | [`Scheduling::claim`], [`Scheduling::reissue`] |
//! | a lease | `processing` | [`Execution::begin`] |
//! | `waiting` | `pending` before its first attempt, else `retrying` | [`Scheduling::claim`] of one that is scheduled, or whose endpoint is saturated or closed; [`Execution::hold`]; [`Execution::record`] of a failure; a redrive |
//! | `deliveries` | `sent`, `dead`, `cancelled`, `expired` | [`Execution::record`], a cancel, a claim or [`Scheduling::expire`] of one whose time is over |
//!
//! A batch stands for the deliveries that were claimed together, a lease for those of one batch that one consumer
//! has begun together. Each has a [`Mask`] of the positions that still stand in it. A ticket names its batch and
//! position, so a ticket whose bit is gone is stale and begins nothing.
//!
//! What died, or what the broker lost, is repaired by [`Scheduling::reissue`] alone: what is left in a batch or lease
//! becomes a new batch, and its tickets are published again. The new batch keeps the positions and the *root*, the
//! first batch that these deliveries were in, so that a success that comes late takes its delivery out wherever
//! it stands by then.

#[cfg(test)]
pub(crate) mod conformance;
mod execution;
mod mask;
pub mod operate;
pub mod postgres;
mod registry;
mod scheduling;
mod schema_version;
mod settle;
pub mod sqlite;
mod upkeep;

use std::time::Duration;

use async_trait::async_trait;
use uuid::Uuid;

use crate::clock::Timestamp;
use crate::message::{MessageId, NewMessage, Status};
use crate::ticket::{BatchId, EndpointId};

pub use execution::{Begin, Begun, DeadLetter, Execution, LeaseId, Record, Records, Wanted};
pub use mask::Mask;
pub use operate::Operations;
pub use registry::{Bid, Endpoint, Instance, InstanceId, Leadership, Registry};
pub use scheduling::{
    BATCH_BYTES, BATCH_MAX, Batch, Claim, Claimed, Due, DueNow, LogPosition, Reissue, Reissued, Scheduling,
    Suspect, Unhold, Urgency,
};
pub use schema_version::SchemaVersion;
pub use upkeep::{Reconciled, Reconciliation, Recovered, Recovery, Removal, Removed, Upkeep};

/// What a caller can do about a failed store call.
#[derive(Clone, Debug, thiserror::Error)]
pub enum StoreError {
    /// The store can't be reached or broke off; the call may or may not have happened. Try again:
    /// every call of [`Store`] may be repeated.
    #[error("the store is unavailable: {0}")]
    Unavailable(String),
    /// The store refused the values: repeating it is useless.
    #[error("the store refused the values: {0}")]
    Refused(String),
    /// This program can't work on the store, however often it tries: its migrations are of another version, or
    /// its database has another encoding.
    #[error("{0}")]
    Unsupported(String),
    /// A defect of ours or of the database's contents; the sentence says where.
    #[error("the store failed: {0}")]
    Internal(String),
}

/// The result of a store call.
pub type Result<T> = std::result::Result<T, StoreError>;

/// What became of one inserted message, in the order of the batch.
#[derive(Clone, Debug, PartialEq)]
pub enum Inserted {
    /// It is stored.
    New { id: MessageId, created_at: Timestamp },
    /// Its idempotency key was used before for an equal message: that one's id.
    Existing(MessageId),
    /// Its idempotency key was used before for another message.
    Conflict(MessageId),
}

/// What became of messages that belong together.
#[derive(Clone, Debug, PartialEq)]
pub enum AllOrNone {
    /// All are stored, or were before; in the order of the batch, and without a [`Inserted::Conflict`].
    Stored(Vec<Inserted>),
    /// None is stored: the messages at these places have idempotency keys of other messages.
    Conflicts(Vec<usize>),
}

/// The latest time that is still taken for the present by which another process was working. What lies beyond was
/// written by a clock that was wrong, and must not keep anybody waiting until then.
fn latest_present(now: Timestamp) -> Timestamp {
    now.after(Duration::from_secs(120))
}

/// A bound as a statement takes it.
fn limit(limit: usize) -> i64 {
    i64::try_from(limit).unwrap_or(i64::MAX)
}

/// A JSON column as it is shown. What the program can't hold (a nesting of thousands, a number of a thousand
/// digits) is shown as its text, because whatever a sender may store can be read back.
fn json_or_text(json: &str) -> serde_json::Value {
    serde_json::from_str(json).unwrap_or_else(|_| serde_json::Value::String(json.to_owned()))
}

/// Why a message is dead that the claim could not read.
fn unreadable_reason(why: &str) -> String {
    format!("the message can't be read: {why}")
}

/// A count that stops counting: `more` says that there are at least `count`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Count {
    pub status: Status,
    pub count: u64,
    pub more: bool,
}

/// What the store knows of the whole system.
#[derive(Clone, Debug, Default)]
pub struct Overview {
    pub counts: Vec<Count>,
    /// When the oldest row that is due became so.
    pub oldest_due_at: Option<Timestamp>,
    pub instances: Vec<Instance>,
}

/// What the database says of itself.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct About {
    /// Its version, in its own words.
    pub version: String,
    /// What its own clock says.
    pub now: Timestamp,
    /// Those of its settings on which safety and capacity rest, in its own words.
    pub settings: std::collections::BTreeMap<String, String>,
    /// Connections that are open now, of all programs; 0 where there is no server.
    pub connections: u64,
}

/// The store: what every process needs of it; the other traits say what each service asks. Every call of all of them but
/// [`Upkeep::bring_forward`] may be repeated after [`StoreError::Unavailable`] without doing harm.
#[async_trait]
pub trait Store: Registry + Scheduling + Execution + Upkeep + Operations + Send + Sync + 'static {
    /// `postgres` or `sqlite`.
    fn kind(&self) -> &'static str;

    /// Applies the migrations that are missing and returns their names.
    async fn migrate(&self) -> Result<Vec<String>>;

    /// How the store's migrations stand to those that this program knows.
    ///
    /// # Errors
    /// [`StoreError::Unsupported`] when the store needs a program that knows others: a newer one, or one of
    /// another line.
    async fn schema_version(&self) -> Result<SchemaVersion>;

    /// The names of migrations that are missing.
    ///
    /// # Errors
    /// Those of [`Store::schema_version`].
    async fn missing_migrations(&self) -> Result<Vec<String>> {
        Ok(self.schema_version().await?.missing)
    }

    /// The random number that this store was given by its first migration; `webhook-id`s carry it.
    async fn installation(&self) -> Result<Uuid>;

    /// Inserts all messages in one transaction, or none. Idempotency keys are checked against the
    /// store and within the batch.
    async fn insert(&self, messages: &[NewMessage], now: Timestamp) -> Result<Vec<Inserted>>;

    /// As [`Store::insert`], but one conflict keeps all of them out. For batches whose sender is
    /// promised all or none, also when it is an idempotency key that stands in the way.
    async fn insert_whole(&self, messages: &[NewMessage], now: Timestamp) -> Result<AllOrNone>;

    /// What the database says of itself; it need not be migrated.
    async fn about(&self) -> Result<About>;
}
