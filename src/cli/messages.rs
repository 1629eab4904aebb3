//! `ams messages`: what became of them, and changing that.

use std::process::ExitCode;

use clap::{Arg, ArgMatches, Command};
use serde::Deserialize;
use serde_json::{Value, json};

use super::client::query;
use super::filter::{change_many, filter, filter_args, ids_arg, many_args, status_arg};
use super::operator::{Operator, below, read, verb};
use super::print;
use super::screen::{Paint, many, plain, status_tone, table, time};
use super::timeline;
use crate::app::{self, AppError};
use crate::clock::Timestamp;
use crate::message::Status;

/// Messages on a page of the API, at most.
const PAGE: usize = 100;

pub(super) fn command() -> Command {
    let limit = Arg::new("limit").long("limit").value_name("N").default_value("20");
    let limit = limit.value_parser(clap::value_parser!(u32).range(1..=100_000));
    let open = [Status::Pending, Status::Queued, Status::Processing, Status::Retrying];
    let ended = [Status::Dead, Status::Cancelled, Status::Expired];
    verb("messages", "what became of them: list, show, cancel, redrive")
        .subcommand_required(true)
        .arg_required_else_help(true)
        .subcommand(
            Command::new("list")
                .about("the newest messages, by filter")
                .arg(status_arg(Status::ALL, "only those of this status"))
                .args(filter_args())
                .arg(limit.help("how many")),
        )
        .subcommand(
            Command::new("show").about("one message, with its timeline").arg(
                Arg::new("id")
                    .value_name("ID")
                    .required(true)
                    .value_parser(clap::value_parser!(i64))
                    .help("its number"),
            ),
        )
        .subcommand(
            Command::new("cancel")
                .about("make no further try: by number, or by filter")
                .arg(ids_arg())
                .arg(status_arg(open, "those of this status; needed without numbers"))
                .args(filter_args())
                .args(many_args()),
        )
        .subcommand(
            Command::new("redrive")
                .about("send dead, cancelled or expired ones again: by number, or by filter")
                .arg(ids_arg())
                .arg(status_arg(ended, "those of this status; dead when left out"))
                .args(filter_args())
                .args(many_args()),
        )
}

pub(super) async fn run(operator: &Operator, matches: &ArgMatches) -> app::Result<ExitCode> {
    let (verb, matches) = below(matches);
    match verb {
        "list" => list(operator, matches).await,
        "show" => timeline::show(operator, *matches.get_one::<i64>("id").unwrap_or(&0)).await,
        change => self::change(operator, change, matches).await,
    }
}

/// A message, as far as it is shown.
#[derive(Clone, Debug, Deserialize)]
pub(super) struct Message {
    pub(super) id: i64,
    pub(super) status: String,
    pub(super) why: Option<String>,
    pub(super) endpoint: String,
    pub(super) recipient: String,
    pub(super) content: String,
    pub(super) attempts: u32,
    pub(super) created_at: Timestamp,
    pub(super) send_at: Option<Timestamp>,
    pub(super) expires_at: Option<Timestamp>,
    pub(super) due_at: Option<Timestamp>,
    pub(super) finished_at: Option<Timestamp>,
    pub(super) content_type: Option<String>,
    pub(super) headers: Option<Value>,
    pub(super) tags: Option<Value>,
    pub(super) ordering_key: Option<String>,
    pub(super) idempotency_key: Option<String>,
    #[serde(default)]
    pub(super) priority: i64,
}

impl Message {
    /// Whether nothing more happens to it by itself.
    pub(super) fn is_final(&self) -> bool {
        Status::parse(&self.status).is_some_and(Status::is_final)
    }
}

impl Message {
    /// What it waits for or why it ended, with times from `now`; else nothing.
    pub(super) fn summary(&self, now: Timestamp) -> String {
        let why = self.why.as_deref().unwrap_or_default();
        let wait = |at: Option<Timestamp>| at.filter(|at| *at > now).map(|at| time(at.since(now)));
        match (self.status.as_str(), wait(self.due_at), wait(self.send_at)) {
            ("retrying", Some(wait), _) => {
                let next = format!("try {} in {wait}", self.attempts + 1);
                // The API's words for it, of which the time is said above.
                why.split_once("last: ").map_or(next.clone(), |(_, reason)| format!("{reason}; {next}"))
            }
            ("pending", _, Some(wait)) if why.starts_with("due at") => format!("due in {wait}"),
            _ => why.to_owned(),
        }
    }
}

/// A page of the API's list.
#[derive(Debug, Deserialize)]
pub(super) struct Page<T> {
    pub(super) data: Vec<T>,
    pub(super) next_cursor: Option<String>,
}

