//! The store on PostgreSQL.
//!
//! Every statement is right as a generic plan and run as one (`plan_cache_mode`): the planner's other
//! choice once read a partition to its end. Rows are named by `id = any(…)` or by an array of their places, never by
//! a join alone, which is planned as a join with the whole table.
//!
//! Nothing here calls [`Row::get`], which panics on a value that it can't hold: `try_get` gives an error.

mod begin;
mod breaker;
mod claim;
mod hold;
mod insert;
mod left;
mod mask;
mod operate;
mod rate;
mod read;
mod reconcile;
mod record;
mod registry;
mod retention;
mod schema;
mod scratch;
mod search;
mod time;
mod tls;

use std::str::FromStr;
use std::time::Duration;

use async_trait::async_trait;
use deadpool_postgres::{Manager, ManagerConfig, Object, Pool, QueueMode, RecyclingMethod, Runtime};
use tokio_postgres::error::SqlState;
use tokio_postgres::{Config, Row};
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

pub use scratch::Scratch;

/// Connections of a process for its work: one for each thing that a producer, a janitor and two consumers may do at once.
const CONNECTIONS: usize = 6;
/// And for what people ask: however many ask at once, heartbeats and work wait for none of it.
const READS: usize = 2;
/// The server ends a statement after this long.
const STATEMENT_TIMEOUT_MS: u32 = 30_000;
/// We stop waiting for a server that has fallen silent after this long.
const CALL: Duration = Duration::from_secs(35);
/// The longest a connection may take.
const CONNECT: Duration = Duration::from_secs(5);

/// Where the server is, and how it is spoken to.
#[derive(Clone)]
pub struct PostgresOptions {
    config: Config,
    verify: bool,
}

impl PostgresOptions {
    /// Options from a connection URL. `sslmode` may be `disable`, `prefer`, `require` (both without
    /// checking who answers) or `verify-full`.
    ///
    /// # Errors
    /// When the URL can't be understood.
    pub fn parse(url: &str) -> Result<PostgresOptions> {
        let verify = url.contains("sslmode=verify-full");
        let url = url.replace("sslmode=verify-full", "sslmode=require");
        let mut config = Config::from_str(&url).map_err(|error| StoreError::Refused(unreadable(&error)))?;
        // A generic plan that is made while a partition is empty would read that partition whole, later when it
        // is full; every statement has its index. A bitmap reads all that an index has, whatever order and limit ask for,
        // and for a table that an `analyze` has seen empty it seems as good as any. Costs that only rule out a plan must not start the JIT compiler.
        // Last, so that of a setting that the URL has as well ours counts; its other ones do, such as a search path.
        let options = format!(
            "{} -c plan_cache_mode=force_generic_plan -c enable_seqscan=off -c enable_bitmapscan=off -c jit=off \
             -c statement_timeout={STATEMENT_TIMEOUT_MS} -c timezone=UTC",
            config.get_options().unwrap_or_default()
        );
        config
            .application_name("ams")
            .options(options.trim_start())
            .connect_timeout(CONNECT)
            .keepalives_idle(Duration::from_secs(10))
            .keepalives_interval(Duration::from_secs(5))
            .tcp_user_timeout(Duration::from_secs(20));
        Ok(PostgresOptions { config, verify })
    }
}

/// Why a URL can't be understood. The driver repeats parts of it, which may be a password: of what it says only
/// the names of its own options are told.
fn unreadable(error: &tokio_postgres::Error) -> String {
    let says = std::error::Error::source(error).map(ToString::to_string).unwrap_or_default();
    let why = if says.starts_with("invalid value for option") { format!(": {says}") } else { String::new() };
    format!(
        "DATABASE_URL can't be understood{why}; write for example postgres://user:password@host:5432/database, \
         and / ? # @ % of a password as %2F %3F %23 %40 %25"
    )
}

/// A store on a PostgreSQL server.
pub struct PostgresStore {
    pool: Pool,
    reads: Pool,
    options: PostgresOptions,
    feeds: claim::Feeds,
}

