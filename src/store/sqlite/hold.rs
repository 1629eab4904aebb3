//! Held deliveries: each endpoint's stand together in an index of their own. And the end of those that wait too long.

use std::collections::BTreeMap;
use std::time::Duration;

use rusqlite::types::{ToSqlOutput, ValueRef};
use rusqlite::{Connection, OptionalExtension, Row, ToSql, params};

use super::batch::{Kind, mask, write_left};
use super::place::{End, Wait, wait_no_more};
use super::{bytes, endpoint, optional_text, text};
use crate::clock::Timestamp;
use crate::message::{Held, MessageId, Status};
use crate::store::{BatchId, EndpointId, Result, Unhold};
use crate::ticket::Ticket;

/// Holds what still stands in its batch; it becomes as it was before the claim.
pub(super) fn hold(
    db: &Connection,
    lane: &str,
    tickets: &[Ticket],
    held: Held,
    now: Timestamp,
) -> Result<u64> {
    let mut batches: BTreeMap<BatchId, Vec<&Ticket>> = BTreeMap::new();
    for ticket in tickets {
        batches.entry(ticket.batch).or_default().push(ticket);
    }
    let mut count = 0;
    for (batch, tickets) in batches {
        let left = db
            .prepare_cached("/* ams:hold_look */ select \"left\" from batches where id = ?1")?
            .query_row([batch.0], |row| mask(row, 0))
            .optional()?;
        let Some((mut left, positions)) = left else { continue };
        let before = left.count();
        for ticket in tickets {
            let position = usize::from(ticket.position);
            if left.has(position) {
                left.clear(position);
                Wait { held: Some(held), ..Wait::again(ticket, lane, now) }.write(db)?;
            }
        }
        if left.count() < before {
            count += before - left.count();
            write_left(db, Kind::Batches, batch.0, &left, positions)?;
        }
    }
    Ok(count as u64)
}

/// The next reason of an endpoint, and the first of the next endpoint: one look into the index each. A comparison of
/// pairs would begin with the pair that is known and walk all of its rows.
const NEXT_REASON: &str = "/* ams:held_reason */ select endpoint_id, held from waiting indexed by waiting_held \
     where held is not null and endpoint_id = ?1 and held > ?2 order by held limit 1";
const NEXT_ENDPOINT: &str = "/* ams:held_endpoint */ select endpoint_id, held from waiting indexed by waiting_held \
     where held is not null and endpoint_id > ?1 order by endpoint_id, held limit 1";

/// Bytes that are written as text, whatever they are.
struct AsText(Vec<u8>);

impl ToSql for AsText {
    fn to_sql(&self) -> rusqlite::Result<ToSqlOutput<'_>> {
        Ok(ToSqlOutput::Borrowed(ValueRef::Text(&self.0)))
    }
}

/// Which endpoints have deliveries held, and why. The next look begins behind the very bytes of the last, which need
/// not be UTF-8: behind any others it would find the same pair for ever.
pub(super) fn held(db: &Connection) -> Result<Vec<(String, Held)>> {
    let mut reasons = db.prepare_cached(NEXT_REASON)?;
    let mut endpoints = db.prepare_cached(NEXT_ENDPOINT)?;
    let read = |row: &Row<'_>| Ok((row.get(0)?, AsText(bytes(row, 1)?)));
    let mut found = Vec::new();
    let mut last = (i64::MIN, AsText(Vec::new()));
    loop {
        let next = match reasons.query_row(params![last.0, last.1], read).optional()? {
            Some(next) => Some(next),
            None => endpoints.query_row([last.0], read).optional()?,
        };
        let Some(next) = next else { break };
        let held = Held::parse(&String::from_utf8_lossy(&next.1.0));
        if let (Some(held), Ok(id)) = (held, i32::try_from(next.0)) {
            found.extend(endpoint::name(db, EndpointId(id))?.map(|name| (name, held)));
        }
        last = next;
    }
    found.sort_by(|(name, held), (other, reason)| (name, held.as_str()).cmp(&(other, reason.as_str())));
    found.dedup();
    Ok(found)
}

/// Frees held deliveries, of each endpoint urgent ones first, then the oldest; a quarter are of the lowest priority.
pub(super) fn unhold(db: &Connection, wanted: &[Unhold], held: Held, now: Timestamp) -> Result<Vec<u64>> {
    wanted.iter().map(|Unhold { endpoint, limit }| unhold_one(db, endpoint, held, *limit, now)).collect()
}

fn unhold_one(db: &Connection, endpoint: &str, held: Held, limit: usize, now: Timestamp) -> Result<u64> {
    let mut free = db.prepare_cached(
        "/* ams:unhold */ update waiting set held = null, reserved = 0, due_at = max(due_at, ?3) \
         where message_id = ?1 and endpoint_id = ?2",
    )?;
    let mut freed = 0;
    for number in endpoint::numbers(db, endpoint)? {
        let ids = next_held(db, number, held, limit.saturating_sub(freed))?;
        for id in &ids {
            free.execute(params![id, number.0, now.as_micros()])?;
        }
        freed += ids.len();
    }
    Ok(freed as u64)
}

