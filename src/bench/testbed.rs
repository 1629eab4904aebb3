//! Where the benchmark runs: the parts that are configured, or embedded ones in a folder of its own. Everything that it
//! makes there carries its name and is removed at the end: databases, topics, groups, answers, files.

use std::path::{Path, PathBuf};
use std::time::Duration;

use rdkafka::ClientConfig;
use rdkafka::admin::{AdminClient, AdminOptions};
use rdkafka::client::DefaultClientContext;
use rdkafka::consumer::{BaseConsumer, Consumer};
use redis::aio::MultiplexedConnection;

use super::cpu::{Watched, named};
use super::failed;
use crate::app::{AppError, Result};
use crate::config::{CacheConfig, Config, QueueConfig, StoreConfig};
use crate::store::postgres::Scratch;

/// How long the broker may take to name or remove what is there.
const ANSWER: Duration = Duration::from_secs(20);
/// Databases that a Redis has unless it is told otherwise.
const REDIS_DATABASES: i64 = 16;

pub(super) struct Testbed {
    config: Config,
    folder: PathBuf,
    name: String,
    /// A database of Redis's that was empty when the benchmark began.
    redis: Option<String>,
}

impl Testbed {
    /// The full stack when PostgreSQL and Kafka are configured, else embedded parts.
    ///
    /// # Errors
    /// When the folder can't be made, or Redis is configured and can't be used.
    pub(super) async fn new(config: &Config) -> Result<Testbed> {
        let name = format!("ams_bench_{}", std::process::id());
        let folder = std::env::current_dir()
            .and_then(|here| std::path::absolute(here.join("ams-data").join(&name)))
            .and_then(|folder| std::fs::create_dir_all(&folder).map(|()| folder))
            .map_err(|error| failed("the folder ams-data can't be made here")(&error))?;
        let mut testbed = Testbed { config: config.clone(), folder, name, redis: None };
        if let (true, CacheConfig::Redis(url)) = (testbed.is_full(), &testbed.config.cache) {
            testbed.redis = Some(empty_database(url).await?);
        }
        Ok(testbed)
    }

    /// Whether it has PostgreSQL and Kafka.
    pub(super) fn is_full(&self) -> bool {
        let (store, queue) = (&self.config.store, &self.config.queue);
        matches!((store, queue), (StoreConfig::Postgres(_), QueueConfig::Kafka { .. }))
    }

