//! `ams send`: one message, and if wanted what became of it.

use std::io::Read;
use std::process::ExitCode;
use std::time::Duration;

use clap::{Arg, ArgAction, ArgMatches, Command};
use serde_json::{Map, Value};

use super::filter::moment;
use super::messages::Message;
use super::operator::{Operator, option, read, text, verb};
use super::screen::{Paint, plain, time};
use crate::app::{self, AppError};
use crate::clock::Timestamp;
use crate::config;

/// How often a message that is waited for is looked at.
const LOOK: Duration = Duration::from_millis(200);

/// Bytes of standard input that are read: one more than the API takes, so that it says so itself.
const CONTENT_MAX: u64 = (1 << 20) + 1;

pub(super) fn command() -> Command {
    let pairs =
        |name: &'static str, help: &'static str| option(name, "NAME=VALUE", help).action(ArgAction::Append);
    let wait = Arg::new("wait").long("wait").value_name("DURATION").num_args(0..=1).require_equals(true);
    verb("send", "one message; --wait to see what becomes of it")
        .arg(
            Arg::new("recipient")
                .value_name("RECIPIENT")
                .required(true)
                .help("to whom, such as +905551111111"),
        )
        .arg(
            Arg::new("content")
                .value_name("CONTENT")
                .required(true)
                .help("what; - reads it from standard input"),
        )
        .arg(option("endpoint", "NAME", "the endpoint it goes to; `default` when left out"))
        .arg(option("send-at", "TIME", "not before then: RFC 3339, or 10m for ten minutes from now"))
        .arg(option("expires-at", "TIME", "not after then"))
        .arg(option("idempotency-key", "KEY", "the same key and message again is the first message"))
        .arg(option("ordering-key", "KEY", "messages of one key belong together"))
        .arg(
            option("priority", "N", "from -100 to 100")
                .value_parser(clap::value_parser!(i16))
                .allow_negative_numbers(true),
        )
        .arg(option("content-type", "TYPE", "send the content itself as the body, with this type"))
        .arg(pairs("header", "a further request header; may be repeated"))
        .arg(pairs("tag", "a tag, for finding it again; may be repeated"))
        .arg(wait.default_missing_value("").help("until it is final, or so long; exit 1 unless it is sent"))
}

