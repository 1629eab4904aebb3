//! Amnesia and outages of Redis, Kafka and PostgreSQL under load.

use std::time::Duration;

use ams::testclient::TestClientOptions;
use rdkafka::admin::{AdminClient, AdminOptions};
use rdkafka::client::DefaultClientContext;
use rdkafka::config::ClientConfig;
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer};
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};

use crate::harness::*;
use crate::kills::{Load, rows};
use crate::proxy::{Fault, Proxy};

/// Services that run a stack.
fn start(stack: &Stack) -> Vec<Service> {
    ["producer", "consumer", "retry-consumer"].iter().map(|verb| stack.start(verb, &[])).collect()
}

async fn receiver(latency_ms: u64) -> Receiver {
    let latency = Duration::from_millis(latency_ms);
    Receiver::start(TestClientOptions { latency, ..TestClientOptions::default() }).await
}

/// Ends the load, waits until all is final, and counts.
async fn settle(what: &str, stack: &Stack, receiver: &Receiver, repeats_allowed: usize) {
    let count = rows(stack).await;
    let ended = stack.all_final(count, Duration::from_secs(120)).await;
    let lost = usize::try_from(count).unwrap() - receiver.accepted().len();
    println!(
        "{what}: {count} messages, lost {lost}, repeats {} (at most {repeats_allowed})",
        receiver.duplicates()
    );
    assert_eq!(ended.get("sent"), Some(&count), "{what}: {ended:?}");
    assert_eq!(lost, 0, "{what}");
    assert!(receiver.duplicates() <= repeats_allowed, "{what}: {} repeats", receiver.duplicates());
    receiver.assert_ids_are_stable();
}

/// Fills a backlog of 20,000 on a stack that is under way.
async fn under_way(stack: &Stack, receiver: &Receiver) {
    stack.insert(20_000).await;
    until("it runs", Duration::from_secs(30), async || receiver.arrivals() > 200).await;
}

#[tokio::test]
async fn redis_forgets_everything() {
    let receiver = receiver(20).await;
    let stack = Stack::new("flushall", &receiver).await;
    let _services = start(&stack);
    under_way(&stack, &receiver).await;
    tool("redis-cli", &["-u", &stack.environment["REDIS_URL"], "flushall"]);
    settle("FLUSHALL", &stack, &receiver, 0).await;
}

fn kafka(stack: &Stack) -> ClientConfig {
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", &stack.environment["KAFKA_BROKERS"]).set("group.id", &stack.name);
    config
}

#[tokio::test]
async fn kafkas_topics_are_deleted() {
    let receiver = receiver(20).await;
    let stack = Stack::new("deleted", &receiver).await;
    let _services = start(&stack);
    under_way(&stack, &receiver).await;
    let admin: AdminClient<DefaultClientContext> = kafka(&stack).create().unwrap();
    let topics = [format!("{}-fresh", stack.name), format!("{}-retry", stack.name)];
    let deleted = admin.delete_topics(&[&topics[0], &topics[1]], &AdminOptions::new()).await.unwrap();
    assert!(deleted.iter().all(Result::is_ok), "{deleted:?}");
    settle("topics deleted", &stack, &receiver, 0).await;
}

/// Commits for a group without members, as the broker's own tool for resetting does.
fn reset(stack: &Stack, to: Offset) {
    let consumer: BaseConsumer = kafka(stack).create().unwrap();
    let (topic, patience) = (format!("{}-fresh", stack.name), Duration::from_secs(10));
    let partitions = consumer.fetch_metadata(Some(&topic), patience).unwrap().topics()[0].partitions().len();
    let mut list = TopicPartitionList::new();
    for partition in 0..i32::try_from(partitions).unwrap() {
        let (first, end) = consumer.fetch_watermarks(&topic, partition, patience).unwrap();
        let offset = if to == Offset::Beginning { first } else { end };
        list.add_partition_offset(&topic, partition, Offset::Offset(offset)).unwrap();
    }
    consumer.commit(&list, CommitMode::Sync).unwrap();
}

#[tokio::test]
async fn group_offsets_are_reset_to_the_start_and_to_the_end() {
    for to in [Offset::Beginning, Offset::End] {
        let receiver = receiver(20).await;
        let stack = Stack::new("offsets", &receiver).await;
        let _producer = stack.start("producer", &[]);
        let consumer = stack.start("consumer", &[]);
        under_way(&stack, &receiver).await;
        // Only a group without members can be reset.
        assert!(consumer.stop().await.success());
        reset(&stack, to);
        let _consumer = stack.start("consumer", &[]);
        settle(&format!("offsets reset to {to:?}"), &stack, &receiver, 0).await;
    }
}

#[tokio::test]
async fn kafkas_data_is_wiped() {
    let receiver = receiver(20).await;
    let stack = Stack::new("wiped", &receiver).await;
    let _services = start(&stack);
    under_way(&stack, &receiver).await;
    services("kill", "kafka");
    services("wipe", "kafka");
    services("start", "kafka");
    settle("data wiped", &stack, &receiver, 0).await;
}

/// How long an outage lasts in `make test`; issues ask for 30 and 60 s.
fn outage() -> Duration {
    Duration::from_secs(setting("AMS_TEST_OUTAGE_SECONDS").map_or(12, |text| text.parse().unwrap()))
}

