//! Endpoints, and the numbers that deliveries know them by.

use std::collections::HashMap;

use rusqlite::{Connection, OptionalExtension, Row, params};

use super::registry::{in_millis, millis};
use super::{json, list, optional_text, our_optional_time, text};
use crate::breaker;
use crate::clock::Timestamp;
use crate::message::Held;
use crate::rate::Rate;
use crate::store::operate::Deletion;
use crate::store::{Endpoint, EndpointId, Result};

/// All endpoints, by name.
pub(super) fn endpoints(db: &Connection) -> Result<Vec<Endpoint>> {
    let mut statement = db.prepare_cached(
        "/* ams:endpoints */ select name, url, timeout_ms, in_flight_max, rate_count, rate_interval_ms, final_statuses, enabled, secret \
         from endpoints order by name",
    )?;
    let mut rows = statement.query([])?;
    let mut endpoints = Vec::new();
    while let Some(row) = rows.next()? {
        endpoints.push(Endpoint {
            name: text(row, 0)?,
            url: text(row, 1)?,
            timeout: millis(row.get(2)?),
            in_flight_max: u32::try_from(row.get::<_, i64>(3)?).unwrap_or(u32::MAX),
            rate: rate(row, 4)?,
            final_statuses: final_statuses(&text(row, 6)?),
            enabled: row.get(7)?,
            secret: optional_text(row, 8)?,
        });
    }
    Ok(endpoints)
}

/// The rate of an endpoint, in two columns from the first on.
fn rate(row: &Row<'_>, first: usize) -> rusqlite::Result<Option<Rate>> {
    let ms = row.get(first + 1)?;
    Ok(row.get::<_, Option<i64>>(first)?.map(|count| Rate::of(count, ms)))
}

/// Statuses of an endpoint. What is no status is passed over: a list that the program can't hold must not stop the
/// messages of all endpoints.
fn final_statuses(json: &str) -> Vec<u16> {
    let listed: Vec<serde_json::Value> = list(json).unwrap_or_default();
    listed.iter().filter_map(|status| u16::try_from(status.as_u64()?).ok()).collect()
}

/// Creates or replaces an endpoint.
pub(super) fn put_endpoint(db: &Connection, endpoint: &Endpoint) -> Result<()> {
    let (rate_count, rate_interval_ms) = Rate::columns(endpoint.rate);
    let values = params![
        endpoint.name,
        endpoint.url,
        in_millis(endpoint.timeout),
        endpoint.in_flight_max,
        rate_count,
        rate_interval_ms,
        json(&endpoint.final_statuses)?,
        endpoint.enabled,
        endpoint.secret,
    ];
    // The change first: what an insert may not hold, a row of before may keep while another column changes.
    let changed = db
        .prepare_cached(
            "/* ams:change_endpoint */ update endpoints set url = ?2, timeout_ms = ?3, in_flight_max = ?4, \
             rate_count = ?5, rate_interval_ms = ?6, final_statuses = ?7, enabled = ?8, secret = ?9 where name = ?1",
        )?
        .execute(values)?;
    if changed == 0 {
        db.prepare_cached(
            "/* ams:put_endpoint */ insert into endpoints \
             (name, url, timeout_ms, in_flight_max, rate_count, rate_interval_ms, final_statuses, enabled, secret) \
             values (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9)",
        )?
        .execute(values)?;
    }
    Ok(())
}

/// Deletes an endpoint that no message names.
pub(super) fn delete_endpoint(db: &Connection, name: &str) -> Result<Deletion> {
    let mut used = db.prepare_cached(
        "/* ams:endpoint_used */ select 1 from messages indexed by messages_by_endpoint where endpoint = ?1 limit 1",
    )?;
    if used.query_row([name], |_| Ok(())).optional()?.is_some() {
        return Ok(Deletion::Used);
    }
    let mut delete = db.prepare_cached("/* ams:delete_endpoint */ delete from endpoints where name = ?1")?;
    Ok(if delete.execute([name])? == 0 { Deletion::Missing } else { Deletion::Deleted })
}

/// What a claim has to know of an endpoint that a message names.
#[derive(Clone, Copy)]
pub(super) struct Named {
    pub(super) id: EndpointId,
    pub(super) access: Access,
}

/// What a claim has to know of an endpoint with a number.
#[derive(Clone)]
pub(super) struct Numbered {
    pub(super) name: String,
    pub(super) access: Access,
}

