//! Where messages live: the contract of the store, and what its words mean.
//!
//! The store is the truth (P3): queue and cache may be emptied at any moment. Everything here is
//! batched; a backend never runs a statement per message. All times come from the caller's clock.
//!
//! A delivery stands in exactly one place, and the place is its status. Every move is one transaction:
//!
//! | place | status | how it comes there |
//! | --- | --- | --- |
//! | only `messages` | `pending` | an `INSERT`, or [`Store::insert`] |
//! | a batch | `queued` | [`Store::claim`], [`Store::reissue`] |
//! | a lease | `processing` | [`Store::begin`] |
//! | `waiting` | `pending` before its first attempt, else `retrying` | [`Store::claim`] of one that is scheduled, or whose endpoint is saturated or closed; [`Store::hold`]; [`Store::record`] of a failure; a redrive |
//! | `deliveries` | `sent`, `dead`, `cancelled`, `expired` | [`Store::record`], a cancel, a claim or [`Store::expire`] of one whose time is over |
//!
//! A batch stands for the deliveries that were claimed together, a lease for those of one batch that one consumer
//! has begun together. Each has a [`Mask`] of the positions that still stand in it. A ticket names its batch and
//! position, so a ticket whose bit is gone is stale and begins nothing.
//!
//! What died, or what the broker lost, is repaired by [`Store::reissue`] alone: what is left in a batch or lease
//! becomes a new batch, and its tickets are published again. The new batch keeps the positions and the *root*, the
//! first batch that these deliveries were in, so that a success that comes late takes its delivery out wherever
//! it stands by then.

#[cfg(test)]
pub(crate) mod conformance;
mod execution;
mod leadership;
mod mask;
pub mod operate;
pub mod postgres;
mod scheduling;
mod schema_version;
mod settle;
pub mod sqlite;
mod upkeep;

use std::time::Duration;

use async_trait::async_trait;
use uuid::Uuid;

use crate::clock::Timestamp;
use crate::message::{Attempt, Held, Message, MessageId, NewMessage, Status};
use crate::retry::{Lane, LaneGroup};
use crate::ticket::{BatchId, EndpointId, Ticket};

pub use execution::{Begin, Begun, DeadLetter, LeaseId, Record, Records, Wanted};
pub use leadership::{Bid, Leadership, Pacing};
pub use mask::Mask;
pub use scheduling::{
    BATCH_BYTES, BATCH_MAX, Batch, Claim, Claimed, Due, DueNow, Place, Reissue, Reissued, Suspect, Urgency,
};
pub use schema_version::SchemaVersion;
pub use upkeep::{Reconciled, Reconciliation, Recovered, Recovery, Removal, Removed};

use operate::{ApiKey, Change, Control, Cursor, DeadReason, Deletion, Filter, Found, Job, JobId};

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

/// A running process's number in the `instances` table; never used again for another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct InstanceId(pub i64);

/// One process of AMS, as others see it. It lives as long as it renews its lease.
#[derive(Clone, Debug, PartialEq)]
pub struct Instance {
    pub id: InstanceId,
    /// `producer`, `consumer`, `retry-consumer`, `api` or `up`.
    pub service: String,
    pub host: String,
    pub version: String,
    pub started_at: Timestamp,
    pub seen_at: Timestamp,
    /// Until when its claims and begun messages are its own.
    pub lease_until: Timestamp,
}

/// An HTTP destination with its policy.
#[derive(Clone, Debug, PartialEq)]
pub struct Endpoint {
    pub name: String,
    pub url: String,
    /// One deadline over connect, head and body.
    pub timeout: Duration,
    /// Attempts in flight at once, in each consumer process; at least 1.
    pub in_flight_max: u32,
    /// Statuses after which a message is dead at once.
    pub final_statuses: Vec<u16>,
    pub enabled: bool,
    /// Standard Webhooks secret (`whsec_` and base64); `None`: unsigned.
    pub secret: Option<String>,
}

