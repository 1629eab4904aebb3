//! Batches and leases: their rows, their masks, and issuing again what is left in them.

use std::collections::{BTreeMap, HashSet};

use rusqlite::{Connection, OptionalExtension, Row, params};

use super::claim::{MESSAGE, ticket, unreadable};
use super::endpoint::Endpoints;
use super::place::End;
use super::{json, list, optional_text, text};
use crate::clock::Timestamp;
use crate::message::{MessageId, Status};
use crate::store::{
    Batch, BatchId, EndpointId, InstanceId, LogPosition, Mask, Reissue, Reissued, Result, Suspect,
    unreadable_reason,
};
use crate::ticket::Ticket;

/// The two kinds of rows that stand for many deliveries.
#[derive(Clone, Copy)]
pub(super) enum Kind {
    Batches,
    Leases,
}

/// A mask as it stands in the column `left`: one mark for each position of the batch.
pub(super) fn marks(mask: &Mask, positions: usize) -> String {
    (0..positions).map(|position| if mask.has(position) { '1' } else { '0' }).collect()
}

/// The mask that the column `left` says, and how many positions the batch has.
pub(super) fn mask(row: &Row<'_>, column: usize) -> rusqlite::Result<(Mask, usize)> {
    let marks = text(row, column)?;
    let set = marks.bytes().enumerate().filter(|(_, mark)| *mark == b'1').map(|(position, _)| position);
    Ok((set.collect(), marks.len()))
}

/// Writes what is left in a batch or lease of so many positions; one with nothing goes.
pub(super) fn write_left(db: &Connection, kind: Kind, id: i64, left: &Mask, positions: usize) -> Result<()> {
    if left.is_empty() {
        let delete = match kind {
            Kind::Batches => "/* ams:empty_batch */ delete from batches where id = ?1",
            Kind::Leases => "/* ams:empty_lease */ delete from leases where id = ?1",
        };
        db.prepare_cached(delete)?.execute([id])?;
    } else {
        let update = match kind {
            Kind::Batches => "/* ams:write_batch */ update batches set \"left\" = ?2 where id = ?1",
            Kind::Leases => "/* ams:write_lease */ update leases set \"left\" = ?2 where id = ?1",
        };
        db.prepare_cached(update)?.execute(params![id, marks(left, positions)])?;
    }
    Ok(())
}

/// Writes a new batch of these tickets, all of them queued. `None` for the expiries: as the messages say.
pub(super) fn write(
    db: &Connection,
    (lane, owner, now): (&str, InstanceId, Timestamp),
    tickets: &[Ticket],
    expiries: Option<Vec<Option<i64>>>,
) -> Result<()> {
    let Some(first) = tickets.first() else { return Ok(()) };
    /// A list, or nothing when no value of it says anything.
    fn unless<T: serde::Serialize>(values: Vec<T>, silent: impl Fn(&T) -> bool) -> Result<Option<String>> {
        if values.iter().all(silent) { Ok(None) } else { json(&values).map(Some) }
    }
    fn column<T>(tickets: &[Ticket], value: impl Fn(&Ticket) -> T) -> Vec<T> {
        tickets.iter().map(value).collect()
    }
    let ids = column(tickets, |ticket| ticket.id);
    let dues = column(tickets, |ticket| ticket.due_at.map(Timestamp::as_micros));
    db.prepare_cached(
        "/* ams:batch */ insert into batches (id, root, lane, owner, lo, hi, ids, endpoints, attempts, lane_tries, \
         dues, expiries, \"left\", created_at) values (?1, ?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13)",
    )?
    .execute(params![
        first.batch.0,
        lane,
        owner.0,
        ids.iter().min().map(|id| id.0),
        ids.iter().max().map(|id| id.0),
        json(&ids)?,
        json(&column(tickets, |ticket| ticket.endpoint_id))?,
        unless(column(tickets, |ticket| ticket.attempt - 1), |made| *made == 0)?,
        unless(column(tickets, |ticket| ticket.lane_tries), |made| *made == 0)?,
        unless(dues, Option::is_none)?,
        expiries.map(|expiries| json(&expiries)).transpose()?,
        "1".repeat(tickets.len()),
        now.as_micros(),
    ])?;
    Ok(())
}

/// Notes where the broker put a batch.
pub(super) fn acknowledge(db: &Connection, batch: BatchId, at: LogPosition) -> Result<()> {
    db.prepare_cached(
        "/* ams:acknowledge */ update batches set partition = ?2, last_offset = ?3 where id = ?1",
    )?
    .execute(params![batch.0, at.partition, at.offset])?;
    Ok(())
}

