//! Reads: messages, attempts, dead letters, and the whole.

use rusqlite::{Connection, OptionalExtension, params};

use super::batch::mask;
use super::claim::{MESSAGE, UNCLAIMED, ticket};
use super::place::{self, Whereabouts};
use super::{bytes, optional_text, our_time, text, writers_time};
use crate::clock::Timestamp;
use crate::message::{Attempt, Class, Message, MessageId, Status, Times};
use crate::store::operate::SCAN;
use crate::store::{
    Count, DeadLetter, EndpointId, Instance, InstanceId, Overview, Result, json_or_text, latest_present,
};
use crate::ticket::Ticket;

/// Where counting stops.
const COUNT: i64 = 10_000;
/// The rows among which those are counted that no index tells apart.
const NEWEST: i64 = 100_000;

/// The messages with these ids, with the places where they stand.
pub(super) fn messages(db: &Connection, ids: &[MessageId]) -> Result<Vec<Message>> {
    let mut places = place::find(db, ids)?;
    let mut messages = Vec::with_capacity(ids.len());
    for id in ids {
        let at = places.remove(id).unwrap_or(Whereabouts::NEW);
        messages.extend(at_place(db, *id, at)?);
    }
    Ok(messages)
}

/// A message as its sender wrote it, which stands there.
pub(super) fn at_place(db: &Connection, id: MessageId, at: Whereabouts) -> Result<Option<Message>> {
    let mut statement = db.prepare_cached(
        "/* ams:message */ select id, endpoint, recipient, content, content_type, headers, ordering_key, priority, \
         send_at, expires_at, idempotency_key, tags, created_at from messages where id = ?1",
    )?;
    let object = |row: &rusqlite::Row<'_>, column| -> rusqlite::Result<_> {
        Ok(optional_text(row, column)?.map(|json| json_or_text(&json)))
    };
    let message = statement.query_row([id.0], |row| {
        Ok(Message {
            id: MessageId(row.get(0)?),
            endpoint: text(row, 1)?,
            recipient: text(row, 2)?,
            content: text(row, 3)?,
            content_type: optional_text(row, 4)?,
            headers: object(row, 5)?,
            ordering_key: optional_text(row, 6)?,
            priority: row.get(7)?,
            send_at: writers_time(db, row, 8)?,
            expires_at: writers_time(db, row, 9)?,
            idempotency_key: optional_text(row, 10)?,
            tags: object(row, 11)?,
            created_at: writers_time(db, row, 12)?.unwrap_or_default(),
            status: at.status,
            held: at.held,
            attempts: at.attempts,
            lane: at.lane,
            due_at: at.due_at,
            finished_at: at.finished_at,
            reason: at.reason,
        })
    });
    Ok(message.optional()?)
}

/// A message's attempts, oldest first.
pub(super) fn attempts(db: &Connection, id: MessageId) -> Result<Vec<Attempt>> {
    let mut statement = db.prepare_cached(
        "/* ams:attempts */ select attempt, lane, class, status, address, error, answer, provider_message_id, \
         started_at, connect_us, head_us, body_us from attempts where message_id = ?1 \
         union all select attempts, lane, 'accepted', http_status, address, null, answer, provider_message_id, \
         started_at, connect_us, head_us, body_us from deliveries where message_id = ?1 and batch is not null \
         order by 1, 9",
    )?;
    let attempts = statement.query_map([id.0], |row| {
        Ok(Attempt {
            message_id: id,
            attempt: row.get(0)?,
            lane: text(row, 1)?,
            class: Class::read(&text(row, 2)?),
            status: row.get(3)?,
            address: text(row, 4)?,
            error: optional_text(row, 5)?,
            answer: text(row, 6)?,
            provider_message_id: optional_text(row, 7)?,
            started_at: our_time(row, 8)?,
            times: Times { connect_us: row.get(9)?, head_us: row.get(10)?, body_us: row.get(11)? },
        })
    })?;
    Ok(attempts.collect::<rusqlite::Result<_>>()?)
}

