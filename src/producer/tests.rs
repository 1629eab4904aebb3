//! A producer's steps on embedded parts and a manual clock.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};

use async_trait::async_trait;

use super::*;
use crate::cache::memory::MemoryCache;
use crate::clock::Clock;
use crate::lane::tests::lane;
use crate::message::{MessageId, NewMessage, Status};
use crate::queue::embedded::EmbeddedQueue;
use crate::queue::{self, Depth, LaneRecord, Queue, QueueError, Subscription};
use crate::rate::Rate;
use crate::service::{Directory, Presence};
use crate::store::conformance::unhold;
use crate::store::sqlite::SqliteStore;
use crate::store::{Endpoint, LogPosition, Store};
use crate::telemetry::Metrics;

struct Bench {
    context: Context,
    producer: Producer,
}

impl Bench {
    /// A producer that has not stepped yet, and no message.
    async fn new(pacing: Option<Rate>) -> Bench {
        Bench::on(|clock| Arc::new(EmbeddedQueue::new(3, clock)), pacing).await
    }

    async fn on(queue: impl FnOnce(Clock) -> Arc<dyn Queue>, pacing: Option<Rate>) -> Bench {
        let clock = Clock::manual(Timestamp::from_micros(1_800_000_000_000_000));
        let store: Arc<dyn Store> = Arc::new(SqliteStore::in_memory().unwrap());
        for name in ["default", "slow"] {
            store.put_endpoint(&Endpoint::new(name, "http://localhost:3000")).await.unwrap();
        }
        let context = Context {
            presence: Arc::new(Presence::new(Arc::clone(&store), clock.clone(), "up", "here")),
            directory: Arc::new(Directory::new(Arc::clone(&store))),
            queue: queue(clock.clone()),
            cache: Arc::new(MemoryCache::new(&clock)),
            metrics: Arc::new(Metrics::default()),
            clock,
            store,
        };
        context.presence.renew().await.unwrap();
        context.directory.refresh().await.unwrap();
        let options = ProducerOptions {
            fresh_lane: "messages".into(),
            batch: 100,
            capacity: 100_000,
            poll: Duration::from_millis(20),
            pacing,
        };
        Bench { producer: Producer::new(context.clone(), options), context }
    }

    /// A producer that has claimed one message, so that it knows that `slow` is busy, and these messages to come.
    async fn beside_slow(endpoints: impl Iterator<Item = &str>) -> Bench {
        let mut bench = Bench::new(None).await;
        let context = &bench.context;
        context
            .store
            .report_saturated(context.presence.instance().unwrap(), &["slow".to_owned()])
            .await
            .unwrap();
        bench.insert(["default"].into_iter()).await;
        while bench.producer.saturated.is_empty() {
            bench.step().await;
        }
        bench.insert(endpoints).await;
        bench
    }

    async fn insert(&self, endpoints: impl Iterator<Item = &str>) {
        let message = |endpoint: &str| NewMessage {
            recipient: "+90".into(),
            content: "Hello".into(),
            endpoint: Some(endpoint.into()),
            ..NewMessage::default()
        };
        let messages: Vec<_> = endpoints.map(message).collect();
        self.context.store.insert(&messages, self.context.clock.now()).await.unwrap();
    }

    /// One step, and the time that it says to rest.
    async fn step(&mut self) {
        let step = self.producer.step().await.unwrap();
        self.context.clock.advance(match step {
            Step::Worked => Duration::from_millis(1),
            Step::Idle(rest) => rest,
        });
        // What is being published goes on meanwhile.
        tokio::task::yield_now().await;
        self.context.presence.renew().await.unwrap();
    }

    /// How many messages of each endpoint have each status, with a mark for those that are held.
    async fn counts(&self) -> BTreeMap<String, usize> {
        let mut counts = BTreeMap::new();
        for id in 1.. {
            let Some(found) = self.context.store.message(MessageId(id)).await.unwrap() else { break };
            let held = if found.held.is_some() { " held" } else { "" };
            *counts.entry(format!("{} {}{held}", found.endpoint, found.status)).or_insert(0) += 1;
        }
        counts
    }

    /// Steps until so many messages have this status.
    async fn until(&mut self, what: &str, count: usize) -> BTreeMap<String, usize> {
        for _ in 0..2_000 {
            let counts = self.counts().await;
            if counts.get(what) == Some(&count) {
                return counts;
            }
            self.step().await;
        }
        panic!("still not {count} {what}: {:?}", self.counts().await);
    }
}

