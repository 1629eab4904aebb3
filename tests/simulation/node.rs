//! A node: a host on which a process with all services runs, ends in one way or another, and starts again.
//!
//! All processes share one runtime, because there is one virtual time. So the tasks that services spawn can't be
//! aborted with their process. A killed process is dropped instead, with everything that it owns, and whatever its
//! tasks still do goes through the store, queue, cache or script that they were given: none of them ever answers a
//! dead process. A task that waits for ever does nothing, which is what kill -9 leaves of it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::Duration;

use ams::clock::{Clock, Timestamp};
use ams::consumer::{self, ConsumerOptions};
use ams::delivery::Delivery;
use ams::janitor::Janitor;
use ams::lane::Lane;
use ams::producer::{Producer, ProducerOptions};
use ams::service::{Context, Directory, Presence};
use ams::store::Store;
use ams::telemetry::Metrics;
use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::faults::cache::FaultyCache;
use crate::faults::queue::FaultyQueue;
use crate::faults::store::FaultyStore;
use crate::receivers;
use crate::world::{World, lanes};

/// One process, from its start to its end.
pub struct Process {
    pub number: u64,
    pub clock: Clock,
    dead: AtomicBool,
    died: Notify,
}

impl Process {
    /// Ends the process here, as kill -9 does.
    pub fn kill(&self) {
        self.dead.store(true, Ordering::Relaxed);
        self.died.notify_one();
    }

    pub fn is_dead(&self) -> bool {
        self.dead.load(Ordering::Relaxed)
    }

    /// Goes on only while the process lives.
    pub async fn is_alive(&self) {
        if self.is_dead() {
            std::future::pending::<()>().await;
        }
    }
}

/// A host: its wall clock goes on while no process runs.
#[derive(Default)]
pub struct Host {
    /// How far its wall clock is from the world's, in microseconds.
    set: AtomicI64,
    process: std::sync::Mutex<Option<Arc<Process>>>,
}

impl Host {
    /// How far its wall clock is from the world's, in microseconds.
    pub fn error(&self) -> i64 {
        self.set.load(Ordering::Relaxed)
    }

    /// Sets its wall clock.
    pub fn set_clock(&self, by_micros: i64) {
        self.set.fetch_add(by_micros, Ordering::Relaxed);
        if let Some(process) = &*self.process.lock().unwrap() {
            process.clock.set_wall(by_micros);
        }
    }

    /// What its wall clock says.
    pub fn now(&self, world: &World) -> Timestamp {
        Timestamp::from_micros(world.clock.now().as_micros() + self.error())
    }

    fn start(&self, world: &World) -> Arc<Process> {
        let process = Arc::new(Process {
            number: world.processes.fetch_add(1, Ordering::Relaxed),
            clock: Clock::virtual_from(self.now(world)),
            dead: AtomicBool::new(false),
            died: Notify::new(),
        });
        *self.process.lock().unwrap() = Some(Arc::clone(&process));
        process
    }
}

/// Runs one process after the other on a host until the world is over.
pub async fn run(world: &Arc<World>, host: &Host, over: &CancellationToken) {
    while !over.is_cancelled() {
        let process = host.start(world);
        let stop = CancellationToken::new();
        let life = async { tokio::join!(live(world, &process, &stop), end(world, &process, &stop, over)) };
        tokio::select! {
            biased;
            () = process.died.notified() => {
                world.faults.count("crashes", 1);
                world.history.lock().unwrap().crashed.insert(process.number);
            }
            _ = life => world.faults.count("clean stops", 1),
        }
        // Somebody notices, or a supervisor starts it again at once.
        let down = Duration::from_millis(fastrand::u64(10..12_000) / fastrand::u64(1..=20));
        let _ = tokio::time::timeout(down, over.cancelled()).await;
    }
}

/// Ends a process after a random time: killed, or stopped in order. Once the world is calm it runs on until the end.
async fn end(world: &World, process: &Process, stop: &CancellationToken, over: &CancellationToken) {
    let age = Duration::from_millis(fastrand::u64(1_000..60_000));
    let ended = tokio::time::timeout(age, over.cancelled()).await.is_ok();
    if ended || !world.faults.are_on() {
        over.cancelled().await;
        stop.cancel();
    } else if fastrand::u32(0..3) == 0 {
        process.kill();
    } else {
        stop.cancel();
    }
}

fn context(world: &Arc<World>, process: &Arc<Process>) -> Context {
    let store: Arc<dyn Store> =
        Arc::new(FaultyStore { world: Arc::clone(world), process: Arc::clone(process) });
    let clock = process.clock.clone();
    Context {
        presence: Arc::new(Presence::new(Arc::clone(&store), clock.clone(), "up", "simulation")),
        directory: Arc::new(Directory::new(Arc::clone(&store))),
        queue: Arc::new(FaultyQueue { world: Arc::clone(world), process: Arc::clone(process) }),
        cache: Arc::new(FaultyCache { world: Arc::clone(world), process: Arc::clone(process) }),
        metrics: Arc::new(Metrics::default()),
        clock,
        store,
    }
}

/// All services of a process, until `stop` and then until they have stopped in order.
async fn live(world: &Arc<World>, process: &Arc<Process>, stop: &CancellationToken) {
    let context = context(world, process);
    let never = CancellationToken::new();
    ams::service::persist("presence", &never, || context.presence.renew()).await;
    ams::service::persist("directory", &never, || context.directory.refresh()).await;
    let producer = Producer::new(
        context.clone(),
        ProducerOptions {
            fresh_lane: "messages".into(),
            batch: fastrand::usize(1..10),
            capacity: 100,
            poll: Duration::from_millis(100),
            pacing: None,
        },
    );
    let janitor = Janitor::new(context.clone(), producer.publisher(), producer.leading(), None);
    let consumer = |lane: Lane| {
        let script = receivers::script(world, process, &lane);
        let delivery = Arc::new(Delivery::scripted(context.clock.clone(), script));
        // A stop has the patience to wait until every outage is over: what it leaves behind is checked.
        let options = ConsumerOptions { lane, window: 20, drain: Duration::from_secs(120) };
        consumer::run(context.clone(), delivery, options, stop)
    };
    let [fresh, retry] = lanes().map(consumer);
    let (alive, wake) = (CancellationToken::new(), Notify::new());
    let work = async {
        let ((), (), fresh, retry) = tokio::join!(producer.run(stop, &wake), janitor.run(stop), fresh, retry);
        if let Err(why) = fresh.and(retry) {
            world.history.lock().unwrap().broken.push(why);
        }
        alive.cancel();
    };
    tokio::join!(work, context.presence.run(&alive), context.directory.run(&alive));
    context.presence.retire().await;
}
