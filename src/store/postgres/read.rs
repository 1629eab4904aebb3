//! Reads: messages, attempts, dead letters, and the whole.

use deadpool_postgres::{GenericClient, Object};
use serde_json::Value;
use serde_json::value::RawValue;
use tokio_postgres::Row;
use tokio_postgres::types::Json;

use super::claim::{condition_of, ticket};
use super::{bounds, read_all};
use crate::clock::Timestamp;
use crate::message::{Attempt, Class, Held, Message, MessageId, Status, Times};
use crate::store::{
    BatchId, Count, DeadLetter, Instance, InstanceId, Overview, Result, Urgency, json_or_text,
    latest_present, limit,
};

/// Where counting stops.
const COUNT: i64 = 10_000;

/// The messages with these ids, in id order.
pub(super) async fn messages(db: &impl GenericClient, ids: &[i64]) -> Result<Vec<Message>> {
    let statement = db
        .prepare_cached(
            "/* ams:messages */ select m.id, m.endpoint, m.recipient, m.content, m.content_type, m.headers, m.ordering_key, \
                 m.priority, m.send_at, m.expires_at, m.idempotency_key, m.tags, m.created_at, p.status::text, p.held, \
                 p.attempts, p.lane, case when p.status = 'retrying' then p.due_at end, p.finished_at, p.reason \
             from messages m cross join lateral (select status, held, attempts, lane, due_at, finished_at, reason \
                 from places where message_id = m.id limit 1) p \
             where m.id = any($1) and m.id between $2 and $3 order by m.id",
        )
        .await?;
    let (first, last) = bounds(ids);
    let rows = db.query(&statement, &[&ids, &first, &last]).await?;
    read_all(&rows, |row| {
        Ok(Message {
            id: MessageId(row.try_get(0)?),
            endpoint: row.try_get(1)?,
            recipient: row.try_get(2)?,
            content: row.try_get(3)?,
            content_type: row.try_get(4)?,
            headers: json(row, 5)?,
            ordering_key: row.try_get(6)?,
            priority: row.try_get(7)?,
            send_at: row.try_get(8)?,
            expires_at: row.try_get(9)?,
            idempotency_key: row.try_get(10)?,
            tags: json(row, 11)?,
            created_at: row.try_get(12)?,
            status: Status::read(row.try_get(13)?),
            held: row.try_get::<_, Option<&str>>(14)?.map(Held::read),
            attempts: row.try_get(15)?,
            lane: row.try_get(16)?,
            due_at: row.try_get(17)?,
            finished_at: row.try_get(18)?,
            reason: row.try_get(19)?,
        })
    })
}

fn json(row: &Row, column: usize) -> Result<Option<Value>> {
    let json: Option<Json<&RawValue>> = row.try_get(column)?;
    Ok(json.map(|json| json_or_text(json.0.get())))
}

/// A message's attempts, oldest first.
pub(super) async fn attempts(db: &Object, id: MessageId) -> Result<Vec<Attempt>> {
    let statement = db
        .prepare_cached(
            "/* ams:attempts */ select attempt, lane, class, status, address, error, answer, \
                 provider_message_id, started_at, connect_us, head_us, body_us \
             from attempts where message_id = $1 \
             union all \
             select attempts, lane, 'accepted', http_status, address, null, answer, \
                 provider_message_id, started_at, connect_us, head_us, body_us \
             from deliveries where message_id = $1 and batch is not null \
             order by attempt, started_at",
        )
        .await?;
    let rows = db.query(&statement, &[&id.0]).await?;
    read_all(&rows, |row| {
        Ok(Attempt {
            message_id: id,
            attempt: row.try_get(0)?,
            lane: row.try_get(1)?,
            class: Class::read(row.try_get(2)?),
            status: row.try_get::<_, Option<i16>>(3)?.and_then(|status| u16::try_from(status).ok()),
            address: row.try_get(4)?,
            error: row.try_get(5)?,
            answer: row.try_get(6)?,
            provider_message_id: row.try_get(7)?,
            started_at: row.try_get(8)?,
            times: Times {
                connect_us: row.try_get(9)?,
                head_us: row.try_get(10)?,
                body_us: row.try_get(11)?,
            },
        })
    })
}

