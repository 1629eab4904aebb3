//! The queue on Apache Kafka, through librdkafka.
//!
//! One idempotent producer publishes each batch to one partition. Each subscription has one plain
//! thread that does nothing but poll (`poller`). A third kind of client, never subscribed, asks how
//! far a group has come (`positions`). Broker and topics may come and go: clients reconnect by themselves, and one
//! that does not do its work for long, or that librdkafka declares dead, is made anew.

mod log;
mod poller;
mod positions;
mod publisher;
mod trackers;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::config::ClientConfig;
use rdkafka::consumer::Consumer;
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::producer::Producer;

use super::{Depth, LaneRecord, Queue, QueueError, RECORD_MAX, Result, Subscription};
use crate::store::LogPosition;

use positions::Positions;
use publisher::Publisher;

/// Partitions of a lane that we create: enough for a dozen consumers.
const PARTITIONS: i32 = 12;
/// The longest a question to the broker may take.
const ANSWER: Duration = Duration::from_secs(5);

/// Where the brokers are, and what else their client needs.
#[derive(Clone, Debug)]
pub struct KafkaOptions {
    /// `host:port,host:port`.
    pub brokers: String,
    /// Further settings of librdkafka, for TLS and SASL.
    pub client: BTreeMap<String, String>,
}

/// A queue on a Kafka cluster.
pub struct KafkaQueue {
    config: ClientConfig,
    publisher: Publisher,
    positions: Arc<Positions>,
}

/// The group that questions are asked for which are no group's.
const NO_GROUP: &str = "ams";

impl KafkaQueue {
    /// A queue on these brokers, which need not be up yet.
    ///
    /// # Errors
    /// When the client refuses a setting.
    pub fn open(options: KafkaOptions) -> Result<KafkaQueue> {
        let mut config = ClientConfig::new();
        config
            .set("bootstrap.servers", &options.brokers)
            .set("client.id", "ams")
            .set("socket.timeout.ms", "10000")
            .set("reconnect.backoff.max.ms", "2000")
            .set("topic.metadata.refresh.interval.ms", "5000")
            .set("topic.metadata.propagation.max.ms", "1000")
            .set("message.max.bytes", RECORD_MAX.to_string())
            .set("log.connection.close", "false");
        for (key, value) in &options.client {
            config.set(key, value);
        }
        let publisher = Publisher::new(&config).map_err(refused)?;
        let positions = Arc::new(Positions::new(&config));
        Ok(KafkaQueue { config, publisher, positions })
    }

    /// The lanes among `names` that do not exist.
    async fn missing(&self, names: &[String]) -> Result<Vec<String>> {
        let mut missing = Vec::new();
        for name in names {
            if self.positions.partitions(name).await? == 0 {
                missing.push(name.clone());
            }
        }
        Ok(missing)
    }

