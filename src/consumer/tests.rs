//! A consumer on embedded parts whose deliveries a script makes up.

use std::sync::Arc;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use futures_util::future::BoxFuture;
use tokio::sync::Notify;

use super::*;
use crate::cache::memory::MemoryCache;
use crate::clock::{Clock, Timestamp};
use crate::delivery::{Script, Tried};
use crate::message::{Class, Held, MessageId, NewMessage, Outcome, Status, Times};
use crate::producer::{Producer, ProducerOptions};
use crate::queue::embedded::EmbeddedQueue;
use crate::rate::Rate;
use crate::service::{Directory, Presence};
use crate::shortage::{Resource, Shortage};
use crate::store::sqlite::SqliteStore;
use crate::store::{Endpoint, Store};
use crate::ticket::Ticket;

const COUNT: i64 = 100;

/// A store with endpoints and messages, and what a process needs beside it.
struct Bench {
    context: Context,
    lane: Lane,
}

impl Bench {
    /// `COUNT` messages for each of these endpoints.
    async fn new(endpoints: &[Endpoint]) -> Bench {
        let clock = Clock::virtual_from(Timestamp::EPOCH);
        let store: Arc<dyn Store> = Arc::new(SqliteStore::in_memory().unwrap());
        for endpoint in endpoints {
            store.put_endpoint(endpoint).await.unwrap();
            let message = NewMessage {
                recipient: "+90".into(),
                content: "Hello".into(),
                endpoint: Some(endpoint.name.clone()),
                ..NewMessage::default()
            };
            let messages: Vec<_> = (0..COUNT).map(|_| message.clone()).collect();
            store.insert(&messages, clock.now()).await.unwrap();
        }
        let context = Context {
            presence: Arc::new(Presence::new(Arc::clone(&store), clock.clone(), "up", "test")),
            directory: Arc::new(Directory::new(Arc::clone(&store))),
            queue: Arc::new(EmbeddedQueue::new(1, clock.clone())),
            cache: Arc::new(MemoryCache::new(&clock)),
            metrics: Arc::default(),
            clock,
            store,
        };
        context.presence.renew().await.unwrap();
        context.directory.refresh().await.unwrap();
        let lane = Lane {
            topic: "messages".into(),
            group: "group".into(),
            next: "messages-retry".into(),
            fresh: true,
            tries: 1,
            interval: Duration::from_secs(3),
            interval_max: Duration::from_secs(3),
        };
        Bench { context, lane }
    }

    /// Works until `done`, then stops cleanly.
    async fn run(&self, script: Script, done: impl Future<Output = ()>) {
        let (stop, alive) = (CancellationToken::new(), CancellationToken::new());
        let options = ProducerOptions {
            fresh_lane: self.lane.topic.clone(),
            batch: 1_000,
            capacity: 1_000,
            poll: Duration::from_millis(100),
            pacing: None,
        };
        let mut producer = Some(Producer::new(self.context.clone(), options));
        let delivery = Arc::new(Delivery::scripted(self.context.clock.clone(), script));
        let consumer =
            ConsumerOptions { lane: self.lane.clone(), window: 1_000, drain: Duration::from_secs(30) };
        let wake = Notify::new();
        let work = async {
            let ((), ended) = tokio::join!(
                producer.take().unwrap().run(&stop, &wake),
                run(self.context.clone(), delivery, consumer, &stop),
            );
            ended.unwrap();
            alive.cancel();
        };
        let until = async {
            tokio::time::timeout(Duration::from_secs(600), done).await.expect("it is done in time");
            stop.cancel();
        };
        tokio::join!(work, until, self.context.presence.run(&alive), self.context.directory.run(&alive));
    }

    /// Waits until so many messages have this status.
    async fn until(&self, status: Status, count: usize) {
        let mut tick = tokio::time::interval(Duration::from_millis(100));
        while self.with(status).await < count {
            tick.tick().await;
        }
    }

    async fn with(&self, status: Status) -> usize {
        let all: Vec<_> = (1..=2 * COUNT).map(MessageId).collect();
        let messages = self.context.store.messages(&all).await.unwrap();
        messages.iter().filter(|message| message.status == status).count()
    }
}