impl PostgresStore {
    /// A store on this server, which need not be up yet.
    ///
    /// # Errors
    /// When the options can't be used.
    pub fn open(options: &PostgresOptions) -> Result<PostgresStore> {
        Ok(PostgresStore {
            pool: pool(options, CONNECTIONS)?,
            reads: pool(options, READS)?,
            options: options.clone(),
            feeds: claim::Feeds::default(),
        })
    }

    /// Runs a call on a connection of the pool, within its time. A connection whose call was cut off is
    /// in an unknown state and is thrown away.
    async fn call<T>(&self, call: impl AsyncFnOnce(&mut Object) -> Result<T>) -> Result<T> {
        call_on(&self.pool, call).await
    }

    /// The same on a connection for what people ask.
    async fn read<T>(&self, call: impl AsyncFnOnce(&mut Object) -> Result<T>) -> Result<T> {
        call_on(&self.reads, call).await
    }
}

fn pool(options: &PostgresOptions, size: usize) -> Result<Pool> {
    let manager = ManagerConfig { recycling_method: RecyclingMethod::Fast };
    let tls = tls::connector(options.verify);
    let manager = Manager::from_config(options.config.clone(), tls, manager);
    Pool::builder(manager)
        .max_size(size)
        // Used last, used first: a connection that rests has still to plan its statements.
        .queue_mode(QueueMode::Lifo)
        .runtime(Runtime::Tokio1)
        .wait_timeout(Some(CALL))
        .create_timeout(Some(CONNECT))
        .build()
        .map_err(|error| StoreError::Internal(error.to_string()))
}

async fn connection(pool: &Pool) -> Result<Object> {
    pool.get().await.map_err(|error| match error {
        deadpool_postgres::PoolError::Backend(error) => StoreError::from(error),
        other => StoreError::Unavailable(other.to_string()),
    })
}

async fn call_on<T>(pool: &Pool, call: impl AsyncFnOnce(&mut Object) -> Result<T>) -> Result<T> {
    let mut connection = connection(pool).await?;
    match tokio::time::timeout(CALL, call(&mut connection)).await {
        Ok(answer) => answer,
        Err(_) => {
            drop(Object::take(connection));
            Err(StoreError::Unavailable(format!("no answer within {CALL:?}")))
        }
    }
}

impl From<tokio_postgres::Error> for StoreError {
    fn from(error: tokio_postgres::Error) -> StoreError {
        let Some(database) = error.as_db_error() else {
            // Without an answer from the server the connection is to blame, or a value of ours that
            // can't be sent at all.
            let sentence = with_source(&error);
            return match error.is_closed()
                || std::error::Error::source(&error).is_some_and(|e| e.is::<std::io::Error>())
            {
                true => StoreError::Unavailable(sentence),
                false if sentence.contains("serializ") => StoreError::Internal(sentence),
                false => StoreError::Unavailable(sentence),
            };
        };
        let sentence = match database.constraint() {
            Some(constraint) if database.code() == &SqlState::CHECK_VIOLATION => {
                format!("{} ({constraint})", database.message())
            }
            _ => database.message().to_owned(),
        };
        match database.code().code() {
            "42P01" | "42703" => {
                StoreError::Unavailable(format!("{sentence}; is it migrated? Run `ams migrate`"))
            }
            code if matches!(&code[..2], "08" | "40" | "53" | "57") => StoreError::Unavailable(sentence),
            "55P03" | "25006" | "3D000" => StoreError::Unavailable(sentence),
            // The last two: somebody's trigger says no, and a damaged page.
            code if matches!(&code[..2], "22" | "23" | "54") || matches!(code, "P0001" | "XX001") => {
                StoreError::Refused(sentence)
            }
            code if code.starts_with("28") => {
                StoreError::Unavailable(format!("{sentence}; mend user or password"))
            }
            code => StoreError::Internal(format!("{sentence} (SQLSTATE {code})")),
        }
    }
}

