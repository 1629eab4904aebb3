//! The nouns: what a message is, where it stands, what a try of it came to.
//!
//! Nothing here does anything: no clock, no I/O. The other rooms pass these values on, and the only
//! rules are which words are legal ([`Status::may_become`]) and how a value reads as text.

use std::fmt;

use serde::{Deserialize, Serialize};

use crate::clock::Timestamp;

/// A message's number in its store: a bigint identity in insert order.
#[derive(Default, Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct MessageId(pub i64);

impl fmt::Display for MessageId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Where a message stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Status {
    /// Stored, waiting for its first claim (or held before it).
    Pending,
    /// Claimed: its ticket is on a lane.
    Queued,
    /// Begun by a consumer.
    Processing,
    /// Accepted by its endpoint with a 2xx.
    Sent,
    /// A try failed; the next is due at `due_at`.
    Retrying,
    /// All tries are used up, or the failure was final.
    Dead,
    /// Taken back by a person or program before it was sent.
    Cancelled,
    /// Its `expires_at` passed before it was sent.
    Expired,
    /// A word that only a newer program knows, read from a store that both share. Such a row is shown
    /// and otherwise left alone.
    #[serde(skip_deserializing)]
    Unknown,
}

impl Status {
    /// Every status that this program knows, in the order of a message's life.
    pub const ALL: [Status; 8] = [
        Status::Pending,
        Status::Queued,
        Status::Processing,
        Status::Sent,
        Status::Retrying,
        Status::Dead,
        Status::Cancelled,
        Status::Expired,
    ];

    /// The status as it is written in SQL, JSON, metrics and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Status::Pending => "pending",
            Status::Queued => "queued",
            Status::Processing => "processing",
            Status::Sent => "sent",
            Status::Retrying => "retrying",
            Status::Dead => "dead",
            Status::Cancelled => "cancelled",
            Status::Expired => "expired",
            Status::Unknown => "unknown",
        }
    }

    /// The status that a store has written, or [`Status::Unknown`].
    pub(crate) fn read(text: &str) -> Status {
        Status::parse(text).unwrap_or(Status::Unknown)
    }

    /// The status that `text` names, if it names one.
    pub fn parse(text: &str) -> Option<Status> {
        Status::ALL.into_iter().find(|status| status.as_str() == text)
    }

    /// Whether no service will touch the message again unless somebody redrives it.
    pub fn is_final(self) -> bool {
        matches!(self, Status::Sent | Status::Dead | Status::Cancelled | Status::Expired)
    }

    /// Whether a message may go from this status to `next`. A success is accepted from everywhere,
    /// because the receiver has the message whatever we believed; nothing leaves `sent`.
    pub fn may_become(self, next: Status) -> bool {
        use Status::*;
        match (self, next) {
            (Sent, _) => false,
            (_, Sent) => true,
            (Pending | Retrying, Queued | Cancelled | Expired) => true,
            (Queued, Processing | Pending | Retrying | Cancelled | Expired) => true,
            (Processing, Queued | Pending | Retrying | Dead | Cancelled | Expired) => true,
            (Dead | Cancelled | Expired, Pending) => true,
            _ => false,
        }
    }
}

impl fmt::Display for Status {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

/// Why a row is kept back although it is due. A column of its own, never a status.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Held {
    /// The endpoint has as many attempts in flight and waiting as it may have, or its circuit breaker is open.
    EndpointBusy,
    /// The endpoint has a rate, and the delivery has no reserved time yet.
    EndpointRate,
    /// The endpoint is disabled or has settings that can't be used, or no endpoint has that name.
    EndpointDisabled,
    /// A reason that only a newer program knows, and which it will free the row of.
    #[serde(skip_deserializing)]
    Unknown,
}

impl Held {
    /// The reason as it is written in the `held` column.
    pub fn as_str(self) -> &'static str {
        match self {
            Held::EndpointBusy => "endpoint_busy",
            Held::EndpointRate => "endpoint_rate",
            Held::EndpointDisabled => "endpoint_disabled",
            Held::Unknown => "unknown",
        }
    }

    /// The reason that a store has written, or [`Held::Unknown`].
    pub(crate) fn read(text: &str) -> Held {
        Held::parse(text).unwrap_or(Held::Unknown)
    }

    /// The reason that `text` names, if it names one.
    pub fn parse(text: &str) -> Option<Held> {
        [Held::EndpointBusy, Held::EndpointRate, Held::EndpointDisabled]
            .into_iter()
            .find(|held| held.as_str() == text)
    }
}

