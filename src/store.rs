//! Where messages live: the contract of the store, and what its words mean.
//!
//! The store is the truth (P3): queue and cache may be emptied at any moment. Everything here is
//! batched; a backend never runs a statement per message. All times come from the caller's clock.
//!
//! How a message moves, and which call moves it:
//!
//! | from | to | by |
//! | --- | --- | --- |
//! | | `pending` | an `INSERT`, or [`Store::insert`] |
//! | `pending`, due `retrying` | `queued`, epoch + 1 (or held, or `expired`) | [`Store::claim`] |
//! | `queued` of the ticket's epoch | `processing` (or `expired`, or held) | [`Store::begin`], [`Store::hold`] |
//! | `processing` of the ticket's epoch | `retrying`, `dead`, or back as it was | [`Store::record`] |
//! | anything | `sent` | [`Store::record`]: a success is accepted from any epoch |
//! | held | due again | [`Store::unhold`] |
//! | `queued`, `processing` of something that died | due at once | [`Store::recover`], [`Store::requeue`] |
//!
//! "Back as it was" means `pending` when no try has been recorded, else `retrying`, due at once, or when it was
//! due if that is still to come.
//! Whoever gives a row back raises its epoch by nothing: the next claim does, and until then a
//! stale ticket finds the row not `queued`.

#[cfg(test)]
pub(crate) mod conformance;
mod leadership;
pub mod operate;
pub mod postgres;
pub mod sqlite;
mod standing;

use std::time::Duration;

use async_trait::async_trait;
use uuid::Uuid;

use crate::clock::Timestamp;
use crate::message::{
    Attempt, Epoch, Held, Message, MessageId, NewMessage, Outcome, Status, Ticket, Verdict,
};
use crate::retry::{Lane, LaneGroup};

pub use leadership::{Bid, Leadership, Pacing};
pub use standing::Standing;

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

/// Which rows a claim looks at.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Due<'a> {
    /// `pending` rows without `send_at`, in id order, after the first of these ids, up to and including the second.
    New { after: MessageId, up_to: MessageId },
    /// `retrying` and scheduled `pending` rows of this lane (empty: the fresh lane) whose time has come by then.
    /// The ticket of one whose time has not come now says when it will.
    Timed { lane: &'a str, by: Timestamp },
}

impl Due<'static> {
    /// New rows after this id.
    pub fn after(after: MessageId) -> Self {
        Due::New { after, up_to: MessageId(i64::MAX) }
    }

    /// New rows up to and including this id: finds what committed late behind the cursor.
    pub fn up_to(up_to: MessageId) -> Self {
        Due::New { after: MessageId(0), up_to }
    }
}

/// What may be due: see [`Store::due`].
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DueNow {
    /// Whether there are new rows.
    pub new: bool,
    /// The lanes with timed rows whose time has come by the time asked for, in any order.
    pub lanes: Vec<String>,
}

/// One claim: at most `limit` due rows become `queued` for `lane`, with one ledger row for all.
#[derive(Clone, Debug)]
pub struct Claim<'a> {
    pub due: Due<'a>,
    pub limit: usize,
    /// The topic the tickets go to; written into the ledger.
    pub lane: &'a str,
    /// Endpoints that take messages. Rows of any other are held as [`Held::EndpointClosed`] instead.
    pub open: &'a [String],
    /// Endpoints whose new rows are held as [`Held::EndpointBusy`] instead: they would only wait on the lane.
    /// A row that was held or claimed before is not new: it was freed because there is room.
    pub busy: &'a [String],
    /// Leaves these rows as they are, and takes others in their place; not those of [`Due::Timed`].
    pub pass_busy: bool,
    pub owner: InstanceId,
    pub now: Timestamp,
}

/// A ledger row's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BatchId(pub i64);

/// What a claim took. `tickets` may be empty although `seen` is not: held and expired rows count there.
#[derive(Clone, Debug, Default)]
pub struct Claimed {
    /// `None` when nothing was queued; then no ledger row was written either.
    pub batch: Option<BatchId>,
    pub tickets: Vec<Ticket>,
    /// Rows looked at: less than the limit means that no more were due.
    pub seen: usize,
    /// The highest id looked at.
    pub last: Option<MessageId>,
    /// Rows that can't be read, by bytes that are no UTF-8 or numbers that no program holds. They are dead now, with
    /// the reason, so that no other row waits behind them.
    pub unreadable: Vec<MessageId>,
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

/// Where the broker put a batch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    pub partition: i32,
    /// The offset of its last record.
    pub offset: i64,
}

/// A ledger row: the tickets of one claim.
#[derive(Clone, Debug, PartialEq)]
pub struct Batch {
    pub id: BatchId,
    pub lane: String,
    pub owner: InstanceId,
    pub created_at: Timestamp,
    /// Where the broker acknowledged it; `None` while it has not.
    pub place: Option<Place>,
    /// Whether the owner's lease has run out.
    pub orphaned: bool,
}

