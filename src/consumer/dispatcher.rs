//! The dispatcher of one consumer: what arrived, what waits, what is in flight. One task owns it all, so
//! there is no lock; store calls and deliveries run beside it and report back.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::ConsumerOptions;
use super::arrivals::{Arrival, Arrivals};
use super::attempts::{Attempts, Finished};
use super::begin::{self, Admitted, BATCH, BegunDelivery, Started, ToBegin};
use super::breakers::Breakers;
use super::call::{Call, under_way};
use super::hold::Holding;
use super::recorder::Written;
use super::saturation::Saturated;
use super::unreadable::UnreadableRecords;
use super::waiting::Waiting;
use crate::clock::{Instant, Now, Timestamp};
use crate::delivery::Delivery;
use crate::delivery::limits::{Admission, Feedback, Limits};
use crate::message::{Held, Outcome, Verdict};
use crate::queue::{Receipt, Subscription};
use crate::rate::Rate;
use crate::service::{Context, Snapshot};
use crate::shortage::Shortage;
use crate::store::{Endpoint, Record};
use crate::telemetry::LaneMetrics;

/// Under load, tickets wait for others before they are begun together, because a call costs the store more than a
/// ticket: until there are so many, or one has waited for so long.
const GROUP: usize = 1_000;
const LINGER: Duration = Duration::from_millis(5);
/// Longer where others of its endpoint are here before it: each keeps that endpoint busy for so long at least (40,000 a
/// second are more than one consumer delivers), up to a bound.
const BUSY_FOR: Duration = Duration::from_micros(25);
const LINGER_MAX: Duration = Duration::from_millis(30);
/// There is load while this many messages wait for a slot or have one: then nothing idles meanwhile.
const LOADED: usize = 64;
/// Bytes of tickets in memory, at most: then no more is taken from the lane. What was taken at once may come on top.
const BYTES_MAX: usize = 128 << 20;
const TICK: Duration = Duration::from_millis(100);

/// What is to become of a ticket that waits for admission.
enum Entry {
    /// It is begun, by then at the latest.
    Begin {
        endpoint: Arc<Endpoint>,
        by: Instant,
    },
    Wait,
    Hold(Held),
}

/// What takes memory here until it is written.
#[derive(Default)]
struct Memory {
    /// Tried, and not written yet.
    unrecorded: usize,
    /// Bytes of all tickets that were taken and are neither recorded nor held.
    bytes: usize,
}

pub(super) struct Dispatcher {
    context: Context,
    metrics: LaneMetrics,
    attempts: Arc<Attempts>,
    options: ConsumerOptions,
    /// Its name, as each record has it.
    lane: Arc<str>,
    subscription: Subscription,
    records: mpsc::UnboundedSender<Record>,
    limits: Limits,
    arrivals: Arrivals,
    /// Taken, and no tickets.
    unreadable: UnreadableRecords,
    to_begin: ToBegin,
    /// The begin call under way: one at a time, so that what arrives meanwhile goes together.
    beginning: Option<Call<Started>>,
    holding: Holding,
    waiting: Waiting,
    finished: mpsc::UnboundedReceiver<Finished>,
    memory: Memory,
    breakers: Breakers,
    saturated: Saturated,
    stop: CancellationToken,
}