/// What a writer may say of a message: the columns that the contract lets an insert set.
#[derive(Clone, Debug, Default, PartialEq)]
pub struct NewMessage {
    pub endpoint: Option<String>,
    pub recipient: String,
    pub content: String,
    /// `None`: the standard JSON envelope is sent. Else `content` itself is the body, with this type.
    pub content_type: Option<String>,
    /// Further request headers: a JSON object of strings.
    pub headers: Option<serde_json::Value>,
    pub ordering_key: Option<String>,
    pub priority: i16,
    pub send_at: Option<Timestamp>,
    pub expires_at: Option<Timestamp>,
    pub idempotency_key: Option<String>,
    pub tags: Option<serde_json::Value>,
}

/// A whole message row, as it is read for people and programs; the services carry [tickets](crate::ticket::Ticket).
#[derive(Clone, Debug, PartialEq)]
pub struct Message {
    pub id: MessageId,
    pub endpoint: String,
    pub recipient: String,
    pub content: String,
    pub content_type: Option<String>,
    pub headers: Option<serde_json::Value>,
    pub ordering_key: Option<String>,
    pub priority: i16,
    pub send_at: Option<Timestamp>,
    pub expires_at: Option<Timestamp>,
    pub idempotency_key: Option<String>,
    pub tags: Option<serde_json::Value>,
    pub created_at: Timestamp,
    pub status: Status,
    pub held: Option<Held>,
    /// Tries made so far, over all lanes.
    pub attempts: i32,
    /// The lane of its next or last try; empty: the fresh lane.
    pub lane: String,
    /// When the next try is due, once one has failed.
    pub due_at: Option<Timestamp>,
    /// When it became final.
    pub finished_at: Option<Timestamp>,
    /// Why it is dead, or what the last failed try came to.
    pub reason: Option<String>,
}

/// What kind of end a try came to. The classes are kept apart because they mean different things:
/// after [`Class::Refused`] the receiver can't have the message, after [`Class::Timeout`] it may.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Class {
    /// A 2xx status line arrived.
    Accepted,
    /// Another status line arrived.
    Rejected,
    /// The request could not be made of this message and endpoint: bad URL, bad header.
    Invalid,
    /// Nothing was sent: name not found, connection refused, TLS failed, or no connection by the deadline.
    Refused,
    /// The deadline passed after the request had gone out.
    Timeout,
    /// The connection broke after the request had gone out.
    Reset,
    /// What came back is not HTTP, or its head is larger than we read.
    BadAnswer,
    /// A word that only a newer program knows; this one makes no such attempt.
    #[serde(skip_deserializing)]
    Unknown,
}

impl Class {
    /// Every class that this program knows.
    pub const ALL: [Class; 7] = [
        Class::Accepted,
        Class::Rejected,
        Class::Invalid,
        Class::Refused,
        Class::Timeout,
        Class::Reset,
        Class::BadAnswer,
    ];

    /// The class as it is written in SQL, JSON, metrics and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Class::Accepted => "accepted",
            Class::Rejected => "rejected",
            Class::Invalid => "invalid",
            Class::Refused => "refused",
            Class::Timeout => "timeout",
            Class::Reset => "reset",
            Class::BadAnswer => "bad_answer",
            Class::Unknown => "unknown",
        }
    }

    /// The class that a store has written, or [`Class::Unknown`].
    pub(crate) fn read(text: &str) -> Class {
        Class::parse(text).unwrap_or(Class::Unknown)
    }

    /// The class that `text` names, if it names one.
    pub fn parse(text: &str) -> Option<Class> {
        Class::ALL.into_iter().find(|class| class.as_str() == text)
    }
}

/// What the receiver did with one try. A failed delivery is an outcome, never an error.
#[derive(Clone, Debug, PartialEq)]
pub struct Outcome {
    pub class: Class,
    /// The status line's code, when one arrived.
    pub status: Option<u16>,
    /// The address the request went to.
    pub address: String,
    /// What went wrong, in a few words; `None` when accepted.
    pub error: Option<String>,
    /// The first 4 KiB of the answer's body, as text (bytes that are not UTF-8 are replaced).
    pub answer: String,
    /// `messageId` of a JSON answer.
    pub provider_message_id: Option<String>,
    /// `message` of a JSON answer, for the response cache.
    pub provider_message: Option<String>,
    /// How long the receiver asked us to wait, in milliseconds from now.
    pub retry_after_ms: Option<u64>,
    pub started_at: Timestamp,
    pub times: Times,
}

