//! The dispatcher of one consumer: what arrived, what waits, what is in flight. One task owns it all, so
//! there is no lock; store calls and deliveries run beside it and report back.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::ConsumerOptions;
use super::attempts::{Attempts, Finished};
use super::begin::{self, Admitted, Arrivals, BATCH, Job, Refused, Started};
use super::early::Early;
use super::recorder::{Judged, Written};
use super::saturation::{Saturation, TRIAL};
use super::unreadable::Letters;
use crate::clock::{Instant, Now, Timestamp};
use crate::delivery::Delivery;
use crate::delivery::limits::{Admission, Limits};
use crate::message::{Held, Outcome, Verdict};
use crate::queue::{Receipt, Subscription, Taken};
use crate::service::Parts;
use crate::shortage::Shortage;
use crate::store::{InstanceId, Record};
use crate::telemetry::LaneMetrics;
use crate::ticket::Ticket;

/// Under load, tickets wait for others before they are begun together, because a call costs the store more than a
/// ticket: until there are so many, or the first has waited for so long.
const GROUP: usize = 512;
const LINGER: Duration = Duration::from_millis(5);
/// There is load while this many messages wait for a slot or have one: then nothing idles meanwhile.
const LOADED: usize = 64;
/// Bytes of tickets in memory, at most: then no more is taken from the lane. What was taken at once may come on top.
const BYTES_MAX: usize = 128 << 20;
const TICK: Duration = Duration::from_millis(100);
/// How long refused tickets wait before their rows are held: nobody waits for it, and many at once cost less.
const HOLD_AFTER: Duration = Duration::from_secs(1);
/// How often the store is asked which endpoints have held rows that we don't know of.
const HELD: Duration = Duration::from_secs(1);

/// How long an endpoint counts as busy after it was last seen to be slow: one that hangs answers nothing
/// for the whole of its deadline, then all of its attempts end at once.
const SLOW_FOR: Duration = Duration::from_millis(300);
/// Endpoints said to be busy, at most.
const REPORTED_MAX: usize = 1_000;

pub(super) type Call<T> = Pin<Box<dyn Future<Output = T> + Send>>;

pub(super) struct Dispatcher {
    parts: Parts,
    metrics: LaneMetrics,
    attempts: Arc<Attempts>,
    options: ConsumerOptions,
    subscription: Subscription,
    records: mpsc::UnboundedSender<Judged>,
    limits: Limits,
    /// Taken ahead of their time.
    early: Early<Arrival>,
    /// Taken, and neither admitted nor held yet: their endpoint will have room in a moment.
    admission: VecDeque<Arrival>,
    /// Taken, and no tickets.
    letters: Letters,
    arrivals: Arrivals,
    /// When the arrivals are begun however few they are.
    begin_at: Instant,
    /// The begin call under way: one at a time, so that what arrives meanwhile goes together.
    beginning: Option<Call<Started>>,
    refused: Refused,
    hold_at: Instant,
    /// The call under way that holds rows: apart from the other, which must not wait for it.
    holding: Option<Call<Vec<Receipt>>>,
    waiting: BTreeMap<String, VecDeque<Job>>,
    /// Messages that have come to wait so far; and endpoints of those that wait again, because this process was
    /// short of a connection.
    turns: u64,
    put_off: BTreeSet<String>,
    finished: mpsc::UnboundedReceiver<Finished>,
    /// Tried, and not written yet.
    unrecorded: usize,
    /// Bytes of all tickets that were taken and are neither recorded nor held.
    bytes: usize,
    /// Endpoints with rows held because they were busy.
    saturated: BTreeMap<String, Saturation>,
    freeing: Option<Call<Freed>>,
    /// The call under way that says which endpoints are busy, and what was said last, and by whom.
    reporting: Option<Call<Option<Report>>>,
    reported: Option<Report>,
    next_held: Instant,
    stop: CancellationToken,
}

/// Which endpoints an instance has said to be busy.
type Report = (InstanceId, Vec<String>);

/// A ticket that was taken from the lane.
struct Arrival {
    ticket: Ticket,
    /// When it was published, or due if that was later.
    ready_at: Timestamp,
    receipt: Receipt,
}

/// What a call to free held rows came to: which endpoints have such rows, and how many were made due.
#[derive(Default)]
struct Freed {
    found: Vec<String>,
    freed: Vec<(String, usize, usize)>,
}

