//! How far groups have come.
//!
//! One client for each group asks, and never joins it. A client that has had no answer for long is made anew: after
//! an outage it may wait for a coordinator that is no more.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use rdkafka::config::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};

use super::log::LogContext;
use super::{ANSWER, NO_GROUP, blocking, lock, refused};
use crate::clock::{Clock, Stopwatch};
use crate::queue::{Depth, QueueError, Result};

/// A client that has had no answer for so long is made anew: two questions that run out of time.
const SILENT: Duration = Duration::from_secs(10);

/// The longest a question may take: its calls end by themselves sooner, unless librdkafka is stuck.
const QUESTION_MAX: Duration = Duration::from_secs(4 * ANSWER.as_secs() + 1);

/// How long to look for what a client reports. Without any time one report that is no error ends the search.
const REPORTS: Duration = Duration::from_millis(1);

/// A client that asks.
pub(super) type Client = BaseConsumer<LogContext>;

/// The clients that ask, one for each group.
pub(super) struct Positions {
    config: ClientConfig,
    clock: Clock,
    /// A plain lock, held for a look-up only.
    clients: Mutex<BTreeMap<String, Asking>>,
}

struct Asking {
    client: Arc<Client>,
    /// Since when no question was answered.
    silent: Option<Stopwatch>,
}

impl Positions {
    pub(super) fn new(config: &ClientConfig) -> Positions {
        let mut config = config.clone();
        config.set("enable.auto.commit", "false").set("allow.auto.create.topics", "false");
        Positions { config, clock: Clock::system(), clients: Mutex::default() }
    }

    /// How far `group` has come on a lane; empty when the lane does not exist.
    pub(super) async fn depth(&self, lane: &str, group: &str) -> Result<Vec<Depth>> {
        let lane = lane.to_owned();
        self.ask(group, move |client| depth(client, &lane)).await
    }

    /// How many partitions a lane has; none when it does not exist.
    pub(super) async fn partitions(&self, lane: &str) -> Result<i32> {
        let lane = lane.to_owned();
        self.ask(NO_GROUP, move |client| partitions(client, &lane)).await
    }

    /// Asks a question with `group`'s client.
    pub(super) async fn ask<T: Send + 'static>(
        &self,
        group: &str,
        question: impl FnOnce(&Client) -> std::result::Result<T, KafkaError> + Send + 'static,
    ) -> Result<T> {
        let client = self.client(group)?;
        // The client is dropped there, too, which may take its time.
        let answer = tokio::time::timeout(QUESTION_MAX, blocking(move || question(&client))).await;
        let answer = answer
            .unwrap_or_else(|_| Err(QueueError::Unavailable(format!("no answer within {QUESTION_MAX:?}"))));
        let silent = self.note(group, answer.is_ok());
        if let (Some(client), Err(error)) = (silent, &answer) {
            tracing::warn!(target: "kafka", "the client that asks for the positions of {group} is made anew: {error}");
            tokio::task::spawn_blocking(move || drop(client));
        }
        answer
    }

    fn client(&self, group: &str) -> Result<Arc<Client>> {
        let mut clients = self.clients();
        if let Some(asking) = clients.get(group) {
            return Ok(Arc::clone(&asking.client));
        }
        let mut config = self.config.clone();
        config.set("group.id", group);
        let client: Client = config.create_with_context(LogContext::default()).map_err(refused)?;
        let client = Arc::new(client);
        clients.insert(group.to_owned(), Asking { client: Arc::clone(&client), silent: None });
        Ok(client)
    }

    /// Notes whether a question was answered. Returns a client that has been silent for too long: the next question
    /// makes a new one.
    fn note(&self, group: &str, answered: bool) -> Option<Arc<Client>> {
        let mut clients = self.clients();
        let asking = clients.get_mut(group)?;
        if answered {
            asking.silent = None;
            return None;
        }
        let silent = asking.silent.get_or_insert_with(|| self.clock.stopwatch());
        if silent.elapsed() < SILENT {
            return None;
        }
        clients.remove(group).map(|asking| asking.client)
    }

    fn clients(&self) -> MutexGuard<'_, BTreeMap<String, Asking>> {
        lock(&self.clients)
    }
}

/// How many partitions a lane has; none when it does not exist.
fn partitions(client: &Client, lane: &str) -> std::result::Result<i32, KafkaError> {
    let metadata = client.fetch_metadata(Some(lane), ANSWER)?;
    let topic = metadata.topics().iter().find(|topic| topic.name() == lane && topic.error().is_none());
    Ok(topic.map_or(0, |topic| i32::try_from(topic.partitions().len()).unwrap_or(i32::MAX)))
}

fn depth(client: &Client, lane: &str) -> std::result::Result<Vec<Depth>, KafkaError> {
    // Nobody reads with this client. What it reports of a broker that is away would be kept for ever.
    while client.poll(REPORTS).is_some() {}
    let count = partitions(client, lane)?;
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
    let committed = client.committed_offsets(all(Offset::Invalid)?, ANSWER)?;
    // To the question "which offset has this time?" the end and the beginning are legal times; one
    // answer covers all partitions.
    let ends = client.offsets_for_times(all(Offset::End)?, ANSWER)?;
    let firsts = client.offsets_for_times(all(Offset::Beginning)?, ANSWER)?;
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Timestamp;

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

    #[test]
    fn a_client_that_has_been_silent_for_long_is_given_up() {
        let clock = Clock::manual(Timestamp::EPOCH);
        let positions = Positions { clock: clock.clone(), ..Positions::new(&ClientConfig::new()) };
        let first = positions.client("group").unwrap();
        let gives_up = |answered| positions.note("group", answered).is_some();
        for (later, answered, given_up) in
            [(0, false, false), (9, false, false), (0, true, false), (20, false, false), (9, false, false)]
        {
            clock.advance(Duration::from_secs(later));
            assert_eq!(gives_up(answered), given_up);
            assert!(Arc::ptr_eq(&first, &positions.client("group").unwrap()));
        }
        clock.advance(Duration::from_secs(1));
        assert!(gives_up(false));
        assert!(!Arc::ptr_eq(&first, &positions.client("group").unwrap()), "the next question has a new one");
        assert!(!gives_up(false), "which has its time");
    }
}
