//! `ams status`: the whole system at a glance, and what needs a hand.

use std::collections::BTreeMap;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Arg, ArgMatches, Command};
use serde::Deserialize;
use serde_json::Value;

use super::client::Failure;
use super::endpoints::Breaker;
use super::operator::{Operator, below, read, verb};
use super::screen::{Paint, Tone, grouped, many, plain, time};
use super::write;
use crate::app::{self, AppError};
use crate::clock::Timestamp;
use crate::message::Status;

/// A due message that waits for longer is not on its way as it should be.
const LATE: f64 = 30.0;

/// Failing endpoints that are named one by one.
const BREAKERS_SHOWN: usize = 5;

pub(super) fn command() -> Command {
    let watch = Arg::new("watch").long("watch").value_name("SECONDS").num_args(0..=1).require_equals(true);
    let watch = watch.default_missing_value("2").value_parser(clap::value_parser!(u64).range(1..=3600));
    verb("status", "the system at a glance, and what needs a hand")
        .arg(watch.help("look again every so many seconds, until Ctrl-C; 2 when left out"))
}

pub(super) async fn run(operator: &Operator, matches: &ArgMatches) -> app::Result<ExitCode> {
    let Some(gap) = matches.get_one::<u64>("watch").copied().map(Duration::from_secs) else {
        let answer = match operator.client.get("/v1/status").await {
            Ok(answer) => answer,
            Err(failure) => return Err(AppError(closer(operator, failure).await)),
        };
        let seen: Seen = read(&answer)?;
        let now = operator.clock.now();
        operator.screen.show(&answer, || screen(&seen, operator.client.url(), now, operator.screen.paint))?;
        return Ok(ExitCode::SUCCESS);
    };
    watch(operator, gap).await
}

/// Looks until somebody stops it or nobody reads any more; an API that is away is waited for.
async fn watch(operator: &Operator, gap: Duration) -> app::Result<ExitCode> {
    while !operator.stop.is_cancelled() {
        let text = match operator.client.get("/v1/status").await {
            Ok(answer) if operator.screen.json => format!("{answer}\n"),
            Ok(answer) => {
                let now = operator.clock.now();
                screen(&read::<Seen>(&answer)?, operator.client.url(), now, operator.screen.paint)
            }
            Err(failure) if failure.passes() => format!(
                "ams: {}
",
                closer(operator, failure).await
            ),
            Err(failure) => return Err(failure.into()),
        };
        let text = match (operator.screen.terminal, operator.screen.json) {
            (_, true) => text,
            // The cursor goes home and what was there goes away.
            (true, false) => format!("\x1b[H\x1b[2J{text}\nevery {}; Ctrl-C ends\n", time(gap)),
            (false, false) => format!("{text}\n"),
        };
        if !write(&text)? {
            break;
        }
        operator.pause(gap).await;
    }
    Ok(ExitCode::SUCCESS)
}

/// An API that has no store can't tell how everything is, but which part is away.
async fn closer(operator: &Operator, failure: Failure) -> String {
    #[derive(Deserialize)]
    struct Ready {
        parts: BTreeMap<String, Part>,
    }
    let answer = match failure.status {
        Some(503) => operator.client.get_any("/readyz").await,
        _ => return failure.sentence,
    };
    let ready = answer.ok().and_then(|answer| Ready::deserialize(answer).ok());
    let away = ready.into_iter().flat_map(|ready| ready.parts).filter(|(_, part)| !part.up);
    let away: Vec<_> = away.map(|(name, part)| part_away(&name, &part)).collect();
    if away.is_empty() { failure.sentence } else { away.join("; ") }
}

fn part_away(name: &str, part: &Part) -> String {
    let why = plain(part.error.as_deref().unwrap_or("it does not answer"), 200);
    format!("the {name} ({}) is away: {why}; `ams doctor` looks closer", part.kind)
}

/// What of the API's answer is shown.
#[derive(Debug, Deserialize)]
struct Seen {
    version: String,
    services: Vec<Service>,
    counts: BTreeMap<String, Count>,
    oldest_due_age_s: Option<f64>,
    lag: BTreeMap<String, i64>,
    producer: Producer,
    parts: BTreeMap<String, Part>,
    /// An older API does not tell them.
    #[serde(default)]
    shortages: Vec<Shortage>,
    #[serde(default)]
    breakers: BTreeMap<String, Breaker>,
}

/// What the API's process is short of.
#[derive(Debug, Deserialize)]
struct Shortage {
    of: String,
    why: String,
}

#[derive(Debug, Deserialize)]
struct Service {
    service: String,
    host: String,
    version: String,
    seen_at: Timestamp,
    alive: bool,
}

#[derive(Debug, Deserialize)]
struct Count {
    count: u64,
    more: bool,
}

#[derive(Debug, Deserialize)]
pub(super) struct Producer {
    state: String,
    active: bool,
    pacing: Option<Pacing>,
}

#[derive(Debug, Deserialize)]
struct Pacing {
    batch_count: u64,
    interval_s: f64,
}

#[derive(Debug, Deserialize)]
struct Part {
    kind: String,
    up: bool,
    latency_ms: f64,
    error: Option<String>,
}

