//! The composition root: opens the backends, builds the chosen services, runs them, drains them.

pub mod demo;
mod files;
mod signals;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use futures_util::future::{BoxFuture, FutureExt, TryFutureExt};
use futures_util::stream::{FuturesUnordered, StreamExt};
use tokio::net::TcpListener;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::api::{self, Access, ApiState, Guard};
use crate::cache::Cache;
use crate::cache::memory::MemoryCache;
use crate::cache::redis::RedisCache;
use crate::clock::Clock;
use crate::config::{CacheConfig, Config, QueueConfig, Role, StoreConfig};
use crate::consumer::{self, ConsumerOptions};
use crate::delivery::{Delivery, DeliveryOptions, origin_of};
use crate::intake::Intake;
use crate::janitor::Janitor;
use crate::lane::Lane;
use crate::producer::{Producer, ProducerOptions};
use crate::queue::Queue;
use crate::queue::embedded::EmbeddedQueue;
use crate::queue::kafka::{KafkaOptions, KafkaQueue};
use crate::service::{self, Context, Directory, Presence};
use crate::store::postgres::{PostgresOptions, PostgresStore};
use crate::store::sqlite::SqliteStore;
use crate::store::{Endpoint, SchemaVersion, Store, StoreError};
use crate::telemetry::Metrics;

pub use files::FILES;
use files::Shares;
pub use signals::stop_on_signals;

/// Why the program could not start or go on: one sentence with what, where and how to mend it.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
pub struct AppError(pub String);

/// The result of running something.
pub type Result<T> = std::result::Result<T, AppError>;

/// Rows a claim takes at most. With it come a look for urgent messages and an acknowledgement, which cost as much however
/// few it takes; a batch holds 2,048.
const CLAIM: usize = 2_000;
/// Tickets that may be on a lane and not taken up: half a second's worth at full speed, held in memory when embedded.
const LANE_CAPACITY: usize = 16_000;
/// Messages begun and not recorded, per consumer.
const WINDOW: usize = 8_000;

/// A whole AMS, or the part of it that a role runs.
pub struct App {
    pub context: Context,
    pub config: Config,
    wake: Arc<Notify>,
}

impl App {
    /// Opens the backends. None of them needs to be reachable yet.
    ///
    /// # Errors
    /// When a setting can't be used.
    pub fn open(config: Config) -> Result<App> {
        let clock = Clock::system();
        let store = open_store(&config.store)?;
        let shared = matches!(config.role, Role::Producer | Role::Consumer | Role::RetryConsumer);
        if shared && config.queue == QueueConfig::Embedded {
            return Err(AppError(
                "KAFKA_BROKERS is not set, and a queue inside one process can't be shared with another; \
                 set it, or run `ams up`"
                    .to_owned(),
            ));
        }
        let (queue, cache) = (open_queue(&config.queue, &clock)?, open_cache(&config.cache, &clock)?);
        let host = hostname();
        let presence =
            Arc::new(Presence::new(Arc::clone(&store), clock.clone(), role_name(config.role), &host));
        let directory = Arc::new(Directory::new(Arc::clone(&store)));
        let metrics = Arc::new(Metrics::default());
        let context = Context { store, queue, cache, clock, metrics, presence, directory };
        Ok(App { context, config, wake: Arc::default() })
    }

    /// Waits for the store, brings it to where this program needs it, and enrolls. `false`: stopped meanwhile.
    ///
    /// # Errors
    /// When the store is of a version that this program does not know.
    pub async fn prepare(&self, stop: &CancellationToken) -> Result<bool> {
        files::raise_limit();
        let migrates = self.config.role == Role::Up;
        let ready = service::persist("store", stop, || async {
            match if migrates { self.migrate().await } else { self.check_version().await } {
                Err(StoreError::Unsupported(sentence)) => Ok(Err(AppError(sentence))),
                Err(error) => Err(error),
                Ok(()) => self.begin_service().await.map(Ok),
            }
        });
        match ready.await {
            None => Ok(false),
            Some(done) => done.map(|()| true),
        }
    }

    async fn migrate(&self) -> std::result::Result<(), StoreError> {
        for name in self.context.store.migrate().await? {
            tracing::info!("migration {name} applied");
        }
        say_newer(&self.context.store.schema_version().await?.newer);
        Ok(())
    }

    async fn check_version(&self) -> std::result::Result<(), StoreError> {
        let SchemaVersion { missing, newer } = self.context.store.schema_version().await?;
        if missing.is_empty() {
            say_newer(&newer);
            return Ok(());
        }
        Err(StoreError::Unavailable(format!(
            "it lacks the migrations {}; run `ams migrate`",
            missing.join(", ")
        )))
    }

