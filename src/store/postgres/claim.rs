//! Claims: from the feeds and from what waits, into batches.

use std::sync::{Mutex, PoisonError};

use deadpool_postgres::Object;
use serde_json::value::RawValue;
use tokio_postgres::Row;
use tokio_postgres::types::{Json, ToSql};

use super::{read, read_all};
use crate::clock::Timestamp;
use crate::message::MessageId;
use crate::store::{
    BATCH_BYTES, BATCH_MAX, Batch, BatchId, Claim, Claimed, Due, DueNow, EndpointId, InstanceId, LogPosition,
    Result, StoreError, Urgency, limit, unreadable_reason,
};
use crate::ticket::Ticket;

/// [`BATCH_BYTES`] as the statements take it.
const BYTES: i64 = BATCH_BYTES as i64;
/// Claims until the feed is moved on although nothing was new: a feed that stands still for long has more transactions to
/// look for that may have committed late. A claim comes at most every few milliseconds.
const CLAIMS: u32 = 200;

/// What this process knows of the feeds, to spare questions. All of it may be wrong: then a claim is made in vain.
#[derive(Debug, Default)]
pub(super) struct Feeds([Mutex<Feed>; 3]);

#[derive(Debug, Default)]
struct Feed {
    /// The server's snapshot when nothing new was found: as long as it stays the same, no transaction has ended.
    idle_at: Option<String>,
    claims: u32,
}

