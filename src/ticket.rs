//! A ticket: what travels on a lane and stands there for one delivery.

use std::time::Duration;

use bytes::Bytes;
use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;

use crate::clock::Timestamp;
use crate::message::MessageId;

/// A batch's number: random, from 1 to 2^63 - 1. It is what fences a delivery: a ticket of a batch that is no more
/// begins nothing, also after a restore or a failover that gives other numbers out again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct BatchId(pub i64);

impl BatchId {
    /// A number for a new batch.
    pub fn random() -> BatchId {
        BatchId(fastrand::i64(1..))
    }
}

/// An endpoint's number in its store. It is never given to another endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct EndpointId(pub i32);

/// What travels on a lane: enough to make the request without asking the store again.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Ticket {
    pub id: MessageId,
    pub batch: BatchId,
    /// Its place in the batch, from 0.
    pub position: u16,
    pub endpoint_id: EndpointId,
    pub endpoint: String,
    pub recipient: String,
    pub content: String,
    pub created_at: Timestamp,
    /// The number of the attempt that this ticket is for, from 1, over all lanes.
    pub attempt: i32,
    /// Attempts made on this lane before this one.
    #[serde(default, skip_serializing_if = "is_zero")]
    pub lane_tries: i32,
    #[serde(default, skip_serializing_if = "is_zero")]
    pub priority: i16,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub content_type: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub headers: Option<Box<RawValue>>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ordering_key: Option<String>,
    /// No attempt begins at this time or later.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub expires_at: Option<Timestamp>,
    /// When its attempt is due, in a ticket that was claimed ahead of that; in any other it is due at once.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub due_at: Option<Timestamp>,
}

/// A value of ours as JSON, of about `size` bytes.
pub(crate) fn to_json(value: &impl Serialize, size: usize) -> Bytes {
    let mut json = Vec::with_capacity(size);
    // Only a map with keys that are not strings, or a failing writer, can make this fail; here is neither.
    serde_json::to_writer(&mut json, value).expect("strings and numbers always serialize");
    Bytes::from(json)
}

/// Bytes that a ticket without content and headers seldom exceeds.
pub(crate) const OTHER_FIELDS: usize = 512;

fn is_zero(number: &(impl Copy + Into<i32>)) -> bool {
    (*number).into() == 0
}

impl Ticket {
    /// How long before its time a ticket may be claimed and put on its lane: so a burst of them is with its
    /// consumer when its moment comes, and each is tried in its millisecond (ADR 9). Not longer,
    /// because a change of the message in the store counts for nothing once its ticket is under way.
    pub const AHEAD: Duration = Duration::from_secs(1);

    /// The record's value: JSON.
    pub fn encode(&self) -> Bytes {
        to_json(self, self.bytes() + OTHER_FIELDS)
    }

    /// The ticket in a record's value.
    ///
    /// # Errors
    /// A sentence that says why it holds none. Fields that only a newer program knows are passed over.
    pub fn decode(value: &[u8]) -> Result<Ticket, String> {
        let text = std::str::from_utf8(value).map_err(|error| format!("the record is not UTF-8: {error}"))?;
        serde_json::from_str(text).map_err(|error| format!("the record is not a ticket: {error}"))
    }

    /// The record's key: the ordering key, else the id.
    pub fn key(&self) -> Bytes {
        match &self.ordering_key {
            Some(key) => Bytes::copy_from_slice(key.as_bytes()),
            None => Bytes::from(self.id.to_string()),
        }
    }

    /// Bytes of its content and headers: nearly all of its size.
    pub fn bytes(&self) -> usize {
        self.content.len() + self.headers.as_ref().map_or(0, |headers| headers.get().len())
    }

    /// What a store needs of it once it has been taken: where it stands, and its numbers.
    pub(crate) fn without_message(&self) -> Ticket {
        Ticket {
            endpoint: String::new(),
            recipient: String::new(),
            content: String::new(),
            content_type: None,
            headers: None,
            ordering_key: None,
            ..*self
        }
    }

    /// Whether its time is over at `now`.
    pub fn is_expired(&self, now: Timestamp) -> bool {
        self.expires_at.is_some_and(|at| at <= now)
    }
}

#[cfg(test)]
pub(crate) mod tests;
