//! Reads: messages, attempts, dead letters, and the whole.

use deadpool_postgres::{GenericClient, Object};
use serde_json::Value;
use serde_json::value::RawValue;
use tokio_postgres::Row;
use tokio_postgres::types::Json;

use super::claim::ticket;
use super::{bounds, limit, read_all};
use crate::clock::Timestamp;
use crate::message::{Attempt, Class, Held, Message, MessageId, Status, Times};
use crate::store::{Count, DeadLetter, Instance, InstanceId, Overview, Result, json_or_text, latest_present};

/// Where counting stops.
const COUNT: i64 = 10_000;
/// The newest rows among which those are counted that no index tells apart.
const NEWEST: i64 = 100_000;

/// The messages with these ids, in id order.
pub(super) async fn messages(db: &impl GenericClient, ids: &[i64]) -> Result<Vec<Message>> {
    let statement = db
        .prepare_cached(
            "/* ams:messages */ select id, endpoint, recipient, content, content_type, headers, ordering_key, \
                 priority, send_at, expires_at, idempotency_key, tags, created_at, status::text, held, epoch, attempts, \
                 lane, due_at, finished_at, reason \
             from messages where id = any($1) and id between $2 and $3 order by id",
        )
        .await?;
    let (first, last) = bounds(ids);
    let rows = db.query(&statement, &[&ids, &first, &last]).await?;
    rows.iter()
        .map(|row| {
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
                epoch: row.try_get(15)?,
                attempts: row.try_get(16)?,
                lane: row.try_get(17)?,
                due_at: row.try_get(18)?,
                finished_at: row.try_get(19)?,
                reason: row.try_get(20)?,
            })
        })
        .collect()
}

fn json(row: &Row, column: usize) -> Result<Option<Value>> {
    let json: Option<Json<&RawValue>> = row.try_get(column)?;
    Ok(json.map(|json| json_or_text(json.0.get())))
}

/// A message's attempts, oldest first.
pub(super) async fn attempts(db: &Object, id: MessageId) -> Result<Vec<Attempt>> {
    let statement = db
        .prepare_cached(
            "/* ams:attempts */ select epoch, attempt, lane, class, status, address, error, answer, \
                 provider_message_id, started_at, connect_us, head_us, body_us \
             from attempts where message_id = $1 order by epoch",
        )
        .await?;
    let rows = db.query(&statement, &[&id.0]).await?;
    rows.iter()
        .map(|row| {
            Ok(Attempt {
                message_id: id,
                epoch: row.try_get(0)?,
                attempt: row.try_get(1)?,
                lane: row.try_get(2)?,
                class: Class::read(row.try_get(3)?),
                status: row.try_get::<_, Option<i16>>(4)?.and_then(|status| u16::try_from(status).ok()),
                address: row.try_get(5)?,
                error: row.try_get(6)?,
                answer: row.try_get(7)?,
                provider_message_id: row.try_get(8)?,
                started_at: row.try_get(9)?,
                times: Times {
                    connect_us: row.try_get(10)?,
                    head_us: row.try_get(11)?,
                    body_us: row.try_get(12)?,
                },
            })
        })
        .collect()
}

/// Dead letters written before a time, oldest first.
pub(super) async fn dead_letters(db: &Object, before: Timestamp, count: usize) -> Result<Vec<DeadLetter>> {
    let statement = db
        .prepare_cached(
            "/* ams:dead_letters */ select m.id, m.epoch, d.attempts, m.endpoint, m.created_at, m.recipient, \
                 m.content, m.content_type, m.headers, m.ordering_key, d.lane, d.reason, d.last_status, d.last_error, \
                 d.dead_at \
             from dead_letters d join messages m on m.id = d.message_id \
             where d.dead_at < $1 or d.dead_at > $3 order by d.dead_at, d.message_id limit $2",
        )
        .await?;
    let rows = db.query(&statement, &[&before, &limit(count), &latest_present(before)]).await?;
    read_all(&rows, |row| {
        Ok(DeadLetter {
            ticket: ticket(row)?,
            attempts: row.try_get(2)?,
            lane: row.try_get(10)?,
            reason: row.try_get(11)?,
            last_status: row.try_get::<_, Option<i16>>(12)?.and_then(|status| u16::try_from(status).ok()),
            last_error: row.try_get(13)?,
            dead_at: row.try_get(14)?,
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

/// Counts each status as far as [`COUNT`]. Those that wait or went wrong have an index; the others are
/// counted among the newest rows.
async fn counts(db: &Object) -> Result<Vec<Count>> {
    let newest = db
        .prepare_cached(
            "/* ams:newest */ select status::text, count(*) from \
             (select status from messages order by id desc limit $1) newest group by 1",
        )
        .await?;
    let rows = db.query(&newest, &[&NEWEST]).await?;
    let newest = read_all(&rows, |row| Ok((row.try_get::<_, String>(0)?, row.try_get::<_, i64>(1)?)))?;
    let walked: i64 = newest.iter().map(|(_, count)| count).sum();
    let mut counts = Vec::new();
    for status in Status::ALL {
        let seen = newest.iter().find(|(name, _)| name == status.as_str()).map_or(0, |(_, count)| *count);
        let indexed = !matches!(status, Status::Queued | Status::Processing | Status::Sent);
        let count: i64 = match indexed && walked == NEWEST {
            true => indexed_count(db, status).await?,
            false => seen,
        };
        let more = count > COUNT || (!indexed && walked == NEWEST);
        counts.push(Count { status, count: count.min(COUNT).unsigned_abs(), more });
    }
    Ok(counts)
}

/// Rows of a status that waits or went wrong, by the indexes such a row may stand in.
async fn indexed_count(db: &Object, status: Status) -> Result<i64> {
    let statement = db
        .prepare_cached(
            "/* ams:count */ select \
             (select count(*) from (select 1 from messages where fresh and $1::text = 'pending' limit $2) a) \
             + (select count(*) from (select 1 from messages where timed_at is not null and status = $1::text::message_state limit $2) b) \
             + (select count(*) from (select 1 from messages where held is not null and status = $1::text::message_state limit $2) c) \
             + (select count(*) from (select 1 from messages where unsent is not null and unsent = $1::text::message_state limit $2) d)",
        )
        .await?;
    Ok(db.query_one(&statement, &[&status.as_str(), &(COUNT + 1)]).await?.try_get(0)?)
}

/// When the oldest due row became due: the first fresh one, or the first of a lane's timed ones.
async fn oldest_due(db: &Object, now: Timestamp) -> Result<Option<Timestamp>> {
    let statement = db
        .prepare_cached(
            "/* ams:oldest_due */ with recursive first as ( \
                 (select lane, timed_at from messages where timed_at is not null order by lane, timed_at limit 1) \
                 union all \
                 select next.lane, next.timed_at from first cross join lateral ( \
                     select m.lane, m.timed_at from messages m where m.timed_at is not null and m.lane > first.lane \
                     order by m.lane, m.timed_at limit 1) next) \
             select least( \
                 (select min(timed_at) from first where timed_at <= $1), \
                 (select created_at from messages where fresh order by id limit 1))",
        )
        .await?;
    Ok(db.query_one(&statement, &[&now]).await?.try_get(0)?)
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