pub(super) async fn run(operator: &Operator, matches: &ArgMatches) -> app::Result<ExitCode> {
    let body = body(matches, operator.clock.now())?;
    let within = match text(matches, "wait") {
        None => None,
        Some("") => Some(Duration::MAX),
        Some(text) => {
            let wrong = |why| AppError(format!("--wait is `{text}`, which {why}"));
            Some(config::duration(text).map_err(wrong)?)
        }
    };
    let answer = operator.client.post("/v1/messages", &body.into()).await?;
    let message: Message = read(&answer)?;
    match within {
        Some(within) => wait(operator, answer, within).await,
        None => {
            let paint = operator.screen.paint;
            operator.screen.show(&answer, || {
                let next = format!("`ams messages show {}` tells what becomes of it", message.id);
                format!("{}; {next}.\n", line(&message, operator.clock.now(), paint))
            })?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// Looks until the message is final.
async fn wait(operator: &Operator, mut answer: Value, within: Duration) -> app::Result<ExitCode> {
    let watch = operator.clock.stopwatch();
    loop {
        let message: Message = read(&answer)?;
        let paint = operator.screen.paint;
        if message.is_final() {
            operator.screen.progress("");
            operator
                .screen
                .show(&answer, || format!("{}.\n", line(&message, operator.clock.now(), paint)))?;
            let sent = message.status == "sent";
            return Ok(if sent { ExitCode::SUCCESS } else { ExitCode::FAILURE });
        }
        if operator.stop.is_cancelled() || watch.elapsed() >= within {
            operator.screen.progress("");
            let next = format!("`ams messages show {}` tells how it goes on", message.id);
            return Err(AppError(format!(
                "{}, not final yet; {next}",
                line(&message, operator.clock.now(), Paint::default())
            )));
        }
        operator.screen.progress(&line(&message, operator.clock.now(), paint));
        operator.pause(LOOK).await;
        match operator.client.get(&format!("/v1/messages/{}", message.id)).await {
            Ok(next) => answer = next,
            // It is stored: an API that is away for a while changes nothing.
            Err(failure) if failure.passes() => operator.screen.progress(&failure.sentence),
            Err(failure) => return Err(failure.into()),
        }
    }
}

/// How a message stands, without a full stop.
fn line(message: &Message, now: Timestamp, paint: Paint) -> String {
    let status = paint.status(&message.status, 0);
    let why = match message.summary(now).as_str() {
        "" => String::new(),
        words => format!(", {}", plain(words, 200)),
    };
    let tries = match (message.status.as_str(), message.finished_at) {
        ("sent" | "dead", Some(at)) => {
            let tries = if message.attempts == 1 { "try" } else { "tries" };
            format!(" after {} {tries}, {}", message.attempts, time(at.since(message.created_at)))
        }
        _ => String::new(),
    };
    format!("message {} is {status}{tries}{why}", message.id)
}

/// The message as the API wants it.
fn body(matches: &ArgMatches, now: Timestamp) -> app::Result<Map<String, Value>> {
    let mut body = Map::new();
    let texts = [
        ("recipient", "recipient"),
        ("endpoint", "endpoint"),
        ("idempotency-key", "idempotency_key"),
        ("ordering-key", "ordering_key"),
        ("content-type", "content_type"),
    ];
    for (flag, name) in texts {
        if let Some(value) = text(matches, flag) {
            body.insert(name.to_owned(), value.into());
        }
    }
    let content = match text(matches, "content") {
        Some("-") => standard_input()?,
        content => content.unwrap_or_default().to_owned(),
    };
    body.insert("content".to_owned(), content.into());
    for (flag, name) in [("send-at", "send_at"), ("expires-at", "expires_at")] {
        if let Some(value) = text(matches, flag) {
            body.insert(name.to_owned(), moment(flag, value, now, false)?.to_string().into());
        }
    }
    if let Some(priority) = matches.get_one::<i16>("priority") {
        body.insert("priority".to_owned(), (*priority).into());
    }
    for (flag, name) in [("header", "headers"), ("tag", "tags")] {
        let given: Vec<&String> = matches.get_many(flag).unwrap_or_default().collect();
        if !given.is_empty() {
            let pairs: app::Result<Map<_, _>> = given.into_iter().map(|text| pair(flag, text)).collect();
            body.insert(name.to_owned(), Value::Object(pairs?));
        }
    }
    Ok(body)
}

fn pair(flag: &str, text: &str) -> app::Result<(String, Value)> {
    let wrong = || AppError(format!("--{flag} is `{text}`, which is no pair; write NAME=VALUE"));
    let (name, value) = text.split_once('=').filter(|(name, _)| !name.is_empty()).ok_or_else(wrong)?;
    Ok((name.to_owned(), value.into()))
}

/// All of standard input, without the line's end that a shell adds.
fn standard_input() -> app::Result<String> {
    let mut text = String::new();
    let read = std::io::stdin().lock().take(CONTENT_MAX).read_to_string(&mut text);
    read.map_err(|error| AppError(format!("standard input can't be read as UTF-8 text: {error}")))?;
    if text.ends_with('\n') {
        text.pop();
    }
    Ok(text)
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn body_of(arguments: &[&str]) -> app::Result<Map<String, Value>> {
        let matches = command().try_get_matches_from([&["send"], arguments].concat()).unwrap();
        body(&matches, Timestamp::EPOCH)
    }

    #[test]
    fn flags_become_the_fields_of_a_message() {
        let flags = [
            "+90",
            "Hello",
            "--endpoint",
            "sms",
            "--send-at",
            "10m",
            "--expires-at",
            "1970-01-02T00:00:00Z",
            "--header",
            "x-a=b=c",
            "--tag",
            "campaign=spring",
            "--tag",
            "n=1",
            "--priority",
            "-5",
            "--idempotency-key",
            "k",
            "--content-type",
            "text/plain",
            "--ordering-key",
            "o",
        ];
        let expected = json!({
            "recipient": "+90", "content": "Hello", "endpoint": "sms", "send_at": "1970-01-01T00:10:00Z",
            "expires_at": "1970-01-02T00:00:00Z", "headers": {"x-a": "b=c"},
            "tags": {"campaign": "spring", "n": "1"}, "priority": -5, "idempotency_key": "k",
            "content_type": "text/plain", "ordering_key": "o",
        });
        assert_eq!(Value::Object(body_of(&flags).unwrap()), expected);
    }

    #[test]
    fn what_can_not_be_read_is_named_with_its_mend() {
        for (flags, named) in [
            (["--send-at", "soon"], "--send-at is `soon`, which is no time; write for example 2030"),
            (["--tag", "x"], "--tag is `x`, which is no pair; write NAME=VALUE"),
            (["--header", "=x"], "--header is `=x`"),
        ] {
            let error = body_of(&[&["+90", "Hello"], flags.as_slice()].concat()).unwrap_err();
            assert!(error.to_string().contains(named), "{error}");
        }
    }
}