/// Dead letters written before a time, oldest first.
pub(super) async fn dead_letters(db: &Object, before: Timestamp, count: usize) -> Result<Vec<DeadLetter>> {
    let statement = db
        .prepare_cached(
            "/* ams:dead_letters */ select m.id, d.endpoint_id, m.endpoint, m.created_at, m.recipient, \
                 m.content, m.content_type, m.headers, m.ordering_key, m.priority, null::timestamptz, d.attempts, 0, \
                 null::timestamptz, d.lane, d.reason, d.last_status, d.last_error, d.dead_at \
             from dead_letters d cross join lateral (select id, endpoint, created_at, recipient, content, content_type, \
                 headers, ordering_key, priority from messages where id = d.message_id limit 1) m \
             where d.dead_at < $1 or d.dead_at > $3 order by d.dead_at, d.message_id limit $2",
        )
        .await?;
    let rows = db.query(&statement, &[&before, &limit(count), &latest_present(before)]).await?;
    read_all(&rows, |row| {
        Ok(DeadLetter {
            // Its batch is no more, so what this says of the batch begins nothing.
            ticket: ticket(row, BatchId(0), 0)?,
            attempts: row.try_get(11)?,
            lane: row.try_get(14)?,
            reason: row.try_get(15)?,
            last_status: row.try_get::<_, Option<i16>>(16)?.and_then(|status| u16::try_from(status).ok()),
            last_error: row.try_get(17)?,
            dead_at: row.try_get(18)?,
        })
    })
}

/// Counts, ages and instances.
pub(super) async fn overview(db: &Object, now: Timestamp) -> Result<Overview> {
    Ok(Overview {
        counts: counts(db).await?,
        oldest_due_at: oldest_due(db, now).await?,
        instances: instances(db).await?,
    })
}

/// Counts each status as far as [`COUNT`], by its place.
async fn counts(db: &Object) -> Result<Vec<Count>> {
    let statement = db
        .prepare_cached(
            "/* ams:counts */ with counted as materialized (select \
                 (select coalesce(sum(bit_count(\"left\")), 0)::bigint from batches) as queued, \
                 (select coalesce(sum(bit_count(\"left\")), 0)::bigint from leases) as processing, \
                 (select count(*) from (select 1 from waiting where lane = '' limit $1) w) as waiting, \
                 (select count(*) from (select 1 from waiting where lane <> '' limit $1) w) as retrying, \
                 (select count(*) from (select 1 from deliveries where status <> 'sent' and status = 'dead' limit $1) d) as dead, \
                 (select count(*) from (select 1 from deliveries where status <> 'sent' and status = 'cancelled' limit $1) d) as cancelled, \
                 (select count(*) from (select 1 from deliveries where status <> 'sent' and status = 'expired' limit $1) d) as expired, \
                 (select count(*) from (select 1 from deliveries where status = 'sent' limit $1) d) as sent) \
             select waiting, queued, processing, sent, retrying, dead, cancelled, expired from counted",
        )
        .await?;
    let row = db.query_one(&statement, &[&(COUNT + 1)]).await?;
    let mut counts = Vec::new();
    for (column, status) in Status::ALL.into_iter().enumerate() {
        let mut count: i64 = row.try_get(column)?;
        if status == Status::Pending {
            count += unclaimed(db).await?;
        }
        counts.push(Count { status, count: count.min(COUNT).unsigned_abs(), more: count > COUNT });
    }
    Ok(counts)
}