/// The oldest batches.
pub(super) fn batches(db: &Connection, now: Timestamp, limit: usize) -> Result<Vec<Batch>> {
    let mut statement = db.prepare_cached(
        "/* ams:batches */ select id, lane, owner, partition, last_offset, not exists ( \
             select 1 from instances where instances.id = batches.owner and lease_until > ?1) \
         from batches order by created_at, id limit ?2",
    )?;
    let limit = crate::store::limit(limit);
    let batches = statement.query_map(params![now.as_micros(), limit], |row| {
        let partition: Option<i32> = row.get(3)?;
        let offset: Option<i64> = row.get(4)?;
        Ok(Batch {
            id: BatchId(row.get(0)?),
            lane: text(row, 1)?,
            owner: InstanceId(row.get(2)?),
            log_position: partition.zip(offset).map(|(partition, offset)| LogPosition { partition, offset }),
            orphaned: row.get(5)?,
        })
    })?;
    Ok(batches.collect::<rusqlite::Result<_>>()?)
}

/// A batch or lease with those of its lists that say who stands in it.
pub(super) struct Holding {
    pub(super) id: i64,
    pub(super) lane: String,
    pub(super) ids: Vec<MessageId>,
    pub(super) endpoints: Vec<EndpointId>,
    attempts: Option<Vec<i32>>,
    pub(super) left: Mask,
    pub(super) positions: usize,
}

impl Holding {
    /// Attempts that the delivery at a position had had before.
    pub(super) fn attempts(&self, position: usize) -> i32 {
        self.attempts.as_ref().and_then(|attempts| attempts.get(position).copied()).unwrap_or(0)
    }
}

/// The batches or leases in which some of these messages may stand: those whose bounds do not rule all of them out.
pub(super) fn holding(db: &Connection, kind: Kind, wanted: &HashSet<MessageId>) -> Result<Vec<Holding>> {
    let (Some(first), Some(last)) = (wanted.iter().min(), wanted.iter().max()) else { return Ok(Vec::new()) };
    let mut statement = db.prepare_cached(match kind {
        Kind::Batches => {
            "/* ams:batches_holding */ select id, lane, ids, endpoints, attempts, \"left\" from batches \
             where lo <= ?2 and hi >= ?1"
        }
        Kind::Leases => {
            "/* ams:leases_holding */ select id, lane, ids, endpoints, attempts, \"left\" from leases \
             where lo <= ?2 and hi >= ?1"
        }
    })?;
    let mut rows = statement.query(params![first.0, last.0])?;
    let mut holding = Vec::new();
    while let Some(row) = rows.next()? {
        let (left, positions) = mask(row, 5)?;
        holding.push(Holding {
            id: row.get(0)?,
            lane: text(row, 1)?,
            ids: list(&text(row, 2)?)?,
            endpoints: list(&text(row, 3)?)?,
            attempts: optional_list(row, 4)?,
            left,
            positions,
        });
    }
    Ok(holding)
}

fn optional_list<T: serde::de::DeserializeOwned>(row: &Row<'_>, column: usize) -> Result<Option<Vec<T>>> {
    optional_text(row, column)?.map(|json| list(&json)).transpose()
}

/// What was taken away to be issued again: its row, as the new batch gets it.
struct Suspected {
    root: i64,
    lane: String,
    bounds: (i64, i64),
    lists: [Option<String>; 6],
    left: Mask,
    positions: usize,
}

/// Takes a batch away, or a lease without a living owner.
fn take(db: &Connection, suspect: Suspect) -> Result<Option<Suspected>> {
    let (statement, id) = match suspect {
        Suspect::Batch(id) => (
            "/* ams:reissue_batch */ delete from batches where id = ?1 \
             returning root, lane, lo, hi, ids, endpoints, attempts, lane_tries, dues, expiries, \"left\"",
            id.0,
        ),
        Suspect::Lease(id) => (
            "/* ams:reissue_lease */ delete from leases where id = ?1 and owner not in (select id from instances) \
             returning root, lane, lo, hi, ids, endpoints, attempts, lane_tries, dues, expiries, \"left\"",
            id.0,
        ),
    };
    let taken = db.prepare_cached(statement)?.query_row([id], |row| {
        let mut lists = [const { None }; 6];
        for (at, list) in lists.iter_mut().enumerate() {
            *list = optional_text(row, at + 4)?;
        }
        let (left, positions) = mask(row, 10)?;
        let bounds = (row.get(2)?, row.get(3)?);
        Ok(Suspected { root: row.get(0)?, lane: text(row, 1)?, bounds, lists, left, positions })
    });
    Ok(taken.optional()?)
}

/// Makes a new batch of what is left in another, or in a lease.
pub(super) fn reissue(db: &Connection, reissue: &Reissue) -> Result<Option<Reissued>> {
    let Some(taken) = take(db, reissue.suspect)? else { return Ok(None) };
    let tickets = tickets(db, &taken, reissue)?;
    if tickets.is_empty() {
        return Ok(None);
    }
    let left: Mask = tickets.iter().map(|ticket| usize::from(ticket.position)).collect();
    let [ids, endpoints, attempts, lane_tries, dues, expiries] = &taken.lists;
    db.prepare_cached(
        "/* ams:reissued */ insert into batches (id, root, lane, owner, lo, hi, ids, endpoints, attempts, lane_tries, \
         dues, expiries, \"left\", created_at) values (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14)",
    )?
    .execute(params![
        reissue.batch.0,
        taken.root,
        taken.lane,
        reissue.owner.0,
        taken.bounds.0,
        taken.bounds.1,
        ids,
        endpoints,
        attempts,
        lane_tries,
        dues,
        expiries,
        marks(&left, taken.positions),
        reissue.now.as_micros(),
    ])?;
    Ok(Some(Reissued { lane: taken.lane, tickets }))
}