#[tokio::test]
async fn messages_of_a_saturated_endpoint_are_held_and_the_others_go() {
    let mut bench = Bench::beside_slow(["slow", "default"].into_iter().cycle().take(1_600)).await;
    let counts = bench.until("default queued", 801).await;
    assert_eq!(counts.get("slow queued"), None, "{counts:?}");
    bench.until("slow pending held", 800).await;
    let (store, now) = (&bench.context.store, bench.context.clock.now());
    unhold(&**store, "slow", Held::EndpointBusy, 40, now).await;
    let counts = bench.until("slow queued", 40).await;
    assert_eq!(counts.get("slow pending held"), Some(&760), "{counts:?}");
}

/// Somebody has closed an endpoint again, and the producer has not heard of it yet: what it frees, its claim holds.
#[tokio::test]
async fn a_producer_that_frees_in_vain_rests_between() {
    let mut bench = Bench::new(None).await;
    let closed = Endpoint { enabled: false, ..Endpoint::new("slow", "http://localhost:3000") };
    bench.context.store.put_endpoint(&closed).await.unwrap();
    bench.insert(std::iter::repeat_n("slow", 100)).await;
    bench.until("slow pending held", 100).await;
    bench.context.clock.advance(UNHOLD);
    // As many as one claim takes, so that each claim is full.
    let mut worked = 0;
    while worked < 10 && bench.producer.step().await.unwrap() == Step::Worked {
        worked += 1;
    }
    assert!(worked < 10, "it works without a rest, and nothing comes of it");
}

/// An urgent message waits behind no other.
#[tokio::test]
async fn urgent_messages_go_before_a_backlog() {
    let mut bench = Bench::new(None).await;
    bench.insert(["default"; 3_000].into_iter()).await;
    let urgent =
        NewMessage { recipient: "+90".into(), content: "Hello".into(), priority: 1, ..NewMessage::default() };
    bench.context.store.insert(&[urgent], bench.context.clock.now()).await.unwrap();
    bench.step().await;
    let status = bench.context.store.message(MessageId(3_001)).await.unwrap().unwrap().status;
    assert_eq!(status, Status::Queued);
    assert!(bench.counts().await.contains_key("default pending"));
}

#[tokio::test]
async fn a_timed_row_is_on_its_lane_when_its_time_comes_unless_it_is_paced() {
    let second = Duration::from_secs(1);
    for pacing in [None, Some(Rate { count: 10, interval: second })] {
        let mut bench = Bench::new(pacing).await;
        let due_at = bench.context.clock.now().after(3 * second);
        let scheduled = NewMessage {
            recipient: "+90".into(),
            content: "Hello".into(),
            send_at: Some(due_at),
            ..NewMessage::default()
        };
        bench.context.store.insert(&[scheduled], bench.context.clock.now()).await.unwrap();
        bench.until("default queued", 1).await;
        let now = bench.context.clock.now();
        let (early, late) = (due_at.since(now), now.since(due_at));
        if pacing.is_none() {
            assert!(Duration::ZERO < early && early <= Ticket::AHEAD, "{early:?}");
        } else {
            assert!(early.is_zero() && late < 2 * TIMED, "{early:?}, {late:?}");
        }
        // The next looks follow sooner only where a look came after the time.
        let in_burst = bench.context.clock.instant() < bench.producer.burst_until;
        assert_eq!(in_burst, pacing.is_some());
    }
}

/// A wall clock that is set changes nothing of what a producer does in a second: it bids, claims new rows and those
/// whose time has come, and asks the broker.
#[tokio::test]
async fn a_wall_clock_that_is_set_stops_nothing() {
    const HOUR: i64 = 3_600_000_000;
    for set in [-HOUR, HOUR] {
        for pacing in [None, Some(Rate { count: 10, interval: Duration::from_secs(1) })] {
            let mut bench = Bench::new(pacing).await;
            bench.insert(["default"].into_iter()).await;
            bench.until("default queued", 1).await;
            bench.context.clock.set_wall(set);
            let start = bench.context.clock.instant();
            bench.insert(["default"].into_iter()).await;
            let soon = bench.context.clock.now().after(Duration::from_secs(1));
            let scheduled = NewMessage {
                recipient: "+90".into(),
                content: "Hello".into(),
                send_at: Some(soon),
                ..NewMessage::default()
            };
            bench.context.store.insert(&[scheduled], bench.context.clock.now()).await.unwrap();
            bench.until("default queued", 3).await;
            let took = bench.context.clock.instant().since(start);
            assert!(took < Duration::from_secs(3), "{took:?} after a step of {set} us, paced: {pacing:?}");
            // The leader's term follows the clock, so that another producer would not wait for the old time.
            while bench.context.clock.instant().since(start) < 2 * BID {
                bench.step().await;
            }
            assert!(bench.context.store.control(bench.context.clock.now()).await.unwrap().active);
        }
    }
}

