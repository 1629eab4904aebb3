//! Reads: one message, its attempts, dead letters, and the whole.

use std::collections::HashMap;

use rusqlite::{Connection, OptionalExtension, params};

use super::claim::ticket;
use super::{bytes, optional_text, our_optional_time, our_time, text, writers_time};
use crate::clock::Timestamp;
use crate::message::{Attempt, Class, Held, Message, MessageId, Status, Times};
use crate::store::{Count, DeadLetter, Instance, InstanceId, Overview, Result, json_or_text, latest_present};

/// Where counting stops.
const COUNT: i64 = 10_000;
/// The newest rows among which those are counted that no index tells apart.
const NEWEST: i64 = 100_000;

/// One message.
pub(super) fn message(db: &Connection, id: MessageId) -> Result<Option<Message>> {
    let mut statement = db.prepare_cached(
        "/* ams:message */ select id, endpoint, recipient, content, content_type, headers, ordering_key, priority, \
         send_at, expires_at, idempotency_key, tags, created_at, status, held, epoch, attempts, lane, due_at, \
         finished_at, reason from messages where id = ?1",
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
            status: Status::read(&text(row, 13)?),
            held: optional_text(row, 14)?.map(|held| Held::read(&held)),
            epoch: row.get(15)?,
            attempts: row.get(16)?,
            lane: text(row, 17)?,
            due_at: our_optional_time(row, 18)?,
            finished_at: our_optional_time(row, 19)?,
            reason: optional_text(row, 20)?,
        })
    });
    Ok(message.optional()?)
}

/// A message's attempts, oldest first.
pub(super) fn attempts(db: &Connection, id: MessageId) -> Result<Vec<Attempt>> {
    let mut statement = db.prepare_cached(
        "/* ams:attempts */ select epoch, attempt, lane, class, status, address, error, answer, provider_message_id, \
         started_at, connect_us, head_us, body_us from attempts where message_id = ?1 order by epoch",
    )?;
    let attempts = statement.query_map([id.0], |row| {
        Ok(Attempt {
            message_id: id,
            epoch: row.get(0)?,
            attempt: row.get(1)?,
            lane: text(row, 2)?,
            class: Class::read(&text(row, 3)?),
            status: row.get(4)?,
            address: text(row, 5)?,
            error: optional_text(row, 6)?,
            answer: text(row, 7)?,
            provider_message_id: optional_text(row, 8)?,
            started_at: our_time(row, 9)?,
            times: Times { connect_us: row.get(10)?, head_us: row.get(11)?, body_us: row.get(12)? },
        })
    })?;
    Ok(attempts.collect::<rusqlite::Result<_>>()?)
}

/// Dead letters written before a time, oldest first.
pub(super) fn dead_letters(db: &Connection, before: Timestamp, limit: usize) -> Result<Vec<DeadLetter>> {
    let mut statement = db.prepare_cached(
        "/* ams:dead_letters */ select messages.id, epoch, dead_letters.attempts, endpoint, created_at, recipient, \
         content, content_type, headers, ordering_key, dead_letters.lane, dead_letters.reason, last_status, \
         last_error, dead_at \
         from dead_letters join messages on messages.id = dead_letters.message_id \
         where dead_at < ?1 or dead_at > ?3 order by dead_at, message_id limit ?2",
    )?;
    let limit = i64::try_from(limit).unwrap_or(i64::MAX);
    let letters = statement.query_map(
        params![before.as_micros(), limit, latest_present(before).as_micros()],
        |row| {
            let ticket = ticket(db, row)?;
            Ok(DeadLetter {
                attempts: ticket.attempt,
                ticket,
                lane: text(row, 10)?,
                reason: text(row, 11)?,
                last_status: row.get(12)?,
                last_error: optional_text(row, 13)?,
                dead_at: our_time(row, 14)?,
            })
        },
    )?;
    Ok(letters.collect::<rusqlite::Result<_>>()?)
}

/// Counts, ages and instances.
pub(super) fn overview(db: &Connection, now: Timestamp) -> Result<Overview> {
    Ok(Overview { counts: counts(db)?, oldest_due_at: oldest_due(db, now)?, instances: instances(db)? })
}