impl Dispatcher {
    pub(super) fn new(
        parts: Parts,
        metrics: LaneMetrics,
        delivery: Arc<Delivery>,
        options: ConsumerOptions,
        subscription: Subscription,
        records: mpsc::UnboundedSender<Judged>,
        stop: CancellationToken,
    ) -> Dispatcher {
        let (sender, finished) = mpsc::unbounded_channel();
        let attempts = Arc::new(Attempts::new(parts.clone(), delivery, stop.clone(), sender));
        Dispatcher {
            limits: Limits::new(options.window),
            letters: Letters::new(&options.lane.topic, &parts.metrics),
            parts,
            metrics,
            attempts,
            options,
            subscription,
            records,
            early: Early::default(),
            admission: VecDeque::new(),
            arrivals: Arrivals::default(),
            begin_at: Instant::START,
            beginning: None,
            refused: Refused::default(),
            hold_at: Instant::START,
            holding: None,
            waiting: BTreeMap::new(),
            turns: 0,
            put_off: BTreeSet::new(),
            finished,
            unrecorded: 0,
            bytes: 0,
            saturated: BTreeMap::new(),
            freeing: None,
            reporting: None,
            reported: None,
            next_held: Instant::START,
            stop,
        }
    }

    /// Works until `stop`, then drains. `written` says how many records were written.
    pub(super) async fn run(mut self, mut written: mpsc::UnboundedReceiver<Written>) -> Subscription {
        let stop = self.stop.clone();
        let mut tick = tokio::time::interval(TICK);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        let mut ended = Vec::new();
        loop {
            let takes = self.admission.is_empty()
                && self.letters.has_room()
                && self.unrecorded < self.options.window
                && self.bytes < BYTES_MAX
                && self.arrivals.len() < BATCH
                && self.refused.tickets.len() < self.options.window;
            let lingers = self.beginning.is_none() && !self.arrivals.is_empty();
            let linger = lingers.then(|| self.begin_at.since(self.parts.clock.instant()));
            // In this order, so that what ends makes room before more is taken, and a run replays from its seed.
            tokio::select! {
                biased;
                () = stop.cancelled() => break,
                _ = self.finished.recv_many(&mut ended, BATCH) => {
                    for Finished { job, tried, took } in ended.drain(..) {
                        match tried {
                            Some(Err(shortage)) => self.put_off(job, &shortage),
                            tried => self.finish(job, tried.and_then(Result::ok), took),
                        }
                    }
                }
                Some(recorded) = written.recv() => self.recorded(&recorded),
                started = under_way(&mut self.beginning) => self.begun(started),
                () = passed(linger) => {}
                receipts = under_way(&mut self.holding) => {
                    self.holding = None;
                    self.done(receipts);
                }
                receipts = self.letters.done() => self.done(receipts),
                freed = under_way(&mut self.freeing) => self.freed(freed),
                said = under_way(&mut self.reporting) => {
                    self.reporting = None;
                    self.reported = said.or(self.reported.take());
                }
                () = self.early.due(&self.parts.clock) => {
                    let now = self.parts.clock.instant();
                    self.admission.extend(std::iter::from_fn(|| self.early.take(now)));
                }
                _ = tick.tick() => self.tick(),
                batch = self.subscription.taken.recv(), if takes => match batch {
                    Some(batch) => self.arrive(batch),
                    None => {
                        tracing::error!(lane = self.options.lane.topic, "the subscription ended by itself");
                        break;
                    }
                },
            }
            self.admit();
            self.begin();
            self.letters.publish(&self.parts);
        }
        self.drain(written).await
    }

    /// Parses a taken batch: tickets go to the door, each at its time.
    fn arrive(&mut self, batch: Vec<Taken>) {
        let Now { time: now, instant } = self.parts.clock.reading();
        for taken in batch {
            match begin::parse(&taken) {
                Ok(mut ticket) => {
                    self.bytes += ticket.bytes();
                    if let Some(saturation) = self.saturated.get_mut(&ticket.endpoint) {
                        saturation.came();
                    }
                    let (receipt, ready_at) = (taken.receipt, taken.published_at);
                    // No ticket is more than that ahead: if it seems so, our clock is behind the producer's.
                    match ticket.due_at.take().map(|at| at.min(now.after(Ticket::AHEAD))) {
                        Some(at) if at > now => {
                            let ready_at = ready_at.max(at);
                            self.early
                                .keep(Arrival { ticket, ready_at, receipt }, instant.after(at.since(now)));
                        }
                        _ => self.admission.push_back(Arrival { ticket, ready_at, receipt }),
                    }
                }
                Err(reason) => self.letters.add(taken, reason),
            }
        }
    }

