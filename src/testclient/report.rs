//! What the test client says of a request: one line for people, one value for programs.

use std::borrow::Cow;
use std::io::Write as _;

use hyper::HeaderMap;
use serde::Deserialize;

use super::Seen;
use crate::clock::Timestamp;

#[derive(Deserialize)]
struct Envelope<'a> {
    id: i64,
    #[serde(borrow)]
    recipient: Cow<'a, str>,
}

/// What a request tells of the message it carries.
pub(super) fn seen(headers: &HeaderMap, body: &[u8], status: u16, at: Timestamp) -> Seen {
    let text = |name| headers.get(name).and_then(|value| value.to_str().ok()).unwrap_or_default();
    let webhook_id = text("webhook-id");
    let (id, recipient) = match serde_json::from_slice::<Envelope<'_>>(body) {
        Ok(envelope) => (envelope.id, envelope.recipient.into_owned()),
        // A message with a content type of its own has no envelope, but its header ends in its number.
        Err(_) => {
            let number = webhook_id.rsplit('_').next().and_then(|number| number.parse().ok());
            (number.unwrap_or(0), String::new())
        }
    };
    Seen {
        id,
        webhook_id: webhook_id.to_owned(),
        attempt: text("ams-attempt").parse().unwrap_or(0),
        recipient,
        status,
        at,
    }
}

/// Prints one line. Nobody reading is no reason to stop answering.
pub(super) fn print(seen: &Seen, colour: bool) {
    let _ = writeln!(std::io::stdout().lock(), "{}", line(seen, colour));
}

fn line(seen: &Seen, colour: bool) -> String {
    let (answer, paint) = match seen.status {
        0 => (Cow::Borrowed("no answer"), "\x1b[33m"),
        status @ 200..=299 => (Cow::Owned(status.to_string()), "\x1b[32m"),
        status => (Cow::Owned(status.to_string()), "\x1b[31m"),
    };
    let (paint, plain) = if colour { (paint, "\x1b[0m") } else { ("", "") };
    format!(
        "{at}  message {id}  attempt {attempt}  to {recipient}  {webhook_id}  -> {paint}{answer}{plain}",
        at = seen.at,
        id = seen.id,
        attempt = seen.attempt,
        // What comes from outside must not steer a terminal.
        recipient = seen.recipient.escape_debug(),
        webhook_id = seen.webhook_id.escape_debug(),
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn headers() -> HeaderMap {
        let pairs = [("webhook-id", "msg_0123456789ab_7"), ("ams-attempt", "2")];
        HeaderMap::from_iter(pairs.map(|(name, value)| (name.parse().unwrap(), value.parse().unwrap())))
    }

    #[test]
    fn the_envelope_is_read() {
        let body =
            br#"{"id":9,"recipient":"+90\u001b[2J","content":"x","created_at":"2026-11-23T10:00:00Z"}"#;
        let seen = seen(&headers(), body, 200, Timestamp::EPOCH);
        assert_eq!((seen.id, seen.attempt), (9, 2));
        assert_eq!(seen.recipient, "+90\u{1b}[2J");
        assert_eq!(
            line(&seen, false),
            "1970-01-01T00:00:00Z  message 9  attempt 2  to +90\\u{1b}[2J  msg_0123456789ab_7  -> 200"
        );
        assert!(line(&seen, true).ends_with("-> \x1b[32m200\x1b[0m"));
    }

    #[test]
    fn anything_else_is_named_by_its_header() {
        let seen = seen(&headers(), b"Hello", 0, Timestamp::EPOCH);
        assert_eq!((seen.id, seen.recipient.as_str()), (7, ""));
        assert!(line(&seen, false).ends_with("-> no answer"));
        let bare = super::seen(&HeaderMap::new(), b"", 200, Timestamp::EPOCH);
        assert_eq!((bare.id, bare.attempt, bare.webhook_id.as_str()), (0, 0, ""));
    }
}
