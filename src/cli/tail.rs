//! `ams tail`: outcomes as they come, one line each.
//!
//! The API keeps no feed of changes, so each look reads the newest messages, and one by one those that
//! were under way before. What a look shows is bounded; what it left out is said.

use std::collections::{BTreeMap, BTreeSet};
use std::process::ExitCode;
use std::time::Duration;

use clap::{Arg, ArgMatches, Command};
use serde_json::{Map, Value};

use super::filter::{filter_args, status_arg};
use super::messages::{Message, newest};
use super::operator::{Operator, read, verb};
use super::screen::{Paint, Tone, plain, time};
use super::write;
use crate::app;
use crate::clock::Timestamp;
use crate::message::Status;

/// How often is looked.
const LOOK: Duration = Duration::from_millis(500);
/// Of the newest messages so many are read in a look: a page, and more pages while all of it is news.
const PAGE: usize = 100;
const NEW_MAX: usize = 1_000;
/// Older messages under way that are asked for in a look.
const OLD_MAX: usize = 50;
/// Messages that are remembered.
const KNOWN_MAX: usize = 20_000;

pub(super) fn command() -> Command {
    let last = Arg::new("last").long("last").value_name("N").default_value("10");
    let last = last.value_parser(clap::value_parser!(u16).range(0..=100));
    let outcomes = [Status::Sent, Status::Retrying, Status::Dead, Status::Cancelled, Status::Expired];
    let [endpoint, recipient, ..] = filter_args();
    verb("tail", "outcomes as they come, one line each, until Ctrl-C")
        .arg(status_arg(outcomes, "only those that become this"))
        .args([endpoint, recipient])
        .arg(last.help("how many of the past to begin with"))
}

pub(super) async fn run(operator: &Operator, matches: &ArgMatches) -> app::Result<ExitCode> {
    let mut filter = Map::new();
    for name in ["endpoint", "recipient"] {
        if let Some(value) = matches.get_one::<String>(name) {
            filter.insert(name.to_owned(), value.as_str().into());
        }
    }
    let wanted = matches.get_one::<String>("status").cloned();
    let last = matches.get_one::<u16>("last").map_or(0, |last| usize::from(*last));
    let mut tail = Tail { operator, filter, wanted, seen: Seen::default() };
    let past = tail.begin().await?;
    let mut written = tail.write(&past[past.len().saturating_sub(last)..])?;
    let mut away = false;
    while written {
        operator.pause(LOOK).await;
        if operator.stop.is_cancelled() {
            break;
        }
        match tail.look().await {
            Ok(events) => {
                away = false;
                written = tail.write(&events)?;
            }
            Err(error) if !away => {
                away = true;
                eprintln!("ams: {error}; waiting meanwhile");
            }
            Err(_) => {}
        }
    }
    Ok(ExitCode::SUCCESS)
}

struct Tail<'a> {
    operator: &'a Operator,
    filter: Map<String, Value>,
    /// The status that is shown; `None`: every outcome.
    wanted: Option<String>,
    seen: Seen,
}

impl Tail<'_> {
    /// Learns how things stand; what has ended already is the past.
    async fn begin(&mut self) -> app::Result<Vec<Event>> {
        let mut messages = newest(self.operator, &self.filter, PAGE).await?.data;
        for status in [Status::Retrying, Status::Processing, Status::Queued, Status::Pending] {
            let mut filter = self.filter.clone();
            filter.insert("status".to_owned(), status.as_str().into());
            messages.extend(newest(self.operator, &filter, PAGE).await?.data);
        }
        self.seen.take_in(&messages, self.operator.clock.now())
    }

    /// What has come of messages since the look before.
    async fn look(&mut self) -> app::Result<Vec<Event>> {
        let mut messages = newest(self.operator, &self.filter, PAGE).await?.data;
        if !self.seen.reaches(&messages) {
            messages = newest(self.operator, &self.filter, NEW_MAX).await?.data;
            if !self.seen.reaches(&messages) {
                eprintln!("ams: more than {NEW_MAX} new messages within a moment; only these are shown");
            }
        }
        for id in self.seen.others(&messages) {
            match self.operator.client.get(&format!("/v1/messages/{id}")).await {
                Ok(message) => messages.push(message),
                // Retention has taken it.
                Err(failure) if failure.status == Some(404) => self.seen.forget(id),
                Err(failure) => return Err(failure.into()),
            }
        }
        self.seen.take_in(&messages, self.operator.clock.now())
    }

    /// Writes the events that are wanted; whether anybody still reads.
    fn write(&self, events: &[Event]) -> app::Result<bool> {
        let wanted = |event: &&Event| self.wanted.as_deref().is_none_or(|wanted| wanted == event.status);
        let screen = self.operator.screen;
        let line = |event: &Event| match screen.json {
            true => format!("{}\n", event.json),
            false => format!("{}\n", line(event, screen.paint)),
        };
        write(&events.iter().filter(wanted).map(line).collect::<String>())
    }
}

