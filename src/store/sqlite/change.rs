//! Cancel and redrive.

use std::collections::{HashMap, HashSet};

use rusqlite::{Connection, OptionalExtension, params};

use super::batch::{self, Kind, write_left};
use super::claim::forget_cancel;
use super::endpoint::Endpoints;
use super::place::{End, Wait};
use super::{optional_text, text, writers_time};
use crate::clock::Timestamp;
use crate::message::{MessageId, Status};
use crate::store::operate::Change;
use crate::store::{EndpointId, Result};

/// Changes those of these messages whose status allows it, and says which.
pub(super) fn change(
    db: &Connection,
    change: Change,
    ids: &[MessageId],
    now: Timestamp,
) -> Result<Vec<MessageId>> {
    match change {
        Change::Cancel => cancel(db, ids, now),
        Change::Redrive => {
            let mut changed = Vec::new();
            for id in ids {
                if redrive(db, *id, now)? {
                    changed.push(*id);
                }
            }
            Ok(changed)
        }
    }
}

/// Takes what has not ended out of its place. Batches and leases are looked through once for all that are under way.
fn cancel(db: &Connection, ids: &[MessageId], now: Timestamp) -> Result<Vec<MessageId>> {
    let mut changed = Vec::new();
    let mut under_way = HashSet::new();
    let mut endpoints = Endpoints::new(db);
    let feeds = feeds(db)?;
    let mut ended =
        db.prepare_cached("/* ams:any_end */ select 1 from deliveries where message_id = ?1 limit 1")?;
    for id in ids {
        if ended.exists([id.0])? {
            continue;
        }
        if cancel_waiting(db, *id, now)? {
            changed.push(*id);
        } else if let Some(written) = written(db, *id)? {
            let class = 1 - written.priority.signum();
            if feeds.get(&class).is_some_and(|position| id.0 <= *position) {
                under_way.insert(*id);
            } else {
                let endpoint = written.endpoint.map(|name| endpoints.named(&name)).transpose()?;
                let endpoint = endpoint.map_or(EndpointId(0), |endpoint| endpoint.id);
                cancelled(db, (*id, endpoint), 0, "", None, now)?;
                db.prepare_cached(
                    "/* ams:cancel_new */ insert or replace into cancels (message_id, at) values (?1, ?2)",
                )?
                .execute(params![id.0, now.as_micros()])?;
                changed.push(*id);
            }
        }
    }
    for kind in [Kind::Batches, Kind::Leases] {
        for mut row in batch::holding(db, kind, &under_way)? {
            let before = changed.len();
            for (position, (id, endpoint)) in row.ids.iter().zip(&row.endpoints).enumerate() {
                if under_way.contains(id) && row.left.has(position) {
                    row.left.clear(position);
                    let attempts = row.attempts(position);
                    let lane = if attempts == 0 { "" } else { row.lane.as_str() };
                    cancelled(db, (*id, *endpoint), attempts, lane, None, now)?;
                    changed.push(*id);
                }
            }
            if changed.len() > before {
                write_left(db, kind, row.id, &row.left, row.positions)?;
            }
        }
    }
    Ok(changed)
}

/// How far the feeds have come, by class.
fn feeds(db: &Connection) -> Result<HashMap<i16, i64>> {
    let mut statement = db.prepare_cached("/* ams:feeds */ select class, position from feed")?;
    let feeds = statement.query_map([], |row| Ok((row.get(0)?, row.get(1)?)))?;
    Ok(feeds.collect::<rusqlite::Result<_>>()?)
}

/// Of a message's columns what a change asks for.
struct Written {
    priority: i16,
    /// `None`: its bytes are no UTF-8.
    endpoint: Option<String>,
    send_at: Option<Timestamp>,
    expires_at: Option<Timestamp>,
}

fn written(db: &Connection, id: MessageId) -> Result<Option<Written>> {
    let mut statement = db.prepare_cached(
        "/* ams:written */ select priority, endpoint, send_at, expires_at from messages where id = ?1",
    )?;
    let written = statement.query_row([id.0], |row| {
        Ok(Written {
            priority: row.get(0)?,
            endpoint: row.get(1).ok(),
            send_at: writers_time(db, row, 2)?,
            expires_at: writers_time(db, row, 3)?,
        })
    });
    Ok(written.optional()?)
}

/// Cancels what waits of a message. Whether anything did.
fn cancel_waiting(db: &Connection, id: MessageId, now: Timestamp) -> Result<bool> {
    let waited = db
        .prepare_cached(
            "/* ams:cancel_waiting */ delete from waiting where message_id = ?1 \
             returning endpoint_id, attempts, lane, reason",
        )?
        .query_map([id.0], |row| {
            Ok((EndpointId(row.get(0)?), row.get::<_, i32>(1)?, text(row, 2)?, optional_text(row, 3)?))
        })?
        .collect::<rusqlite::Result<Vec<_>>>()?;
    for (endpoint, attempts, lane, reason) in &waited {
        cancelled(db, (id, *endpoint), *attempts, lane, reason.as_deref(), now)?;
    }
    Ok(!waited.is_empty())
}

fn cancelled(
    db: &Connection,
    (id, endpoint): (MessageId, EndpointId),
    attempts: i32,
    lane: &str,
    reason: Option<&str>,
    now: Timestamp,
) -> Result<()> {
    End { id, endpoint, status: Status::Cancelled, attempts, lane, reason, now }.write(db)
}

/// Gives back what ended without being sent. Its lanes and waits begin anew; its attempts stay counted, and an expiry
/// that has passed counts no more, because it would end the delivery again. Whether there was anything.
fn redrive(db: &Connection, id: MessageId, now: Timestamp) -> Result<bool> {
    let ended = db
        .prepare_cached(
            "/* ams:redrive */ delete from deliveries where message_id = ?1 \
             and status in ('dead', 'cancelled', 'expired') returning endpoint_id, attempts",
        )?
        .query_map([id.0], |row| Ok((EndpointId(row.get(0)?), row.get(1)?)))?
        .collect::<rusqlite::Result<Vec<(EndpointId, i32)>>>()?;
    if ended.is_empty() {
        return Ok(false);
    }
    // Its feed has still to come to it.
    if forget_cancel(db, id)? {
        return Ok(true);
    }
    let mut revive = db.prepare_cached(
        "/* ams:redrive_letter */ delete from dead_letters where message_id = ?1 and endpoint_id = ?2",
    )?;
    let written = written(db, id)?;
    for (endpoint, attempts) in ended {
        revive.execute(params![id.0, endpoint.0])?;
        let Some(written) = &written else { continue };
        Wait {
            id,
            endpoint,
            // One that was cancelled before its time still waits for it.
            due_at: written.send_at.map_or(now, |at| at.max(now)),
            held: None,
            attempts,
            lane: "",
            lane_tries: 0,
            priority: written.priority,
            expires_at: written.expires_at.filter(|at| *at > now),
            reason: None,
        }
        .write(db)?;
    }
    Ok(true)
}
