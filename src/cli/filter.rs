//! Which messages a verb is for: by number, or by what they have in common; and changing many of them.

use std::process::ExitCode;
use std::time::Duration;

use clap::{Arg, ArgAction, ArgMatches};
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::operator::{Operator, option, read, text};
use super::screen::many;
use crate::app::{self, AppError};
use crate::clock::Timestamp;
use crate::config;
use crate::message::Status;

/// How often a large change is asked how far it has come.
const LOOK: Duration = Duration::from_millis(500);

/// The flags of a filter, without the status.
pub(super) fn filter_args() -> [Arg; 5] {
    [
        option("endpoint", "NAME", "only those to this endpoint"),
        option("recipient", "RECIPIENT", "only those to this recipient"),
        option("reason", "TEXT", "only those that are dead for this reason, word for word"),
        option(
            "created-after",
            "TIME",
            "only those created then or later: RFC 3339, or 2h for two hours ago",
        ),
        option("created-before", "TIME", "only those created earlier"),
    ]
}

/// The flag of a status, one of `statuses`.
pub(super) fn status_arg(statuses: impl IntoIterator<Item = Status>, help: &'static str) -> Arg {
    let names: Vec<_> = statuses.into_iter().map(Status::as_str).collect();
    option("status", "STATUS", help).value_parser(names)
}

/// The numbers of messages.
pub(super) fn ids_arg() -> Arg {
    Arg::new("id").value_name("ID").num_args(0..).value_parser(clap::value_parser!(i64)).help("their numbers")
}

/// The flags of a change of many.
pub(super) fn many_args() -> [Arg; 2] {
    [
        Arg::new("all").long("all").action(ArgAction::SetTrue).help("every one, without a filter"),
        Arg::new("dry-run").long("dry-run").action(ArgAction::SetTrue).help("only count them"),
    ]
}

/// A moment: RFC 3339, or a duration before (`earlier`) or after now.
///
/// # Errors
/// A sentence that names the flag.
pub(super) fn moment(flag: &str, text: &str, now: Timestamp, earlier: bool) -> app::Result<Timestamp> {
    if let Ok(at) = Timestamp::parse(text) {
        return Ok(at);
    }
    let wrong = || {
        AppError(format!(
            "--{flag} is `{text}`, which is no time; write for example 2030-01-02T09:00:00Z, or 2h for two hours {}",
            if earlier { "ago" } else { "from now" }
        ))
    };
    let wait = config::duration(text).map_err(|_| wrong())?;
    let micros = i64::try_from(wait.as_micros()).map_err(|_| wrong())?;
    let signed = if earlier { -micros } else { micros };
    Ok(Timestamp::from_micros(now.as_micros().saturating_add(signed)))
}

/// What the flags ask for, by the names of the API's filter.
///
/// # Errors
/// When a time can't be read.
pub(super) fn filter(matches: &ArgMatches, now: Timestamp) -> app::Result<Map<String, Value>> {
    let mut filter = Map::new();
    for name in ["status", "endpoint", "recipient", "reason"] {
        // Not every verb has every flag.
        if let Ok(Some(value)) = matches.try_get_one::<String>(name) {
            filter.insert(name.to_owned(), value.as_str().into());
        }
    }
    for (flag, name) in [("created-after", "created_after"), ("created-before", "created_before")] {
        if let Some(value) = text(matches, flag) {
            filter.insert(name.to_owned(), moment(flag, value, now, true)?.to_string().into());
        }
    }
    Ok(filter)
}

/// What a change of many came to so far.
#[derive(Deserialize)]
struct Changed {
    matched: u64,
    #[serde(alias = "redriven", alias = "cancelled")]
    changed: u64,
    #[serde(default)]
    operation: Option<i64>,
    #[serde(default)]
    finished: bool,
    #[serde(default)]
    finished_at: Option<Timestamp>,
}

