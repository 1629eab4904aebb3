//! The embedded store: one SQLite file, for a whole AMS in one process.
//!
//! One thread writes, another reads, so that reads never wait for a commit; whether anything is due is
//! looked up on the caller's thread, because a producer at rest asks that 200 times a second. Calls that wait for the
//! writer together share one transaction, hence one fsync. Other programs (a `sqlite3` shell) may use
//! the same file at the same time: the lock is waited for, and what they insert is sent like the rest.
//!
//! [`SqliteStore::inline`] runs every call on the calling thread instead, so that a simulation is
//! deterministic and a test costs no threads. Clones are further handles on the same database.

mod batch;
mod begin;
mod breaker;
mod change;
mod claim;
mod column;
mod endpoint;
mod hold;
mod insert;
mod operate;
mod place;
mod rate;
mod read;
mod reconcile;
mod record;
mod registry;
mod retention;
mod schema;
mod search;
mod worker;

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use rusqlite::Connection;
use rusqlite::config::DbConfig;
use uuid::Uuid;

use super::operate::{
    ApiKey, Change, Control, Cursor, DeadReason, Deletion, Filter, Operation, OperationId, Page,
};
use super::{
    About, AllOrNone, Batch, BatchId, Begin, Begun, Bid, Claim, Claimed, DeadLetter, DueNow, Endpoint,
    Execution, Inserted, InstanceId, Leadership, LogPosition, Operations, Overview, Reconciled,
    Reconciliation, Records, Recovered, Recovery, Registry, Reissue, Reissued, Removal, Removed, Result,
    Scheduling, SchemaVersion, Store, StoreError, Unhold, Upkeep,
};
use crate::breaker::Breaker;
use crate::clock::Timestamp;
use crate::lane::{Lane, LaneGroup};
use crate::message::{Attempt, Held, Message, MessageId, NewMessage};
use crate::ticket::Ticket;

use column::{bytes, json, list, optional_text, our_optional_time, our_time, text, writers_time};
use worker::{Call, Worker};

/// How long another program's lock is waited for.
const LOCK_WAIT: Duration = Duration::from_secs(5);
/// More statements than there are in this module, so that each is prepared once.
const STATEMENTS: usize = 192;

/// A handle on one SQLite database.
#[derive(Clone)]
pub struct SqliteStore {
    backend: Arc<Backend>,
}

enum Backend {
    /// The lookout is a connection of its own for looks that take microseconds.
    Threads {
        writer: Worker,
        reader: Worker,
        lookout: Mutex<Connection>,
    },
    Inline(Mutex<Connection>),
}

impl SqliteStore {
    /// Opens the database file at `path`, and creates it and its folder when they are missing. It has
    /// no tables until [`Store::migrate`].
    ///
    /// # Errors
    /// [`StoreError::Unsupported`] when the file needs a newer version of this program; otherwise a
    /// sentence that names the file and what is wrong with it.
    pub fn open(path: &Path) -> Result<SqliteStore> {
        let told = |why: String| StoreError::Unavailable(format!("{} can't be used: {why}", path.display()));
        if let Some(folder) = path.parent().filter(|folder| !folder.as_os_str().is_empty()) {
            std::fs::create_dir_all(folder)
                .map_err(|error| told(format!("its folder can't be created: {error}")))?;
        }
        let writer = Connection::open(path).map_err(|error| told(error.to_string()))?;
        prepare_file(&writer).map_err(|error| told(error.to_string()))?;
        let only_reads = || {
            let connection = Connection::open(path)?;
            set_up(&connection)?;
            connection.execute_batch("pragma query_only = on")?;
            Ok::<_, rusqlite::Error>(connection)
        };
        let reader = only_reads().map_err(|error| told(error.to_string()))?;
        schema::schema_version(&reader)?;
        let lookout = only_reads().map_err(|error| told(error.to_string()))?;
        // The first read opens the journal; a look must not be the one to find that it can't be.
        schema::schema_version(&lookout)?;
        // It must not keep its caller: in doubt the producer claims.
        lookout.busy_timeout(Duration::ZERO).map_err(|error| told(error.to_string()))?;
        let backend = Backend::Threads {
            writer: Worker::start("store-writer", writer).map_err(|error| told(error.to_string()))?,
            reader: Worker::start("store-reader", reader).map_err(|error| told(error.to_string()))?,
            lookout: Mutex::new(lookout),
        };
        Ok(SqliteStore { backend: Arc::new(backend) })
    }

