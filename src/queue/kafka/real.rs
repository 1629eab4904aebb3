//! Against a real broker.

use std::collections::BTreeSet;
use std::time::Duration;

use rdkafka::admin::NewPartitions;

use super::*;
use crate::queue::conformance::{self, receipts, records, take};

#[expect(clippy::disallowed_methods, reason = "tests are told by the environment where Kafka is")]
pub(super) fn queue() -> KafkaQueue {
    let brokers = std::env::var("KAFKA_BROKERS");
    let brokers = brokers.expect("KAFKA_BROKERS is set by `make test`, or by `eval \"$(dev/services env)\"`");
    KafkaQueue::open(KafkaOptions { brokers, client: BTreeMap::new() }).unwrap()
}

#[tokio::test]
async fn conforms() {
    conformance::all(&queue()).await;
}

#[tokio::test]
async fn publishing_to_a_missing_lane_creates_it() {
    let (queue, lane) = (queue(), conformance::lane());
    assert_eq!(queue.depth(&lane, "group").await.unwrap(), []);
    let at = queue.publish(&lane, records(0..10)).await.unwrap();
    assert_eq!(at.offset, 9);
    assert_eq!(queue.depth(&lane, "group").await.unwrap().len(), 12);
}

#[tokio::test]
async fn a_large_record_passes_and_one_too_large_is_an_error() {
    let (queue, lane) = (queue(), conformance::lane());
    let record = |bytes| LaneRecord { key: "k".into(), value: vec![b'x'; bytes].into(), headers: Vec::new() };
    queue.publish(&lane, vec![record(7 << 20)]).await.unwrap();
    assert!(queue.publish(&lane, vec![record(9 << 20)]).await.is_err());
}

#[tokio::test]
async fn asking_for_depth_does_not_disturb_the_group() {
    let (queue, lane) = (queue(), conformance::lane());
    queue.ensure(std::slice::from_ref(&lane)).await.unwrap();
    let mut subscription = queue.subscribe(&lane, &lane, 1_000).await.unwrap();
    for i in 0..20 {
        queue.publish(&lane, records(i * 10..(i + 1) * 10)).await.unwrap();
        queue.depth(&lane, &lane).await.unwrap();
    }
    let taken = take(&mut subscription, 200).await;
    assert_eq!(taken.len(), 200, "nothing came twice: there was no second rebalance");
    subscription.close().await;
}

#[tokio::test]
async fn partitions_that_are_added_take_their_share() {
    let (queue, lane) = (queue(), conformance::lane());
    let admin: AdminClient<DefaultClientContext> = queue.config.create().unwrap();
    let topic = NewTopic::new(&lane, 2, TopicReplication::Fixed(1));
    admin.create_topics(&[topic], &AdminOptions::new()).await.unwrap();
    queue.publish(&lane, records(0..1)).await.unwrap();
    let more = NewPartitions::new(&lane, 5);
    admin.create_partitions(&[more], &AdminOptions::new()).await.unwrap();
    let all = async {
        let mut used = BTreeSet::new();
        while used.len() < 5 {
            queue.depth(&lane, &lane).await.unwrap();
            used.extend(queue.publish(&lane, records(0..1)).await.map(|at| at.partition));
        }
    };
    tokio::time::timeout(Duration::from_secs(30), all).await.expect("each partition gets records");
}

/// CPU time of the thread that has this name, in milliseconds.
fn thread_ms(name: &str) -> u64 {
    let tasks = std::fs::read_dir("/proc/self/task").unwrap().map(|task| task.unwrap().path());
    let comm = |task: &std::path::Path| std::fs::read_to_string(task.join("comm")).unwrap_or_default();
    let task = tasks.into_iter().find(|task| comm(task).trim() == name).expect("the thread runs");
    let stat = std::fs::read_to_string(task.join("stat")).unwrap();
    let fields = stat.rsplit_once(')').unwrap().1.split_whitespace().skip(11).take(2);
    // Ticks of 10 ms: user and system.
    fields.map(|ticks| ticks.parse::<u64>().unwrap() * 10).sum()
}

/// Milliseconds of processor time that a poller takes in a second in which nothing can be given, with so many records
/// left to give, when the reader has been busy for so long already.
async fn used_while_busy(left: u32, busy_for: Duration) -> u64 {
    // Of a thread's name the system keeps 15 bytes.
    let (queue, lane) = (queue(), format!("busy-{:04x}", fastrand::u16(..)));
    let mut subscription = queue.subscribe(&lane, &lane, 8_000).await.unwrap();
    queue.publish(&lane, records(0..1)).await.unwrap();
    take(&mut subscription, 1).await;
    while subscription.taken.len() < subscription.taken.max_capacity() {
        queue.publish(&lane, records(0..10)).await.unwrap();
    }
    queue.publish(&lane, records(0..left)).await.unwrap();
    pass(busy_for).await;
    let before = thread_ms(&format!("kafka {lane}"));
    pass(Duration::from_secs(1)).await;
    let used = thread_ms(&format!("kafka {lane}")) - before;
    subscription.close().await;
    used
}

/// Lets real time pass: processor time is measured in it.
async fn pass(time: Duration) {
    let _ = tokio::time::timeout(time, std::future::pending::<()>()).await;
}