/// Changes (`redrive` or `cancel`) everything that the filter names, and waits until that is done.
///
/// # Errors
/// When the API refuses, or is away for longer than a call takes.
pub(super) async fn change_many(
    operator: &Operator,
    change: &str,
    filter: Map<String, Value>,
    matches: &ArgMatches,
) -> app::Result<ExitCode> {
    let dry_run = matches.get_flag("dry-run");
    if filter.keys().all(|name| name == "status") && !matches.get_flag("all") && !dry_run {
        return Err(AppError(format!(
            "nothing says which messages to {change}; give their numbers, a filter such as --endpoint, or --all"
        )));
    }
    let body = json!({ "filter": filter, "dry_run": dry_run });
    let mut answer = operator.client.post(&format!("/v1/messages/{change}"), &body).await?;
    let mut seen: Changed = read(&answer)?;
    if let Some(operation) = seen.operation.filter(|_| !seen.finished) {
        let path = format!("/v1/operations/{operation}");
        while seen.finished_at.is_none() && !operator.stop.is_cancelled() {
            operator.screen.progress(&format!("{} so far", many(seen.changed, "message")));
            operator.pause(LOOK).await;
            answer = operator.client.get(&path).await?;
            seen = read(&answer)?;
        }
        operator.screen.progress("");
        if seen.finished_at.is_none() {
            let so_far = many(seen.changed, "message");
            return Err(AppError(format!(
                "{so_far} so far; the API goes on by itself, as its operation {operation}"
            )));
        }
    }
    operator.screen.show(&answer, || changed_words(change, &seen, dry_run))?;
    Ok(ExitCode::SUCCESS)
}

fn changed_words(change: &str, seen: &Changed, dry_run: bool) -> String {
    let done = if change == "cancel" { "cancelled" } else { "pending again" };
    match (seen.matched, dry_run) {
        (0, _) => "No message matches; `ams messages list` shows what there is.\n".to_owned(),
        (matched, true) => {
            let most = if matched >= 10_000 { " or more" } else { "" };
            format!("{}{most} would be {done}; without --dry-run they are.\n", many(matched, "message"))
        }
        (matched, false) if seen.changed < matched => {
            let others = matched - seen.changed;
            format!("{} {done}; {others} had moved on meanwhile.\n", many(seen.changed, "message"))
        }
        _ => format!("{} {done}.\n", many(seen.changed, "message")),
    }
}

#[cfg(test)]
mod tests {
    use clap::Command;

    use super::*;

    #[test]
    fn flags_become_a_filter_with_times_before_now() {
        let command = Command::new("list").args(filter_args()).arg(status_arg(Status::ALL, ""));
        let flags = ["list", "--status", "dead", "--reason", "status 500", "--created-after", "1h"];
        let matches = command.try_get_matches_from(flags).unwrap();
        let now = Timestamp::parse("2030-01-01T09:00:00Z").unwrap();
        let expected =
            json!({"status": "dead", "reason": "status 500", "created_after": "2030-01-01T08:00:00Z"});
        assert_eq!(Value::Object(filter(&matches, now).unwrap()), expected);
        let error = moment("created-after", "yesterday", now, true).unwrap_err().to_string();
        assert!(
            error.contains("--created-after is `yesterday`") && error.contains("two hours ago"),
            "{error}"
        );
    }

    #[test]
    fn a_change_of_many_says_what_it_came_to() {
        let summary = |matched, changed, change, dry_run| {
            let seen = Changed { matched, changed, operation: None, finished: true, finished_at: None };
            changed_words(change, &seen, dry_run)
        };
        assert_eq!(
            summary(3, 0, "redrive", true),
            "3 messages would be pending again; without --dry-run they are.\n"
        );
        assert!(summary(10_000, 0, "cancel", true).starts_with("10,000 messages or more would be cancelled"));
        assert_eq!(summary(1, 1, "redrive", false), "1 message pending again.\n");
        assert_eq!(summary(3, 2, "cancel", false), "2 messages cancelled; 1 had moved on meanwhile.\n");
        assert!(summary(0, 0, "cancel", false).starts_with("No message matches"));
    }
}