fn screen(seen: &Seen, url: &str, now: Timestamp, paint: Paint) -> String {
    let troubles = troubles(seen, now);
    let verdict = match troubles.len() as u64 {
        0 => paint.tone(Tone::Good, "all is well"),
        n => paint.tone(Tone::Bad, &format!("{} below", many(n, "trouble"))),
    };
    let mut text =
        format!("{} at {url}: {verdict}\n\n", paint.tone(Tone::Strong, &format!("AMS {}", seen.version)));
    let mut row = |name: &str, words: &str| {
        text += &format!("{} {words}\n", paint.tone(Tone::Faint, &format!("{name:<9}")));
    };
    row("messages", &counts(seen, paint));
    row("waiting", &waiting(seen));
    row("producer", &producer(&seen.producer));
    row(
        "lanes",
        &or_none(
            seen.lag.iter().map(|(lane, lag)| format!("{lane} {} tickets", grouped(lag.unsigned_abs()))),
        ),
    );
    let part = |(name, part): (&String, &Part)| match part.up {
        true => format!("{name} {} {}", part.kind, paint.tone(Tone::Good, &latency(part.latency_ms))),
        false => format!("{name} {} {}", part.kind, paint.tone(Tone::Bad, "away")),
    };
    row("parts", &or_none(seen.parts.iter().map(part)));
    row("services", &services(seen));
    for trouble in &troubles {
        text += &format!("\n{} {trouble}", paint.tone(Tone::Bad, "!"));
    }
    if !troubles.is_empty() {
        text.push('\n');
    }
    if seen.counts.get("dead").is_some_and(|dead| dead.count > 0) {
        text += &format!("\n{}\n", paint.tone(Tone::Faint, "Why messages are dead: `ams dlq list`"));
    }
    text
}

fn or_none(words: impl Iterator<Item = String>) -> String {
    let words: Vec<_> = words.collect();
    if words.is_empty() { "none".to_owned() } else { words.join(" · ") }
}

/// How many messages have each status, in the order of their lives.
fn counts(seen: &Seen, paint: Paint) -> String {
    let known = Status::ALL.iter().map(|status| status.to_string());
    let count = |status: String| {
        let Count { count, more } = seen.counts.get(&status)?;
        let more = if *more { "+" } else { "" };
        (*count > 0).then(|| format!("{}{more} {}", grouped(*count), paint.status(&status, 0)))
    };
    let counted: Vec<_> = known.filter_map(count).collect();
    if counted.is_empty() {
        return "none yet; `ams send +905551111111 Hello` sends one".to_owned();
    }
    counted.join(" · ")
}

fn waiting(seen: &Seen) -> String {
    match seen.oldest_due_age_s {
        None => "nothing is due".to_owned(),
        Some(age) => {
            format!("the oldest that is due waits for {}", time(Duration::from_secs_f64(age.max(0.0))))
        }
    }
}

/// What the producers do, in words.
pub(super) fn producer(producer: &Producer) -> String {
    let state = if producer.active || producer.state == "paused" {
        producer.state.as_str()
    } else {
        "none is running"
    };
    match &producer.pacing {
        None => format!("{state}; no pacing"),
        Some(Pacing { batch_count, interval_s }) => format!(
            "{state}; at most {} in {}",
            many(*batch_count, "first try").replace("trys", "tries"),
            time(Duration::from_secs_f64(interval_s.max(0.0)))
        ),
    }
}

fn latency(ms: f64) -> String {
    if ms < 10.0 { format!("{ms:.1} ms") } else { format!("{ms:.0} ms") }
}

/// The living, by what they run.
fn services(seen: &Seen) -> String {
    let mut living: BTreeMap<(&str, &str), u64> = BTreeMap::new();
    for service in seen.services.iter().filter(|service| service.alive) {
        *living.entry((&service.service, &service.version)).or_default() += 1;
    }
    or_none(living.iter().map(|((service, version), count)| match count {
        1 => format!("{service} {version}"),
        n => format!("{n} × {service} {version}"),
    }))
}

