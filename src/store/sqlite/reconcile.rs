//! The reconciliation: each message that a feed has passed must have a place.

use rusqlite::{Connection, params};

use super::endpoint::Endpoints;
use super::our_optional_time;
use super::place::{self, Wait, Whereabouts};
use super::read::at_place;
use crate::clock::Timestamp;
use crate::message::MessageId;
use crate::store::{Reconciled, Reconciliation, Result};

/// Looks at the next messages.
pub(super) fn reconcile(db: &Connection, now: Timestamp, limit: usize) -> Result<Reconciled> {
    let from: i64 = db
        .prepare_cached("/* ams:take_reconciliation */ select at_id from reconciliation")?
        .query_row([], |row| row.get(0))?;
    let count = crate::store::limit(limit);
    let (checked, to): (i64, i64) = db
        .prepare_cached(
            "/* ams:reconcile_walk */ select count(*), coalesce(max(id), 0) from ( \
                 select id from messages where id > ?1 order by id limit ?2)",
        )?
        .query_row([from, count], |row| Ok((row.get(0)?, row.get(1)?)))?;
    let strays = if checked > 0 { strays(db, from, to)? } else { Vec::new() };
    for id in &strays {
        wait(db, *id, now)?;
    }
    let finished = checked < count;
    db.prepare_cached(
        "/* ams:note_reconciliation */ update reconciliation set at_id = ?1, checked = checked + ?2, \
         repaired = repaired + ?3, finished_at = coalesce(?4, finished_at)",
    )?
    .execute(params![
        if finished { 0 } else { to },
        checked,
        crate::store::limit(strays.len()),
        finished.then(|| now.as_micros()),
    ])?;
    Ok(Reconciled { checked: checked.unsigned_abs(), repaired: strays.len() as u64, finished, urgent: false })
}

/// Messages of a range that a feed has passed and that have no place.
fn strays(db: &Connection, from: i64, to: i64) -> Result<Vec<MessageId>> {
    let mut statement = db.prepare_cached(
        "/* ams:reconcile */ select m.id from messages m where m.id > ?1 and m.id <= ?2 \
             and m.id <= (select position from feed where class = case when m.priority > 0 then 0 when m.priority = 0 then 1 else 2 end) \
             and not exists (select 1 from deliveries d where d.message_id = m.id) \
             and not exists (select 1 from waiting w where w.message_id = m.id) \
             and not exists (select 1 from cancels c where c.message_id = m.id)",
    )?;
    let ids = statement.query_map([from, to], |row| Ok(MessageId(row.get(0)?)))?;
    let mut ids: Vec<MessageId> = ids.collect::<rusqlite::Result<_>>()?;
    // What is left is in batches or leases, nearly always; each of those is read once for all of its messages.
    let found = place::find(db, &ids)?;
    ids.retain(|id| !found.contains_key(id));
    Ok(ids)
}

/// Lets a message wait for its first attempt.
fn wait(db: &Connection, id: MessageId, now: Timestamp) -> Result<()> {
    let Some(message) = at_place(db, id, Whereabouts::NEW)? else { return Ok(()) };
    let endpoint = Endpoints::new(db).named(&message.endpoint)?.id;
    Wait {
        id,
        endpoint,
        due_at: message.send_at.map_or(now, |at| at.max(now)),
        held: None,
        attempts: 0,
        lane: "",
        lane_tries: 0,
        priority: message.priority,
        expires_at: message.expires_at,
        reason: None,
    }
    .write(db)
}

/// How the reconciliation stands.
pub(super) fn reconciliation(db: &Connection) -> Result<Reconciliation> {
    let mut statement = db.prepare_cached(
        "/* ams:reconciliation */ select at_id, checked, repaired, finished_at from reconciliation",
    )?;
    Ok(statement.query_row([], |row| {
        Ok(Reconciliation {
            at: MessageId(row.get(0)?),
            checked: row.get::<_, i64>(1)?.unsigned_abs(),
            repaired: row.get::<_, i64>(2)?.unsigned_abs(),
            finished_at: our_optional_time(row, 3)?,
            feeds_made_at: None,
        })
    })?)
}