    /// Lets tickets in, in their order: to begin, or to hold; stops at the first that has to wait.
    fn admit(&mut self) {
        if self.admission.is_empty() {
            return;
        }
        let (directory, now) = (self.parts.directory.snapshot(), self.parts.clock.instant());
        while let Some(arrival) = self.admission.pop_front() {
            let (ticket, receipt) = (&arrival.ticket, arrival.receipt);
            let held = match directory.open_endpoint(&ticket.endpoint) {
                None => Held::EndpointClosed,
                Some(endpoint) => match self.limits.admit(&endpoint.name, endpoint.in_flight_max, now) {
                    Admission::Wait => {
                        self.admission.push_front(arrival);
                        return;
                    }
                    Admission::Admitted => {
                        if self.arrivals.is_empty() {
                            self.begin_at = now.after(LINGER);
                        }
                        self.arrivals.receipts.push(receipt);
                        let endpoint = Arc::clone(endpoint);
                        let Arrival { ticket, ready_at, .. } = arrival;
                        self.arrivals.admitted.push(Admitted { ticket, endpoint, ready_at });
                        continue;
                    }
                    Admission::Hold => {
                        self.refused(ticket.endpoint.clone(), now);
                        Held::EndpointBusy
                    }
                },
            };
            if self.refused.tickets.is_empty() {
                self.hold_at = now.after(HOLD_AFTER);
            }
            self.refused.receipts.push(receipt);
            self.bytes = self.bytes.saturating_sub(arrival.ticket.bytes());
            self.refused.tickets.push((arrival.ticket, held));
        }
        if self.refused.tickets.len() >= BATCH {
            self.hold();
        }
    }

    /// Notes that results were written.
    fn recorded(&mut self, written: &Written) {
        self.unrecorded -= written.records;
        self.bytes = self.bytes.saturating_sub(written.bytes);
    }

    /// Notes that a ticket was refused, and says so at once when its endpoint has just become busy.
    fn refused(&mut self, endpoint: String, now: Instant) {
        let new = !self.saturated.contains_key(&endpoint);
        let saturation = self.saturated.entry(endpoint).or_insert(Saturation::new(now, now));
        saturation.slow_at = now;
        if new {
            self.report(now);
        }
    }

    /// Says which endpoints are busy, when that has changed, so that the producer holds their new rows
    /// instead of sending them here. Only first tries are held like that.
    fn report(&mut self, now: Instant) {
        let Some(instance) = self.parts.presence.instance() else { return };
        if !self.options.lane.fresh || self.reporting.is_some() {
            return;
        }
        let slow = self.saturated.iter().filter(|(_, saturation)| now.since(saturation.slow_at) < SLOW_FOR);
        let said = (instance, slow.map(|(name, _)| name.clone()).take(REPORTED_MAX).collect::<Vec<_>>());
        if self.reported.as_ref() == Some(&said) || self.reported.is_none() && said.1.is_empty() {
            return;
        }
        let store = Arc::clone(&self.parts.store);
        self.reporting = Some(Box::pin(async move {
            // It is a hint: without it the rows come here and are held then. The next tick says it again.
            let heard = store.report_saturated(said.0, &said.1).await;
            heard.inspect_err(|error| tracing::debug!("busy endpoints could not be told: {error}")).ok()?;
            Some(said)
        }));
    }

    /// Holds the rows of refused tickets, unless a call is under way. In large groups, as nobody waits for it.
    fn hold(&mut self) {
        if self.holding.is_none() && !self.refused.tickets.is_empty() {
            let refused = std::mem::take(&mut self.refused);
            self.holding = Some(Box::pin(begin::hold(
                self.parts.clone(),
                self.options.lane.topic.clone(),
                refused,
                self.stop.clone(),
            )));
        }
    }

    /// Tells the lane that these records are done with.
    fn done(&self, receipts: Vec<Receipt>) {
        // The receiving end is gone only when the subscription has ended, and the tickets come again then.
        let _ = self.subscription.done.send(receipts);
    }

    /// Begins what has arrived, unless a call is under way or more is worth waiting for.
    fn begin(&mut self) {
        let idle = self.limits.total() < self.arrivals.len() + LOADED;
        let now = self.parts.clock.instant();
        let ready = idle || self.arrivals.len() >= GROUP || now >= self.begin_at;
        if self.beginning.is_none() && !self.arrivals.is_empty() && ready {
            let arrivals = std::mem::take(&mut self.arrivals);
            self.beginning = Some(Box::pin(begin::start(self.parts.clone(), arrivals, self.stop.clone())));
        }
    }