    /// A store that runs every call at once on the calling thread, over this connection.
    ///
    /// # Errors
    /// As [`SqliteStore::open`].
    pub fn inline(connection: Connection) -> Result<SqliteStore> {
        set_up(&connection)?;
        schema::schema_version(&connection)?;
        Ok(SqliteStore { backend: Arc::new(Backend::Inline(Mutex::new(connection))) })
    }

    /// A fresh, migrated database in memory, run inline. It is gone with its last handle.
    ///
    /// # Errors
    /// Those of SQLite; none is expected.
    pub fn in_memory() -> Result<SqliteStore> {
        let mut connection = Connection::open_in_memory()?;
        schema::migrate(&mut connection)?;
        SqliteStore::inline(connection)
    }

    /// Runs `work` in a transaction and answers after its commit.
    async fn write<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Connection) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        match &*self.backend {
            Backend::Threads { writer, .. } => {
                let (call, told) = Call::with_answer(work);
                writer.send(worker::Command::Write(call))?;
                told.await.map_err(|_| worker::gone())?
            }
            Backend::Inline(connection) => {
                let connection = lock(connection);
                connection.execute_batch("begin immediate")?;
                let done = work(&connection);
                connection.execute_batch(if done.is_ok() { "commit" } else { "rollback" })?;
                done
            }
        }
    }

    /// Runs `work` on the reading connection, where it sees everything committed. All of its statements see the same,
    /// because between two of them a delivery could go from one place to another and stand in none.
    async fn read<T: Send + 'static>(
        &self,
        work: impl FnOnce(&Connection) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        match &*self.backend {
            Backend::Threads { reader, .. } => {
                let in_one_view = |connection: &mut Connection| {
                    // It ends with the block.
                    let _view = connection.unchecked_transaction()?;
                    work(connection)
                };
                reader.alone(in_one_view).await
            }
            Backend::Inline(connection) => work(&lock(connection)),
        }
    }

    /// Runs `work` on the writing connection, outside of any transaction.
    async fn alone<T: Send + 'static>(
        &self,
        work: impl FnOnce(&mut Connection) -> Result<T> + Send + 'static,
    ) -> Result<T> {
        match &*self.backend {
            Backend::Threads { writer, .. } => writer.alone(work).await,
            Backend::Inline(connection) => work(&mut lock(connection)),
        }
    }
}

#[async_trait]
impl Store for SqliteStore {
    fn kind(&self) -> &'static str {
        "sqlite"
    }

    async fn migrate(&self) -> Result<Vec<String>> {
        self.alone(schema::migrate).await
    }

    async fn schema_version(&self) -> Result<SchemaVersion> {
        self.read(schema::schema_version).await
    }

    async fn installation(&self) -> Result<Uuid> {
        self.read(registry::installation).await
    }

    async fn insert(&self, messages: &[NewMessage], now: Timestamp) -> Result<Vec<Inserted>> {
        if messages.is_empty() {
            return Ok(Vec::new());
        }
        let messages = messages.to_vec();
        self.write(move |db| insert::insert(db, &messages, now)).await
    }

    async fn insert_whole(&self, messages: &[NewMessage], now: Timestamp) -> Result<AllOrNone> {
        if messages.is_empty() {
            return Ok(AllOrNone::Stored(Vec::new()));
        }
        let messages = messages.to_vec();
        self.write(move |db| insert::insert_whole(db, &messages, now)).await
    }

    async fn about(&self) -> Result<About> {
        self.read(registry::about).await
    }
}

#[async_trait]
impl Registry for SqliteStore {
    async fn time(&self) -> Result<Option<Timestamp>> {
        Ok(None)
    }

    async fn enroll(
        &self,
        service: &str,
        host: &str,
        now: Timestamp,
        lease_until: Timestamp,
    ) -> Result<InstanceId> {
        let (service, host) = (service.to_owned(), host.to_owned());
        self.write(move |db| registry::enroll(db, &service, &host, now, lease_until)).await
    }

    async fn renew(&self, instance: InstanceId, now: Timestamp, lease_until: Timestamp) -> Result<bool> {
        self.write(move |db| registry::renew(db, instance, now, lease_until)).await
    }