    async fn begin_service(&self) -> std::result::Result<(), StoreError> {
        let endpoints = self.context.store.endpoints().await?;
        let default = endpoints.into_iter().find(|endpoint| endpoint.name == "default");
        let url = &self.config.request.url;
        match default {
            None => self.context.store.put_endpoint(&Endpoint::new("default", url)).await?,
            Some(old) if self.config.request.is_set && old.url != *url => {
                let (new, old_one) = (origin_of(url), origin_of(&old.url));
                tracing::info!("the endpoint default now points to {new}; it was {old_one}");
                self.context.store.put_endpoint(&Endpoint { url: url.clone(), ..old }).await?;
            }
            Some(_) => {}
        }
        self.context.presence.renew().await?;
        self.context.directory.refresh().await
    }

    /// Prepares, then serves.
    ///
    /// # Errors
    /// Those of [`App::prepare`] and [`App::serve`].
    pub async fn run(&self, stop: &CancellationToken) -> Result<()> {
        if self.prepare(stop).await? { self.serve(stop).await } else { Ok(()) }
    }

    /// Runs the role's services until `stop`, and drains them.
    ///
    /// # Errors
    /// When a port can't be listened on, or the installation's number can't be read, or a service has ended by itself.
    pub async fn serve(&self, stop: &CancellationToken) -> Result<()> {
        // What keeps a process alive in the eyes of others goes on while its services drain.
        let alive = CancellationToken::new();
        let services = self.services(stop).await?;
        let keep =
            async { tokio::join!(self.context.presence.run(&alive), self.context.directory.run(&alive)) };
        let work = async {
            // Each has a waker of its own: what wakes one does not have the others look.
            let mut services: FuturesUnordered<_> = services.into_iter().collect();
            let mut ended = Ok(());
            while let Some(end) = services.next().await {
                if let Err(error) = end {
                    // Without one of its services a process is none: whoever supervises it has to know.
                    tracing::error!("{error}; this process ends");
                    stop.cancel();
                    ended = Err(error);
                }
            }
            alive.cancel();
            ended
        };
        let (_, ended) = tokio::join!(keep, work);
        self.context.presence.retire().await;
        ended
    }

    async fn services<'a>(&'a self, stop: &'a CancellationToken) -> Result<Vec<BoxFuture<'a, Result<()>>>> {
        let mut services: Vec<BoxFuture<'a, Result<()>>> = Vec::new();
        let shares = Shares::now();
        let role = self.config.role;
        if matches!(role, Role::Api | Role::Up) {
            let listener = listen(&self.config.listen.host, self.config.listen.port, "PORT").await?;
            let state = self.api_state(address(&listener)?);
            let (router, context) = (api::router(state), self.context.clone());
            services.push(Box::pin(api::serve(listener, router, context, shares.api, stop.clone()).map(Ok)));
        } else if let Some(port) = self.config.metrics_port {
            let listener = listen(&self.config.listen.host, port, "METRICS_PORT").await?;
            let state = self.api_state(address(&listener)?);
            let (router, context) = (api::health_router(state), self.context.clone());
            services.push(Box::pin(api::serve(listener, router, context, shares.api, stop.clone()).map(Ok)));
        }
        if matches!(role, Role::Producer | Role::Up) {
            let producer = Producer::new(self.context.clone(), self.producer_options());
            let (publisher, leading) = (producer.publisher(), producer.leading());
            let janitor = Janitor::new(self.context.clone(), publisher, leading, self.config.retention);
            services.push(Box::pin(producer.run(stop, &self.wake).map(Ok)));
            services.push(Box::pin(janitor.run(stop).map(Ok)));
        }
        let lanes: &[&Lane] = match role {
            Role::Consumer | Role::RetryConsumer => &[&self.config.lane],
            Role::Up => &[&self.config.lane, &self.config.retry_lane],
            _ => &[],
        };
        if !lanes.is_empty() {
            let delivery = self.delivery(shares).await?;
            let tended = Arc::clone(&delivery);
            services.push(Box::pin(async move { tended.tend(stop).await }.map(Ok)));
            for lane in lanes {
                let options = ConsumerOptions {
                    lane: (*lane).clone(),
                    window: WINDOW,
                    drain: self.config.shutdown_timeout,
                };
                let consumer = consumer::run(self.context.clone(), Arc::clone(&delivery), options, stop);
                services.push(Box::pin(consumer.map_err(AppError)));
            }
        }
        Ok(services)
    }

    fn producer_options(&self) -> ProducerOptions {
        // The embedded store tells cheaply whether anything changed, so it is asked more often.
        let poll = if self.context.store.kind() == "sqlite" { 7 } else { 20 };
        ProducerOptions {
            fresh_lane: self.config.lane.topic.clone(),
            batch: CLAIM,
            capacity: LANE_CAPACITY,
            poll: Duration::from_millis(poll),
            pacing: self.config.pacing,
        }
    }

