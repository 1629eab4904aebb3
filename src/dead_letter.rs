//! Dead letters: the records of deliveries that ended dead, and their way to the dead-letter lane.
//!
//! The store remembers each until it is marked as published, so what fails here is done again by the janitor.

use std::collections::BTreeMap;

use serde::Serialize;
use tokio_util::sync::CancellationToken;

use crate::message::MessageId;
use crate::queue::{LaneRecord, QueueError, RECORD_CUT};
use crate::service::{self, Context};
use crate::store::DeadLetter;
use crate::ticket::{OTHER_FIELDS, Ticket, to_json};

/// The record of a dead letter: the whole message, with what became of it in value and headers alike.
pub fn record(letter: &DeadLetter) -> LaneRecord {
    #[derive(Serialize)]
    struct Value<'a> {
        #[serde(flatten)]
        ticket: &'a Ticket,
        reason: &'a str,
        attempts: i32,
        last_status: Option<u16>,
        last_error: Option<&'a str>,
        dead_at: String,
    }
    let dead_at = letter.dead_at.to_string();
    let mut headers = vec![
        ("ams-id", letter.ticket.id.to_string()),
        ("ams-attempt", letter.ticket.attempt.to_string()),
        ("reason", letter.reason.clone()),
        ("attempts", letter.attempts.to_string()),
        ("dead_at", dead_at.clone()),
    ];
    headers.extend(letter.last_status.map(|status| ("last_status", status.to_string())));
    headers.extend(letter.last_error.clone().map(|error| ("last_error", error)));
    let value = Value {
        ticket: &letter.ticket,
        reason: &letter.reason,
        attempts: letter.attempts,
        last_status: letter.last_status,
        last_error: letter.last_error.as_deref(),
        dead_at,
    };
    LaneRecord {
        key: letter.ticket.key(),
        value: to_json(&value, letter.ticket.bytes() + 2 * OTHER_FIELDS),
        headers,
    }
}

/// The record as any lane takes it: the start of its value, and the value's true size in a header.
fn cut(whole: &LaneRecord) -> LaneRecord {
    let mut headers = whole.headers.clone();
    headers.push(("size", whole.value.len().to_string()));
    LaneRecord {
        key: whole.key.clone(),
        value: whole.value.slice(..whole.value.len().min(RECORD_CUT)),
        headers,
    }
}

/// Publishes dead letters and marks them in the store. One that its lane does not take keeps no other from it.
pub async fn publish(context: Context, letters: Vec<DeadLetter>) {
    let mut lanes: BTreeMap<&str, Vec<&DeadLetter>> = BTreeMap::new();
    for letter in &letters {
        lanes.entry(&letter.lane).or_default().push(letter);
    }
    for (lane, letters) in lanes {
        match publish_on(&context, lane, &letters).await {
            Ok(()) => mark(&context, &letters).await,
            Err(QueueError::Unavailable(why)) => {
                tracing::warn!(lane, "{} dead letters will be published later: {why}", letters.len());
            }
            // One of them may be to blame: each goes alone.
            Err(_) => {
                for letter in letters {
                    publish_alone(&context, lane, letter).await;
                }
            }
        }
    }
}

async fn publish_on(context: &Context, lane: &str, letters: &[&DeadLetter]) -> Result<(), QueueError> {
    context.queue.ensure(&[lane.to_owned()]).await?;
    let records = letters.iter().map(|letter| record(letter)).collect();
    context.queue.publish(lane, records).await.map(drop)
}

/// Publishes one letter whole, else cut, else gives it up: the store still has the message.
async fn publish_alone(context: &Context, lane: &str, letter: &DeadLetter) {
    let whole = record(letter);
    let short = cut(&whole);
    let sent = match context.queue.publish(lane, vec![whole]).await {
        Err(QueueError::TooLarge(_)) => context.queue.publish(lane, vec![short]).await,
        sent => sent,
    };
    let id = letter.ticket.id;
    match sent {
        Ok(_) => mark(context, &[letter]).await,
        Err(QueueError::Unavailable(why)) => {
            tracing::warn!(lane, id = id.0, "the dead letter of message {id} will be published later: {why}");
        }
        Err(error) => {
            tracing::error!(
                lane,
                id = id.0,
                "{lane} does not take the dead letter of message {id} ({error}); it is given up, and the message \
                 stays in the store"
            );
            mark(context, &[letter]).await;
        }
    }
}

async fn mark(context: &Context, letters: &[&DeadLetter]) {
    let ids: Vec<MessageId> = letters.iter().map(|letter| letter.ticket.id).collect();
    let mark = || context.store.dead_lettered(&ids);
    service::persist("dead letters", &CancellationToken::new(), mark).await;
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Timestamp;
    use crate::ticket::tests::recorded_ticket;

    fn letter() -> DeadLetter {
        DeadLetter {
            ticket: recorded_ticket(),
            lane: "messages-dlq".into(),
            reason: "all tries failed; last: status 500".into(),
            attempts: 4,
            last_status: Some(500),
            last_error: None,
            dead_at: Timestamp::EPOCH,
        }
    }

    #[test]
    fn a_dead_letter_carries_the_message_and_its_end() {
        let record = record(&letter());
        let value: serde_json::Value = serde_json::from_slice(&record.value).unwrap();
        assert_eq!(value["content"], "Hi \"you\"");
        assert_eq!((&value["attempts"], &value["last_status"]), (&4.into(), &500.into()));
        for header in
            [("reason", "all tries failed; last: status 500"), ("ams-id", "7"), ("ams-attempt", "4")]
        {
            assert!(record.headers.contains(&(header.0, header.1.into())), "{header:?}");
        }
    }

    /// A dead letter holds the whole ticket, so a program that reads tickets reads it too.
    #[test]
    fn recorded_dead_letters_are_readable_for_ever() {
        let recorded = include_str!("ticket/records/dead-letter-1.json");
        let read = Ticket::decode(recorded.as_bytes()).unwrap();
        assert_eq!(read.encode(), recorded_ticket().encode());
        assert_eq!(record(&letter()).value, recorded.trim_end());
    }

    #[test]
    fn a_letter_that_is_cut_tells_its_size() {
        let ticket = Ticket { content: "x".repeat(2 * RECORD_CUT), ..recorded_ticket() };
        let whole = record(&DeadLetter { ticket, ..letter() });
        let short = cut(&whole);
        assert_eq!((short.value.len(), short.key), (RECORD_CUT, whole.key));
        assert!(short.headers.contains(&("size", whole.value.len().to_string())));
    }
}
