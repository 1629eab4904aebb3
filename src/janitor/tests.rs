//! Who is taken for dead and when, and what becomes of a batch.

use super::*;
use crate::clock::Clock;
use crate::message::{NewMessage, Verdict};
use crate::service::{Directory, Presence};
use crate::store::sqlite::SqliteStore;
use crate::store::{
    Begin, Claim, Due, Endpoint, InstanceId, LeaseId, LogPosition, Mask, Record, Records, Store, Urgency,
    Wanted,
};

fn batch(log_position: Option<LogPosition>, orphaned: bool) -> Batch {
    Batch {
        id: BatchId(1),
        lane: "messages".into(),
        owner: InstanceId(1),
        created_at: Timestamp::EPOCH,
        log_position,
        orphaned,
    }
}

fn parts(clock: &Clock) -> Parts {
    let store: Arc<dyn Store> = Arc::new(SqliteStore::in_memory().unwrap());
    Parts {
        queue: Arc::new(crate::queue::embedded::EmbeddedQueue::new(1, clock.clone())),
        cache: Arc::new(crate::cache::memory::MemoryCache::new()),
        clock: clock.clone(),
        metrics: Arc::default(),
        presence: Arc::new(Presence::new(Arc::clone(&store), clock.clone(), "test", "here")),
        directory: Arc::new(Directory::new(Arc::clone(&store))),
        store,
    }
}

/// A term that was won just now.
fn term(clock: &Clock, steady_since: Timestamp) -> Term {
    let since = clock.reading();
    Term { steady_since, since, until: since.instant.after(Duration::from_secs(4)) }
}

/// Somebody sets the clock: all leases seem to have run out.
#[tokio::test(start_paused = true)]
async fn nobody_is_taken_for_dead_because_a_clock_was_set() {
    let clock = Clock::virtual_from(Timestamp::EPOCH.after(LEASE * 1_000));
    let parts = parts(&clock);
    parts.presence.renew().await.unwrap();
    let instance = parts.presence.instance().unwrap();
    let (led, leading) = watch::channel(None);
    let mut janitor = Janitor::new(parts.clone(), leading, None);
    for step in [3_600, -3_600, 15, -15] {
        // It was set before or after the instance has renewed its lease.
        for before in [true, false] {
            tokio::time::advance(LEASE).await;
            parts.presence.renew().await.unwrap();
            led.send_replace(Some(term(&clock, Timestamp::EPOCH)));
            clock.set_wall(step * 1_000_000);
            tokio::time::advance(Duration::from_secs(1)).await;
            if before {
                parts.presence.renew().await.unwrap();
            }
            janitor.step().await.unwrap();
            parts.presence.renew().await.unwrap();
            assert_eq!(parts.presence.instance(), Some(instance), "set by {step} s");
        }
    }
}

/// A retry was to come in three seconds; then somebody sets the clock back by an hour.
#[tokio::test(start_paused = true)]
async fn a_clock_that_is_set_back_delays_no_retry() {
    let clock = Clock::virtual_from(Timestamp::EPOCH.after(LEASE * 1_000));
    let parts = parts(&clock);
    parts.presence.renew().await.unwrap();
    let (led, leading) = watch::channel(None);
    let mut janitor = Janitor::new(parts.clone(), leading, None);
    let due_at = clock.now().after(Duration::from_secs(3));
    let waiting = |at: Timestamp| {
        let (store, lane) = (Arc::clone(&parts.store), ["messages-retry"]);
        async move { !store.due(&lane, at).await.unwrap().lanes.is_empty() }
    };
    wait_until(&parts, due_at).await;
    for back in [0, 3_600] {
        clock.set_wall(-back * 1_000_000);
        led.send_replace(Some(term(&clock, Timestamp::EPOCH)));
        janitor.step().await.unwrap();
        let soon = clock.now().after(Duration::from_millis(2_900));
        assert!(!waiting(soon).await, "set back by {back} s: too early");
        let due = clock.now().after(Duration::from_millis(3_000));
        assert!(waiting(due).await, "set back by {back} s: too late");
    }
}