impl Feeds {
    fn with<T>(&self, urgency: Urgency, act: impl FnOnce(&mut Feed) -> T) -> T {
        let [urgent, normal, bulk] = &self.0;
        let feed = match urgency {
            Urgency::Urgent => urgent,
            Urgency::Normal => normal,
            Urgency::Bulk => bulk,
        };
        act(&mut feed.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// A mask with all of its first `n` bits set, of the length of every mask.
macro_rules! all_left {
    () => {
        "rpad(repeat('1', n), 2048, '0')::varbit"
    };
}
const _: () = assert!(BATCH_MAX == 2048, "the statements write masks of this length");

/// The condition of a class of priority, as its index has it.
macro_rules! condition {
    (urgent) => {
        "priority > 0"
    };
    (normal) => {
        "priority = 0"
    };
    (bulk) => {
        "priority < 0"
    };
}

/// The condition of a class of priority.
pub(super) fn condition_of(urgency: Urgency) -> &'static str {
    match urgency {
        Urgency::Urgent => condition!(urgent),
        Urgency::Normal => condition!(normal),
        Urgency::Bulk => condition!(bulk),
    }
}

/// What a feed shows to a claim: `f`, all transactions that `upto` shows and `done` does not; and `late`, those of them that
/// were open when `done` was taken.
macro_rules! window {
    () => {
        "f as materialized ( \
                 select class, seq, done, at_tx, at_id, base_id, \
                     case when at_tx is null then pg_current_snapshot() else upto end as upto \
                 from feed where class = $1 order by seq desc limit 1), \
             late as materialized ( \
                 select x from f, pg_snapshot_xip(f.done) x \
                 where pg_visible_in_snapshot(x, f.upto) and (f.at_tx is null or x >= f.at_tx)),"
    };
}

/// The messages of a window behind its position, in its order.
macro_rules! unread {
    ($condition:expr, $columns:expr, $limit:literal) => {
        concat!(
            "(select m.* from late l cross join lateral ( \
                     select ",
            $columns,
            " from messages where ",
            $condition,
            " and (tx, id) > (l.x, (select greatest(case when f.at_tx = l.x then f.at_id end, base_id) from f)) \
                         and tx <= l.x \
                     order by tx, id limit ",
            $limit,
            ") m limit ",
            $limit,
            ") \
                 union all \
                 (select ",
            $columns,
            " from messages where ",
            $condition,
            " and (tx, id) > ((select greatest(pg_snapshot_xmax(done), at_tx) from f), \
                         (select case when at_tx >= pg_snapshot_xmax(done) then at_id else -1 end from f)) \
                     and tx < (select pg_snapshot_xmax(upto) from f) \
                     and pg_visible_in_snapshot(tx, (select upto from f)) and id > (select base_id from f) \
                 order by tx, id limit ",
            $limit,
            ")"
        )
    };
}

/// Whether the breaker `b` of an endpoint is open: as [`crate::breaker::is_open`].
macro_rules! is_open {
    () => {
        "b.until > $7 and b.until <= $7 + interval '25 h'"
    };
}

/// What a claimed row is to become, in this order. Nothing is sorted on the way: a ticket's position is its place among the
/// rows that come, and whatever order that is, the batch has the same, because both come from one table of this statement.
/// Contents pass through two tables only, because each more costs 0.4 us a message (measured).
///
/// A late transaction is a range of one, because for `tx = x order by id` the planner may walk the primary key until it has
/// found enough, which for a transaction that was rolled back is to its end.
///
/// Saturated endpoints are looked up in a set, because `= any` compares each name with each: thousands may hang.
///
/// The feed is moved by a guard in its own predicate: PostgreSQL re-reads a row that it has waited for but keeps the
/// statement's old snapshot, so two claims that only locked it would take the same rows.
macro_rules! claim_new {
    ($name:literal, $condition:expr) => {
        concat!(
            "/* ams:claim_",
            $name,
            " */ with ",
            window!(),
            " r as materialized (select u.*, row_number() over w as place, \
                     sum(octet_length(content) + coalesce(octet_length(headers::text), 0)) over w as bytes \
                 from (",
            unread!($condition, claimed_columns!(), "$2"),
            ") u window w as (rows unbounded preceding) limit $2), \
             a as materialized (select array_agg(id) as ids, array_agg(tx) as txs, min(id) as lo, max(id) as hi, \
                     count(*)::int as n, \
                     count(*) = $2 or (select count(*) from r) > count(*) as more \
                 from r where place = 1 or bytes <= $9), \
             k as materialized (select message_id from cancels \
                 where message_id between (select lo from a) and (select hi from a)), \
             d as materialized ( \
                 select n.endpoint, coalesce(e.id, s.id) as endpoint_id, coalesce(e.enabled, false) as enabled, e.rate_count is not null as rated, \
                     n.endpoint in (select unnest($6::text[])) or coalesce(",
            is_open!(),
            ", false) as busy \
                 from (select distinct endpoint from r) n left join endpoints e on e.name = n.endpoint \
                     left join unknown_endpoints s on s.name = n.endpoint left join breakers b on b.endpoint_id = e.id), \
             classed as materialized ( \
                 select r.*, d.endpoint_id, case \
                         when (select count(*) from k) > 0 and r.id in (select message_id from k) then 'cancelled' \
                         when expires_at <= $7 then 'expired' \
                         when send_at > $7 then 'scheduled' \
                         when not d.enabled then 'disabled' \
                         when d.busy then 'busy' \
                         when d.rated then 'rated' \
                         else 'queued' end as way \
                 from r join d on d.endpoint = r.endpoint where place = 1 or bytes <= $9), \
             m as (update feed set seq = f.seq + 1, upto = f.upto, \
                     done = case when more then f.done else f.upto end, \
                     at_tx = case when more then txs[n] end, \
                     at_id = case when more then ids[n] end \
                 from f, a where feed.class = f.class and feed.seq = f.seq and (n > 0 or $8 or f.at_tx is not null) \
                 returning 1), \
             named as (insert into unknown_endpoints (name) \
                 select distinct endpoint from classed where endpoint_id is null and exists (select from m) \
                 on conflict do nothing returning name, id), \
             kd as (delete from cancels x where (select count(*) from k) > 0 and exists (select from m) \
                 and x.message_id = any(array(select id from classed where way = 'cancelled'))), \
             ended as (insert into deliveries (message_id, endpoint_id, status, attempts, lane, finished_at) \
                 select id, coalesce(endpoint_id, (select n.id from named n where n.name = endpoint)), 'expired', 0, '', $7 \
                 from classed where way = 'expired' and exists (select from m)), \
             w as (insert into waiting (message_id, endpoint_id, due_at, held, attempts, lane, lane_tries, priority, expires_at) \
                 select id, coalesce(endpoint_id, (select n.id from named n where n.name = endpoint)), \
                     case way when 'scheduled' then send_at else $7 end, \
                     case way when 'disabled' then 'endpoint_disabled' when 'busy' then 'endpoint_busy' when 'rated' then 'endpoint_rate' end, \
                     0, '', 0, priority, expires_at \
                 from classed where way in ('scheduled', 'disabled', 'busy', 'rated') and exists (select from m)), \
             g as materialized (select array_agg(id) as ids, array_agg(endpoint_id) as endpoints, \
                     min(id) as lo, max(id) as hi, count(*)::int as n \
                 from classed where way = 'queued' and exists (select from m)), \
             b as (insert into batches (id, root, lane, owner, lo, hi, ids, endpoints, \"left\", created_at) \
                 select $5, $5, $3, $4, lo, hi, ids, endpoints, ",
            all_left!(),
            ", $7 from g where n > 0) \
             select q.id, q.endpoint_id, q.endpoint, q.created_at, q.recipient, q.content, \
                 q.content_type, q.headers, q.ordering_key, q.priority, q.expires_at, 1, 0, null::timestamptz, \
                 a.n, case when a.n = 0 then (select upto::text from f) end as idle_at, (select count(*) from m) > 0, \
                 (select at_tx is not null from f) and (select count(*) from m) > 0 \
             from a left join (select * from classed where way = 'queued' and exists (select from m)) q on true"
        )
    };
}

macro_rules! claimed_columns {
    () => {
        "id, tx, endpoint, created_at, recipient, content, content_type, headers, ordering_key, priority, send_at, expires_at"
    };
}

pub(super) const URGENT: &str = claim_new!("urgent", condition!(urgent));
pub(super) const NORMAL: &str = claim_new!("normal", condition!(normal));
pub(super) const BULK: &str = claim_new!("bulk", condition!(bulk));

/// Moves a feed past its next message, and names it. As a claim of one, without the columns that may be unreadable.
macro_rules! next_new {
    ($condition:expr) => {
        concat!(
            "/* ams:next_new */ with ",
            window!(),
            " c as materialized (select id, tx from (",
            unread!($condition, "id, tx", "1"),
            ") u limit 1), \
             moved as (update feed set seq = f.seq + 1, upto = f.upto, at_tx = c.tx, at_id = c.id \
                 from f, c where feed.class = f.class and feed.seq = f.seq returning 1) \
             select c.id, coalesce((select id from endpoints where name = m.endpoint), \
                 (select id from unknown_endpoints where name = m.endpoint), 0) \
             from c cross join lateral (select endpoint from messages where messages.id = c.id limit 1) m \
             where exists (select from moved)"
        )
    };
}

/// What is due is deleted from `waiting`; a row whose delivery has ended meanwhile just goes. Rows are named by an array of
/// their places, and each message and delivery is looked up by a limited select: as joins they are planned as a walk
/// through whole tables. The endpoint is looked up twice, because one that was made while its name got a number in
/// `unknown_endpoints` has two.
pub(super) const TIMED: &str = concat!(
    "/* ams:claim_timed */ with w as materialized ( \
         select x.place, x.number, \
             case when not coalesce(e.enabled, same.enabled, false) then 'endpoint_disabled' \
                 when ",
    is_open!(),
    " then 'endpoint_busy' \
                 when coalesce(e.rate_count, same.rate_count) is not null and not x.reserved then 'endpoint_rate' end as held, \
             sum(m.bytes) over (order by x.number) as bytes \
         from (select ctid as place, endpoint_id, message_id, reserved, row_number() over () as number from ( \
                 select ctid, endpoint_id, message_id, reserved from waiting where lane = $1 and held is null and due_at <= $6 \
                 order by due_at, message_id limit $2) y) x \
             cross join lateral (select octet_length(content) + coalesce(octet_length(headers::text), 0) as bytes \
                 from messages where id = x.message_id limit 1) m \
             left join endpoints e on e.id = x.endpoint_id \
             left join unknown_endpoints u on u.id = x.endpoint_id left join endpoints same on same.name = u.name \
             left join breakers b on b.endpoint_id = x.endpoint_id), \
     d as materialized (select * from w where number = 1 or bytes <= $8), \
     disabled as (update waiting x set held = 'endpoint_disabled', reserved = false \
         where x.ctid = any(array(select place from d where held = 'endpoint_disabled')) \
         and coalesce(x.held is null, false) returning 1), \
     rated as (update waiting x set held = 'endpoint_rate' \
         where x.ctid = any(array(select place from d where held = 'endpoint_rate')) \
         and coalesce(x.held is null, false) returning 1), \
     busy as (update waiting x set held = 'endpoint_busy', reserved = false \
         where x.ctid = any(array(select place from d where held = 'endpoint_busy')) \
         and coalesce(x.held is null, false) returning 1), \
     u as (delete from waiting x where x.ctid = any(array(select place from d where held is null)) \
         and coalesce(x.held is null and x.due_at <= $6, false) \
         returning x.message_id, x.endpoint_id, x.attempts, x.lane_tries, x.due_at, x.priority, x.expires_at), \
     j as materialized (select u.*, u.expires_at <= $7 as expired from u where ( \
         select true from deliveries f where f.message_id = u.message_id and f.endpoint_id = u.endpoint_id limit 1) is null), \
     ended as (insert into deliveries (message_id, endpoint_id, status, attempts, lane, finished_at) \
         select message_id, endpoint_id, 'expired', attempts, '', $7 from j where expired), \
     q as materialized (select j.*, row_number() over (order by due_at, message_id) - 1 as position \
         from j where expired is not true), \
     g as materialized (select array_agg(message_id) as ids, array_agg(endpoint_id) as endpoints, \
             array_agg(attempts) as attempts, array_agg(lane_tries) as lane_tries, array_agg(due_at) as dues, \
             array_agg(expires_at) as expiries, min(message_id) as lo, max(message_id) as hi, count(*)::int as n \
         from (select * from q order by position) q), \
     b as (insert into batches (id, root, lane, owner, lo, hi, ids, endpoints, attempts, lane_tries, dues, expiries, \
             \"left\", created_at) \
         select $5, $5, $3, $4, lo, hi, ids, endpoints, attempts, lane_tries, dues, expiries, ",
    all_left!(),
    ", $7 from g where n > 0) \
     select q.message_id, q.endpoint_id, q.endpoint, q.created_at, q.recipient, q.content, q.content_type, \
         q.headers, q.ordering_key, q.priority, q.expires_at, q.attempts + 1, q.lane_tries, \
         case when q.due_at > $7 then q.due_at end, (select count(*)::int from d) \
     from (select 1) one left join (select q.*, m.* from q cross join lateral ( \
         select endpoint, created_at, recipient, content, content_type, headers, ordering_key \
         from messages where id = q.message_id limit 1) m) q on true order by q.position"
);

/// Which of these lanes have something due. Ordered as the claims are, so that it walks their index whatever the
/// statistics say.
pub(super) const DUE: &str = "/* ams:due */ select pg_current_snapshot()::text, \
     array(select l.lane from unnest($1::text[]) l(lane) cross join lateral ( \
         select message_id from waiting where held is null and lane = l.lane and due_at <= $2 \
         order by due_at, message_id limit 1) t)";

/// The whole of a look at rest: equal to the last one, no transaction has ended since.
const SNAPSHOT: &str = "/* ams:snapshot */ select pg_current_snapshot()::text";

/// What may be due.
pub(super) async fn due(db: &Object, feeds: &Feeds, lanes: &[&str], by: Timestamp) -> Result<DueNow> {
    let row = if lanes.is_empty() {
        db.query_one(&db.prepare_cached(SNAPSHOT).await?, &[]).await?
    } else {
        db.query_one(&db.prepare_cached(DUE).await?, &[&lanes, &by]).await?
    };
    let snapshot: &str = row.try_get(0)?;
    let is_idle = |urgency| feeds.with(urgency, |feed| feed.idle_at.as_deref() == Some(snapshot));
    Ok(DueNow {
        new: !Urgency::ALL.into_iter().all(is_idle),
        lanes: if lanes.is_empty() { Vec::new() } else { row.try_get(1)? },
    })
}

/// Takes what is due.
///
/// The server gives all rows of a claim or none. When it can't give one of them (its bytes are no UTF-8, its page is
/// damaged), the claim takes fewer, and when it can't give even the first alone, that one ends here.
pub(super) async fn claim(db: &mut Object, feeds: &Feeds, claim: &Claim<'_>) -> Result<Claimed> {
    let mut smaller = Claim { limit: claim.limit.min(BATCH_MAX), ..claim.clone() };
    loop {
        match claim_rows(db, feeds, &smaller).await {
            Err(StoreError::Refused(why)) if smaller.limit > 1 => {
                tracing::debug!("a claim of {} rows failed ({why}); fewer are taken", smaller.limit);
                smaller.limit /= 2;
            }
            Err(error @ StoreError::Refused(_)) => {
                return end_unreadable(db, claim).await?.ok_or(error);
            }
            claimed => return claimed,
        }
    }
}

async fn claim_rows(db: &Object, feeds: &Feeds, claim: &Claim<'_>) -> Result<Claimed> {
    let rows = match claim.due {
        Due::New(urgency) => return claim_new(db, feeds, claim, urgency).await,
        Due::Timed { lane, by } => {
            let (statement, limit) = (db.prepare_cached(TIMED).await?, limit(claim.limit));
            let values: [&(dyn ToSql + Sync); 8] =
                [&lane, &limit, &claim.lane, &claim.owner.0, &claim.batch.0, &by, &claim.now, &BYTES];
            db.query(&statement, &values).await?
        }
    };
    let tickets = tickets(&rows, claim.batch)?;
    Ok(Claimed { tickets, seen: seen(&rows)?, unreadable: Vec::new() })
}

async fn claim_new(db: &Object, feeds: &Feeds, claim: &Claim<'_>, urgency: Urgency) -> Result<Claimed> {
    let statement = match urgency {
        Urgency::Urgent => URGENT,
        Urgency::Normal => NORMAL,
        Urgency::Bulk => BULK,
    };
    let statement = db.prepare_cached(statement).await?;
    let (class, limit) = (urgency.number(), limit(claim.limit));
    loop {
        let advance = feeds.with(urgency, |feed| {
            feed.claims += 1;
            feed.claims.is_multiple_of(CLAIMS)
        });
        let values: [&(dyn ToSql + Sync); 9] = [
            &class,
            &limit,
            &claim.lane,
            &claim.owner.0,
            &claim.batch.0,
            &claim.saturated,
            &claim.now,
            &advance,
            &BYTES,
        ];
        let rows = db.query(&statement, &values).await?;
        let Some(first) = rows.first() else { return Ok(Claimed::default()) };
        let (idle_at, moved, ended): (Option<String>, bool, bool) =
            (first.try_get(15)?, first.try_get(16)?, first.try_get(17)?);
        feeds.with(urgency, |feed| feed.idle_at = idle_at);
        let seen = if moved { seen(&rows)? } else { 0 };
        // A window that had nothing left has ended with this claim: the next one is a new look.
        if seen > 0 || !ended {
            let mut tickets = tickets(&rows, claim.batch)?;
            // First come, first served, whatever the order of the statement's rows.
            tickets.sort_unstable_by_key(|ticket| ticket.id);
            return Ok(Claimed { tickets, seen, unreadable: Vec::new() });
        }
    }
}

/// How many rows a claim looked at, which each of its rows says.
fn seen(rows: &[Row]) -> Result<usize> {
    let seen: i32 = rows.first().map_or(Ok(0), |row| row.try_get(14))?;
    Ok(usize::try_from(seen).unwrap_or(0))
}

/// The tickets of a claim's rows, whose positions are their places; the one row of a claim that queued nothing has no id.
fn tickets(rows: &[Row], batch: BatchId) -> Result<Vec<Ticket>> {
    let mut tickets = Vec::with_capacity(rows.len());
    for row in rows {
        if row.try_get::<_, Option<i64>>(0)?.is_some() {
            tickets.push(ticket(row, batch, tickets.len())?);
        }
    }
    Ok(tickets)
}

/// The ticket of a row: id, endpoint_id, endpoint, created_at, recipient, content, content_type, headers,
/// ordering_key, priority, expires_at, attempt, lane_tries and due_at, from the first column on.
pub(super) fn ticket(row: &Row, batch: BatchId, position: usize) -> Result<Ticket> {
    let headers: Option<Json<&RawValue>> = row.try_get(7)?;
    Ok(Ticket {
        id: MessageId(row.try_get(0)?),
        batch,
        position: u16::try_from(position)
            .map_err(|error| StoreError::Internal(format!("a position beyond every mask: {error}")))?,
        endpoint_id: EndpointId(row.try_get(1)?),
        endpoint: row.try_get(2)?,
        created_at: row.try_get(3)?,
        recipient: row.try_get(4)?,
        content: row.try_get(5)?,
        content_type: row.try_get(6)?,
        headers: headers.map(|headers| headers.0.to_owned()),
        ordering_key: row.try_get(8)?,
        priority: row.try_get(9)?,
        expires_at: row.try_get(10)?,
        attempt: row.try_get(11)?,
        lane_tries: row.try_get(12)?,
        due_at: row.try_get(13)?,
    })
}

/// Ends the message that a claim of one could not give, if it is that one which can't be read: nothing else ends a
/// message. The claim is made without reading the message, in the transaction that ends it.
async fn end_unreadable(db: &mut Object, claim: &Claim<'_>) -> Result<Option<Claimed>> {
    let mut transaction = db.transaction().await?;
    let first = match claim.due {
        Due::New(urgency) => {
            let next = match urgency {
                Urgency::Urgent => next_new!(condition!(urgent)),
                Urgency::Normal => next_new!(condition!(normal)),
                Urgency::Bulk => next_new!(condition!(bulk)),
            };
            transaction.query_opt(next, &[&urgency.number()]).await?
        }
        Due::Timed { lane, by } => transaction.query_opt(NEXT_TIMED, &[&lane, &by]).await?,
    };
    let Some(first) = first else { return Ok(None) };
    let (id, endpoint_id): (i64, i32) = (first.try_get(0)?, first.try_get(1)?);
    let reading = transaction.savepoint("reading").await?;
    let Err(StoreError::Refused(why)) = read::messages(&reading, &[id]).await else { return Ok(None) };
    reading.rollback().await?;
    let end = "/* ams:end_unreadable */ insert into deliveries \
               (message_id, endpoint_id, status, attempts, lane, finished_at, reason) values ($1, $2, 'dead', 0, '', $3, $4)";
    transaction.execute(end, &[&id, &endpoint_id, &claim.now, &unreadable_reason(&why)]).await?;
    transaction.commit().await?;
    Ok(Some(Claimed { seen: 1, unreadable: vec![MessageId(id)], ..Claimed::default() }))
}

/// Takes the first that waits, without its message.
const NEXT_TIMED: &str = "/* ams:next_timed */ delete from waiting where ctid = any(array( \
         select ctid from waiting where held is null and lane = $1 and due_at <= $2 order by due_at, message_id limit 1)) \
     returning message_id, endpoint_id";

/// Notes where the broker put a batch.
pub(super) async fn acknowledge(db: &Object, batch: BatchId, at: LogPosition) -> Result<()> {
    let statement = db
        .prepare_cached(
            "/* ams:acknowledge */ update batches set partition = $2, last_offset = $3 where id = $1",
        )
        .await?;
    db.execute(&statement, &[&batch.0, &at.partition, &at.offset]).await?;
    Ok(())
}

/// The oldest batches.
pub(super) async fn batches(db: &Object, now: Timestamp, count: usize) -> Result<Vec<Batch>> {
    let statement = db
        .prepare_cached(
            "/* ams:batches */ select id, lane, owner, partition, last_offset, not exists ( \
                 select 1 from instances where instances.id = batches.owner and lease_until > $1) \
             from batches order by created_at, id limit $2",
        )
        .await?;
    let rows = db.query(&statement, &[&now, &limit(count)]).await?;
    read_all(&rows, |row| {
        let (partition, offset): (Option<i32>, Option<i64>) = (row.try_get(3)?, row.try_get(4)?);
        Ok(Batch {
            id: BatchId(row.try_get(0)?),
            lane: row.try_get(1)?,
            owner: InstanceId(row.try_get(2)?),
            log_position: partition.zip(offset).map(|(partition, offset)| LogPosition { partition, offset }),
            orphaned: row.try_get(5)?,
        })
    })
}