/// A broker that is away until a time, and was asked for a lane's depth at these.
struct AwayQueue {
    clock: Clock,
    back: Timestamp,
    asked: Arc<Mutex<Vec<Timestamp>>>,
}

fn away<T>() -> queue::Result<T> {
    Err(QueueError::Unavailable("away".to_owned()))
}

#[async_trait]
impl Queue for AwayQueue {
    fn kind(&self) -> &'static str {
        "away"
    }

    async fn ensure(&self, _lanes: &[String]) -> queue::Result<()> {
        away()
    }

    async fn publish(&self, lane: &str, _records: Vec<LaneRecord>) -> queue::Result<LogPosition> {
        if lane == "messages" { away() } else { Ok(LogPosition { partition: 0, offset: 0 }) }
    }

    async fn subscribe(&self, _lane: &str, _group: &str, _window: usize) -> queue::Result<Subscription> {
        away()
    }

    async fn depth(&self, _lane: &str, _group: &str) -> queue::Result<Vec<Depth>> {
        self.asked.lock().unwrap().push(self.clock.now());
        if self.clock.now() < self.back { away() } else { Ok(Vec::new()) }
    }

    async fn ping(&self) -> queue::Result<()> {
        away()
    }
}

/// The lane of new messages takes nothing, and the retry lane does.
#[tokio::test(start_paused = true)]
async fn a_lane_that_takes_nothing_keeps_no_other_waiting() {
    let queue = |clock: Clock| {
        let back = clock.now();
        Arc::new(AwayQueue { clock, back, asked: Arc::default() }) as Arc<dyn Queue>
    };
    let mut bench = Bench::on(queue, None).await;
    // Its batches go on trying as long as this runs.
    for _ in 0..50 {
        bench.insert(["default"].into_iter()).await;
        bench.step().await;
    }
    let publisher = bench.producer.publisher();
    assert!(publisher.is_busy("messages"));
    let counts = bench.counts().await;
    assert!(counts["default pending"] > 30, "what the lane does not take is not claimed: {counts:?}");
    let (under_way, stop) = (publisher.len(), CancellationToken::new());
    for number in 0..20 {
        let ticket = Ticket { batch: BatchId(number), ..crate::ticket::tests::ticket(1) };
        publisher.publish("messages-retry".to_owned(), BatchId(number), vec![ticket], &stop);
    }
    let passed = async {
        while publisher.len() > under_way {
            tokio::task::yield_now().await;
        }
    };
    let in_time = tokio::time::timeout(Duration::from_secs(60), passed).await;
    assert!(in_time.is_ok(), "{} are still under way", publisher.len() - under_way);
}

#[tokio::test]
async fn a_broker_that_is_away_is_asked_ever_more_seldom_and_stops_no_step() {
    let asked = Arc::new(Mutex::new(Vec::new()));
    let queue = |clock: Clock| {
        let back = clock.now().after(Duration::from_secs(8));
        Arc::new(AwayQueue { clock, back, asked: Arc::clone(&asked) }) as Arc<dyn Queue>
    };
    let mut bench = Bench::on(queue, None).await;
    let lane = lane("messages", "messages-dlq", true, 1);
    let start = bench.context.clock.now();
    bench.context.store.put_lane(&lane, start).await.unwrap();
    bench.context.directory.refresh().await.unwrap();
    while bench.producer.capacity.free("messages") == 0 || asked.lock().unwrap().is_empty() {
        bench.step().await;
        assert!(bench.context.clock.now().since(start) < Duration::from_secs(12), "{asked:?}");
    }
    // The answer to a question is looked at in the next step, some 20 ms later.
    let wait = |pair: &[Timestamp]| pair[1].since(pair[0]).as_millis() / 100 * 100;
    let waits: Vec<_> = asked.lock().unwrap().windows(2).map(wait).collect();
    assert_eq!(waits, [100, 100, 200, 400, 800, 1_600, 2_000, 2_000, 2_000]);
}

#[tokio::test]
async fn a_lane_that_is_nearly_full_gets_no_small_batches() {
    for (capacity, queued) in [(130, 100), (150, 150), (1, 1)] {
        let mut bench = Bench::new(None).await;
        bench.producer.capacity = Capacity::new(bench.context.clone(), capacity);
        bench.insert(std::iter::repeat_n("default", 300)).await;
        let counts = bench.until("default queued", queued).await;
        assert_eq!(counts.get("default pending"), Some(&(300 - queued)), "{counts:?}");
        for _ in 0..50 {
            bench.step().await;
        }
        assert_eq!(bench.counts().await, counts, "a lane for {capacity}");
    }
}
