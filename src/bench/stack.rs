//! The system under test: a store of its own on the testbed's parts, lanes of its own, and the services as processes that
//! are told nothing but what they need: no setting is taken from the environment or a file.

use std::collections::BTreeMap;
use std::process::{Child, Command, Stdio};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use super::cpu::Watched;
use super::failed;
use super::receiver::Receiver;
use super::testbed::Testbed;
use super::writer::Writer;
use crate::app::{self, AppError, Result};
use crate::clock::Clock;
use crate::config::{SETTINGS, StoreConfig};
use crate::store::Endpoint;
use crate::store::postgres::Scratch;

/// What messages are signed with: 24 bytes, as the specification recommends at least. Nobody checks it.
const SECRET: &str = "whsec_YmVuY2htYXJrLXNlY3JldC1vZi0yNGJ5";
/// How long results may take to be recorded after the last arrival.
const RECORDED: Duration = Duration::from_secs(60);
/// How long a service may take to stop before it is ended.
const STOP: Duration = Duration::from_secs(20);

pub(super) struct Stack<'a> {
    testbed: &'a Testbed,
    clock: Clock,
    writer: Writer,
    scratch: Option<Scratch>,
    /// Names this run's lanes and group.
    name: String,
    environment: BTreeMap<&'static str, String>,
    /// Behind a lock because looking at a child needs it mutable; never held over an await.
    services: Mutex<Vec<(String, Child)>>,
}

