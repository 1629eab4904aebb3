//! Claims: from the feeds and from what waits, into batches.

use std::collections::HashSet;

use rusqlite::types::Type;
use rusqlite::{Connection, Row, params};
use serde_json::value::RawValue;

use super::endpoint::Endpoints;
use super::place::{End, Wait, wait_no_more};
use super::{batch, optional_text, our_optional_time, our_time, writers_time};
use crate::clock::Timestamp;
use crate::message::{Held, MessageId, Status};
use crate::store::{
    BATCH_BYTES, BATCH_MAX, BatchId, Claim, Claimed, Due, DueNow, EndpointId, InstanceId, Result, Urgency,
    unreadable_reason,
};
use crate::ticket::Ticket;

/// A [`Claim`] that can go to another thread.
pub(super) struct Owned {
    due: OwnedDue,
    limit: i64,
    lane: String,
    batch: BatchId,
    saturated: HashSet<String>,
    owner: InstanceId,
    now: Timestamp,
}

/// A [`Due`] that can go to another thread.
enum OwnedDue {
    New(Urgency),
    Timed(String, Timestamp),
}

impl From<&Claim<'_>> for Owned {
    fn from(claim: &Claim<'_>) -> Owned {
        Owned {
            due: match claim.due {
                Due::New(urgency) => OwnedDue::New(urgency),
                Due::Timed { lane, by } => OwnedDue::Timed(lane.to_owned(), by),
            },
            limit: crate::store::limit(claim.limit.min(BATCH_MAX)),
            lane: claim.lane.to_owned(),
            batch: claim.batch,
            saturated: claim.saturated.iter().cloned().collect(),
            owner: claim.owner,
            now: claim.now,
        }
    }
}

/// The messages that a feed has not come to, by its class. Literals: SQLite uses a partial index only when it can see
/// that the condition implies the index's own.
macro_rules! unclaimed {
    (urgent) => {
        " from messages m indexed by messages_urgent \
         where m.priority > 0 and m.id > (select position from feed where class = 0)"
    };
    (normal) => {
        " from messages m indexed by messages_normal \
         where m.priority = 0 and m.id > (select position from feed where class = 1)"
    };
    (bulk) => {
        " from messages m indexed by messages_bulk \
         where m.priority < 0 and m.id > (select position from feed where class = 2)"
    };
}

/// The source of the messages that no feed has come to, in the order of [`Urgency::ALL`].
pub(super) const UNCLAIMED: [&str; 3] = [unclaimed!(urgent), unclaimed!(normal), unclaimed!(bulk)];

/// The columns of a message that [`ticket`] reads.
pub(super) const MESSAGE: &str = "m.id, m.endpoint, m.created_at, m.recipient, m.content, m.content_type, m.headers, \
     m.ordering_key, m.priority, m.expires_at";

/// What waits on a lane and is due.
const DUE: &str = " from waiting w indexed by waiting_due";
const DUE_WHERE: &str =
    " where w.held is null and w.lane = ?1 and w.due_at <= ?2 order by w.due_at, w.message_id";

/// Whether any feed has something to read, and on which of these lanes something is due.
pub(super) fn due(db: &Connection, lanes: &[&str], by: Timestamp) -> Result<DueNow> {
    // One transaction takes the file's locks once for all that is asked.
    db.prepare_cached("begin")?.execute([])?;
    let looked = due_within(db, lanes, by.as_micros());
    db.prepare_cached("commit")?.execute([])?;
    looked
}

fn due_within(db: &Connection, lanes: &[&str], by: i64) -> Result<DueNow> {
    let mut new = db.prepare_cached(concat!(
        "/* ams:any_new */ select exists (select 1",
        unclaimed!(normal),
        ") or exists (select 1",
        unclaimed!(urgent),
        ") or exists (select 1",
        unclaimed!(bulk),
        ")"
    ))?;
    let mut timed = db.prepare_cached(
        "/* ams:any_timed */ select 1 from waiting indexed by waiting_due \
         where held is null and lane = ?1 and due_at <= ?2 limit 1",
    )?;
    let mut due = DueNow { new: new.query_row([], |row| row.get(0))?, lanes: Vec::new() };
    for lane in lanes {
        if timed.exists(params![lane, by])? {
            due.lanes.push((*lane).to_owned());
        }
    }
    Ok(due)
}

