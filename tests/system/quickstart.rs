//! The original system's quick start, with its settings, on five processes.

use std::time::Duration;

use crate::harness::*;
use ams::testclient::TestClientOptions;

/// The settings of the original system's compose file, the bare `3` included.
const CONSUMER: &[(&str, &str)] =
    &[("KAFKA_TOPIC", "messages"), ("KAFKA_TOPIC_RETRY", "messages-retry"), ("RETRY_COUNT", "1")];
const RETRY: &[(&str, &str)] = &[
    ("KAFKA_TOPIC", "messages-retry"),
    ("KAFKA_TOPIC_RETRY", "messages-dlq"),
    ("RETRY_INTERVAL", "3"),
    ("RETRY_COUNT", "3"),
];
const PRODUCER: &[(&str, &str)] = &[("KAFKA_TOPIC", "messages"), ("INTERVAL", "2s"), ("BATCH_COUNT", "100")];

#[tokio::test]
async fn ten_samples_by_psql_are_sent_cached_and_readable_on_the_lane() {
    let receiver = Receiver::start(TestClientOptions::default()).await;
    let stack = Stack::new("quickstart", &receiver).await;
    let _api = stack.start("api", &[]);
    let _producer = stack.start("producer", PRODUCER);
    let _consumer = stack.start("consumer", CONSUMER);
    let _retry = stack.start("retry-consumer", RETRY);

    tool(
        "psql",
        &["-X", "-q", "-v", "ON_ERROR_STOP=1", &stack.database_url, "-f", "migrations/insertMessages.sql"],
    );
    let ended = stack.all_final(10, Duration::from_secs(40)).await;
    assert_eq!(ended.get("sent"), Some(&10), "{ended:?}");
    assert_eq!(receiver.duplicates(), 0);

    let redis = stack.environment["REDIS_URL"].clone();
    until("ten answers are cached", Duration::from_secs(5), async || {
        (1..=10).all(|id| {
            tool("redis-cli", &["-u", &redis, "get", &format!("ams:response:{id}")]).contains("messageId")
        })
    })
    .await;
    let brokers = stack.environment["KAFKA_BROKERS"].clone();
    let records = tool("kcat", &["-b", &brokers, "-C", "-t", "messages", "-e", "-q", "-f", "%k %s\n"]);
    let found = records.lines().filter(|line| line.contains("\"recipient\"")).count();
    assert!(found >= 10, "{records}");
}