/// A message that has become something.
#[derive(Debug)]
struct Event {
    at: Timestamp,
    status: String,
    message: Message,
    json: Value,
}

/// What is known of messages, so that only news is told.
#[derive(Debug, Default)]
struct Seen {
    known: BTreeMap<i64, Known>,
    looks: u64,
}

#[derive(Debug)]
struct Known {
    status: String,
    attempts: u32,
    is_final: bool,
    /// The look in which it was last read.
    look: u64,
}

impl Seen {
    /// Whether these messages, newest first, reach back to one that is known: then none was missed.
    fn reaches(&self, messages: &[Value]) -> bool {
        let id = |message: &Value| message["id"].as_i64();
        self.known.is_empty()
            || messages.len() < PAGE
            || messages.iter().filter_map(id).any(|id| self.known.contains_key(&id))
    }

    /// Known messages that are under way and not among these; those that were not read for longest.
    fn others(&self, messages: &[Value]) -> Vec<i64> {
        let read: BTreeSet<i64> = messages.iter().filter_map(|message| message["id"].as_i64()).collect();
        let open = self.known.iter().filter(|(id, known)| !known.is_final && !read.contains(id));
        let mut open: Vec<_> = open.map(|(id, known)| (known.look, *id)).collect();
        open.sort_unstable();
        open.into_iter().take(OLD_MAX).map(|(_, id)| id).collect()
    }

    fn forget(&mut self, id: i64) {
        self.known.remove(&id);
    }

    /// Notes how these messages stand; what has come of them since, in the order of its time.
    fn take_in(&mut self, messages: &[Value], now: Timestamp) -> app::Result<Vec<Event>> {
        self.looks += 1;
        let mut events = Vec::new();
        for json in messages {
            let message: Message = read(json)?;
            let known = Known {
                status: message.status.clone(),
                attempts: message.attempts,
                is_final: message.is_final(),
                look: self.looks,
            };
            let before = self.known.insert(message.id, known);
            if let Some(status) = become_of(before.as_ref(), &message) {
                let at = message.finished_at.unwrap_or(now);
                events.push(Event { at, status, message, json: json.clone() });
            }
        }
        while self.known.len() > KNOWN_MAX {
            self.known.pop_first();
        }
        events.sort_by_key(|event| (event.at, event.message.id));
        Ok(events)
    }
}

/// The outcome that is news, if there is any.
fn become_of(before: Option<&Known>, message: &Message) -> Option<String> {
    let outcome = message.is_final() || message.status == "retrying";
    let changed = before.is_none_or(|before| before.status != message.status);
    let tried = message.attempts > before.map_or(0, |before| before.attempts);
    if outcome && (changed || tried) {
        return Some(message.status.clone());
    }
    // It was retrying between two looks, and is under way again.
    (tried && before.is_some()).then(|| "retrying".to_owned())
}