/// Counts each status as far as [`COUNT`]. Those that wait or went wrong have an index; the others are
/// counted among the newest rows.
fn counts(db: &Connection) -> Result<Vec<Count>> {
    let mut newest: HashMap<Status, i64> = HashMap::new();
    let mut walked = 0;
    let mut statement =
        db.prepare_cached("/* ams:newest */ select status from messages order by id desc limit ?1")?;
    let mut rows = statement.query([NEWEST])?;
    while let Some(row) = rows.next()? {
        *newest.entry(Status::read(&text(row, 0)?)).or_default() += 1;
        walked += 1;
    }
    let mut counts = Vec::new();
    for status in Status::ALL {
        let seen = newest.get(&status).copied().unwrap_or(0);
        let count = match status {
            Status::Queued | Status::Processing | Status::Sent | Status::Unknown => seen,
            // What these have is more than what is new.
            _ if walked < NEWEST => seen,
            Status::Pending | Status::Retrying => waiting(db, status)?,
            Status::Dead | Status::Cancelled | Status::Expired => unsent(db, status)?,
        };
        let indexed = !matches!(status, Status::Queued | Status::Processing | Status::Sent);
        let more = count > COUNT || (!indexed && walked == NEWEST);
        counts.push(Count { status, count: u64::try_from(count.min(COUNT)).unwrap_or(0), more });
    }
    Ok(counts)
}

/// Rows of a status that waits, by the three indexes such a row may stand in.
fn waiting(db: &Connection, status: Status) -> Result<i64> {
    let mut sum: i64 = db
        .prepare_cached(
            "/* ams:count_timed */ select count(*) from (select 1 from messages indexed by messages_timed \
             where timed_at is not null and status = ?1 limit ?2)",
        )?
        .query_row(params![status.as_str(), COUNT + 1], |row| row.get(0))?;
    sum += db
        .prepare_cached(
            "/* ams:count_held */ select count(*) from (select 1 from messages indexed by messages_held \
             where held is not null and status = ?1 limit ?2)",
        )?
        .query_row(params![status.as_str(), COUNT + 1], |row| row.get::<_, i64>(0))?;
    if status == Status::Pending {
        sum += db
            .prepare_cached(
                "/* ams:count_fresh */ select count(*) from (select 1 from messages indexed by messages_fresh \
                 where status = 'pending' and held is null and send_at is null limit ?1)",
            )?
            .query_row([COUNT + 1], |row| row.get::<_, i64>(0))?;
    }
    Ok(sum)
}

fn unsent(db: &Connection, status: Status) -> Result<i64> {
    let mut statement = db.prepare_cached(
        "/* ams:count_unsent */ select count(*) from (select 1 from messages indexed by messages_unsent \
         where (status = 'dead' or status = 'cancelled' or status = 'expired') and status = ?1 limit ?2)",
    )?;
    Ok(statement.query_row(params![status.as_str(), COUNT + 1], |row| row.get(0))?)
}

/// When the oldest due row became due: the first fresh one, or the first of a lane's timed ones.
fn oldest_due(db: &Connection, now: Timestamp) -> Result<Option<Timestamp>> {
    let mut oldest = db
        .prepare_cached(
            "/* ams:oldest_fresh */ select created_at from messages indexed by messages_fresh \
             where status = 'pending' and held is null and send_at is null order by id limit 1",
        )?
        .query_row([], |row| writers_time(db, row, 0))
        .optional()?
        .flatten();
    let mut first = db.prepare_cached(
        "/* ams:oldest_timed */ select lane, timed_at from messages indexed by messages_timed \
         where timed_at is not null and lane >= cast(?1 as text) order by lane, timed_at limit 1",
    )?;
    // Every text that starts with a lane's name and a nul stands behind the lane and before the next.
    let mut from = Vec::new();
    while let Some((lane, due)) =
        first.query_row([&from], |row| Ok((bytes(row, 0)?, our_time(row, 1)?))).optional()?
    {
        if due <= now {
            oldest = Some(oldest.map_or(due, |oldest| oldest.min(due)));
        }
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