/// How long each phase of a try took, in microseconds. A kept connection has `connect_us` 0.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Times {
    /// Name look-up, TCP and TLS.
    pub connect_us: i32,
    /// From the request's first byte to the answer's head.
    pub head_us: i32,
    /// From the answer's head to its end or cap.
    pub body_us: i32,
}

impl Times {
    /// The whole try, in microseconds.
    pub fn total_us(&self) -> i32 {
        self.connect_us.saturating_add(self.head_us).saturating_add(self.body_us)
    }
}

/// What we decide about a message after a try. Made by [`crate::retry::Policy::judge`] only.
#[derive(Clone, Debug, PartialEq)]
pub enum Verdict {
    /// The receiver has it.
    Sent,
    /// Try again on `lane` at `at`. `lane_tries` is how many tries it has already had on that lane.
    Retry { lane: String, lane_tries: i32, at: Timestamp },
    /// No more tries. `lane` is the dead-letter lane that its record goes to.
    Dead { reason: String, lane: String },
    /// Its `expires_at` passed before this try, which was therefore not made.
    Expired,
    /// This was not a try: give the message back as it was, due at once or held.
    Release { held: Option<Held> },
}

/// One stored try, as it is read back.
#[derive(Clone, Debug, PartialEq)]
pub struct Attempt {
    pub message_id: MessageId,
    /// From 1, over all lanes.
    pub attempt: i32,
    pub lane: String,
    pub class: Class,
    pub status: Option<u16>,
    pub address: String,
    pub error: Option<String>,
    pub answer: String,
    pub provider_message_id: Option<String>,
    pub started_at: Timestamp,
    pub times: Times,
}

impl Message {
    /// A new message, which no feed has come to.
    pub fn pending(id: MessageId, created_at: Timestamp, message: NewMessage) -> Message {
        Message {
            id,
            endpoint: message.endpoint.unwrap_or_else(|| "default".to_owned()),
            recipient: message.recipient,
            content: message.content,
            content_type: message.content_type,
            headers: message.headers,
            ordering_key: message.ordering_key,
            priority: message.priority,
            send_at: message.send_at,
            expires_at: message.expires_at,
            idempotency_key: message.idempotency_key,
            tags: message.tags,
            created_at,
            status: Status::Pending,
            held: None,
            attempts: 0,
            lane: String::new(),
            due_at: None,
            finished_at: None,
            reason: None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_read_back() {
        for status in Status::ALL {
            assert_eq!(Status::parse(status.as_str()), Some(status));
            assert_eq!(serde_json::to_string(&status).unwrap(), format!("\"{status}\""));
        }
        for class in Class::ALL {
            assert_eq!(Class::parse(class.as_str()), Some(class));
            assert_eq!(serde_json::to_string(&class).unwrap(), format!("\"{}\"", class.as_str()));
        }
        assert_eq!(Status::parse("delivered"), None);
    }

    #[test]
    fn words_of_a_newer_program_are_read_and_never_asked_for() {
        assert_eq!(Status::read("parked"), Status::Unknown);
        assert_eq!(Held::read("quiet_hours"), Held::Unknown);
        assert_eq!(Class::read("throttled"), Class::Unknown);
        assert_eq!(
            (Status::parse("unknown"), Held::parse("unknown"), Class::parse("unknown")),
            (None, None, None)
        );
        assert!(serde_json::from_str::<Status>("\"unknown\"").is_err());
    }

    #[test]
    fn nothing_leaves_sent_and_success_is_accepted_from_everywhere_else() {
        for status in Status::ALL {
            assert!(!Status::Sent.may_become(status), "sent -> {status}");
            assert_eq!(status.may_become(Status::Sent), status != Status::Sent, "{status} -> sent");
        }
    }

    #[test]
    fn final_statuses_leave_only_by_redrive() {
        for status in Status::ALL.into_iter().filter(|status| status.is_final()) {
            for next in [Status::Queued, Status::Processing, Status::Retrying] {
                assert!(!status.may_become(next), "{status} -> {next}");
            }
        }
        assert!(Status::Dead.may_become(Status::Pending));
    }
}
