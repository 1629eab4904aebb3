//! Claims and their ledger.

use std::collections::HashSet;

use rusqlite::types::Type;
use rusqlite::{Connection, params};
use serde_json::value::RawValue;

use super::{json, list, our_optional_time, our_time, text, writers_time};
use crate::clock::Timestamp;
use crate::message::{Epoch, Held, MessageId, Ticket};
use crate::store::{
    Batch, BatchId, Claim, Claimed, Due, DueNow, InstanceId, Place, Result, unreadable_reason,
};

/// A [`Claim`] that can go to another thread.
pub(super) struct Owned {
    due: OwnedDue,
    limit: usize,
    lane: String,
    open: HashSet<String>,
    busy: HashSet<String>,
    pass_busy: bool,
    owner: InstanceId,
    now: Timestamp,
}

/// A [`Due`] that can go to another thread.
enum OwnedDue {
    New(MessageId, MessageId),
    Timed(String, Timestamp),
}

impl From<&Claim<'_>> for Owned {
    fn from(claim: &Claim<'_>) -> Owned {
        Owned {
            due: match claim.due {
                Due::New { after, up_to } => OwnedDue::New(after, up_to),
                Due::Timed { lane, by } => OwnedDue::Timed(lane.to_owned(), by),
            },
            limit: claim.limit,
            lane: claim.lane.to_owned(),
            open: claim.open.iter().cloned().collect(),
            busy: claim.busy.iter().cloned().collect(),
            pass_busy: claim.pass_busy,
            owner: claim.owner,
            now: claim.now,
        }
    }
}

impl Owned {
    /// Why a row is not to be queued.
    fn held(&self, ticket: &Ticket) -> Option<Held> {
        if !self.open.contains(&ticket.endpoint) {
            Some(Held::EndpointClosed)
        } else if ticket.epoch == 0 && self.busy.contains(&ticket.endpoint) {
            Some(Held::EndpointBusy)
        } else {
            None
        }
    }
}

/// The source of due rows, up to its order: the text of each statement here differs only in this.
macro_rules! due_rows {
    (new $(, $passed:literal)?) => {
        concat!(
            " from messages indexed by messages_fresh \
             where status = 'pending' and held is null and send_at is null and id > ?1 and id <= ?3",
            $($passed,)?
            " order by id limit ?2"
        )
    };
    (timed) => {
        " from messages indexed by messages_timed \
         where lane = ?1 and timed_at is not null and timed_at <= ?3 \
         order by timed_at, id limit ?2"
    };
}

macro_rules! fields {
    () => {
        "id, epoch, attempts, endpoint, created_at, recipient, content, content_type, headers, ordering_key, \
         expires_at is not null \
         and cast(round((julianday(expires_at) - 2440587.5) * 86400000.0) as integer) * 1000 <= ?4, \
         timed_at"
    };
}

/// Whether any new row is due, and which of these lanes' timed rows.
pub(super) fn due(db: &Connection, lanes: &[&str], by: Timestamp) -> Result<DueNow> {
    // One transaction takes the file's locks once for all that is asked.
    db.prepare_cached("begin")?.execute([])?;
    let looked = due_within(db, lanes, by.as_micros());
    db.prepare_cached("commit")?.execute([])?;
    looked
}

fn due_within(db: &Connection, lanes: &[&str], by: i64) -> Result<DueNow> {
    let mut new = db.prepare_cached(concat!("/* ams:any_new */ select 1", due_rows!(new)))?;
    let mut timed = db.prepare_cached(concat!("/* ams:any_timed */ select 1", due_rows!(timed)))?;
    let mut due = DueNow { new: new.exists(params![0, 1, i64::MAX])?, lanes: Vec::new() };
    for lane in lanes {
        if timed.exists(params![lane, 1, by])? {
            due.lanes.push((*lane).to_owned());
        }
    }
    Ok(due)
}

/// A due row.
struct Row {
    id: MessageId,
    /// Its ticket, and whether its time is over; or why it can't be read.
    read: std::result::Result<(Ticket, bool), String>,
}

