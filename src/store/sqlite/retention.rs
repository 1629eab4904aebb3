//! Removing what is old, row by row: there are no partitions.

use rusqlite::{Connection, params};

use super::json;
use crate::message::MessageId;
use crate::store::{Removal, Removed, Result};

/// Removes the old ones among the next deliveries, and their messages and attempts with them; and at the end of a walk what
/// belongs to no message any more. A message whose dead letter has still to be published stays.
pub(super) fn remove_old(db: &Connection, removal: &Removal) -> Result<Removed> {
    let limit = crate::store::limit(removal.limit);
    let before = removal.before.as_micros();
    let walked = db
        .prepare_cached(
            "/* ams:remove_walk */ select message_id, finished_at < ?3 and message_id not in (select message_id from dead_letters) \
             from deliveries where message_id > ?1 order by message_id limit ?2",
        )?
        .query_map(params![removal.from.0, limit, before], |row| Ok((row.get(0)?, row.get(1)?)))?
        .collect::<rusqlite::Result<Vec<(i64, bool)>>>()?;
    let old: Vec<i64> = walked.iter().filter(|(_, old)| *old).map(|(id, _)| *id).collect();
    let ids = json(&old)?;
    for statement in [
        "/* ams:remove_attempts */ delete from attempts where message_id in (select value from json_each(?1))",
        "/* ams:remove_deliveries */ delete from deliveries where message_id in (select value from json_each(?1))",
        "/* ams:remove_messages */ delete from messages where id in (select value from json_each(?1))",
    ] {
        db.prepare_cached(statement)?.execute([&ids])?;
    }
    let more = walked.len() >= removal.limit;
    if !more {
        remove_others(db, before)?;
    }
    let last = walked.last().map(|(id, _)| MessageId(*id));
    Ok(Removed { partitions: 0, messages: old.len() as u64, next: last.filter(|_| more) })
}

fn remove_others(db: &Connection, before: i64) -> Result<()> {
    db.prepare_cached(
        "/* ams:remove_keys */ delete from idempotency_keys \
         where cast(round((julianday(created_at) - 2440587.5) * 86400000.0) as integer) * 1000 < ?1 \
             and message_id not in (select id from messages)",
    )?
    .execute([before])?;
    db.prepare_cached("/* ams:remove_stats */ delete from stats where minute < ?1")?.execute([before])?;
    db.prepare_cached("/* ams:remove_operations */ delete from operations where finished_at < ?1")?
        .execute([before])?;
    Ok(())
}
