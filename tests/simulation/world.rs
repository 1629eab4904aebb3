//! One world: a store that outlives its processes, receivers that remember, and processes that come and go.

use std::collections::BTreeMap;
use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ams::cache::memory::MemoryCache;
use ams::clock::{Clock, Timestamp};
use ams::consumer::{self, ConsumerOptions};
use ams::delivery::{Delivery, Script};
use ams::janitor::Janitor;
use ams::lane::Lane;
use ams::message::{Class, MessageId, NewMessage, Outcome, Status, Times};
use ams::producer::{Producer, ProducerOptions};
use ams::queue::embedded::EmbeddedQueue;
use ams::service::{Directory, Parts, Presence};
use ams::shortage::{Resource, Shortage};
use ams::store::sqlite::SqliteStore;
use ams::store::{Endpoint, Operations, Registry, Store};
use ams::telemetry::Metrics;
use ams::ticket::Ticket;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::faults::{Faults, FaultyStore, Rates};

/// What a run came to.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report {
    pub sent: u64,
    pub dead: u64,
    pub duplicates: u64,
    pub crashes: u64,
    pub stops: u64,
    pub faults: u64,
    pub virtual_s: u64,
}

impl Report {
    pub fn add(&mut self, other: &Report) {
        self.sent += other.sent;
        self.dead += other.dead;
        self.duplicates += other.duplicates;
        self.crashes += other.crashes;
        self.stops += other.stops;
        self.faults += other.faults;
        self.virtual_s += other.virtual_s;
    }
}

/// What the receivers saw, and what they may see twice.
#[derive(Default)]
struct Receivers {
    accepted: BTreeMap<MessageId, u64>,
    tried: BTreeMap<MessageId, u64>,
    /// Second deliveries that the promises allow: of what was in flight at a crash, and of what was
    /// accepted although the answer was lost.
    allowed: BTreeMap<MessageId, u64>,
    /// Tries that began before they were due.
    early: Vec<String>,
}

pub struct World {
    store: Arc<SqliteStore>,
    receivers: Arc<Mutex<Receivers>>,
    faults: Arc<Faults>,
    now: Timestamp,
    messages: i64,
    report: Report,
}

/// How one process ended.
enum End {
    Crashed,
    Stopped,
    Done,
}

const START: i64 = 1_800_000_000_000_000;
/// After this much virtual time everything must be over: tries take 21 s, a recovery 20 s, a crash may follow another.
const LIMIT: Duration = Duration::from_secs(3600);

impl World {
    pub fn new(seed: u64) -> World {
        fastrand::seed(seed);
        let calm = fastrand::u32(0..4) == 0;
        let rate = |max| if calm { 0 } else { fastrand::u32(0..=max) };
        let rates =
            Rates { before: rate(20), after: rate(20), crash: rate(4), outage: rate(2), short: rate(300) };
        World {
            store: Arc::new(SqliteStore::in_memory().unwrap()),
            receivers: Arc::default(),
            faults: Arc::new(Faults::new(rates)),
            now: Timestamp::from_micros(START),
            messages: fastrand::i64(1..=30),
            report: Report::default(),
        }
    }

    /// Runs processes one after the other until every message is final, then checks the promises.
    pub fn run(mut self) -> Result<Report, String> {
        loop {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_time()
                .start_paused(true)
                .build()
                .unwrap();
            let (end, now) = runtime.block_on(self.process());
            // Whatever the process was doing ends here, as with kill -9.
            drop(runtime);
            self.now = now;
            match end {
                End::Done => break,
                End::Stopped => self.report.stops += 1,
                End::Crashed => {
                    self.report.crashes += 1;
                    self.allow_repeats_of_what_was_in_flight();
                }
            }
            if now.since(Timestamp::from_micros(START)) > LIMIT {
                return Err(format!("not over after {LIMIT:?}: {}", self.open()));
            }
        }
        self.report.faults = self.faults.count.load(Ordering::Relaxed);
        self.report.virtual_s = self.now.since(Timestamp::from_micros(START)).as_secs();
        self.check()
    }

    /// A crash between a request and its record hides the answer: what was begun may be sent again.
    fn allow_repeats_of_what_was_in_flight(&self) {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        for id in (1..=self.messages).map(MessageId) {
            let message = runtime.block_on(self.store.message(id)).unwrap();
            if message.is_some_and(|message| message.status == Status::Processing) {
                *self.receivers.lock().unwrap().allowed.entry(id).or_default() += 1;
            }
        }
    }

