//! Tries, waits and dead letters; commits and rollbacks; pacing.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::harness::*;
use ams::clock::Timestamp;
use ams::testclient::TestClientOptions;

/// What a wait may last beyond its jitter: a poll of the producer and a passage of the lane.
fn slack() -> Duration {
    if release() { Duration::from_millis(100) } else { Duration::from_secs(2) }
}

#[tokio::test]
async fn half_of_the_requests_fail_and_every_message_ends_as_it_should() {
    // Fewer than the whole run's 10,000, whose retries all fall due within 300 ms: too many for a debug build.
    let count: i64 = setting("AMS_TEST_MESSAGES").map_or(2_000, |text| text.parse().unwrap());
    let receiver =
        Receiver::start(TestClientOptions { error_rate: 0.5, ..TestClientOptions::default() }).await;
    let stack = Stack::new("lanes", &receiver).await;
    let _producer = stack.start("producer", &[]);
    let _consumer = stack.start("consumer", &[]);
    let _retry = stack.start("retry-consumer", &[("RETRY_INTERVAL", "3"), ("RETRY_COUNT", "3")]);
    stack.insert(count).await;
    let ended = stack.all_final(count, Duration::from_secs(120)).await;

    let accepted = receiver.accepted();
    let rows = stack.sql().await.query("select id, status::text from message_status", &[]).await.unwrap();
    let tries = tries(&stack).await;
    let (mut late, mut latest) = (Vec::new(), BTreeMap::new());
    for row in &rows {
        let (id, status): (i64, String) = (row.get(0), row.get(1));
        match status.as_str() {
            "sent" => assert_eq!(accepted.get(&id), Some(&1), "message {id}"),
            "dead" => {
                assert_eq!(accepted.get(&id), None, "message {id}");
                assert_eq!(tries[&id].len(), 4, "message {id}");
            }
            other => panic!("message {id} ended {other}"),
        }
        for (pair, wait) in tries[&id].windows(2).zip([3, 6, 12]) {
            let waited = pair[1].0.since(pair[0].1);
            let wait = Duration::from_secs(wait);
            assert!(waited >= wait, "message {id} waited {waited:?} of {wait:?}");
            let beyond = waited.saturating_sub(wait.mul_f64(1.1));
            let most = latest.entry(wait).or_insert(Duration::ZERO);
            *most = beyond.max(*most);
            if waited > wait.mul_f64(1.1) + slack() {
                late.push((id, wait, waited));
            }
        }
    }
    println!("of {ended:?} the latest waited longer than its wait and all jitter by {latest:?}");
    assert!(
        late.is_empty(),
        "{} of {ended:?} waited too long, such as {:?}",
        late.len(),
        &late[..late.len().min(5)]
    );

    let dead = usize::try_from(ended["dead"]).unwrap();
    let mut letters = BTreeMap::new();
    until("every dead letter is on its lane", Duration::from_secs(10), async || {
        letters = dead_letters(&stack);
        letters.len() == dead
    })
    .await;
    assert!(
        letters.values().all(|(count, reason)| *count == 1 && reason.contains("status 500")),
        "{letters:?}"
    );
}

/// When each try of each message began and ended.
async fn tries(stack: &Stack) -> BTreeMap<i64, Vec<(Timestamp, Timestamp)>> {
    let statement = "select message_id, (extract(epoch from at) * 1000000)::bigint, (took_ms * 1000)::bigint \
                     from message_history where took_ms is not null order by message_id, attempt";
    let mut tries: BTreeMap<i64, Vec<_>> = BTreeMap::new();
    for row in stack.sql().await.query(statement, &[]).await.unwrap() {
        let (started, took): (i64, i64) = (row.get(1), row.get(2));
        let times = (Timestamp::from_micros(started), Timestamp::from_micros(started + took));
        tries.entry(row.get(0)).or_default().push(times);
    }
    tries
}

