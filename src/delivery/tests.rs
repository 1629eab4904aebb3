//! The network delivery against receivers of every kind.

use super::*;
use crate::message::MessageId;

/// The second try of a message.
pub(super) fn ticket(id: i64) -> Ticket {
    Ticket {
        id: MessageId(id),
        epoch: 1,
        endpoint: "default".into(),
        recipient: "+905551111111".into(),
        content: "Hi \"there\"".into(),
        created_at: Timestamp::parse("2026-11-23T09:59:59Z").unwrap(),
        attempt: 2,
        content_type: None,
        headers: None,
        ordering_key: None,
    }
}
