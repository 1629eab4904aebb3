//! Columns: what stands in them, as the program wants it.

use rusqlite::Connection;
use rusqlite::types::ValueRef;

use crate::clock::Timestamp;
use crate::store::{Result, StoreError};

/// A text column as text, whatever bytes a writer has put there: a row that can't be read would stop the claim.
pub(super) fn text(row: &rusqlite::Row<'_>, column: usize) -> rusqlite::Result<String> {
    Ok(optional_text(row, column)?.unwrap_or_default())
}

pub(super) fn optional_text(row: &rusqlite::Row<'_>, column: usize) -> rusqlite::Result<Option<String>> {
    Ok(match row.get_ref(column)? {
        ValueRef::Text(bytes) => Some(String::from_utf8_lossy(bytes).into_owned()),
        _ => None,
    })
}

/// The bytes of a text column, whatever they are.
pub(super) fn bytes(row: &rusqlite::Row<'_>, column: usize) -> rusqlite::Result<Vec<u8>> {
    Ok(match row.get_ref(column)? {
        ValueRef::Text(bytes) | ValueRef::Blob(bytes) => bytes.to_vec(),
        _ => Vec::new(),
    })
}

/// A writer's time: RFC 3339 as we write it, or another form that `julianday` understands.
pub(super) fn writers_time(
    connection: &Connection,
    row: &rusqlite::Row<'_>,
    column: usize,
) -> rusqlite::Result<Option<Timestamp>> {
    let Some(written) = optional_text(row, column)? else {
        return Ok(None);
    };
    if let Ok(time) = Timestamp::parse(&written) {
        return Ok(Some(time));
    }
    let mut statement = connection.prepare_cached(
        "/* ams:time */ select cast(round((julianday(?1) - 2440587.5) * 86400000.0) as integer) * 1000",
    )?;
    statement.query_row([written], |row| our_optional_time(row, 0))
}

/// One of our own times.
pub(super) fn our_time(row: &rusqlite::Row<'_>, column: usize) -> rusqlite::Result<Timestamp> {
    row.get(column).map(Timestamp::from_micros)
}

pub(super) fn our_optional_time(
    row: &rusqlite::Row<'_>,
    column: usize,
) -> rusqlite::Result<Option<Timestamp>> {
    Ok(row.get::<_, Option<i64>>(column)?.map(Timestamp::from_micros))
}

/// A JSON list, as batches and leases keep them.
pub(super) fn list<T: serde::de::DeserializeOwned>(json: &str) -> Result<Vec<T>> {
    serde_json::from_str(json)
        .map_err(|error| StoreError::Internal(format!("`{json:.60}` is not a list: {error}")))
}

pub(super) fn json<T: serde::Serialize>(values: &T) -> Result<String> {
    serde_json::to_string(values).map_err(|error| StoreError::Internal(error.to_string()))
}