/// Why a row can't be read: the column, and what is wrong with it.
pub(super) fn unreadable(row: &Row<'_>, error: &rusqlite::Error) -> String {
    use rusqlite::Error::{FromSqlConversionFailure, IntegralValueOutOfRange, InvalidColumnType, Utf8Error};
    let (column, why) = match error {
        FromSqlConversionFailure(column, _, why) => (*column, why.to_string()),
        Utf8Error(column, why) => (*column, why.to_string()),
        IntegralValueOutOfRange(column, value) => (*column, format!("the number {value} is too large")),
        InvalidColumnType(column, _, kind) => (*column, format!("it is of type {kind}")),
        other => return other.to_string(),
    };
    format!("{}: {why}", row.as_ref().column_name(column).unwrap_or("a column"))
}

/// The ticket of a first attempt of a message, as the message stands in the columns [`MESSAGE`]; its batch and endpoint
/// are still to come.
pub(super) fn ticket(db: &Connection, row: &Row<'_>) -> rusqlite::Result<Ticket> {
    Ok(Ticket {
        id: MessageId(row.get(0)?),
        batch: BatchId(0),
        position: 0,
        endpoint_id: EndpointId(0),
        endpoint: row.get(1)?,
        created_at: writers_time(db, row, 2)?.unwrap_or_default(),
        recipient: row.get(3)?,
        content: row.get(4)?,
        attempt: 1,
        lane_tries: 0,
        content_type: row.get(5)?,
        headers: row.get::<_, Option<String>>(6)?.map(|headers| raw_json(headers, 6)).transpose()?,
        ordering_key: row.get(7)?,
        priority: row.get(8)?,
        expires_at: writers_time(db, row, 9)?,
        due_at: None,
    })
}

fn raw_json(json: String, column: usize) -> rusqlite::Result<Box<RawValue>> {
    let wrong = |error| rusqlite::Error::FromSqlConversionFailure(column, Type::Text, Box::new(error));
    RawValue::from_string(json).map_err(wrong)
}

/// Takes what is due.
pub(super) fn claim(db: &Connection, claim: &Owned) -> Result<Claimed> {
    match &claim.due {
        OwnedDue::New(urgency) => claim_new(db, claim, *urgency),
        OwnedDue::Timed(lane, by) => claim_timed(db, claim, lane, *by),
    }
}

impl Owned {
    /// Adds a ticket to those of the new batch.
    fn take(&self, tickets: &mut Vec<Ticket>, ticket: Ticket) {
        let position = u16::try_from(tickets.len()).unwrap_or(u16::MAX);
        tickets.push(Ticket { batch: self.batch, position, ..ticket });
    }

    /// Ends a delivery that was never tried on its way.
    fn end(&self, db: &Connection, row: &Waiting, status: Status, reason: Option<&str>) -> Result<()> {
        let (attempts, lane) = (row.attempts, row.lane.as_str());
        End { id: row.id, endpoint: row.endpoint, status, attempts, lane, reason, now: self.now }.write(db)
    }
}

/// A message that a feed comes to.
struct New {
    id: MessageId,
    /// Its endpoint's name, if it can be read.
    endpoint: Option<String>,
    /// Its ticket, and when it is to be sent; or why it can't be read.
    read: std::result::Result<(Ticket, Option<Timestamp>), String>,
}

/// Reads a feed on. Every message up to its new position has a place then.
fn claim_new(db: &Connection, claim: &Owned, urgency: Urgency) -> Result<Claimed> {
    let class = usize::from(urgency.number().unsigned_abs());
    let source = UNCLAIMED.get(class).copied().unwrap_or_default();
    let statement = format!("/* ams:claim_new */ select {MESSAGE}, m.send_at{source} order by m.id limit ?1");
    let mut statement = db.prepare_cached(&statement)?;
    let rows = statement.query_map([claim.limit], |row| {
        let read = ticket(db, row).and_then(|ticket| Ok((ticket, writers_time(db, row, 10)?)));
        let read = read.map_err(|error| unreadable(row, &error));
        Ok(New { id: MessageId(row.get(0)?), endpoint: row.get(1).ok(), read })
    })?;
    let rows = within_bytes(rows, |row| row.read.as_ref().map_or(0, |(ticket, _)| ticket.bytes()))?;
    let Some(last) = rows.last().map(|row| row.id) else { return Ok(Claimed::default()) };
    let mut claimed =
        Claimed { tickets: Vec::with_capacity(rows.len()), seen: rows.len(), unreadable: Vec::new() };
    let cancelled = cancelled(db, rows.first().map_or(last, |row| row.id), last)?;
    let mut endpoints = Endpoints::new(db);
    for row in rows {
        if cancelled.contains(&row.id) {
            forget_cancel(db, row.id)?;
        } else {
            place_new(db, claim, row, &mut endpoints, &mut claimed)?;
        }
    }
    db.prepare_cached("/* ams:move_feed */ update feed set position = ?2 where class = ?1")?
        .execute(params![urgency.number(), last.0])?;
    batch::write(db, (&claim.lane, claim.owner, claim.now), &claimed.tickets, None)?;
    Ok(claimed)
}

