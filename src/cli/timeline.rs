//! `ams messages show`: one message and its story, try by try.

use std::process::ExitCode;
use std::time::Duration;

use serde::Deserialize;
use serde_json::{Value, json};

use super::messages::{Message, Page};
use super::operator::{Operator, read};
use super::screen::{Paint, Tone, plain, time};
use crate::app;
use crate::clock::Timestamp;

/// Characters of a content, and of an answer, that are shown; `--json` shows all.
const CONTENT: usize = 400;
const ANSWER: usize = 120;

/// One try, as far as it is shown.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct Attempt {
    attempt: u32,
    lane: String,
    class: String,
    status: Option<u16>,
    address: String,
    error: Option<String>,
    answer: String,
    provider_message_id: Option<String>,
    started_at: Timestamp,
    connect_ms: f64,
    head_ms: f64,
    body_ms: f64,
}

/// Shows message `id`.
///
/// # Errors
/// When there is none, or the API can't be asked.
pub(super) async fn show(operator: &Operator, id: i64) -> app::Result<ExitCode> {
    let mut answer = operator.client.get(&format!("/v1/messages/{id}")).await?;
    let attempts = operator.client.get(&format!("/v1/messages/{id}/attempts")).await?;
    let message: Message = read(&answer)?;
    let tries: Page<Attempt> = read(&attempts)?;
    if let Value::Object(fields) = &mut answer {
        fields.insert("timeline".to_owned(), json!(attempts["data"]));
    }
    let now = operator.clock.now();
    operator.screen.show(&answer, || story(&message, &tries.data, now, operator.screen.paint))?;
    Ok(ExitCode::SUCCESS)
}

/// The message's head, its fields, and what happened when.
fn story(message: &Message, tries: &[Attempt], now: Timestamp, paint: Paint) -> String {
    let status = paint.status(&message.status, 0);
    let title = paint.tone(Tone::Strong, &format!("message {}", message.id));
    let mut text = format!("{title} to {}: {status}", plain(&message.recipient, 100));
    if let Some(why) = &message.why {
        text += &format!(", {}", plain(why, 300));
    }
    text.push_str("\n\n");
    let mut row = |name: &str, words: &str| {
        text += &format!("{} {words}\n", paint.tone(Tone::Faint, &format!("{name:<9}")));
    };
    row("endpoint", &plain(&message.endpoint, 100));
    row("content", &plain(&message.content, CONTENT));
    let texts = [
        ("type", message.content_type.clone()),
        ("headers", message.headers.as_ref().map(Value::to_string)),
        ("tags", message.tags.as_ref().map(Value::to_string)),
        ("order key", message.ordering_key.clone()),
        ("idem. key", message.idempotency_key.clone()),
        ("priority", Some(message.priority).filter(|priority| *priority != 0).map(|n| n.to_string())),
        ("send at", message.send_at.map(|at| at.to_string())),
        ("expires", message.expires_at.map(|at| at.to_string())),
    ];
    for (name, value) in texts {
        if let Some(value) = value {
            row(name, &plain(&value, CONTENT));
        }
    }
    text.push('\n');
    for (at, words) in events(message, tries, now, paint) {
        text += &format!("{} {words}\n", paint.tone(Tone::Faint, &at));
    }
    text + &next_step(message)
}

/// What happened, each with its time: the first in full, the others since then.
fn events(message: &Message, tries: &[Attempt], now: Timestamp, paint: Paint) -> Vec<(String, String)> {
    let start = message.created_at;
    let later = |at: Timestamp| format!("{:>9}", format!("+{}", time(at.since(start))));
    let mut events = vec![(" ".repeat(9), format!("stored at {start}"))];
    events.extend(tries.iter().map(|attempt| (later(attempt.started_at), attempt_words(attempt, paint))));
    if let Some(at) = message.finished_at {
        let status = paint.status(&message.status, 0);
        events.push((later(at), status));
    } else if let Some(due) = message.due_at.filter(|due| *due > now) {
        events.push((later(due), format!("next try, in {}", time(due.since(now)))));
    } else if !message.is_final() {
        events.push((later(now), paint.status(&message.status, 0)));
    }
    events
}

