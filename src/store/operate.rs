//! What operators ask of the store: looking for messages, changing many of them, keys and the pause.

use async_trait::async_trait;
use serde::{Deserialize, Serialize};

use super::{Overview, Result};
use crate::clock::Timestamp;
use crate::message::{Attempt, Message, MessageId, Status};

/// Rows that one search looks at, at most. A page may therefore be short although more follow; in
/// return no page is slow, whatever the filter and however many rows there are.
pub const SCAN: usize = 2_000;

/// Which messages somebody looks for. Everything that is set must hold.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Filter {
    #[serde(skip_serializing_if = "Option::is_none")]
    pub status: Option<Status>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub endpoint: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    pub recipient: Option<String>,
    /// Why it is dead, word for word.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub reason: Option<String>,
    /// Created then or later.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub created_after: Option<Timestamp>,
    /// Created earlier.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub created_before: Option<Timestamp>,
}

/// Where the next page begins. Rows are never counted, so a page stays right while others are added.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Cursor {
    /// Counts only where rows are walked by their age.
    pub at: Timestamp,
    pub id: MessageId,
}

impl Cursor {
    /// Before the newest message, for a search of this filter.
    pub fn start(filter: &Filter) -> Cursor {
        match filter.created_before.filter(|_| filter.scan() == Scan::Created) {
            Some(at) => Cursor { at, id: MessageId(0) },
            None => Cursor { at: Timestamp::from_micros(i64::MAX), id: MessageId(i64::MAX) },
        }
    }
}

/// What one search found, newest first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Page {
    pub ids: Vec<MessageId>,
    /// `None`: there is nothing more.
    pub next: Option<Cursor>,
}

/// Which index a search scans.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Scan<'a> {
    All,
    Recipient(&'a str),
    Endpoint(&'a str),
    /// Dead, cancelled or expired ones.
    Unsent(Status),
    /// New and waiting ones.
    Pending,
    /// Those that wait for a time or are held.
    Waiting,
    /// Those in batches.
    Queued,
    /// Those in leases.
    Processing,
    /// Those with an attempt.
    Tried,
    /// By age.
    Created,
}

impl Filter {
    /// The index that leads to few rows besides the ones wanted.
    pub(super) fn scan(&self) -> Scan<'_> {
        if let Some(recipient) = &self.recipient {
            return Scan::Recipient(recipient);
        }
        match (self.status, &self.endpoint) {
            (Some(status @ (Status::Dead | Status::Cancelled | Status::Expired)), _) => Scan::Unsent(status),
            (Some(Status::Queued), _) => Scan::Queued,
            (Some(Status::Processing), _) => Scan::Processing,
            (Some(Status::Retrying), _) => Scan::Waiting,
            (_, Some(endpoint)) => Scan::Endpoint(endpoint),
            (Some(Status::Pending), _) => Scan::Pending,
            _ if self.created_after.is_some() || self.created_before.is_some() => Scan::Created,
            (Some(Status::Sent), _) => Scan::Tried,
            (None | Some(Status::Unknown), None) => Scan::All,
        }
    }
}

/// What is to be done with many messages.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Change {
    /// No further try; one that is under way may still succeed.
    Cancel,
    /// From a final status other than `sent` back to `pending`.
    Redrive,
}

impl Change {
    /// The change as it is written in the store and in JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Change::Cancel => "cancel",
            Change::Redrive => "redrive",
        }
    }

    /// The change that `text` names, if it names one.
    pub fn parse(text: &str) -> Option<Change> {
        [Change::Cancel, Change::Redrive].into_iter().find(|change| change.as_str() == text)
    }

    /// Whether a message of this status can be changed so.
    pub fn allows(self, status: Status) -> bool {
        match self {
            Change::Cancel => !status.is_final(),
            Change::Redrive => status.is_final() && status != Status::Sent,
        }
    }
}

/// An operation's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct OperationId(pub i64);

/// A change of many messages, worked off piece by piece; it survives restarts.
#[derive(Clone, Debug, PartialEq)]
pub struct Operation {
    pub id: OperationId,
    pub change: Change,
    pub filter: Filter,
    /// Messages that matched so far, and those that could be changed.
    pub matched: u64,
    pub changed: u64,
    pub created_at: Timestamp,
    pub updated_at: Timestamp,
    pub finished_at: Option<Timestamp>,
}

/// Dead messages of one reason, among the newest 10,000 dead.
#[derive(Clone, Debug, PartialEq)]
pub struct DeadReason {
    pub reason: String,
    pub count: u64,
    /// The newest of them.
    pub newest: MessageId,
}

/// What the producers are told, and what the active one says.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Control {
    pub paused: bool,
    /// Whether one leads.
    pub active: bool,
    /// At most so many first tries per so long.
    pub pacing: Option<crate::rate::Rate>,
    /// No further first try before this time, once the window is used up.
    pub paced_until: Option<Timestamp>,
}

