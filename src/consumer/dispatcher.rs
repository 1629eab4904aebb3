//! The dispatcher of one consumer: what arrived, what waits, what is in flight. One task owns it all, so
//! there is no lock; store calls and deliveries run beside it and report back.

use std::collections::VecDeque;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::ConsumerOptions;
use super::attempts::{Attempts, Finished};
use super::begin::{self, Admitted, BATCH, BegunDelivery, Started, ToBegin};
use super::call::{Call, under_way};
use super::early::Early;
use super::hold::Holding;
use super::recorder::Written;
use super::saturation::Saturated;
use super::unreadable::UnreadableRecords;
use super::waiting::Waiting;
use crate::clock::{Instant, Now, Timestamp};
use crate::delivery::Delivery;
use crate::delivery::limits::{Admission, Limits};
use crate::message::{Held, Outcome, Verdict};
use crate::queue::{Receipt, Subscription, Taken};
use crate::service::Context;
use crate::shortage::Shortage;
use crate::store::Record;
use crate::telemetry::LaneMetrics;
use crate::ticket::Ticket;

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
    /// Taken ahead of their time.
    early: Early<Arrival>,
    /// Taken, and neither admitted nor held yet: their endpoint will take them in a moment.
    admission: VecDeque<Arrival>,
    /// Taken, and no tickets.
    unreadable: UnreadableRecords,
    to_begin: ToBegin,
    /// The begin call under way: one at a time, so that what arrives meanwhile goes together.
    beginning: Option<Call<Started>>,
    holding: Holding,
    waiting: Waiting,
    finished: mpsc::UnboundedReceiver<Finished>,
    /// Tried, and not written yet.
    unrecorded: usize,
    /// Bytes of all tickets that were taken and are neither recorded nor held.
    bytes: usize,
    saturated: Saturated,
    stop: CancellationToken,
}