impl Endpoint {
    /// An endpoint with the defaults of the `endpoints` table.
    pub fn new(name: &str, url: &str) -> Endpoint {
        Endpoint {
            name: name.to_owned(),
            url: url.to_owned(),
            timeout: Duration::from_secs(15),
            in_flight_max: 1024,
            final_statuses: vec![410],
            enabled: true,
            secret: None,
        }
    }
}

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
pub enum Whole {
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
    /// What its own clock says. Only for comparing clocks: all times in the store come from callers.
    pub now: Timestamp,
    /// Those of its settings on which safety and capacity rest, in its own words.
    pub settings: std::collections::BTreeMap<String, String>,
    /// Connections that are open now, of all programs; 0 where there is no server.
    pub connections: u64,
}

/// The store. Every call may be repeated after [`StoreError::Unavailable`] without doing harm.
#[async_trait]
pub trait Store: Send + Sync + 'static {
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
    async fn insert_whole(&self, messages: &[NewMessage], now: Timestamp) -> Result<Whole>;

    /// Registers a process, whose lease lasts until `lease_until`.
    async fn enroll(
        &self,
        service: &str,
        host: &str,
        now: Timestamp,
        lease_until: Timestamp,
    ) -> Result<InstanceId>;

    /// Renews an instance's lease. `false`: it had run out and was taken away; enroll anew, and drop
    /// every begun message that has not been tried.
    async fn renew(&self, instance: InstanceId, now: Timestamp, lease_until: Timestamp) -> Result<bool>;

    /// Says which endpoints this instance can't try as fast as their messages come, in place of what it
    /// said before.
    async fn report_saturated(&self, instance: InstanceId, endpoints: &[String]) -> Result<()>;

    /// The endpoints that some instance has said to be busy.
    async fn saturated(&self) -> Result<Vec<String>>;

    /// Ends an instance in good order: its lease, leadership and row go.
    async fn retire(&self, instance: InstanceId) -> Result<()>;

    /// Tries to become, or remain, the one active producer. `None`: another is.
    async fn lead(&self, bid: &Bid) -> Result<Option<Leadership>>;

    /// Cheaply tells whether any new row, and which of these lanes' timed rows, may be due by then. May say
    /// yes in vain, never no.
    async fn due(&self, lanes: &[&str], by: Timestamp) -> Result<DueNow>;

    /// Takes what is due, see [`Claim`].
    async fn claim(&self, claim: &Claim<'_>) -> Result<Claimed>;

    /// Notes that the broker has acknowledged a batch.
    async fn acknowledge(&self, batch: BatchId, place: Place) -> Result<()>;

    /// The oldest batches, at most `limit`.
    async fn batches(&self, now: Timestamp, limit: usize) -> Result<Vec<Batch>>;

    /// Makes a new batch of what is left in another, or in a lease without a living owner. `None`: nothing is left,
    /// or the owner of the lease lives.
    async fn reissue(&self, reissue: &Reissue) -> Result<Option<Reissued>>;

    /// Begins deliveries: those whose bits are still in their batch come into leases. Answers in any order, and
    /// nothing for a batch of which nothing was begun.
    async fn begin(&self, begin: &Begin<'_>) -> Result<Vec<Begun>>;

    /// Writes what attempts came to, and the dead letters with them, in one transaction. Returns the ids whose verdict
    /// was refused: failures of deliveries that no longer stand in their lease. A success is never refused.
    async fn record(&self, records: &Records<'_>) -> Result<Vec<MessageId>>;

    /// Holds deliveries that still stand in their batch on this lane: they are not claimed again until
    /// [`Store::unhold`]. Returns how many those were.
    async fn hold(&self, lane: &str, tickets: &[Ticket], held: Held, now: Timestamp) -> Result<u64>;

    /// Which endpoints have deliveries held, and why.
    async fn held(&self) -> Result<Vec<(String, Held)>>;

    /// Frees at most `limit` held deliveries of an endpoint, urgent first, then oldest: due at once, or when they
    /// were due if that is still to come.
    async fn unhold(&self, endpoint: &str, held: Held, limit: usize, now: Timestamp) -> Result<u64>;

    /// Ends at most `limit` waiting deliveries whose time is over, and returns how many.
    async fn expire(&self, now: Timestamp, limit: usize) -> Result<u64>;

    /// Takes away the instances whose lease has run out or that are silent, and lists what they, and instances
    /// that have retired, had begun and not recorded.
    async fn recover(&self, recovery: &Recovery<'_>) -> Result<Recovered>;

    /// Dead letters written before `before` that are not marked as published, oldest first.
    async fn dead_letters(&self, before: Timestamp, limit: usize) -> Result<Vec<DeadLetter>>;

    /// Marks dead letters as published.
    async fn dead_lettered(&self, ids: &[MessageId]) -> Result<()>;

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

    /// Makes partitions ahead of the ids in use. Does nothing where tables are not partitioned.
    async fn make_partitions(&self) -> Result<()>;

    /// All endpoints.
    async fn endpoints(&self) -> Result<Vec<Endpoint>>;

    /// Creates or replaces an endpoint.
    async fn put_endpoint(&self, endpoint: &Endpoint) -> Result<()>;

    /// Deletes an endpoint, unless a message names it.
    async fn delete_endpoint(&self, name: &str) -> Result<Deletion>;

    /// All registered lanes.
    async fn lanes(&self) -> Result<Vec<Lane>>;

    /// Registers a lane; the newest wins. Returns what stood there before, if it was different.
    async fn put_lane(&self, lane: &Lane, now: Timestamp) -> Result<Option<Lane>>;

    /// The consumer groups of all lanes, also those that were not heard of lately.
    async fn lane_groups(&self) -> Result<Vec<LaneGroup>>;

    /// Notes that a group reads a lane. Groups of that lane that were silent for an hour before go.
    async fn put_lane_group(&self, group: &LaneGroup) -> Result<()>;

    /// One message.
    async fn message(&self, id: MessageId) -> Result<Option<Message>>;

    /// The messages with these ids, in no order; those that do not exist are left out.
    async fn messages(&self, ids: &[MessageId]) -> Result<Vec<Message>>;

    /// The ids of at most `limit` matching messages, newest first, from `from` on.
    async fn search(&self, filter: &Filter, from: Cursor, limit: usize) -> Result<Found>;

    /// Changes those of these messages whose status allows it, and says which.
    async fn change(&self, change: Change, ids: &[MessageId], now: Timestamp) -> Result<Vec<MessageId>>;

    /// Notes a change of all messages that match and exist now.
    async fn open_job(&self, change: Change, filter: &Filter, now: Timestamp) -> Result<Job>;

    /// Works at most `limit` messages of a job off, unless somebody else is at it, and says how it stands.
    async fn work_job(&self, id: JobId, limit: usize, now: Timestamp) -> Result<Option<Job>>;

    /// A job.
    async fn job(&self, id: JobId) -> Result<Option<Job>>;

    /// Unfinished jobs at which nobody has worked since `before`.
    async fn idle_jobs(&self, before: Timestamp) -> Result<Vec<JobId>>;

    /// Why the newest 10,000 dead messages are dead, the most frequent reason first.
    async fn dead_reasons(&self) -> Result<Vec<DeadReason>>;

    /// Pauses all producers, or lets them go on; it holds over restarts.
    async fn set_paused(&self, paused: bool) -> Result<()>;

    /// Whether producers are paused, and what the active one says.
    async fn control(&self, now: Timestamp) -> Result<Control>;

    /// Stores a new key of the API.
    async fn put_key(&self, key: &ApiKey) -> Result<()>;

    /// All keys of the API, oldest first.
    async fn keys(&self) -> Result<Vec<ApiKey>>;

    /// Revokes a key. `false`: there is none, or it is revoked already.
    async fn revoke_key(&self, id: &str, now: Timestamp) -> Result<bool>;

    /// Notes that these keys have just been used.
    async fn keys_used(&self, ids: &[String], now: Timestamp) -> Result<()>;

    /// A message's attempts, oldest first.
    async fn attempts(&self, id: MessageId) -> Result<Vec<Attempt>>;

    /// Counts, ages and instances. Counting stops at 10,000 a status.
    async fn overview(&self, now: Timestamp) -> Result<Overview>;

    /// What the database says of itself; it need not be migrated.
    async fn about(&self) -> Result<About>;
}
