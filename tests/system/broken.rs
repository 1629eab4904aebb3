//! Bad input and parts that are not there: one sentence with what, where and how to mend it; nothing lost.

use std::process::Output;
use std::time::Duration;

use ams::testclient::TestClientOptions;
use rdkafka::config::ClientConfig;
use rdkafka::producer::{BaseProducer, BaseRecord, Producer};

use crate::harness::*;

fn ams(arguments: &[&str], environment: &[(&str, &str)]) -> Output {
    let folder = tempfile::tempdir().unwrap();
    embedded(folder.path()).args(arguments).envs(environment.iter().copied()).output().unwrap()
}

#[test]
fn bad_settings_stop_the_start_with_a_sentence() {
    for (arguments, environment, expected) in [
        (&["up"][..], &[("RETRY_INTERVAL", "soon")][..], "RETRY_INTERVAL is `soon`"),
        (&["up", "--port", "99999"], &[], "PORT is `99999`"),
        (&["up"], &[("DATABASE_URL", "mysql://x")], "DATABASE_URL is `mysql://(hidden)`"),
        (&["up"], &[("DATABASE_URL", "sqlite:///proc/nowhere/ams.db")], "/proc/nowhere"),
        (&["producer"], &[], "KAFKA_BROKERS is not set"),
        (
            &["up"],
            &[("KAFKA_BROKERS", "127.0.0.1:1"), ("KAFKA_SECURITY_PROTOCOL", "smoke")],
            "KAFKA_SECURITY_PROTOCOL is `smoke`",
        ),
        (&["producer"], &[("KAFKA_BROKERS", "127.0.0.1:1"), ("INTERVAL", "1s")], "BATCH_COUNT"),
        (&["testclient", "--error-rate", "2"], &[], "ERROR_RATE is `2`"),
        (&["testclient", "--hang", "x"], &[], "--hang is `x`"),
    ] {
        let output = ams(arguments, environment);
        let sentence = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(1), "{arguments:?} {environment:?}: {sentence}");
        assert!(sentence.contains(expected), "{arguments:?} {environment:?}: {sentence}");
        assert_eq!(sentence.trim().lines().count(), 1, "one sentence: {sentence}");
    }
    assert_eq!(ams(&["fly"], &[]).status.code(), Some(2));
}

#[test]
fn a_port_in_use_is_told() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let output = ams(&["up", "--port", &port], &[("LOG_LEVEL", "error")]);
    let sentence = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(1), "{sentence}");
    assert!(sentence.contains(&format!("127.0.0.1:{port}")) && sentence.contains("PORT"), "{sentence}");
}

#[tokio::test]
async fn a_service_waits_for_a_store_that_is_not_there_and_says_so() {
    let receiver = Receiver::start(TestClientOptions::default()).await;
    let stack = Stack::new("waits", &receiver).await;
    let nowhere = "postgres://postgres@127.0.0.1:1/nothing";
    let consumer = stack.start("consumer", &[("DATABASE_URL", nowhere)]);
    let log = stack.log.clone();
    until("it says that the store is away", Duration::from_secs(10), async || {
        std::fs::read_to_string(&log).is_ok_and(|text| text.contains("the store is unavailable"))
    })
    .await;
    // It stops in order, so it was still running.
    assert!(consumer.stop().await.success());
}

#[tokio::test]
async fn unreadable_records_go_to_the_dead_letter_lane_and_hold_nothing_up() {
    let receiver = Receiver::start(TestClientOptions::default()).await;
    let stack = Stack::new("unreadable", &receiver).await;
    let _services = ["producer", "consumer", "retry-consumer"].map(|verb| stack.start(verb, &[]));
    stack.insert(1).await;
    until("it runs", Duration::from_secs(20), async || receiver.arrivals() == 1).await;
    // Where the chain ends is known once both lanes are registered, and the directory was read again.
    let sql = stack.sql().await;
    until("both lanes are registered", Duration::from_secs(20), async || {
        sql.query_one("select count(*) from lanes", &[]).await.unwrap().get::<_, i64>(0) == 2
    })
    .await;
    let_run(Duration::from_millis(1_500)).await;

    let brokers = stack.environment["KAFKA_BROKERS"].clone();
    let producer: BaseProducer = ClientConfig::new().set("bootstrap.servers", &brokers).create().unwrap();
    let lane = format!("{}-fresh", stack.name);
    for value in [&b"\xff\xfe not UTF-8"[..], b"not JSON", b"{\"id\":1}", b"", b"{\"id\":\"planted\"}"] {
        producer.send(BaseRecord::to(&lane).key("k").payload(value)).map_err(|(error, _)| error).unwrap();
    }
    producer.flush(Duration::from_secs(10)).unwrap();
    stack.insert(100).await;
    stack.all_final(101, Duration::from_secs(20)).await;

    let dead = format!("{}-dlq", stack.name);
    let read = || tool("kcat", &["-b", &brokers, "-C", "-t", &dead, "-e", "-q", "-f", "%h|%S\n"]);
    until("all five are there with their reason", Duration::from_secs(10), async || {
        read().lines().filter(|line| line.contains("reason=the record is not")).count() == 5
    })
    .await;
    let log = std::fs::read_to_string(&stack.log).unwrap();
    assert!(log.contains("unreadable records") && !log.contains("planted"), "{log}");
}

#[tokio::test]
async fn a_row_for_an_endpoint_that_does_not_exist_is_held_and_loses_nothing() {
    let receiver = Receiver::start(TestClientOptions::default()).await;
    let stack = Stack::new("endpoints", &receiver).await;
    let _services = ["producer", "consumer"].map(|verb| stack.start(verb, &[]));
    let sql = stack.sql().await;
    let insert = "insert into messages (endpoint, recipient, content) values ('later', '+90', 'Hello')";
    sql.execute(insert, &[]).await.unwrap();
    let mut why = String::new();
    until("it is held", Duration::from_secs(20), async || {
        why = sql.query_one("select why from message_status", &[]).await.unwrap().get(0);
        why.contains("held")
    })
    .await;
    assert!(why.contains("later") && why.contains("does not exist"), "{why}");
    sql.execute("insert into endpoints (name, url) values ('later', $1)", &[&receiver.url]).await.unwrap();
    until("it arrives", Duration::from_secs(10), async || receiver.arrivals() == 1).await;
}
