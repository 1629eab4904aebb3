//! What people and machines do during a run, at random times: messages come, are cancelled and redriven; producers are
//! paused, endpoints closed; clocks are set; the broker loses records or gives them twice.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use ams::message::{MessageId, NewMessage, Status};
use ams::store::operate::Change;
use ams::store::{Inserted, Operations, Registry, Store};

use crate::history::Cancel;
use crate::receivers::NAMES;
use crate::world::{World, wait};

/// Something that happens.
#[derive(Clone, Copy, Debug)]
enum Event {
    Insert,
    Cancel,
    Redrive,
    Pause,
    Resume,
    /// Of the endpoint with this number.
    Close(usize),
    Open(usize),
    /// The clock that all processes go by, in microseconds.
    SetTime(i64),
    /// One host's clock, where all processes go by the store's.
    SetHost(usize, i64),
    WipeQueue,
    LoseNewest,
    Rebalance,
    WipeCache,
}

/// Lets things happen until the world is calm.
pub async fn play(world: &Arc<World>) {
    insert(world, fastrand::usize(1..=20)).await;
    if world.store_clock.is_some() {
        // Hosts need not agree.
        world.hosts.iter().for_each(|host| host.set_clock(fastrand::i64(-3_600_000_000..3_600_000_000)));
    }
    let mut events = Vec::new();
    let last = world.calm_at.since(world.clock.now()).as_millis() as u64;
    for _ in 0..fastrand::u32(0..24) {
        let at = fastrand::u64(0..last);
        let until = last.min(at + fastrand::u64(100..12_000));
        match fastrand::u32(0..14) {
            0..=2 => events.push((at, Event::Insert)),
            3 | 4 => events.push((at, Event::Cancel)),
            5 => events.push((at, Event::Redrive)),
            6 => events.extend([(at, Event::Pause), (until, Event::Resume)]),
            7 => {
                let endpoint = fastrand::usize(0..NAMES.len());
                events.extend([(at, Event::Close(endpoint)), (until, Event::Open(endpoint))]);
            }
            8 => events.push((at, Event::WipeQueue)),
            9 => events.push((at, Event::LoseNewest)),
            10 | 11 => events.push((at, Event::Rebalance)),
            _ => events.push((at, Event::WipeCache)),
        }
    }
    events.extend(steps(world, last));
    events.sort_by_key(|(at, _)| *at);
    let start = world.clock.now();
    for (at, event) in events {
        let passed = world.clock.now().since(start);
        wait(Duration::from_millis(at).saturating_sub(passed)).await;
        tracing::debug!("{event:?}");
        happen(world, event).await;
    }
}

/// When clocks are set, and by how much: in a third of the worlds they are not.
fn steps(world: &World, last: u64) -> Vec<(u64, Event)> {
    let up_to = |seconds: i64| fastrand::i64(-seconds * 1_000_000..=seconds * 1_000_000);
    let mut steps = Vec::new();
    for _ in 0..fastrand::u32(0..3) {
        let (at, seconds) = (fastrand::u64(0..last), if fastrand::bool() { 15 } else { 3_600 });
        let event = match (&world.store_clock, fastrand::u32(0..4)) {
            (Some(_), 1..) => Event::SetHost(fastrand::usize(0..2), up_to(seconds)),
            _ => Event::SetTime(up_to(seconds)),
        };
        steps.push((at, event));
    }
    steps
}

async fn happen(world: &World, event: Event) {
    match event {
        Event::Insert => insert(world, fastrand::usize(1..10)).await,
        Event::Cancel => cancel(world).await,
        Event::Redrive => redrive(world).await,
        Event::Pause => {
            world.faults.count("pauses", 1);
            world.store.set_paused(true).await.unwrap();
            let mut history = world.history.lock().unwrap();
            history.paused_since = history.paused_since.or(Some(world.clock.now()));
        }
        Event::Resume => {
            world.store.set_paused(false).await.unwrap();
            world.history.lock().unwrap().paused_since = None;
        }
        Event::Close(endpoint) => {
            world.faults.count("closed endpoints", 1);
            enable(world, NAMES[endpoint], false).await;
        }
        Event::Open(endpoint) => enable(world, NAMES[endpoint], true).await,
        Event::SetTime(by) => {
            let own = world.store_clock.is_some();
            world
                .faults
                .count(if own { "steps of the store's clock" } else { "steps of the machine's clock" }, 1);
            set_time(world, by);
        }
        Event::SetHost(host, by) => {
            world.faults.count("steps of one host's clock", 1);
            world.hosts[host].set_clock(by);
        }
        Event::WipeQueue => {
            world.faults.count("wipes of the queue", 1);
            world.queue.wipe();
        }
        Event::LoseNewest => {
            world.faults.count("losses of newest records", 1);
            world.queue.truncate(fastrand::usize(1..5));
        }
        Event::Rebalance => {
            world.faults.count("rebalances", 1);
            world.queue.rebalance();
        }
        Event::WipeCache => {
            world.faults.count("wipes of the cache", 1);
            world.cache.wipe(&world.clock);
        }
    }
}

