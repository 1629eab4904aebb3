//! Reserved times for deliveries of endpoints with a rate.

use rusqlite::{Connection, OptionalExtension, params};

use super::our_time;
use crate::clock::Timestamp;
use crate::rate::Rate;
use crate::store::{Result, limit};

/// Reserves times between these for deliveries of endpoints with a rate; for how many.
pub(super) fn reserve(db: &Connection, from: Timestamp, until: Timestamp) -> Result<u64> {
    let mut rated = db.prepare_cached(
        "/* ams:rated */ select id, rate_count, rate_interval_ms from endpoints \
         where rate_count is not null and exists (select 1 from waiting indexed by waiting_held \
             where held is not null and endpoint_id = id and held = 'endpoint_rate')",
    )?;
    let rated = rated
        .query_map([], |row| Ok((row.get(0)?, Rate::of(row.get(1)?, row.get(2)?))))?
        .collect::<rusqlite::Result<Vec<(i64, Rate)>>>()?;
    let mut count = 0;
    for (endpoint, rate) in rated {
        count += reserve_for(db, endpoint, rate, from, until)?;
    }
    Ok(count)
}

fn reserve_for(db: &Connection, endpoint: i64, rate: Rate, from: Timestamp, until: Timestamp) -> Result<u64> {
    let next = db
        .prepare_cached("/* ams:rate */ select next_at from rates where endpoint_id = ?1")?
        .query_row([endpoint], |row| our_time(row, 0))
        .optional()?;
    let times = rate.reservable(next, from, until);
    let ids = db
        .prepare_cached(
            "/* ams:next_rated */ select message_id from waiting indexed by waiting_held \
             where held is not null and endpoint_id = ?1 and held = 'endpoint_rate' and due_at <= ?2 \
             order by priority desc, message_id limit ?3",
        )?
        .query_map(params![endpoint, from.as_micros(), limit(times.count)], |row| row.get(0))?
        .collect::<rusqlite::Result<Vec<i64>>>()?;
    let mut reserve = db.prepare_cached(
        "/* ams:reserve */ update waiting set held = null, reserved = 1, due_at = ?3 \
         where message_id = ?1 and endpoint_id = ?2",
    )?;
    for (id, at) in ids.iter().zip(times.times(ids.len())) {
        reserve.execute(params![id, endpoint, at.as_micros()])?;
    }
    db.prepare_cached(
        "/* ams:move_rate */ insert or replace into rates (endpoint_id, next_at) values (?1, ?2)",
    )?
    .execute(params![endpoint, times.after(ids.len()).as_micros()])?;
    Ok(ids.len() as u64)
}

/// When the next time of an endpoint may be reserved for.
pub(super) fn next_reserved(db: &Connection, endpoint: &str) -> Result<Option<Timestamp>> {
    let mut statement = db.prepare_cached(
        "/* ams:next_reserved */ select next_at from rates \
         where endpoint_id = (select id from endpoints where name = ?1)",
    )?;
    Ok(statement.query_row([endpoint], |row| our_time(row, 0)).optional()?)
}
