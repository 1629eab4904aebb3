//! `ams doctor`: looks at everything that AMS stands on, and says what is wrong and how to mend it.
//!
//! Looks only: it makes no store, no topic, no table, and sends no message.

mod judge;

use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use clap::{ArgMatches, Command};
use futures_util::{StreamExt, stream};
use serde_json::{Value, json};
use uuid::Uuid;

use self::judge::{Finding, State, fault, ok, warning};
use super::client::Client;
use super::screen::{Paint, Screen, Tone, many, plain};
use super::{json_arg, setting_arg};
use crate::app;
use crate::clock::Clock;
use crate::config::{CacheConfig, Config, QueueConfig, Raw, Role, SETTINGS, StoreConfig};
use crate::delivery::{Delivery, DeliveryOptions};
use crate::queue::furthest;
use crate::redact;
use crate::service::Snapshot;
use crate::store::{Endpoint, Store, StoreError};
use crate::telemetry;

/// How long each part is waited for.
const ANSWER: Duration = Duration::from_secs(6);
/// How long a connection to an endpoint may take.
const REACH: Duration = Duration::from_secs(3);
/// Endpoints that are tried at once.
const AT_ONCE: usize = 32;
/// Characters of a finding that are shown.
const LINE_MAX: usize = 1_000;

pub(super) fn command() -> Command {
    Command::new("doctor")
        .about("look at settings, store, broker, cache, clocks, limits and endpoints: what is wrong, and the mend")
        .arg(json_arg())
        .args(SETTINGS.iter().map(setting_arg))
}