fn accepted(clock: &Clock) -> Outcome {
    Outcome {
        class: Class::Accepted,
        status: Some(200),
        address: "http://localhost:3000/".into(),
        error: None,
        answer: String::new(),
        provider_message_id: None,
        provider_message: None,
        retry_after_ms: None,
        started_at: clock.now(),
        times: Times::default(),
    }
}

fn no_descriptor() -> Shortage {
    Shortage { of: Resource::Descriptors, why: "the test took them".to_owned() }
}

/// Takes so long that others can end meanwhile.
async fn take(millis: u64) {
    let _ = tokio::time::timeout(Duration::from_millis(millis), std::future::pending::<()>()).await;
}

/// A receiver to which only so many connections can be had at once; it notes in which order messages came.
fn scarce(clock: &Clock, connections: usize, came: &Arc<Mutex<Vec<i64>>>) -> Script {
    let (clock, came, open) = (clock.clone(), Arc::clone(came), Arc::new(AtomicUsize::new(0)));
    Arc::new(move |ticket: Ticket, _| {
        let (clock, came, open) = (clock.clone(), Arc::clone(&came), Arc::clone(&open));
        Box::pin(async move {
            if open.fetch_add(1, Ordering::SeqCst) >= connections {
                open.fetch_sub(1, Ordering::SeqCst);
                return Err(no_descriptor());
            }
            came.lock().unwrap().push(ticket.id.0);
            take(50).await;
            open.fetch_sub(1, Ordering::SeqCst);
            Ok(accepted(&clock))
        })
    })
}

#[tokio::test(start_paused = true)]
async fn a_message_that_could_not_be_tried_waits_in_its_turn_and_no_attempt_is_recorded() {
    for connections in [1, 7] {
        let bench = Bench::new(&[Endpoint::new("default", "http://localhost:3000")]).await;
        let came = Arc::default();
        let script = scarce(&bench.context.clock, connections, &came);
        bench.run(script, bench.until(Status::Sent, COUNT as usize)).await;
        let came = came.lock().unwrap().clone();
        let mut sorted = came.clone();
        sorted.sort_unstable();
        assert_eq!(sorted, (1..=COUNT).collect::<Vec<_>>(), "each came once");
        if connections == 1 {
            assert_eq!(came, sorted, "in their order");
        }
        for id in 1..=COUNT {
            let attempts = bench.context.store.attempts(MessageId(id)).await.unwrap();
            assert_eq!(attempts.iter().map(|a| a.class).collect::<Vec<_>>(), [Class::Accepted], "{id}");
        }
        let metrics = bench.context.metrics.encode();
        assert!(!metrics.contains("ams_put_off_total{of=\"descriptors\"} 0"), "{metrics}");
        assert!(metrics.contains("verdict=\"released\"} 0"), "nothing was written for it: {metrics}");
    }
}

#[tokio::test(start_paused = true)]
async fn a_lasting_shortage_costs_few_attempts_and_is_over_when_it_is_over() {
    let bench = Bench::new(&[Endpoint::new("default", "http://localhost:3000")]).await;
    let (clock, asked) = (bench.context.clock.clone(), Arc::new(AtomicUsize::new(0)));
    let back = clock.now().after(Duration::from_secs(120));
    let script: Script = {
        let (clock, asked) = (clock.clone(), Arc::clone(&asked));
        Arc::new(move |_, _| {
            let clock = clock.clone();
            asked.fetch_add(1, Ordering::SeqCst);
            let tried = if clock.now() < back { Err(no_descriptor()) } else { Ok(accepted(&clock)) };
            Box::pin(std::future::ready(tried))
        })
    };
    let done = async {
        take(110_000).await;
        let lasting = bench.context.metrics.shortages(clock.instant());
        assert_eq!(lasting.len(), 1, "it is shown all the time");
        assert!(clock.now().since(lasting[0].since) > Duration::from_secs(100), "{lasting:?}");
        let asked = asked.load(Ordering::SeqCst);
        assert!((50..300).contains(&asked), "{asked} in 110 s");
        bench.until(Status::Sent, COUNT as usize).await;
        assert!(clock.now().since(back) < Duration::from_secs(5), "it goes on soon");
        take(6_000).await;
        assert_eq!(bench.context.metrics.shortages(clock.instant()), []);
    };
    bench.run(script, done).await;
}

