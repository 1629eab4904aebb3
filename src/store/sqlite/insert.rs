//! Inserts, and their idempotency keys.

use std::collections::HashMap;

use rusqlite::{Connection, OptionalExtension, params};

use super::place::Whereabouts;
use super::read;
use crate::clock::Timestamp;
use crate::message::{Message, MessageId, NewMessage};
use crate::store::{AllOrNone, Inserted, Result};

/// Inserts all messages or none.
pub(super) fn insert(db: &Connection, messages: &[NewMessage], now: Timestamp) -> Result<Vec<Inserted>> {
    let created_at = now.to_string();
    let mut statement = db.prepare_cached(
        "/* ams:insert */ insert into messages (endpoint, recipient, content, content_type, headers, ordering_key, \
         priority, send_at, expires_at, idempotency_key, tags, created_at) \
         values (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12)",
    )?;
    let mut inserted = Vec::with_capacity(messages.len());
    for message in messages {
        if let Some(before) = same_key(db, message)? {
            inserted.push(before);
            continue;
        }
        statement.execute(params![
            message.endpoint.as_deref().unwrap_or("default"),
            message.recipient,
            message.content,
            message.content_type,
            message.headers.as_ref().map(ToString::to_string),
            message.ordering_key,
            message.priority,
            message.send_at.map(|time| time.to_string()),
            message.expires_at.map(|time| time.to_string()),
            message.idempotency_key,
            message.tags.as_ref().map(ToString::to_string),
            created_at,
        ])?;
        let id = MessageId(db.last_insert_rowid());
        inserted.push(Inserted::New { id, created_at: now });
    }
    Ok(inserted)
}

/// Inserts all messages, or none when one of them has the key of another message.
pub(super) fn insert_whole(db: &Connection, messages: &[NewMessage], now: Timestamp) -> Result<AllOrNone> {
    let mut first: HashMap<&str, &NewMessage> = HashMap::new();
    let mut conflicts = Vec::new();
    for (place, message) in messages.iter().enumerate() {
        let Some(key) = &message.idempotency_key else { continue };
        let conflict = match first.get(key.as_str()) {
            Some(before) => named(before) != named(message),
            None => matches!(same_key(db, message)?, Some(Inserted::Conflict(_))),
        };
        if conflict {
            conflicts.push(place);
        } else {
            first.entry(key).or_insert(message);
        }
    }
    if conflicts.is_empty() {
        insert(db, messages, now).map(AllOrNone::Stored)
    } else {
        Ok(AllOrNone::Conflicts(conflicts))
    }
}

/// The message with the endpoint that it goes to when it names none.
fn named(message: &NewMessage) -> NewMessage {
    let endpoint = message.endpoint.clone().or_else(|| Some("default".to_owned()));
    NewMessage { endpoint, ..message.clone() }
}

/// What to answer for a message whose key was used before, in the store or earlier in the batch.
fn same_key(db: &Connection, message: &NewMessage) -> Result<Option<Inserted>> {
    let Some(key) = &message.idempotency_key else {
        return Ok(None);
    };
    let id = db
        .prepare_cached("/* ams:key */ select message_id from idempotency_keys where key = ?1")?
        .query_row([key], |row| row.get(0).map(MessageId))
        .optional()?;
    let Some(id) = id else { return Ok(None) };
    let equal = read::at_place(db, id, Whereabouts::NEW)?.is_some_and(|stored| is_equal(&stored, message));
    Ok(Some(if equal { Inserted::Existing(id) } else { Inserted::Conflict(id) }))
}

/// Whether a stored message says what the new one says.
fn is_equal(stored: &Message, new: &NewMessage) -> bool {
    let said = NewMessage {
        endpoint: Some(stored.endpoint.clone()),
        recipient: stored.recipient.clone(),
        content: stored.content.clone(),
        content_type: stored.content_type.clone(),
        headers: stored.headers.clone(),
        ordering_key: stored.ordering_key.clone(),
        priority: stored.priority,
        send_at: stored.send_at,
        expires_at: stored.expires_at,
        idempotency_key: stored.idempotency_key.clone(),
        tags: stored.tags.clone(),
    };
    said == named(new)
}
