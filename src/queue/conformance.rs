//! The queue's conformance suite: what every backend must do.

use std::collections::BTreeSet;
use std::ops::Range;
use std::time::Duration;

use bytes::Bytes;
use tokio::time::timeout;

use super::{LaneRecord, Queue, Receipt, Subscription, Taken};
use crate::clock::{Clock, Timestamp};

/// A broker may take its time over a new group.
const PATIENCE: Duration = Duration::from_secs(30);

pub(crate) fn records(range: Range<u32>) -> Vec<LaneRecord> {
    range
        .map(|i| LaneRecord {
            key: Bytes::from(format!("key {i}")),
            value: Bytes::from(i.to_string()),
            headers: vec![("ams-id", i.to_string())],
        })
        .collect()
}

pub(crate) fn lane() -> String {
    format!("test-{:016x}", fastrand::u64(..))
}

fn number(taken: &Taken) -> u32 {
    std::str::from_utf8(&taken.value).unwrap().parse().unwrap()
}

/// Takes until `count` distinct numbers have come.
pub(crate) async fn take(subscription: &mut Subscription, count: usize) -> Vec<Taken> {
    let (mut all, mut numbers) = (Vec::new(), BTreeSet::new());
    while numbers.len() < count {
        let batch = timeout(PATIENCE, subscription.taken.recv()).await;
        let batch = batch.unwrap_or_else(|_| panic!("{} of {count} records came", numbers.len()));
        for taken in batch.expect("the subscription goes on") {
            numbers.insert(number(&taken));
            all.push(taken);
        }
    }
    all
}

pub(crate) fn receipts(taken: &[Taken]) -> Vec<Receipt> {
    taken.iter().map(|taken| taken.receipt).collect()
}

/// Runs the whole suite.
pub(crate) async fn all(queue: &dyn Queue) {
    queue.ping().await.unwrap();
    batches_come_whole_and_in_order(queue).await;
    what_is_not_done_comes_again(queue).await;
    the_window_bounds_what_is_out(queue).await;
    groups_are_independent_and_depth_tells(queue).await;
    members_share_a_lane(queue).await;
}

async fn batches_come_whole_and_in_order(queue: &dyn Queue) {
    let lane = lane();
    queue.ensure(std::slice::from_ref(&lane)).await.unwrap();
    queue.ensure(std::slice::from_ref(&lane)).await.unwrap();
    let mut subscription = queue.subscribe(&lane, &lane, 10_000).await.unwrap();
    let mut places = BTreeSet::new();
    let before = Clock::system().now();
    for i in 0..4 {
        let at = queue.publish(&lane, records(i * 100..(i + 1) * 100)).await.unwrap();
        assert_eq!(at.offset % 100, 99, "one batch goes to one partition whole");
        places.insert((at.partition, at.offset));
    }
    assert_eq!(places.len(), 4);
    let taken = take(&mut subscription, 400).await;
    assert_eq!(taken.len(), 400);
    // A broker keeps whole milliseconds.
    let published = Timestamp::from_micros(before.as_micros() / 1_000 * 1_000)..=Clock::system().now();
    assert!(taken.iter().all(|taken| published.contains(&taken.published_at)), "{published:?}");
    assert_eq!(&taken[0].key[..], format!("key {}", number(&taken[0])).as_bytes());
    let mut last: std::collections::BTreeMap<i32, (i64, u32)> = std::collections::BTreeMap::new();
    for taken in &taken {
        let (offset, number) = (taken.receipt.offset, number(taken));
        if let Some((before, earlier)) = last.insert(taken.receipt.partition, (offset, number)) {
            assert!(offset > before && number > earlier, "order within a partition");
        }
    }
    subscription.close().await;
}