/// The first rows, up to [`BATCH_BYTES`].
fn within_bytes<T>(
    rows: impl Iterator<Item = rusqlite::Result<T>>,
    bytes_of: impl Fn(&T) -> usize,
) -> Result<Vec<T>> {
    let (mut within, mut bytes) = (Vec::new(), 0);
    for row in rows {
        let row = row?;
        bytes += bytes_of(&row);
        if bytes > BATCH_BYTES && !within.is_empty() {
            break;
        }
        within.push(row);
    }
    Ok(within)
}

/// Gives a message that a feed comes to its first place.
fn place_new(
    db: &Connection,
    claim: &Owned,
    row: New,
    endpoints: &mut Endpoints<'_>,
    claimed: &mut Claimed,
) -> Result<()> {
    let endpoint = row.endpoint.as_deref().map(|name| endpoints.named(name)).transpose()?;
    let number = endpoint.map_or(EndpointId(0), |endpoint| endpoint.id);
    let (ticket, send_at) = match row.read {
        Ok((ticket, send_at)) => (Ticket { endpoint_id: number, ..ticket }, send_at),
        Err(why) => {
            claim.end(db, &Waiting::never(row.id, number), Status::Dead, Some(&unreadable_reason(&why)))?;
            claimed.unreadable.push(row.id);
            return Ok(());
        }
    };
    let held =
        endpoint.map_or(Some(Held::EndpointDisabled), |endpoint| endpoint.access.held(false, claim.now));
    let held = held.or(claim.saturated.contains(&ticket.endpoint).then_some(Held::EndpointBusy));
    if ticket.is_expired(claim.now) {
        claim.end(db, &Waiting::never(row.id, number), Status::Expired, None)
    } else if let Some(due_at) = send_at.filter(|at| *at > claim.now) {
        Wait { due_at, ..Wait::again(&ticket, "", claim.now) }.write(db)
    } else if held.is_some() {
        Wait { held, ..Wait::again(&ticket, "", claim.now) }.write(db)
    } else {
        claim.take(&mut claimed.tickets, ticket);
        Ok(())
    }
}

/// Which messages of these ids were cancelled before a feed came to them.
fn cancelled(db: &Connection, first: MessageId, last: MessageId) -> Result<HashSet<MessageId>> {
    let mut statement = db.prepare_cached(
        "/* ams:cancels */ select message_id from cancels where message_id between ?1 and ?2",
    )?;
    let ids = statement.query_map([first.0, last.0], |row| row.get(0).map(MessageId))?;
    Ok(ids.collect::<rusqlite::Result<_>>()?)
}

/// Takes a message out of the cancelled that no feed has come to. Whether it was there.
pub(super) fn forget_cancel(db: &Connection, id: MessageId) -> Result<bool> {
    let mut delete =
        db.prepare_cached("/* ams:forget_cancel */ delete from cancels where message_id = ?1")?;
    Ok(delete.execute([id.0])? > 0)
}

/// A delivery that waits and is due.
struct Waiting {
    id: MessageId,
    endpoint: EndpointId,
    attempts: i32,
    lane: String,
    /// Whether its time was reserved under its endpoint's rate.
    reserved: bool,
}

impl Waiting {
    /// One that has not waited yet.
    fn never(id: MessageId, endpoint: EndpointId) -> Waiting {
        Waiting { id, endpoint, attempts: 0, lane: String::new(), reserved: false }
    }
}

/// What became of a due row's message.
enum DueMessage {
    /// It has ended meanwhile, or is gone.
    Over,
    Unreadable(String),
    /// Its ticket with the wait's own expiry; when it expires as the message says; and the reason of its wait.
    Ticket(Box<Ticket>, Option<Timestamp>, Option<String>),
}