/// An error with what caused it: tokio-postgres says "error connecting to server" and keeps the rest inside.
fn with_source(error: &tokio_postgres::Error) -> String {
    match std::error::Error::source(error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    }
}

/// What `read` makes of each row.
fn read_all<T>(rows: &[Row], read: impl Fn(&Row) -> Result<T>) -> Result<Vec<T>> {
    rows.iter().map(read).collect()
}

/// The first column of each row.
fn first_column<T>(rows: &[Row]) -> Result<Vec<T>>
where
    T: for<'a> tokio_postgres::types::FromSql<'a>,
{
    read_all(rows, |row| Ok(row.try_get(0)?))
}

/// The lowest and the highest id: the bounds that prune partitions.
fn bounds(ids: &[i64]) -> (i64, i64) {
    (ids.iter().copied().min().unwrap_or(0), ids.iter().copied().max().unwrap_or(0))
}

#[async_trait]
impl Store for PostgresStore {
    fn kind(&self) -> &'static str {
        "postgres"
    }

    async fn migrate(&self) -> Result<Vec<String>> {
        schema::migrate(&self.options).await
    }

    async fn schema_version(&self) -> Result<SchemaVersion> {
        self.call(async |db| schema::schema_version(db).await).await
    }

    async fn installation(&self) -> Result<Uuid> {
        self.call(async |db| registry::installation(db).await).await
    }

    async fn insert(&self, messages: &[NewMessage], now: Timestamp) -> Result<Vec<Inserted>> {
        self.call(async |db| insert::insert(db, messages, now).await).await
    }

    async fn insert_whole(&self, messages: &[NewMessage], now: Timestamp) -> Result<AllOrNone> {
        self.call(async |db| insert::insert_whole(db, messages, now).await).await
    }

    async fn about(&self) -> Result<About> {
        self.read(async |db| registry::about(db).await).await
    }
}

#[async_trait]
impl Registry for PostgresStore {
    async fn time(&self) -> Result<Option<Timestamp>> {
        self.call(async |db| registry::time(db).await.map(Some)).await
    }

    async fn enroll(
        &self,
        service: &str,
        host: &str,
        now: Timestamp,
        lease_until: Timestamp,
    ) -> Result<InstanceId> {
        self.call(async |db| registry::enroll(db, service, host, now, lease_until).await).await
    }

    async fn renew(&self, instance: InstanceId, now: Timestamp, lease_until: Timestamp) -> Result<bool> {
        self.call(async |db| registry::renew(db, instance, now, lease_until).await).await
    }

    async fn report_saturated(&self, instance: InstanceId, endpoints: &[String]) -> Result<()> {
        self.call(async |db| registry::report_saturated(db, instance, endpoints).await).await
    }

    async fn saturated(&self) -> Result<Vec<String>> {
        self.call(async |db| registry::saturated(db).await).await
    }

    async fn retire(&self, instance: InstanceId) -> Result<()> {
        self.call(async |db| registry::retire(db, instance).await).await
    }

    async fn lead(&self, bid: &Bid) -> Result<Option<Leadership>> {
        self.call(async |db| registry::lead(db, bid).await).await
    }

    async fn endpoints(&self) -> Result<Vec<Endpoint>> {
        self.call(async |db| registry::endpoints(db).await).await
    }

    async fn put_endpoint(&self, endpoint: &Endpoint) -> Result<()> {
        self.call(async |db| registry::put_endpoint(db, endpoint).await).await
    }

    async fn delete_endpoint(&self, name: &str) -> Result<Deletion> {
        self.call(async |db| operate::delete_endpoint(db, name).await).await
    }

    async fn breakers(&self) -> Result<Vec<(String, Breaker)>> {
        self.call(async |db| breaker::breakers(db).await).await
    }

