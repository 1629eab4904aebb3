//! Verdicts, attempts and dead letters, in one transaction.

use rusqlite::{Connection, params};

use super::claim::give_back;
use crate::clock::Timestamp;
use crate::message::{MessageId, Outcome, Verdict};
use crate::retry::summary;
use crate::store::{Record, Records, Result};

/// Bytes of an answer that are kept.
const ANSWER: usize = 4_096;

/// Writes records; returns the ids whose verdict was refused.
pub(super) fn record(db: &Connection, records: &Records<'_>) -> Result<Vec<MessageId>> {
    let mut refused = Vec::new();
    let any_dead: bool = db
        .prepare_cached("/* ams:any_dead */ select exists (select 1 from dead_letters)")?
        .query_row([], |row| row.get(0))?;
    for record in records.records {
        if let Some(outcome) = &record.outcome {
            attempt(db, record, outcome)?;
        }
        let accepted = match &record.verdict {
            Verdict::Sent => sent(db, record.id, any_dead, records.now)?,
            Verdict::Retry { lane, lane_tries, at } => retry(db, record, lane, *lane_tries, *at)?,
            Verdict::Dead { reason, lane } => dead(db, record, reason, lane, records.now)?,
            Verdict::Release => give_back(db, record.id, record.epoch, "processing", records.now)?,
        };
        if !accepted {
            refused.push(record.id);
        }
    }
    let mut finish = db.prepare_cached("/* ams:finish */ delete from leases where id = ?1")?;
    for lease in records.finished {
        finish.execute([lease.0])?;
    }
    Ok(refused)
}

fn attempt(db: &Connection, record: &Record, outcome: &Outcome) -> Result<()> {
    let mut statement = db.prepare_cached(
        "/* ams:attempt */ insert into attempts (message_id, epoch, attempt, lane, class, status, address, error, \
         answer, provider_message_id, started_at, connect_us, head_us, body_us) \
         values (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14) on conflict do nothing",
    )?;
    let answer = &outcome.answer[..outcome.answer.floor_char_boundary(ANSWER)];
    statement.execute(params![
        record.id.0,
        record.epoch,
        record.attempt,
        record.lane,
        outcome.class.as_str(),
        outcome.status,
        outcome.address,
        outcome.error,
        answer,
        outcome.provider_message_id,
        outcome.started_at.as_micros(),
        outcome.times.connect_us,
        outcome.times.head_us,
        outcome.times.body_us,
    ])?;
    Ok(())
}

/// A success is accepted from any epoch, and never refused: saying so again changes nothing.
fn sent(db: &Connection, id: MessageId, any_dead: bool, now: Timestamp) -> Result<bool> {
    db.prepare_cached(
        "/* ams:sent */ update messages set status = 'sent', held = null, attempts = attempts + 1, due_at = null, \
         finished_at = ?2, reason = null where id = ?1 and status <> 'sent'",
    )?
    .execute(params![id.0, now.as_micros()])?;
    if any_dead {
        forget_dead(db, id)?;
    }
    Ok(true)
}

fn retry(db: &Connection, record: &Record, lane: &str, lane_tries: i32, at: Timestamp) -> Result<bool> {
    let reason = record.outcome.as_ref().map(summary);
    let count = db
        .prepare_cached(
            "/* ams:retry */ update messages set status = 'retrying', attempts = attempts + 1, lane = ?3, \
             lane_tries = ?4, due_at = ?5, reason = ?6 where id = ?1 and epoch = ?2 and status = 'processing'",
        )?
        .execute(params![record.id.0, record.epoch, lane, lane_tries, at.as_micros(), reason])?;
    Ok(count > 0)
}

fn dead(db: &Connection, record: &Record, reason: &str, lane: &str, now: Timestamp) -> Result<bool> {
    let count = db
        .prepare_cached(
            "/* ams:dead */ update messages set status = 'dead', attempts = attempts + 1, due_at = null, \
             finished_at = ?3, reason = ?4 where id = ?1 and epoch = ?2 and status = 'processing'",
        )?
        .execute(params![record.id.0, record.epoch, now.as_micros(), reason])?;
    if count == 0 {
        return Ok(false);
    }
    let outcome = record.outcome.as_ref();
    // A message that was dead before and redriven may still wait here: the newer death is the one to tell.
    db.prepare_cached(
        "/* ams:dead_letter */ insert or replace into dead_letters \
         (message_id, lane, reason, attempts, last_status, last_error, dead_at) \
         select id, ?2, ?3, attempts, ?4, ?5, ?6 from messages where id = ?1",
    )?
    .execute(params![
        record.id.0,
        lane,
        reason,
        outcome.and_then(|outcome| outcome.status),
        outcome.and_then(|outcome| outcome.error.as_deref()),
        now.as_micros(),
    ])?;
    Ok(true)
}

/// Marks dead letters as published.
pub(super) fn dead_lettered(db: &Connection, ids: &[MessageId]) -> Result<()> {
    ids.iter().try_for_each(|id| forget_dead(db, *id))
}

fn forget_dead(db: &Connection, id: MessageId) -> Result<()> {
    db.prepare_cached("/* ams:dead_lettered */ delete from dead_letters where message_id = ?1")?
        .execute([id.0])?;
    Ok(())
}
