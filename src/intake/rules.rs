//! What a message must be like. Pure; the store's own checks say the same for those who insert by SQL.

use crate::clock::Timestamp;
use crate::header_rules::{HEADERS_BYTES_MAX, HEADERS_MAX, is_reserved};
use crate::message::NewMessage;

/// Messages in one batch call.
pub const BATCH_MAX: usize = 10_000;

const RECIPIENT_MAX: usize = 1_024;
const CONTENT_BYTES_MAX: usize = 1 << 20;
const WORD_MAX: usize = 255;
const TAGS_BYTES_MAX: usize = 16 << 10;

/// What is wrong with one field, in a sentence that says how to mend it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    pub field: &'static str,
    pub detail: String,
}

/// Everything that is wrong with a message; nothing when it may be stored.
pub fn check(message: &NewMessage, now: Timestamp, endpoint_exists: impl Fn(&str) -> bool) -> Vec<Fault> {
    let mut faults = Vec::new();
    let mut fault = |field, detail: &str| faults.push(Fault { field, detail: detail.to_owned() });
    if message.recipient.is_empty() || message.recipient.chars().count() > RECIPIENT_MAX {
        fault("recipient", "must have from 1 to 1024 characters");
    }
    if message.content.len() > CONTENT_BYTES_MAX {
        fault("content", "must have at most 1 MiB");
    }
    for (field, text) in [
        ("content_type", &message.content_type),
        ("ordering_key", &message.ordering_key),
        ("idempotency_key", &message.idempotency_key),
    ] {
        let length = text.as_ref().map(|text| text.chars().count());
        if length.is_some_and(|length| !(1..=WORD_MAX).contains(&length)) {
            fault(field, "must have from 1 to 255 characters");
        }
    }
    let as_header = message.content_type.as_ref().map(|text| hyper::header::HeaderValue::from_str(text));
    if as_header.is_some_and(|value| value.is_err()) {
        fault("content_type", "must be a text without control characters");
    }
    if !(-100..=100).contains(&message.priority) {
        fault("priority", "must be from -100 to 100");
    }
    if let Some(endpoint) = &message.endpoint
        && !endpoint_exists(endpoint)
    {
        fault("endpoint", "names no endpoint; create it first, or leave it out for `default`");
    }
    if message.expires_at.is_some_and(|expires| expires <= message.send_at.unwrap_or(now).max(now)) {
        fault("expires_at", "must be later than now and than send_at");
    }
    if let Some(detail) = message.headers.as_ref().and_then(headers_fault) {
        fault("headers", &detail);
    }
    if message.tags.as_ref().is_some_and(|tags| !tags.is_object()) {
        fault("tags", "must be a JSON object");
    } else if message.tags.as_ref().is_some_and(|tags| tags.to_string().len() > TAGS_BYTES_MAX) {
        fault("tags", "must have at most 16 KiB as JSON");
    }
    if has_nul(message) {
        fault("content", "no text may hold the character U+0000");
    }
    faults
}

fn headers_fault(headers: &serde_json::Value) -> Option<String> {
    let Some(headers) = headers.as_object() else { return Some("must be a JSON object of texts".to_owned()) };
    if headers.len() > HEADERS_MAX {
        return Some(format!("must be at most {HEADERS_MAX}"));
    }
    let bytes: usize =
        headers.iter().map(|(name, value)| name.len() + value.as_str().map_or(0, str::len)).sum();
    if bytes > HEADERS_BYTES_MAX {
        return Some("must have at most 16 KiB, names and values together".to_owned());
    }
    for (name, value) in headers {
        let lower = name.to_ascii_lowercase();
        if is_reserved(&lower) {
            return Some(format!("`{name}` is set by AMS; leave it out"));
        }
        if hyper::header::HeaderName::from_bytes(name.as_bytes()).is_err() {
            return Some(format!("`{name}` is no header name"));
        }
        let legal = value.as_str().is_some_and(|value| hyper::header::HeaderValue::from_str(value).is_ok());
        if !legal {
            return Some(format!("the value of `{name}` must be a text without control characters"));
        }
    }
    None
}

/// PostgreSQL can't store the nul character, nor can C programs read it.
fn has_nul(message: &NewMessage) -> bool {
    let json = |value: &Option<serde_json::Value>| {
        value.as_ref().is_some_and(|value| value.to_string().contains("\\u0000"))
    };
    let texts = [Some(&message.recipient), Some(&message.content), message.endpoint.as_ref()];
    let more =
        [message.content_type.as_ref(), message.ordering_key.as_ref(), message.idempotency_key.as_ref()];
    texts.into_iter().chain(more).flatten().any(|text| text.contains('\0'))
        || json(&message.headers)
        || json(&message.tags)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use serde_json::json;

    use super::*;

    fn faults(change: impl FnOnce(&mut NewMessage)) -> Vec<&'static str> {
        let mut message =
            NewMessage { recipient: "+90".into(), content: "Hello".into(), ..NewMessage::default() };
        change(&mut message);
        check(&message, Timestamp::EPOCH, |name| name == "sms").iter().map(|fault| fault.field).collect()
    }

    #[test]
    fn a_plain_message_has_no_fault() {
        assert_eq!(faults(|_| {}), [""; 0]);
        assert_eq!(faults(|m| m.endpoint = Some("sms".into())), [""; 0]);
        assert_eq!(faults(|m| m.headers = Some(json!({"x-tenant": "7"}))), [""; 0]);
    }

    #[test]
    fn each_fault_names_its_field() {
        let at = |s| Timestamp::EPOCH.after(Duration::from_secs(s));
        assert_eq!(faults(|m| m.recipient = String::new()), ["recipient"]);
        assert_eq!(faults(|m| m.recipient = "x".repeat(1_025)), ["recipient"]);
        assert_eq!(faults(|m| m.content = "x".repeat((1 << 20) + 1)), ["content"]);
        assert_eq!(faults(|m| m.content = "a\0b".into()), ["content"]);
        assert_eq!(faults(|m| m.content_type = Some(String::new())), ["content_type"]);
        assert_eq!(faults(|m| m.content_type = Some("text/plain\r\nx: y".into())), ["content_type"]);
        assert_eq!(faults(|m| m.tags = Some(json!({"a": "x".repeat(16 << 10)}))), ["tags"]);
        assert_eq!(faults(|m| m.idempotency_key = Some("x".repeat(256))), ["idempotency_key"]);
        assert_eq!(faults(|m| m.priority = 101), ["priority"]);
        assert_eq!(faults(|m| m.endpoint = Some("nobody".into())), ["endpoint"]);
        assert_eq!(faults(|m| m.expires_at = Some(at(0))), ["expires_at"]);
        assert_eq!(faults(|m| (m.send_at, m.expires_at) = (Some(at(9)), Some(at(9)))), ["expires_at"]);
        assert_eq!(faults(|m| m.tags = Some(json!([1]))), ["tags"]);
        for headers in [
            json!([]),
            json!({"host": "x"}),
            json!({"Webhook-Id": "x"}),
            json!({"a b": "x"}),
            json!({"a": 1}),
            json!({"a": "x".repeat(16 << 10)}),
            (0..65).map(|i| (format!("x-{i}"), json!("y"))).collect::<serde_json::Map<_, _>>().into(),
        ] {
            assert_eq!(faults(|m| m.headers = Some(headers.clone())), ["headers"], "{headers}");
        }
        assert_eq!(faults(|m| (m.recipient, m.priority) = (String::new(), -101)), ["recipient", "priority"]);
    }
}
