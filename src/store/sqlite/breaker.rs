//! Breakers of endpoints that are not closed.

use rusqlite::{Connection, params};

use super::{our_time, text};
use crate::breaker::{Breaker, Cause};
use crate::clock::Timestamp;
use crate::store::Result;

/// All breakers that are not closed.
pub(super) fn breakers(db: &Connection) -> Result<Vec<(String, Breaker)>> {
    let mut statement = db.prepare_cached(
        "/* ams:breakers */ select e.name, b.cause, b.since, b.until, b.openings, b.reason \
         from breakers b join endpoints e on e.id = b.endpoint_id order by b.since, e.name",
    )?;
    let breakers = statement.query_map([], |row| {
        let breaker = Breaker {
            cause: Cause::read(&text(row, 1)?),
            since: our_time(row, 2)?,
            until: our_time(row, 3)?,
            openings: row.get(4)?,
            reason: text(row, 5)?,
        };
        Ok((text(row, 0)?, breaker))
    })?;
    Ok(breakers.collect::<rusqlite::Result<_>>()?)
}

/// Opens and closes breakers. One that was opened further stays, and one that was closed meanwhile opens for the first time only.
pub(super) fn set_breakers(db: &Connection, changes: &[(String, Option<Breaker>)]) -> Result<Vec<bool>> {
    let mut open = db.prepare_cached(
        "/* ams:open_breaker */ insert into breakers (endpoint_id, cause, since, until, openings, reason) \
         select id, ?2, ?3, ?4, ?5, ?6 from endpoints where name = ?1 and (?5 = 1 or id in (select endpoint_id from breakers)) \
             and (?7 is null or not exists (select 1 from stats where stats.endpoint_id = id \
                 and minute > ?7 - 900000000 and sent_at > ?7)) \
         on conflict (endpoint_id) do update set cause = excluded.cause, until = excluded.until, \
             openings = excluded.openings, reason = excluded.reason, probed_until = null \
         where (breakers.openings, breakers.until) < (excluded.openings, excluded.until)",
    )?;
    let mut close = db.prepare_cached(
        "/* ams:close_breaker */ delete from breakers \
         where endpoint_id = (select id from endpoints where name = ?1)",
    )?;
    let mut made = Vec::with_capacity(changes.len());
    for (endpoint, change) in changes {
        let rows = match change {
            Some(b) => {
                let (since, until) = (b.since.as_micros(), b.until.as_micros());
                let unless = b.unless_sent_since().map(Timestamp::as_micros);
                let cause = b.cause.as_str();
                open.execute(params![endpoint, cause, since, until, b.openings, b.reason, unless])?
            }
            None => close.execute([endpoint])?,
        };
        made.push(rows > 0);
    }
    Ok(made)
}

/// Takes the right to probe those endpoints that nobody probes. A right that lasts for longer than any was written by a
/// clock that was wrong.
pub(super) fn probe(
    db: &Connection,
    endpoints: &[(String, Timestamp)],
    now: Timestamp,
) -> Result<Vec<String>> {
    let mut probe = db.prepare_cached(
        "/* ams:probe */ update breakers set probed_until = ?2 \
         where endpoint_id = (select id from endpoints where name = ?1) and until <= ?3 \
             and (probed_until is null or probed_until <= ?3 or probed_until > ?3 + 3600000000)",
    )?;
    let mut won = Vec::new();
    for (endpoint, until) in endpoints {
        if probe.execute(params![endpoint, until.as_micros(), now.as_micros()])? > 0 {
            won.push(endpoint.clone());
        }
    }
    Ok(won)
}