    async fn report_saturated(&self, instance: InstanceId, endpoints: &[String]) -> Result<()> {
        let endpoints = endpoints.to_vec();
        self.write(move |db| registry::report_saturated(db, instance, &endpoints)).await
    }

    async fn saturated(&self) -> Result<Vec<String>> {
        self.read(registry::saturated).await
    }

    async fn retire(&self, instance: InstanceId) -> Result<()> {
        self.write(move |db| registry::retire(db, instance)).await
    }

    async fn lead(&self, bid: &Bid) -> Result<Option<Leadership>> {
        let bid = *bid;
        self.write(move |db| registry::lead(db, &bid)).await
    }

    async fn endpoints(&self) -> Result<Vec<Endpoint>> {
        self.read(endpoint::endpoints).await
    }

    async fn put_endpoint(&self, endpoint: &Endpoint) -> Result<()> {
        let endpoint = endpoint.clone();
        self.write(move |db| endpoint::put_endpoint(db, &endpoint)).await
    }

    async fn delete_endpoint(&self, name: &str) -> Result<Deletion> {
        let name = name.to_owned();
        self.write(move |db| endpoint::delete_endpoint(db, &name)).await
    }

    async fn breakers(&self) -> Result<Vec<(String, Breaker)>> {
        self.read(breaker::breakers).await
    }

    async fn set_breakers(&self, changes: &[(String, Option<Breaker>)]) -> Result<Vec<bool>> {
        let changes = changes.to_vec();
        self.write(move |db| breaker::set_breakers(db, &changes)).await
    }

    async fn probe(&self, endpoints: &[(String, Timestamp)], now: Timestamp) -> Result<Vec<String>> {
        let endpoints = endpoints.to_vec();
        self.write(move |db| breaker::probe(db, &endpoints, now)).await
    }

    async fn lanes(&self) -> Result<Vec<Lane>> {
        self.read(registry::lanes).await
    }

    async fn put_lane(&self, lane: &Lane, now: Timestamp) -> Result<Option<Lane>> {
        let lane = lane.clone();
        self.write(move |db| registry::put_lane(db, &lane, now)).await
    }

    async fn lane_groups(&self) -> Result<Vec<LaneGroup>> {
        self.read(registry::lane_groups).await
    }

    async fn put_lane_group(&self, group: &LaneGroup) -> Result<()> {
        let group = group.clone();
        self.write(move |db| registry::put_lane_group(db, &group)).await
    }
}

#[async_trait]
impl Scheduling for SqliteStore {
    async fn due(&self, lanes: &[&str], by: Timestamp) -> Result<DueNow> {
        let looked = match &*self.backend {
            Backend::Threads { lookout, .. } => claim::due(&lock(lookout), lanes, by),
            Backend::Inline(connection) => claim::due(&lock(connection), lanes, by),
        };
        match looked {
            Err(StoreError::Unavailable(_)) => {
                Ok(DueNow { new: true, lanes: lanes.iter().map(|&lane| lane.to_owned()).collect() })
            }
            looked => looked,
        }
    }

    async fn claim(&self, claim: &Claim<'_>) -> Result<Claimed> {
        let owned = claim::Owned::from(claim);
        self.write(move |db| claim::claim(db, &owned)).await
    }

    async fn acknowledge(&self, batch: BatchId, at: LogPosition) -> Result<()> {
        self.write(move |db| batch::acknowledge(db, batch, at)).await
    }

    async fn batches(&self, now: Timestamp, limit: usize) -> Result<Vec<Batch>> {
        self.read(move |db| batch::batches(db, now, limit)).await
    }

    async fn reissue(&self, reissue: &Reissue) -> Result<Option<Reissued>> {
        let reissue = *reissue;
        self.write(move |db| batch::reissue(db, &reissue)).await
    }

    async fn held(&self) -> Result<Vec<(String, Held)>> {
        self.read(hold::held).await
    }

    async fn unhold(&self, wanted: &[Unhold], held: Held, now: Timestamp) -> Result<Vec<u64>> {
        let wanted = wanted.to_vec();
        self.write(move |db| hold::unhold(db, &wanted, held, now)).await
    }

    async fn reserve(&self, from: Timestamp, until: Timestamp) -> Result<u64> {
        self.write(move |db| rate::reserve(db, from, until)).await
    }

