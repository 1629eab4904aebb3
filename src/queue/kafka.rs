//! The queue on Apache Kafka, through librdkafka.
//!
//! One idempotent producer publishes each batch to one partition. Each subscription has one plain
//! thread that does nothing but poll (`poller`). A third kind of client, never subscribed, asks how
//! far a group has come. Broker and topics may come and go: clients reconnect by themselves, and those
//! that librdkafka declares dead are made anew.

mod log;
mod poller;
mod publisher;

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use async_trait::async_trait;
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::config::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::producer::Producer;
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};

use super::{Depth, LaneRecord, Queue, QueueError, RECORD_MAX, Result, Subscription};
use crate::store::LogPosition;

use log::LogContext;
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
    /// Clients that ask for positions, one for each group. A plain lock, held for a look-up only.
    offset_clients: Mutex<BTreeMap<String, Arc<BaseConsumer<LogContext>>>>,
}

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
        Ok(KafkaQueue { config, publisher, offset_clients: Mutex::default() })
    }

    /// The client that asks for `group`'s positions; it never joins the group.
    fn offset_client(&self, group: &str) -> Result<Arc<BaseConsumer<LogContext>>> {
        let mut offset_clients = self.offset_clients.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(offset_client) = offset_clients.get(group) {
            return Ok(Arc::clone(offset_client));
        }
        let mut config = self.config.clone();
        config
            .set("group.id", group)
            .set("enable.auto.commit", "false")
            .set("allow.auto.create.topics", "false");
        let offset_client: BaseConsumer<LogContext> =
            config.create_with_context(LogContext::default()).map_err(refused)?;
        let offset_client = Arc::new(offset_client);
        offset_clients.insert(group.to_owned(), Arc::clone(&offset_client));
        Ok(offset_client)
    }

    /// The lanes among `names` that do not exist.
    async fn missing(&self, names: &[String]) -> Result<Vec<String>> {
        let (offset_client, names) = (self.offset_client("ams")?, names.to_vec());
        blocking(move || {
            let mut missing = Vec::new();
            for name in names {
                if partitions(&offset_client, &name)? == 0 {
                    missing.push(name);
                }
            }
            Ok(missing)
        })
        .await
    }

    /// Whether these lanes are there and every partition of theirs is led.
    async fn answer(&self, lanes: &[String]) -> bool {
        let asked = lanes.iter().map(|lane| self.depth(lane, "ams"));
        let depths = futures_util::future::join_all(asked).await;
        depths.iter().all(|depth| depth.as_ref().is_ok_and(|depth| !depth.is_empty()))
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
        for _ in 0..50 {
            if self.answer(lanes).await {
                return Ok(());
            }
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        Err(QueueError::Unavailable(format!("the lanes {} are not there yet", missing.join(", "))))
    }

    async fn publish(&self, lane: &str, records: Vec<LaneRecord>) -> Result<LogPosition> {
        let count = match self.publisher.known_partitions(lane) {
            Some(count) => count,
            None => {
                let (offset_client, name) = (self.offset_client("ams")?, lane.to_owned());
                let mut count = blocking(move || partitions(&offset_client, &name)).await?;
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
        poller::subscribe(&self.config, lane, group, window, self.offset_client(group)?)
    }

    async fn depth(&self, lane: &str, group: &str) -> Result<Vec<Depth>> {
        let (offset_client, name) = (self.offset_client(group)?, lane.to_owned());
        let depth = blocking(move || depth(&offset_client, &name)).await?;
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
        let offset_client = self.offset_client("ams")?;
        blocking(move || offset_client.fetch_metadata(Some("ams-ping"), Duration::from_secs(1)).map(drop))
            .await
    }
}

/// How many partitions a lane has; none when it does not exist.
fn partitions(offset_client: &BaseConsumer<LogContext>, lane: &str) -> std::result::Result<i32, KafkaError> {
    let metadata = offset_client.fetch_metadata(Some(lane), ANSWER)?;
    let topic = metadata.topics().iter().find(|topic| topic.name() == lane && topic.error().is_none());
    Ok(topic.map_or(0, |topic| i32::try_from(topic.partitions().len()).unwrap_or(i32::MAX)))
}

fn depth(
    offset_client: &BaseConsumer<LogContext>,
    lane: &str,
) -> std::result::Result<Vec<Depth>, KafkaError> {
    // Nobody reads with this client. What it reports of a broker that is away would be kept for ever.
    while offset_client.poll(Duration::ZERO).is_some() {}
    let count = partitions(offset_client, lane)?;
    if count == 0 {
        return Ok(Vec::new());
    }
    let all = |offset| {
        let mut list = TopicPartitionList::with_capacity(count as usize);
        for partition in 0..count {
            list.add_partition_offset(lane, partition, offset)?;
        }
        Ok::<_, KafkaError>(list)
    };
    let committed = offset_client.committed_offsets(all(Offset::Invalid)?, ANSWER)?;
    // To the question "which offset has this time?" the end and the beginning are legal times; one
    // answer covers all partitions.
    let ends = offset_client.offsets_for_times(all(Offset::End)?, ANSWER)?;
    let firsts = offset_client.offsets_for_times(all(Offset::Beginning)?, ANSWER)?;
    depths(lane, count, [&committed, &firsts, &ends])
}

/// Every partition's depth, from its committed position, its first offset and its end. A partition whose end the broker
/// does not tell (its leader changes) is no lost one: then nothing is known of the lane.
fn depths(
    lane: &str,
    count: i32,
    [committed, firsts, ends]: [&TopicPartitionList; 3],
) -> std::result::Result<Vec<Depth>, KafkaError> {
    let at = |list: &TopicPartitionList, partition| match list
        .find_partition(lane, partition)
        .map(|found| found.offset())
    {
        Some(Offset::Offset(offset)) => Some(offset),
        _ => None,
    };
    let depth = |partition| {
        let end = at(ends, partition).ok_or(KafkaError::OffsetFetch(RDKafkaErrorCode::LeaderNotAvailable))?;
        let first = at(firsts, partition).unwrap_or(0);
        // A position past the end is one of a log that was there before: who stands there is sent to the start.
        let position = at(committed, partition).filter(|at| *at <= end).unwrap_or(first).max(first);
        Ok(Depth { partition, position, end })
    };
    (0..count).map(depth).collect()
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

    #[test]
    fn a_partition_without_a_leader_is_no_lost_one() {
        let list = |offsets: [Offset; 2]| {
            let mut list = TopicPartitionList::new();
            for (partition, offset) in (0..).zip(offsets) {
                list.add_partition_offset("lane", partition, offset).unwrap();
            }
            list
        };
        let committed = list([Offset::Offset(4), Offset::Invalid]);
        let firsts = list([Offset::Offset(1), Offset::Offset(2)]);
        let known = list([Offset::Offset(9), Offset::Offset(3)]);
        let depth = |partition, position, end| Depth { partition, position, end };
        let depths_of = |ends: &TopicPartitionList| depths("lane", 2, [&committed, &firsts, ends]);
        assert_eq!(depths_of(&known).unwrap(), [depth(0, 4, 9), depth(1, 2, 3)]);
        assert!(depths_of(&list([Offset::Offset(9), Offset::Invalid])).is_err());
    }

    #[tokio::test]
    async fn brokers_that_are_away_are_unavailable() {
        let queue = open("client.id", "test").unwrap();
        assert!(matches!(queue.ping().await, Err(QueueError::Unavailable(_))));
    }
}

#[cfg(test)]
mod real;