    pub(super) fn kind(&self) -> &'static str {
        if self.is_full() { "full" } else { "embedded" }
    }

    /// Where files and the services' working folder are.
    pub(super) fn folder(&self) -> &Path {
        &self.folder
    }

    /// A name that tells what it is for, and whose it is.
    pub(super) fn name(&self, what: &str) -> String {
        format!("{}_{what}", self.name)
    }

    /// The URL of the benchmark's own database of Redis.
    pub(super) fn redis(&self) -> Option<&str> {
        self.redis.as_deref()
    }

    /// Makes a database on the configured server.
    pub(super) async fn database(&self, what: &str) -> Result<Scratch> {
        let StoreConfig::Postgres(url) = &self.config.store else {
            return Err(AppError("a database is made on the full stack only".to_owned()));
        };
        let made = Scratch::create(url, &self.name(what)).await;
        made.map_err(|error| failed("the benchmark's database can't be made")(&error))
    }

    /// How clients of the broker are configured.
    pub(super) fn kafka(&self) -> ClientConfig {
        let mut config = ClientConfig::new();
        if let QueueConfig::Kafka { brokers, client } = &self.config.queue {
            config.set("bootstrap.servers", brokers);
            for (key, value) in client {
                config.set(key, value);
            }
        }
        config
    }

    /// What the services have to know of the broker, as settings.
    pub(super) fn kafka_settings(&self) -> Vec<(&'static str, String)> {
        match &self.config.queue {
            QueueConfig::Kafka { brokers, client } if self.is_full() => {
                let mut settings = crate::config::kafka_client_settings(client);
                settings.push(("KAFKA_BROKERS", brokers.clone()));
                settings
            }
            _ => Vec::new(),
        }
    }

    /// The processes of the parts on this machine.
    pub(super) fn parts(&self) -> Vec<Watched> {
        if !self.is_full() {
            return Vec::new();
        }
        let parts = [("postgres", "postgres"), ("java", "kafka"), ("redis-server", "redis")];
        parts.into_iter().flat_map(|(command, name)| named(command, name)).collect()
    }

    /// Removes what was made. Databases are gone already unless something failed.
    ///
    /// # Errors
    /// When something stays behind; the sentence says what.
    pub(super) async fn clean_up(self) -> Result<()> {
        if let (true, StoreConfig::Postgres(url)) = (self.is_full(), &self.config.store) {
            let removed = Scratch::remove_all(url, &self.name("")).await;
            removed.map_err(|error| failed("databases of the benchmark can't be removed")(&error))?;
        }
        if let Some(url) = &self.redis {
            let mut connection = connect(url).await?;
            let emptied = redis::cmd("FLUSHDB").arg("ASYNC").query_async::<()>(&mut connection).await;
            emptied.map_err(|error| failed("the benchmark's answers stay in Redis")(&error))?;
        }
        std::fs::remove_dir_all(&self.folder)
            .map_err(|error| failed(&format!("{} stays behind", self.folder.display()))(&error))?;
        // Last, because a group whose members were killed stays for as long as the broker waits for them.
        if self.is_full() { self.remove_topics().await } else { Ok(()) }
    }

    async fn remove_topics(&self) -> Result<()> {
        let (config, prefix) = (self.kafka(), self.name(""));
        let found = tokio::task::spawn_blocking(move || topics_and_groups(&config, &prefix)).await;
        let (topics, groups) = found
            .map_err(|error| failed("the thread that asks the broker failed")(&error))?
            .map_err(|error| failed("the benchmark's topics can't be named")(&error))?;
        let wrong = |error| failed("topics and groups of the benchmark can't be removed")(&error);
        let admin: AdminClient<DefaultClientContext> = self.kafka().create().map_err(wrong)?;
        let options = AdminOptions::new().operation_timeout(Some(ANSWER));
        let mut removed = Vec::new();
        if !topics.is_empty() {
            removed.extend(admin.delete_topics(&texts(&topics), &options).await.map_err(wrong)?);
        }
        if !groups.is_empty() {
            removed.extend(admin.delete_groups(&texts(&groups), &options).await.map_err(wrong)?);
        }
        match removed.into_iter().find_map(std::result::Result::err) {
            Some((name, code)) => Err(AppError(format!("{name} stays with the broker: {code}"))),
            None => Ok(()),
        }
    }
}

fn texts(names: &[String]) -> Vec<&str> {
    names.iter().map(String::as_str).collect()
}

type Names = (Vec<String>, Vec<String>);

fn topics_and_groups(
    config: &ClientConfig,
    prefix: &str,
) -> std::result::Result<Names, rdkafka::error::KafkaError> {
    let client: BaseConsumer = config.create()?;
    let ours = |name: &&str| name.starts_with(prefix);
    let metadata = client.fetch_metadata(None, ANSWER)?;
    let topics = metadata.topics().iter().map(|topic| topic.name()).filter(ours).map(str::to_owned).collect();
    let list = client.fetch_group_list(None, ANSWER)?;
    let groups = list.groups().iter().map(|group| group.name()).filter(ours).map(str::to_owned).collect();
    Ok((topics, groups))
}

async fn connect(url: &str) -> Result<MultiplexedConnection> {
    // redis asks rustls for the process's default provider; a second installation is refused, and harmless.
    let _ = rustls::crypto::ring::default_provider().install_default();
    let wrong = |error| failed("REDIS_URL can't be used")(&error);
    let client = redis::Client::open(url).map_err(wrong)?;
    client.get_multiplexed_async_connection().await.map_err(wrong)
}

/// The URL of the last database of the server that holds nothing: an installation's answers have the same keys as ours.
async fn empty_database(url: &str) -> Result<String> {
    let wrong = |error| failed("Redis can't be asked what it holds")(&error);
    let mut url = url::Url::parse(url).map_err(|error| failed("REDIS_URL can't be used")(&error))?;
    for number in (0..REDIS_DATABASES).rev() {
        url.set_path(&number.to_string());
        let mut connection = connect(url.as_str()).await?;
        let size: i64 = redis::cmd("DBSIZE").query_async(&mut connection).await.map_err(wrong)?;
        if size == 0 {
            return Ok(url.into());
        }
    }
    Err(AppError(format!(
        "each of the {REDIS_DATABASES} databases of this Redis holds something; empty one for the benchmark, or unset REDIS_URL"
    )))
}