/// Runs the verb on settings that may be unreadable.
pub(super) async fn run(raw: app::Result<Raw>, matches: &ArgMatches) -> app::Result<ExitCode> {
    let colour = raw.as_ref().is_ok_and(|raw| raw.get("NO_COLOR").is_none());
    let screen = Screen::new(colour, matches.get_flag("json"));
    let config = raw.map_err(|error| error.0).and_then(|raw| match Config::new(&raw, Role::Tool) {
        Ok(config) => Ok((raw, config)),
        Err(error) => Err(error.to_string()),
    });
    let findings = match config {
        Err(why) => vec![fault("settings", format!("{why}; the rest was not looked at"))],
        Ok((raw, config)) => {
            if raw.get("LOG_LEVEL").is_some() {
                let log = &config.log;
                let started = telemetry::start_log(&log.level, log.json, log.colour, log.file.as_deref());
                started.map_err(app::AppError)?;
            }
            examine(&raw, &config).await
        }
    };
    let faults = findings.iter().filter(|finding| finding.state == State::Fault).count();
    screen.show(&as_json(&findings), || report(screen.paint, &findings))?;
    Ok(if faults == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn as_json(findings: &[Finding]) -> Value {
    let worst = findings.iter().map(|finding| finding.state).max().unwrap_or(State::Ok);
    let one = |finding: &Finding| json!({ "state": finding.state.as_str(), "about": finding.about, "says": finding.says });
    json!({ "state": worst.as_str(), "findings": findings.iter().map(one).collect::<Vec<_>>() })
}

fn report(paint: Paint, findings: &[Finding]) -> String {
    let line = |finding: &Finding| {
        let tone = match finding.state {
            State::Ok => Tone::Good,
            State::Warning => Tone::Wait,
            State::Fault => Tone::Bad,
        };
        let state = paint.tone(tone, &format!("{:<8}", finding.state.as_str()));
        format!("{state} {:<11} {}\n", finding.about, plain(&finding.says, LINE_MAX))
    };
    let count = |state| findings.iter().filter(|finding| finding.state == state).count() as u64;
    let end = match (count(State::Fault), count(State::Warning)) {
        (0, 0) => "all is well\n".to_owned(),
        (faults, warnings) => format!("{}, {}\n", many(faults, "fault"), many(warnings, "warning")),
    };
    findings.iter().map(line).chain([end]).collect()
}

/// Looks at everything, all parts at once, and reports in one order.
async fn examine(raw: &Raw, config: &Config) -> Vec<Finding> {
    let mut findings = judge::settings(raw, config);
    let (store, cache, api) =
        tokio::join!(look_at_store(config), look_at_cache(config), look_at_api(raw, config));
    let (store, mut about_store) = store;
    findings.append(&mut about_store);
    let (queue, mut rest) =
        tokio::join!(look_at_queue(config, store.as_deref()), look_around(config, store.as_deref()));
    findings.extend(queue);
    findings.push(cache);
    findings.push(files());
    findings.push(api);
    findings.append(&mut rest);
    findings
}

/// Waits for a part's answer within its time.
async fn in_time<T, E: std::fmt::Display>(call: impl Future<Output = Result<T, E>>) -> Result<T, String> {
    let answer = tokio::time::timeout(ANSWER, call).await;
    answer.map_err(|_| format!("no answer within {ANSWER:?}"))?.map_err(|error| error.to_string())
}

/// The store, when it can be asked further, and what is to be said of it.
async fn look_at_store(config: &Config) -> (Option<Arc<dyn Store>>, Vec<Finding>) {
    let about = "store";
    let place = match &config.store {
        StoreConfig::Sqlite(path) => {
            if let Some(finding) = file(path) {
                return (None, vec![finding]);
            }
            path.display().to_string()
        }
        StoreConfig::Postgres(url) => redact::url(url),
    };
    let store = match app::open_store(&config.store) {
        Ok(store) => store,
        Err(error) => return (None, vec![fault(about, error.0)]),
    };
    let clock = Clock::system();
    let asked = in_time(async {
        let missing = store.missing_migrations().await?;
        // The second question: the first one had to connect.
        let (sent_at, watch) = (clock.now(), clock.stopwatch());
        let database = store.about().await?;
        let half = watch.elapsed() / 2;
        let ahead_us = database.now.as_micros() - sent_at.after(half).as_micros();
        Ok::<_, StoreError>((missing, database, ahead_us, half))
    });
    match asked.await {
        Err(why) => {
            let mend = "start it, make its database, or mend DATABASE_URL or the DB_ settings";
            (None, vec![fault(about, format!("{place}: {why}; {mend}"))])
        }
        Ok((missing, database, ahead_us, unsure)) => {
            let mut findings = judge::store(&place, &missing, &database);
            if store.kind() != "sqlite" {
                findings.push(judge::clock(ahead_us, unsure));
            }
            (missing.is_empty().then_some(store), findings)
        }
    }
}

/// What hinders the embedded store's file, or that there is none yet.
fn file(path: &Path) -> Option<Finding> {
    let about = "store";
    let shown = path.display();
    if path.exists() {
        let opened = std::fs::File::options().append(true).open(path);
        let wrong =
            opened.err().map(|why| fault(about, format!("{shown} can't be written: {why}; mend its rights")));
        return wrong.or_else(|| unwritable(path.parent()).map(|why| fault(about, why)));
    }
    // The nearest folder that is there: the others are made with the store.
    let folder = path.ancestors().skip(1).find(|folder| folder.as_os_str().is_empty() || folder.exists());
    Some(match unwritable(folder) {
        Some(why) => fault(about, why),
        None => warning(about, format!("there is none at {shown} yet; `ams up` or `ams migrate` makes it")),
    })
}

/// Why no file can be made in a folder. SQLite keeps its journal beside the store.
fn unwritable(folder: Option<&Path>) -> Option<String> {
    let folder = folder.filter(|folder| !folder.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let trial = folder.join(format!(".ams-doctor-{}", std::process::id()));
    match std::fs::File::options().write(true).create_new(true).open(&trial) {
        Ok(_) => {
            std::fs::remove_file(&trial).err().map(|why| format!("{} stays behind: {why}", trial.display()))
        }
        Err(why) => Some(format!("the folder {} can't be written: {why}; mend its rights", folder.display())),
    }
}

async fn look_at_cache(config: &Config) -> Finding {
    let about = "cache";
    if config.cache == CacheConfig::Memory {
        return ok(about, "in each process (REDIS_URL is not set)");
    }
    let cache = match app::open_cache(&config.cache, &Clock::system()) {
        Ok(cache) => cache,
        Err(error) => return fault(about, error.0),
    };
    match in_time(cache.ping()).await {
        Ok(()) => ok(about, "answers"),
        // Nothing stands still without it.
        Err(why) => {
            warning(about, format!("{why}; start it, or mend REDIS_URL: answers are not cached meanwhile"))
        }
    }
}

async fn look_at_queue(config: &Config, store: Option<&dyn Store>) -> Vec<Finding> {
    let about = "broker";
    let QueueConfig::Kafka { brokers, .. } = &config.queue else {
        return vec![ok(about, "in one process (KAFKA_BROKERS is not set)")];
    };
    let queue = match app::open_queue(&config.queue, &Clock::system()) {
        Ok(queue) => queue,
        Err(error) => return vec![fault(about, error.0)],
    };
    if let Err(why) = in_time(queue.ping()).await {
        return vec![fault(about, format!("{brokers}: {why}; start it, or mend KAFKA_BROKERS"))];
    }
    let mut findings = vec![ok(about, format!("{brokers} answers"))];
    let mut known = Snapshot::default();
    if let Some(store) = store {
        known.lanes = in_time(store.lanes()).await.unwrap_or_default();
        known.groups = in_time(store.lane_groups()).await.unwrap_or_default();
    }
    if known.lanes.is_empty() {
        known.lanes = vec![config.lane.clone(), config.retry_lane.clone()];
    }
    let mut topics: Vec<(&str, Vec<&str>)> =
        known.lanes.iter().map(|lane| (lane.topic.as_str(), known.groups_of(lane))).collect();
    for lane in &known.lanes {
        if !topics.iter().any(|(topic, _)| *topic == lane.next) {
            topics.push((&lane.next, vec![&lane.group]));
        }
    }
    for (topic, groups) in &topics {
        let depths = futures_util::future::try_join_all(groups.iter().map(|group| queue.depth(topic, group)));
        let depth = in_time(depths).await.map(furthest);
        findings.push(judge::lane(topic, depth.as_deref().map_err(String::as_str)));
    }
    findings
}

fn files() -> Finding {
    match rlimit::getrlimit(rlimit::Resource::NOFILE) {
        Ok((_, most)) => judge::files(most),
        Err(why) => warning("file limit", format!("the system does not tell it: {why}")),
    }
}

async fn look_at_api(raw: &Raw, config: &Config) -> Finding {
    let client = match Client::new(config) {
        Ok(client) => client,
        Err(error) => return fault("API", error.0),
    };
    let chosen = raw.get("AMS_URL").is_some();
    match tokio::time::timeout(ANSWER, client.get("/v1/status")).await {
        Err(_) => {
            let why = format!("{} does not answer within {ANSWER:?}; look into its log", client.url());
            judge::api(client.url(), chosen, Err(("silent", &why)))
        }
        Ok(Err(failure)) => judge::api(client.url(), chosen, Err((&failure.code, &failure.sentence))),
        Ok(Ok(status)) => {
            let version = status.get("version").and_then(Value::as_str).unwrap_or("unknown");
            judge::api(client.url(), chosen, Ok(version))
        }
    }
}

/// What the store knows of keys, endpoints and work; without it only the endpoint of the settings.
async fn look_around(config: &Config, store: Option<&dyn Store>) -> Vec<Finding> {
    let Some(store) = store else {
        let default = Endpoint::new("default", &config.request.url);
        return reach_all(config, vec![(default, false)]).await;
    };
    let asked = in_time(async {
        let now = store.time().await?.unwrap_or_else(|| Clock::system().now());
        let keys = judge::keys(config, &store.keys().await?, now);
        let lanes = store.lanes().await?.into_iter().map(|lane| (lane.topic, lane.fresh)).collect::<Vec<_>>();
        let work = judge::work(&store.overview(now).await?, &store.control(now).await?, &lanes, now);
        let mut work = work;
        work.push(judge::reconciliation(&store.reconciliation().await?));
        let (mut endpoints, held) = (store.endpoints().await?, store.held().await?);
        if endpoints.is_empty() {
            endpoints.push(Endpoint::new("default", &config.request.url));
        }
        let waited_for = |endpoint: &Endpoint| held.iter().any(|(name, _)| *name == endpoint.name);
        let endpoints = endpoints.into_iter().map(|endpoint| (waited_for(&endpoint), endpoint));
        Ok::<_, StoreError>((keys, work, endpoints.map(|(held, endpoint)| (endpoint, held)).collect()))
    });
    match asked.await {
        Err(why) => vec![fault("store", format!("{why}; try again"))],
        Ok((mut findings, work, endpoints)) => {
            findings.extend(reach_all(config, endpoints).await);
            findings.extend(work);
            findings
        }
    }
}

/// Connects to each endpoint that is enabled, and lets go again.
async fn reach_all(config: &Config, endpoints: Vec<(Endpoint, bool)>) -> Vec<Finding> {
    let options = DeliveryOptions { ca_file: config.request.ca_file.clone(), ..DeliveryOptions::default() };
    let delivery = match Delivery::new(Clock::system(), Uuid::nil(), options) {
        Ok(delivery) => delivery,
        Err(error) => return vec![fault("endpoint", format!("{error}; mend REQUEST_CA_FILE"))],
    };
    let delivery = &delivery;
    let tries = endpoints.into_iter().map(|(endpoint, waited_for)| async move {
        let reached = if endpoint.enabled { Some(delivery.reach(&endpoint.url, REACH).await) } else { None };
        judge::endpoint(&endpoint, waited_for, reached)
    });
    stream::iter(tries).buffered(AT_ONCE).collect().await
}

#[cfg(test)]
mod tests;