/// Takes what waits on a lane and is due.
fn claim_timed(db: &Connection, claim: &Owned, lane: &str, by: Timestamp) -> Result<Claimed> {
    let mut statement = db.prepare_cached(&format!(
            "/* ams:claim_timed */ select {MESSAGE}, w.message_id, w.endpoint_id, w.attempts, w.lane_tries, w.due_at, \
             w.expires_at, w.reason, exists (select 1 from deliveries d where d.message_id = w.message_id \
                 and d.endpoint_id = w.endpoint_id), w.reserved{DUE} left join messages m on m.id = w.message_id{DUE_WHERE} limit ?3"
        ))?;
    let rows = statement
        .query_map(params![lane, by.as_micros(), claim.limit], |row| timed(db, row, claim.now, lane))?;
    let rows = within_bytes(rows, |(_, found)| match found {
        DueMessage::Ticket(ticket, ..) => ticket.bytes(),
        DueMessage::Over | DueMessage::Unreadable(_) => 0,
    })?;
    let mut claimed =
        Claimed { tickets: Vec::with_capacity(rows.len()), seen: rows.len(), unreadable: Vec::new() };
    let mut endpoints = Endpoints::new(db);
    let (mut expiries, mut differ) = (Vec::with_capacity(rows.len()), false);
    for (row, found) in rows {
        let (ticket, said, reason) = match found {
            DueMessage::Ticket(ticket, said, reason) => (*ticket, said, reason),
            DueMessage::Over => {
                wait_no_more(db, row.id, row.endpoint)?;
                continue;
            }
            DueMessage::Unreadable(why) => {
                wait_no_more(db, row.id, row.endpoint)?;
                claim.end(db, &row, Status::Dead, Some(&unreadable_reason(&why)))?;
                claimed.unreadable.push(row.id);
                continue;
            }
        };
        let endpoint = endpoints.numbered(row.endpoint)?;
        let held = endpoint
            .as_ref()
            .map_or(Some(Held::EndpointDisabled), |found| found.access.held(row.reserved, claim.now));
        if ticket.is_expired(claim.now) {
            wait_no_more(db, row.id, row.endpoint)?;
            claim.end(db, &row, Status::Expired, reason.as_deref())?;
        } else if let Some(held) = held {
            hold(db, &row, held)?;
        } else {
            wait_no_more(db, row.id, row.endpoint)?;
            differ |= ticket.expires_at != said;
            expiries.push(ticket.expires_at.map(Timestamp::as_micros));
            let endpoint = endpoint.map_or(ticket.endpoint, |found| found.name);
            claim.take(&mut claimed.tickets, Ticket { endpoint, ..ticket });
        }
    }
    let expiries = differ.then_some(expiries);
    batch::write(db, (&claim.lane, claim.owner, claim.now), &claimed.tickets, expiries)?;
    Ok(claimed)
}

/// Reads a due row.
fn timed(
    db: &Connection,
    row: &Row<'_>,
    now: Timestamp,
    lane: &str,
) -> rusqlite::Result<(Waiting, DueMessage)> {
    let id = MessageId(row.get(10)?);
    let endpoint = EndpointId(row.get(11).unwrap_or(0));
    let (attempts, reserved) = (row.get(12).unwrap_or(0), row.get(18).unwrap_or(false));
    let waiting = Waiting { id, endpoint, attempts, lane: lane.to_owned(), reserved };
    if row.get(17)? || row.get_ref(0)?.data_type() == Type::Null {
        return Ok((waiting, DueMessage::Over));
    }
    let read = || {
        let written = ticket(db, row)?;
        let said = written.expires_at;
        let due_at = our_time(row, 14)?;
        let ticket = Ticket {
            endpoint_id: EndpointId(row.get(11)?),
            attempt: row.get::<_, i32>(12)?.saturating_add(1),
            lane_tries: row.get(13)?,
            due_at: Some(due_at).filter(|at| *at > now),
            expires_at: our_optional_time(row, 15)?,
            ..written
        };
        Ok(DueMessage::Ticket(Box::new(ticket), said, optional_text(row, 16)?))
    };
    let found = read().unwrap_or_else(|error| DueMessage::Unreadable(unreadable(row, &error)));
    Ok((waiting, found))
}

/// Holds a due delivery whose endpoint takes none.
fn hold(db: &Connection, row: &Waiting, held: Held) -> Result<()> {
    db.prepare_cached(
        "/* ams:hold_timed */ update waiting set held = ?3, reserved = 0 where message_id = ?1 and endpoint_id = ?2",
    )?
    .execute(params![row.id.0, row.endpoint.0, held.as_str()])?;
    Ok(())
}
