//! A ticket, and a dead letter, as the record that travels on a lane.

use bytes::Bytes;
use serde::Serialize;

use crate::message::Ticket;
use crate::queue::LaneRecord;
use crate::store::DeadLetter;

/// The record of a ticket: JSON value, the ordering key (else the id) as key, and the contract's headers.
pub fn lane_record(ticket: &Ticket) -> LaneRecord {
    record(ticket, ticket, Vec::new())
}

/// The record of a dead letter: the whole message, with what became of it in value and headers alike.
pub fn dead_letter_record(letter: &DeadLetter) -> LaneRecord {
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
    record(&letter.ticket, &value, headers)
}

fn record(ticket: &Ticket, value: &impl Serialize, more: Vec<(&'static str, String)>) -> LaneRecord {
    let key = match &ticket.ordering_key {
        Some(key) => Bytes::copy_from_slice(key.as_bytes()),
        None => Bytes::from(ticket.id.to_string()),
    };
    // Only a map with keys that are not strings, or a failing writer, can make this fail; here is neither.
    let value = serde_json::to_vec(value).expect("strings and numbers always serialize");
    let mut headers = vec![
        ("ams-id", ticket.id.to_string()),
        ("ams-attempt", ticket.attempt.to_string()),
        ("traceparent", traceparent()),
    ];
    headers.extend(more);
    LaneRecord { key, value: value.into(), headers }
}

/// A fresh W3C trace context (version 00, sampled): a trace begins where the ticket does.
fn traceparent() -> String {
    format!("00-{:032x}-{:016x}-01", fastrand::u128(1..), fastrand::u64(1..))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Timestamp;
    use crate::message::MessageId;

    fn ticket() -> Ticket {
        Ticket {
            id: MessageId(7),
            epoch: 2,
            endpoint: "default".into(),
            recipient: "+90".into(),
            content: "Hi \"you\"".into(),
            created_at: Timestamp::EPOCH,
            attempt: 4,
            content_type: None,
            headers: None,
            ordering_key: None,
            due_at: None,
        }
    }

    fn dead_letter() -> DeadLetter {
        DeadLetter {
            ticket: ticket(),
            lane: "messages-dlq".into(),
            reason: "all tries failed; last: status 500".into(),
            attempts: 4,
            last_status: Some(500),
            last_error: None,
            dead_at: Timestamp::EPOCH,
        }
    }

    #[test]
    fn a_ticket_reads_back_and_carries_the_contracts_headers() {
        let record = lane_record(&ticket());
        let back: Ticket = serde_json::from_slice(&record.value).unwrap();
        assert_eq!((back.id, back.epoch, back.content.as_str()), (MessageId(7), 2, "Hi \"you\""));
        assert_eq!(&record.key[..], b"7");
        let names: Vec<_> = record.headers.iter().map(|header| header.0).collect();
        assert_eq!(names, ["ams-id", "ams-attempt", "traceparent"]);
        let trace: Vec<_> = record.headers[2].1.split('-').map(str::len).collect();
        assert_eq!(trace, [2, 32, 16, 2]);
    }

    /// What a ticket of this version looks like, byte for byte. A rolling upgrade leaves such records on the
    /// lanes: add a file for a new form, and change none.
    #[test]
    fn records_of_every_version_are_readable_for_ever() {
        let full = Ticket {
            content_type: Some("text/plain".into()),
            headers: Some(
                serde_json::value::RawValue::from_string(r#"{"x-team":"billing"}"#.into()).unwrap(),
            ),
            ordering_key: Some("order-9".into()),
            ..ticket()
        };
        let ahead = Ticket {
            due_at: Some(Timestamp::EPOCH.after(std::time::Duration::from_millis(500))),
            ..ticket()
        };
        for (recorded, written) in [
            (include_str!("records/ticket-2-ahead.json"), ahead),
            (include_str!("records/ticket-1.json"), ticket()),
            (include_str!("records/ticket-1-full.json"), full),
        ] {
            assert_eq!(lane_record(&written).value, recorded.trim_end(), "a new form is a new file");
            let read: Ticket = serde_json::from_str(recorded).unwrap();
            assert_eq!(serde_json::to_string(&read).unwrap(), serde_json::to_string(&written).unwrap());
        }
        // A dead letter holds the whole ticket, so a program that reads tickets reads it too.
        let letter: Ticket = serde_json::from_str(include_str!("records/dead-letter-1.json")).unwrap();
        assert_eq!(serde_json::to_string(&letter).unwrap(), serde_json::to_string(&ticket()).unwrap());
        assert_eq!(
            dead_letter_record(&dead_letter()).value,
            include_str!("records/dead-letter-1.json").trim_end()
        );
    }

    #[test]
    fn a_ticket_of_a_newer_program_is_read_without_what_it_adds() {
        let read: Ticket = serde_json::from_str(include_str!("records/ticket-from-the-future.json")).unwrap();
        assert_eq!((read.id, read.epoch, read.attempt), (MessageId(7), 2, 4));
        assert_eq!((read.endpoint.as_str(), read.content_type), ("default", None));
    }

    #[test]
    fn the_ordering_key_is_the_key() {
        let record = lane_record(&Ticket { ordering_key: Some("order-9".into()), ..ticket() });
        assert_eq!(&record.key[..], b"order-9");
    }

    #[test]
    fn a_dead_letter_carries_the_message_and_its_end() {
        let record = dead_letter_record(&dead_letter());
        let value: serde_json::Value = serde_json::from_slice(&record.value).unwrap();
        assert_eq!(value["content"], "Hi \"you\"");
        assert_eq!((&value["attempts"], &value["last_status"]), (&4.into(), &500.into()));
        assert!(record.headers.contains(&("reason", "all tries failed; last: status 500".into())));
    }
}