impl Dispatcher {
    pub(super) fn new(
        context: Context,
        metrics: LaneMetrics,
        delivery: Arc<Delivery>,
        options: ConsumerOptions,
        subscription: Subscription,
        records: mpsc::UnboundedSender<Record>,
        stop: CancellationToken,
    ) -> Dispatcher {
        let (sender, finished) = mpsc::unbounded_channel();
        let attempts = Arc::new(Attempts::new(context.clone(), delivery, stop.clone(), sender));
        Dispatcher {
            limits: Limits::new(options.window),
            unreadable: UnreadableRecords::new(&options.lane.topic, &context.metrics),
            context,
            metrics,
            attempts,
            lane: options.lane.topic.as_str().into(),
            options,
            subscription,
            records,
            arrivals: Arrivals::default(),
            to_begin: ToBegin::default(),
            beginning: None,
            holding: Holding::default(),
            waiting: Waiting::default(),
            finished,
            memory: Memory::default(),
            breakers: Breakers::default(),
            saturated: Saturated::default(),
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
            let takes = self.arrivals.is_empty()
                && self.unreadable.has_capacity()
                && self.memory.unrecorded < self.options.window
                && self.memory.bytes < BYTES_MAX
                && self.to_begin.len() < BATCH
                && self.holding.len() < self.options.window;
            let lingers = self.beginning.is_none() && !self.to_begin.is_empty();
            let linger = lingers.then(|| self.to_begin.begin_at.since(self.context.clock.instant()));
            // In this order, so that what ends makes room before more is taken, and a run replays from its seed.
            tokio::select! {
                biased;
                () = stop.cancelled() => break,
                _ = self.finished.recv_many(&mut ended, BATCH) => {
                    let now = self.context.clock.reading();
                    for Finished { begun, tried, took } in ended.drain(..) {
                        match tried {
                            Some(Err(shortage)) => self.put_off(begun, &shortage, now),
                            tried => self.finish(begun, tried.and_then(Result::ok), took, now),
                        }
                    }
                }
                Some(recorded) = written.recv() => self.recorded(&recorded),
                started = under_way(&mut self.beginning) => self.begun(started),
                () = passed(linger) => {}
                receipts = self.holding.done() => self.done(receipts),
                receipts = self.unreadable.done() => self.done(receipts),
                () = self.saturated.progress(&self.context.clock) => {}
                () = self.breakers.written(&self.context.clock) => {
                    self.follow_breakers(self.context.clock.reading());
                }
                () = self.waiting.reserved.due(&self.context.clock) => self.start_reserved(),
                () = self.arrivals.early.due(&self.context.clock) => {
                    self.arrivals.admit_due(self.context.clock.instant());
                }
                _ = tick.tick() => self.tick(),
                () = std::future::ready(()), if self.arrivals.has_unread() => {
                    self.arrive();
                    // Attempts have their turn between two groups. While tickets are refused, nothing else would make this
                    // task wait, and endpoints whose answers nobody reads seem to be silent.
                    tokio::task::yield_now().await;
                }
                batch = self.subscription.taken.recv(), if takes => match batch {
                    Some(batch) => self.arrivals.take(batch),
                    None => {
                        tracing::error!(lane = self.options.lane.topic, "the subscription ended by itself");
                        break;
                    }
                },
            }
            let now = self.context.clock.instant();
            self.start_starved(now);
            self.admit(now);
            self.hold(now);
            self.begin(now);
            self.unreadable.publish(&self.context);
            self.breakers.write(&self.context);
        }
        self.drain(written).await
    }

    /// Reads some of the records that were taken: their tickets wait for admission, each from its time on.
    fn arrive(&mut self) {
        let now = self.context.clock.reading();
        let directory = self.context.directory.snapshot();
        for taken in self.arrivals.unread() {
            match begin::parse(&taken) {
                Ok(ticket) => {
                    self.memory.bytes += ticket.bytes();
                    self.saturated.came(&ticket.endpoint);
                    let rated = ticket.due_at.is_some() && directory.is_rated(&ticket.endpoint);
                    self.arrivals.keep(ticket, &taken, rated, now);
                }
                Err(reason) => self.unreadable.add(taken, reason),
            }
        }
    }

    /// Lets tickets in, in their order: to begin, or to hold; stops at the first that has to wait.
    fn admit(&mut self, now: Instant) {
        if self.arrivals.admission.is_empty() {
            return;
        }
        let directory = self.context.directory.snapshot();
        while let Some(arrival) = self.arrivals.admission.pop_front() {
            match self.entry(&arrival, &directory, now) {
                Entry::Wait => {
                    self.arrivals.admission.push_front(arrival);
                    return;
                }
                Entry::Begin { endpoint, by } => {
                    if self.to_begin.is_empty() || by < self.to_begin.begin_at {
                        self.to_begin.begin_at = by;
                    }
                    let Arrival { ticket, ready_at, due_at, receipt } = arrival;
                    let reserved_at = due_at.filter(|_| endpoint.rate.is_some());
                    self.to_begin.receipts.push(receipt);
                    self.to_begin.admitted.push(Admitted { ticket, endpoint, ready_at, reserved_at });
                }
                Entry::Hold(held) => {
                    self.memory.bytes = self.memory.bytes.saturating_sub(arrival.ticket.bytes());
                    self.holding.add(&arrival.ticket, held, arrival.receipt, now);
                }
            }
        }
    }

