//! Inserts, and their idempotency keys.

use std::collections::HashMap;

use deadpool_postgres::{Object, Transaction};
use tokio_postgres::error::SqlState;

use super::{read, read_all};
use crate::clock::Timestamp;
use crate::message::{Message, MessageId, NewMessage};
use crate::store::{AllOrNone, Inserted, Result};

/// How often an insert is tried again because another program used one of its keys meanwhile.
const RACES: usize = 5;

/// Inserts all messages or none; one in conflict is left out.
pub(super) async fn insert(
    db: &mut Object,
    messages: &[NewMessage],
    now: Timestamp,
) -> Result<Vec<Inserted>> {
    match insert_racing(db, messages, now, Conflicting::IsLeftOut).await? {
        AllOrNone::Stored(inserted) => Ok(inserted),
        AllOrNone::Conflicts(_) => {
            Err(crate::store::StoreError::Internal("an insert gave up whole".to_owned()))
        }
    }
}

/// Inserts all messages, or none when one of them has the key of another message.
pub(super) async fn insert_whole(
    db: &mut Object,
    messages: &[NewMessage],
    now: Timestamp,
) -> Result<AllOrNone> {
    insert_racing(db, messages, now, Conflicting::KeepsAllOut).await
}

/// What a message in conflict means for the others.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Conflicting {
    IsLeftOut,
    KeepsAllOut,
}

async fn insert_racing(
    db: &mut Object,
    messages: &[NewMessage],
    now: Timestamp,
    conflicting: Conflicting,
) -> Result<AllOrNone> {
    for _ in 0..RACES {
        let transaction = db.transaction().await?;
        match insert_in(&transaction, messages, now, conflicting).await {
            Ok(inserted) => {
                transaction.commit().await?;
                return Ok(inserted);
            }
            Err(Failed::Raced) => transaction.rollback().await?,
            Err(Failed::Other(error)) => return Err(error),
        }
    }
    Err(crate::store::StoreError::Unavailable("its idempotency keys are being used by others".to_owned()))
}

enum Failed {
    /// A key was used between our look and our insert.
    Raced,
    Other(crate::store::StoreError),
}

impl From<tokio_postgres::Error> for Failed {
    fn from(error: tokio_postgres::Error) -> Failed {
        match error.code() {
            Some(code) if *code == SqlState::UNIQUE_VIOLATION => Failed::Raced,
            _ => Failed::Other(error.into()),
        }
    }
}

impl From<crate::store::StoreError> for Failed {
    fn from(error: crate::store::StoreError) -> Failed {
        Failed::Other(error)
    }
}

async fn insert_in(
    db: &Transaction<'_>,
    messages: &[NewMessage],
    now: Timestamp,
    conflicting: Conflicting,
) -> std::result::Result<AllOrNone, Failed> {
    let stored = stored(db, messages).await?;
    // Where a key stands for the first time in this batch, and what each message comes to.
    let mut first: HashMap<&str, usize> = HashMap::new();
    let mut new: Vec<&NewMessage> = Vec::with_capacity(messages.len());
    let mut slots: Vec<Slot> = Vec::with_capacity(messages.len());
    for message in messages {
        let key = message.idempotency_key.as_deref();
        if let Some(before) = key.and_then(|key| stored.get(key)) {
            slots
                .push(Slot::Known(answer(before.0, before.1.as_ref().is_some_and(|m| is_equal(m, message)))));
        } else if let Some(at) = key.and_then(|key| first.get(key)) {
            slots.push(Slot::Same { at: *at, equal: *new[*at] == *message });
        } else {
            if let Some(key) = key {
                first.insert(key, new.len());
            }
            slots.push(Slot::New(new.len()));
            new.push(message);
        }
    }
    if conflicting == Conflicting::KeepsAllOut {
        let conflicts: Vec<usize> =
            slots.iter().enumerate().filter(|(_, slot)| slot.conflicts()).map(|(at, _)| at).collect();
        if !conflicts.is_empty() {
            return Ok(AllOrNone::Conflicts(conflicts));
        }
    }
    let ids = if new.is_empty() { Vec::new() } else { insert_new(db, &new, now).await? };
    let inserted = slots.into_iter().map(|slot| match slot {
        Slot::Known(inserted) => inserted,
        Slot::New(at) => Inserted::New { id: ids[at], created_at: now },
        Slot::Same { at, equal } => answer(ids[at], equal),
    });
    Ok(AllOrNone::Stored(inserted.collect()))
}