    /// The lane's records are done with as soon as their messages are begun: from here on the lease
    /// row finds them again.
    fn begun(&mut self, started: Started) {
        self.beginning = None;
        self.bytes = self.bytes.saturating_sub(started.stale_bytes);
        for endpoint in &started.stale {
            self.limits.leave(&endpoint.name);
        }
        self.done(started.receipts);
        let now = self.parts.clock.now();
        let mut touched: Vec<Arc<crate::store::Endpoint>> = Vec::new();
        for mut job in started.jobs {
            self.metrics.begun_after(now.since(job.ready_at));
            self.turns += 1;
            job.turn = self.turns;
            let endpoint = Arc::clone(&job.endpoint);
            if let Some(queue) = self.waiting.get_mut(&endpoint.name) {
                queue.push_back(job);
            } else {
                self.waiting.insert(endpoint.name.clone(), VecDeque::from([job]));
            }
            if touched.last().is_none_or(|last| last.name != endpoint.name) {
                touched.push(endpoint);
            }
        }
        for endpoint in touched {
            self.try_next(&endpoint.name, endpoint.in_flight_max);
        }
    }

    /// Starts as many waiting messages of an endpoint as may be in flight.
    fn try_next(&mut self, endpoint: &str, in_flight_max: u32) {
        let Some(queue) = self.waiting.get_mut(endpoint) else {
            return;
        };
        let now = self.parts.clock.instant();
        while !queue.is_empty() && self.limits.start(endpoint, in_flight_max, now) {
            let Some(job) = queue.pop_front() else { break };
            self.attempts.start(job);
        }
        if queue.is_empty() {
            self.waiting.remove(endpoint);
        }
    }

    /// Judges a try that ended, and gives its slot to the next.
    fn finish(&mut self, job: Job, outcome: Option<Outcome>, took: Duration) {
        let endpoint = Arc::clone(&job.endpoint);
        self.limits.finish(&endpoint.name, took, self.parts.clock.instant());
        self.judge(job, outcome, took);
        self.try_next(&endpoint.name, endpoint.in_flight_max);
    }

    /// Puts a message back in its turn: this process was short of a connection for it, so it has not been tried.
    fn put_off(&mut self, job: Job, shortage: &Shortage) {
        let now = self.parts.clock.reading();
        self.parts.metrics.put_off(shortage, now);
        let name = job.endpoint.name.clone();
        self.limits.put_off(&name, now.instant);
        let queue = self.waiting.entry(name.clone()).or_default();
        queue.insert(queue.partition_point(|other| other.turn < job.turn), job);
        self.put_off.insert(name);
    }

    /// Starts what was put off, where the pause is over.
    fn take_up(&mut self) {
        for name in std::mem::take(&mut self.put_off) {
            let Some(job) = self.waiting.get(&name).and_then(VecDeque::front) else { continue };
            let in_flight_max = job.endpoint.in_flight_max;
            self.try_next(&name, in_flight_max);
            if self.limits.is_short(&name) {
                self.put_off.insert(name);
            }
        }
    }

    fn judge(&mut self, job: Job, outcome: Option<Outcome>, took: Duration) {
        let lane = &self.options.lane;
        let now = self.parts.clock.now();
        let verdict = match &outcome {
            None if job.ticket.is_expired(now) => Verdict::Expired,
            None => Verdict::Release,
            Some(outcome) => {
                self.metrics.attempted(outcome.class, &outcome.times, took);
                let directory = self.parts.directory.snapshot();
                // A wait begins when the try ended, not when this busy task came to it.
                let ended =
                    outcome.started_at.after(Duration::from_micros(outcome.times.total_us().max(0) as u64));
                directory.policy(lane, &job.endpoint).judge(
                    outcome,
                    job.ticket.lane_tries + 1,
                    ended,
                    fastrand::f64(),
                )
            }
        };
        let record = Record {
            ticket: job.ticket,
            lane: lane.topic.clone(),
            lease: job.lease,
            root: job.root,
            outcome,
            verdict,
        };
        self.unrecorded += 1;
        // The recorder ends only after this sender is dropped.
        let _ = self.records.send(Judged { record, judged_at: now });
    }

