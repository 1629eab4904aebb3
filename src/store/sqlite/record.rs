//! What attempts came to, in one transaction.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use rusqlite::{Connection, params};

use super::batch::{Kind, Lefts, of_roots, write_left};
use super::place::{End, Wait, has_ended, wait_no_more};
use crate::clock::Timestamp;
use crate::message::{MessageId, Outcome, Status, Verdict};
use crate::retry::summary;
use crate::store::settle::{Left, Places, settle};
use crate::store::{BatchId, EndpointId, LeaseId, Mask, Record, Records, Result};

/// Bytes of an answer that are kept.
const ANSWER: usize = 4_096;

/// Writes records; returns the ids whose verdict was refused.
pub(super) fn record(db: &Connection, records: &Records<'_>) -> Result<Vec<MessageId>> {
    let roots: BTreeSet<BatchId> = records.records.iter().map(|record| record.root).collect();
    let roots: Vec<BatchId> = roots.into_iter().collect();
    let (leases, batches) = (of_roots(db, Kind::Leases, &roots)?, of_roots(db, Kind::Batches, &roots)?);
    let settled = settle(records.records, places(db, records.records, &leases, &batches)?);
    write_lefts(db, Kind::Leases, &leases, settled.leases.iter().map(|(id, left)| (id.0, left)))?;
    write_lefts(db, Kind::Batches, &batches, settled.batches.iter().map(|(id, left)| (id.0, left)))?;
    let mut refused = Vec::new();
    let mut stats = Stats::default();
    for (record, accepted) in records.records.iter().zip(settled.accepted) {
        if !accepted {
            refused.push(record.ticket.id);
            log(db, record)?;
        } else if record.verdict == Verdict::Sent {
            let place = leases.get(&record.lease.0).filter(|(root, ..)| *root == record.root);
            let stood = place.is_some_and(|(_, left, _)| left.has(usize::from(record.ticket.position)));
            if sent(db, record, stood, records.now)? {
                stats.add(record);
            }
        } else {
            failed(db, record, records.now)?;
            log(db, record)?;
            stats.add(record);
        }
    }
    stats.write(db, records.now)?;
    Ok(refused)
}

/// What [`settle`] decides by.
fn places(db: &Connection, records: &[Record], leases: &Lefts, batches: &Lefts) -> Result<Places> {
    let mut ended = HashSet::new();
    // A success asks for no end.
    for record in records.iter().filter(|record| record.verdict != Verdict::Sent) {
        let (id, endpoint) = (record.ticket.id, record.ticket.endpoint_id);
        if has_ended(db, id, endpoint)? {
            ended.insert((id, endpoint));
        }
    }
    fn left<K: Ord>(lefts: &Lefts, key: impl Fn(i64) -> K) -> BTreeMap<K, Left> {
        let one = |(id, (root, positions, _)): (&i64, &(BatchId, Mask, usize))| {
            (key(*id), Left { root: *root, positions: positions.clone() })
        };
        lefts.iter().map(one).collect()
    }
    Ok(Places { leases: left(leases, LeaseId), batches: left(batches, BatchId), ended })
}

/// Writes what is left in the batches or leases that have changed.
fn write_lefts<'a>(
    db: &Connection,
    kind: Kind,
    before: &Lefts,
    changed: impl Iterator<Item = (i64, &'a Mask)>,
) -> Result<()> {
    for (id, left) in changed {
        let positions = before.get(&id).map_or(0, |(.., positions)| *positions);
        write_left(db, kind, id, left, positions)?;
    }
    Ok(())
}

/// Writes a success over whatever else the delivery ended as; `stood` says that it stood in its lease, and so in no
/// other place. `false`: this very attempt is written already.
fn sent(db: &Connection, record: &Record, stood: bool, now: Timestamp) -> Result<bool> {
    let (ticket, outcome) = (&record.ticket, record.outcome.as_deref());
    let written = db
        .prepare_cached(
            "/* ams:sent */ insert into deliveries (message_id, endpoint_id, status, attempts, lane, finished_at, batch, \
             started_at, connect_us, head_us, body_us, http_status, address, provider_message_id, answer) \
             values (?1, ?2, 'sent', ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14) \
             on conflict (message_id, endpoint_id) do update set status = excluded.status, \
             attempts = excluded.attempts, lane = excluded.lane, finished_at = excluded.finished_at, reason = null, \
             batch = excluded.batch, started_at = excluded.started_at, connect_us = excluded.connect_us, \
             head_us = excluded.head_us, body_us = excluded.body_us, http_status = excluded.http_status, \
             address = excluded.address, provider_message_id = excluded.provider_message_id, \
             answer = excluded.answer where deliveries.status <> 'sent'",
        )?
        .execute(params![
            ticket.id.0,
            ticket.endpoint_id.0,
            ticket.attempt,
            record.lane,
            now.as_micros(),
            // A success without an attempt to tell of is none that `attempts` could show.
            outcome.map(|_| ticket.batch.0),
            outcome.map(|outcome| outcome.started_at.as_micros()),
            outcome.map(|outcome| outcome.times.connect_us),
            outcome.map(|outcome| outcome.times.head_us),
            outcome.map(|outcome| outcome.times.body_us),
            outcome.and_then(|outcome| outcome.status),
            outcome.map(|outcome| outcome.address.as_str()),
            outcome.and_then(|outcome| outcome.provider_message_id.as_deref()),
            outcome.map(answer),
        ])?;
    if !stood {
        wait_no_more(db, ticket.id, ticket.endpoint_id)?;
        db.prepare_cached(
            "/* ams:revived */ delete from dead_letters where message_id = ?1 and endpoint_id = ?2",
        )?
        .execute(params![ticket.id.0, ticket.endpoint_id.0])?;
    }
    if written > 0 {
        return Ok(true);
    }
    let mut told = db.prepare_cached(
        "/* ams:told */ select 1 from deliveries where message_id = ?1 and endpoint_id = ?2 and batch is ?3",
    )?;
    let this = told.exists(params![ticket.id.0, ticket.endpoint_id.0, outcome.map(|_| ticket.batch.0)])?;
    if !this {
        return log(db, record);
    }
    Ok(false)
}