#[tokio::test]
async fn a_poller_whose_reader_is_busy_costs_nothing() {
    let used = used_while_busy(10, Duration::ZERO).await;
    assert!(used < 300, "{used} ms of a second with fewer records than it gives at once");
    let used = used_while_busy(1_500, Duration::from_millis(2_500)).await;
    assert!(used < 300, "{used} ms of a second with its partitions paused");
}

/// Reads on and marks all as done, until nothing is left in the partitions that `mine` picks.
async fn drain(queue: &KafkaQueue, lane: &str, subscription: &mut Subscription, mine: impl Fn(i32) -> bool) {
    let all = async {
        loop {
            let depths = queue.depth(lane, lane).await.unwrap();
            if depths.iter().all(|depth| !mine(depth.partition) || depth.position == depth.end) {
                return;
            }
            if let Ok(Some(more)) =
                tokio::time::timeout(Duration::from_secs(1), subscription.taken.recv()).await
            {
                subscription.done.send(receipts(&more)).unwrap();
            }
        }
    };
    tokio::time::timeout(Duration::from_secs(20), all).await.expect("all is read to its end");
}

#[tokio::test]
async fn a_full_reader_that_is_given_more_partitions_goes_on_with_all_of_them() {
    let (queue, lane) = (queue(), conformance::lane());
    queue.ensure(std::slice::from_ref(&lane)).await.unwrap();
    let mut leaves = queue.subscribe(&lane, &lane, 100).await.unwrap();
    let mut stays = queue.subscribe(&lane, &lane, 100).await.unwrap();
    // Twelve partitions are dealt six and six, after the first to come had all.
    let mut own = BTreeSet::new();
    let mut theirs = BTreeSet::new();
    while own.len() < 6 || theirs.len() < 6 {
        queue.publish(&lane, records(0..1)).await.unwrap();
        for (reader, seen) in [(&mut leaves, &mut theirs), (&mut stays, &mut own)] {
            while let Ok(more) = reader.taken.try_recv() {
                seen.extend(more.iter().map(|taken| taken.receipt.partition));
                reader.done.send(receipts(&more)).unwrap();
            }
        }
        if !own.is_disjoint(&theirs) {
            own.clear();
            theirs.clear();
        }
    }
    for _ in 0..24 {
        queue.publish(&lane, records(0..500)).await.unwrap();
    }
    drain(&queue, &lane, &mut leaves, |partition| theirs.contains(&partition)).await;
    let mut out = take(&mut stays, 100).await;
    // Full, it is paused; then room is made, too little to go on, and partitions come to it.
    while let Ok(Some(more)) = tokio::time::timeout(Duration::from_secs(1), stays.taken.recv()).await {
        out.extend(more);
    }
    stays.done.send(receipts(&out.split_off(85))).unwrap();
    leaves.close().await;
    for _ in 0..24 {
        queue.publish(&lane, records(0..1)).await.unwrap();
    }
    out.extend(take(&mut stays, 1).await);
    stays.done.send(receipts(&out)).unwrap();
    drain(&queue, &lane, &mut stays, |_| true).await;
    stays.close().await;
}

/// Deletes a lane and publishes until it is there again.
async fn make_anew(queue: &KafkaQueue, lane: &str) {
    let admin: AdminClient<DefaultClientContext> = queue.config.create().unwrap();
    admin.delete_topics(&[lane], &AdminOptions::new()).await.unwrap();
    publish_at_last(queue, lane).await;
}

/// Publishes as producers do: again, until the broker has it. A partition of a lane made anew may still be unknown.
async fn publish_at_last(queue: &KafkaQueue, lane: &str) {
    let published = tokio::time::timeout(Duration::from_secs(30), async {
        while queue.publish(lane, records(0..50)).await.is_err() {}
    });
    published.await.expect("publishing goes on");
}

/// The reader may find that its position is past the end, and start again; or the new log has grown to it
/// by then, and the reader sees no difference. The group's position must show that.
#[tokio::test]
async fn a_lane_that_is_deleted_and_made_anew_is_read_or_seen_to_be_passed() {
    let (queue, lane) = (queue(), conformance::lane());
    queue.ensure(std::slice::from_ref(&lane)).await.unwrap();
    let mut subscription = queue.subscribe(&lane, &lane, 1_000).await.unwrap();
    for _ in 0..12 {
        queue.publish(&lane, records(0..50)).await.unwrap();
    }
    drain(&queue, &lane, &mut subscription, |_| true).await;
    make_anew(&queue, &lane).await;
    for _ in 0..12 {
        publish_at_last(&queue, &lane).await;
    }
    drain(&queue, &lane, &mut subscription, |_| true).await;
    subscription.close().await;
}

#[tokio::test]
async fn a_lane_that_is_deleted_under_a_full_reader_is_read_when_it_is_made_anew() {
    let (queue, lane) = (queue(), conformance::lane());
    queue.ensure(std::slice::from_ref(&lane)).await.unwrap();
    let mut subscription = queue.subscribe(&lane, &lane, 100).await.unwrap();
    for _ in 0..24 {
        queue.publish(&lane, records(0..100)).await.unwrap();
    }
    let out = take(&mut subscription, 100).await;
    make_anew(&queue, &lane).await;
    subscription.done.send(receipts(&out)).unwrap();
    drain(&queue, &lane, &mut subscription, |_| true).await;
    subscription.close().await;
}