#[tokio::test(start_paused = true)]
async fn an_endpoint_without_ports_does_not_hold_up_another() {
    let endpoints = ["short", "well"].map(|name| Endpoint::new(name, "http://localhost:3000"));
    let bench = Bench::new(&endpoints).await;
    let clock = bench.context.clock.clone();
    let script: Script = {
        let clock = clock.clone();
        Arc::new(move |_, endpoint| {
            let clock = clock.clone();
            Box::pin(async move {
                take(5).await;
                if endpoint.name == "well" { Ok(accepted(&clock)) } else { Err(no_descriptor()) }
            })
        })
    };
    let start = clock.now();
    bench.run(script, bench.until(Status::Sent, COUNT as usize)).await;
    assert!(clock.now().since(start) < Duration::from_secs(5), "took {:?}", clock.now().since(start));
}

/// A receiver that hangs until `back` on all endpoints but `healthy`, which answers in a few milliseconds; it notes how
/// many attempts hang at once, at most.
fn hanging(clock: &Clock, back: Timestamp, most: &Arc<AtomicUsize>) -> Script {
    let (clock, most, now) = (clock.clone(), Arc::clone(most), Arc::new(AtomicUsize::new(0)));
    Arc::new(move |_, endpoint: Endpoint| {
        let (clock, most, now) = (clock.clone(), Arc::clone(&most), Arc::clone(&now));
        Box::pin(async move {
            if endpoint.name == "healthy" || clock.now() >= back {
                take(5).await;
                return Ok(accepted(&clock));
            }
            most.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            take(10_000).await;
            now.fetch_sub(1, Ordering::SeqCst);
            Ok(Outcome { class: Class::Timeout, status: None, ..accepted(&clock) })
        })
    })
}

#[tokio::test(start_paused = true)]
async fn endpoints_that_hang_leave_a_healthy_one_its_window_however_many_they_are() {
    const HANG: i64 = 60;
    let names = (0..HANG).map(|i| format!("hangs-{i}")).chain(["healthy".to_owned()]);
    let endpoints: Vec<_> = names.map(|name| Endpoint::new(&name, "http://localhost:3000")).collect();
    let bench = Bench::new(&endpoints).await;
    let (clock, store) = (bench.context.clock.clone(), &bench.context.store);
    let (back, most) = (clock.now().after(Duration::from_secs(25)), Arc::default());
    let count = async |ids: std::ops::RangeInclusive<i64>, status| {
        let ids: Vec<_> = ids.map(MessageId).collect();
        store.messages(&ids).await.unwrap().iter().filter(|message| message.status == status).count()
    };
    let healthy = HANG * COUNT + 1..=(HANG + 1) * COUNT;
    let done = async {
        while count(healthy.clone(), Status::Sent).await < COUNT as usize {
            take(100).await;
        }
        let took = clock.now().since(Timestamp::EPOCH);
        assert!(took < Duration::from_secs(5), "{took:?}, and the others have ten seconds each");
        // Those that were tried go to another lane, which nobody works on here. None of the others has lost an attempt.
        while count(1..=HANG * COUNT, Status::Sent).await + count(1..=HANG * COUNT, Status::Retrying).await
            < (HANG * COUNT) as usize
        {
            take(1_000).await;
        }
        let retried = count(1..=HANG * COUNT, Status::Retrying).await;
        assert!((HANG as usize..=HANG as usize * 7).contains(&retried), "{retried} attempts in 25 s");
        assert!(store.held().await.unwrap().is_empty());
    };
    bench.run(hanging(&clock, back, &most), done).await;
    let most = most.load(Ordering::SeqCst);
    assert!(most <= 125 + 60, "{most} attempts hung at once, in a window of 1,000");
}