fn attempt_words(attempt: &Attempt, paint: Paint) -> String {
    let took =
        Duration::from_secs_f64((attempt.connect_ms + attempt.head_ms + attempt.body_ms).max(0.0) / 1000.0);
    let tone = if attempt.class == "accepted" { Tone::Good } else { Tone::Wait };
    let came = match attempt.status {
        Some(status) => format!("status {status}"),
        None => attempt.class.replace('_', " "),
    };
    let mut words = format!("try {} on {}: ", attempt.attempt, attempt.lane);
    words += &format!("{} in {} at {}", paint.tone(tone, &came), time(took), plain(&attempt.address, 100));
    let more = match (&attempt.error, &attempt.provider_message_id) {
        (Some(error), _) => plain(error, 200),
        (None, Some(id)) => format!("its id there: {}", plain(id, 100)),
        (None, None) => plain(attempt.answer.trim(), ANSWER),
    };
    if !more.is_empty() {
        words += &format!("\n{:10}{}", "", paint.tone(Tone::Faint, &more));
    }
    words
}

fn next_step(message: &Message) -> String {
    let id = message.id;
    match message.status.as_str() {
        "dead" | "cancelled" | "expired" => format!("\n`ams messages redrive {id}` sends it again.\n"),
        "sent" => String::new(),
        _ => format!("\n`ams messages cancel {id}` makes no further try.\n"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn message(more: &Value) -> Message {
        let mut message = json!({
            "id": 7, "status": "dead", "why": "status 500", "endpoint": "sms", "recipient": "+90", "attempts": 2,
            "content": "Hi\u{1b}[2J", "created_at": "2030-01-01T09:00:00Z", "finished_at": "2030-01-01T09:00:04Z",
            "tags": {"a": 1},
        });
        message.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
        read(&message).unwrap()
    }

    fn attempts() -> Vec<Attempt> {
        let attempts = json!([
            {"attempt": 1, "lane": "messages", "class": "rejected", "status": 500, "address": "http://x/",
             "answer": "oops\n", "started_at": "2030-01-01T09:00:00.02Z", "connect_ms": 0.5, "head_ms": 11.0, "body_ms": 0.5},
            {"attempt": 2, "lane": "messages-retry", "class": "bad_answer", "address": "http://x/", "error": "no HTTP",
             "answer": "", "started_at": "2030-01-01T09:00:03Z", "connect_ms": 0.0, "head_ms": 0.2, "body_ms": 0.0},
        ]);
        read(&attempts).unwrap()
    }

    #[test]
    fn a_story_is_told_try_by_try() {
        let now = Timestamp::parse("2030-01-01T10:00:00Z").unwrap();
        let text = story(&message(&json!({})), &attempts(), now, Paint::default());
        let expected = "\
message 7 to +90: dead, status 500

endpoint  sms
content   Hi\\u{1b}[2J
tags      {\"a\":1}

          stored at 2030-01-01T09:00:00Z
   +20 ms try 1 on messages: status 500 in 12 ms at http://x/
          oops
   +3.0 s try 2 on messages-retry: bad answer in 0.2 ms at http://x/
          no HTTP
   +4.0 s dead

`ams messages redrive 7` sends it again.
";
        assert_eq!(text, expected);
    }

    #[test]
    fn what_waits_says_what_comes_next() {
        let now = Timestamp::parse("2030-01-01T09:00:04Z").unwrap();
        let waiting = json!({"status": "retrying", "finished_at": null, "due_at": "2030-01-01T09:00:09Z"});
        let text = story(&message(&waiting), &attempts(), now, Paint::default());
        assert!(text.contains("   +9.0 s next try, in 5.0 s\n"), "{text}");
        assert!(text.ends_with("`ams messages cancel 7` makes no further try.\n"), "{text}");
        let queued = json!({"status": "queued", "finished_at": null, "why": "its ticket waits"});
        let text = story(&message(&queued), &[], now, Paint { on: true });
        assert!(text.starts_with("\x1b[1mmessage 7\x1b[0m to +90: queued, its ticket waits\n"), "{text:?}");
        assert!(text.contains("+4.0 s\x1b[0m queued\n"), "{text:?}");
    }
}