    async fn set_breakers(&self, changes: &[(String, Option<Breaker>)]) -> Result<Vec<bool>> {
        self.call(async |db| breaker::set_breakers(db, changes).await).await
    }

    async fn probe(&self, endpoints: &[(String, Timestamp)], now: Timestamp) -> Result<Vec<String>> {
        self.call(async |db| breaker::probe(db, endpoints, now).await).await
    }

    async fn lanes(&self) -> Result<Vec<Lane>> {
        self.call(async |db| registry::lanes(db).await).await
    }

    async fn put_lane(&self, lane: &Lane, now: Timestamp) -> Result<Option<Lane>> {
        self.call(async |db| registry::put_lane(db, lane, now).await).await
    }

    async fn lane_groups(&self) -> Result<Vec<LaneGroup>> {
        self.call(async |db| registry::lane_groups(db).await).await
    }

    async fn put_lane_group(&self, group: &LaneGroup) -> Result<()> {
        self.call(async |db| registry::put_lane_group(db, group).await).await
    }
}

#[async_trait]
impl Scheduling for PostgresStore {
    async fn due(&self, lanes: &[&str], by: Timestamp) -> Result<DueNow> {
        self.call(async |db| claim::due(db, &self.feeds, lanes, by).await).await
    }

    async fn claim(&self, claim: &Claim<'_>) -> Result<Claimed> {
        self.call(async |db| claim::claim(db, &self.feeds, claim).await).await
    }

    async fn acknowledge(&self, batch: BatchId, at: LogPosition) -> Result<()> {
        self.call(async |db| claim::acknowledge(db, batch, at).await).await
    }

    async fn batches(&self, now: Timestamp, limit: usize) -> Result<Vec<Batch>> {
        self.call(async |db| claim::batches(db, now, limit).await).await
    }

    async fn reissue(&self, reissue: &Reissue) -> Result<Option<Reissued>> {
        self.call(async |db| begin::reissue(db, reissue).await).await
    }

    async fn held(&self) -> Result<Vec<(String, Held)>> {
        self.call(async |db| hold::held(db).await).await
    }

    async fn unhold(&self, wanted: &[Unhold], held: Held, now: Timestamp) -> Result<Vec<u64>> {
        self.call(async |db| hold::unhold(db, wanted, held, now).await).await
    }

    async fn reserve(&self, from: Timestamp, until: Timestamp) -> Result<u64> {
        self.call(async |db| rate::reserve(db, from, until).await).await
    }

    async fn next_reserved(&self, endpoint: &str) -> Result<Option<Timestamp>> {
        self.read(async |db| rate::next_reserved(db, endpoint).await).await
    }

    async fn expire(&self, now: Timestamp, limit: usize) -> Result<u64> {
        self.call(async |db| hold::expire(db, now, limit).await).await
    }
}

#[async_trait]
impl Execution for PostgresStore {
    async fn begin(&self, begin: &Begin<'_>) -> Result<Vec<Begun>> {
        self.call(async |db| begin::begin(db, begin).await).await
    }

    async fn record(&self, records: &Records<'_>) -> Result<Vec<MessageId>> {
        self.call(async |db| record::record(db, records).await).await
    }

    async fn hold(&self, lane: &str, tickets: &[Ticket], held: Held, now: Timestamp) -> Result<u64> {
        self.call(async |db| hold::hold(db, lane, tickets, held, now).await).await
    }

    async fn dead_letters(&self, before: Timestamp, limit: usize) -> Result<Vec<DeadLetter>> {
        self.call(async |db| read::dead_letters(db, before, limit).await).await
    }

    async fn dead_lettered(&self, ids: &[MessageId]) -> Result<()> {
        self.call(async |db| record::dead_lettered(db, ids).await).await
    }
}

#[async_trait]
impl Upkeep for PostgresStore {
    async fn recover(&self, recovery: &Recovery<'_>) -> Result<Recovered> {
        self.call(async |db| begin::recover(db, recovery).await).await
    }

