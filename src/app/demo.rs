//! `ams demo`: the whole system in one process, with a receiver that fails a third of requests.

use std::collections::BTreeMap;
use std::io::{IsTerminal, Write};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use tokio::net::TcpListener;
use tokio_util::sync::CancellationToken;

use super::{App, AppError, Result, address, listen};
use crate::clock::Timestamp;
use crate::config::{CacheConfig, Config, QueueConfig, Raw, StoreConfig};
use crate::message::{Attempt, Message, MessageId, NewMessage, Status};
use crate::store::{Store, StoreError};
use crate::testclient::{self, TestClientOptions};

/// The demo's own file: a fresh one each time.
const FILE: &str = "ams-data/demo.db";
/// How often the timeline looks for news.
const LOOK: Duration = Duration::from_millis(40);

/// Runs the demo; with `exit_when_done` until every message is final.
///
/// # Errors
/// When the demo's file or a port can't be used.
pub async fn run(
    mut config: Config,
    raw: &Raw,
    exit_when_done: bool,
    stop: CancellationToken,
) -> Result<ExitCode> {
    let receiver = free_port(&config.listen.host, 3000).await?;
    let api = free_port(&config.listen.host, config.listen.port).await?;
    config.listen.port = address(&api)?.port();
    drop(api);
    remove_old_file()?;
    config.store = StoreConfig::Sqlite(FILE.into());
    (config.queue, config.cache) = (QueueConfig::Embedded, CacheConfig::Memory);
    config.request.url = format!("http://{}", address(&receiver)?);
    config.request.is_set = true;
    if raw.get("RETRY_INTERVAL").is_none() {
        // A newcomer should not have to wait for the production default.
        config.lane.interval = Duration::from_secs(1);
        config.retry_lane.interval = Duration::from_secs(1);
    }
    let error_rate = if raw.get("ERROR_RATE").is_some() { config.error_rate } else { 1.0 / 3.0 };
    let options = TestClientOptions { error_rate, quiet: true, ..TestClientOptions::default() };

    let timeline = Timeline::new(&config);
    let app = App::open(config)?;
    if !app.prepare(&stop).await? {
        return Ok(ExitCode::SUCCESS);
    }
    timeline.print_header(&app.config);
    let done = CancellationToken::new();
    let told = async {
        let told = tell(&app, timeline, exit_when_done, &stop).await;
        stop.cancel();
        told
    };
    let (ran, _, told) =
        tokio::join!(app.serve(&stop), testclient::run(receiver, options, done.clone()), async {
            let told = told.await;
            done.cancel();
            told
        });
    ran?;
    told.map(|()| ExitCode::SUCCESS)
}

/// Inserts the samples and prints what happens, until stopped or everything is final.
async fn tell(
    app: &App,
    mut timeline: Timeline,
    exit_when_done: bool,
    stop: &CancellationToken,
) -> Result<()> {
    let failed = |error: StoreError| AppError(error.to_string());
    let store = app.context.store.as_ref();
    store.insert(&samples(), app.context.clock.now()).await.map_err(failed)?;
    let start = app.context.clock.now();
    while !stop.is_cancelled() {
        timeline.look(store, start).await.map_err(failed)?;
        if exit_when_done && timeline.all_final() {
            timeline.summary(app.context.clock.now().since(start));
            return Ok(());
        }
        tokio::select! {
            () = stop.cancelled() => {}
            () = tokio::time::sleep(LOOK) => {}
        }
    }
    timeline.summary(app.context.clock.now().since(start));
    Ok(())
}

fn samples() -> Vec<NewMessage> {
    (1..=10)
        .map(|i| NewMessage {
            recipient: format!("+9055511111{i:02}"),
            content: format!("Sample message {i}"),
            ..NewMessage::default()
        })
        .collect()
}

/// A listener on `port`, or on any free one when that is taken.
async fn free_port(host: &str, port: u16) -> Result<TcpListener> {
    match TcpListener::bind((host, port)).await {
        Ok(listener) => Ok(listener),
        Err(_) => listen(host, 0, "HOST").await,
    }
}

