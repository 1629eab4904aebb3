//! What a receiver's answer tells us: the wait it asks for, and what its body says.

use std::time::{Duration, UNIX_EPOCH};

use hyper::HeaderMap;
use hyper::header::RETRY_AFTER;
use serde::Deserialize;
use serde_json::value::RawValue;

use crate::clock::Timestamp;

/// No more of a body is read; the connection is dropped then.
pub(super) const BODY_MAX: usize = 64 * 1024;

/// As much of a body is kept with the attempt.
const TEXT_MAX: usize = 4 * 1024;

/// How many bytes of a body that begins so are of use: of an object all, as it may say `messageId`; of
/// anything else its text, and one more byte to show that it was cut.
pub(super) fn useful(start: &[u8]) -> usize {
    match start.iter().find(|byte| !byte.is_ascii_whitespace()) {
        Some(b'{') | None => BODY_MAX,
        Some(_) => TEXT_MAX + 1,
    }
}

/// A longer `messageId` is no identifier; it is not kept.
const ID_MAX: usize = 256;

/// What a body says.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Answer {
    pub(super) text: String,
    pub(super) id: Option<String>,
    pub(super) message: Option<String>,
}

#[derive(Deserialize)]
struct Reply<'a> {
    #[serde(borrow, rename = "messageId")]
    id: Option<&'a RawValue>,
    #[serde(borrow)]
    message: Option<&'a RawValue>,
}

impl Answer {
    /// Understands as much of a body as was read; `whole` says whether that is all of it.
    pub(super) fn read(body: Vec<u8>, whole: bool) -> Answer {
        let mut answer = Answer::default();
        if whole && body.iter().find(|byte| !byte.is_ascii_whitespace()) == Some(&b'{') {
            // An answer that only looks like JSON is no failure: its text is kept all the same.
            if let Ok(reply) = serde_json::from_slice::<Reply<'_>>(&body) {
                answer.id = reply.id.and_then(word).filter(|id| id.len() <= ID_MAX);
                answer.message = reply.message.and_then(word).map(|text| head(text.into_bytes()));
            }
        }
        answer.text = head(body);
        answer
    }
}

/// A JSON string's content, or a number as it was written.
fn word(value: &RawValue) -> Option<String> {
    let json = value.get();
    match json.as_bytes().first()? {
        b'"' => {
            let text: String = serde_json::from_str(json).ok()?;
            Some(without_nul(text))
        }
        b'-' | b'0'..=b'9' => Some(json.to_owned()),
        _ => None,
    }
}

/// The first 4 KiB as text that a database takes.
fn head(mut bytes: Vec<u8>) -> String {
    if bytes.len() > TEXT_MAX {
        bytes.truncate(TEXT_MAX);
        // A character that the cut went through is left away.
        if let Err(error) = std::str::from_utf8(&bytes)
            && error.error_len().is_none()
        {
            bytes.truncate(error.valid_up_to());
        }
    }
    let text = String::from_utf8(bytes)
        .unwrap_or_else(|error| String::from_utf8_lossy(error.as_bytes()).into_owned());
    without_nul(text)
}

/// PostgreSQL's text can't hold a NUL.
fn without_nul(mut text: String) -> String {
    if text.contains('\0') {
        text.retain(|character| character != '\0');
    }
    text
}

/// The wait that `Retry-After` asks for, in milliseconds from `now`: seconds, or a date.
pub(super) fn retry_after_ms(headers: &HeaderMap, now: Timestamp) -> Option<u64> {
    let text = headers.get(RETRY_AFTER)?.to_str().ok()?.trim();
    if !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit()) {
        // More digits than fit mean a very long time; whoever obeys has a bound of its own.
        return Some(text.parse::<u64>().unwrap_or(u64::MAX).saturating_mul(1000));
    }
    let at = httpdate::parse_http_date(text).ok()?.duration_since(UNIX_EPOCH).ok()?;
    let wait = Timestamp::EPOCH.after(at).since(now);
    u64::try_from(wait.as_millis()).ok()
}