#[tokio::test(start_paused = true)]
async fn a_stop_gives_back_what_waits_for_a_shortage_to_end() {
    let bench = Bench::new(&[Endpoint::new("default", "http://localhost:3000")]).await;
    let script: Script = Arc::new(|_, _| Box::pin(std::future::ready(Err(no_descriptor()))));
    bench.run(script, bench.until(Status::Processing, 64)).await;
    assert_eq!(bench.with(Status::Processing).await, 0);
    for id in 1..=COUNT {
        assert_eq!(bench.context.store.attempts(MessageId(id)).await.unwrap(), [], "{id}");
    }
    // The next process sends them all.
    let came = Arc::default();
    let script = scarce(&bench.context.clock, 10, &came);
    bench.run(script, bench.until(Status::Sent, COUNT as usize)).await;
    assert_eq!(came.lock().unwrap().len(), COUNT as usize);
}

/// A queue whose subscriptions end at once, as when the thread that reads them has failed.
struct EndingQueue(EmbeddedQueue);

#[async_trait::async_trait]
impl crate::queue::Queue for EndingQueue {
    fn kind(&self) -> &'static str {
        self.0.kind()
    }

    async fn ensure(&self, lanes: &[String]) -> crate::queue::Result<()> {
        self.0.ensure(lanes).await
    }

    async fn publish(
        &self,
        lane: &str,
        records: Vec<crate::queue::LaneRecord>,
    ) -> crate::queue::Result<crate::store::LogPosition> {
        self.0.publish(lane, records).await
    }

    async fn subscribe(&self, lane: &str, group: &str, window: usize) -> crate::queue::Result<Subscription> {
        let mut subscription = self.0.subscribe(lane, group, window).await?;
        subscription.taken = mpsc::channel(1).1;
        Ok(subscription)
    }

    async fn depth(&self, lane: &str, group: &str) -> crate::queue::Result<Vec<crate::queue::Depth>> {
        self.0.depth(lane, group).await
    }

    async fn ping(&self) -> crate::queue::Result<()> {
        self.0.ping().await
    }
}

#[tokio::test(start_paused = true)]
async fn a_subscription_that_ends_by_itself_is_an_error() {
    let mut bench = Bench::new(&[]).await;
    bench.context.queue = Arc::new(EndingQueue(EmbeddedQueue::new(1, bench.context.clock.clone())));
    let script: Script = Arc::new(|_, _| panic!("nothing was sent"));
    let delivery = Arc::new(Delivery::scripted(bench.context.clock.clone(), script));
    let options = ConsumerOptions { lane: bench.lane.clone(), window: 10, drain: Duration::from_secs(1) };
    let ended = run(bench.context.clone(), delivery, options, &CancellationToken::new()).await;
    assert_eq!(ended, Err("the subscription of messages has ended by itself".to_owned()));
}

/// It is the endpoint's fault, and no message dies of it.
#[tokio::test(start_paused = true)]
async fn messages_of_an_endpoint_with_broken_settings_are_held_until_it_is_mended() {
    let broken =
        Endpoint { secret: Some("none".to_owned()), ..Endpoint::new("default", "http://localhost:3000") };
    let bench = Bench::new(std::slice::from_ref(&broken)).await;
    let clock = bench.context.clock.clone();
    let script: Script = Arc::new(move |_, _| {
        let clock = clock.clone();
        Box::pin(async move { Ok(accepted(&clock)) })
    });
    let done = async {
        let mut tick = tokio::time::interval(Duration::from_millis(100));
        while bench.context.store.held().await.unwrap() != [("default".to_owned(), Held::EndpointDisabled)]
            || bench.with(Status::Pending).await < COUNT as usize
        {
            tick.tick().await;
        }
        bench.context.store.put_endpoint(&Endpoint { secret: None, ..broken.clone() }).await.unwrap();
        bench.until(Status::Sent, COUNT as usize).await;
    };
    bench.run(script, done).await;
    assert!(bench.context.store.attempts(MessageId(1)).await.unwrap().len() == 1);
}

/// What came to a receiver: when, at which time since the start.
#[derive(Clone, Default)]
struct Came(Arc<Mutex<Vec<Duration>>>);

impl Came {
    /// How many came between these seconds.
    fn between(&self, from: u64, to: u64) -> usize {
        let span = Duration::from_secs(from)..Duration::from_secs(to);
        self.0.lock().unwrap().iter().filter(|at| span.contains(*at)).count()
    }
}