/// Dead letters written before a time, oldest first.
pub(super) fn dead_letters(db: &Connection, before: Timestamp, limit: usize) -> Result<Vec<DeadLetter>> {
    let mut statement = db.prepare_cached(&format!(
        "/* ams:dead_letters */ select {MESSAGE}, d.endpoint_id, d.attempts, d.lane, d.reason, d.last_status, \
         d.last_error, d.dead_at \
         from dead_letters d join messages m on m.id = d.message_id \
         where d.dead_at < ?1 or d.dead_at > ?3 order by d.dead_at, d.message_id limit ?2"
    ))?;
    let limit = crate::store::limit(limit);
    let letters = statement.query_map(
        params![before.as_micros(), limit, latest_present(before).as_micros()],
        |row| {
            let (endpoint_id, attempt) = (EndpointId(row.get(10)?), row.get(11)?);
            Ok(DeadLetter {
                // Its batch is no more, so what this says of the batch begins nothing.
                ticket: Ticket { endpoint_id, attempt, expires_at: None, ..ticket(db, row)? },
                attempts: attempt,
                lane: text(row, 12)?,
                reason: text(row, 13)?,
                last_status: row.get(14)?,
                last_error: optional_text(row, 15)?,
                dead_at: our_time(row, 16)?,
            })
        },
    )?;
    Ok(letters.collect::<rusqlite::Result<_>>()?)
}

/// Counts, ages and instances.
pub(super) fn overview(db: &Connection, now: Timestamp) -> Result<Overview> {
    Ok(Overview { counts: counts(db)?, oldest_due_at: oldest_due(db, now)?, instances: instances(db)? })
}

/// Counts each status as far as [`COUNT`], by its place.
fn counts(db: &Connection) -> Result<Vec<Count>> {
    let (unclaimed, (waiting, retrying, all_waiting)) = (unclaimed(db)?, waiting(db)?);
    let mut counts = Vec::new();
    for status in Status::ALL {
        let (count, all) = match status {
            Status::Pending => (unclaimed.0 + waiting, unclaimed.1 && all_waiting),
            Status::Retrying => (retrying, all_waiting),
            Status::Queued => (left(db, "/* ams:count_queued */ select \"left\" from batches")?, true),
            Status::Processing => (left(db, "/* ams:count_processing */ select \"left\" from leases")?, true),
            Status::Sent => newest_sent(db)?,
            Status::Dead | Status::Cancelled | Status::Expired => (unsent(db, status)?, true),
            Status::Unknown => (0, true),
        };
        let more = count > COUNT || !all;
        counts.push(Count { status, count: u64::try_from(count.min(COUNT)).unwrap_or(0), more });
    }
    Ok(counts)
}

/// Messages that no feed has come to and that nobody has cancelled; and whether none was left uncounted.
fn unclaimed(db: &Connection) -> Result<(i64, bool)> {
    let (mut count, mut all) = (0, true);
    for source in UNCLAIMED {
        let statement = format!(
            "/* ams:count_new */ select count(*), coalesce(sum(not exists ( \
                 select 1 from cancels where message_id = new.id)), 0) \
             from (select m.id{source} order by m.id limit ?1) new"
        );
        let (walked, open) = db
            .prepare_cached(&statement)?
            .query_row([2 * COUNT], |row| Ok((row.get::<_, i64>(0)?, row.get::<_, i64>(1)?)))?;
        count += open;
        all &= walked < 2 * COUNT;
    }
    Ok((count, all))
}

/// Deliveries that wait for their first attempt, and for a further one; and whether none was left uncounted.
fn waiting(db: &Connection) -> Result<(i64, i64, bool)> {
    let mut statement = db.prepare_cached(
        "/* ams:count_waiting */ select coalesce(sum(lane = ''), 0), coalesce(sum(lane <> ''), 0) from ( \
             select lane from waiting limit ?1)",
    )?;
    let (new, tried): (i64, i64) = statement.query_row([NEWEST], |row| Ok((row.get(0)?, row.get(1)?)))?;
    Ok((new, tried, new + tried < NEWEST))
}

