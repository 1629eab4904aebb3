//! Changes in good order: stops, rolling restarts, consumers joining and leaving, a frozen consumer.

use std::time::Duration;

use crate::harness::*;
use crate::kills::{Load, rows};
use ams::testclient::TestClientOptions;

async fn settle(what: &str, stack: &Stack, receiver: &Receiver, repeats_allowed: usize) {
    let count = rows(stack).await;
    let ended = stack.all_final(count, Duration::from_secs(60)).await;
    println!("{what}: {count} messages, repeats {} (at most {repeats_allowed})", receiver.duplicates());
    assert_eq!(ended.get("sent"), Some(&count), "{what}: {ended:?}");
    assert_eq!(receiver.accepted().len(), usize::try_from(count).unwrap(), "{what}");
    assert!(receiver.duplicates() <= repeats_allowed, "{what}: {} repeats", receiver.duplicates());
}

async fn slow_receiver() -> Receiver {
    Receiver::start(TestClientOptions { latency: Duration::from_millis(30), ..TestClientOptions::default() })
        .await
}

#[tokio::test]
async fn rolling_restarts_leave_no_repeat() {
    let rounds: usize = setting("AMS_TEST_RESTARTS").map_or(3, |text| text.parse().unwrap());
    let receiver = slow_receiver().await;
    let stack = Stack::new("rolling", &receiver).await;
    let mut services: Vec<_> =
        ["producer", "consumer", "retry-consumer", "api"].iter().map(|verb| stack.start(verb, &[])).collect();
    let load = Load::start(&stack);
    until("it runs", Duration::from_secs(30), async || receiver.arrivals() > 500).await;
    for _ in 0..rounds {
        for service in &mut services {
            let verb = service.verb.clone();
            let next = stack.start(&verb, &[]);
            let old = std::mem::replace(service, next);
            let status = old.stop().await;
            assert!(status.success(), "{verb} stopped with {status}");
            let_run(Duration::from_millis(300)).await;
        }
    }
    load.finish().await;
    settle("rolling restarts", &stack, &receiver, 0).await;
}

#[tokio::test]
async fn a_stop_without_a_successor_leaves_no_repeat() {
    let receiver = slow_receiver().await;
    let stack = Stack::new("stop", &receiver).await;
    let load = Load::start(&stack);
    for _ in 0..3 {
        let before = receiver.arrivals();
        let up = stack.start("up", &[]);
        until("it delivers", Duration::from_secs(30), async || receiver.arrivals() > before + 300).await;
        assert!(up.stop().await.success());
        assert_eq!(stack.processing().await, 0, "left processing after a clean stop");
    }
    load.finish().await;
    let _up = stack.start("up", &[]);
    settle("stops", &stack, &receiver, 0).await;
}

#[tokio::test]
async fn consumers_join_and_leave() {
    let rounds: usize = setting("AMS_TEST_REBALANCES").map_or(2, |text| text.parse().unwrap());
    let receiver = slow_receiver().await;
    let stack = Stack::new("rebalance", &receiver).await;
    let _fixed = [stack.start("producer", &[]), stack.start("consumer", &[])];
    let load = Load::start(&stack);
    until("it runs", Duration::from_secs(30), async || receiver.arrivals() > 500).await;
    for _ in 0..rounds {
        let guest = stack.start("consumer", &[]);
        let_run(Duration::from_secs(5)).await;
        assert!(guest.stop().await.success());
        let_run(Duration::from_secs(5)).await;
    }
    load.finish().await;
    settle("consumers joining and leaving", &stack, &receiver, 0).await;
}

#[tokio::test]
async fn a_frozen_consumer_does_no_harm_when_it_wakes() {
    let receiver = slow_receiver().await;
    let stack = Stack::new("frozen", &receiver).await;
    let _fixed = [stack.start("producer", &[]), stack.start("consumer", &[])];
    let frozen = stack.start("consumer", &[]);
    let load = Load::start(&stack);
    until("it runs", Duration::from_secs(30), async || receiver.arrivals() > 3_000).await;
    frozen.signal("-STOP");
    let in_flight = usize::try_from(stack.processing().await).unwrap();
    let_run(ams::service::LEASE * 2).await;
    frozen.signal("-CONT");
    let_run(Duration::from_secs(2)).await;
    load.finish().await;
    settle("a consumer frozen for twice its lease", &stack, &receiver, in_flight).await;
    let older = "select count(*) from message_status where status <> 'sent'";
    let older: i64 = stack.sql().await.query_one(older, &[]).await.unwrap().get(0);
    assert_eq!(older, 0, "stale results over newer ones");
}

#[tokio::test]
async fn a_second_signal_ends_at_once() {
    let hanging = TestClientOptions { latency: Duration::from_secs(25), ..TestClientOptions::default() };
    let receiver = Receiver::start(hanging).await;
    let stack = Stack::new("second_signal", &receiver).await;
    let up = stack.start("up", &[]);
    stack.insert(1).await;
    until("an attempt is in flight", Duration::from_secs(30), async || stack.processing().await == 1).await;
    up.signal("-TERM");
    until("the first is heard", Duration::from_secs(10), async || {
        std::fs::read_to_string(&stack.log).unwrap().contains("a second signal ends at once")
    })
    .await;
    assert_eq!(stack.processing().await, 1, "it waits for the attempt");
    assert_eq!(up.stop().await.code(), Some(130));
    assert_eq!(stack.processing().await, 1, "nothing was finished");
}

#[tokio::test]
async fn a_standby_producer_takes_over() {
    let receiver = Receiver::start(TestClientOptions::default()).await;
    let stack = Stack::new("standby", &receiver).await;
    let _consumer = stack.start("consumer", &[]);
    let active = stack.start("producer", &[]);
    stack.insert(1).await;
    until("the first producer is the active one", Duration::from_secs(30), async || receiver.arrivals() == 1)
        .await;
    let _standby = stack.start("producer", &[]);
    until("the second has come", Duration::from_secs(10), async || instances(&stack).await == 3).await;
    active.kill();
    stack.insert(1).await;
    let after = until("it goes on", Duration::from_secs(10), async || receiver.arrivals() == 2).await;
    println!("the standby producer went on {after:.1?} after the kill of the active one");
}

async fn instances(stack: &Stack) -> i64 {
    stack.sql().await.query_one("select count(*) from instances", &[]).await.unwrap().get(0)
}