    async fn next_reserved(&self, endpoint: &str) -> Result<Option<Timestamp>> {
        let endpoint = endpoint.to_owned();
        self.read(move |db| rate::next_reserved(db, &endpoint)).await
    }

    async fn expire(&self, now: Timestamp, limit: usize) -> Result<u64> {
        self.write(move |db| hold::expire(db, now, limit)).await
    }
}

#[async_trait]
impl Execution for SqliteStore {
    async fn begin(&self, begin: &Begin<'_>) -> Result<Vec<Begun>> {
        let wanted = begin.wanted.to_vec();
        let (repeated, owner) = (begin.repeated, begin.owner);
        self.write(move |db| begin::begin(db, &Begin { wanted: &wanted, repeated, owner })).await
    }

    async fn record(&self, records: &Records<'_>) -> Result<Vec<MessageId>> {
        if records.records.is_empty() {
            return Ok(Vec::new());
        }
        // Copies of what is shared, for the other thread.
        let (written, now) = (records.records.to_vec(), records.now);
        self.write(move |db| record::record(db, &Records { records: &written, now })).await
    }

    async fn hold(&self, lane: &str, tickets: &[Ticket], held: Held, now: Timestamp) -> Result<u64> {
        let (lane, tickets) =
            (lane.to_owned(), tickets.iter().map(Ticket::without_message).collect::<Vec<_>>());
        self.write(move |db| hold::hold(db, &lane, &tickets, held, now)).await
    }

    async fn dead_letters(&self, before: Timestamp, limit: usize) -> Result<Vec<DeadLetter>> {
        self.read(move |db| read::dead_letters(db, before, limit)).await
    }

    async fn dead_lettered(&self, ids: &[MessageId]) -> Result<()> {
        let ids = ids.to_vec();
        self.write(move |db| record::dead_lettered(db, &ids)).await
    }
}

#[async_trait]
impl Upkeep for SqliteStore {
    async fn recover(&self, recovery: &Recovery<'_>) -> Result<Recovered> {
        let (now, latest, silent) =
            (recovery.now, recovery.latest, Arc::<[InstanceId]>::from(recovery.silent));
        let look = Arc::clone(&silent);
        let looked =
            self.read(move |db| begin::look_for_dead(db, &Recovery { now, latest, silent: &look })).await?;
        if !looked.dead {
            return Ok(Recovered { instances: 0, leases: looked.leases, ahead: looked.ahead });
        }
        let recovered =
            self.write(move |db| begin::recover(db, &Recovery { now, latest, silent: &silent })).await?;
        Ok(Recovered { ahead: looked.ahead, ..recovered })
    }

    async fn remove_old(&self, removal: &Removal) -> Result<Removed> {
        let removal = *removal;
        self.write(move |db| retention::remove_old(db, &removal)).await
    }

    async fn check_feeds(&self, _now: Timestamp) -> Result<bool> {
        // Ids are in the order of their commits wherever the file is.
        Ok(false)
    }

    async fn reconcile(&self, now: Timestamp, limit: usize) -> Result<Reconciled> {
        self.write(move |db| reconcile::reconcile(db, now, limit)).await
    }

    async fn reconciliation(&self) -> Result<Reconciliation> {
        self.read(reconcile::reconciliation).await
    }

    async fn bring_forward(&self, by: Duration, now: Timestamp) -> Result<()> {
        self.write(move |db| hold::bring_forward(db, by, now)).await
    }

    async fn make_partitions(&self) -> Result<()> {
        Ok(())
    }
}

#[async_trait]
impl Operations for SqliteStore {
    async fn message(&self, id: MessageId) -> Result<Option<Message>> {
        Ok(self.messages(&[id]).await?.pop())
    }

    async fn messages(&self, ids: &[MessageId]) -> Result<Vec<Message>> {
        let ids = ids.to_vec();
        self.read(move |db| read::messages(db, &ids)).await
    }

    async fn search(&self, filter: &Filter, from: Cursor, limit: usize) -> Result<Page> {
        let filter = filter.clone();
        self.read(move |db| search::search(db, &filter, from, limit)).await
    }

    async fn change(&self, change: Change, ids: &[MessageId], now: Timestamp) -> Result<Vec<MessageId>> {
        let ids = ids.to_vec();
        self.write(move |db| change::change(db, change, &ids, now)).await
    }

