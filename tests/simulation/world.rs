//! One world: what all processes share, the hosts they run on, and how long it goes on.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ams::clock::{Clock, Timestamp};
use ams::lane::Lane;
use ams::message::{Message, MessageId};
use ams::queue::Queue;
use ams::queue::embedded::EmbeddedQueue;
use ams::store::sqlite::SqliteStore;
use ams::store::{Claimed, Operations, Registry, Store};
use futures_util::FutureExt;
use rusqlite::Connection;
use tokio_util::sync::CancellationToken;

use crate::check;
use crate::events;
use crate::faults::Faults;
use crate::faults::cache::SharedCache;
use crate::healing::Stays;
use crate::history::{History, Story};
use crate::node::{self, Host};
use crate::receivers;
use crate::report::Report;

const START: i64 = 1_800_000_000_000_000;

/// So long after the last fault everything must be over: a process may be down for 12 s, what had died is found within
/// 30 s, and the tries of one message take 24 s and wait for a slow receiver.
const LIMIT: Duration = Duration::from_secs(90);
/// For so long a receiver that fails may hold up its own messages.
const LIMIT_BREAKERS: Duration = Duration::from_secs(900);
/// So long after the last fault the failing receiver is mended.
pub const MENDED: Duration = Duration::from_secs(120);

/// A leader hears of a pause when it bids, and leads for 4 s when it can't.
const PAUSE_HEARD: Duration = Duration::from_secs(4);

/// What a run came to. Two runs of one seed are equal.
#[derive(Debug, PartialEq)]
pub struct Run {
    pub report: Report,
    tries: Vec<(MessageId, Vec<crate::history::Try>)>,
}

pub struct World {
    pub store: SqliteStore,
    /// A second connection to the store's database.
    pub database: Mutex<Connection>,
    pub queue: EmbeddedQueue,
    pub cache: SharedCache,
    /// The time itself, which no host need know.
    pub clock: Clock,
    /// How far the store's clock is from it, in microseconds; `None`: the store has none of its own, and all processes
    /// are on one machine.
    pub store_clock: Option<AtomicI64>,
    pub faults: Faults,
    pub history: Mutex<History>,
    pub hosts: [Host; 2],
    pub processes: AtomicU64,
    /// From then on nothing goes wrong.
    pub calm_at: Timestamp,
}

/// Lets so much time pass.
pub async fn wait(time: Duration) {
    let _ = tokio::time::timeout(time, std::future::pending::<()>()).await;
}

