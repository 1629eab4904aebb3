//! Held rows: each endpoint's stand together in an index of their own.

use rusqlite::{Connection, params};

use super::claim::as_it_was;
use super::{bytes, text};
use crate::clock::Timestamp;
use crate::message::{Epoch, Held, MessageId};
use crate::store::Result;

/// Holds what is `queued` in the ticket's epoch; it becomes as it was before the claim.
pub(super) fn hold(
    db: &Connection,
    tickets: &[(MessageId, Epoch)],
    held: Held,
    now: Timestamp,
) -> Result<u64> {
    let mut statement = db.prepare_cached(concat!(
        "/* ams:hold */ update messages set held = ?3, ",
        as_it_was!(),
        " where id = ?1 and epoch = ?2 and status = 'queued'",
    ))?;
    let mut count = 0;
    for (id, epoch) in tickets {
        count += statement.execute(params![id.0, epoch, held.as_str(), now.as_micros()])?;
    }
    Ok(count as u64)
}

/// Which endpoints have rows held, and why: one look into the index for each pair. The next look begins behind the
/// very bytes of the last, which need not be UTF-8: behind any others it would find the same pair for ever.
pub(super) fn held(db: &Connection) -> Result<Vec<(String, Held)>> {
    let mut statement = db.prepare_cached(
        "/* ams:held */ select endpoint, held from messages indexed by messages_held \
         where held is not null and (endpoint, held) > (cast(?1 as text), cast(?2 as text)) \
         order by endpoint, held limit 1",
    )?;
    let mut found = Vec::new();
    let mut last = (Vec::new(), Vec::new());
    loop {
        let mut rows = statement.query(params![last.0, last.1])?;
        let Some(row) = rows.next()? else { return Ok(found) };
        if let Some(held) = Held::parse(&text(row, 1)?) {
            found.push((text(row, 0)?, held));
        }
        last = (bytes(row, 0)?, bytes(row, 1)?);
    }
}

/// Frees held rows, oldest first.
pub(super) fn unhold(
    db: &Connection,
    endpoint: &str,
    held: Held,
    limit: usize,
    now: Timestamp,
) -> Result<u64> {
    let limit = i64::try_from(limit).unwrap_or(i64::MAX);
    let ids = db
        .prepare_cached(
            "/* ams:held_rows */ select id from messages indexed by messages_held \
             where held is not null and endpoint = ?1 and held = ?2 order by id limit ?3",
        )?
        .query_map(params![endpoint, held.as_str(), limit], |row| row.get(0))?
        .collect::<rusqlite::Result<Vec<i64>>>()?;
    let mut statement = db.prepare_cached(
        "/* ams:unhold */ update messages set held = null, \
         due_at = case when status = 'retrying' then max(coalesce(due_at, ?2), ?2) end where id = ?1",
    )?;
    for id in &ids {
        statement.execute(params![id, now.as_micros()])?;
    }
    Ok(ids.len() as u64)
}
