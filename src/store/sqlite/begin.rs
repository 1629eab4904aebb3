//! Begin, the leases it writes, and the look for those whose owner is dead.

use rusqlite::{Connection, OptionalExtension, params};

use super::batch::{Kind, marks, mask, write_left};
use super::{json, our_time};
use crate::clock::Timestamp;
use crate::store::{BatchId, Begin, Begun, InstanceId, LeaseId, Recovered, Recovery, Result, Wanted};

/// Leases that one recovery lists, at most.
const LEASES: usize = 1_000;

/// Begins what still stands in its batch.
pub(super) fn begin(db: &Connection, begin: &Begin<'_>) -> Result<Vec<Begun>> {
    let mut all = Vec::with_capacity(begin.wanted.len());
    for wanted in begin.wanted {
        let before = if begin.repeated { begun_before(db, wanted)? } else { None };
        all.extend(match before {
            Some(begun) => Some(begun),
            None => begin_one(db, wanted, begin.owner)?,
        });
    }
    Ok(all)
}

/// What a begin call took before and has not recorded.
fn begun_before(db: &Connection, wanted: &Wanted) -> Result<Option<Begun>> {
    let mut statement =
        db.prepare_cached("/* ams:begun */ select batch, root, \"left\" from leases where id = ?1")?;
    let begun = statement.query_row([wanted.lease.0], |row| {
        let (batch, root) = (BatchId(row.get(0)?), BatchId(row.get(1)?));
        Ok(Begun { lease: wanted.lease, batch, root, positions: mask(row, 2)?.0 })
    });
    Ok(begun.optional()?)
}

fn begin_one(db: &Connection, wanted: &Wanted, owner: InstanceId) -> Result<Option<Begun>> {
    let found = db
        .prepare_cached("/* ams:begin_look */ select root, \"left\" from batches where id = ?1")?
        .query_row([wanted.batch.0], |row| Ok((BatchId(row.get(0)?), mask(row, 1)?)))
        .optional()?;
    let Some((root, (left, count))) = found else { return Ok(None) };
    let positions = left.and(&wanted.positions);
    if positions.is_empty() {
        return Ok(None);
    }
    db.prepare_cached(
        "/* ams:begin */ insert into leases (id, root, batch, owner, lo, hi, lane, \"left\", ids, endpoints, attempts, \
         lane_tries, dues, expiries) \
         select ?1, root, id, ?3, lo, hi, lane, ?4, ids, endpoints, attempts, lane_tries, dues, expiries \
         from batches where id = ?2",
    )?
    .execute(params![wanted.lease.0, wanted.batch.0, owner.0, marks(&positions, count)])?;
    write_left(db, Kind::Batches, wanted.batch.0, &left.without(&positions), count)?;
    Ok(Some(Begun { lease: wanted.lease, batch: wanted.batch, root, positions }))
}

/// What a look for dead instances finds.
pub(super) struct Looked {
    /// Whether any instance is dead.
    pub(super) dead: bool,
    /// As [`Recovered::leases`].
    pub(super) leases: Vec<LeaseId>,
    /// As [`Recovered::ahead`].
    pub(super) ahead: Vec<(InstanceId, Timestamp)>,
}

/// Looks for dead instances, for leases without one, and for instances whose clock is ahead.
pub(super) fn look_for_dead(db: &Connection, recovery: &Recovery<'_>) -> Result<Looked> {
    let (now, latest) = (recovery.now.as_micros(), recovery.latest.as_micros());
    let dead = db
        .prepare_cached(
            "/* ams:recover_look */ select exists (select 1 from instances where lease_until <= ?1 \
             or lease_until > ?2 and id in (select value from json_each(?3)))",
        )?
        .query_row(params![now, latest, silent(recovery)?], |row| row.get(0))?;
    let ahead = db
        .prepare_cached(
            "/* ams:ahead */ select id, seen_at from instances where lease_until > ?1 order by id",
        )?
        .query_map([latest], |row| Ok((InstanceId(row.get(0)?), our_time(row, 1)?)))?
        .collect::<rusqlite::Result<_>>()?;
    Ok(Looked { dead, leases: ownerless(db)?, ahead })
}

/// Silent instances as a JSON list.
fn silent(recovery: &Recovery<'_>) -> Result<String> {
    json(&recovery.silent.iter().map(|id| id.0).collect::<Vec<_>>())
}

/// Leases whose owner is no instance.
fn ownerless(db: &Connection) -> Result<Vec<LeaseId>> {
    let mut statement = db.prepare_cached(
        "/* ams:recover */ select id from leases where owner not in (select id from instances) order by id limit ?1",
    )?;
    let leases = statement.query_map([LEASES as i64], |row| row.get(0).map(LeaseId))?;
    Ok(leases.collect::<rusqlite::Result<_>>()?)
}

/// Takes dead instances away, and lists the leases that have no instance.
pub(super) fn recover(db: &Connection, recovery: &Recovery<'_>) -> Result<Recovered> {
    let (now, latest) = (recovery.now, recovery.latest.as_micros());
    let instances = db
        .prepare_cached(
            "/* ams:remove_expired */ delete from instances where lease_until <= ?1 \
             or lease_until > ?2 and id in (select value from json_each(?3))",
        )?
        .execute(params![now.as_micros(), latest, silent(recovery)?])?;
    db.prepare_cached(
        "/* ams:clear_leader */ update leader set owner = null where owner not in (select id from instances)",
    )?
    .execute([])?;
    Ok(Recovered { instances: instances as u64, leases: ownerless(db)?, ahead: Vec::new() })
}
