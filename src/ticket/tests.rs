//! What a ticket looks like on a lane, and tickets for the tests of others.

use super::*;

/// A ticket with nothing set that need not be.
pub(crate) fn ticket(id: i64) -> Ticket {
    Ticket {
        id: MessageId(id),
        batch: BatchId(1),
        position: 0,
        endpoint_id: EndpointId(1),
        endpoint: "default".into(),
        recipient: "+90".into(),
        content: "Hi".into(),
        created_at: Timestamp::EPOCH,
        attempt: 1,
        lane_tries: 0,
        priority: 0,
        content_type: None,
        headers: None,
        ordering_key: None,
        expires_at: None,
        due_at: None,
    }
}

/// The ticket of the recorded forms.
pub(crate) fn recorded_ticket() -> Ticket {
    Ticket { batch: BatchId(81), position: 2, content: "Hi \"you\"".into(), attempt: 4, ..ticket(7) }
}

/// What a ticket of this version looks like, byte for byte. A rolling upgrade leaves such records on the
/// lanes: add a file for a new form, and change none.
#[test]
fn records_of_every_version_are_readable_for_ever() {
    let full = Ticket {
        content_type: Some("text/plain".into()),
        headers: Some(serde_json::value::RawValue::from_string(r#"{"x-team":"billing"}"#.into()).unwrap()),
        ordering_key: Some("order-9".into()),
        ..recorded_ticket()
    };
    let later = Ticket {
        lane_tries: 2,
        priority: -3,
        expires_at: Some(Timestamp::EPOCH.after(std::time::Duration::from_secs(60))),
        due_at: Some(Timestamp::EPOCH.after(std::time::Duration::from_millis(500))),
        ..recorded_ticket()
    };
    for (recorded, written) in [
        (include_str!("records/ticket-1.json"), recorded_ticket()),
        (include_str!("records/ticket-1-full.json"), full),
        (include_str!("records/ticket-1-later.json"), later),
    ] {
        assert_eq!(written.encode(), recorded.trim_end(), "a new form is a new file");
        let read = Ticket::decode(recorded.as_bytes()).unwrap();
        assert_eq!(serde_json::to_string(&read).unwrap(), serde_json::to_string(&written).unwrap());
    }
}

#[test]
fn a_ticket_of_a_newer_program_is_read_without_what_it_adds() {
    let read = Ticket::decode(include_bytes!("records/ticket-from-the-future.json")).unwrap();
    assert_eq!((read.id, read.batch, read.attempt), (MessageId(7), BatchId(81), 4));
    assert_eq!((read.endpoint.as_str(), read.content_type), ("default", None));
}

#[test]
fn what_is_no_ticket_says_why() {
    for (value, why) in [(&b"\xff"[..], "not UTF-8"), (b"{}", "missing field"), (b"[", "not a ticket")] {
        let said = Ticket::decode(value).unwrap_err();
        assert!(said.contains(why), "{said}");
    }
}

#[test]
fn the_ordering_key_is_the_key() {
    assert_eq!(&ticket(7).key()[..], b"7");
    assert_eq!(&Ticket { ordering_key: Some("order-9".into()), ..ticket(7) }.key()[..], b"order-9");
}

#[test]
fn a_ticket_without_extras_has_exactly_the_contracts_fields() {
    assert_eq!(
        serde_json::to_string(&ticket(7)).unwrap(),
        r#"{"id":7,"batch":1,"position":0,"endpoint_id":1,"endpoint":"default","recipient":"+90","content":"Hi","created_at":"1970-01-01T00:00:00Z","attempt":1}"#
    );
}

#[test]
fn a_ticket_expires_at_its_time() {
    let expiring = Ticket { expires_at: Some(Timestamp::EPOCH), ..ticket(7) };
    assert!(expiring.is_expired(Timestamp::EPOCH) && !ticket(7).is_expired(Timestamp::MAX));
    let before = Timestamp::from_micros(-1);
    assert!(!expiring.is_expired(before));
}