fn remove_old_file() -> Result<()> {
    for suffix in ["", "-wal", "-shm"] {
        let path = format!("{FILE}{suffix}");
        if let Err(error) = std::fs::remove_file(&path)
            && Path::new(&path).exists()
        {
            return Err(AppError(format!(
                "{path} of an earlier demo can't be removed: {error}; remove it by hand"
            )));
        }
    }
    Ok(())
}

/// Prints each new attempt once, in plain words.
struct Timeline {
    colour: bool,
    seen: BTreeMap<MessageId, (usize, Status)>,
}

impl Timeline {
    fn new(config: &Config) -> Timeline {
        Timeline { colour: config.log.colour && std::io::stdout().is_terminal(), seen: BTreeMap::new() }
    }

    fn print_header(&self, config: &Config) {
        let api = format!("http://{}:{}", config.listen.host, config.listen.port);
        say(&format!(
            "AMS runs whole in this process. The receiver at {} fails some requests on purpose.",
            config.request.url
        ));
        say(&format!("Swagger UI: {api}/swagger/index.html"));
        say(&format!(
            "Send one by SQL:   sqlite3 {FILE} \"INSERT INTO messages (recipient, content) VALUES ('+905551111111', 'Hello');\""
        ));
        say(&format!(
            "Send one by HTTP:  curl -s {api}/v1/messages -H 'content-type: application/json' -d '{{\"recipient\":\"+905551111111\",\"content\":\"Hello\"}}'"
        ));
        say("");
    }

    /// Looks at every message that is not final yet, and for one new one.
    async fn look(&mut self, store: &dyn Store, start: Timestamp) -> std::result::Result<(), StoreError> {
        let last = self.seen.last_key_value().map_or(0, |(id, _)| id.0);
        let open = self.seen.iter().filter(|(_, (_, status))| !status.is_final()).map(|(id, _)| *id);
        let ids: Vec<_> = open.chain((last + 1..=last + 10).map(MessageId)).collect();
        for id in ids {
            let Some(message) = store.message(id).await? else { continue };
            let told = self.seen.get(&id).map_or(0, |seen| seen.0);
            let attempts = store.attempts(id).await?;
            for attempt in attempts.iter().skip(told) {
                let last = attempt.attempt == message.attempts;
                say(&self.line(start, &message, attempt, last));
            }
            self.seen.insert(id, (attempts.len(), message.status));
        }
        Ok(())
    }

    fn line(&self, start: Timestamp, message: &Message, attempt: &Attempt, last: bool) -> String {
        let at = attempt.started_at.since(start).as_secs_f64();
        let took = f64::from(attempt.times.total_us()) / 1000.0;
        let answer =
            attempt.status.map_or_else(|| attempt.class.as_str().to_owned(), |status| status.to_string());
        let (colour, then) = match (message.status, message.due_at) {
            (Status::Sent, _) if last => ("32", "sent".to_owned()),
            (Status::Dead, _) if last => ("31", "dead: no tries left".to_owned()),
            (_, Some(due)) if last => {
                ("33", format!("next try in {:.1} s", due.since(attempt.started_at).as_secs_f64()))
            }
            _ => ("33", "tried again".to_owned()),
        };
        let then = if self.colour { format!("\x1b[{colour}m{then}\x1b[0m") } else { then };
        let (id, to, number) = (message.id, &message.recipient, attempt.attempt);
        format!("{at:7.3} s  message {id:<3} to {to}  try {number}  {answer} in {took:.1} ms  {then}")
    }

    fn all_final(&self) -> bool {
        !self.seen.is_empty() && self.seen.values().all(|(_, status)| status.is_final())
    }

    fn summary(&self, took: Duration) {
        let count = |wanted| self.seen.values().filter(|(_, status)| *status == wanted).count();
        let tries: usize = self.seen.values().map(|(attempts, _)| attempts).sum();
        let (sent, dead) = (count(Status::Sent), count(Status::Dead));
        let open = self.seen.len() - sent - dead;
        say("");
        say(&format!(
            "{} messages: {sent} sent, {dead} dead, {open} under way; {tries} tries in {:.1} s.",
            self.seen.len(),
            took.as_secs_f64()
        ));
    }
}

/// Writes a line; a reader that has gone is no reason to end the demo.
fn say(line: &str) {
    let _ = writeln!(std::io::stdout(), "{line}");
}
