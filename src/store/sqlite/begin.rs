//! Begin, the leases it writes, and the recovery of what stands in them.

use rusqlite::{Connection, OptionalExtension, params};

use super::claim::{expire, give_back};
use super::{json, list, our_time, text};
use crate::clock::Timestamp;
use crate::message::{Epoch, MessageId};
use crate::store::{Begin, Begun, BegunMessage, InstanceId, Recovered, Recovery, Result};

/// Begins what is `queued` in its ticket's epoch, and writes one lease for all of it.
pub(super) fn begin(db: &Connection, begin: &Begin<'_>) -> Result<Begun> {
    if begin.repeated
        && let Some(messages) = begun_before(db, begin)?
    {
        return Ok(Begun { messages });
    }
    let mut look = db.prepare_cached(
        "/* ams:begin_look */ select attempts, lane_tries, expires_at is not null \
             and cast(round((julianday(expires_at) - 2440587.5) * 86400000.0) as integer) * 1000 <= ?3 \
         from messages where id = ?1 and epoch = ?2 and status = 'queued'",
    )?;
    let mut take =
        db.prepare_cached("/* ams:begin */ update messages set status = 'processing' where id = ?1")?;
    let mut messages = Vec::with_capacity(begin.tickets.len());
    let (mut ids, mut epochs) = (Vec::new(), Vec::new());
    for (id, epoch) in begin.tickets {
        let found = look
            .query_row(params![id.0, epoch, begin.now.as_micros()], |row| {
                Ok((row.get(0)?, row.get(1)?, row.get(2)?))
            })
            .optional()?;
        match found {
            None => {}
            Some((_, _, true)) => expire(db, *id, begin.now)?,
            Some((attempts, lane_tries, false)) => {
                take.execute([id.0])?;
                messages.push(BegunMessage { id: *id, epoch: *epoch, attempts, lane_tries });
                ids.push(*id);
                epochs.push(*epoch);
            }
        }
    }
    if !ids.is_empty() {
        db.prepare_cached(
            "/* ams:lease */ insert into leases (id, owner, ids, epochs) values (?1, ?2, ?3, ?4)",
        )?
        .execute(params![begin.lease.0, begin.owner.0, json(&ids)?, json(&epochs)?])?;
    }
    Ok(Begun { messages })
}

/// What a begin call of this lease took and still has; `None` when there was none.
fn begun_before(db: &Connection, begin: &Begin<'_>) -> Result<Option<Vec<BegunMessage>>> {
    let lease = db
        .prepare_cached("/* ams:lease_look */ select ids, epochs from leases where id = ?1")?
        .query_row([begin.lease.0], |row| Ok((text(row, 0)?, text(row, 1)?)))
        .optional()?;
    let Some((ids, epochs)) = lease else {
        return Ok(None);
    };
    let mut statement = db.prepare_cached(
        "/* ams:begun */ select attempts, lane_tries from messages \
         where id = ?1 and epoch = ?2 and status = 'processing'",
    )?;
    let mut messages = Vec::new();
    for (id, epoch) in list::<i64>(&ids)?.into_iter().zip(list::<Epoch>(&epochs)?) {
        let found =
            statement.query_row(params![id, epoch], |row| Ok((row.get(0)?, row.get(1)?))).optional()?;
        messages.extend(found.map(|(attempts, lane_tries)| BegunMessage {
            id: MessageId(id),
            epoch,
            attempts,
            lane_tries,
        }));
    }
    Ok(Some(messages))
}

/// What a look for dead instances finds.
pub(super) struct Looked {
    /// Whether any instance is dead, or any lease has no instance.
    pub(super) any: bool,
    /// As [`Recovered::ahead`].
    pub(super) ahead: Vec<(InstanceId, Timestamp)>,
}

/// Looks for dead instances, and for those whose clock is ahead.
pub(super) fn look_for_dead(db: &Connection, recovery: &Recovery<'_>) -> Result<Looked> {
    let (now, latest) = (recovery.now.as_micros(), recovery.latest.as_micros());
    let any = db
        .prepare_cached(
            "/* ams:recover_look */ select exists (select 1 from instances where lease_until <= ?1 \
                 or lease_until > ?2 and id in (select value from json_each(?3))) \
             or exists (select 1 from leases where owner not in (select id from instances))",
        )?
        .query_row(params![now, latest, silent(recovery)?], |row| row.get(0))?;
    let ahead = db
        .prepare_cached(
            "/* ams:ahead */ select id, seen_at from instances where lease_until > ?1 order by id",
        )?
        .query_map([latest], |row| Ok((InstanceId(row.get(0)?), our_time(row, 1)?)))?
        .collect::<rusqlite::Result<_>>()?;
    Ok(Looked { any, ahead })
}

/// Silent instances as a JSON list.
fn silent(recovery: &Recovery<'_>) -> Result<String> {
    json(&recovery.silent.iter().map(|id| id.0).collect::<Vec<_>>())
}

/// Takes dead instances away, and gives back what stands in leases that have no instance.
pub(super) fn recover(db: &Connection, recovery: &Recovery<'_>) -> Result<Recovered> {
    let (now, latest) = (recovery.now, recovery.latest.as_micros());
    let instances = db
        .prepare_cached(
            "/* ams:bury */ delete from instances where lease_until <= ?1 \
                 or lease_until > ?2 and id in (select value from json_each(?3))",
        )?
        .execute(params![now.as_micros(), latest, silent(recovery)?])?;
    db.prepare_cached(
        "/* ams:dethrone */ update leader set owner = null where owner not in (select id from instances)",
    )?
    .execute([])?;
    let left = db
        .prepare_cached(
            "/* ams:recover */ delete from leases where owner not in (select id from instances) returning ids, epochs",
        )?
        .query_map([], |row| Ok((text(row, 0)?, text(row, 1)?)))?
        .collect::<rusqlite::Result<Vec<_>>>()?;
    let mut messages = 0;
    for (ids, epochs) in left {
        for (id, epoch) in list::<i64>(&ids)?.into_iter().zip(list::<Epoch>(&epochs)?) {
            messages += u64::from(give_back(db, MessageId(id), epoch, "processing", now)?);
        }
    }
    Ok(Recovered { instances: instances as u64, messages, ahead: Vec::new() })
}