/// A ticket that was taken from the lane.
struct Arrival {
    ticket: Arc<Ticket>,
    /// When it was published, or due if that was later.
    ready_at: Timestamp,
    receipt: Receipt,
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
            early: Early::default(),
            admission: VecDeque::new(),
            to_begin: ToBegin::default(),
            beginning: None,
            holding: Holding::default(),
            waiting: Waiting::default(),
            finished,
            unrecorded: 0,
            bytes: 0,
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
            let takes = self.admission.is_empty()
                && self.unreadable.has_capacity()
                && self.unrecorded < self.options.window
                && self.bytes < BYTES_MAX
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
                () = self.early.due(&self.context.clock) => {
                    let now = self.context.clock.instant();
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
            self.unreadable.publish(&self.context);
        }
        self.drain(written).await
    }

    /// Parses a taken batch: tickets wait for their admission, each at its time.
    fn arrive(&mut self, batch: Vec<Taken>) {
        let Now { time: now, instant } = self.context.clock.reading();
        for taken in batch {
            match begin::parse(&taken) {
                Ok(mut ticket) => {
                    self.bytes += ticket.bytes();
                    self.saturated.came(&ticket.endpoint);
                    let (receipt, ready_at) = (taken.receipt, taken.published_at);
                    // No ticket is more than that ahead: if it seems so, our clock is behind the producer's.
                    let due_at = ticket.due_at.take();
                    let ticket = Arc::new(ticket);
                    match due_at.map(|at| at.min(now.after(Ticket::AHEAD))) {
                        Some(at) if at > now => {
                            let ready_at = ready_at.max(at);
                            self.early
                                .keep(Arrival { ticket, ready_at, receipt }, instant.after(at.since(now)));
                        }
                        _ => self.admission.push_back(Arrival { ticket, ready_at, receipt }),
                    }
                }
                Err(reason) => self.unreadable.add(taken, reason),
            }
        }
    }

    /// Lets tickets in, in their order: to begin, or to hold; stops at the first that has to wait.
    fn admit(&mut self) {
        if self.admission.is_empty() {
            return;
        }
        let (directory, now) = (self.context.directory.snapshot(), self.context.clock.instant());
        while let Some(arrival) = self.admission.pop_front() {
            let (ticket, receipt) = (&arrival.ticket, arrival.receipt);
            let held = match directory.open_endpoint(&ticket.endpoint) {
                None => Held::EndpointClosed,
                Some(endpoint) => match self.limits.admit(&endpoint.name, endpoint.in_flight_max, now) {
                    Admission::Wait => {
                        self.admission.push_front(arrival);
                        return;
                    }
                    Admission::Admitted { ahead } => {
                        let by = now.after(linger(ahead));
                        if self.to_begin.is_empty() || by < self.to_begin.begin_at {
                            self.to_begin.begin_at = by;
                        }
                        self.to_begin.receipts.push(receipt);
                        let endpoint = Arc::clone(endpoint);
                        let Arrival { ticket, ready_at, .. } = arrival;
                        self.to_begin.admitted.push(Admitted { ticket, endpoint, ready_at });
                        continue;
                    }
                    Admission::Hold => {
                        if self.saturated.refused(&ticket.endpoint, now) {
                            self.report(now);
                        }
                        Held::EndpointBusy
                    }
                },
            };
            self.bytes = self.bytes.saturating_sub(arrival.ticket.bytes());
            self.holding.add(&arrival.ticket, held, receipt, now);
        }
        if self.holding.len() >= BATCH {
            self.hold();
        }
    }

    /// Notes that results were written.
    fn recorded(&mut self, written: &Written) {
        self.unrecorded -= written.records;
        self.bytes = self.bytes.saturating_sub(written.bytes);
    }

    /// Reports which endpoints are saturated, so that the producer holds their new messages instead of sending them
    /// here. Only first tries are held like that.
    fn report(&mut self, now: Instant) {
        if self.options.lane.fresh {
            self.saturated.report(&self.context, now);
        }
    }

    /// Holds the deliveries of refused tickets.
    fn hold(&mut self) {
        self.holding.start(&self.context, &self.options.lane.topic, &self.stop);
    }

    /// Tells the lane that these records are done with.
    fn done(&self, receipts: Vec<Receipt>) {
        // The receiving end is gone only when the subscription has ended, and the tickets come again then.
        let _ = self.subscription.done.send(receipts);
    }

    /// Begins what has arrived, unless a call is under way or more is worth waiting for.
    fn begin(&mut self) {
        let idle = self.limits.total() < self.to_begin.len() + LOADED;
        let now = self.context.clock.instant();
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
        self.bytes = self.bytes.saturating_sub(started.stale_bytes);
        for endpoint in &started.stale {
            self.limits.leave(&endpoint.name);
        }
        self.done(started.receipts);
        let Now { time: now, instant } = self.context.clock.reading();
        let mut touched: Vec<Arc<crate::store::Endpoint>> = Vec::new();
        for begun in started.begun {
            self.metrics.begun_after(now.since(begun.ready_at));
            let endpoint = Arc::clone(&begun.endpoint);
            self.waiting.add(begun);
            if touched.last().is_none_or(|last| last.name != endpoint.name) {
                touched.push(endpoint);
            }
        }
        for endpoint in touched {
            self.try_next(&endpoint.name, endpoint.in_flight_max, instant);
        }
    }

    /// Starts as many waiting messages of an endpoint as may be in flight.
    fn try_next(&mut self, endpoint: &str, in_flight_max: u32, now: Instant) {
        let (limits, attempts) = (&mut self.limits, &self.attempts);
        self.waiting.start(
            endpoint,
            || limits.start(endpoint, in_flight_max, now),
            |begun| attempts.start(begun),
        );
    }

    /// Judges a try that ended, and gives its slot to the next.
    fn finish(&mut self, begun: BegunDelivery, outcome: Option<Outcome>, took: Duration, now: Now) {
        let endpoint = Arc::clone(&begun.endpoint);
        self.limits.finish(&endpoint.name, took, now.instant);
        self.judge(begun, outcome, took, now.time);
        self.try_next(&endpoint.name, endpoint.in_flight_max, now.instant);
    }

    /// Puts a message back in its turn: this process was short of a connection for it, so it has not been tried.
    fn put_off(&mut self, begun: BegunDelivery, shortage: &Shortage, now: Now) {
        self.context.metrics.put_off(shortage, now);
        self.limits.put_off(&begun.endpoint.name, now.instant);
        self.waiting.put_back(begun);
    }

    /// Starts what was put off, where the pause is over.
    fn take_up(&mut self, now: Instant) {
        for endpoint in self.waiting.take_put_off() {
            self.try_next(&endpoint.name, endpoint.in_flight_max, now);
            if self.limits.is_short(&endpoint.name) {
                self.waiting.put_off(&endpoint.name);
            }
        }
    }

    fn judge(&mut self, begun: BegunDelivery, outcome: Option<Outcome>, took: Duration, now: Timestamp) {
        let lane = &self.options.lane;
        let verdict = match &outcome {
            None if begun.ticket.is_expired(now) => Verdict::Expired,
            None => Verdict::Release,
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
        let record = Record {
            ticket: begun.ticket,
            lane: Arc::clone(&self.lane),
            lease: begun.lease,
            root: begun.root,
            outcome: outcome.map(Arc::new),
            verdict,
            judged_at: now,
        };
        self.unrecorded += 1;
        // The recorder ends only after this sender is dropped.
        let _ = self.records.send(record);
    }

    /// Housekeeping: holds what was refused, and frees held deliveries of endpoints that have room again.
    fn tick(&mut self) {
        self.metrics.in_flight(self.limits.in_flight());
        self.limits.forget_idle();
        let now = self.context.clock.instant();
        self.take_up(now);
        // The log says when one is over.
        self.context.metrics.shortages(now);
        if self.holding.is_due(now) {
            self.hold();
        }
        if self.saturated.is_freeing() {
            return;
        }
        let wanted = self.saturated.wanted(&self.context, &self.limits, now);
        self.report(now);
        self.saturated.free(&self.context, wanted, now);
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
        while self.limits.in_flight() > 0 || self.unrecorded > 0 {
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