/// The newest messages of a filter, as many as there are up to `limit`; and where those after them begin.
///
/// # Errors
/// When the API can't be asked.
pub(super) async fn newest(
    operator: &Operator,
    filter: &serde_json::Map<String, Value>,
    limit: usize,
) -> app::Result<Page<Value>> {
    let mut page = Page { data: Vec::new(), next_cursor: None };
    loop {
        let size = (limit - page.data.len()).min(PAGE).to_string();
        let pairs = filter.iter().map(|(name, value)| (name.as_str(), value.as_str()));
        let own = [("limit", Some(size.as_str())), ("cursor", page.next_cursor.as_deref())];
        let answer = operator.client.get(&query("/v1/messages", pairs.chain(own))).await?;
        let next: Page<Value> = read(&answer)?;
        page.data.extend(next.data);
        page.next_cursor = next.next_cursor;
        if page.next_cursor.is_none() || page.data.len() >= limit || operator.stop.is_cancelled() {
            return Ok(page);
        }
    }
}

async fn list(operator: &Operator, matches: &ArgMatches) -> app::Result<ExitCode> {
    let limit = matches.get_one::<u32>("limit").map_or(PAGE, |limit| *limit as usize);
    let now = operator.clock.now();
    let filter = filter(matches, now)?;
    let page = newest(operator, &filter, limit).await?;
    let messages: Vec<Message> = read(&Value::Array(page.data.clone()))?;
    let more = page.next_cursor.is_some();
    let answer = json!({ "data": page.data, "next_cursor": page.next_cursor });
    let none = if filter.is_empty() {
        "No messages yet; `ams send +905551111111 Hello` sends one.\n"
    } else {
        "No message matches; `ams messages list` without a filter shows the newest.\n"
    };
    operator.screen.show(&answer, || match messages.is_empty() {
        true => none.to_owned(),
        false => lines(&messages, now, more, operator.screen.paint),
    })?;
    Ok(ExitCode::SUCCESS)
}

/// A table of messages, and what to do to see more.
pub(super) fn lines(messages: &[Message], now: Timestamp, more: bool, paint: Paint) -> String {
    let row = |message: &Message| {
        vec![
            message.id.to_string(),
            message.status.clone(),
            message.attempts.to_string(),
            time(now.since(message.created_at)),
            plain(&message.endpoint, 20),
            plain(&message.recipient, 24),
            match message.summary(now).as_str() {
                "" => format!("\"{}\"", plain(&message.content, 40)),
                words => plain(words, 70),
            },
        ]
    };
    let rows: Vec<_> = messages.iter().map(row).collect();
    let heads = [">ID", "STATUS", ">TRIES", ">AGE", "ENDPOINT", "RECIPIENT", "WHY, OR CONTENT"];
    let tone = |column: usize, cell: &str| status_tone(cell).filter(|_| column == 1);
    let mut text = table(paint, &heads, &rows, tone);
    if more {
        text += "There are older ones; --limit shows more. `ams messages show ID` tells one's story.\n";
    }
    text
}

/// Cancels or redrives, by number or by filter.
async fn change(operator: &Operator, change: &str, matches: &ArgMatches) -> app::Result<ExitCode> {
    let filter = filter(matches, operator.clock.now())?;
    let ids: Vec<i64> = matches.get_many::<i64>("id").unwrap_or_default().copied().collect();
    if ids.is_empty() {
        if change == "cancel" && !filter.contains_key("status") {
            let next = "give their numbers, or --status pending, queued, processing or retrying";
            return Err(AppError(format!("nothing says which messages to cancel; {next}")));
        }
        return change_many(operator, change, filter, matches).await;
    }
    if !filter.is_empty() || matches.get_flag("all") || matches.get_flag("dry-run") {
        return Err(AppError("give numbers or a filter, not both".to_owned()));
    }
    change_each(operator, change, &ids).await
}

/// Changes one after the other; goes on after one that can't be.
pub(super) async fn change_each(operator: &Operator, change: &str, ids: &[i64]) -> app::Result<ExitCode> {
    let (mut changed, mut failed) = (Vec::new(), 0);
    for id in ids {
        match operator.client.post(&format!("/v1/messages/{id}/{change}"), &Value::Null).await {
            Ok(answer) => {
                let message: Message = read(&answer)?;
                if !operator.screen.json {
                    let status = operator.screen.paint.status(&message.status, 0);
                    print(&format!(
                        "message {id} is {status}{}\n",
                        if change == "redrive" { " again" } else { "" }
                    ))?;
                }
                changed.push(answer);
            }
            // The next one would fare no better.
            Err(failure) if failure.status.is_none() || failure.status == Some(401) => {
                return Err(failure.into());
            }
            Err(failure) => {
                eprintln!("ams: {failure}");
                failed += 1;
            }
        }
    }
    if operator.screen.json {
        print(&format!("{:#}\n", json!({ "data": changed })))?;
    }
    if failed > 0 && ids.len() > 1 {
        eprintln!("ams: {} of {} failed", failed, many(ids.len() as u64, "message"));
    }
    Ok(if failed == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}
