//! Claims and their ledger.

use deadpool_postgres::Object;
use serde_json::value::RawValue;
use tokio_postgres::Row;
use tokio_postgres::types::{Json, ToSql};

use super::{bounds, by_epoch, limit, read, read_all};
use crate::clock::Timestamp;
use crate::message::{Epoch, MessageId, Ticket};
use crate::store::{
    Batch, BatchId, Claim, Claimed, Due, DueNow, InstanceId, Place, Result, StoreError, unreadable_reason,
};

/// Why a row can't go on a lane now; no value when it can.
macro_rules! held {
    () => {
        "case when m.endpoint <> all($4) then 'endpoint_closed' \
             when m.epoch = 0 and m.endpoint = any($7) then 'endpoint_busy' end"
    };
}

/// A claim: the text of the two differs only in which rows they look at. `materialized` keeps the
/// planner from taking more than the limit; the bounds prune partitions; `skip locked` passes by rows
/// that a person's transaction holds. The rows are updated by an array of their ids, not by a join: a planner
/// that expects one row would read all between the bounds for each (measured: 5.3 s for 995 rows).
macro_rules! claim {
    ($name:literal, $rows:expr) => {
        concat!(
            "/* ams:claim_",
            $name,
            " */ with c as materialized (select id from messages where ",
            $rows,
            " limit $2 for update skip locked), \
             u as (update messages m set \
                 status = case when m.expires_at <= $3 then 'expired' when ",
            held!(),
            " is null then 'queued' else m.status end, \
                 epoch = case when m.expires_at <= $3 then m.epoch else m.epoch + 1 end, \
                 held = case when m.expires_at <= $3 then null else ",
            held!(),
            " end, \
                 due_at = case when m.expires_at <= $3 then null else m.due_at end, \
                 finished_at = case when m.expires_at <= $3 then $3 end \
             where m.id = any(array(select id from c)) \
                 and m.id between (select min(id) from c) and (select max(id) from c) \
             returning m.id, m.epoch, m.attempts + 1, m.endpoint, m.created_at, m.recipient, m.content, \
                 m.content_type, m.headers, m.ordering_key, m.status = 'queued' as queued, \
                 coalesce(m.due_at, m.send_at) as due_at), \
             l as (insert into batches (lane, owner, ids, epochs, created_at) \
                 select $5, $6, array_agg(id), array_agg(epoch), $3 from u where queued having count(*) > 0 \
                 returning id) \
             select u.*, (select id from l) from u"
        )
    };
}

macro_rules! new_rows {
    ($up_to:literal, $passed:literal) => {
        concat!(
            "fresh and id > $1 and id <= ",
            $up_to,
            " and (epoch > 0 or endpoint <> all(",
            $passed,
            ")) order by id"
        )
    };
}

macro_rules! timed_rows {
    ($by:literal) => {
        concat!("timed_at is not null and lane = $1 and timed_at <= ", $by, " order by timed_at, id")
    };
}

pub(super) const NEW: &str = claim!("new", new_rows!("$8", "$9"));
pub(super) const TIMED: &str = claim!("timed", timed_rows!("$8"));

/// The row that a claim would take first.
macro_rules! first {
    ($rows:expr) => {
        concat!("/* ams:first_due */ select id from messages where ", $rows, " limit 1")
    };
}
const FIRST_NEW: &str = first!(new_rows!("$2", "$3"));
const FIRST_TIMED: &str = first!(timed_rows!("$2"));

macro_rules! any_new {
    () => {
        "exists (select from (select id from messages where fresh order by id limit 1) f)"
    };
}

/// Whether any row is new. Apart from [`DUE`], because a statement opens every partition that it names: most
/// of what these two cost.
pub(super) const DUE_NEW: &str = concat!("/* ams:due_new */ select ", any_new!());

/// What is due, for all claims in one. Ordered as the claims are, so that it walks their indexes
/// whatever the statistics say.
pub(super) const DUE: &str = concat!(
    "/* ams:due */ select ",
    any_new!(),
    ", array(select l.lane from unnest($1::text[]) l(lane) cross join lateral ( \
         select id from messages where timed_at is not null and lane = l.lane and timed_at <= $2 \
         order by timed_at, id limit 1) t)"
);

