//! `ams endpoints`: where messages go, and how.

use std::process::ExitCode;
use std::time::Duration;

use clap::{Arg, ArgMatches, Command};
use hyper::Method;
use serde::Deserialize;
use serde_json::{Map, Value, json};

use super::client::segment;
use super::operator::{Operator, below, option, read, text, verb};
use super::screen::{Paint, Tone, plain, table};
use crate::app::{self, AppError};
use crate::config;

pub(super) fn command() -> Command {
    let named = |name: &'static str, about: &'static str| {
        Command::new(name)
            .about(about)
            .arg(Arg::new("name").value_name("NAME").required(true).help("its name"))
    };
    let set = |verb: Command| verb.args(settings());
    verb("endpoints", "where messages go: list, show, create, change, disable, enable, delete")
        .subcommand_required(true)
        .arg_required_else_help(true)
        .subcommand(Command::new("list").about("all endpoints"))
        .subcommand(named("show", "one endpoint"))
        .subcommand(set(named("create", "a new endpoint")
            .arg(Arg::new("url").value_name("URL").required(true).help("where requests go"))))
        .subcommand(set(named("change", "change what is named; the rest stays").arg(option(
            "url",
            "URL",
            "where requests go",
        ))))
        .subcommand(named("disable", "hold its messages from now on"))
        .subcommand(named("enable", "let its messages go again"))
        .subcommand(named("delete", "remove an endpoint that no message names"))
}

fn settings() -> [Arg; 5] {
    [
        option("timeout", "DURATION", "one deadline over connect, head and body of a try, such as 15s"),
        option("in-flight-max", "N", "tries in flight at once, in each consumer process")
            .value_parser(clap::value_parser!(u32)),
        option(
            "rate",
            "COUNT/DURATION",
            "attempts at it in any such time, over all consumers together, such as 100/1s; `none` for none",
        ),
        option(
            "final-statuses",
            "LIST",
            "statuses after which a message is dead at once, such as 410,422; `none` for none",
        ),
        option("secret", "SECRET", "whsec_… to sign requests with; `none` to sign no longer"),
    ]
}

pub(super) async fn run(operator: &Operator, matches: &ArgMatches) -> app::Result<ExitCode> {
    let (verb, matches) = below(matches);
    let name = if verb == "list" { "" } else { text(matches, "name").unwrap_or_default() };
    let path = format!("/v1/endpoints/{}", segment(name));
    let (client, screen) = (&operator.client, operator.screen);
    let answer = match verb {
        "list" => {
            let answer = client.get("/v1/endpoints").await?;
            let all: List = read(&answer)?;
            screen.show(&answer, || list(&all.data, screen.paint))?;
            return Ok(ExitCode::SUCCESS);
        }
        "delete" => {
            client.call(Method::DELETE, &path, None).await?;
            screen.show(&json!({ "deleted": name }), || format!("The endpoint {name} is gone.\n"))?;
            return Ok(ExitCode::SUCCESS);
        }
        "show" => client.get(&path).await?,
        "create" => {
            let mut body = changes(matches)?;
            body.insert("name".to_owned(), name.into());
            client.post("/v1/endpoints", &body.into()).await?
        }
        "change" => {
            let body = changes(matches)?;
            if body.is_empty() {
                return Err(AppError(format!(
                    "nothing to change; name what shall be, such as --url or --timeout: `ams endpoints change {name} --help`"
                )));
            }
            client.call(Method::PATCH, &path, Some(&body.into())).await?
        }
        _ => client.call(Method::PATCH, &path, Some(&json!({ "enabled": verb == "enable" }))).await?,
    };
    let endpoint: Endpoint = read(&answer)?;
    screen.show(&answer, || one(&endpoint, screen.paint))?;
    Ok(ExitCode::SUCCESS)
}

/// What of an endpoint the flags set, as the API wants it.
fn changes(matches: &ArgMatches) -> app::Result<Map<String, Value>> {
    let mut body = Map::new();
    if let Some(url) = text(matches, "url") {
        body.insert("url".to_owned(), url.into());
    }
    if let Some(text) = text(matches, "timeout") {
        let time =
            config::duration(text).map_err(|why| AppError(format!("--timeout is `{text}`, which {why}")))?;
        body.insert("timeout_ms".to_owned(), u64::try_from(time.as_millis()).unwrap_or(u64::MAX).into());
    }
    if let Some(most) = matches.get_one::<u32>("in-flight-max") {
        body.insert("in_flight_max".to_owned(), (*most).into());
    }
    if let Some(text) = text(matches, "rate") {
        body.extend(rate(text)?);
    }
    if let Some(list) = text(matches, "final-statuses") {
        body.insert("final_statuses".to_owned(), statuses(list)?.into());
    }
    if let Some(secret) = text(matches, "secret") {
        body.insert("secret".to_owned(), if secret == "none" { "" } else { secret }.into());
    }
    Ok(body)
}