/// Messages that no feed has come to, as far as [`COUNT`].
async fn unclaimed(db: &Object) -> Result<i64> {
    let mut count = 0;
    for urgency in Urgency::ALL {
        let statement = format!(
            "/* ams:unclaimed */ select count(*) from ({}) u",
            unclaimed_of(urgency, "1", "", "limit $1")
        );
        count += db
            .query_one(&db.prepare_cached(&statement).await?, &[&(COUNT + 1)])
            .await?
            .try_get::<_, i64>(0)?;
    }
    Ok(count)
}

/// When the oldest due delivery became due: the first of a lane's waiting ones, or the first that no feed has come to.
async fn oldest_due(db: &Object, now: Timestamp) -> Result<Option<Timestamp>> {
    let statement = db
        .prepare_cached(
            "/* ams:oldest_due */ with recursive first as ( \
                 (select lane, due_at from waiting where held is null order by lane, due_at limit 1) \
                 union all \
                 select next.lane, next.due_at from first cross join lateral ( \
                     select w.lane, w.due_at from waiting w where w.held is null and w.lane > first.lane \
                     order by w.lane, w.due_at limit 1) next) \
             select min(due_at) from first where due_at <= $1",
        )
        .await?;
    let mut oldest: Option<Timestamp> = db.query_one(&statement, &[&now]).await?.try_get(0)?;
    for urgency in Urgency::ALL {
        let first = unclaimed_of(urgency, "created_at", "", "order by tx, id limit 1");
        let statement = format!("/* ams:oldest_new */ {first}");
        let row = db.query_opt(&db.prepare_cached(&statement).await?, &[]).await?;
        let created: Option<Timestamp> = row.map(|row| row.try_get(0)).transpose()?;
        oldest = [oldest, created].into_iter().flatten().min();
    }
    Ok(oldest)
}

/// A query of the messages of a class that no feed has come to, as far as `wanted` says and in this order: first those of
/// transactions that were open when the feed looked last, each by itself, then those behind its position. A walk from the
/// oldest open transaction on would read all that has been claimed since that one began.
pub(super) fn unclaimed_of(urgency: Urgency, columns: &str, wanted: &str, order: &str) -> String {
    let (class, condition) = (urgency.number(), condition_of(urgency));
    let rows = format!(
        "select tx, id, endpoint, recipient, created_at from messages where {condition} {wanted} \
             and (select true from cancels where message_id = messages.id) is null and id > (select base_id from f)"
    );
    format!(
        "select {columns} from ( \
             with f as materialized (select done, upto, at_tx, at_id, base_id from feed \
                 where class = {class} order by seq desc limit 1), \
             late as materialized ( \
                 select x from f, pg_snapshot_xip(f.done) x union select x from f, pg_snapshot_xip(f.upto) x) \
             (select m.* from late cross join lateral ({rows} and tx <= late.x and (tx, id) > (late.x, (select case \
                 when not pg_visible_in_snapshot(late.x, upto) or at_tx is null or late.x > at_tx then -1 \
                 when late.x = at_tx then at_id else 9223372036854775807 end from f)) {order}) m {order}) \
             union all \
             ({rows} and (tx, id) > ((select greatest(pg_snapshot_xmax(done), at_tx) from f), \
                     (select case when at_tx >= pg_snapshot_xmax(done) then at_id else -1 end from f)) \
                 and (tx >= (select pg_snapshot_xmax(upto) from f) \
                     or pg_visible_in_snapshot(tx, (select upto from f))) {order})) u {order}"
    )
}

async fn instances(db: &Object) -> Result<Vec<Instance>> {
    let statement = "/* ams:instances */ select id, service, host, version, started_at, seen_at, lease_until \
                     from instances order by id";
    let rows = db.query(statement, &[]).await?;
    read_all(&rows, |row| {
        Ok(Instance {
            id: InstanceId(row.try_get(0)?),
            service: row.try_get(1)?,
            host: row.try_get(2)?,
            version: row.try_get(3)?,
            started_at: row.try_get(4)?,
            seen_at: row.try_get(5)?,
            lease_until: row.try_get(6)?,
        })
    })
}