fn line(event: &Event, paint: Paint) -> String {
    let message = &event.message;
    let clock = event.at.to_string();
    let clock = paint.tone(Tone::Faint, clock.get(11..19).unwrap_or(&clock));
    let tries =
        if message.attempts == 1 { "1 try".to_owned() } else { format!("{} tries", message.attempts) };
    let summary = match (event.status.as_str(), message.finished_at) {
        ("sent", Some(at)) => format!("{tries}, {}", time(at.since(message.created_at))),
        ("retrying", _) if message.status == "retrying" => message.summary(event.at),
        ("retrying", _) => format!("after {tries}; under way again"),
        ("dead", _) => format!("{}; {tries}", message.summary(event.at)),
        _ => message.summary(event.at),
    };
    let endpoint = match message.endpoint.as_str() {
        "default" => String::new(),
        name => format!(" at {name}"),
    };
    let (id, status) = (message.id, paint.status(&event.status, 9));
    format!(
        "{clock}  {status}  {id:<6} to {}{endpoint}  {}",
        plain(&message.recipient, 24),
        plain(&summary, 120)
    )
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn message(id: i64, status: &str, attempts: u32) -> Value {
        let ended = matches!(status, "sent" | "dead").then_some("1970-01-01T00:00:09Z");
        json!({
            "id": id, "status": status, "attempts": attempts, "endpoint": "default", "recipient": "+90",
            "content": "Hello", "created_at": "1970-01-01T00:00:00Z", "finished_at": ended,
            "due_at": (status == "retrying").then_some("1970-01-01T00:00:13Z"),
            "why": match status {
                "retrying" => Some("due at 1970-01-01T00:00:13Z; last: status 500"),
                "dead" => Some("status 500"),
                _ => None,
            },
        })
    }

    fn lines(seen: &mut Seen, messages: &[Value]) -> Vec<String> {
        let now = Timestamp::from_micros(10_000_000);
        let events = seen.take_in(messages, now).unwrap();
        events.iter().map(|event| line(event, Paint::default())).collect()
    }

    #[test]
    fn each_outcome_is_told_once() {
        let mut seen = Seen::default();
        let told = lines(&mut seen, &[message(2, "pending", 0), message(1, "sent", 1)]);
        assert_eq!(told, ["00:00:09  sent       1      to +90  1 try, 9.0 s"]);
        let told = lines(&mut seen, &[message(2, "retrying", 1), message(1, "sent", 1)]);
        assert_eq!(told, ["00:00:10  retrying   2      to +90  status 500; try 2 in 3.0 s"]);
        assert!(lines(&mut seen, &[message(2, "retrying", 1), message(1, "sent", 1)]).is_empty());
        assert!(lines(&mut seen, &[message(2, "queued", 1)]).is_empty(), "it only goes on");
        let told = lines(&mut seen, &[message(2, "processing", 2)]);
        assert_eq!(
            told,
            ["00:00:10  retrying   2      to +90  after 2 tries; under way again"],
            "missed between two looks"
        );
        let told = lines(&mut seen, &[message(2, "dead", 4)]);
        assert_eq!(told, ["00:00:09  dead       2      to +90  status 500; 4 tries"]);
        let told = lines(&mut seen, &[message(2, "pending", 4)]);
        assert!(told.is_empty(), "a redrive is no outcome: {told:?}");
    }

    #[test]
    fn what_is_under_way_is_asked_for_in_turn_and_a_gap_is_noticed() {
        let mut seen = Seen::default();
        lines(&mut seen, &[message(1, "retrying", 1), message(2, "sent", 1)]);
        lines(&mut seen, &[message(3, "pending", 0)]);
        assert_eq!(seen.others(&[]), [1, 3], "the one that was not read for longest comes first");
        assert_eq!(seen.others(&[message(3, "pending", 0)]), [1]);
        seen.forget(1);
        assert_eq!(seen.others(&[]), [3]);
        let news: Vec<_> = (100..200).map(|id| message(id, "pending", 0)).collect();
        assert!(!seen.reaches(&news), "a full page of news");
        assert!(seen.reaches(&news[..50]), "all there is");
        assert!(seen.reaches(&[&news[1..], &[message(3, "sent", 1)]].concat()));
    }

    #[test]
    fn what_is_remembered_has_a_bound() {
        let mut seen = Seen::default();
        let many: Vec<_> = (0..KNOWN_MAX as i64 + 7).map(|id| message(id, "pending", 0)).collect();
        lines(&mut seen, &many);
        assert_eq!((seen.known.len(), seen.known.first_key_value().map(|(id, _)| *id)), (KNOWN_MAX, Some(7)));
    }
}