async fn what_is_not_done_comes_again(queue: &dyn Queue) {
    let lane = lane();
    queue.ensure(std::slice::from_ref(&lane)).await.unwrap();
    queue.publish(&lane, records(0..100)).await.unwrap();
    let mut first = queue.subscribe(&lane, &lane, 1_000).await.unwrap();
    let taken = take(&mut first, 100).await;
    // All but number 40 are done, in reverse: the position stays before it.
    let mut done = receipts(&taken);
    done.reverse();
    done.retain(|receipt| *receipt != taken[40].receipt);
    first.done.send(done).unwrap();
    first.close().await;
    let mut second = queue.subscribe(&lane, &lane, 1_000).await.unwrap();
    let again = take(&mut second, 60).await;
    assert_eq!(number(&again[0]), 40);
    second.done.send(receipts(&again)).unwrap();
    second.close().await;
    let depth = queue.depth(&lane, &lane).await.unwrap();
    assert!(depth.iter().all(|depth| depth.position == depth.end), "{depth:?}");
}

async fn the_window_bounds_what_is_out(queue: &dyn Queue) {
    let lane = lane();
    queue.ensure(std::slice::from_ref(&lane)).await.unwrap();
    for i in 0..30 {
        queue.publish(&lane, records(i * 100..(i + 1) * 100)).await.unwrap();
    }
    let mut subscription = queue.subscribe(&lane, &lane, 200).await.unwrap();
    let mut out = take(&mut subscription, 1).await;
    while let Ok(Some(more)) = timeout(Duration::from_secs(1), subscription.taken.recv()).await {
        out.extend(more);
    }
    // What is on its way when the window fills may still come: a batch or two.
    assert!((200..3_000).contains(&out.len()), "{} are out", out.len());
    subscription.done.send(receipts(&out)).unwrap();
    let mut rest = out.len();
    while rest < 3_000 {
        let more = timeout(PATIENCE, subscription.taken.recv()).await.expect("more comes").unwrap();
        rest += more.len();
        subscription.done.send(receipts(&more)).unwrap();
    }
    subscription.close().await;
}

async fn groups_are_independent_and_depth_tells(queue: &dyn Queue) {
    let lane = lane();
    assert!(queue.depth(&lane, "nobody").await.unwrap().iter().all(|depth| depth.end == 0));
    queue.ensure(std::slice::from_ref(&lane)).await.unwrap();
    let at = queue.publish(&lane, records(0..50)).await.unwrap();
    let (one, other) = (format!("{lane}-one"), format!("{lane}-other"));
    // A queue in memory keeps records for the groups that it knows.
    queue.subscribe(&lane, &other, 100).await.unwrap().close().await;
    let mut first = queue.subscribe(&lane, &one, 100).await.unwrap();
    let taken = take(&mut first, 50).await;
    first.done.send(receipts(&taken)).unwrap();
    first.close().await;
    let at = |depth: Vec<super::Depth>| {
        let depth = depth.into_iter().find(|depth| depth.partition == at.partition).unwrap();
        (depth.position, depth.end)
    };
    assert_eq!(at(queue.depth(&lane, &one).await.unwrap()), (50, 50));
    assert_eq!(at(queue.depth(&lane, &other).await.unwrap()), (0, 50));
    let mut second = queue.subscribe(&lane, &other, 100).await.unwrap();
    assert_eq!(take(&mut second, 50).await.len(), 50);
    second.close().await;
}

async fn members_share_a_lane(queue: &dyn Queue) {
    let lane = lane();
    queue.ensure(std::slice::from_ref(&lane)).await.unwrap();
    let mut one = queue.subscribe(&lane, &lane, 10_000).await.unwrap();
    queue.publish(&lane, records(0..10)).await.unwrap();
    take(&mut one, 10).await;
    // A second member joins while the first holds records that are not done, and then the first leaves.
    let mut other = queue.subscribe(&lane, &lane, 10_000).await.unwrap();
    let mut numbers = BTreeSet::new();
    for i in 1..13 {
        queue.publish(&lane, records(i * 100..i * 100 + 10)).await.unwrap();
    }
    one.close().await;
    while numbers.len() < 130 {
        let batch = timeout(PATIENCE, other.taken.recv()).await;
        let batch =
            batch.unwrap_or_else(|_| panic!("{} of 130 came to the one that stayed", numbers.len())).unwrap();
        numbers.extend(batch.iter().map(number));
        other.done.send(receipts(&batch)).unwrap();
    }
    other.close().await;
}
