//! Endpoints, lanes, dead letters, and what can be read of messages and the whole.

use std::sync::Arc;
use std::time::Duration;

use super::{Bench, RETRY, text};
use crate::clock::{Clock, Timestamp};
use crate::lane::{Lane, LaneGroup};
use crate::message::{Class, MessageId, NewMessage, Status};
use crate::store::{Endpoint, Store};

pub(crate) async fn an_endpoint_is_created_and_replaced(store: Arc<dyn Store>) {
    let plain = Endpoint::new("default", "http://localhost:3000");
    store.put_endpoint(&plain).await.unwrap();
    store.put_endpoint(&plain).await.unwrap();
    assert_eq!(store.endpoints().await.unwrap(), std::slice::from_ref(&plain));
    let changed = Endpoint {
        url: "https://example.org/hook?a=b".to_owned(),
        timeout: Duration::from_millis(1_500),
        in_flight_max: 7,
        final_statuses: vec![400, 404, 410],
        enabled: false,
        secret: Some("whsec_MTIz".to_owned()),
        ..plain
    };
    let second = Endpoint { final_statuses: Vec::new(), ..Endpoint::new("second", "http://localhost:3001") };
    store.put_endpoint(&changed).await.unwrap();
    store.put_endpoint(&second).await.unwrap();
    let mut all = store.endpoints().await.unwrap();
    all.sort_by(|a, b| a.name.cmp(&b.name));
    assert_eq!(all, [changed, second]);
}

pub(crate) async fn the_newest_lane_wins(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    let lane = Lane {
        topic: RETRY.to_owned(),
        group: "message-consumer-messages-retry".to_owned(),
        next: "messages-dlq".to_owned(),
        fresh: false,
        tries: 3,
        interval: Duration::from_millis(3_500),
        interval_max: Duration::from_secs(3_600),
    };
    let put = async |lane: &Lane| bench.store.put_lane(lane, bench.now()).await.unwrap();
    assert_eq!(put(&lane).await, None);
    assert_eq!(put(&lane).await, None, "the same again is no difference");
    bench.pass(1);
    let other = Lane { tries: 4, next: "messages-slow".to_owned(), ..lane.clone() };
    assert_eq!(put(&other).await, Some(lane.clone()));
    assert_eq!(bench.store.lanes().await.unwrap(), [other]);
    let fresh = Lane { topic: "messages".to_owned(), fresh: true, ..lane };
    assert_eq!(put(&fresh).await, None);
    assert_eq!(bench.store.lanes().await.unwrap().len(), 2);
}

pub(crate) async fn the_groups_of_a_lane_are_known_by_when_they_were_seen(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    let seen = |topic: &str, group: &str| LaneGroup {
        topic: topic.to_owned(),
        group: group.to_owned(),
        seen_at: bench.now(),
    };
    assert_eq!(bench.store.lane_groups().await.unwrap(), []);
    let (ours, elsewhere) = (seen("messages", "ours"), seen(RETRY, "ours"));
    for group in [&ours, &elsewhere, &ours] {
        bench.store.put_lane_group(group).await.unwrap();
    }
    assert_eq!(bench.store.lane_groups().await.unwrap(), [ours.clone(), elsewhere.clone()]);
    bench.pass(3_600);
    let theirs = seen("messages", "theirs");
    bench.store.put_lane_group(&theirs).await.unwrap();
    // One whose clock is behind takes nothing back.
    let behind = Timestamp::from_micros(theirs.seen_at.as_micros() - 60_000_000);
    bench.store.put_lane_group(&LaneGroup { seen_at: behind, ..theirs.clone() }).await.unwrap();
    assert_eq!(bench.store.lane_groups().await.unwrap(), [ours, theirs.clone(), elsewhere.clone()]);
    bench.pass(1);
    let theirs = LaneGroup { seen_at: bench.now(), ..theirs };
    bench.store.put_lane_group(&theirs).await.unwrap();
    assert_eq!(
        bench.store.lane_groups().await.unwrap(),
        [theirs.clone(), elsewhere.clone()],
        "silent for an hour"
    );
    // Clocks that were an hour ahead: that of another group, and the group's own.
    let hour = bench.in_seconds(3_600);
    bench.store.put_lane_group(&LaneGroup { seen_at: hour, ..seen("messages", "ours") }).await.unwrap();
    bench.store.put_lane_group(&LaneGroup { seen_at: hour, ..elsewhere.clone() }).await.unwrap();
    bench.store.put_lane_group(&theirs).await.unwrap();
    let elsewhere = LaneGroup { seen_at: bench.now(), ..elsewhere };
    bench.store.put_lane_group(&elsewhere).await.unwrap();
    assert_eq!(bench.store.lane_groups().await.unwrap(), [theirs, elsewhere]);
}