/// Deliveries that stand in batches or leases.
fn left(db: &Connection, statement: &str) -> Result<i64> {
    let mut statement = db.prepare_cached(statement)?;
    let mut rows = statement.query([])?;
    let mut count = 0;
    while let Some(row) = rows.next()? {
        count += mask(row, 0)?.0.count();
    }
    Ok(i64::try_from(count).unwrap_or(i64::MAX))
}

/// Deliveries that were sent, among the newest; and whether none was left uncounted.
fn newest_sent(db: &Connection) -> Result<(i64, bool)> {
    let mut statement = db.prepare_cached(
        "/* ams:count_sent */ select status = 'sent' from deliveries order by message_id desc limit ?1",
    )?;
    let mut rows = statement.query([NEWEST])?;
    let (mut sent, mut walked) = (0, 0);
    while let Some(row) = rows.next()? {
        sent += i64::from(row.get::<_, bool>(0)?);
        walked += 1;
        if sent > COUNT {
            break;
        }
    }
    Ok((sent, walked < NEWEST))
}

fn unsent(db: &Connection, status: Status) -> Result<i64> {
    let mut statement = db.prepare_cached(
        "/* ams:count_unsent */ select count(*) from (select 1 from deliveries indexed by deliveries_unsent \
         where status <> 'sent' and status = ?1 limit ?2)",
    )?;
    Ok(statement.query_row(params![status.as_str(), COUNT + 1], |row| row.get(0))?)
}

/// When the oldest due delivery became due: the first of a lane's waiting ones, or the oldest message that no feed has
/// come to.
fn oldest_due(db: &Connection, now: Timestamp) -> Result<Option<Timestamp>> {
    let mut oldest = None;
    let mut earlier = |due: Option<Timestamp>| oldest = [oldest, due].into_iter().flatten().min();
    for source in UNCLAIMED {
        // Of messages without end that were cancelled, only the first are passed over.
        let statement = format!(
            "/* ams:oldest_new */ select created_at from (select m.id, m.created_at{source} order by m.id limit {SCAN}) \
             new where not exists (select 1 from cancels where message_id = new.id) limit 1"
        );
        let created =
            db.prepare_cached(&statement)?.query_row([], |row| writers_time(db, row, 0)).optional()?;
        earlier(created.flatten());
    }
    let mut first = db.prepare_cached(
        "/* ams:oldest_waiting */ select lane, due_at from waiting indexed by waiting_due \
         where held is null and lane >= cast(?1 as text) order by lane, due_at limit 1",
    )?;
    // Every text that starts with a lane's name and a nul stands behind the lane and before the next.
    let mut from = Vec::new();
    while let Some((lane, due)) =
        first.query_row([&from], |row| Ok((bytes(row, 0)?, our_time(row, 1)?))).optional()?
    {
        earlier(Some(due).filter(|due| *due <= now));
        from = [lane, vec![0]].concat();
    }
    Ok(oldest)
}

fn instances(db: &Connection) -> Result<Vec<Instance>> {
    let mut statement = db.prepare_cached(
        "/* ams:instances */ select id, service, host, version, started_at, seen_at, lease_until \
         from instances order by id",
    )?;
    let instances = statement.query_map([], |row| {
        Ok(Instance {
            id: InstanceId(row.get(0)?),
            service: text(row, 1)?,
            host: text(row, 2)?,
            version: text(row, 3)?,
            started_at: our_time(row, 4)?,
            seen_at: our_time(row, 5)?,
            lease_until: our_time(row, 6)?,
        })
    })?;
    Ok(instances.collect::<rusqlite::Result<_>>()?)
}