/// Whether an endpoint takes deliveries.
#[derive(Clone, Copy, Default)]
pub(super) struct Access {
    /// Whether it exists and is enabled.
    enabled: bool,
    /// Whether attempts at it are bounded by a rate.
    rated: bool,
    /// When its breaker, if it has one, ceases to be open.
    open_until: Option<Timestamp>,
}

impl Access {
    fn read(row: &Row<'_>, first_column: usize) -> rusqlite::Result<Access> {
        let (enabled, rated) = (row.get(first_column)?, row.get(first_column + 1)?);
        Ok(Access { enabled, rated, open_until: our_optional_time(row, first_column + 2)? })
    }

    /// Why a claim holds its deliveries, if it does: all, or those without a reserved time.
    pub(super) fn held(self, is_reserved: bool, now: Timestamp) -> Option<Held> {
        if !self.enabled {
            Some(Held::EndpointDisabled)
        } else if self.open_until.is_some_and(|until| breaker::is_open(until, now)) {
            Some(Held::EndpointBusy)
        } else {
            (self.rated && !is_reserved).then_some(Held::EndpointRate)
        }
    }
}

/// Endpoints as one call looks them up, each once.
pub(super) struct Endpoints<'a> {
    db: &'a Connection,
    named: HashMap<String, Named>,
    numbered: HashMap<EndpointId, Option<Numbered>>,
}

impl<'a> Endpoints<'a> {
    pub(super) fn new(db: &'a Connection) -> Endpoints<'a> {
        Endpoints { db, named: HashMap::new(), numbered: HashMap::new() }
    }

    /// The endpoint of this name. One that does not exist gets a number, which it keeps once it is made.
    pub(super) fn named(&mut self, name: &str) -> Result<Named> {
        if let Some(named) = self.named.get(name) {
            return Ok(*named);
        }
        let found = self
            .db
            .prepare_cached(
                "/* ams:endpoint_named */ select id, enabled, rate_count is not null, until from endpoints \
                 left join breakers on endpoint_id = id where name = ?1",
            )?
            .query_row([name], |row| Ok(Named { id: EndpointId(row.get(0)?), access: Access::read(row, 1)? }))
            .optional()?;
        let named = match found {
            Some(named) => named,
            None => Named { id: unknown(self.db, name)?, access: Access::default() },
        };
        self.named.insert(name.to_owned(), named);
        Ok(named)
    }

    /// The endpoint of this number, if it exists.
    pub(super) fn numbered(&mut self, id: EndpointId) -> Result<Option<Numbered>> {
        if let Some(numbered) = self.numbered.get(&id) {
            return Ok(numbered.clone());
        }
        let numbered = self
            .db
            .prepare_cached(
                "/* ams:endpoint_numbered */ select name, enabled, rate_count is not null, until from endpoints \
                 left join breakers on endpoint_id = id where id = ?1",
            )?
            .query_row([id.0], |row| Ok(Numbered { name: text(row, 0)?, access: Access::read(row, 1)? }))
            .optional()?;
        self.numbered.insert(id, numbered.clone());
        Ok(numbered)
    }
}

/// The number of a name that no endpoint has.
fn unknown(db: &Connection, name: &str) -> Result<EndpointId> {
    db.prepare_cached(
        "/* ams:unknown_endpoint */ insert into unknown_endpoints (name) values (?1) on conflict (name) do nothing",
    )?
    .execute([name])?;
    let mut number =
        db.prepare_cached("/* ams:unknown_number */ select id from unknown_endpoints where name = ?1")?;
    Ok(number.query_row([name], |row| row.get(0).map(EndpointId))?)
}

/// The numbers of a name: of the endpoint, or of what is waited for.
pub(super) fn numbers(db: &Connection, name: &str) -> Result<Vec<EndpointId>> {
    let mut statement = db.prepare_cached(
        "/* ams:endpoint_numbers */ select id from endpoints where name = ?1 \
         union select id from unknown_endpoints where name = ?1",
    )?;
    let ids = statement.query_map([name], |row| row.get(0).map(EndpointId))?;
    Ok(ids.collect::<rusqlite::Result<_>>()?)
}

/// The name that a number belongs to.
pub(super) fn name(db: &Connection, id: EndpointId) -> Result<Option<String>> {
    let mut statement = db.prepare_cached(
        "/* ams:endpoint_name */ select name from endpoints where id = ?1 \
         union all select name from unknown_endpoints where id = ?1 limit 1",
    )?;
    Ok(statement.query_row([id.0], |row| text(row, 0)).optional()?)
}