pub(crate) async fn dead_letters_wait_until_they_are_published(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    let headers = Some(serde_json::json!({"x-a": "1"}));
    bench.insert(&[NewMessage { headers, ..text("first") }, text("second"), text("third")]).await;
    let deliveries = bench.begin(&bench.claim_fresh().await.tickets).await;
    for delivery in &deliveries[..2] {
        bench.record(&[bench.dead(delivery)]).await;
        bench.pass(1);
    }
    let start = bench.message(deliveries[0].id()).await.finished_at.expect("it is dead");
    assert!(bench.store.dead_letters(start, 10).await.unwrap().is_empty());
    let one = bench.store.dead_letters(start.after(Duration::from_millis(1)), 10).await.unwrap();
    assert_eq!(one.len(), 1);
    let letter = &one[0];
    assert_eq!((letter.ticket.id, letter.ticket.attempt), (deliveries[0].id(), 1));
    assert_eq!((letter.ticket.content.as_str(), letter.ticket.endpoint.as_str()), ("first", "default"));
    assert_eq!(letter.ticket.headers.as_ref().map(|h| h.get().contains("x-a")), Some(true));
    assert_eq!((letter.lane.as_str(), letter.reason.as_str()), ("messages-dlq", "all tries failed"));
    assert_eq!((letter.attempts, letter.last_status, letter.dead_at), (1, None, start));
    assert_eq!(letter.last_error.as_deref(), Some("no luck"));
    let all = bench.store.dead_letters(bench.now(), 10).await.unwrap();
    assert_eq!(
        all.iter().map(|letter| letter.ticket.id).collect::<Vec<_>>(),
        [deliveries[0].id(), deliveries[1].id()]
    );
    assert_eq!(bench.store.dead_letters(bench.now(), 1).await.unwrap().len(), 1);
    for _ in 0..2 {
        bench.store.dead_lettered(&[deliveries[0].id()]).await.unwrap();
        assert_eq!(bench.store.dead_letters(bench.now(), 10).await.unwrap().len(), 1);
    }
    bench.store.dead_lettered(&[]).await.unwrap();
    assert_eq!(bench.message(deliveries[0].id()).await.status, Status::Dead);
}

pub(crate) async fn an_unknown_message_has_nothing(store: Arc<dyn Store>) {
    for id in [0, -1, 1, i64::MAX] {
        assert_eq!(store.message(MessageId(id)).await.unwrap(), None);
        assert!(store.attempts(MessageId(id)).await.unwrap().is_empty());
    }
}

pub(crate) async fn attempts_read_back_in_order(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    let first = bench.processing(1).await.remove(0);
    let id = first.id();
    bench.record(&[bench.failed(&first)]).await;
    for attempt in 2..6 {
        bench.pass(3);
        let delivery = bench.begin(&bench.claim_timed(RETRY).await.tickets).await.remove(0);
        let record = if attempt == 5 { bench.sent(&delivery) } else { bench.failed(&delivery) };
        bench.record(&[crate::store::Record { lane: RETRY.into(), ..record }]).await;
    }
    let attempts = bench.store.attempts(id).await.unwrap();
    let seen: Vec<_> = attempts.iter().map(|a| (a.attempt, a.lane.as_str())).collect();
    assert_eq!(seen, [(1, "messages"), (2, RETRY), (3, RETRY), (4, RETRY), (5, RETRY)]);
    assert!(attempts.is_sorted_by_key(|attempt| attempt.started_at));
    assert_eq!((attempts[0].class, attempts[0].status), (Class::Rejected, Some(500)));
    assert_eq!(attempts[0].error.as_deref(), Some("no luck"));
    assert_eq!((attempts[4].class, bench.message(id).await.attempts), (Class::Accepted, 5));
}

