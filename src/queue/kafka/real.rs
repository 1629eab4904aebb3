//! Against a real broker.

use std::time::Duration;

use super::*;
use crate::queue::conformance::{self, receipts, records, take};

#[expect(clippy::disallowed_methods, reason = "tests are told by the environment where Kafka is")]
fn queue() -> KafkaQueue {
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
    let place = queue.publish(&lane, records(0..10)).await.unwrap();
    assert_eq!(place.offset, 9);
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
async fn a_lane_that_is_deleted_and_made_anew_is_read_from_its_start() {
    let (queue, lane) = (queue(), conformance::lane());
    queue.ensure(std::slice::from_ref(&lane)).await.unwrap();
    let mut subscription = queue.subscribe(&lane, &lane, 1_000).await.unwrap();
    queue.publish(&lane, records(0..50)).await.unwrap();
    let taken = take(&mut subscription, 50).await;
    subscription.done.send(receipts(&taken)).unwrap();

    let admin: AdminClient<DefaultClientContext> = queue.config.create().unwrap();
    admin.delete_topics(&[&lane], &AdminOptions::new()).await.unwrap();
    let published = tokio::time::timeout(Duration::from_secs(30), async {
        while queue.publish(&lane, records(50..100)).await.is_err() {}
    });
    published.await.expect("publishing goes on");
    let again = take(&mut subscription, 50).await;
    assert!(again.iter().all(|taken| taken.value.len() == 2));
    subscription.close().await;
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