/// Sets the clock that all processes go by.
pub fn set_time(world: &World, by: i64) {
    match &world.store_clock {
        Some(clock) => drop(clock.fetch_add(by, Ordering::Relaxed)),
        None => world.hosts.iter().for_each(|host| host.set_clock(by)),
    }
    world.history.lock().unwrap().steps += Duration::from_micros(by.unsigned_abs());
}

/// New messages: for all endpoints, of all priorities; some are scheduled, some expire.
async fn insert(world: &World, count: usize) {
    let now = world.time();
    let later = |range| now.after(Duration::from_millis(fastrand::u64(range)));
    let message = |_| {
        // Some of the scheduled ones sooner than their tickets may go ahead.
        let send_at = (fastrand::u32(0..4) == 0).then(|| later(0..4_000));
        let expires_at = (fastrand::u32(0..4) == 0).then(|| later(1..20_000));
        NewMessage {
            endpoint: Some(NAMES[fastrand::usize(0..NAMES.len())].to_owned()),
            recipient: "+90".into(),
            content: "Hi".into(),
            priority: fastrand::i16(-1..=1),
            send_at: send_at.filter(|at| expires_at.is_none_or(|expires_at| *at < expires_at)),
            expires_at,
            ..NewMessage::default()
        }
    };
    let messages: Vec<_> = (0..count).map(message).collect();
    let inserted = world.store.insert(&messages, now).await.unwrap();
    let mut history = world.history.lock().unwrap();
    for inserted in inserted {
        let Inserted::New { id, .. } = inserted else { panic!("{inserted:?}") };
        history.of(id);
    }
}

/// Some messages, as a person picks them who does not know how they stand.
async fn some_ids(world: &World) -> Vec<MessageId> {
    world.messages().await.iter().map(|message| message.id).filter(|_| fastrand::u32(0..3) == 0).collect()
}

async fn cancel(world: &World) {
    let ids = some_ids(world).await;
    let before = world.messages().await;
    let changed = world.store.change(Change::Cancel, &ids, world.time()).await.unwrap();
    world.faults.count("messages cancelled", changed.len() as u64);
    let mut history = world.history.lock().unwrap();
    for message in before.iter().filter(|message| changed.contains(&message.id)) {
        let processing = message.status == Status::Processing;
        let story = history.of(message.id);
        story.overlaps += usize::from(processing);
        story.cancel = Some(Cancel { tries: story.tries.len() });
    }
}

async fn redrive(world: &World) {
    let ids = some_ids(world).await;
    let now = world.time();
    let changed = world.store.change(Change::Redrive, &ids, now).await.unwrap();
    world.faults.count("messages redriven", changed.len() as u64);
    let (messages, waiting) = (world.messages().await, world.waiting());
    let mut history = world.history.lock().unwrap();
    for message in messages.iter().filter(|message| changed.contains(&message.id)) {
        let story = history.of(message.id);
        story.cancel = None;
        story.redriven = true;
        // One that no feed has come to is as it was before it was cancelled.
        let over = message.expires_at.is_some_and(|at| at <= now);
        story.outlives_expiry = over && waiting.contains_key(&message.id);
        story.attempts_before = message.attempts;
    }
}

async fn enable(world: &World, name: &str, enabled: bool) {
    let endpoints = world.store.endpoints().await.unwrap();
    let endpoint = endpoints.into_iter().find(|endpoint| endpoint.name == name).unwrap();
    world.store.put_endpoint(&ams::store::Endpoint { enabled, ..endpoint }).await.unwrap();
}