/// What needs a hand, each with what to do.
fn troubles(seen: &Seen, now: Timestamp) -> Vec<String> {
    let mut troubles = Vec::new();
    for (name, part) in seen.parts.iter().filter(|(_, part)| !part.up) {
        troubles.push(part_away(name, part));
    }
    for Shortage { of, why } in &seen.shortages {
        troubles.push(format!("connections wait for {}: {}", plain(of, 20), plain(why, 300)));
    }
    for breaker in seen.breakers.values().take(BREAKERS_SHOWN) {
        troubles.push(format!("{}; its messages are held", plain(&breaker.detail, 500)));
    }
    if let Some(more) = seen.breakers.len().checked_sub(BREAKERS_SHOWN).filter(|more| *more > 0) {
        troubles.push(format!("{more} more endpoints are like that; `ams endpoints list` shows them"));
    }
    if seen.producer.state == "paused" {
        troubles.push("the producers are paused; `ams producer resume` lets them go on".to_owned());
    } else if !seen.producer.active {
        troubles.push(
            "no producer is running; start one with `ams producer`, or everything with `ams up`".to_owned(),
        );
    }
    for (service, command) in [("consumer", "ams consumer"), ("retry-consumer", "ams retry-consumer")] {
        let runs = |one: &Service| one.alive && (one.service == service || one.service == "up");
        if !seen.services.iter().any(runs) {
            troubles.push(format!("no {service} is running; start one with `{command}`"));
        }
    }
    for lost in seen.services.iter().filter(|service| !service.alive) {
        let (service, host) = (&lost.service, plain(&lost.host, 60));
        let ago = time(now.since(lost.seen_at));
        troubles.push(format!(
            "`{service}` on {host} has not been seen for {ago}; look at its log, or start it again"
        ));
    }
    let late = seen.oldest_due_age_s.filter(|age| *age > LATE && seen.producer.state != "paused");
    if let Some(age) = late {
        let age = time(Duration::from_secs_f64(age));
        troubles.push(format!(
            "a message has been due for {age}; `ams messages list --status pending` shows such"
        ));
    }
    troubles
}

/// `ams producer pause` and `resume`.
pub(super) async fn control(operator: &Operator, matches: &ArgMatches) -> app::Result<ExitCode> {
    let (change, _) = below(matches);
    let answer = operator.client.post(&format!("/v1/producer/{change}"), &Value::Null).await?;
    let now: Producer = read(&answer)?;
    operator.screen.show(&answer, || match change {
        "pause" => {
            "The producers are paused: no further try starts. `ams producer resume` lets them go on.\n"
                .to_owned()
        }
        _ => format!("The producers go on: {}.\n", producer(&now)),
    })?;
    Ok(ExitCode::SUCCESS)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const AT: &str = "2030-01-01T09:00:00Z";

    fn well() -> Value {
        json!({
            "version": "0.1.0",
            "services": [{"service": "up", "host": "h", "version": "0.1.0", "seen_at": AT, "alive": true}],
            "counts": {"sent": {"count": 10_000, "more": true}, "pending": {"count": 2, "more": false},
                       "dead": {"count": 0, "more": false}},
            "oldest_due_age_s": 0.2, "lag": {"messages": 12}, "producer": {"state": "running", "active": true, "pacing": null},
            "parts": {"store": {"kind": "sqlite", "up": true, "latency_ms": 0.12, "error": null}},
        })
    }

    fn text(answer: &Value) -> String {
        let now = Timestamp::parse("2030-01-01T09:01:10Z").unwrap();
        screen(&read(answer).unwrap(), "http://x", now, Paint::default())
    }

    #[test]
    fn a_healthy_system_is_seen_at_a_glance() {
        let expected = "\
AMS 0.1.0 at http://x: all is well

messages  2 pending · 10,000+ sent
waiting   the oldest that is due waits for 200 ms
producer  running; no pacing
lanes     messages 12 tickets
parts     store sqlite 0.1 ms
services  up 0.1.0
";
        assert_eq!(text(&well()), expected);
    }

    #[test]
    fn every_trouble_is_told_with_what_to_do() {
        let mut answer = well();
        answer["parts"]["store"]["up"] = json!(false);
        answer["parts"]["store"]["error"] = json!("no answer within 1s");
        answer["producer"] =
            json!({"state": "running", "active": false, "pacing": {"batch_count": 100, "interval_s": 1.0}});
        answer["services"][0]["alive"] = json!(false);
        answer["oldest_due_age_s"] = json!(90.0);
        answer["counts"]["dead"] = json!({"count": 3, "more": false});
        let failing = |i| {
            let name = format!("sms-{i}");
            let breaker =
                json!({"cause": "failing", "detail": format!("endpoint {name} has failed for long")});
            (name, breaker)
        };
        answer["breakers"] = (1..=7).map(failing).collect();
        answer["shortages"] = json!([{"of": "ports", "why": "none is left; widen the range", "since": AT}]);
        let text = text(&answer);
        for part in [
            "13 troubles below",
            "! endpoint sms-5 has failed for long; its messages are held",
            "! 2 more endpoints are like that; `ams endpoints list` shows them",
            "! connections wait for ports: none is left; widen the range",
            "! the store (sqlite) is away: no answer within 1s; `ams doctor` looks closer",
            "! no producer is running; start one with `ams producer`, or everything with `ams up`",
            "! no consumer is running; start one with `ams consumer`",
            "! `up` on h has not been seen for 1 min",
            "! a message has been due for 1 min",
            "producer  none is running; at most 100 first tries in 1.0 s",
            "`ams dlq list`",
        ] {
            assert!(text.contains(part), "{part}\n{text}");
        }
    }

    #[test]
    fn paused_producers_and_an_empty_store_say_how_to_go_on() {
        let mut answer = well();
        answer["producer"]["state"] = json!("paused");
        answer["counts"] = json!({});
        let text = text(&answer);
        assert!(text.contains("1 trouble below") && text.contains("`ams producer resume`"), "{text}");
        assert!(text.contains("none yet; `ams send +905551111111 Hello` sends one"), "{text}");
    }
}