    /// What is to become of a ticket that waits for admission. Those of endpoints with a rate are begun at once: they have
    /// until their time.
    fn entry(&mut self, arrival: &Arrival, directory: &Snapshot, now: Instant) -> Entry {
        let Some(endpoint) = directory.enabled_endpoint(&arrival.ticket.endpoint) else {
            return Entry::Hold(Held::EndpointDisabled);
        };
        let rated = endpoint.rate.is_some();
        if rated && arrival.due_at.is_none_or(|at| at <= now) {
            // It is late, or was claimed before its endpoint had a rate.
            return Entry::Hold(Held::EndpointRate);
        }
        let begin = |by| Entry::Begin { endpoint: Arc::clone(endpoint), by };
        match self.breakers.admit(endpoint, &mut self.limits, now) {
            Admission::Admitted { .. } if rated => begin(now),
            Admission::Admitted { ahead } => begin(now.after(linger(ahead))),
            // Its time would be over by then, and others need not wait for it.
            Admission::Wait if rated => Entry::Hold(Held::EndpointRate),
            Admission::Wait => Entry::Wait,
            Admission::Hold => {
                if self.saturated.refused(&endpoint.name, now) {
                    self.report(now);
                }
                Entry::Hold(Held::EndpointBusy)
            }
        }
    }

    /// Notes that results were written.
    fn recorded(&mut self, written: &Written) {
        self.memory.unrecorded -= written.records;
        self.memory.bytes = self.memory.bytes.saturating_sub(written.bytes);
    }

    /// Reports which endpoints are saturated, so that the producer holds their new messages instead of sending them
    /// here. Only first tries are held like that.
    fn report(&mut self, now: Instant) {
        if self.options.lane.fresh {
            self.saturated.report(&self.context, now);
        }
    }

    /// Holds the deliveries of refused tickets, when they are many or have waited for others.
    fn hold(&mut self, now: Instant) {
        if self.holding.len() >= BATCH || self.holding.is_due(now) {
            self.holding.start(&self.context, &self.options.lane.topic, &self.stop);
        }
    }

    /// Tells the lane that these records are done with.
    fn done(&self, receipts: Vec<Receipt>) {
        // The receiving end is gone only when the subscription has ended, and the tickets come again then.
        let _ = self.subscription.done.send(receipts);
    }

    /// Begins what has arrived, unless a call is under way or more is worth waiting for.
    fn begin(&mut self, now: Instant) {
        let idle = self.limits.busy() < self.to_begin.len() + LOADED;
        let ready = idle || self.to_begin.len() >= GROUP || now >= self.to_begin.begin_at;
        if self.beginning.is_none() && !self.to_begin.is_empty() && ready {
            let to_begin = std::mem::take(&mut self.to_begin);
            self.beginning = Some(Box::pin(begin::start(self.context.clone(), to_begin, self.stop.clone())));
        }
    }

    /// The lane's records are done with as soon as their messages are begun: from here on the
    /// lease finds them again.
    fn begun(&mut self, started: Started) {
        self.beginning = None;
        self.memory.bytes = self.memory.bytes.saturating_sub(started.stale_bytes);
        for endpoint in &started.stale {
            self.limits.leave(&endpoint.name);
        }
        self.done(started.receipts);
        let Now { time: now, instant } = self.context.clock.reading();
        let mut touched: Vec<Arc<Endpoint>> = Vec::new();
        for begun in started.begun {
            self.metrics.begun_after(now.since(begun.ready_at));
            let endpoint = Arc::clone(&begun.endpoint);
            self.waiting.add(begun);
            if touched.last().is_none_or(|last| last.name != endpoint.name) {
                touched.push(endpoint);
            }
        }
        for endpoint in touched {
            self.try_next(&endpoint, instant);
            self.give_back_open(&endpoint, Now { time: now, instant });
        }
    }