/// What a consumer says of tickets it wants to work on.
#[derive(Clone, Debug)]
pub struct Begin<'a> {
    /// A random number of the caller's that names the group for [`Records::finished`].
    pub lease: LeaseId,
    /// Whether this very call was made before and its answer was lost: if it happened after all, the
    /// answer is then what it began.
    pub repeated: bool,
    pub tickets: &'a [(MessageId, Epoch)],
    pub owner: InstanceId,
    pub now: Timestamp,
}

/// A lease row's number: one row for each call of [`Store::begin`] that began anything.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct LeaseId(pub i64);

/// What a begin call took: the messages now `processing`. A ticket that is not among them is stale.
#[derive(Clone, Debug, Default)]
pub struct Begun {
    pub messages: Vec<BegunMessage>,
}

/// A message that this process may now try.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BegunMessage {
    pub id: MessageId,
    /// Which of its tickets was begun: a call may hold stale ones of the same message beside it.
    pub epoch: Epoch,
    /// Tries recorded before this one, over all lanes.
    pub attempts: i32,
    /// Tries recorded before this one on the lane it is on.
    pub lane_tries: i32,
}

/// What one try came to and what was decided.
#[derive(Clone, Debug, PartialEq)]
pub struct Record {
    pub id: MessageId,
    pub epoch: Epoch,
    /// The number of the try.
    pub attempt: i32,
    /// The lane it was made on.
    pub lane: String,
    /// `None` only with [`Verdict::Release`]: there was no try.
    pub outcome: Option<Outcome>,
    pub verdict: Verdict,
}

/// One write of records.
#[derive(Clone, Debug)]
pub struct Records<'a> {
    pub records: &'a [Record],
    /// Leases whose messages are all recorded with this write.
    pub finished: &'a [LeaseId],
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
    /// How many messages they were working on. These are due again.
    pub messages: u64,
    /// Instances whose lease ends later than any can, and when they renewed it last: their clock was ahead.
    pub ahead: Vec<(InstanceId, Timestamp)>,
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
    async fn standing(&self) -> Result<Standing>;

    /// The names of migrations that are missing.
    ///
    /// # Errors
    /// Those of [`Store::standing`].
    async fn missing_migrations(&self) -> Result<Vec<String>> {
        Ok(self.standing().await?.missing)
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
    async fn say_busy(&self, instance: InstanceId, endpoints: &[String]) -> Result<()>;

    /// The endpoints that some instance has said to be busy.
    async fn busy(&self) -> Result<Vec<String>>;

    /// Ends an instance in good order: its lease, leadership and row go.
    async fn retire(&self, instance: InstanceId) -> Result<()>;

    /// Tries to become, or remain, the one active producer. `None`: another is.
    async fn lead(&self, bid: &Bid) -> Result<Option<Leadership>>;

    /// Cheaply tells whether any new row, and which of these lanes' timed rows, may be due by then. May say
    /// yes in vain, never no.
    async fn due(&self, lanes: &[&str], by: Timestamp) -> Result<DueNow>;

    /// Takes due rows, see [`Claim`]. One statement.
    async fn claim(&self, claim: &Claim<'_>) -> Result<Claimed>;

    /// Notes that the broker has acknowledged a batch.
    async fn acknowledge(&self, batch: BatchId, place: Place) -> Result<()>;

    /// The oldest ledger rows, at most `limit`.
    async fn batches(&self, now: Timestamp, limit: usize) -> Result<Vec<Batch>>;

    /// Gives back the rows of these batches that are still `queued` in the epoch that the batch gave
    /// them, and removes the ledger rows. Returns how many rows were given back. At most 100 batches
    /// a call.
    async fn requeue(&self, batches: &[BatchId], now: Timestamp) -> Result<u64>;

    /// Begins messages: those that are `queued` in the ticket's epoch become `processing`, or
    /// `expired` when their time is over. One statement per distinct epoch.
    async fn begin(&self, begin: &Begin<'_>) -> Result<Begun>;

    /// Writes what tries came to, the attempts and the dead letters with them, in one transaction.
    /// Returns the ids whose verdict was refused: stale failures.
    async fn record(&self, records: &Records<'_>) -> Result<Vec<MessageId>>;

    /// Holds messages that are `queued` in the ticket's epoch: they become as they were before the
    /// claim, and are not claimable until [`Store::unhold`].
    async fn hold(&self, tickets: &[(MessageId, Epoch)], held: Held, now: Timestamp) -> Result<u64>;

    /// Which endpoints have rows held, and why.
    async fn held(&self) -> Result<Vec<(String, Held)>>;

    /// Frees at most `limit` held rows of an endpoint, oldest first: due at once, or when they were due if that
    /// is still to come.
    async fn unhold(&self, endpoint: &str, held: Held, limit: usize, now: Timestamp) -> Result<u64>;

    /// Takes away the instances whose lease has run out or that are silent, and gives back what they, and instances
    /// that have retired, had begun and not recorded.
    async fn recover(&self, recovery: &Recovery<'_>) -> Result<Recovered>;

    /// Dead letters written before `before` that are not marked as published, oldest first.
    async fn dead_letters(&self, before: Timestamp, limit: usize) -> Result<Vec<DeadLetter>>;

    /// Marks dead letters as published.
    async fn dead_lettered(&self, ids: &[MessageId]) -> Result<()>;

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
