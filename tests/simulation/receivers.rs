//! Three receivers: one is well, one is slow and takes little at once, one fails often.

use std::sync::Arc;
use std::time::Duration;

use ams::clock::Timestamp;
use ams::delivery::{Script, Tried};
use ams::lane::Lane;
use ams::message::{Class, Outcome, Times};
use ams::shortage::{Resource, Shortage};
use ams::store::{Endpoint, Operations};
use ams::ticket::Ticket;

use crate::history::Beginning;
use crate::node::Process;
use crate::world::{MENDED, World, wait};

pub const NAMES: [&str; 3] = ["failing", "slow", "well"];

/// The endpoints as they are at first.
pub fn endpoints() -> [Endpoint; 3] {
    NAMES.map(|name| Endpoint {
        in_flight_max: if name == "slow" { fastrand::u32(1..=2) } else { 3 },
        ..Endpoint::new(name, &format!("http://localhost:3000/{name}"))
    })
}

/// What a receiver does with a request.
struct Answer {
    took: Duration,
    accepted: bool,
    class: Class,
    status: Option<u16>,
}

fn answer(endpoint: &str) -> Answer {
    let ms = |range| Duration::from_millis(fastrand::u64(range));
    let of = |took, accepted, class, status| Answer { took, accepted, class, status };
    match (endpoint, fastrand::u32(0..20)) {
        // It accepts, and the answer is lost.
        ("well", 0) => of(ms(0..50), true, Class::Timeout, None),
        ("well", _) => of(ms(0..50), true, Class::Accepted, Some(200)),
        ("slow", 0) => of(ms(500..3_000), true, Class::Timeout, None),
        ("slow", 1) => of(ms(500..3_000), false, Class::Timeout, None),
        ("slow", _) => of(ms(200..1_500), true, Class::Accepted, Some(200)),
        (_, 0) => of(ms(0..200), false, Class::Rejected, Some(410)),
        (_, 1..=6) => of(ms(0..200), true, Class::Accepted, Some(200)),
        (_, 7..=8) => of(ms(0..200), true, Class::Timeout, None),
        (_, 9..=10) => of(ms(0..200), false, Class::Reset, None),
        (_, 11..=14) => of(ms(0..200), false, Class::Refused, None),
        _ => of(ms(0..200), false, Class::Rejected, Some(500)),
    }
}

/// What the consumer of a lane calls to deliver.
pub fn script(world: &Arc<World>, process: &Arc<Process>, lane: &Lane) -> Script {
    let (world, process, lane) = (Arc::clone(world), Arc::clone(process), lane.clone());
    Arc::new(move |ticket, endpoint| {
        let (world, process, lane) = (Arc::clone(&world), Arc::clone(&process), lane.clone());
        Box::pin(async move { attempt(&world, &process, &lane, &ticket, &endpoint).await })
    })
}

async fn attempt(
    world: &World,
    process: &Process,
    lane: &Lane,
    ticket: &Ticket,
    endpoint: &Endpoint,
) -> Tried {
    process.is_alive().await;
    if world.faults.is_short() {
        return Err(Shortage { of: Resource::Descriptors, why: "the simulation took them".into() });
    }
    check_times(world, process, lane, ticket).await;
    let started_at = process.clock.now();
    let this = Beginning { process: process.number, lane, ticket, endpoint, now: world.clock.now() };
    world.history.lock().unwrap().begins(&this);
    world.faults.maybe_crash(process).await;
    let mended = endpoint.name == "failing" && world.clock.now() > world.calm_at.after(MENDED);
    let answer = answer(if mended { "well" } else { &endpoint.name });
    wait(answer.took).await;
    // The receiver has the request, whatever has become of the process meanwhile.
    world.history.lock().unwrap().answered(&this, answer.accepted, answer.class);
    world.faults.maybe_crash(process).await;
    Ok(outcome(&answer, endpoint, started_at))
}

/// Checks that a try begins at a time when it may.
async fn check_times(world: &World, process: &Process, lane: &Lane, ticket: &Ticket) {
    let now = process.clock.now();
    let message = world.store.message(ticket.id).await.unwrap().unwrap();
    let waited = waited(world, lane, ticket).await;
    let mut history = world.history.lock().unwrap();
    // A time that was written before the clock was set may come sooner by as much. Without a clock of the store both
    // processes bring retries forward when it is set back: the real one has such a store for itself.
    let late = now.after(history.steps * if world.store_clock.is_some() { 1 } else { 2 });
    if let Some(due_at) = message.send_at.max(waited).filter(|at| *at > late) {
        history.broken.push(format!("{ticket:?} is tried at {now}, and is due at {due_at}"));
    }
    // An expiry that has passed counts no more after a redrive.
    let expires_at = message.expires_at.filter(|_| !history.of(ticket.id).redriven);
    if let Some(at) = ticket.expires_at.or(expires_at).filter(|at| *at <= now) {
        history.broken.push(format!("{ticket:?} is tried at {now}, and has expired at {at}"));
    }
}

/// When the wait after the last failure is over. On the fresh lane there is none: a redrive begins there anew. Of one
/// attempt number there may be two on record, when a lease was taken away: the older one counts, because the other may
/// be the one that was refused.
async fn waited(world: &World, lane: &Lane, ticket: &Ticket) -> Option<Timestamp> {
    if lane.fresh {
        return None;
    }
    let attempts = world.store.attempts(ticket.id).await.unwrap();
    let before = attempts.iter().filter(|before| before.attempt == ticket.attempt - 1);
    before.map(|before| before.started_at.after(lane.wait(ticket.lane_tries + 1))).min()
}

fn outcome(answer: &Answer, endpoint: &Endpoint, started_at: Timestamp) -> Outcome {
    Outcome {
        class: answer.class,
        status: answer.status,
        address: endpoint.url.clone(),
        error: None,
        answer: String::new(),
        provider_message_id: None,
        provider_message: None,
        retry_after_ms: None,
        started_at,
        times: Times { connect_us: 0, head_us: answer.took.as_micros() as i32, body_us: 0 },
    }
}