    /// Starts as many waiting messages of an endpoint as may be in flight.
    fn try_next(&mut self, endpoint: &Arc<Endpoint>, now: Instant) {
        let (limits, attempts, breakers) = (&mut self.limits, &self.attempts, &self.breakers);
        let waits = self.waiting.start(
            &endpoint.name,
            || breakers.start(endpoint, limits, now),
            |begun| attempts.start(begun),
        );
        if waits && self.limits.is_starved(&endpoint.name) {
            self.waiting.starve(endpoint);
        }
        if waits && self.limits.is_short(&endpoint.name) {
            // No attempt that ends has it tried again.
            self.waiting.put_off(&endpoint.name);
        }
    }

    /// Starts first attempts at new endpoints, where others have made room for them.
    fn start_starved(&mut self, now: Instant) {
        for endpoint in self.waiting.take_starved(self.limits.free_for_new()) {
            self.try_next(&endpoint, now);
        }
    }

    /// Starts what is due at endpoints with a rate. What is late, because this process was busy, or finds no slot gives up
    /// the time that was reserved for it.
    fn start_reserved(&mut self) {
        let now = self.context.clock.reading();
        while let Some(begun) = self.waiting.reserved.take(now.instant) {
            let late = begun.reserved_at.is_some_and(|at| now.instant.since(at) > Rate::LATE);
            if !late && self.breakers.start(&begun.endpoint, &mut self.limits, now.instant) {
                self.attempts.start(begun);
            } else {
                self.give_up_time(begun, now.time);
            }
        }
    }

    fn give_up_time(&mut self, begun: BegunDelivery, now: Timestamp) {
        self.limits.leave(&begun.endpoint.name);
        self.record(begun, None, Verdict::Release { held: Some(Held::EndpointRate) }, now);
    }

    /// Judges a try that ended, and gives its slot to the next.
    fn finish(&mut self, begun: BegunDelivery, outcome: Option<Outcome>, took: Duration, now: Now) {
        let endpoint = Arc::clone(&begun.endpoint);
        self.limits.finish(&endpoint.name, took, Feedback::of(outcome.as_ref()), now.instant);
        if let Some(outcome) = &outcome {
            self.breakers.note(&endpoint, outcome, now);
        }
        self.judge(begun, outcome, took, now.time);
        self.give_back_open(&endpoint, now);
        self.try_next(&endpoint, now.instant);
    }

    /// Puts a message back in its turn: this process was short of a connection for it, so it has not been tried.
    fn put_off(&mut self, begun: BegunDelivery, shortage: &Shortage, now: Now) {
        self.context.metrics.put_off(shortage, now);
        self.limits.put_off(&begun.endpoint.name, now.instant);
        match begun.reserved_at {
            None => self.waiting.put_back(begun),
            Some(_) => self.give_up_time(begun, now.time),
        }
    }

    /// Starts what was put off, where the pause is over.
    fn take_up(&mut self, now: Instant) {
        for endpoint in self.waiting.take_put_off() {
            self.try_next(&endpoint, now);
        }
    }

    fn judge(&mut self, begun: BegunDelivery, outcome: Option<Outcome>, took: Duration, now: Timestamp) {
        let lane = &self.options.lane;
        let verdict = match &outcome {
            None if begun.ticket.is_expired(now) => Verdict::Expired,
            None => Verdict::Release { held: None },
            Some(outcome) => {
                self.metrics.attempted(outcome.class, &outcome.times, took);
                let directory = self.context.directory.snapshot();
                // A wait begins when the try ended, not when this busy task came to it.
                let ended =
                    outcome.started_at.after(Duration::from_micros(outcome.times.total_us().max(0) as u64));
                directory.policy(lane, &begun.endpoint).judge(
                    outcome,
                    begun.ticket.lane_tries + 1,
                    ended,
                    fastrand::f64(),
                )
            }
        };
        self.record(begun, outcome, verdict, now);
    }

    /// Gives a delivery's verdict to the recorder.
    fn record(&mut self, begun: BegunDelivery, outcome: Option<Outcome>, verdict: Verdict, now: Timestamp) {
        let record = Record {
            ticket: begun.ticket,
            lane: Arc::clone(&self.lane),
            lease: begun.lease,
            root: begun.root,
            outcome: outcome.map(Arc::new),
            verdict,
            judged_at: now,
        };
        self.memory.unrecorded += 1;
        // The recorder ends only after this sender is dropped.
        let _ = self.records.send(record);
    }