/// The start of an answer, as far as it is kept.
fn answer(outcome: &Outcome) -> &str {
    &outcome.answer[..outcome.answer.floor_char_boundary(ANSWER)]
}

/// Writes an attempt that no delivery tells. `false`: there was none, or it is written already.
fn log(db: &Connection, record: &Record) -> Result<bool> {
    let (ticket, Some(outcome)) = (&record.ticket, &record.outcome) else { return Ok(false) };
    let mut statement = db.prepare_cached(
        "/* ams:attempt */ insert into attempts (message_id, endpoint_id, batch, attempt, started_at, connect_us, \
         head_us, body_us, status, lane, class, address, error, provider_message_id, answer) \
         values (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15) on conflict do nothing",
    )?;
    let written = statement.execute(params![
        ticket.id.0,
        ticket.endpoint_id.0,
        ticket.batch.0,
        ticket.attempt,
        outcome.started_at.as_micros(),
        outcome.times.connect_us,
        outcome.times.head_us,
        outcome.times.body_us,
        outcome.status,
        record.lane,
        outcome.class.as_str(),
        outcome.address,
        outcome.error,
        outcome.provider_message_id,
        answer(outcome),
    ])?;
    Ok(written > 0)
}

/// Gives a delivery that was not sent its next place, or its end.
fn failed(db: &Connection, record: &Record, now: Timestamp) -> Result<()> {
    let ticket = &record.ticket;
    let end = |status, attempts, reason| {
        let lane = if attempts == 0 { "" } else { &*record.lane };
        End { id: ticket.id, endpoint: ticket.endpoint_id, status, attempts, lane, reason, now }.write(db)
    };
    match &record.verdict {
        Verdict::Sent => Ok(()),
        Verdict::Retry { lane, lane_tries, at } => {
            let reason = record.outcome.as_deref().map(summary);
            let (due_at, attempts, lane_tries) = (*at, ticket.attempt, *lane_tries);
            Wait { due_at, attempts, lane, lane_tries, reason, ..Wait::again(ticket, lane, now) }.write(db)
        }
        Verdict::Dead { reason, lane } => {
            end(Status::Dead, record.attempts(), Some(reason.as_str()))?;
            dead_letter(db, record, (reason, lane), now)
        }
        Verdict::Expired => end(Status::Expired, record.attempts(), None),
        Verdict::Release { held } => Wait { held: *held, ..Wait::again(ticket, &record.lane, now) }.write(db),
    }
}

/// Notes a dead letter that has still to be published. The letter of an earlier death may still wait here: the newer
/// one is the one to tell.
fn dead_letter(db: &Connection, record: &Record, (reason, lane): (&str, &str), now: Timestamp) -> Result<()> {
    let outcome = record.outcome.as_deref();
    db.prepare_cached(
        "/* ams:dead_letter */ insert or replace into dead_letters \
         (message_id, endpoint_id, lane, reason, attempts, last_status, last_error, dead_at) \
         values (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)",
    )?
    .execute(params![
        record.ticket.id.0,
        record.ticket.endpoint_id.0,
        lane,
        reason,
        record.attempts(),
        outcome.and_then(|outcome| outcome.status),
        outcome.and_then(|outcome| outcome.error.as_deref()),
        now.as_micros(),
    ])?;
    Ok(())
}

/// Marks dead letters as published.
pub(super) fn dead_lettered(db: &Connection, ids: &[MessageId]) -> Result<()> {
    let mut delete =
        db.prepare_cached("/* ams:dead_lettered */ delete from dead_letters where message_id = ?1")?;
    for id in ids {
        delete.execute([id.0])?;
    }
    Ok(())
}

/// What records add to the statistics: one row for each endpoint and minute.
#[derive(Default)]
struct Stats(BTreeMap<(EndpointId, i64), [i64; 4]>);

impl Stats {
    fn add(&mut self, record: &Record) {
        let Some(outcome) = &record.outcome else { return };
        let minute = outcome.started_at.as_micros().div_euclid(60_000_000) * 60_000_000;
        let [sent, failed, dead, took] = self.0.entry((record.ticket.endpoint_id, minute)).or_default();
        *sent += i64::from(record.verdict == Verdict::Sent);
        *failed += i64::from(record.verdict != Verdict::Sent);
        *dead += i64::from(matches!(record.verdict, Verdict::Dead { .. }));
        *took += i64::from(outcome.times.total_us());
    }

    fn write(&self, db: &Connection, now: Timestamp) -> Result<()> {
        let mut statement = db.prepare_cached(
            "/* ams:stats */ insert into stats (endpoint_id, minute, sent, failed, dead, took_us, sent_at) \
             values (?1, ?2, ?3, ?4, ?5, ?6, ?7) on conflict (endpoint_id, minute) do update \
             set sent = sent + excluded.sent, failed = failed + excluded.failed, dead = dead + excluded.dead, \
             took_us = took_us + excluded.took_us, sent_at = coalesce(excluded.sent_at, sent_at)",
        )?;
        for ((endpoint, minute), [sent, failed, dead, took]) in &self.0 {
            let sent_at = (*sent > 0).then_some(now.as_micros());
            statement.execute(params![endpoint.0, minute, sent, failed, dead, took, sent_at])?;
        }
        Ok(())
    }
}