/// What may be due.
pub(super) async fn due(db: &Object, lanes: &[&str], by: Timestamp) -> Result<DueNow> {
    if lanes.is_empty() {
        let statement = db.prepare_cached(DUE_NEW).await?;
        let row = db.query_one(&statement, &[]).await?;
        return Ok(DueNow { new: row.try_get(0)?, lanes: Vec::new() });
    }
    let statement = db.prepare_cached(DUE).await?;
    let row = db.query_one(&statement, &[&lanes, &by]).await?;
    Ok(DueNow { new: row.try_get(0)?, lanes: row.try_get(1)? })
}

/// Takes due rows: most become `queued`, with one ledger row for all.
///
/// The server gives all rows of a claim or none. When it can't give one of them (its bytes are no UTF-8, its page is
/// damaged), the claim takes fewer, and when it can't give even the first alone, that one ends here.
pub(super) async fn claim(db: &Object, claim: &Claim<'_>) -> Result<Claimed> {
    let mut smaller = claim.clone();
    loop {
        match claim_rows(db, &smaller).await {
            Err(StoreError::Refused(why)) if smaller.limit > 1 => {
                tracing::debug!("a claim of {} rows failed ({why}); fewer are taken", smaller.limit);
                smaller.limit /= 2;
            }
            Err(error @ StoreError::Refused(_)) => {
                let Some(ended) = end_unreadable(db, claim).await? else { return Err(error) };
                let unreadable = vec![ended];
                return Ok(Claimed { seen: 1, last: Some(ended), unreadable, ..Claimed::default() });
            }
            claimed => return claimed,
        }
    }
}

/// Ends the first due row as dead if it is the one that can't be read: nothing else ends a message.
async fn end_unreadable(db: &Object, claim: &Claim<'_>) -> Result<Option<MessageId>> {
    let passed = if claim.pass_busy { claim.busy } else { &[] };
    let first = match &claim.due {
        Due::New { after, up_to } => db.query_opt(FIRST_NEW, &[&after.0, &up_to.0, &passed]).await?,
        Due::Timed { lane, by } => db.query_opt(FIRST_TIMED, &[lane, by]).await?,
    };
    let Some(first) = first else { return Ok(None) };
    let id: i64 = first.try_get(0)?;
    let Err(StoreError::Refused(why)) = read::messages(db, &[id]).await else { return Ok(None) };
    let end = "/* ams:end_unreadable */ update messages set status = 'dead', held = null, due_at = null, \
                   finished_at = $2, reason = $3 where id = $1 and status in ('pending', 'retrying')";
    let ended = db.execute(end, &[&id, &claim.now, &unreadable_reason(&why)]).await?;
    Ok((ended > 0).then_some(MessageId(id)))
}

async fn claim_rows(db: &Object, claim: &Claim<'_>) -> Result<Claimed> {
    let (limit, now) = (limit(claim.limit), claim.now);
    let (open, busy, owner) = (claim.open, claim.busy, claim.owner.0);
    let passed = if claim.pass_busy { busy } else { &[] };
    let rows = match claim.due {
        Due::New { after, up_to } => {
            let statement = db.prepare_cached(NEW).await?;
            let values: [&(dyn ToSql + Sync); 9] =
                [&after.0, &limit, &now, &open, &claim.lane, &owner, &busy, &up_to.0, &passed];
            db.query(&statement, &values).await?
        }
        Due::Timed { lane, by } => {
            let statement = db.prepare_cached(TIMED).await?;
            db.query(&statement, &[&lane, &limit, &now, &open, &claim.lane, &owner, &busy, &by]).await?
        }
    };
    let mut claimed = Claimed { seen: rows.len(), ..Claimed::default() };
    for row in &rows {
        claimed.last = claimed.last.max(Some(MessageId(row.try_get(0)?)));
        if row.try_get(10)? {
            let due_at = row.try_get::<_, Option<Timestamp>>(11)?.filter(|at| *at > claim.now);
            claimed.tickets.push(Ticket { due_at, ..ticket(row)? });
            claimed.batch = row.try_get::<_, Option<i64>>(12)?.map(BatchId);
        }
    }
    claimed.tickets.sort_unstable_by_key(|ticket| ticket.id);
    Ok(claimed)
}