/// Makes one message wait for another attempt until `due_at`.
async fn wait_until(parts: &Parts, due_at: Timestamp) {
    let (store, now) = (&parts.store, parts.clock.now());
    let owner = parts.presence.instance().unwrap();
    store.put_endpoint(&Endpoint::new("default", "http://localhost:3000")).await.unwrap();
    store.insert(&[NewMessage { recipient: "+1".into(), ..NewMessage::default() }], now).await.unwrap();
    let batch = BatchId::random();
    let (due, lane) = (Due::New(Urgency::Normal), "messages");
    let claim = Claim { due, limit: 1, lane, batch, saturated: &[], owner, now };
    let ticket = store.claim(&claim).await.unwrap().tickets.remove(0);
    let (lease, mut positions) = (LeaseId::random(), Mask::EMPTY);
    positions.set(0);
    let wanted = [Wanted { lease, batch, positions }];
    let begun = store.begin(&Begin { wanted: &wanted, repeated: false, owner }).await.unwrap().remove(0);
    let verdict = Verdict::Retry { lane: "messages-retry".into(), lane_tries: 0, at: due_at };
    let (lane, root) = ("messages".to_owned(), begun.root);
    let record = Record { ticket, lane, lease, root, outcome: None, verdict };
    store.record(&Records { records: &[record], now }).await.unwrap();
}

/// The store is back after an outage, and the janitor is the first to reach it.
#[tokio::test(start_paused = true)]
async fn nobody_is_taken_for_dead_before_the_producer_has_bid_again() {
    let clock = Clock::virtual_from(Timestamp::EPOCH);
    let parts = parts(&clock);
    parts.presence.renew().await.unwrap();
    let instance = parts.presence.instance().unwrap();
    let (led, leading) = watch::channel(Some(term(&clock, Timestamp::EPOCH)));
    let mut janitor = Janitor::new(parts.clone(), leading, None);

    tokio::time::advance(LEASE * 2).await;
    let now = clock.now();
    janitor.step().await.unwrap();
    assert!(parts.store.renew(instance, now, now).await.unwrap(), "its lease could not be renewed before");

    led.send_replace(Some(term(&clock, now)));
    janitor.step().await.unwrap();
    assert!(parts.store.renew(instance, now, now).await.unwrap(), "it has had no time to renew");

    tokio::time::advance(LEASE).await;
    led.send_replace(Some(term(&clock, now)));
    janitor.step().await.unwrap();
    assert!(!parts.store.renew(instance, now, now).await.unwrap(), "a lease's time without a word");
}

#[test]
fn a_batchs_fate_follows_from_what_the_broker_says() {
    let at = |offset| Some(LogPosition { partition: 2, offset });
    let depth = |position, end| vec![Depth { partition: 2, position, end }];
    let soon = Timestamp::EPOCH.after(Duration::from_secs(1));
    let late = Timestamp::EPOCH.after(UNACKNOWLEDGED_MAX + Duration::from_secs(1));
    for (batch, depth, now, expected) in [
        (batch(None, false), None, soon, None),
        (batch(None, false), None, late, Some(Loss::Orphaned)),
        (batch(None, true), None, soon, Some(Loss::Orphaned)),
        (batch(at(9), true), None, late, None),
        (batch(at(9), false), Some(depth(9, 10)), late, None),
        (batch(at(9), false), Some(depth(10, 10)), soon, Some(Loss::Passed)),
        (batch(at(9), false), Some(depth(0, 9)), soon, Some(Loss::Wiped)),
        (batch(at(9), false), Some(Vec::new()), soon, Some(Loss::Wiped)),
    ] {
        assert_eq!(loss_of(&batch, depth.as_deref(), now), expected, "{batch:?} {depth:?}");
    }
}
