//! What the benchmark runs on: a store of its own on the configured server, lanes of its own on the
//! configured broker, and the services as processes.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use super::cpu::{Watched, named};
use super::receiver::Receiver;
use super::{failed, message};
use crate::app::{self, AppError, Result};
use crate::clock::Clock;
use crate::config::{CacheConfig, Config, QueueConfig, StoreConfig};
use crate::delivery::{Delivery, DeliveryOptions};
use crate::message::Status;
use crate::queue::Queue;
use crate::store::postgres::Scratch;
use crate::store::{Endpoint, Store};

/// Rows inserted in one statement while the backlog is filled.
const FILL: usize = 5_000;

/// What messages are signed with: 24 bytes, as the specification recommends at least. Nobody checks it.
const SECRET: &str = "whsec_YmVuY2htYXJrLXNlY3JldC1vZi0yNGJ5";

pub(super) struct Stack {
    clock: Clock,
    store: Arc<dyn Store>,
    queue: Arc<dyn Queue>,
    scratch: Option<Scratch>,
    file: Option<PathBuf>,
    /// Names this run's database and lanes.
    name: String,
    environment: BTreeMap<&'static str, String>,
    /// Behind a lock because looking at a child needs it mutable; never held over an await.
    services: Mutex<Vec<(String, Child)>>,
}

impl Stack {
    pub(super) async fn set_up(config: &Config, request_url: String) -> Result<Stack> {
        let name = format!("ams_bench_{}", std::process::id());
        let mut config = config.clone();
        let mut environment =
            BTreeMap::from([("REQUEST_URL", request_url.clone()), ("LOG_LEVEL", "warn".into())]);
        let full =
            matches!((&config.store, &config.queue), (StoreConfig::Postgres(_), QueueConfig::Kafka { .. }));
        let (mut scratch, mut file) = (None, None);
        if let (true, StoreConfig::Postgres(url)) = (full, &config.store) {
            let made = Scratch::create(url, &name).await.map_err(|error| AppError(error.to_string()))?;
            config.store = StoreConfig::Postgres(made.url().to_owned());
            scratch = Some(made);
        } else {
            let path = PathBuf::from(format!("ams-data/{name}.db"));
            config.store = StoreConfig::Sqlite(path.clone());
            (config.queue, config.cache) = (QueueConfig::Embedded, CacheConfig::Memory);
            file = Some(path);
        }
        settings(&config, &name, &mut environment);
        let clock = Clock::system();
        let (store, queue) = (app::open_store(&config.store)?, app::open_queue(&config.queue, &clock)?);
        let wrong = failed("the benchmark's store can't be made ready");
        store.migrate().await.map_err(|error| wrong(&error))?;
        store.put_endpoint(&endpoint(&request_url)).await.map_err(|error| wrong(&error))?;
        let services = Mutex::default();
        Ok(Stack { clock, store, queue, scratch, file, name, environment, services })
    }