    /// One process's life.
    async fn process(&self) -> (End, Timestamp) {
        let clock = Clock::virtual_from(self.now);
        let parts = self.parts(&clock);
        let (stop, alive) = (CancellationToken::new(), CancellationToken::new());
        let life = self.live(&parts, &stop, &alive);
        // A rolling restart now and then, at a random time.
        let restart = Duration::from_millis(fastrand::u64(1_000..120_000));
        let watched = async {
            let end = tokio::select! {
                () = self.all_final() => End::Done,
                () = std::future::pending::<()>() => End::Stopped,
            };
            stop.cancel();
            end
        };
        let restarted = async {
            let ended = tokio::time::timeout(restart, watched).await;
            stop.cancel();
            ended.unwrap_or(End::Stopped)
        };
        let end = tokio::select! {
            biased;
            () = self.faults.crashed.notified() => End::Crashed,
            (end, ()) = async { tokio::join!(restarted, life) } => end,
        };
        (end, clock.now())
    }

    fn parts(&self, clock: &Clock) -> Parts {
        let store: Arc<dyn Store> = Arc::new(FaultyStore {
            inner: self.store.clone(),
            faults: Arc::clone(&self.faults),
            clock: clock.clone(),
        });
        Parts {
            presence: Arc::new(Presence::new(Arc::clone(&store), clock.clone(), "up", "simulation")),
            directory: Arc::new(Directory::new(Arc::clone(&store))),
            queue: Arc::new(EmbeddedQueue::new(3, clock.clone())),
            cache: Arc::new(MemoryCache::new()),
            clock: clock.clone(),
            metrics: Arc::new(Metrics::default()),
            store,
        }
    }

    async fn live(&self, parts: &Parts, stop: &CancellationToken, alive: &CancellationToken) {
        self.set_up(parts).await;
        let producer = Producer::new(
            parts.clone(),
            ProducerOptions {
                fresh_lane: "messages".into(),
                batch: fastrand::usize(1..10),
                capacity: 100,
                poll: Duration::from_millis(100),
                pacing: None,
            },
        );
        let janitor = Janitor::new(parts.clone(), producer.publisher(), producer.leading(), None);
        let delivery = Arc::new(Delivery::scripted(parts.clock.clone(), self.script(&parts.clock)));
        let options = |lane| ConsumerOptions { lane, window: 50, drain: Duration::from_secs(30) };
        let [fresh, retry] = lanes();
        let wake = Notify::new();
        let work = async {
            let ((), (), fresh, retry) = tokio::join!(
                producer.run(stop, &wake),
                janitor.run(stop),
                consumer::run(parts.clone(), Arc::clone(&delivery), options(fresh), stop),
                consumer::run(parts.clone(), Arc::clone(&delivery), options(retry), stop),
            );
            fresh.and(retry).unwrap();
            alive.cancel();
        };
        tokio::join!(work, parts.presence.run(alive), parts.directory.run(alive));
        parts.presence.retire().await;
    }

    /// The first process finds an empty store; later ones find what is there.
    async fn set_up(&self, parts: &Parts) {
        let store = self.store.as_ref();
        if store.endpoints().await.unwrap().is_empty() {
            let endpoint = Endpoint { in_flight_max: 3, ..Endpoint::new("default", "http://localhost:3000") };
            store.put_endpoint(&endpoint).await.unwrap();
            // A third is scheduled, some of it sooner than its ticket may go ahead.
            let send_at = || parts.clock.now().after(Duration::from_millis(fastrand::u64(0..5_000)));
            let messages: Vec<_> = (0..self.messages)
                .map(|i| NewMessage {
                    recipient: format!("+{i}"),
                    content: "Hi".into(),
                    send_at: (fastrand::u32(0..3) == 0).then(send_at),
                    ..NewMessage::default()
                })
                .collect();
            store.insert(&messages, parts.clock.now()).await.unwrap();
        }
        ams::service::persist("presence", &CancellationToken::new(), || parts.presence.renew()).await;
        ams::service::persist("directory", &CancellationToken::new(), || parts.directory.refresh()).await;
    }

    /// A receiver that takes its time, refuses a share, and sometimes accepts without our hearing of it.
    fn script(&self, clock: &Clock) -> Script {
        let clock = clock.clone();
        let (receivers, faults) = (Arc::clone(&self.receivers), Arc::clone(&self.faults));
        let store = Arc::clone(&self.store);
        Arc::new(move |ticket, _endpoint| {
            let (receivers, faults, clock) = (Arc::clone(&receivers), Arc::clone(&faults), clock.clone());
            let store = Arc::clone(&store);
            Box::pin(async move {
                let due_at = due_at(store.as_ref(), &ticket).await;
                if due_at > Some(clock.now()) {
                    let early = format!("{ticket:?} was tried at {}, due at {due_at:?}", clock.now());
                    receivers.lock().unwrap().early.push(early);
                }
                if faults.is_short() {
                    return Err(Shortage {
                        of: Resource::Descriptors,
                        why: "the simulation took them".into(),
                    });
                }
                *receivers.lock().unwrap().tried.entry(ticket.id).or_default() += 1;
                faults.maybe_crash().await;
                let took = Duration::from_millis(fastrand::u64(0..200));
                let _ = tokio::time::timeout(took, std::future::pending::<()>()).await;
                let (accepted, class) = match fastrand::u32(0..10) {
                    0..=5 => (true, Class::Accepted),
                    6 => (true, Class::Timeout),
                    7 => (false, Class::Timeout),
                    8 => (false, Class::Refused),
                    _ => (false, Class::Rejected),
                };
                {
                    let mut receivers = receivers.lock().unwrap();
                    *receivers.accepted.entry(ticket.id).or_default() += u64::from(accepted);
                    if accepted && class == Class::Timeout {
                        *receivers.allowed.entry(ticket.id).or_default() += 1;
                    }
                }
                faults.maybe_crash().await;
                Ok(Outcome { started_at: clock.now(), ..outcome(class) })
            })
        })
    }