    /// Housekeeping: holds what was refused, and frees held rows of endpoints that have room again.
    fn tick(&mut self) {
        self.metrics.in_flight(self.limits.in_flight());
        self.limits.forget_idle();
        let now = self.parts.clock.instant();
        self.take_up();
        // The log says when one is over.
        self.parts.metrics.shortages(now);
        if now >= self.hold_at {
            self.hold();
        }
        if self.freeing.is_some() {
            return;
        }
        let directory = self.parts.directory.snapshot();
        let mut wanted = Vec::new();
        for (name, saturation) in &mut self.saturated {
            let Some(endpoint) = directory.open_endpoint(name) else {
                continue;
            };
            if self.limits.is_slow(name, endpoint.in_flight_max, now) {
                saturation.slow_at = now;
            }
            let rows = saturation.wanted(self.limits.room(name, endpoint.in_flight_max, now), now);
            // Not one by one: a write for each row that ends would cost what holding saves.
            if rows >= (endpoint.in_flight_max as usize).min(TRIAL) {
                wanted.push((name.clone(), rows));
            }
        }
        self.report(now);
        let look = now >= self.next_held;
        if look {
            self.next_held = now.after(HELD);
        }
        if look || !wanted.is_empty() {
            self.freeing = Some(Box::pin(free(self.parts.clone(), wanted, look)));
        }
    }

    fn freed(&mut self, freed: Freed) {
        self.freeing = None;
        let now = self.parts.clock.instant();
        for (name, asked, got) in freed.freed {
            if got < asked {
                self.saturated.remove(&name);
            } else if let Some(saturation) = self.saturated.get_mut(&name) {
                saturation.expected += got;
                saturation.since = now;
            }
        }
        for name in freed.found {
            self.saturated.entry(name).or_insert(Saturation::new(now, Instant::START));
        }
    }

    /// Takes nothing new; gives back what was begun and not tried; waits for what is in flight.
    async fn drain(mut self, mut written: mpsc::UnboundedReceiver<Written>) -> Subscription {
        let patience = tokio::time::sleep(self.options.drain);
        tokio::pin!(patience);
        if let Some(beginning) = self.beginning.take() {
            let started = beginning.await;
            self.done(started.receipts);
            for job in started.jobs {
                self.judge(job, None, Duration::ZERO);
            }
        }
        if let Some(holding) = self.holding.take() {
            let receipts = holding.await;
            self.done(receipts);
        }
        for job in std::mem::take(&mut self.waiting).into_values().flatten() {
            self.judge(job, None, Duration::ZERO);
        }
        while self.limits.in_flight() > 0 || self.unrecorded > 0 {
            tokio::select! {
                Some(Finished { job, tried, took }) = self.finished.recv() => {
                    // What was put off has not been tried, and is given back as well.
                    self.finish(job, tried.and_then(Result::ok), took);
                }
                Some(recorded) = written.recv() => self.recorded(&recorded),
                () = &mut patience => {
                    tracing::warn!(
                        "{} attempts in flight and {} unwritten records are left to recovery",
                        self.limits.in_flight(),
                        self.unrecorded
                    );
                    break;
                }
            }
            self.metrics.in_flight(self.limits.in_flight());
        }
        self.subscription
    }
}

/// Waits for so long; for ever without a time.
async fn passed(wait: Option<Duration>) {
    match wait {
        Some(wait) => tokio::time::sleep(wait).await,
        None => std::future::pending().await,
    }
}

/// Waits for a call that may not be there.
pub(super) async fn under_way<T>(call: &mut Option<Call<T>>) -> T {
    match call {
        Some(call) => call.await,
        None => std::future::pending().await,
    }
}

async fn free(parts: Parts, wanted: Vec<(String, usize)>, look: bool) -> Freed {
    let mut freed = Freed::default();
    let now = parts.clock.now();
    for (name, asked) in wanted {
        let watch = parts.clock.stopwatch();
        match parts.store.unhold(&name, Held::EndpointBusy, asked, now).await {
            Ok(got) => {
                let got = usize::try_from(got).unwrap_or(asked);
                parts.metrics.batch("unhold", got, watch.elapsed());
                freed.freed.push((name, asked, got));
            }
            // The next tick tries again.
            Err(error) => tracing::debug!("held rows of {name} could not be freed: {error}"),
        }
    }
    if look {
        match parts.store.held().await {
            Ok(held) => {
                freed.found.extend(held.into_iter().filter(|h| h.1 == Held::EndpointBusy).map(|h| h.0))
            }
            Err(error) => tracing::debug!("held rows could not be looked for: {error}"),
        }
    }
    freed
}