/// How long the receiver says that it keeps an idle connection (`Keep-Alive: timeout=5`).
pub(super) fn keeps_idle_for(headers: &HeaderMap) -> Option<Duration> {
    let text = headers.get("keep-alive")?.to_str().ok()?;
    let seconds = text.split(',').find_map(|part| part.trim().strip_prefix("timeout="))?;
    seconds.trim().parse().ok().map(Duration::from_secs)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn read(body: &[u8]) -> Answer {
        Answer::read(body.to_vec(), true)
    }

    #[test]
    fn the_original_services_answer_is_understood() {
        let answer = read(br#" {"message":"Accepted","messageId":"67f2f8a8-ea58-4ed0-a6f9-ff217df4d849"}"#);
        assert_eq!(answer.id.as_deref(), Some("67f2f8a8-ea58-4ed0-a6f9-ff217df4d849"));
        assert_eq!(answer.message.as_deref(), Some("Accepted"));
    }

    #[test]
    fn strange_json_is_kept_as_text() {
        for (body, id) in [
            (r#"{"messageId":12345678901234567890}"#, Some("12345678901234567890")),
            (r#"{"messageId":null,"message":{"a":1}}"#, None),
            (r#"{"messageId":["x"]}"#, None),
            (r#"{"messageId":"a\u0000b"}"#, Some("ab")),
            (r#"{"messageId":"#, None),
            (r#"[{"messageId":"x"}]"#, None),
            ("{}", None),
            ("", None),
        ] {
            let answer = read(body.as_bytes());
            assert_eq!(answer.id.as_deref(), id, "{body}");
            assert_eq!(answer.text, body);
            assert_eq!(answer.message, None);
        }
        let long = format!(r#"{{"messageId":"{}"}}"#, "x".repeat(ID_MAX + 1));
        assert_eq!(read(long.as_bytes()).id, None);
    }

    #[test]
    fn a_body_that_was_cut_is_not_parsed() {
        let answer = Answer::read(br#"{"messageId":"x"}"#.to_vec(), false);
        assert_eq!(answer.id, None);
    }

    #[test]
    fn only_an_object_is_kept_whole() {
        let object = format!(r#"{{"text":"{}","messageId":"x"}}"#, "é".repeat(TEXT_MAX));
        for (body, kept) in [
            (object.clone(), object.len()),
            (format!("\r\n {object}"), object.len() + 3),
            (" ".repeat(2 * TEXT_MAX), 2 * TEXT_MAX),
            (format!("x{object}"), TEXT_MAX + 1),
            ("no".to_owned(), 2),
        ] {
            let useful = &body.as_bytes()[..body.len().min(useful(body.as_bytes()))];
            assert_eq!(useful.len(), kept);
            assert_eq!(read(useful), read(body.as_bytes()));
        }
    }

    #[test]
    fn text_is_cut_between_characters() {
        let text = read("é".repeat(TEXT_MAX).as_bytes()).text;
        assert_eq!(text.len(), TEXT_MAX);
        let text = read(format!("x{}", "é".repeat(TEXT_MAX)).as_bytes()).text;
        assert_eq!(text.len(), TEXT_MAX - 1);
        assert!(!text.contains('\u{fffd}'));
    }

    #[test]
    fn waits_are_read_in_both_forms() {
        let now = Timestamp::parse("2026-11-23T10:00:00Z").unwrap();
        for (value, wait) in [
            ("120", Some(120_000)),
            ("0", Some(0)),
            (" 7 ", Some(7_000)),
            ("99999999999999999999999", Some(u64::MAX)),
            ("Mon, 23 Nov 2026 10:01:30 GMT", Some(90_000)),
            ("Mon, 23 Nov 2026 09:00:00 GMT", Some(0)),
            ("-1", None),
            ("1.5", None),
            ("soon", None),
            ("", None),
        ] {
            let headers = HeaderMap::from_iter([(RETRY_AFTER, value.parse().unwrap())]);
            assert_eq!(retry_after_ms(&headers, now), wait, "{value}");
        }
        assert_eq!(retry_after_ms(&HeaderMap::new(), now), None);
    }

    #[test]
    fn keep_alive_is_read() {
        for (value, idle) in
            [("timeout=5", Some(5)), ("max=100, timeout=60", Some(60)), ("timeout=x", None), ("max=1", None)]
        {
            let headers = HeaderMap::from_iter([("keep-alive".parse().unwrap(), value.parse().unwrap())]);
            assert_eq!(keeps_idle_for(&headers), idle.map(Duration::from_secs), "{value}");
        }
    }

    proptest! {
        #[test]
        fn any_body_becomes_text_that_a_database_takes(body: Vec<u8>, whole: bool) {
            let answer = Answer::read(body, whole);
            prop_assert!(!answer.text.contains('\0'));
            // A byte that is no UTF-8 becomes three.
            prop_assert!(answer.text.len() <= 3 * TEXT_MAX);
        }
    }
}