impl<'a> Stack<'a> {
    /// A store with these endpoints and nothing else; no service runs yet.
    pub(super) async fn set_up(
        testbed: &'a Testbed,
        what: &str,
        endpoints: &[Endpoint],
    ) -> Result<Stack<'a>> {
        let (name, clock) = (testbed.name(what), Clock::system());
        let scratch = if testbed.is_full() { Some(testbed.database(what).await?) } else { None };
        let file = testbed.folder().join(format!("{what}.db"));
        let config = match &scratch {
            Some(scratch) => StoreConfig::Postgres(scratch.url().to_owned()),
            None => StoreConfig::Sqlite(file.clone()),
        };
        let store = app::open_store(&config)?;
        let wrong = failed("the benchmark's store can't be made ready");
        store.migrate().await.map_err(|error| wrong(&error))?;
        for endpoint in endpoints {
            store.put_endpoint(endpoint).await.map_err(|error| wrong(&error))?;
        }
        drop(store);
        let writer = match &scratch {
            Some(scratch) => Writer::postgres(scratch).await?,
            None => Writer::sqlite(&file)?,
        };
        let url = match config {
            StoreConfig::Postgres(url) => url,
            StoreConfig::Sqlite(path) => format!("sqlite://{}", path.display()),
        };
        let request_url = endpoints.first().map_or_else(String::new, |endpoint| endpoint.url.clone());
        let mut environment = BTreeMap::from([
            ("DATABASE_URL", url),
            ("REQUEST_URL", request_url),
            ("LOG_LEVEL", "warn".to_owned()),
            ("PORT", "0".to_owned()),
            ("KAFKA_GROUP_ID", name.clone()),
            ("KAFKA_TOPIC", format!("{name}-fresh")),
            ("KAFKA_TOPIC_RETRY", format!("{name}-retry")),
        ]);
        environment.extend(testbed.kafka_settings());
        environment.extend(testbed.redis().map(|url| ("REDIS_URL", url.to_owned())));
        Ok(Stack { testbed, clock, writer, scratch, name, environment, services: Mutex::default() })
    }

    /// Gives the services one more setting; call it before they start.
    pub(super) fn set(&mut self, name: &'static str, value: &str) {
        self.environment.insert(name, value.to_owned());
    }

    pub(super) fn writer(&self) -> &Writer {
        &self.writer
    }

    /// Its database, on the full stack.
    pub(super) fn scratch(&self) -> Option<&Scratch> {
        self.scratch.as_ref()
    }

    pub(super) fn clock(&self) -> &Clock {
        &self.clock
    }

    /// Starts the services, each as a process of its own.
    pub(super) fn start(&mut self) -> Result<()> {
        let all: &[&str] =
            if self.testbed.is_full() { &["producer", "consumer", "retry-consumer"] } else { &["up"] };
        all.iter().try_for_each(|verb| self.start_service(verb, &[]))
    }

    /// Starts one service with further settings.
    pub(super) fn start_service(&mut self, verb: &str, settings: &[(&str, String)]) -> Result<()> {
        let program =
            std::env::current_exe().map_err(|error| failed("our own program is not found")(&error))?;
        let mut command = Command::new(program);
        for setting in SETTINGS {
            command.env_remove(setting.name);
        }
        command.arg(verb).envs(&self.environment);
        if verb == "retry-consumer" {
            let lanes = [("KAFKA_TOPIC", "retry"), ("KAFKA_TOPIC_RETRY", "dlq")];
            command.envs(lanes.map(|(name, lane)| (name, format!("{}-{lane}", self.name))));
        }
        command.envs(settings.iter().map(|(name, value)| (name, value)));
        // A file ams.toml in the folder of whoever runs this would be read.
        command.current_dir(self.testbed.folder()).stdout(Stdio::null());
        let child = command.spawn().map_err(|error| failed("a service can't be started")(&error))?;
        self.services.get_mut().unwrap_or_else(PoisonError::into_inner).push((verb.to_owned(), child));
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

    /// Waits until so many deliveries are recorded as sent, and says how many are: an arrival is not yet the end of the
    /// work.
    pub(super) async fn recorded(&self, wanted: usize) -> Result<usize> {
        let watch = self.clock.stopwatch();
        loop {
            let recorded = self.writer.recorded().await?;
            if recorded >= wanted {
                return Ok(recorded);
            }
            if watch.elapsed() > RECORDED {
                return Err(AppError(format!(
                    "{recorded} of {wanted} messages are recorded after {RECORDED:?}"
                )));
            }
            self.assert_running()?;
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    }

    /// Everything that works for this stack: services, parts, receiver.
    pub(super) fn processes(&self, receiver: &Receiver) -> Vec<Watched> {
        let mut watched = vec![Watched { name: "receiver".into(), pid: receiver.pid() }];
        for (name, child) in self.services.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            watched.push(Watched { name: name.clone(), pid: child.id() });
        }
        watched.extend(self.testbed.parts());
        watched
    }

    /// Statements that the server has run for this store; `None` when it does not count them.
    pub(super) async fn statements(&self) -> Result<Option<u64>> {
        match &self.scratch {
            Some(scratch) => scratch.statements().await.map_err(|error| AppError(error.to_string())),
            None => Ok(None),
        }
    }

    /// Stops the services as an operator would, so that they leave their groups.
    pub(super) async fn stop(&mut self) {
        let watch = self.clock.stopwatch();
        let mut services: Vec<_> =
            self.services.get_mut().unwrap_or_else(PoisonError::into_inner).drain(..).collect();
        for (_, child) in &services {
            // Nothing but the program `kill` says TERM without unsafe code; without it they are ended below.
            let _ = Command::new("kill").arg(child.id().to_string()).status();
        }
        for (_, child) in &mut services {
            while watch.elapsed() < STOP && matches!(child.try_wait(), Ok(None)) {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            end(child);
        }
    }

    /// Stops the services and removes the store.
    pub(super) async fn tear_down(mut self) -> Result<()> {
        self.stop().await;
        if let Some(scratch) = self.scratch.take() {
            scratch.remove().await.map_err(|error| AppError(error.to_string()))?;
        }
        Ok(())
    }
}

impl Drop for Stack<'_> {
    fn drop(&mut self) {
        let services = self.services.get_mut().unwrap_or_else(PoisonError::into_inner);
        services.iter_mut().for_each(|(_, child)| end(child));
    }
}

fn end(child: &mut Child) {
    // It may be gone already, which is as good.
    let _ = child.kill();
    let _ = child.wait();
}

/// An endpoint whose messages are signed, as they should be in production.
pub(super) fn endpoint(name: &str, url: &str) -> Endpoint {
    Endpoint { secret: Some(SECRET.to_owned()), ..Endpoint::new(name, url) }
}