/// The dead-letter lane: how often each message is there, and the reason it carries.
fn dead_letters(stack: &Stack) -> BTreeMap<i64, (usize, String)> {
    let (brokers, lane) = (&stack.environment["KAFKA_BROKERS"], format!("{}-dlq", stack.name));
    let mut letters = BTreeMap::new();
    for line in tool("kcat", &["-b", brokers, "-C", "-t", &lane, "-e", "-q", "-f", "%s\n"]).lines() {
        let value: serde_json::Value = serde_json::from_str(line).unwrap();
        let entry = letters.entry(value["id"].as_i64().unwrap()).or_insert((0, String::new()));
        *entry = (entry.0 + 1, value["reason"].as_str().unwrap().to_owned());
    }
    letters
}

#[tokio::test]
async fn rolled_back_rows_never_arrive_and_a_late_commit_does() {
    const LATER: i64 = 100_000;
    let receiver = Receiver::start(TestClientOptions::default()).await;
    let stack = Stack::new("commits", &receiver).await;
    let _producer = stack.start("producer", &[]);
    let _consumer = stack.start("consumer", &[]);
    let (mut slow, mut undone) = (stack.sql().await, stack.sql().await);
    let slow = slow.transaction().await.unwrap();
    let late: i64 = slow
        .query_one("insert into messages (recipient, content) values ('late', 'Hello') returning id", &[])
        .await
        .unwrap()
        .get(0);
    let undone = undone.transaction().await.unwrap();
    undone.execute("insert into messages (recipient, content) values ('never', 'Hello')", &[]).await.unwrap();
    stack.insert(LATER).await;
    let all = usize::try_from(LATER).unwrap();
    until("later ids have passed", Duration::from_secs(60), async || receiver.arrivals() >= all).await;
    let held_open: u64 = setting("AMS_TEST_OPEN_SECONDS").map_or(3, |text| text.parse().unwrap());
    let_run(Duration::from_secs(held_open)).await;
    assert!(!receiver.accepted().contains_key(&late));

    undone.rollback().await.unwrap();
    slow.commit().await.unwrap();
    let took = until("the late row arrives", Duration::from_secs(5), async || {
        receiver.accepted().contains_key(&late)
    })
    .await;
    println!("a row committed behind {LATER} later ids arrived {took:?} after its commit");
    stack.all_final(LATER + 1, Duration::from_secs(30)).await;
    assert_eq!((receiver.accepted().len(), receiver.duplicates()), (all + 1, 0));
}

#[tokio::test]
async fn two_producers_keep_the_pace_together() {
    let receiver = Receiver::start(TestClientOptions::default()).await;
    let stack = Stack::new("pacing", &receiver).await;
    let pace = [("BATCH_COUNT", "100"), ("INTERVAL", "1s")];
    let _one = stack.start("producer", &pace);
    let _other = stack.start("producer", &pace);
    let _consumer = stack.start("consumer", &[]);
    let seconds: usize = setting("AMS_TEST_PACING_SECONDS").map_or(10, |text| text.parse().unwrap());
    stack.insert(i64::try_from(seconds).unwrap() * 100 + 1_000).await;
    until("the first arrive", Duration::from_secs(20), async || receiver.arrivals() > 0).await;
    // From the middle of one interval to the middle of another, so that whole intervals are counted.
    let from = receiver.seen()[0].1.after(Duration::from_millis(500));
    let to = from.after(Duration::from_secs(u64::try_from(seconds).unwrap()));
    let clock = ams::clock::Clock::system();
    until("the time is over", Duration::from_secs(60), async || clock.now() > to).await;
    let counted = receiver.seen().iter().filter(|(_, at)| (from..to).contains(at)).count();
    let per_s = counted as f64 / seconds as f64;
    println!("{per_s:.1} a second over {seconds} s");
    assert!((95.0..=105.0).contains(&per_s), "{per_s} a second");
}