/// The tickets of what is left. A delivery that has ended all the same is left out: it is the net under everything
/// else. So is one whose message is gone, and one that can't be read any more ends.
fn tickets(db: &Connection, taken: &Suspected, reissue: &Reissue) -> Result<Vec<Ticket>> {
    let lists = Lists::of(&taken.lists)?;
    let mut endpoints = Endpoints::new(db);
    let mut look = db.prepare_cached(&format!(
        "/* ams:reissue_message */ select {MESSAGE} from messages m where m.id = ?1 and not exists ( \
             select 1 from deliveries where message_id = m.id and endpoint_id = ?2)"
    ))?;
    let mut tickets = Vec::with_capacity(taken.left.count());
    for position in taken.left.positions() {
        let (Some(id), Some(endpoint)) = (lists.ids.get(position), lists.endpoints.get(position)) else {
            continue;
        };
        let mut rows = look.query(params![id.0, endpoint.0])?;
        let Some(row) = rows.next()? else { continue };
        let made = at(&lists.attempts, position).unwrap_or(0);
        let read = match ticket(db, row) {
            Ok(read) => read,
            Err(error) => {
                let why = unreadable_reason(&unreadable(row, &error));
                let (status, attempts, now) = (Status::Dead, made, reissue.now);
                let (id, endpoint, lane, reason) = (*id, *endpoint, taken.lane.as_str(), Some(why.as_str()));
                End { id, endpoint, status, attempts, lane, reason, now }.write(db)?;
                continue;
            }
        };
        let due_at = at(&lists.dues, position).flatten().map(Timestamp::from_micros);
        let expires_at = match at(&lists.expiries, position) {
            Some(expires_at) => expires_at.map(Timestamp::from_micros),
            None => read.expires_at,
        };
        tickets.push(Ticket {
            batch: reissue.batch,
            position: u16::try_from(position).unwrap_or(u16::MAX),
            endpoint_id: *endpoint,
            endpoint: endpoints.numbered(*endpoint)?.map_or(read.endpoint, |found| found.name),
            attempt: made + 1,
            lane_tries: at(&lists.lane_tries, position).unwrap_or(0),
            due_at: due_at.filter(|due_at| *due_at > reissue.now),
            expires_at,
            ..read
        });
    }
    Ok(tickets)
}

/// The lists of a batch.
struct Lists {
    ids: Vec<MessageId>,
    endpoints: Vec<EndpointId>,
    attempts: Option<Vec<i32>>,
    lane_tries: Option<Vec<i32>>,
    dues: Option<Vec<Option<i64>>>,
    expiries: Option<Vec<Option<i64>>>,
}

impl Lists {
    fn of([ids, endpoints, attempts, lane_tries, dues, expiries]: &[Option<String>; 6]) -> Result<Lists> {
        fn read<T: serde::de::DeserializeOwned>(json: &Option<String>) -> Result<Option<Vec<T>>> {
            json.as_deref().map(list).transpose()
        }
        Ok(Lists {
            ids: read(ids)?.unwrap_or_default(),
            endpoints: read(endpoints)?.unwrap_or_default(),
            attempts: read(attempts)?,
            lane_tries: read(lane_tries)?,
            dues: read(dues)?,
            expiries: read(expiries)?,
        })
    }
}

/// A value of a list that may be missing.
fn at<T: Copy>(list: &Option<Vec<T>>, position: usize) -> Option<T> {
    list.as_ref()?.get(position).copied()
}

/// What is left in batches or leases of these roots.
pub(super) type Lefts = BTreeMap<i64, (BatchId, Mask, usize)>;

/// Reads what is left in the batches or leases of these roots.
pub(super) fn of_roots(db: &Connection, kind: Kind, roots: &[BatchId]) -> Result<Lefts> {
    let mut statement = db.prepare_cached(match kind {
        Kind::Batches => {
            "/* ams:batches_of_root */ select id, \"left\" from batches indexed by batches_by_root where root = ?1"
        }
        Kind::Leases => {
            "/* ams:leases_of_root */ select id, \"left\" from leases indexed by leases_by_root where root = ?1"
        }
    })?;
    let mut lefts = Lefts::new();
    for root in roots {
        let mut rows = statement.query([root.0])?;
        while let Some(row) = rows.next()? {
            let (left, positions) = mask(row, 1)?;
            lefts.insert(row.get(0)?, (*root, left, positions));
        }
    }
    Ok(lefts)
}