    /// Waits until these lanes are there and every partition of theirs is led.
    async fn led(&self, lanes: &[String]) {
        loop {
            let asked = lanes.iter().map(|lane| self.depth(lane, NO_GROUP));
            let depths = futures_util::future::join_all(asked).await;
            if depths.iter().all(|depth| depth.as_ref().is_ok_and(|depth| !depth.is_empty())) {
                return;
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }
}

#[async_trait]
impl Queue for KafkaQueue {
    fn kind(&self) -> &'static str {
        "kafka"
    }

    async fn ensure(&self, lanes: &[String]) -> Result<()> {
        let missing = self.missing(lanes).await?;
        if missing.is_empty() {
            return Ok(());
        }
        let admin: AdminClient<DefaultClientContext> = self.config.create().map_err(refused)?;
        let record_max = RECORD_MAX.to_string();
        let topics: Vec<_> = missing
            .iter()
            .map(|name| {
                NewTopic::new(name, PARTITIONS, TopicReplication::Fixed(-1))
                    .set("max.message.bytes", &record_max)
            })
            .collect();
        let options = AdminOptions::new().operation_timeout(Some(ANSWER)).request_timeout(Some(ANSWER));
        let made = admin.create_topics(&topics, &options).await.map_err(unavailable)?;
        for topic in made {
            match topic {
                Ok(name) => {
                    tracing::info!(lane = name, "created the lane {name} with {PARTITIONS} partitions")
                }
                Err((_, RDKafkaErrorCode::TopicAlreadyExists)) => {}
                Err((name, code)) => {
                    return Err(QueueError::Unavailable(format!(
                        "the lane {name} could not be created: {code}"
                    )));
                }
            }
        }
        self.publisher.forget(lanes);
        // The brokers tell one another in their own time, and one that is to lead a partition may not do so yet.
        let led = tokio::time::timeout(ANSWER, self.led(lanes)).await;
        led.map_err(|_| {
            QueueError::Unavailable(format!("the lanes {} are not there yet", missing.join(", ")))
        })
    }

    async fn publish(&self, lane: &str, records: Vec<LaneRecord>) -> Result<LogPosition> {
        let count = match self.publisher.known_partitions(lane) {
            Some(count) => count,
            None => {
                let mut count = self.positions.partitions(lane).await?;
                if count == 0 {
                    self.ensure(&[lane.to_owned()]).await?;
                    count = PARTITIONS;
                }
                self.publisher.know(lane, count);
                count
            }
        };
        let published = self.publisher.publish(lane, count, records).await;
        if published.is_err() {
            self.publisher.forget(&[lane.to_owned()]);
        }
        published
    }

    async fn subscribe(&self, lane: &str, group: &str, window: usize) -> Result<Subscription> {
        poller::subscribe(&self.config, lane, group, window, Arc::clone(&self.positions))
    }

    async fn depth(&self, lane: &str, group: &str) -> Result<Vec<Depth>> {
        let depth = self.positions.depth(lane, group).await?;
        let count = i32::try_from(depth.len()).unwrap_or(i32::MAX);
        if count > 0 && self.publisher.known_partitions(lane) != Some(count) {
            // Whoever asks for a lane's depth will publish there: the first batch must not wait for this, and partitions that
            // were added take their share.
            let (client, name) = (self.publisher.client(), lane.to_owned());
            blocking(move || client.client().fetch_metadata(Some(&name), ANSWER).map(drop)).await?;
            self.publisher.know(lane, count);
        }
        Ok(depth)
    }

    async fn ping(&self) -> Result<()> {
        let ping = |client: &positions::Client| {
            client.fetch_metadata(Some("ams-ping"), Duration::from_secs(1)).map(drop)
        };
        self.positions.ask(NO_GROUP, ping).await
    }
}

/// Locks what a panic elsewhere can't have left half done.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs a call that blocks on a thread that may be blocked.
async fn blocking<T: Send + 'static>(
    call: impl FnOnce() -> std::result::Result<T, KafkaError> + Send + 'static,
) -> Result<T> {
    match tokio::task::spawn_blocking(call).await {
        Ok(answer) => answer.map_err(unavailable),
        Err(error) => Err(QueueError::Unavailable(error.to_string())),
    }
}

fn refused(error: KafkaError) -> QueueError {
    match error {
        KafkaError::ClientConfig(_, why, key, value) => {
            let value = if key.contains("password") { "(hidden)" } else { &value };
            QueueError::Refused(format!("the Kafka setting {key} is `{value}`: {why}; mend or unset it"))
        }
        other => QueueError::Refused(other.to_string()),
    }
}

/// What a failed publishing means for its caller.
fn unpublished(error: KafkaError) -> QueueError {
    match error.rdkafka_error_code() {
        Some(RDKafkaErrorCode::MessageSizeTooLarge) => QueueError::TooLarge(error.to_string()),
        Some(
            RDKafkaErrorCode::TopicAuthorizationFailed
            | RDKafkaErrorCode::ClusterAuthorizationFailed
            | RDKafkaErrorCode::InvalidTopic
            | RDKafkaErrorCode::PolicyViolation
            | RDKafkaErrorCode::InvalidRecord,
        ) => QueueError::Refused(error.to_string()),
        _ => unavailable(error),
    }
}

fn unavailable(error: KafkaError) -> QueueError {
    QueueError::Unavailable(error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn open(key: &str, value: &str) -> Result<KafkaQueue> {
        let client = BTreeMap::from([(key.to_owned(), value.to_owned())]);
        KafkaQueue::open(KafkaOptions { brokers: "127.0.0.1:1".into(), client })
    }

    #[tokio::test]
    async fn a_bad_client_setting_is_named_and_a_password_is_not_shown() {
        for (key, value) in [("security.protocol", "smoke"), ("no.such.setting", "1")] {
            let Err(QueueError::Refused(sentence)) = open(key, value) else { panic!("{key} was taken") };
            assert!(sentence.contains(key), "{sentence}");
        }
    }

    #[tokio::test]
    async fn tls_and_sasl_settings_reach_the_client() {
        let settings = [
            ("security.protocol", "sasl_ssl"),
            ("sasl.mechanisms", "SCRAM-SHA-512"),
            ("sasl.username", "me"),
            ("sasl.password", "secret"),
        ];
        let client = settings.map(|(key, value)| (key.to_owned(), value.to_owned())).into();
        let queue = KafkaQueue::open(KafkaOptions { brokers: "127.0.0.1:1".into(), client }).unwrap();
        assert_eq!(queue.config.get("sasl.mechanisms"), Some("SCRAM-SHA-512"));
    }

    #[tokio::test]
    async fn brokers_that_are_away_are_unavailable() {
        let queue = open("client.id", "test").unwrap();
        assert!(matches!(queue.ping().await, Err(QueueError::Unavailable(_))));
    }
}

#[cfg(test)]
mod real;