enum Slot {
    Known(Inserted),
    New(usize),
    Same { at: usize, equal: bool },
}

impl Slot {
    fn conflicts(&self) -> bool {
        matches!(self, Slot::Known(Inserted::Conflict(_)) | Slot::Same { equal: false, .. })
    }
}

fn answer(id: MessageId, equal: bool) -> Inserted {
    if equal { Inserted::Existing(id) } else { Inserted::Conflict(id) }
}

/// The stored messages that have a key of this batch. A row may be gone while its key is remembered.
async fn stored(
    db: &Transaction<'_>,
    messages: &[NewMessage],
) -> std::result::Result<HashMap<String, (MessageId, Option<Message>)>, Failed> {
    let keys: Vec<&str> = messages.iter().filter_map(|message| message.idempotency_key.as_deref()).collect();
    if keys.is_empty() {
        return Ok(HashMap::new());
    }
    let statement = db
        .prepare_cached(
            "/* ams:idempotency_keys */ select key, message_id from idempotency_keys where key = any($1)",
        )
        .await?;
    let rows = db.query(&statement, &[&keys]).await?;
    let keyed = read_all(&rows, |row| Ok((row.try_get::<_, String>(0)?, row.try_get(1)?)))?;
    let ids: Vec<i64> = keyed.iter().map(|(_, id)| *id).collect();
    let mut known: HashMap<MessageId, Message> =
        read::messages(db, &ids).await?.into_iter().map(|message| (message.id, message)).collect();
    Ok(keyed.into_iter().map(|(key, id)| (key, (MessageId(id), known.remove(&MessageId(id))))).collect())
}

async fn insert_new(
    db: &Transaction<'_>,
    new: &[&NewMessage],
    now: Timestamp,
) -> std::result::Result<Vec<MessageId>, Failed> {
    fn column<'a, T>(new: &[&'a NewMessage], value: impl Fn(&'a NewMessage) -> T) -> Vec<T> {
        new.iter().map(|message| value(message)).collect()
    }
    let statement = db
        .prepare_cached(
            "/* ams:insert */ insert into messages (endpoint, recipient, content, content_type, headers, \
                 ordering_key, priority, send_at, expires_at, idempotency_key, tags, created_at) \
             select endpoint, recipient, content, content_type, headers::jsonb, ordering_key, priority, send_at, \
                 expires_at, idempotency_key, tags::jsonb, $12::timestamptz \
             from unnest($1::text[], $2::text[], $3::text[], $4::text[], $5::text[], $6::text[], $7::smallint[], \
                 $8::timestamptz[], $9::timestamptz[], $10::text[], $11::text[]) with ordinality as v (endpoint, \
                 recipient, content, content_type, headers, ordering_key, priority, send_at, expires_at, \
                 idempotency_key, tags, place) \
             order by place returning id",
        )
        .await?;
    let endpoints = column(new, |message| message.endpoint.as_deref().unwrap_or("default"));
    let recipients = column(new, |message| message.recipient.as_str());
    let contents = column(new, |message| message.content.as_str());
    let content_types = column(new, |message| message.content_type.as_deref());
    let headers = column(new, |message| message.headers.as_ref().map(ToString::to_string));
    let ordering_keys = column(new, |message| message.ordering_key.as_deref());
    let priorities = column(new, |message| message.priority);
    let send_ats = column(new, |message| message.send_at);
    let expires_ats = column(new, |message| message.expires_at);
    let keys = column(new, |message| message.idempotency_key.as_deref());
    let tags = column(new, |message| message.tags.as_ref().map(ToString::to_string));
    let values: [&(dyn tokio_postgres::types::ToSql + Sync); 12] = [
        &endpoints,
        &recipients,
        &contents,
        &content_types,
        &headers,
        &ordering_keys,
        &priorities,
        &send_ats,
        &expires_ats,
        &keys,
        &tags,
        &now,
    ];
    let rows = db.query(&statement, &values).await?;
    Ok(read_all(&rows, |row| Ok(MessageId(row.try_get(0)?)))?)
}

/// Whether a stored message says what the new one says.
fn is_equal(stored: &Message, new: &NewMessage) -> bool {
    new.endpoint.as_deref().unwrap_or("default") == stored.endpoint
        && new.recipient == stored.recipient
        && new.content == stored.content
        && new.content_type == stored.content_type
        && new.headers == stored.headers
        && new.ordering_key == stored.ordering_key
        && new.priority == stored.priority
        && new.send_at == stored.send_at
        && new.expires_at == stored.expires_at
        && new.tags == stored.tags
}