fn due_rows(db: &Connection, claim: &Owned) -> Result<Vec<Row>> {
    let limit = i64::try_from(claim.limit).unwrap_or(i64::MAX);
    let now = claim.now.as_micros();
    let read = |row: &rusqlite::Row<'_>| {
        let due = || {
            let due_at = our_optional_time(row, 11)?.filter(|at| *at > claim.now);
            Ok((Ticket { due_at, ..ticket(db, row)? }, row.get(10)?))
        };
        let read = due().map_err(|error| unreadable(row, &error));
        Ok(Row { id: MessageId(row.get(0)?), read })
    };
    let none = HashSet::new();
    let passed = json(if claim.pass_busy { &claim.busy } else { &none })?;
    let rows = match &claim.due {
        OwnedDue::New(after, up_to) => db
            .prepare_cached(concat!(
                "/* ams:claim_new */ select ",
                fields!(),
                due_rows!(new, " and (epoch > 0 or endpoint not in (select value from json_each(?5)))")
            ))?
            .query_map(params![after.0, limit, up_to.0, now, passed], read)?
            .collect(),
        OwnedDue::Timed(lane, by) => db
            .prepare_cached(concat!("/* ams:claim_timed */ select ", fields!(), due_rows!(timed)))?
            .query_map(params![lane, limit, by.as_micros(), now], read)?
            .collect::<rusqlite::Result<Vec<Row>>>(),
    };
    Ok(rows?)
}