    async fn delivery(&self, shares: Shares) -> Result<Arc<Delivery>> {
        let installation =
            self.context.store.installation().await.map_err(|error| AppError(error.to_string()))?;
        let options = DeliveryOptions {
            ca_file: self.config.request.ca_file.clone(),
            connections_max: shares.deliveries,
            ..DeliveryOptions::default()
        };
        let delivery = Delivery::new(self.context.clock.clone(), installation, options);
        delivery.map(Arc::new).map_err(|error| AppError(error.to_string()))
    }

    fn api_state(&self, address: SocketAddr) -> ApiState {
        let intake = Intake::new(
            Arc::clone(&self.context.store),
            self.context.clock.clone(),
            Arc::clone(&self.context.metrics),
            Arc::clone(&self.wake),
        );
        // One of these is there in every installation, and a question to the store from each consumer is saved.
        let tells_all = matches!(self.config.role, Role::Api | Role::Up | Role::Producer);
        ApiState::new(&self.context, intake, self.guard(address), tells_all)
    }

    /// What only this machine reaches asks for no keys.
    fn guard(&self, address: SocketAddr) -> Guard {
        let reached = !address.ip().to_canonical().is_loopback();
        if reached && self.config.listen.insecure {
            tracing::warn!(
                "AMS_INSECURE is set: whoever reaches {address} may send, read and change messages; \
                 unset it and make keys with `ams keys create`"
            );
        }
        let keyed = reached && !self.config.listen.insecure;
        let access = Access { keyed, reached, hosts: self.config.listen.names.clone() };
        Guard::new(Arc::clone(&self.context.store), self.context.clock.clone(), access)
    }
}

/// Listens, or says in a sentence why that is not possible.
///
/// # Errors
/// When the address is not ours or the port is in use.
pub async fn listen(host: &str, port: u16, setting: &str) -> Result<TcpListener> {
    TcpListener::bind((host, port)).await.map_err(|error| {
        AppError(format!("can't listen on {host}:{port}: {error}; set {setting} to a free port, or HOST to an address of this machine"))
    })
}

/// The address a listener has.
///
/// # Errors
/// When the system does not tell.
pub fn address(listener: &TcpListener) -> Result<SocketAddr> {
    listener.local_addr().map_err(|error| AppError(format!("the system does not tell our address: {error}")))
}

/// Opens the store that is configured.
///
/// # Errors
/// When the setting can't be used, or the embedded store's file can't be opened.
pub fn open_store(config: &StoreConfig) -> Result<Arc<dyn Store>> {
    let sentence = |error: StoreError| AppError(error.to_string());
    Ok(match config {
        StoreConfig::Sqlite(path) => Arc::new(SqliteStore::open(path).map_err(sentence)?),
        StoreConfig::Postgres(url) => {
            let options = PostgresOptions::parse(url).map_err(sentence)?;
            Arc::new(PostgresStore::open(&options).map_err(sentence)?)
        }
    })
}

/// Opens the queue that is configured; one in this process goes by `clock`.
///
/// # Errors
/// When a client setting can't be used.
pub fn open_queue(config: &QueueConfig, clock: &Clock) -> Result<Arc<dyn Queue>> {
    Ok(match config {
        QueueConfig::Embedded => Arc::new(EmbeddedQueue::new(4, clock.clone())),
        QueueConfig::Kafka { brokers, client } => {
            let options = KafkaOptions { brokers: brokers.clone(), client: client.clone() };
            Arc::new(KafkaQueue::open(options).map_err(|error| AppError(error.to_string()))?)
        }
    })
}

/// Opens the cache that is configured.
///
/// # Errors
/// When its URL can't be understood.
pub fn open_cache(config: &CacheConfig, clock: &Clock) -> Result<Arc<dyn Cache>> {
    Ok(match config {
        CacheConfig::Memory => Arc::new(MemoryCache::new(clock)),
        CacheConfig::Redis(url) => {
            Arc::new(RedisCache::open(url).map_err(|error| AppError(error.to_string()))?)
        }
    })
}

fn say_newer(newer: &[String]) {
    if !newer.is_empty() {
        tracing::info!(
            "the store is newer than this program, which may work on it: it has {}; upgrade this program soon",
            newer.join(", ")
        );
    }
}

fn role_name(role: Role) -> &'static str {
    match role {
        Role::Api => "api",
        Role::Producer => "producer",
        Role::Consumer => "consumer",
        Role::RetryConsumer => "retry-consumer",
        Role::Up => "up",
        Role::TestClient => "testclient",
        Role::Tool => "tool",
    }
}

fn hostname() -> String {
    std::fs::read_to_string("/proc/sys/kernel/hostname")
        .map_or_else(|_| "unknown".to_owned(), |name| name.trim().to_owned())
}