/// What became of the wish to delete an endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Deletion {
    Deleted,
    /// Messages name it.
    Used,
    Missing,
}

/// A key of the API, without the key.
#[derive(Clone, Debug, PartialEq)]
pub struct ApiKey {
    /// The visible start of the key.
    pub id: String,
    /// What its owner calls it.
    pub name: String,
    /// SHA-256 of the whole key.
    pub hash: Vec<u8>,
    pub scopes: Vec<String>,
    pub created_at: Timestamp,
    pub expires_at: Option<Timestamp>,
    pub last_used_at: Option<Timestamp>,
    pub revoked_at: Option<Timestamp>,
}

/// What people and programs look at and change.
#[async_trait]
pub trait Operations: Send + Sync {
    /// One message.
    async fn message(&self, id: MessageId) -> Result<Option<Message>>;

    /// The messages with these ids, in no order; those that do not exist are left out.
    async fn messages(&self, ids: &[MessageId]) -> Result<Vec<Message>>;

    /// The ids of at most `limit` matching messages, newest first, from `from` on.
    async fn search(&self, filter: &Filter, from: Cursor, limit: usize) -> Result<Page>;

    /// Changes those of these messages whose status allows it, and says which.
    async fn change(&self, change: Change, ids: &[MessageId], now: Timestamp) -> Result<Vec<MessageId>>;

    /// Notes a change of all messages that match and exist now.
    async fn open_operation(&self, change: Change, filter: &Filter, now: Timestamp) -> Result<Operation>;

    /// Works at most `limit` messages of an operation off, unless somebody else is at it, and says how it stands.
    async fn work_operation(
        &self,
        id: OperationId,
        limit: usize,
        now: Timestamp,
    ) -> Result<Option<Operation>>;

    /// An operation.
    async fn operation(&self, id: OperationId) -> Result<Option<Operation>>;

    /// Unfinished operations at which nobody has worked since `before`.
    async fn idle_operations(&self, before: Timestamp) -> Result<Vec<OperationId>>;

    /// Why the newest 10,000 dead messages are dead, the most frequent reason first.
    async fn dead_reasons(&self) -> Result<Vec<DeadReason>>;

    /// Pauses all producers, or lets them go on; it holds over restarts.
    async fn set_paused(&self, paused: bool) -> Result<()>;

    /// Whether producers are paused, and what the active one says.
    async fn control(&self, now: Timestamp) -> Result<Control>;

    /// Stores a new key of the API.
    async fn put_key(&self, key: &ApiKey) -> Result<()>;

    /// All keys of the API, oldest first.
    async fn keys(&self) -> Result<Vec<ApiKey>>;

    /// Revokes a key. `false`: there is none, or it is revoked already.
    async fn revoke_key(&self, id: &str, now: Timestamp) -> Result<bool>;

    /// Notes that these keys have just been used.
    async fn keys_used(&self, ids: &[String], now: Timestamp) -> Result<()>;

    /// A message's attempts, oldest first.
    async fn attempts(&self, id: MessageId) -> Result<Vec<Attempt>>;

    /// Counts, ages and instances. Counting stops at 10,000 a status.
    async fn overview(&self, now: Timestamp) -> Result<Overview>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_walk_follows_the_narrowest_index() {
        let filter = |status, endpoint: Option<&str>, recipient: Option<&str>, after| Filter {
            status,
            endpoint: endpoint.map(str::to_owned),
            recipient: recipient.map(str::to_owned),
            created_after: after,
            ..Filter::default()
        };
        let at = Some(Timestamp::EPOCH);
        for (filter, scan) in [
            (filter(None, None, None, None), Scan::All),
            (filter(Some(Status::Dead), Some("sms"), Some("+90"), at), Scan::Recipient("+90")),
            (filter(Some(Status::Dead), Some("sms"), None, at), Scan::Unsent(Status::Dead)),
            (filter(Some(Status::Retrying), Some("sms"), None, None), Scan::Waiting),
            (filter(Some(Status::Sent), Some("sms"), None, at), Scan::Endpoint("sms")),
            (filter(Some(Status::Pending), None, None, at), Scan::Pending),
            (filter(Some(Status::Sent), None, None, at), Scan::Created),
            (filter(Some(Status::Sent), None, None, None), Scan::Tried),
            (filter(Some(Status::Queued), None, None, None), Scan::Queued),
            (filter(Some(Status::Processing), None, None, None), Scan::Processing),
        ] {
            assert_eq!(filter.scan(), scan, "{filter:?}");
        }
    }

    #[test]
    fn a_change_agrees_with_the_statuses_that_a_message_may_take() {
        for status in Status::ALL {
            assert_eq!(
                Change::Cancel.allows(status),
                !status.is_final() && status.may_become(Status::Cancelled)
            );
            assert_eq!(
                Change::Redrive.allows(status),
                status.is_final() && status.may_become(Status::Pending)
            );
        }
    }
}