    /// Housekeeping: holds what was refused, and frees held deliveries of endpoints that have room again.
    fn tick(&mut self) {
        self.metrics.in_flight(self.limits.in_flight());
        self.limits.forget_idle();
        let reading = self.context.clock.reading();
        let now = reading.instant;
        let directory = self.context.directory.snapshot();
        self.breakers.learn(&directory, reading);
        self.follow_breakers(reading);
        for endpoint in self.limits.fallen_silent(now) {
            self.give_back(&endpoint, reading);
        }
        self.take_up(now);
        // The log says when one is over.
        self.context.metrics.shortages(now);
        if self.saturated.is_freeing() {
            return;
        }
        let wanted = self.saturated.wanted(&directory, &self.breakers, &self.limits, now);
        let probes = self.breakers.probes(&wanted, &directory, reading);
        self.report(now);
        self.saturated.free(&self.context, wanted, probes, now);
    }

    /// Gives back what waits here for endpoints whose breakers are open, and starts what others allow by now: no attempt
    /// that ends does it, where none is in flight.
    fn follow_breakers(&mut self, now: Now) {
        for endpoint in self.waiting.endpoints(|name| self.breakers.is_known(name)) {
            self.give_back_open(&endpoint, now);
            self.try_next(&endpoint, now.instant);
        }
    }

    /// Holds what waits for an endpoint whose breaker is open.
    fn give_back_open(&mut self, endpoint: &Endpoint, now: Now) {
        if self.breakers.is_open(endpoint, now.instant) {
            self.give_back(&endpoint.name, now);
        }
    }

    /// Holds what waits for an endpoint that has fallen silent: it would keep others from being admitted, for as long as
    /// the attempts in flight take to time out.
    fn give_back(&mut self, endpoint: &str, now: Now) {
        let waiting = self.waiting.take(endpoint);
        if !waiting.is_empty() {
            self.saturated.refused(endpoint, now.instant);
        }
        for begun in waiting {
            self.limits.leave(endpoint);
            let verdict = Verdict::Release { held: Some(Held::EndpointBusy) };
            self.record(begun, None, verdict, now.time);
        }
    }

    /// Takes nothing new; gives back what was begun and not tried; waits for what is in flight.
    async fn drain(mut self, mut written: mpsc::UnboundedReceiver<Written>) -> Subscription {
        let patience = tokio::time::sleep(self.options.drain);
        tokio::pin!(patience);
        if let Some(beginning) = self.beginning.take() {
            let started = beginning.await;
            self.done(started.receipts);
            for begun in started.begun {
                self.judge(begun, None, Duration::ZERO, self.context.clock.now());
            }
        }
        let receipts = self.holding.finish().await;
        self.done(receipts);
        for begun in std::mem::take(&mut self.waiting).into_all() {
            self.judge(begun, None, Duration::ZERO, self.context.clock.now());
        }
        while self.limits.in_flight() > 0 || self.memory.unrecorded > 0 {
            tokio::select! {
                biased;
                Some(Finished { begun, tried, took }) = self.finished.recv() => {
                    // What was put off has not been tried, and is given back as well.
                    self.finish(begun, tried.and_then(Result::ok), took, self.context.clock.reading());
                }
                Some(recorded) = written.recv() => self.recorded(&recorded),
                () = &mut patience => {
                    tracing::warn!(
                        "{} attempts in flight and {} unwritten records are left to recovery",
                        self.limits.in_flight(),
                        self.memory.unrecorded
                    );
                    break;
                }
            }
            self.metrics.in_flight(self.limits.in_flight());
        }
        self.subscription
    }
}

/// How long a ticket may wait for others, with so many of its endpoint before it.
fn linger(ahead: usize) -> Duration {
    BUSY_FOR.saturating_mul(u32::try_from(ahead).unwrap_or(u32::MAX)).clamp(LINGER, LINGER_MAX)
}

/// Waits for so long; for ever without a time.
async fn passed(wait: Option<Duration>) {
    match wait {
        Some(wait) => tokio::time::sleep(wait).await,
        None => std::future::pending().await,
    }
}