/// The held deliveries of an endpoint that are freed next: by their priority, and a quarter of the lowest one.
fn next_held(db: &Connection, endpoint: EndpointId, held: Held, limit: usize) -> Result<Vec<i64>> {
    let mut first = db.prepare_cached(
        "/* ams:held_rows */ select message_id, priority from waiting indexed by waiting_held \
         where held is not null and endpoint_id = ?1 and held = ?2 order by priority desc, message_id limit ?3",
    )?;
    let mut lowest = db.prepare_cached(
        "/* ams:held_lowest */ select message_id, priority from waiting indexed by waiting_held \
         where held is not null and endpoint_id = ?1 and held = ?2 and priority = ( \
             select priority from waiting indexed by waiting_held where held is not null and endpoint_id = ?1 \
             and held = ?2 order by priority, message_id desc limit 1) order by message_id limit ?3",
    )?;
    let read = |row: &Row<'_>| Ok((row.get(0)?, row.get(1)?));
    let rows = |statement: &mut rusqlite::CachedStatement<'_>, limit| {
        let rows =
            statement.query_map(params![endpoint.0, held.as_str(), crate::store::limit(limit)], read)?;
        rows.collect::<rusqlite::Result<Vec<(i64, i64)>>>()
    };
    let mut next = rows(&mut first, limit)?;
    if next.len() == limit && limit > 1 {
        let share = rows(&mut lowest, (limit + 2) / 4)?;
        if share.first().map(|(_, priority)| priority) < next.last().map(|(_, priority)| priority) {
            next.truncate(limit - share.len());
            next.extend(share);
        }
    }
    Ok(next.into_iter().map(|(id, _)| id).collect())
}

/// Brings what waits forward, except what its sender has scheduled. Of the sender's own text SQLite knows milliseconds.
pub(super) fn bring_forward(db: &Connection, by: Duration, now: Timestamp) -> Result<()> {
    let by = i64::try_from(by.as_micros()).unwrap_or(i64::MAX);
    let statement = "/* ams:bring_forward */ update waiting set due_at = max(due_at - ?1, ?2) where due_at > ?2 \
                     and not exists (select 1 from messages where id = message_id \
                         and abs((julianday(send_at) - 2440587.5) * 86400000.0 - due_at / 1000.0) < 1.0)";
    db.prepare_cached(statement)?.execute([by, now.as_micros()])?;
    Ok(())
}

/// Ends what waits beyond its time.
pub(super) fn expire(db: &Connection, now: Timestamp, limit: usize) -> Result<u64> {
    let mut statement = db.prepare_cached(
        "/* ams:expire */ select message_id, endpoint_id, attempts, lane, reason from waiting indexed by waiting_expires \
         where expires_at is not null and expires_at <= ?1 order by expires_at limit ?2",
    )?;
    let limit = crate::store::limit(limit);
    let rows = statement
        .query_map(params![now.as_micros(), limit], |row| {
            let (id, endpoint) = (MessageId(row.get(0)?), EndpointId(row.get(1)?));
            Ok((id, endpoint, row.get(2)?, text(row, 3)?, optional_text(row, 4)?))
        })?
        .collect::<rusqlite::Result<Vec<_>>>()?;
    for (id, endpoint, attempts, lane, reason) in &rows {
        wait_no_more(db, *id, *endpoint)?;
        let (status, attempts, reason) = (Status::Expired, *attempts, reason.as_deref());
        End { id: *id, endpoint: *endpoint, status, attempts, lane, reason, now }.write(db)?;
    }
    Ok(rows.len() as u64)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::sqlite::{Backend, SqliteStore, lock};

    #[test]
    fn a_look_for_the_next_pair_reads_one_row() {
        let store = SqliteStore::in_memory().unwrap();
        let Backend::Inline(connection) = &*store.backend else { panic!("in_memory has no threads") };
        let db = lock(connection);
        db.execute_batch(
            "insert into waiting (message_id, endpoint_id, due_at, held, attempts, lane, lane_tries, priority) \
             with recursive n(i) as (select 1 union all select i + 1 from n where i < 10000) \
             select i, 1 + (i = 10000), 0, 'endpoint_busy', 0, '', 0, 0 from n",
        )
        .unwrap();
        for statement in [NEXT_REASON, NEXT_ENDPOINT] {
            let mut statement = db.prepare(statement).unwrap();
            let values: [&dyn ToSql; 2] = [&1, &AsText(b"endpoint_busy".to_vec())];
            let found = statement.exists(&values[..statement.parameter_count()]).unwrap();
            assert_eq!(found, values.len() > statement.parameter_count());
            assert!(statement.get_status(rusqlite::StatementStatus::VmStep) < 50);
        }
    }
}
