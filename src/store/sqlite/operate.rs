//! Operations that cancel or redrive many messages; the pause; keys.

use rusqlite::{Connection, params};

use super::change::change;
use super::search::search;
use super::{json, list, our_optional_time, our_time, text};
use crate::clock::Timestamp;
use crate::message::MessageId;
use crate::rate::Rate;
use crate::store::operate::{ApiKey, Change, Control, Cursor, Filter, Operation, OperationId};
use crate::store::{Result, StoreError, latest_present};

/// Notes an operation that begins with the newest message.
pub(super) fn open_operation(
    db: &Connection,
    change: Change,
    filter: &Filter,
    now: Timestamp,
) -> Result<Operation> {
    let mut statement = db.prepare_cached(
        "/* ams:open_operation */ insert into operations (kind, filter, up_to, created_at, updated_at) \
         select ?1, ?2, coalesce(max(id), 0), ?3, ?3 from messages returning id",
    )?;
    let id = statement.query_row(params![change.as_str(), json(filter)?, now.as_micros()], |row| {
        row.get(0).map(OperationId)
    })?;
    operation(db, id)?
        .ok_or_else(|| StoreError::Internal("an operation is gone right after its insert".to_owned()))
}

/// An operation.
pub(super) fn operation(db: &Connection, id: OperationId) -> Result<Option<Operation>> {
    let mut statement = db.prepare_cached(
        "/* ams:operation */ select kind, filter, matched, changed, created_at, updated_at, finished_at \
         from operations where id = ?1",
    )?;
    let mut rows = statement.query([id.0])?;
    let Some(row) = rows.next()? else { return Ok(None) };
    let kind = text(row, 0)?;
    let unknown = || StoreError::Internal(format!("`{kind}` is not a word of ours"));
    Ok(Some(Operation {
        id,
        change: Change::parse(&kind).ok_or_else(unknown)?,
        filter: serde_json::from_str(&text(row, 1)?)
            .map_err(|error| StoreError::Internal(format!("an operation's filter can't be read: {error}")))?,
        matched: row.get::<_, i64>(2)?.unsigned_abs(),
        changed: row.get::<_, i64>(3)?.unsigned_abs(),
        created_at: our_time(row, 4)?,
        updated_at: our_time(row, 5)?,
        finished_at: our_optional_time(row, 6)?,
    }))
}

/// Operations at which nobody has worked since `before`.
pub(super) fn idle_operations(db: &Connection, before: Timestamp) -> Result<Vec<OperationId>> {
    let mut statement = db.prepare_cached(
        "/* ams:idle_operations */ select id from operations \
         where finished_at is null and (updated_at < ?1 or updated_at > ?2) order by id",
    )?;
    let times = [before, latest_present(before)].map(Timestamp::as_micros);
    let ids = statement.query_map(times, |row| row.get(0).map(OperationId))?;
    Ok(ids.collect::<rusqlite::Result<_>>()?)
}

/// Works off a piece of an operation: its rows and how far it has come are one transaction.
pub(super) fn work_operation(
    db: &Connection,
    id: OperationId,
    count: usize,
    now: Timestamp,
) -> Result<Option<Operation>> {
    let Some(mut operation) = operation(db, id)?.filter(|operation| operation.finished_at.is_none()) else {
        return operation(db, id);
    };
    let (up_to, cursor) = db
        .prepare_cached(
            "/* ams:take_operation */ select up_to, cursor_at, cursor_id from operations where id = ?1",
        )?
        .query_row([id.0], |row| {
            let at = our_optional_time(row, 1)?.unwrap_or_default();
            Ok((
                row.get::<_, i64>(0)?,
                row.get(2).map(|id: Option<i64>| Some(Cursor { at, id: MessageId(id?) }))?,
            ))
        })?;
    let from = cursor.unwrap_or_else(|| Cursor::start(&operation.filter));
    let found = search(db, &operation.filter, from, count)?;
    let ids: Vec<_> = found.ids.into_iter().filter(|id| id.0 <= up_to).collect();
    let changed = change(db, operation.change, &ids, now)?;
    operation.matched += ids.len() as u64;
    operation.changed += changed.len() as u64;
    operation.updated_at = now;
    operation.finished_at = found.next.is_none().then_some(now);
    db.prepare_cached(
        "/* ams:note_operation */ update operations set cursor_at = ?2, cursor_id = ?3, matched = ?4, changed = ?5, \
         updated_at = ?6, finished_at = ?7 where id = ?1",
    )?
    .execute(params![
        id.0,
        found.next.map(|next| next.at.as_micros()),
        found.next.map(|next| next.id.0),
        operation.matched.cast_signed(),
        operation.changed.cast_signed(),
        now.as_micros(),
        operation.finished_at.map(Timestamp::as_micros),
    ])?;
    Ok(Some(operation))
}