/// The two lanes: one try, then three more after 3, 6 and 12 s.
pub fn lanes() -> [Lane; 2] {
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

/// Runs the world of a seed until every message is where it belongs, and checks the promises.
pub fn run(seed: u64) -> Result<Run, String> {
    fastrand::seed(seed);
    let runtime =
        tokio::runtime::Builder::new_current_thread().enable_time().start_paused(true).build().unwrap();
    runtime.block_on(async {
        let world = Arc::new(World::new().await);
        world.live().await?;
        check::all(&world).await?;
        let history = world.history.lock().unwrap();
        let tries = |(id, story): (&MessageId, &Story)| (*id, story.tries.clone());
        let tries = history.stories().iter().map(tries).collect();
        Ok(Run { report: world.faults.report.lock().unwrap().clone(), tries })
    })
}

impl World {
    async fn new() -> World {
        static WORLDS: AtomicU64 = AtomicU64::new(0);
        let number = WORLDS.fetch_add(1, Ordering::Relaxed);
        let database = || Connection::open(format!("file:/world-{number}?vfs=memdb")).unwrap();
        let store = SqliteStore::inline(database()).unwrap();
        store.migrate().await.unwrap();
        let clock = Clock::virtual_from(Timestamp::from_micros(START));
        let calm_at = clock.now().after(Duration::from_millis(fastrand::u64(3_000..60_000)));
        let world = World {
            database: Mutex::new(database()),
            queue: EmbeddedQueue::new(3, clock.clone()),
            cache: SharedCache::new(&clock),
            faults: Faults::random(clock.clone(), calm_at),
            history: Mutex::default(),
            hosts: [Host::default(), Host::default()],
            store_clock: fastrand::bool().then(AtomicI64::default),
            processes: AtomicU64::new(0),
            calm_at,
            store,
            clock,
        };
        for endpoint in receivers::endpoints() {
            world.store.put_endpoint(&endpoint).await.unwrap();
        }
        world
    }

    /// What the store's clock says.
    pub fn store_time(&self) -> Option<Timestamp> {
        let error = self.store_clock.as_ref()?.load(Ordering::Relaxed);
        Some(Timestamp::from_micros(self.clock.now().as_micros() + error))
    }

    /// The time that all processes go by: the store's, or that of the one machine.
    pub fn time(&self) -> Timestamp {
        self.store_time().unwrap_or_else(|| self.hosts[0].now(self))
    }

    async fn live(self: &Arc<World>) -> Result<(), String> {
        let over = CancellationToken::new();
        let watched = async {
            events::play(self).await;
            let settled = self.settled().await;
            over.cancel();
            settled
        };
        let [one, other] = &self.hosts;
        let nodes = async { tokio::join!(node::run(self, one, &over), node::run(self, other, &over)) };
        tokio::pin!(nodes);
        // A world that does not settle is left as it is.
        tokio::select! {
            biased;
            settled = watched => settled?,
            _ = &mut nodes => return Err("the nodes have ended before the world".to_owned()),
        }
        nodes.await;
        self.faults.count("virtual seconds", self.clock.now().since(Timestamp::from_micros(START)).as_secs());
        Ok(())
    }

    /// Waits until every message has ended and nothing is left in any place on the way.
    async fn settled(&self) -> Result<(), String> {
        let mut stays = Stays::default();
        let mut begun = self.calm_at;
        loop {
            let messages = self.messages().await;
            stays.look(self, &messages)?;
            let open = messages.iter().any(|message| !message.status.is_final());
            if !open && self.left().is_empty() {
                let healed = self.clock.now().since(self.calm_at).as_secs();
                self.faults.report.lock().unwrap().most("most seconds until all was well again", healed);
                return Ok(());
            }
            if self.clock.now() > begun.after(LIMIT) {
                return Err(format!("not over {LIMIT:?} after the last fault: {}", self.open(&messages)));
            }
            // Not so soon after the last step that two of them look like none.
            if self.clock.now() < self.calm_at.after(LIMIT_BREAKERS) && self.holds("breakers") {
                // The failing receiver fails for a while yet, and then may be probed every five minutes.
                begun = self.clock.now();
            }
            let long_ago = self.clock.now() > begun.after(Duration::from_secs(30));
            if long_ago && self.pass_far_waits(&messages) {
                begun = self.clock.now();
            }
            wait(Duration::from_millis(500)).await;
        }
    }

    /// A time that a clock has written while it was ahead comes when that clock says so. The clock is set on, because to
    /// live through the hours would show nothing. Whether it was.
    fn pass_far_waits(&self, messages: &[Message]) -> bool {
        if self.faults.are_on() || self.history.lock().unwrap().steps.is_zero() {
            return false;
        }
        let waiting = self.waiting();
        let open: Vec<_> = messages.iter().filter(|message| !message.status.is_final()).collect();
        let due_at: Option<Vec<_>> = open.iter().map(|message| waiting.get(&message.id).copied()).collect();
        let wait = due_at.and_then(|all| all.into_iter().min()).map(|next| next.since(self.time()));
        let wait = wait.filter(|wait| *wait > Duration::from_secs(30));
        if let Some(wait) = wait {
            events::set_time(self, wait.as_micros() as i64);
        }
        wait.is_some()
    }

    /// When what waits is due; what is held is so at once, or once its endpoint may be probed.
    pub fn waiting(&self) -> BTreeMap<MessageId, Timestamp> {
        let database = self.database.lock().unwrap();
        let waiting = "select message_id, iif(held is null, due_at, max(coalesce(until, 0), coalesce(probed_until, 0))) \
                       from waiting left join breakers using (endpoint_id)";
        let mut waiting = database.prepare_cached(waiting).unwrap();
        let read =
            |row: &rusqlite::Row<'_>| Ok((MessageId(row.get(0)?), Timestamp::from_micros(row.get(1)?)));
        waiting.query_map([], read).unwrap().map(Result::unwrap).collect()
    }

    /// All messages, past all faults.
    pub async fn messages(&self) -> Vec<Message> {
        let ids: Vec<MessageId> = self.history.lock().unwrap().stories().keys().copied().collect();
        let mut messages = self.store.messages(&ids).await.unwrap();
        messages.sort_by_key(|message| message.id);
        messages
    }

    /// The places on the way in which something stands.
    pub fn left(&self) -> Vec<&'static str> {
        let mut places = vec!["batches", "leases", "waiting", "cancels"];
        // A letter that its consumer could not publish waits until it is 30 s old, by a clock that may be set meanwhile.
        if self.history.lock().unwrap().steps.is_zero() {
            places.push("dead_letters");
        }
        places.retain(|place| self.holds(place));
        places
    }

    /// Whether a table has rows.
    fn holds(&self, table: &str) -> bool {
        let any = format!("select exists (select 1 from {table})");
        self.database.lock().unwrap().query_row(&any, [], |row| row.get(0)).unwrap()
    }

    fn open(&self, messages: &[Message]) -> String {
        let open = messages.iter().filter(|message| !message.status.is_final()).map(|m| {
            let attempts = m.attempts;
            format!("{} is {} held {:?} attempts {attempts} due {:?}", m.id, m.status, m.held, m.due_at)
        });
        format!("{}; {}", self.state(), open.collect::<Vec<_>>().join("; "))
    }

    /// Where something stands, and how far the lanes have been read.
    pub fn state(&self) -> String {
        let depth = |lane: Lane| self.queue.depth(&lane.topic, &lane.group).now_or_never().unwrap().unwrap();
        format!("{:?} hold something; lanes {:?}", self.left(), lanes().map(depth))
    }

    /// Notes a claim: while producers are paused there is none.
    pub fn claimed(&self, claimed: &Claimed) {
        let mut history = self.history.lock().unwrap();
        let now = self.clock.now();
        if let Some(since) = history.paused_since.filter(|since| now.since(*since) > PAUSE_HEARD)
            && claimed.seen > 0
        {
            history.broken.push(format!("a claim at {now} although producers are paused since {since}"));
        }
    }
}
