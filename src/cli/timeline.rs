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
    row("endpoint", &message.endpoint);
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
    text + next_step(message)
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

fn next_step(message: &Message) -> &'static str {
    match message.status.as_str() {
        "dead" | "cancelled" | "expired" => "\n`ams messages redrive` with its number sends it again.\n",
        "sent" => "",
        _ => "\n`ams messages cancel` with its number makes no further try.\n",
    }
}