/// Why a row can't be read: the column, and what is wrong with it.
fn unreadable(row: &rusqlite::Row<'_>, error: &rusqlite::Error) -> String {
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

/// The ticket of a row, as the row stands: id, epoch, attempts, endpoint, created_at, recipient, content,
/// content_type, headers and ordering_key, from the first column on.
pub(super) fn ticket(db: &Connection, row: &rusqlite::Row<'_>) -> rusqlite::Result<Ticket> {
    Ok(Ticket {
        id: MessageId(row.get(0)?),
        epoch: row.get(1)?,
        attempt: row.get(2)?,
        endpoint: row.get(3)?,
        created_at: writers_time(db, row, 4)?.unwrap_or_default(),
        recipient: row.get(5)?,
        content: row.get(6)?,
        content_type: row.get(7)?,
        headers: row.get::<_, Option<String>>(8)?.map(|headers| raw_json(headers, 8)).transpose()?,
        ordering_key: row.get(9)?,
        due_at: None,
    })
}

fn raw_json(json: String, column: usize) -> rusqlite::Result<Box<RawValue>> {
    let wrong = |error| rusqlite::Error::FromSqlConversionFailure(column, Type::Text, Box::new(error));
    RawValue::from_string(json).map_err(wrong)
}

/// Takes due rows: most become `queued`, with one ledger row for all.
pub(super) fn claim(db: &Connection, claim: &Owned) -> Result<Claimed> {
    let rows = due_rows(db, claim)?;
    let mut claimed = Claimed {
        batch: None,
        tickets: Vec::with_capacity(rows.len()),
        seen: rows.len(),
        last: rows.iter().map(|row| row.id).max(),
        unreadable: Vec::new(),
    };
    let mut queue = db.prepare_cached(
        "/* ams:claim */ update messages set status = 'queued', epoch = epoch + 1 where id = ?1",
    )?;
    for Row { id, read } in rows {
        let (mut ticket, expired) = match read {
            Ok(read) => read,
            Err(why) => {
                end_unreadable(db, id, &why, claim.now)?;
                claimed.unreadable.push(id);
                continue;
            }
        };
        if expired {
            expire(db, ticket.id, claim.now)?;
        } else if let Some(held) = claim.held(&ticket) {
            db.prepare_cached(
                "/* ams:claim_hold */ update messages set held = ?2, epoch = epoch + 1 where id = ?1",
            )?
            .execute(params![ticket.id.0, held.as_str()])?;
        } else {
            queue.execute([ticket.id.0])?;
            ticket.epoch += 1;
            ticket.attempt += 1;
            claimed.tickets.push(ticket);
        }
    }
    if !claimed.tickets.is_empty() {
        let ids: Vec<_> = claimed.tickets.iter().map(|ticket| ticket.id).collect();
        let epochs: Vec<_> = claimed.tickets.iter().map(|ticket| ticket.epoch).collect();
        db.prepare_cached(
            "/* ams:ledger */ insert into batches (lane, owner, ids, epochs, created_at) values (?1, ?2, ?3, ?4, ?5)",
        )?
        .execute(params![claim.lane, claim.owner.0, json(&ids)?, json(&epochs)?, claim.now.as_micros()])?;
        claimed.batch = Some(BatchId(db.last_insert_rowid()));
    }
    Ok(claimed)
}

/// Ends a message that can't be read.
fn end_unreadable(db: &Connection, id: MessageId, why: &str, now: Timestamp) -> Result<()> {
    db.prepare_cached(
        "/* ams:end_unreadable */ update messages set status = 'dead', held = null, due_at = null, \
         finished_at = ?2, reason = ?3 where id = ?1",
    )?
    .execute(params![id.0, now.as_micros(), unreadable_reason(why)])?;
    Ok(())
}

/// Makes a message whose time is over `expired`.
pub(super) fn expire(db: &Connection, id: MessageId, now: Timestamp) -> Result<()> {
    db.prepare_cached(
        "/* ams:expire */ update messages set status = 'expired', due_at = null, finished_at = ?2 where id = ?1",
    )?
    .execute(params![id.0, now.as_micros()])?;
    Ok(())
}

/// A claimed row as it was before: due by `?4`, the present, at the earliest, and never before its time.
macro_rules! as_it_was {
    () => {
        "status = case when attempts = 0 then 'pending' else 'retrying' end, \
         due_at = case when attempts = 0 then null else max(coalesce(due_at, ?4), ?4) end"
    };
}
pub(super) use as_it_was;

/// Gives a row back as it was before its claim when it is `status` in this epoch. Whether it was.
pub(super) fn give_back(
    db: &Connection,
    id: MessageId,
    epoch: Epoch,
    status: &str,
    now: Timestamp,
) -> Result<bool> {
    let given = db
        .prepare_cached(concat!(
            "/* ams:give_back */ update messages set ",
            as_it_was!(),
            " where id = ?1 and epoch = ?2 and status = ?3",
        ))?
        .execute(params![id.0, epoch, status, now.as_micros()])?;
    Ok(given > 0)
}

/// Notes where the broker put a batch.
pub(super) fn acknowledge(db: &Connection, batch: BatchId, place: Place) -> Result<()> {
    db.prepare_cached(
        "/* ams:acknowledge */ update batches set partition = ?2, last_offset = ?3 where id = ?1",
    )?
    .execute(params![batch.0, place.partition, place.offset])?;
    Ok(())
}

/// The oldest ledger rows.
pub(super) fn batches(db: &Connection, now: Timestamp, limit: usize) -> Result<Vec<Batch>> {
    let mut statement = db.prepare_cached(
        "/* ams:batches */ select id, lane, owner, created_at, partition, last_offset, not exists ( \
             select 1 from instances where instances.id = batches.owner and lease_until > ?1) \
         from batches order by id limit ?2",
    )?;
    let limit = i64::try_from(limit).unwrap_or(i64::MAX);
    let batches = statement.query_map(params![now.as_micros(), limit], |row| {
        let partition: Option<i32> = row.get(4)?;
        let offset: Option<i64> = row.get(5)?;
        Ok(Batch {
            id: BatchId(row.get(0)?),
            lane: row.get(1)?,
            owner: InstanceId(row.get(2)?),
            created_at: our_time(row, 3)?,
            place: partition.zip(offset).map(|(partition, offset)| Place { partition, offset }),
            orphaned: row.get(6)?,
        })
    })?;
    Ok(batches.collect::<rusqlite::Result<_>>()?)
}

/// Gives back what of these batches is still `queued` in their epoch, and removes them.
pub(super) fn requeue(db: &Connection, batches: &[BatchId], now: Timestamp) -> Result<u64> {
    let mut given = 0;
    for batch in batches {
        let removed = db
            .prepare_cached("/* ams:requeue */ delete from batches where id = ?1 returning ids, epochs")?
            .query_map([batch.0], |row| Ok((text(row, 0)?, text(row, 1)?)))?
            .collect::<rusqlite::Result<Vec<_>>>()?;
        for (ids, epochs) in removed {
            let ids: Vec<i64> = list(&ids)?;
            for (id, epoch) in ids.into_iter().zip(list::<Epoch>(&epochs)?) {
                given += u64::from(give_back(db, MessageId(id), epoch, "queued", now)?);
            }
        }
    }
    Ok(given)
}