/// A rate, as the API wants it.
fn rate(text: &str) -> app::Result<Map<String, Value>> {
    if text == "none" {
        return Ok([("rate_count".to_owned(), 0.into())].into_iter().collect());
    }
    let parts = text.split_once('/').and_then(|(count, time)| {
        let count = count.trim().parse::<u32>().ok().filter(|count| *count > 0)?;
        Some((count, config::duration(time.trim()).ok()?))
    });
    let (count, time) = parts.ok_or_else(|| {
        AppError(format!("--rate is `{text}`, which is no rate; write for example 100/1s, or none"))
    })?;
    let ms = u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
    let fields = [("rate_count".to_owned(), count.into()), ("rate_interval_ms".to_owned(), ms.into())];
    Ok(fields.into_iter().collect())
}

fn statuses(list: &str) -> app::Result<Vec<u16>> {
    if list == "none" {
        return Ok(Vec::new());
    }
    let numbers: Result<_, _> = list.split(',').map(|status| status.trim().parse()).collect();
    numbers.map_err(|_| {
        AppError(format!(
            "--final-statuses is `{list}`, which is no list of statuses; write for example 410,422"
        ))
    })
}

#[derive(Debug, Deserialize)]
struct List {
    data: Vec<Endpoint>,
}

#[derive(Debug, Deserialize)]
struct Endpoint {
    name: String,
    url: String,
    timeout_ms: u64,
    in_flight_max: u32,
    rate_count: Option<u64>,
    rate_interval_ms: u64,
    final_statuses: Vec<u16>,
    enabled: bool,
    signed: bool,
    breaker: Option<Breaker>,
}

impl Endpoint {
    fn state(&self) -> &'static str {
        match &self.breaker {
            _ if !self.enabled => "disabled",
            Some(breaker) if breaker.cause == "retry_after" => "paused",
            Some(_) => "failing",
            None => "enabled",
        }
    }

    fn signs(&self) -> &'static str {
        if self.signed { "signed" } else { "unsigned" }
    }

    fn timeout(&self) -> String {
        humantime::format_duration(Duration::from_millis(self.timeout_ms)).to_string()
    }

    fn rate(&self) -> String {
        match self.rate_count {
            None => "none: as many attempts as it takes".to_owned(),
            Some(count) => {
                let interval = humantime::format_duration(Duration::from_millis(self.rate_interval_ms));
                format!("at most {count} attempts in any {interval}, over all consumers")
            }
        }
    }

    fn finals(&self) -> String {
        let texts: Vec<_> = self.final_statuses.iter().map(u16::to_string).collect();
        if texts.is_empty() { "none".to_owned() } else { texts.join(", ") }
    }
}

/// A circuit breaker that is not closed, as the API tells of it.
#[derive(Debug, Deserialize)]
pub(super) struct Breaker {
    cause: String,
    /// What its endpoint has done, and what comes next.
    pub(super) detail: String,
}

fn tone(state: &str) -> Option<Tone> {
    match state {
        "enabled" => Some(Tone::Good),
        "disabled" | "paused" => Some(Tone::Wait),
        "failing" => Some(Tone::Bad),
        _ => None,
    }
}

fn list(endpoints: &[Endpoint], paint: Paint) -> String {
    let row = |endpoint: &Endpoint| {
        vec![
            endpoint.name.clone(),
            endpoint.state().to_owned(),
            endpoint.timeout(),
            endpoint.in_flight_max.to_string(),
            endpoint.signs().to_owned(),
            plain(&endpoint.url, 100),
        ]
    };
    let rows: Vec<_> = endpoints.iter().map(row).collect();
    let heads = ["NAME", "STATE", "TIMEOUT", ">IN FLIGHT", "REQUESTS", "URL"];
    table(paint, &heads, &rows, |column, cell| tone(cell).filter(|_| column == 1))
}

fn one(endpoint: &Endpoint, paint: Paint) -> String {
    let state = tone(endpoint.state()).map_or(String::new(), |tone| paint.tone(tone, endpoint.state()));
    let held = match &endpoint.breaker {
        _ if !endpoint.enabled => {
            format!(": its messages are held until `ams endpoints enable {}`", endpoint.name)
        }
        Some(breaker) => {
            let detail = plain(&breaker.detail, 1_000);
            format!(": {detail}; a change of its settings lets its messages go at once")
        }
        None => String::new(),
    };
    let rows = [
        ("endpoint", endpoint.name.clone()),
        ("state", format!("{state}{held}")),
        ("url", plain(&endpoint.url, 1_000)),
        ("timeout", format!("{} over connect, head and body of a try", endpoint.timeout())),
        ("in flight", format!("{} at once, in each consumer process", endpoint.in_flight_max)),
        ("rate", endpoint.rate()),
        ("final", format!("{} (statuses after which a message is dead at once)", endpoint.finals())),
        ("requests", endpoint.signs().to_owned()),
    ];
    rows.iter()
        .map(|(name, words)| format!("{} {words}\n", paint.tone(Tone::Faint, &format!("{name:<9}"))))
        .collect()
}