    async fn open_operation(&self, change: Change, filter: &Filter, now: Timestamp) -> Result<Operation> {
        let filter = filter.clone();
        self.write(move |db| operate::open_operation(db, change, &filter, now)).await
    }

    async fn work_operation(
        &self,
        id: OperationId,
        limit: usize,
        now: Timestamp,
    ) -> Result<Option<Operation>> {
        self.write(move |db| operate::work_operation(db, id, limit, now)).await
    }

    async fn operation(&self, id: OperationId) -> Result<Option<Operation>> {
        self.read(move |db| operate::operation(db, id)).await
    }

    async fn idle_operations(&self, before: Timestamp) -> Result<Vec<OperationId>> {
        self.read(move |db| operate::idle_operations(db, before)).await
    }

    async fn dead_reasons(&self) -> Result<Vec<DeadReason>> {
        self.read(search::dead_reasons).await
    }

    async fn set_paused(&self, paused: bool) -> Result<()> {
        self.write(move |db| operate::set_paused(db, paused)).await
    }

    async fn control(&self, now: Timestamp) -> Result<Control> {
        self.read(move |db| operate::control(db, now)).await
    }

    async fn put_key(&self, key: &ApiKey) -> Result<()> {
        let key = key.clone();
        self.write(move |db| operate::put_key(db, &key)).await
    }

    async fn keys(&self) -> Result<Vec<ApiKey>> {
        self.read(operate::keys).await
    }

    async fn revoke_key(&self, id: &str, now: Timestamp) -> Result<bool> {
        let id = id.to_owned();
        self.write(move |db| operate::revoke_key(db, &id, now)).await
    }

    async fn keys_used(&self, ids: &[String], now: Timestamp) -> Result<()> {
        let ids = ids.to_vec();
        self.write(move |db| operate::keys_used(db, &ids, now)).await
    }

    async fn attempts(&self, id: MessageId) -> Result<Vec<Attempt>> {
        self.read(move |db| read::attempts(db, id)).await
    }

    async fn overview(&self, now: Timestamp) -> Result<Overview> {
        self.read(move |db| read::overview(db, now)).await
    }
}

impl From<rusqlite::Error> for StoreError {
    fn from(error: rusqlite::Error) -> StoreError {
        use rusqlite::ErrorCode;
        let rusqlite::Error::SqliteFailure(failure, sentence) = &error else {
            return StoreError::Internal(error.to_string());
        };
        let sentence = sentence.clone().unwrap_or_else(|| failure.to_string());
        match failure.code {
            ErrorCode::ConstraintViolation | ErrorCode::TypeMismatch | ErrorCode::TooBig => {
                StoreError::Refused(sentence)
            }
            ErrorCode::DatabaseBusy
            | ErrorCode::DatabaseLocked
            | ErrorCode::SystemIoFailure
            | ErrorCode::DiskFull
            | ErrorCode::CannotOpen
            | ErrorCode::ReadOnly => StoreError::Unavailable(sentence),
            _ => StoreError::Internal(sentence),
        }
    }
}

/// Settings of every connection.
fn set_up(connection: &Connection) -> rusqlite::Result<()> {
    connection.busy_timeout(LOCK_WAIT)?;
    connection.set_prepared_statement_cache_capacity(STATEMENTS);
    // Else each new value of a parameter has the statement parsed and planned anew: two thirds of the time
    // of a producer at rest.
    connection.set_db_config(DbConfig::SQLITE_DBCONFIG_ENABLE_QPSG, true)?;
    connection.execute_batch("pragma foreign_keys = off; pragma temp_store = memory")
}

/// Settings of the writing connection of a file: a commit is on the disk before it is answered.
fn prepare_file(connection: &Connection) -> rusqlite::Result<()> {
    set_up(connection)?;
    let mode: String = connection.query_row("pragma journal_mode = wal", [], |row| row.get(0))?;
    if mode != "wal" {
        tracing::warn!("the store's journal is {mode}, not wal: reads will wait for writes");
    }
    connection.execute_batch(
        "pragma synchronous = full; pragma wal_autocheckpoint = 1000; pragma cache_size = -24576; \
         pragma journal_size_limit = 67108864",
    )
}

fn lock(connection: &Mutex<Connection>) -> std::sync::MutexGuard<'_, Connection> {
    connection.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
