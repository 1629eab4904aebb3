//! Lanes that are made anew while consumers run. The new log may have grown to a consumer's old position, or past
//! it, before the consumer looks: then nothing tells the consumer that there are records before it.

use std::time::Duration;

use ams::testclient::TestClientOptions;
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::config::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer};

use crate::harness::*;

/// Messages of each test: more than a lane takes at once.
const MESSAGES: i64 = 20_000;
/// How soon everything must be delivered once the new lane is there and all processes run.
const DELIVERED: Duration = Duration::from_secs(30);

fn kafka(stack: &Stack) -> ClientConfig {
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", &stack.environment["KAFKA_BROKERS"]).set("group.id", "reader");
    config
}

fn fresh(stack: &Stack) -> String {
    format!("{}-fresh", stack.name)
}

/// Records that were ever written to the fresh lane as it is now.
fn written(reader: &BaseConsumer, topic: &str) -> i64 {
    let patience = Duration::from_secs(2);
    let Ok(metadata) = reader.fetch_metadata(Some(topic), patience) else { return 0 };
    let partitions = metadata.topics().iter().flat_map(|topic| topic.partitions().iter().map(|p| p.id()));
    partitions.map(|id| reader.fetch_watermarks(topic, id, patience).map_or(0, |(_, end)| end)).sum()
}

/// Waits until so many records are on the new lane, or until nothing more comes.
async fn filled(stack: &Stack, count: i64) {
    let reader: BaseConsumer = kafka(stack).create().unwrap();
    let (topic, mut before, mut same) = (fresh(stack), 0, 0);
    until("the new lane is filled", Duration::from_secs(40), async || {
        let now = written(&reader, &topic);
        same = if now > 0 && now == before { same + 1 } else { 0 };
        before = now;
        now >= count || same > 40
    })
    .await;
    println!("{before} are written again");
}

async fn delete(stack: &Stack) {
    let admin: AdminClient<DefaultClientContext> = kafka(stack).create().unwrap();
    let deleted = admin.delete_topics(&[&fresh(stack)], &AdminOptions::new()).await.unwrap();
    assert!(deleted.iter().all(Result::is_ok), "{deleted:?}");
}

/// Creates the fresh lane as soon as its predecessor has gone, unless the producer was quicker.
async fn create(stack: &Stack, partitions: i32) {
    let admin: AdminClient<DefaultClientContext> = kafka(stack).create().unwrap();
    let topic = fresh(stack);
    until("the topic is made anew", Duration::from_secs(20), async || {
        let topic = NewTopic::new(&topic, partitions, TopicReplication::Fixed(1));
        let made = admin.create_topics(&[topic], &AdminOptions::new()).await.unwrap();
        made.iter().all(Result::is_ok)
    })
    .await;
}

fn wipe() {
    services("stop", "kafka");
    services("wipe", "kafka");
    services("start", "kafka");
}

struct Bench {
    receiver: Receiver,
    stack: Stack,
    producer: Service,
    consumer: Service,
    _retry: Service,
}

impl Bench {
    /// A stack that has delivered `delivered` of its messages.
    async fn start(name: &str, delivered: usize) -> Bench {
        let latency = Duration::from_millis(20);
        let receiver = Receiver::start(TestClientOptions { latency, ..TestClientOptions::default() }).await;
        let mut stack = Stack::new(name, &receiver).await;
        if let Some(level) = setting("AMS_TEST_LOG_LEVEL") {
            stack.environment.insert("LOG_LEVEL".into(), level);
        }
        let [producer, consumer, retry] =
            ["producer", "consumer", "retry-consumer"].map(|verb| stack.start(verb, &[]));
        stack.insert(MESSAGES).await;
        until("it runs", Duration::from_secs(30), async || receiver.arrivals() >= delivered).await;
        Bench { receiver, stack, producer, consumer, _retry: retry }
    }

    /// Restarts the broker in good order, and waits until that many more are delivered. The leaders of a lane that
    /// is made anew later have a lower epoch than those that the clients know then, and librdkafka ignores them.
    async fn restart_kafka(&self, more: usize) {
        services("stop", "kafka");
        services("start", "kafka");
        let before = self.receiver.arrivals();
        until("it goes on", Duration::from_secs(30), async || self.receiver.arrivals() >= before + more)
            .await;
    }