    pub(super) fn kind(&self) -> &'static str {
        if self.scratch.is_some() { "full" } else { "embedded" }
    }

    pub(super) fn clock(&self) -> &Clock {
        &self.clock
    }

    pub(super) fn queue(&self) -> &dyn Queue {
        self.queue.as_ref()
    }

    pub(super) fn lane(&self, what: &str) -> String {
        format!("{}-{what}", self.name)
    }

    pub(super) fn delivery(&self) -> Result<Arc<Delivery>> {
        let delivery = Delivery::new(self.clock.clone(), uuid::Uuid::nil(), DeliveryOptions::default());
        delivery.map(Arc::new).map_err(|error| AppError(error.to_string()))
    }

    /// A store on the same server that holds `count` messages and nothing else, for the bare stages.
    pub(super) async fn bare_store(
        &self,
        count: usize,
        payload_bytes: usize,
    ) -> Result<(Arc<dyn Store>, Scratch)> {
        let Some(scratch) = &self.scratch else {
            return Err(AppError("bare store stages are measured on the full stack only".to_owned()));
        };
        let wrong = failed("the bare store can't be made ready");
        let bare = Scratch::create(scratch.url(), &format!("{}_limit", self.name)).await;
        let bare = bare.map_err(|error| wrong(&error))?;
        let store = app::open_store(&StoreConfig::Postgres(bare.url().to_owned()))?;
        store.migrate().await.map_err(|error| wrong(&error))?;
        // A claim holds the messages of an endpoint that is not there.
        let endpoint = Endpoint::new("default", "http://localhost:3000");
        store.put_endpoint(&endpoint).await.map_err(|error| wrong(&error))?;
        fill(store.as_ref(), &self.clock, count, payload_bytes).await?;
        Ok((store, bare))
    }

    pub(super) async fn fill(&self, count: usize, payload_bytes: usize) -> Result<()> {
        fill(self.store.as_ref(), &self.clock, count, payload_bytes).await
    }

    /// Starts the services, each as a process of its own.
    pub(super) fn start(&mut self) -> Result<()> {
        let verbs: &[&str] =
            if self.scratch.is_some() { &["producer", "consumer", "retry-consumer"] } else { &["up"] };
        let program =
            std::env::current_exe().map_err(|error| failed("our own program is not found")(&error))?;
        for verb in verbs {
            let mut command = Command::new(&program);
            command.arg(verb).envs(&self.environment).stdout(Stdio::null());
            if *verb == "retry-consumer" {
                command.env("KAFKA_TOPIC", self.lane("retry")).env("KAFKA_TOPIC_RETRY", self.lane("dlq"));
            }
            let child = command.spawn().map_err(|error| failed("a service can't be started")(&error))?;
            self.services.get_mut().unwrap_or_else(PoisonError::into_inner).push(((*verb).to_owned(), child));
        }
        Ok(())
    }

    /// Tells when a service has ended although nobody asked it to.
    pub(super) fn assert_running(&self) -> Result<()> {
        for (name, child) in self.services.lock().unwrap_or_else(PoisonError::into_inner).iter_mut() {
            if let Ok(Some(status)) = child.try_wait() {
                return Err(AppError(format!(
                    "the benchmark's {name} ended by itself ({status}); its log says why"
                )));
            }
        }
        Ok(())
    }

    /// Waits until every message is recorded as sent: an arrival is not yet the end of the work.
    pub(super) async fn settle(&self) -> Result<()> {
        let watch = self.clock.stopwatch();
        loop {
            let overview =
                self.store.overview(self.clock.now()).await.map_err(|error| AppError(error.to_string()))?;
            let open = |status: Status| !status.is_final();
            if overview.counts.iter().filter(|count| open(count.status)).all(|count| count.count == 0) {
                return Ok(());
            }
            if watch.elapsed() > Duration::from_secs(30) {
                return Err(AppError(format!(
                    "messages are still under way after 30 s: {:?}",
                    overview.counts
                )));
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    pub(super) fn processes(&self, receiver: &Receiver) -> Vec<Watched> {
        let mut watched = vec![Watched { name: "receiver".into(), pid: receiver.pid() }];
        for (name, child) in self.services.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            watched.push(Watched { name: name.clone(), pid: child.id() });
        }
        if self.scratch.is_some() {
            watched.extend(named("postgres", "postgres"));
            watched.extend(named("java", "kafka"));
            watched.extend(named("redis-server", "redis"));
        }
        watched
    }

    pub(super) async fn reset_statements(&self) -> Result<()> {
        match &self.scratch {
            Some(scratch) => scratch.reset_statements().await.map_err(|error| AppError(error.to_string())),
            None => Ok(()),
        }
    }

    /// Statements that the server has run for this store; `None` when it does not count them.
    pub(super) async fn statements(&self) -> Result<Option<u64>> {
        match &self.scratch {
            Some(scratch) => scratch.statements().await.map_err(|error| AppError(error.to_string())),
            None => Ok(None),
        }
    }

    pub(super) async fn tear_down(mut self) -> Result<()> {
        self.stop_services();
        if let Some(scratch) = self.scratch.take() {
            scratch.remove().await.map_err(|error| AppError(error.to_string()))?;
        }
        Ok(())
    }

    fn stop_services(&mut self) {
        for (_, mut child) in self.services.get_mut().unwrap_or_else(PoisonError::into_inner).drain(..) {
            // What the benchmark made is thrown away, so nothing needs an orderly end.
            let _ = child.kill();
            let _ = child.wait();
        }
        if let Some(path) = &self.file {
            for suffix in ["", "-wal", "-shm"] {
                let _ = std::fs::remove_file(format!("{}{suffix}", path.display()));
            }
        }
    }
}

impl Drop for Stack {
    fn drop(&mut self) {
        self.stop_services();
    }
}

/// The environment of the services: what this process was configured with, on a store and lanes of their own.
fn settings(config: &Config, name: &str, environment: &mut BTreeMap<&'static str, String>) {
    match &config.store {
        StoreConfig::Postgres(url) => environment.insert("DATABASE_URL", url.clone()),
        StoreConfig::Sqlite(path) => {
            environment.insert("DATABASE_URL", format!("sqlite://{}", path.display()))
        }
    };
    environment.insert("KAFKA_GROUP_ID", name.to_owned());
    environment.insert("KAFKA_TOPIC", format!("{name}-fresh"));
    environment.insert("KAFKA_TOPIC_RETRY", format!("{name}-retry"));
    match &config.queue {
        QueueConfig::Kafka { brokers, client } if client.is_empty() => {
            environment.insert("KAFKA_BROKERS", brokers.clone());
        }
        QueueConfig::Kafka { .. } => {}
        // An empty value unsets what the services would inherit.
        QueueConfig::Embedded => drop(environment.insert("KAFKA_BROKERS", String::new())),
    }
    match &config.cache {
        CacheConfig::Redis(url) => drop(environment.insert("REDIS_URL", url.clone())),
        CacheConfig::Memory => {
            environment.insert("REDIS_URL", String::new());
            environment.insert("REDIS_HOST", String::new());
        }
    }
    environment.insert("PORT", "0".to_owned());
}

/// The receiver's endpoint. Its messages are signed, as they should be in production.
pub(super) fn endpoint(url: &str) -> Endpoint {
    Endpoint { secret: Some(SECRET.to_owned()), ..Endpoint::new("default", url) }
}

async fn fill(store: &dyn Store, clock: &Clock, count: usize, payload_bytes: usize) -> Result<()> {
    let batch = vec![message(payload_bytes); FILL.min(count)];
    let mut left = count;
    while left > 0 {
        let size = left.min(FILL);
        let inserted = store.insert(&batch[..size], clock.now()).await;
        inserted.map_err(|error| failed("the backlog can't be inserted")(&error))?;
        left -= size;
    }
    Ok(())
}