/// Pauses all producers, or lets them go on.
pub(super) fn set_paused(db: &Connection, paused: bool) -> Result<()> {
    db.prepare_cached("/* ams:set_paused */ update leader set paused = ?1")?.execute([paused])?;
    Ok(())
}

/// What the producers are told, and what the active one says.
pub(super) fn control(db: &Connection, now: Timestamp) -> Result<Control> {
    let mut statement = db.prepare_cached(
        "/* ams:control */ select paused, owner is not null and until > ?1 and until <= ?2, pace_count, pace_interval_ms, \
         paced_until from leader",
    )?;
    Ok(statement.query_row([now, latest_present(now)].map(Timestamp::as_micros), |row| {
        let pace = row.get::<_, Option<i64>>(2)?.zip(row.get::<_, Option<i64>>(3)?);
        Ok(Control {
            paused: row.get(0)?,
            active: row.get(1)?,
            pacing: pace.map(|(count, ms)| Rate::of(count, ms)),
            paced_until: our_optional_time(row, 4)?,
        })
    })?)
}

/// Stores a new key.
pub(super) fn put_key(db: &Connection, key: &ApiKey) -> Result<()> {
    let mut statement = db.prepare_cached(
        "/* ams:put_key */ insert into api_keys (id, name, hash, scopes, created_at, expires_at) \
         values (?1, ?2, ?3, ?4, ?5, ?6)",
    )?;
    let expires_at = key.expires_at.map(Timestamp::as_micros);
    statement.execute(params![
        key.id,
        key.name,
        key.hash,
        json(&key.scopes)?,
        key.created_at.as_micros(),
        expires_at
    ])?;
    Ok(())
}

/// All keys, oldest first.
pub(super) fn keys(db: &Connection) -> Result<Vec<ApiKey>> {
    let mut statement = db.prepare_cached(
        "/* ams:keys */ select id, name, hash, scopes, created_at, expires_at, last_used_at, revoked_at \
         from api_keys order by created_at, id",
    )?;
    let mut rows = statement.query([])?;
    let mut keys = Vec::new();
    while let Some(row) = rows.next()? {
        keys.push(ApiKey {
            id: text(row, 0)?,
            name: text(row, 1)?,
            hash: row.get(2)?,
            scopes: list(&text(row, 3)?)?,
            created_at: our_time(row, 4)?,
            expires_at: our_optional_time(row, 5)?,
            last_used_at: our_optional_time(row, 6)?,
            revoked_at: our_optional_time(row, 7)?,
        });
    }
    Ok(keys)
}

/// Revokes a key; `false`: there is none, or it is revoked already.
pub(super) fn revoke_key(db: &Connection, id: &str, now: Timestamp) -> Result<bool> {
    let mut statement = db.prepare_cached(
        "/* ams:revoke_key */ update api_keys set revoked_at = ?2 where id = ?1 and revoked_at is null",
    )?;
    Ok(statement.execute(params![id, now.as_micros()])? > 0)
}

/// Notes when keys were last used.
pub(super) fn keys_used(db: &Connection, ids: &[String], now: Timestamp) -> Result<()> {
    let mut statement =
        db.prepare_cached("/* ams:keys_used */ update api_keys set last_used_at = ?2 where id = ?1")?;
    for id in ids {
        statement.execute(params![id, now.as_micros()])?;
    }
    Ok(())
}
