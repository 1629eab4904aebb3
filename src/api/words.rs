//! What a message waits for, in words. Pure.

use crate::message::{Held, Message, Status};

/// Why a message stands where it stands, and until when.
pub(super) fn why(message: &Message) -> Option<String> {
    let endpoint = &message.endpoint;
    if let Some(held) = message.held {
        return Some(match held {
            Held::EndpointBusy => {
                format!("held: endpoint {endpoint} is busy; it goes on as soon as there is room")
            }
            Held::EndpointClosed => {
                format!("held: endpoint {endpoint} is disabled or does not exist; it goes on once it is open")
            }
        });
    }
    match message.status {
        Status::Pending => Some(match message.send_at {
            Some(at) => format!("due at {at}"),
            None => "due now: it waits for the producer".to_owned(),
        }),
        Status::Queued => Some("its ticket waits on its lane for a consumer".to_owned()),
        Status::Processing => Some("a consumer is delivering it".to_owned()),
        Status::Retrying => {
            let due = message.due_at.map_or_else(|| "due now".to_owned(), |at| format!("due at {at}"));
            Some(match &message.reason {
                Some(reason) => format!("{due}; last: {reason}"),
                None => due,
            })
        }
        Status::Dead => message.reason.clone(),
        Status::Expired => message.expires_at.map(|at| format!("not sent before {at}")),
        Status::Sent | Status::Cancelled => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Timestamp;
    use crate::message::MessageId;

    fn message(status: Status) -> Message {
        Message {
            id: MessageId(1),
            endpoint: "sms".into(),
            recipient: "+90".into(),
            content: "Hello".into(),
            content_type: None,
            headers: None,
            ordering_key: None,
            priority: 0,
            send_at: None,
            expires_at: None,
            idempotency_key: None,
            tags: None,
            created_at: Timestamp::EPOCH,
            status,
            held: None,
            epoch: 0,
            attempts: 0,
            lane: String::new(),
            due_at: None,
            finished_at: None,
            reason: None,
        }
    }

    #[test]
    fn every_waiting_message_says_what_it_waits_for() {
        let at = Some(Timestamp::EPOCH);
        let reason = Some("status 500".to_owned());
        for (message, expected) in [
            (message(Status::Pending), "due now"),
            (Message { send_at: at, ..message(Status::Pending) }, "due at 1970-01-01T00:00:00Z"),
            (
                Message { held: Some(Held::EndpointClosed), ..message(Status::Pending) },
                "disabled or does not exist",
            ),
            (Message { held: Some(Held::EndpointBusy), ..message(Status::Retrying) }, "busy"),
            (message(Status::Queued), "lane"),
            (message(Status::Processing), "delivering"),
            (
                Message { due_at: at, reason: reason.clone(), ..message(Status::Retrying) },
                "due at 1970-01-01T00:00:00Z; last: status 500",
            ),
            (Message { reason, ..message(Status::Dead) }, "status 500"),
            (Message { expires_at: at, ..message(Status::Expired) }, "1970"),
        ] {
            let words = why(&message).unwrap_or_default();
            assert!(words.contains(expected), "{:?}: {words}", message.status);
        }
        assert_eq!(why(&message(Status::Sent)), None);
    }
}
