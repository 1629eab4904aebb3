//! Who is taken for dead and when, and what becomes of a batch.

use std::sync::Arc;

use super::*;
use crate::clock::Clock;
use crate::message::{NewMessage, Verdict};
use crate::service::{Directory, Presence};
use crate::store::sqlite::SqliteStore;
use crate::store::{
    Begin, Claim, Due, Endpoint, InstanceId, LeaseId, LogPosition, Mask, Record, Records, Store, Urgency,
    Wanted,
};
use crate::ticket::Ticket;

fn context(clock: &Clock) -> Context {
    let store: Arc<dyn Store> = Arc::new(SqliteStore::in_memory().unwrap());
    Context {
        queue: Arc::new(crate::queue::embedded::EmbeddedQueue::new(1, clock.clone())),
        cache: Arc::new(crate::cache::memory::MemoryCache::new(clock)),
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
    Term { steady_since, since, until: since.instant.after(Duration::from_secs(4)), checks: 0 }
}

/// Somebody sets the clock: all leases seem to have run out.
#[tokio::test(start_paused = true)]
async fn nobody_is_taken_for_dead_because_a_clock_was_set() {
    let clock = Clock::virtual_from(Timestamp::EPOCH.after(LEASE * 1_000));
    let context = context(&clock);
    context.presence.renew().await.unwrap();
    let instance = context.presence.instance().unwrap();
    let (led, leading) = watch::channel(None);
    let mut janitor = Janitor::new(context.clone(), Publisher::new(context.clone()), leading, None);
    for step in [3_600, -3_600, 15, -15] {
        // It was set before or after the instance has renewed its lease.
        for before in [true, false] {
            tokio::time::advance(LEASE).await;
            context.presence.renew().await.unwrap();
            led.send_replace(Some(term(&clock, Timestamp::EPOCH)));
            clock.set_wall(step * 1_000_000);
            tokio::time::advance(Duration::from_secs(1)).await;
            if before {
                context.presence.renew().await.unwrap();
            }
            janitor.step().await.unwrap();
            context.presence.renew().await.unwrap();
            assert_eq!(context.presence.instance(), Some(instance), "set by {step} s");
        }
    }
}

/// A retry was to come in three seconds; then somebody sets the clock back by an hour.
#[tokio::test(start_paused = true)]
async fn a_clock_that_is_set_back_delays_no_retry() {
    let clock = Clock::virtual_from(Timestamp::EPOCH.after(LEASE * 1_000));
    let context = context(&clock);
    context.presence.renew().await.unwrap();
    let (led, leading) = watch::channel(None);
    let mut janitor = Janitor::new(context.clone(), Publisher::new(context.clone()), leading, None);
    let due_at = clock.now().after(Duration::from_secs(3));
    let waiting = |at: Timestamp| {
        let (store, lane) = (Arc::clone(&context.store), ["messages-retry"]);
        async move { !store.due(&lane, at).await.unwrap().lanes.is_empty() }
    };
    wait_until(&context, due_at).await;
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

/// Claims one new message in a batch of `owner`'s, which nobody publishes.
async fn claimed(context: &Context, owner: InstanceId) -> Ticket {
    let (store, now) = (&context.store, context.clock.now());
    store.put_endpoint(&Endpoint::new("default", "http://localhost:3000")).await.unwrap();
    store.insert(&[NewMessage { recipient: "+1".into(), ..NewMessage::default() }], now).await.unwrap();
    let (due, lane, batch) = (Due::New(Urgency::Normal), "messages", BatchId::random());
    let claim = Claim { due, limit: 1, lane, batch, saturated: &[], owner, now };
    store.claim(&claim).await.unwrap().tickets.remove(0)
}

/// Makes one message wait for another attempt until `due_at`.
async fn wait_until(context: &Context, due_at: Timestamp) {
    let (store, owner) = (&context.store, context.presence.instance().unwrap());
    let ticket = claimed(context, owner).await;
    let (lease, mut positions) = (LeaseId::random(), Mask::EMPTY);
    positions.set(0);
    let wanted = [Wanted { lease, batch: ticket.batch, positions }];
    let begun = store.begin(&Begin { wanted: &wanted, repeated: false, owner }).await.unwrap().remove(0);
    let verdict = Verdict::Retry { lane: "messages-retry".into(), lane_tries: 0, at: due_at };
    let (lane, root) = ("messages".into(), begun.root);
    let record = Record {
        ticket: ticket.into(),
        lane,
        lease,
        root,
        outcome: None,
        verdict,
        judged_at: context.clock.now(),
    };
    store.record(&Records { records: &[record], now: context.clock.now() }).await.unwrap();
}

/// A claim, or a reissue, whose answer was lost came to be all the same: of this process, or of a producer that lives and
/// leads no more.
#[tokio::test(start_paused = true)]
async fn a_batch_that_nobody_publishes_is_issued_again_within_the_promised_time() {
    for is_own in [true, false] {
        let clock = Clock::virtual_from(Timestamp::EPOCH.after(LEASE * 1_000));
        let context = context(&clock);
        context.presence.renew().await.unwrap();
        let (own, now) = (context.presence.instance().unwrap(), clock.now());
        let other = context.store.enroll("producer", "there", now, now.after(LEASE * 9)).await.unwrap();
        claimed(&context, if is_own { own } else { other }).await;
        let (led, leading) = watch::channel(None);
        let mut janitor = Janitor::new(context.clone(), Publisher::new(context.clone()), leading, None);
        let start = clock.instant();
        let is_queued = async || {
            let batches = context.store.batches(clock.now(), 10).await.unwrap();
            batches.iter().all(|batch| batch.log_position.is_some())
        };
        while !is_queued().await {
            led.send_replace(Some(term(&clock, Timestamp::EPOCH)));
            janitor.step().await.unwrap();
            context.presence.renew().await.unwrap();
            tokio::time::advance(ROUND).await;
        }
        let limit = Duration::from_secs(if is_own { 3 } else { 20 });
        assert!(clock.instant().since(start) <= limit, "own: {is_own}");
    }
}

/// The store is back after an outage, and the janitor is the first to reach it.
#[tokio::test(start_paused = true)]
async fn nobody_is_taken_for_dead_before_the_producer_has_bid_again() {
    let clock = Clock::virtual_from(Timestamp::EPOCH);
    let context = context(&clock);
    context.presence.renew().await.unwrap();
    let instance = context.presence.instance().unwrap();
    let (led, leading) = watch::channel(Some(term(&clock, Timestamp::EPOCH)));
    let mut janitor = Janitor::new(context.clone(), Publisher::new(context.clone()), leading, None);

    tokio::time::advance(LEASE * 2).await;
    let now = clock.now();
    janitor.step().await.unwrap();
    assert!(context.store.renew(instance, now, now).await.unwrap(), "its lease could not be renewed before");

    led.send_replace(Some(term(&clock, now)));
    janitor.step().await.unwrap();
    assert!(context.store.renew(instance, now, now).await.unwrap(), "it has had no time to renew");

    tokio::time::advance(LEASE).await;
    led.send_replace(Some(term(&clock, now)));
    janitor.step().await.unwrap();
    assert!(!context.store.renew(instance, now, now).await.unwrap(), "a lease's time without a word");
}

#[test]
fn a_batchs_fate_follows_from_what_the_broker_says() {
    const AT: LogPosition = LogPosition { partition: 2, offset: 9 };
    let depth = |position, end| vec![Depth { partition: 2, position, end }];
    let seconds = Duration::from_secs;
    for (own, orphaned, ago, expected) in [
        (true, false, seconds(0), None),
        (true, false, ANSWERED, Some(Loss::Forgotten)),
        (false, false, seconds(5), None),
        (false, false, UNACKNOWLEDGED_MAX, Some(Loss::Orphaned)),
        (false, true, seconds(0), Some(Loss::Orphaned)),
    ] {
        assert_eq!(unpublished(own, orphaned, ago), expected, "{own} {orphaned} {ago:?}");
    }
    for (depth, expected) in [
        (None, None),
        (Some(depth(9, 10)), None),
        (Some(depth(10, 10)), Some(Loss::Passed)),
        (Some(depth(0, 9)), Some(Loss::Wiped)),
        (Some(Vec::new()), Some(Loss::Wiped)),
    ] {
        assert_eq!(passed_or_wiped(AT, depth.as_deref()), expected, "{depth:?}");
    }
}