    /// Freezes the consumer, and says how many attempts it had in flight at most: of what it had begun, as many as
    /// the endpoint's setting allows.
    async fn freeze_consumer(&self) -> usize {
        self.consumer.signal("-STOP");
        let statement = "select in_flight_max::bigint from endpoints where name = 'default'";
        let most: i64 = self.stack.sql().await.query_one(statement, &[]).await.unwrap().get(0);
        usize::try_from(most.min(self.stack.processing().await)).unwrap()
    }

    /// All is delivered, once each; but what was in flight for longer than its deadline may be sent again.
    async fn settle(self, what: &str, overdue: usize) {
        let soon = Duration::from_secs(90);
        let watch = ams::clock::Clock::system().stopwatch();
        let ended = self.stack.all_final(MESSAGES, soon).await;
        let took = watch.elapsed();
        let lost = usize::try_from(MESSAGES).unwrap() - self.receiver.accepted().len();
        let repeats = self.receiver.duplicates();
        println!(
            "{what}: all delivered {took:.1?} later, lost {lost}, repeats {repeats} (at most {overdue})"
        );
        assert_eq!((ended.get("sent"), lost), (Some(&MESSAGES), 0), "{what}: {ended:?}");
        assert!(repeats <= overdue, "{what}: {repeats} repeats");
        assert!(took < DELIVERED, "{what}: only after {took:?}");
        self.receiver.assert_ids_are_stable();
    }
}

#[tokio::test]
async fn kafka_is_wiped_at_any_moment() {
    for delivered in [200, 4_000, 9_000] {
        let bench = Bench::start("wiped_at", delivered).await;
        tool("redis-cli", &["-u", &bench.stack.environment["REDIS_URL"], "flushall"]);
        wipe();
        bench.settle(&format!("wiped after {delivered} deliveries"), 0).await;
    }
}

#[tokio::test]
async fn kafka_is_wiped_after_a_restart() {
    for delivered in [200, 6_000] {
        let bench = Bench::start("wiped_later", delivered).await;
        bench.restart_kafka(1_000).await;
        wipe();
        bench.settle(&format!("wiped after {delivered} deliveries and a restart"), 0).await;
    }
}

#[tokio::test]
async fn kafka_is_wiped_and_the_lane_filled_again_before_the_consumer_looks() {
    for (delivered, written) in [(200, 4_000), (4_000, 12_000)] {
        let bench = Bench::start("wiped_unseen", delivered).await;
        // It is frozen for longer than an attempt may take.
        let in_flight = bench.freeze_consumer().await;
        wipe();
        filled(&bench.stack, written).await;
        bench.consumer.signal("-CONT");
        bench.settle(&format!("wiped unseen after {delivered} deliveries"), in_flight).await;
    }
}

#[tokio::test]
async fn a_lane_is_deleted_and_filled_again_before_the_consumer_looks() {
    for (delivered, written, restarted) in [(200, 4_000, false), (4_000, 12_000, false), (200, 12_000, true)]
    {
        let bench = Bench::start("deleted_unseen", delivered).await;
        if restarted {
            bench.restart_kafka(1_000).await;
        }
        let in_flight = bench.freeze_consumer().await;
        delete(&bench.stack).await;
        filled(&bench.stack, written).await;
        bench.consumer.signal("-CONT");
        let what = format!("deleted unseen after {delivered} deliveries, restarted: {restarted}");
        bench.settle(&what, in_flight).await;
    }
}

#[tokio::test]
async fn a_lane_is_made_anew_with_fewer_or_more_partitions() {
    for partitions in [3, 20] {
        let bench = Bench::start("resized", 4_000).await;
        bench.restart_kafka(1_000).await;
        bench.producer.signal("-STOP");
        delete(&bench.stack).await;
        create(&bench.stack, partitions).await;
        bench.producer.signal("-CONT");
        bench.settle(&format!("made anew with {partitions} partitions"), 0).await;
    }
}