    async fn remove_old(&self, removal: &Removal) -> Result<Removed> {
        self.call(async |db| retention::remove_old(db, removal).await).await
    }

    async fn check_feeds(&self, now: Timestamp) -> Result<bool> {
        self.call(async |db| reconcile::check_feeds(db, now).await).await
    }

    async fn reconcile(&self, now: Timestamp, limit: usize) -> Result<Reconciled> {
        self.call(async |db| reconcile::reconcile(db, now, limit).await).await
    }

    async fn reconciliation(&self) -> Result<Reconciliation> {
        self.read(async |db| reconcile::reconciliation(db).await).await
    }

    async fn bring_forward(&self, _by: Duration, _now: Timestamp) -> Result<()> {
        Ok(())
    }

    async fn make_partitions(&self) -> Result<()> {
        self.call(async |db| registry::make_partitions(db).await).await
    }
}

#[async_trait]
impl Operations for PostgresStore {
    async fn message(&self, id: MessageId) -> Result<Option<Message>> {
        self.read(async |db| Ok(read::messages(db, &[id.0]).await?.pop())).await
    }

    async fn messages(&self, ids: &[MessageId]) -> Result<Vec<Message>> {
        let ids: Vec<i64> = ids.iter().map(|id| id.0).collect();
        self.read(async |db| read::messages(db, &ids).await).await
    }

    async fn search(&self, filter: &Filter, from: Cursor, limit: usize) -> Result<Page> {
        self.read(async |db| search::search(db, filter, from, limit).await).await
    }

    async fn change(&self, change: Change, ids: &[MessageId], now: Timestamp) -> Result<Vec<MessageId>> {
        self.call(async |db| {
            let transaction = db.transaction().await?;
            let changed = operate::change(&transaction, change, ids, now).await?;
            transaction.commit().await?;
            Ok(changed)
        })
        .await
    }

    async fn open_operation(&self, change: Change, filter: &Filter, now: Timestamp) -> Result<Operation> {
        self.call(async |db| operate::open_operation(db, change, filter, now).await).await
    }

    async fn work_operation(
        &self,
        id: OperationId,
        limit: usize,
        now: Timestamp,
    ) -> Result<Option<Operation>> {
        self.call(async |db| operate::work_operation(db, id, limit, now).await).await
    }

    async fn operation(&self, id: OperationId) -> Result<Option<Operation>> {
        self.read(async |db| operate::operation(db, id).await).await
    }

    async fn idle_operations(&self, before: Timestamp) -> Result<Vec<OperationId>> {
        self.call(async |db| operate::idle_operations(db, before).await).await
    }

    async fn dead_reasons(&self) -> Result<Vec<DeadReason>> {
        self.read(async |db| search::dead_reasons(db).await).await
    }

    async fn set_paused(&self, paused: bool) -> Result<()> {
        self.call(async |db| operate::set_paused(db, paused).await).await
    }

    async fn control(&self, now: Timestamp) -> Result<Control> {
        self.read(async |db| operate::control(db, now).await).await
    }

    async fn put_key(&self, key: &ApiKey) -> Result<()> {
        self.call(async |db| operate::put_key(db, key).await).await
    }

    async fn keys(&self) -> Result<Vec<ApiKey>> {
        self.read(async |db| operate::keys(db).await).await
    }

    async fn revoke_key(&self, id: &str, now: Timestamp) -> Result<bool> {
        self.call(async |db| operate::revoke_key(db, id, now).await).await
    }

    async fn keys_used(&self, ids: &[String], now: Timestamp) -> Result<()> {
        self.call(async |db| operate::keys_used(db, ids, now).await).await
    }

    async fn attempts(&self, id: MessageId) -> Result<Vec<Attempt>> {
        self.read(async |db| read::attempts(db, id).await).await
    }

    async fn overview(&self, now: Timestamp) -> Result<Overview> {
        self.read(async |db| read::overview(db, now).await).await
    }
}

#[cfg(test)]
mod tests;
