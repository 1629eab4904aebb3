//! Where deliveries stand: what is written when one comes to wait or ends, and looking for them in all places.

use std::collections::{HashMap, HashSet};

use rusqlite::{Connection, OptionalExtension, params};

use super::batch::{self, Kind};
use super::{optional_text, our_optional_time, our_time, text};
use crate::clock::Timestamp;
use crate::message::{Held, MessageId, Status};
use crate::store::{EndpointId, Result};
use crate::ticket::Ticket;

/// A delivery that comes to wait.
pub(super) struct Wait<'a> {
    pub(super) id: MessageId,
    pub(super) endpoint: EndpointId,
    pub(super) due_at: Timestamp,
    pub(super) held: Option<Held>,
    pub(super) attempts: i32,
    pub(super) lane: &'a str,
    pub(super) lane_tries: i32,
    pub(super) priority: i16,
    pub(super) expires_at: Option<Timestamp>,
    pub(super) reason: Option<String>,
}

impl<'a> Wait<'a> {
    /// One that is given back as it was before its claim from this lane: due at once, or when it was due if that is
    /// still to come.
    pub(super) fn again(ticket: &Ticket, lane: &'a str, now: Timestamp) -> Wait<'a> {
        let attempts = ticket.attempt - 1;
        Wait {
            id: ticket.id,
            endpoint: ticket.endpoint_id,
            due_at: ticket.due_at.map_or(now, |at| at.max(now)),
            held: None,
            attempts,
            lane: if attempts == 0 { "" } else { lane },
            lane_tries: ticket.lane_tries,
            priority: ticket.priority,
            expires_at: ticket.expires_at,
            reason: None,
        }
    }

    /// Writes it. No delivery waits twice; were one to, the newer wait would be the one that counts.
    pub(super) fn write(&self, db: &Connection) -> Result<()> {
        db.prepare_cached(
            "/* ams:wait */ insert or replace into waiting (message_id, endpoint_id, due_at, held, attempts, lane, \
             lane_tries, priority, expires_at, reason) values (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10)",
        )?
        .execute(params![
            self.id.0,
            self.endpoint.0,
            self.due_at.as_micros(),
            self.held.map(Held::as_str),
            self.attempts,
            self.lane,
            self.lane_tries,
            self.priority,
            self.expires_at.map(Timestamp::as_micros),
            self.reason,
        ])?;
        Ok(())
    }
}

/// Deletes what waits of a delivery.
pub(super) fn wait_no_more(db: &Connection, id: MessageId, endpoint: EndpointId) -> Result<()> {
    db.prepare_cached(
        "/* ams:wait_no_more */ delete from waiting where message_id = ?1 and endpoint_id = ?2",
    )?
    .execute(params![id.0, endpoint.0])?;
    Ok(())
}

/// A delivery that ends without a success.
pub(super) struct End<'a> {
    pub(super) id: MessageId,
    pub(super) endpoint: EndpointId,
    pub(super) status: Status,
    pub(super) attempts: i32,
    /// Of its last attempt; empty: there was none.
    pub(super) lane: &'a str,
    pub(super) reason: Option<&'a str>,
    pub(super) now: Timestamp,
}

impl End<'_> {
    /// Writes it, unless the delivery has ended already.
    pub(super) fn write(&self, db: &Connection) -> Result<()> {
        db.prepare_cached(
            "/* ams:end */ insert into deliveries (message_id, endpoint_id, status, attempts, lane, finished_at, reason) \
             values (?1, ?2, ?3, ?4, ?5, ?6, ?7) on conflict do nothing",
        )?
        .execute(params![
            self.id.0,
            self.endpoint.0,
            self.status.as_str(),
            self.attempts,
            self.lane,
            self.now.as_micros(),
            self.reason,
        ])?;
        Ok(())
    }
}

/// Whether a delivery has ended.
pub(super) fn has_ended(db: &Connection, id: MessageId, endpoint: EndpointId) -> Result<bool> {
    let mut look = db.prepare_cached(
        "/* ams:has_ended */ select 1 from deliveries where message_id = ?1 and endpoint_id = ?2",
    )?;
    Ok(look.exists(params![id.0, endpoint.0])?)
}

/// Where a message stands.
#[derive(Clone, Debug)]
pub(super) struct Whereabouts {
    pub(super) status: Status,
    pub(super) held: Option<Held>,
    pub(super) attempts: i32,
    pub(super) lane: String,
    /// Only of one that waits for a further attempt.
    pub(super) due_at: Option<Timestamp>,
    pub(super) finished_at: Option<Timestamp>,
    pub(super) reason: Option<String>,
}

impl Whereabouts {
    /// In no place: no feed has come to it.
    pub(super) const NEW: Whereabouts = Whereabouts {
        status: Status::Pending,
        held: None,
        attempts: 0,
        lane: String::new(),
        due_at: None,
        finished_at: None,
        reason: None,
    };
}

/// Where these messages stand. Those that are not in the answer stand nowhere. Batches and leases are looked through
/// once for all that stand nowhere else.
pub(super) fn find(db: &Connection, ids: &[MessageId]) -> Result<HashMap<MessageId, Whereabouts>> {
    let mut found = HashMap::with_capacity(ids.len());
    let mut others = HashSet::new();
    for id in ids {
        let at = match ended(db, *id)? {
            Some(at) => Some(at),
            None => waiting(db, *id)?,
        };
        match at {
            Some(at) => drop(found.insert(*id, at)),
            None => drop(others.insert(*id)),
        }
    }
    for (kind, status) in [(Kind::Leases, Status::Processing), (Kind::Batches, Status::Queued)] {
        for row in batch::holding(db, kind, &others)? {
            for (position, id) in row.ids.iter().enumerate() {
                if row.left.has(position) && others.remove(id) {
                    let (attempts, lane) = (row.attempts(position), row.lane.clone());
                    found.insert(*id, Whereabouts { status, attempts, lane, ..Whereabouts::NEW });
                }
            }
        }
    }
    Ok(found)
}

fn ended(db: &Connection, id: MessageId) -> Result<Option<Whereabouts>> {
    let mut statement = db.prepare_cached(
        "/* ams:where_ended */ select status, attempts, lane, finished_at, reason from deliveries \
         where message_id = ?1 order by endpoint_id limit 1",
    )?;
    let ended = statement.query_row([id.0], |row| {
        Ok(Whereabouts {
            status: Status::read(&text(row, 0)?),
            attempts: row.get(1)?,
            lane: text(row, 2)?,
            finished_at: Some(our_time(row, 3)?),
            reason: optional_text(row, 4)?,
            ..Whereabouts::NEW
        })
    });
    Ok(ended.optional()?)
}

fn waiting(db: &Connection, id: MessageId) -> Result<Option<Whereabouts>> {
    let mut statement = db.prepare_cached(
        "/* ams:where_waiting */ select held, attempts, lane, due_at, reason from waiting \
         where message_id = ?1 order by endpoint_id limit 1",
    )?;
    let waiting = statement.query_row([id.0], |row| {
        // One that has no lane yet waits for the first attempt, or for the first since it was redriven.
        let lane = text(row, 2)?;
        let new = lane.is_empty();
        Ok(Whereabouts {
            status: if new { Status::Pending } else { Status::Retrying },
            held: optional_text(row, 0)?.map(|held| Held::read(&held)),
            attempts: row.get(1)?,
            lane,
            due_at: our_optional_time(row, 3)?.filter(|_| !new),
            finished_at: None,
            reason: optional_text(row, 4)?,
        })
    });
    Ok(waiting.optional()?)
}