/// Cuts a part off under load, brings it back, and measures how soon deliveries go on.
async fn part_is_away(name: &str, repeats_allowed: usize) {
    let receiver = receiver(1).await;
    let stack = Stack::new(&format!("{name}_away"), &receiver).await;
    let _services = start(&stack);
    let load = Load::start(&stack);
    until("it runs", Duration::from_secs(30), async || receiver.arrivals() > 500).await;
    services("kill", name);
    let_run(outage()).await;
    services("start", name);
    let (before, arrived, within) = (load.committed(), receiver.arrivals(), Duration::from_secs(30));
    let newest = async {
        until("rows are committed again", within, async || load.committed() > before).await;
        let newest = "select max(id) from messages";
        let newest: i64 = stack.sql().await.query_one(newest, &[]).await.unwrap().get(0);
        until("a row committed after the outage arrives", within, async || receiver.accepted_from(newest))
            .await
    };
    let goes_on = until("deliveries go on", within, async || receiver.arrivals() > arrived);
    let (resumed, caught_up) = tokio::join!(goes_on, newest);
    println!("{name} away for {:?}: deliveries go on {resumed:.1?} after it is back", outage());
    println!("and a row committed then arrives after {caught_up:.1?}, behind all that waited");
    load.finish().await;
    settle(&format!("{name} killed"), &stack, &receiver, repeats_allowed).await;
}

#[tokio::test]
async fn postgres_is_killed_and_comes_back() {
    part_is_away("postgres", 0).await;
}

#[tokio::test]
async fn kafka_is_killed_and_comes_back() {
    part_is_away("kafka", 0).await;
}

#[tokio::test]
async fn redis_is_killed_and_comes_back() {
    part_is_away("redis", 0).await;
}

#[tokio::test]
async fn postgres_cuts_every_connection_again_and_again() {
    let receiver = receiver(1).await;
    let stack = Stack::new("cut", &receiver).await;
    let _services = start(&stack);
    let load = Load::start(&stack);
    until("it runs", Duration::from_secs(30), async || receiver.arrivals() > 500).await;
    for _ in 0..30 {
        let cut = "select pg_terminate_backend(pid) from pg_stat_activity where datname = current_database() and pid <> pg_backend_pid()";
        stack.sql().await.execute(cut, &[]).await.unwrap();
        let_run(Duration::from_millis(fastrand::u64(20..300))).await;
    }
    load.finish().await;
    settle("connections cut", &stack, &receiver, 0).await;
}

/// The statement was done, its commit too, and nobody was told.
#[tokio::test]
async fn answers_of_postgres_are_lost() {
    let receiver = receiver(1).await;
    let mut stack = Stack::new("answers", &receiver).await;
    let proxy = Proxy::start(&stack.database_url, Fault::Lost(0.005)).await;
    stack.environment.insert("DATABASE_URL".into(), proxy.url.clone());
    let _services = start(&stack);
    let load = Load::start(&stack);
    until("a hundred answers are lost", Duration::from_secs(90), async || {
        proxy.lost() >= 100 && receiver.arrivals() > 500
    })
    .await;
    load.finish().await;
    settle(&format!("{} answers of PostgreSQL lost", proxy.lost()), &stack, &receiver, 0).await;
}

#[tokio::test]
async fn redis_is_slow_and_nothing_slows_down() {
    let receiver = receiver(1).await;
    let mut stack = Stack::new("redis_late", &receiver).await;
    let proxy = Proxy::start(&stack.environment["REDIS_URL"], Fault::Late(Duration::from_millis(500))).await;
    stack.environment.insert("REDIS_URL".into(), proxy.url.clone());
    let _services = start(&stack);
    let load = Load::start(&stack);
    until("it runs", Duration::from_secs(30), async || receiver.arrivals() > 500).await;
    goes_on(&receiver, "Redis answers after 500 ms").await;
    load.finish().await;
    settle("Redis slow", &stack, &receiver, 0).await;
}

#[tokio::test]
async fn redis_freezes_or_is_full_and_nothing_slows_down() {
    let receiver = receiver(1).await;
    let stack = Stack::new("redis_slow", &receiver).await;
    let _services = start(&stack);
    let redis = stack.environment["REDIS_URL"].clone();
    let load = Load::start(&stack);
    until("it runs", Duration::from_secs(30), async || receiver.arrivals() > 500).await;
    tool("redis-cli", &["-u", &redis, "config", "set", "maxmemory", "1"]);
    goes_on(&receiver, "Redis is out of memory").await;
    tool("redis-cli", &["-u", &redis, "config", "set", "maxmemory", "0"]);
    services("pause", "redis");
    goes_on(&receiver, "Redis is frozen").await;
    services("resume", "redis");
    load.finish().await;
    settle("Redis frozen and full", &stack, &receiver, 0).await;
}

async fn goes_on(receiver: &Receiver, what: &str) {
    let before = receiver.arrivals();
    let_run(Duration::from_secs(3)).await;
    let arrived = receiver.arrivals() - before;
    println!("{what}: {arrived} deliveries in 3 s at a load of 1,000/s");
    assert!(arrived > 2_000, "{what}: only {arrived} in 3 s");
}
