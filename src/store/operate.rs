//! What operators ask of the store: looking for messages, changing many of them, keys and the pause.

use serde::{Deserialize, Serialize};

use crate::clock::Timestamp;
use crate::message::{MessageId, Status};

/// Rows that one search looks at, at most. A page may therefore be short although more follow; in
/// return no page is slow, whatever the filter and however many rows there are.
pub const WALK: usize = 2_000;

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
        match filter.created_before.filter(|_| filter.walk() == Walk::Created) {
            Some(at) => Cursor { at, id: MessageId(0) },
            None => Cursor { at: Timestamp::from_micros(i64::MAX), id: MessageId(i64::MAX) },
        }
    }
}

/// What one search found, newest first.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Found {
    pub ids: Vec<MessageId>,
    /// `None`: there is nothing more.
    pub next: Option<Cursor>,
}

/// Which index a search walks.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Walk<'a> {
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
    pub(super) fn walk(&self) -> Walk<'_> {
        if let Some(recipient) = &self.recipient {
            return Walk::Recipient(recipient);
        }
        match (self.status, &self.endpoint) {
            (Some(status @ (Status::Dead | Status::Cancelled | Status::Expired)), _) => Walk::Unsent(status),
            (Some(Status::Queued), _) => Walk::Queued,
            (Some(Status::Processing), _) => Walk::Processing,
            (Some(Status::Retrying), _) => Walk::Waiting,
            (_, Some(endpoint)) => Walk::Endpoint(endpoint),
            (Some(Status::Pending), _) => Walk::Pending,
            _ if self.created_after.is_some() || self.created_before.is_some() => Walk::Created,
            (Some(Status::Sent), _) => Walk::Tried,
            (None | Some(Status::Unknown), None) => Walk::All,
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

/// A job's number.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct JobId(pub i64);

/// A change of many messages, worked off piece by piece; it survives restarts.
#[derive(Clone, Debug, PartialEq)]
pub struct Job {
    pub id: JobId,
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
    pub pacing: Option<super::Pacing>,
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
        for (filter, walk) in [
            (filter(None, None, None, None), Walk::All),
            (filter(Some(Status::Dead), Some("sms"), Some("+90"), at), Walk::Recipient("+90")),
            (filter(Some(Status::Dead), Some("sms"), None, at), Walk::Unsent(Status::Dead)),
            (filter(Some(Status::Retrying), Some("sms"), None, None), Walk::Waiting),
            (filter(Some(Status::Sent), Some("sms"), None, at), Walk::Endpoint("sms")),
            (filter(Some(Status::Pending), None, None, at), Walk::Pending),
            (filter(Some(Status::Sent), None, None, at), Walk::Created),
            (filter(Some(Status::Sent), None, None, None), Walk::Tried),
            (filter(Some(Status::Queued), None, None, None), Walk::Queued),
            (filter(Some(Status::Processing), None, None, None), Walk::Processing),
        ] {
            assert_eq!(filter.walk(), walk, "{filter:?}");
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