    /// Looks straight into the store, past the faults, as the tester's eye.
    async fn all_final(&self) {
        loop {
            let mut open = 0;
            for id in 1..=self.messages {
                let message = self.store.message(MessageId(id)).await.unwrap();
                open += usize::from(message.is_none_or(|message| !message.status.is_final()));
            }
            if open == 0 {
                return;
            }
            let _ = tokio::time::timeout(Duration::from_millis(500), std::future::pending::<()>()).await;
        }
    }

    fn open(&self) -> String {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let messages =
            (1..=self.messages).map(|id| runtime.block_on(self.store.message(MessageId(id))).unwrap());
        let open: Vec<_> = messages
            .flatten()
            .filter(|message| !message.status.is_final())
            .map(|m| {
                let attempts = m.attempts;
                format!("{} is {} held {:?} attempts {attempts} due {:?}", m.id, m.status, m.held, m.due_at)
            })
            .collect();
        open.join("; ")
    }

    fn check(mut self) -> Result<Report, String> {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        let receivers = self.receivers.lock().unwrap();
        if let Some(early) = receivers.early.first() {
            return Err(format!("{} tries were too early: {early}", receivers.early.len()));
        }
        let of = |map: &BTreeMap<MessageId, u64>, id| map.get(&id).copied().unwrap_or(0);
        for id in (1..=self.messages).map(MessageId) {
            let message =
                runtime.block_on(self.store.message(id)).unwrap().ok_or(format!("message {id} is gone"))?;
            let attempts = runtime.block_on(self.store.attempts(id)).unwrap();
            let (accepted, tried, allowed) =
                (of(&receivers.accepted, id), of(&receivers.tried, id), of(&receivers.allowed, id));
            match message.status {
                Status::Sent => {
                    self.report.sent += 1;
                    if accepted == 0 {
                        return Err(format!("message {id} is sent, and nobody has it"));
                    }
                    self.report.duplicates += accepted - 1;
                    if accepted - 1 > allowed {
                        return Err(format!(
                            "message {id} was accepted {accepted} times; {allowed} repeats are allowed"
                        ));
                    }
                }
                Status::Dead => {
                    self.report.dead += 1;
                    let failed = attempts.iter().filter(|attempt| attempt.class != Class::Accepted).count();
                    if failed != 4 || attempts.len() != 4 {
                        return Err(format!(
                            "message {id} is dead after {} attempts instead of 4",
                            attempts.len()
                        ));
                    }
                }
                status => return Err(format!("message {id} ended {status}")),
            }
            if (attempts.len() as u64) > tried {
                return Err(format!(
                    "message {id} has {} attempts on record and {tried} were made",
                    attempts.len()
                ));
            }
        }
        drop(receivers);
        Ok(self.report)
    }
}

/// When a ticket's attempt may begin at the earliest: at the time its sender gave, and after a failure no sooner than
/// the wait before this attempt. Of one attempt number there may be two on record, when a lease was taken away: the
/// older one counts, because the other may be the one that was refused.
async fn due_at(store: &SqliteStore, ticket: &Ticket) -> Option<Timestamp> {
    let message = store.message(ticket.id).await.unwrap().unwrap();
    let [_, retry] = lanes();
    let attempts = store.attempts(ticket.id).await.unwrap();
    let before = attempts.iter().filter(|before| before.attempt == ticket.attempt - 1);
    let waited = before.map(|before| before.started_at.after(retry.wait(ticket.attempt - 1))).min();
    message.send_at.max(waited)
}

fn lanes() -> [Lane; 2] {
    let lane = |topic: &str, next: &str, fresh, tries| Lane {
        topic: topic.into(),
        group: format!("group-{topic}"),
        next: next.into(),
        fresh,
        tries,
        interval: Duration::from_secs(3),
        interval_max: Duration::from_secs(3600),
    };
    [lane("messages", "messages-retry", true, 1), lane("messages-retry", "messages-dlq", false, 3)]
}

fn outcome(class: Class) -> Outcome {
    Outcome {
        class,
        status: match class {
            Class::Accepted => Some(200),
            Class::Rejected => Some(500),
            _ => None,
        },
        address: "http://localhost:3000/".into(),
        error: None,
        answer: String::new(),
        provider_message_id: None,
        provider_message: None,
        retry_after_ms: None,
        started_at: Timestamp::from_micros(START),
        times: Times::default(),
    }
}