/// A receiver that answers at once: with this until `back`, and then well.
fn down(
    clock: &Clock,
    back: u64,
    answer: impl Fn(Outcome) -> Outcome + Send + Sync + 'static,
) -> (Script, Came) {
    let (clock, start, came, answer) = (clock.clone(), clock.instant(), Came::default(), Arc::new(answer));
    let noted = came.clone();
    let script = move |_: Ticket, _: Endpoint| -> BoxFuture<'static, Tried> {
        let (clock, came, answer) = (clock.clone(), came.clone(), Arc::clone(&answer));
        Box::pin(async move {
            let at = clock.instant().since(start);
            came.0.lock().unwrap().push(at);
            take(10).await;
            let well = accepted(&clock);
            Ok(if at < Duration::from_secs(back) { answer(well) } else { well })
        })
    };
    (Arc::new(script), noted)
}

/// The lane has so many tries that only the breaker keeps messages from dying.
#[tokio::test(start_paused = true)]
async fn an_endpoint_that_fails_for_long_is_probed_and_comes_back_by_and_by() {
    let mut bench = Bench::new(&[Endpoint::new("default", "http://localhost:3000")]).await;
    bench.lane.tries = 9;
    let failed = |well| Outcome { class: Class::Rejected, status: Some(503), ..well };
    let (script, came) = down(&bench.context.clock, 100, failed);
    let looks = async {
        take(60_000).await;
        let breakers = bench.context.store.breakers().await.unwrap();
        assert_eq!(
            breakers.iter().map(|(name, b)| (name.as_str(), b.openings)).collect::<Vec<_>>(),
            [("default", 4)]
        );
        bench.until(Status::Sent, COUNT as usize).await;
    };
    bench.run(script, looks).await;
    assert!(came.between(0, 12) >= COUNT as usize, "until it opens, it is tried as ever");
    // From 9 to 12 s on it is open for 5, 10, 20, 40 and 80 s, each a second or so late.
    assert_eq!(came.between(12, 150), 4, "{came:?}", came = came.0.lock().unwrap());
    assert!(came.between(150, 200) >= COUNT as usize);
    let back = (150..200).find(|second| came.between(*second, second + 1) > 0).unwrap();
    assert!(came.between(back, back + 1) <= 100, "one at a time, of 10 ms each");
    assert!(bench.context.store.breakers().await.unwrap().is_empty());
    for id in 1..=COUNT {
        let attempts = bench.context.store.attempts(MessageId(id)).await.unwrap().len();
        assert!(attempts <= 9, "{id}: {attempts}");
    }
}

#[tokio::test(start_paused = true)]
async fn retry_after_pauses_the_whole_endpoint() {
    let bench = Bench::new(&[Endpoint::new("default", "http://localhost:3000")]).await;
    let asks =
        |well| Outcome { class: Class::Rejected, status: Some(429), retry_after_ms: Some(60_000), ..well };
    let (script, came) = down(&bench.context.clock, 30, asks);
    bench.run(script, bench.until(Status::Sent, COUNT as usize - 10)).await;
    assert!((1..10).contains(&came.between(0, 5)), "what was in flight when the answer came");
    assert_eq!(came.between(5, 60), 0);
    assert!(came.between(60, 90) >= COUNT as usize - 10);
}

#[tokio::test(start_paused = true)]
async fn attempts_at_an_endpoint_with_a_rate_keep_it() {
    let rate = Some(Rate { count: 10, interval: Duration::from_secs(1) });
    let bench = Bench::new(&[Endpoint { rate, ..Endpoint::new("default", "http://localhost:3000") }]).await;
    let (script, came) = down(&bench.context.clock, 0, |well| well);
    bench.run(script, bench.until(Status::Sent, COUNT as usize)).await;
    let mut times = came.0.lock().unwrap().clone();
    times.sort_unstable();
    let too_soon = times.windows(11).filter(|eleven| eleven[10] - eleven[0] < Duration::from_secs(1)).count();
    assert_eq!((times.len(), too_soon), (COUNT as usize, 0), "{times:?}");
    let took = times[times.len() - 1] - times[0];
    assert!(took < Duration::from_millis(103 * 99 + 500), "100 at 10 a second took {took:?}");
}