/// The ticket of a row: id, epoch, attempt, endpoint, created_at, recipient, content, content_type,
/// headers and ordering_key, from the first column on.
pub(super) fn ticket(row: &Row) -> Result<Ticket> {
    let headers: Option<Json<&RawValue>> = row.try_get(8)?;
    Ok(Ticket {
        id: MessageId(row.try_get(0)?),
        epoch: row.try_get(1)?,
        attempt: row.try_get(2)?,
        endpoint: row.try_get(3)?,
        created_at: row.try_get(4)?,
        recipient: row.try_get(5)?,
        content: row.try_get(6)?,
        content_type: row.try_get(7)?,
        headers: headers.map(|headers| headers.0.to_owned()),
        ordering_key: row.try_get(9)?,
        due_at: None,
    })
}

/// Notes where the broker put a batch.
pub(super) async fn acknowledge(db: &Object, batch: BatchId, place: Place) -> Result<()> {
    let statement = db
        .prepare_cached(
            "/* ams:acknowledge */ update batches set partition = $2, last_offset = $3 where id = $1",
        )
        .await?;
    db.execute(&statement, &[&batch.0, &place.partition, &place.offset]).await?;
    Ok(())
}

/// The oldest ledger rows.
pub(super) async fn batches(db: &Object, now: Timestamp, count: usize) -> Result<Vec<Batch>> {
    let statement = db
        .prepare_cached(
            "/* ams:batches */ select id, lane, owner, created_at, partition, last_offset, not exists ( \
                 select 1 from instances where instances.id = batches.owner and lease_until > $1) \
             from batches order by id limit $2",
        )
        .await?;
    let rows = db.query(&statement, &[&now, &limit(count)]).await?;
    read_all(&rows, |row| {
        let (partition, offset): (Option<i32>, Option<i64>) = (row.try_get(4)?, row.try_get(5)?);
        Ok(Batch {
            id: BatchId(row.try_get(0)?),
            lane: row.try_get(1)?,
            owner: InstanceId(row.try_get(2)?),
            created_at: row.try_get(3)?,
            place: partition.zip(offset).map(|(partition, offset)| Place { partition, offset }),
            orphaned: row.try_get(6)?,
        })
    })
}

/// Gives back what of these batches is still `queued` in their epoch, and removes them.
pub(super) async fn requeue(db: &mut Object, batches: &[BatchId], now: Timestamp) -> Result<u64> {
    let numbers: Vec<i64> = batches.iter().map(|batch| batch.0).collect();
    let transaction = db.transaction().await?;
    let remove = transaction
        .prepare_cached("/* ams:requeue */ delete from batches where id = any($1) returning ids, epochs")
        .await?;
    let mut pairs: Vec<(i64, Epoch)> = Vec::new();
    for row in transaction.query(&remove, &[&numbers]).await? {
        let (ids, epochs): (Vec<i64>, Vec<Epoch>) = (row.try_get(0)?, row.try_get(1)?);
        pairs.extend(ids.into_iter().zip(epochs));
    }
    let mut given = 0;
    for (epoch, ids) in by_epoch(pairs) {
        given += give_back(&transaction, &ids, epoch, "queued", now).await?;
    }
    transaction.commit().await?;
    Ok(given)
}

/// A claimed row as it was before: due by this value, the present, at the earliest, and never before its time.
macro_rules! as_it_was {
    ($now:literal) => {
        concat!(
            "status = case when attempts = 0 then 'pending'::message_state else 'retrying' end, \
             due_at = case when attempts = 0 then null else greatest(due_at, ",
            $now,
            "::timestamptz) end"
        )
    };
}
pub(super) use as_it_was;

/// Gives rows back as they were before their claim when they are `status` in this epoch.
pub(super) async fn give_back(
    db: &deadpool_postgres::Transaction<'_>,
    ids: &[i64],
    epoch: Epoch,
    status: &str,
    now: Timestamp,
) -> Result<u64> {
    let statement = db
        .prepare_cached(concat!(
            "/* ams:give_back */ update messages set ",
            as_it_was!("$6"),
            " where id = any($1) and epoch = $2 and status = $3::text::message_state and id between $4 and $5",
        ))
        .await?;
    let (first, last) = bounds(ids);
    Ok(db.execute(&statement, &[&ids, &epoch, &status, &first, &last, &now]).await?)
}