pub(crate) async fn long_answers_are_kept_in_part(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    let delivery = bench.processing(1).await.remove(0);
    let mut record = bench.sent(&delivery);
    if let Some(outcome) = record.outcome.as_mut().map(Arc::make_mut) {
        // Three bytes a character, and a nul, which not every database keeps.
        outcome.answer = format!("a\0b{}", "€".repeat(4_096));
    }
    assert!(bench.record(&[record]).await.is_empty());
    let answer = bench.store.attempts(delivery.id()).await.unwrap().remove(0).answer;
    assert!((4_000..=4_096).contains(&answer.len()), "{}", answer.len());
    assert!(answer.starts_with('a') && answer.ends_with('€'));
}

pub(crate) async fn the_overview_counts_every_status(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    let deliveries = bench.processing(4).await;
    bench
        .record(&[bench.sent(&deliveries[0]), bench.failed(&deliveries[1]), bench.dead(&deliveries[2])])
        .await;
    bench.fill(3).await;
    bench.claim_fresh().await;
    bench.fill(2).await;
    let overview = bench.store.overview(bench.now()).await.unwrap();
    for status in Status::ALL {
        let expected = match status {
            Status::Pending => 2,
            Status::Queued => 3,
            Status::Processing | Status::Sent | Status::Retrying | Status::Dead => 1,
            Status::Cancelled | Status::Expired | Status::Unknown => 0,
        };
        let count = overview.counts.iter().find(|count| count.status == status);
        assert_eq!(count.map_or(0, |count| count.count), expected, "{status}");
        assert!(count.is_none_or(|count| !count.more));
    }
    assert_eq!(overview.instances.len(), 1);
    let instance = &overview.instances[0];
    assert_eq!((instance.id, instance.service.as_str(), instance.host.as_str()), (bench.owner, "up", "here"));
    assert_eq!(instance.version, env!("CARGO_PKG_VERSION"));
    assert_eq!((instance.started_at, instance.seen_at), (bench.now(), bench.now()));
    assert_eq!(instance.lease_until, bench.in_seconds(10));
    bench.pass(2);
    bench.store.renew(bench.owner, bench.now(), bench.in_seconds(10)).await.unwrap();
    let instances = bench.store.overview(bench.now()).await.unwrap().instances;
    assert_eq!(instances[0].started_at.after(Duration::from_secs(2)), instances[0].seen_at);
    assert_eq!(instances[0].lease_until, bench.in_seconds(10));
}

pub(crate) async fn the_overview_knows_the_oldest_due_row(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    let oldest = async || bench.store.overview(bench.now()).await.unwrap().oldest_due_at;
    assert_eq!(oldest().await, None);
    let delivery = bench.processing(1).await.remove(0);
    assert_eq!(oldest().await, None, "what is under way is not due");
    bench.record(&[bench.failed(&delivery)]).await;
    assert_eq!(oldest().await, None, "what waits for its time is not due");
    let due = bench.in_seconds(3);
    bench.pass(10);
    assert_eq!(oldest().await, Some(due));
    bench.claim_timed(RETRY).await;
    let fresh = bench.fill(1).await[0];
    assert_eq!(oldest().await, Some(bench.message(fresh).await.created_at));
}

pub(crate) async fn the_database_describes_itself(store: Arc<dyn Store>) {
    let about = store.about().await.unwrap();
    assert!(about.version.starts_with(|c: char| c.is_ascii_digit()), "{}", about.version);
    // Less than an hour: no time zone has slipped in.
    let apart = Clock::system().now().as_micros().abs_diff(about.now.as_micros());
    assert!(apart < 3_000_000_000, "{} is {apart} us away", about.now);
    let setting = |name: &str| about.settings.get(name).map(String::as_str);
    let time = store.time().await.unwrap();
    assert_eq!(time.is_some(), store.kind() != "sqlite", "a server has a clock of its own");
    assert!(time.is_none_or(|time| time.since(about.now) < Duration::from_secs(60) && time >= about.now));
    match store.kind() {
        "sqlite" => assert!(matches!(setting("journal_mode"), Some("wal" | "memory")), "{about:?}"),
        _ => {
            assert!(matches!(setting("fsync"), Some("on" | "off")), "{about:?}");
            assert!(setting("max_connections").is_some_and(|text| text.parse::<u64>().is_ok()));
            assert!(about.connections > 0);
        }
    }
}

pub(crate) async fn partitions_can_be_made_at_any_time(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    bench.store.make_partitions().await.unwrap();
    bench.fill(1).await;
    bench.store.make_partitions().await.unwrap();
    assert_eq!(bench.claim_fresh().await.seen, 1);
}
