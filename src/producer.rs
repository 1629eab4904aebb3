//! Claimed and queued: takes what is due from the store and puts its tickets on a lane.
//!
//! One producer is active; a lease row elects it and a standby takes over within ten seconds. It
//! claims in batches, each of which goes to one partition, and never more than the capacity of a lane.
//! A claim and its publishing overlap: while one batch waits for the broker, the next is claimed.
//! A ticket that is published twice is harmless: once its delivery has begun, its bit is gone.

mod capacity;
mod pacing;
mod turns;

use std::time::Duration;

use tokio::sync::{Notify, watch};
use tokio_util::sync::CancellationToken;

use crate::clock::{Instant, Now, Timestamp};
use crate::message::Held;
use crate::publish::Publisher;
use crate::rate::Rate;
use crate::service::{self, Context, Service, Step};
use crate::store::{Bid, Claim, Due, DueNow, InstanceId, Leadership, Result, StoreError, Unhold, Urgency};
use crate::ticket::{BatchId, Ticket};

use capacity::Capacity;
use pacing::Pacer;
use turns::Turns;

/// How a producer works.
#[derive(Clone, Debug)]
pub struct ProducerOptions {
    /// The topic of first tries.
    pub fresh_lane: String,
    /// Deliveries that a claim takes at most.
    pub batch: usize,
    /// Tickets that may be on a lane and not taken up.
    pub capacity: usize,
    /// The longest gap between two looks for new messages while nothing happens.
    pub poll: Duration,
    /// At most so many first tries per interval; `None`: as fast as the endpoints take them.
    pub pacing: Option<Rate>,
}

/// How long leadership lasts without being renewed. With [`BID`] it bounds how long an outage of the store
/// can go unnoticed, which must be well under a lease's time: see ADR 6.
const LEADERSHIP: Duration = Duration::from_secs(4);
/// How often a producer bids.
const BID: Duration = Duration::from_millis(1_500);
/// How often waits that are over are looked for. They are claimed [`Ticket::AHEAD`] of their time, so no wait that is
/// longer than both together becomes longer by it.
const TIMED: Duration = Duration::from_millis(100);
/// How often, while some came to be claimed after their time: shorter waits are exact to about this. Not more
/// often, because each round takes the store and the broker some 6 ms of work however few deliveries it has.
const TIMED_LATE: Duration = Duration::from_millis(20);
/// Deliveries come due in bursts, as their tries failed in bursts; for so long after one the looks stay frequent.
const BURST: Duration = Duration::from_secs(1);
/// How often consumers are asked, while there is something to claim, which endpoints are saturated.
const SATURATED_LOOK: Duration = Duration::from_millis(40);
/// How often times are reserved for deliveries of endpoints with a rate, and for which time ahead: no sooner than their
/// tickets can be with their consumers, and for as long as a look may be late.
const RESERVE: Duration = Duration::from_millis(100);
const RESERVE_FROM: Duration = Duration::from_millis(200);
const RESERVE_UNTIL: Duration = Duration::from_millis(500);
/// How often held deliveries of endpoints that are enabled again are looked for.
const UNHOLD: Duration = Duration::from_secs(1);
/// How often, while there are more of them than were freed: the store may know of a closed endpoint before we do, and
/// then each claim holds again what was freed.
const UNHOLD_MORE: Duration = Duration::from_millis(20);

/// The leadership of the active producer, as the janitor beside it has to know it.
#[derive(Clone, Copy, Debug)]
pub struct Term {
    /// Since when there has been an active producer without a break.
    pub steady_since: Timestamp,
    /// When it was won or renewed.
    pub since: Now,
    /// When it ends unless it is renewed: nothing is known of the store from then on.
    pub until: Instant,
    /// How often this producer has looked whether the feeds belong to the database. Each time messages may have been found
    /// to lack a place.
    pub checks: u32,
}

impl Term {
    /// A clock that was set by less does no harm: a lease has longer than that left.
    const STEP: Duration = Duration::from_secs(1);

    /// Whether every living instance could have renewed its lease, by a clock that nobody has set since the last bid. A bid
    /// finds out when somebody has; nobody may be taken for dead by the new time before.
    pub fn is_sure(&self, now: Now, lease: Duration) -> bool {
        let expected = self.since.time.after(now.instant.since(self.since.instant));
        let step = now.time.since(expected).max(expected.since(now.time));
        step < Term::STEP && now.time.since(self.steady_since) >= lease
    }
}

/// When each duty comes next.
#[derive(Debug, Default)]
struct Next {
    bid: Instant,
    timed: Instant,
    unhold: Instant,
    reserve: Instant,
    saturated: Instant,
}

/// One producer: active or standing by.
pub struct Producer {
    context: Context,
    options: ProducerOptions,
    /// For the janitor beside it.
    leading: watch::Sender<Option<Term>>,
    stop: CancellationToken,
    capacity: Capacity,
    pacer: Option<Pacer>,
    publisher: Publisher,
    /// Whether the feeds belong to this database: asked at an election and after an answer was lost, before the next claim.
    feeds_checked: bool,
    checks: u32,
    led_until: Instant,
    /// Somebody has paused all producers.
    paused: bool,
    next: Next,
    burst_until: Instant,
    /// Endpoints whose new messages would only wait on the lane; nothing is known of them at rest.
    saturated: Vec<String>,
    turns: Turns,
    gap: Duration,
}

impl Service for Producer {
    const NAME: &'static str = "producer";
    type Error = StoreError;

    /// One look for what is due: claims and publishes what there is.
    ///
    /// # Errors
    /// Those of the store; nothing is lost by any of them, and all of it passes by waiting.
    async fn step(&mut self) -> Result<Step> {
        let now = self.context.clock.reading();
        let Some(instance) = self.context.presence.instance() else {
            return Ok(Step::Idle(GAP_MAX));
        };
        if !self.lead(instance, now).await? {
            return Ok(Step::Idle(BID));
        }
        if self.paused {
            return Ok(Step::Idle(GAP_MAX.max(self.options.poll)));
        }
        self.capacity.refresh(&self.options.fresh_lane, now.instant).await;
        if !self.feeds_checked {
            self.check_feeds(now).await?;
        }
        if now.instant >= self.next.unhold {
            self.unhold(now).await?;
        }
        if now.instant >= self.next.reserve {
            self.reserve(now).await?;
        }
        let DueNow { new, lanes } = self.due(now).await?;
        let mut worked = false;
        if new {
            worked |= self.claim_new(instance, now).await?;
        } else if self.has_room() {
            // What was true before a pause would only delay the first messages after it.
            self.saturated.clear();
        }
        if now.instant >= self.next.timed {
            worked |= self.claim_timed(&lanes, instance, now).await?;
        }
        Ok(self.rest(worked, now))
    }
}

impl Producer {
    /// A producer that has not bid for leadership yet.
    pub fn new(context: Context, options: ProducerOptions) -> Producer {
        let capacity = Capacity::new(context.clone(), options.capacity);
        let (pacer, publisher) = (options.pacing.map(Pacer::new), Publisher::new(context.clone()));
        Producer {
            context,
            capacity,
            pacer,
            options,
            leading: watch::Sender::new(None),
            stop: CancellationToken::new(),
            publisher,
            feeds_checked: false,
            checks: 0,
            led_until: Instant::START,
            paused: false,
            next: Next::default(),
            burst_until: Instant::START,
            saturated: Vec::new(),
            turns: Turns::default(),
            gap: GAP_MIN,
        }
    }

    /// Tells of this producer's leadership; `None` while it has none.
    pub fn leading(&self) -> watch::Receiver<Option<Term>> {
        self.leading.subscribe()
    }

    /// What publishes its batches, for the janitor beside it.
    pub fn publisher(&self) -> Publisher {
        self.publisher.clone()
    }

    /// Works until `stop`; then waits for what is being published, so that a clean stop leaves no
    /// batch in doubt. `wake` cuts an idle wait short.
    pub async fn run(mut self, stop: &CancellationToken, wake: &Notify) {
        self.stop = stop.clone();
        service::run(&mut self, stop, wake).await;
        let left = self.publisher.drain().await;
        if left > 0 {
            tracing::warn!("{left} batches are left to another producer's janitor");
        }
        self.leading.send_replace(None);
        self.context.metrics.is_active_producer(false);
    }

    /// After work the next look follows at once; then the gap grows up to the poll interval. In a burst the
    /// looks begin at even times, however long each takes.
    fn rest(&mut self, worked: bool, now: Now) -> Step {
        if worked {
            self.gap = GAP_MIN;
            return Step::Worked;
        }
        let mut gap = self.gap.min(self.options.poll);
        self.gap = gap.mul_f64(GAP_GROWTH).min(self.options.poll);
        // A look that comes late makes every interval longer.
        if let Some(left) = self.pacer.as_mut().and_then(|pacer| pacer.used_up_for(now.instant)) {
            gap = gap.min(left).max(GAP_MIN);
        }
        if now.instant < self.burst_until {
            gap = gap.min(self.next.timed.since(self.context.clock.instant())).max(GAP_MIN);
        }
        Step::Idle(gap)
    }

    /// Bids for leadership when it is time to. A leader that could not renew stops before its term ends.
    async fn lead(&mut self, instance: InstanceId, now: Now) -> Result<bool> {
        if now.instant < self.next.bid {
            return Ok(now.instant < self.led_until);
        }
        let (until, led_until) = (now.time.after(LEADERSHIP), now.instant.after(LEADERSHIP));
        let bid = Bid { instance, now: now.time, until, paced_until: None, pacing: self.options.pacing };
        let led = now.instant < self.led_until;
        let won = self
            .context
            .store
            .lead(&bid)
            .await
            .inspect_err(|_| self.context.metrics.is_active_producer(led))?;
        self.context.metrics.is_active_producer(won.is_some());
        self.next.bid = now.instant.after(BID);
        match won {
            Some(leadership) => {
                self.led_until = led_until;
                self.paused = leadership.paused;
                if !led {
                    tracing::info!(instance = instance.0, "instance {} is the active producer", instance.0);
                    self.feeds_checked = false;
                    if let Some(pacer) = &mut self.pacer {
                        let left = leadership.paced_until.map_or(Duration::ZERO, |ends| ends.since(now.time));
                        pacer.inherit(left, now.instant);
                    }
                }
            }
            None => self.led_until = Instant::START,
        }
        let checks = self.checks;
        let term =
            |led: Leadership| Term { steady_since: led.steady_since, since: now, until: led_until, checks };
        self.leading.send_replace(won.map(term));
        Ok(won.is_some())
    }

    /// What is worth claiming: after work new messages, without a question, and else what the store says. One
    /// question in place of a claim for each lane keeps a producer at rest below 1 % of a core.
    async fn due(&self, now: Now) -> Result<DueNow> {
        if now.instant < self.next.timed {
            if !self.has_room() {
                // Nothing could be claimed, whatever the answer.
                return Ok(DueNow::default());
            }
            return match self.gap {
                GAP_MIN => Ok(DueNow { new: true, lanes: Vec::new() }),
                _ => self.context.store.due(&[], now.time).await,
            };
        }
        let directory = self.context.directory.snapshot();
        let topics = directory.lanes.iter().map(|lane| lane.topic.as_str());
        let lanes: Vec<&str> = std::iter::once("").chain(topics).collect();
        self.context.store.due(&lanes, now.time.after(Ticket::AHEAD)).await
    }

    /// Claims new messages, urgent ones first: after a full claim the others have to wait, but not for ever. Asks which endpoints are
    /// saturated while there are any.
    async fn claim_new(&mut self, instance: InstanceId, now: Now) -> Result<bool> {
        let (mut worked, mut asked, order) = (false, 0, self.turns.order());
        for urgency in &order {
            let taken = self.claim(instance, Due::New(*urgency), now).await?;
            worked |= matches!(taken, Taken::Full { .. } | Taken::Some { .. });
            asked += usize::from(!matches!(taken, Taken::NoCapacity));
            if matches!(taken, Taken::Full { .. } | Taken::NoCapacity) {
                break;
            }
        }
        if asked > 0 {
            self.turns.asked(&order, asked);
        }
        if now.instant >= self.next.saturated {
            self.saturated = self.context.store.saturated().await?;
            self.next.saturated = now.instant.after(SATURATED_LOOK);
        }
        Ok(worked)
    }

    /// Claims deliveries whose time has almost come, lane by lane. A paced first try takes its place in the window in
    /// which it goes out, so it is not claimed ahead.
    async fn claim_timed(&mut self, lanes: &[String], instance: InstanceId, now: Now) -> Result<bool> {
        let mut full = false;
        for lane in lanes {
            let paced = lane.is_empty() && self.pacer.is_some();
            let by = if paced { now.time } else { now.time.after(Ticket::AHEAD) };
            let taken = self.claim(instance, Due::Timed { lane, by }, now).await?;
            full |= matches!(taken, Taken::Full { .. });
            if matches!(taken, Taken::Full { late: true } | Taken::Some { late: true }) {
                self.burst_until = now.instant.after(BURST);
            }
        }
        if !full {
            self.next.timed =
                now.instant.after(if now.instant < self.burst_until { TIMED_LATE } else { TIMED });
        }
        Ok(full)
    }

    /// One claim, as large as capacity and pacing allow.
    async fn claim(&mut self, owner: InstanceId, due: Due<'_>, now: Now) -> Result<Taken> {
        let (lane, first_tries) = match due {
            Due::Timed { lane, .. } if !lane.is_empty() => (lane.to_owned(), false),
            _ => (self.options.fresh_lane.clone(), true),
        };
        let limit = match self.allowance(&lane, first_tries, owner, now).await? {
            Some(limit) if limit >= self.least(&lane, due) && !self.publisher.is_busy(&lane) => limit,
            Some(_) => return Ok(Taken::NoCapacity),
            None => return Ok(Taken::Nothing),
        };
        let (batch, saturated) = (BatchId::random(), &self.saturated);
        let claim = Claim { due, limit, lane: &lane, batch, saturated, owner, now: now.time };
        let watch = self.context.clock.stopwatch();
        let claimed = self.context.store.claim(&claim).await;
        self.feeds_checked &= claimed.is_ok();
        let claimed = claimed?;
        if claimed.seen == 0 {
            return Ok(Taken::Nothing);
        }
        for id in &claimed.unreadable {
            tracing::error!(id = id.0, "message {id} can't be read and is dead; its reason says why");
        }
        self.context.metrics.batch("claim", claimed.tickets.len(), watch.elapsed());
        let late = claimed.tickets.iter().any(|ticket| ticket.due_at.is_none());
        if let (true, Some(pacer)) = (first_tries, &mut self.pacer) {
            pacer.used(claimed.tickets.len(), now.instant);
        }
        self.publish(lane, batch, claimed.tickets);
        Ok(if claimed.seen >= limit { Taken::Full { late } } else { Taken::Some { late } })
    }

    /// How many may be claimed for a lane now, by its capacity and the pacing. `None`: another producer leads.
    async fn allowance(
        &mut self,
        lane: &str,
        first_tries: bool,
        owner: InstanceId,
        now: Now,
    ) -> Result<Option<usize>> {
        let mut limit = self.capacity.free(lane).min(self.options.batch);
        if let (true, Some(pacer)) = (first_tries, &mut self.pacer) {
            limit = limit.min(pacer.allowance(now.instant));
            if let Some(until) = pacer.to_write(now.instant).filter(|_| limit > 0) {
                // It is written down before it is used: a successor must not use it again.
                let written = |at: Instant| now.time.after(at.since(now.instant));
                let bid = Bid {
                    instance: owner,
                    now: now.time,
                    until: written(self.led_until),
                    paced_until: Some(written(until)),
                    pacing: self.options.pacing,
                };
                if self.context.store.lead(&bid).await?.is_none() {
                    self.led_until = Instant::START;
                    return Ok(None);
                }
                pacer.written(until);
            }
        }
        Ok(Some(limit))
    }

    /// What a claim has to be allowed to take. A lane that is nearly full keeps its consumers busy until a whole batch of
    /// new messages has room, and each claim costs the store some 0.5 ms however little it takes.
    fn least(&self, lane: &str, due: Due<'_>) -> usize {
        match due {
            Due::New(_) if self.pacer.is_none() => {
                self.options.batch.min(self.capacity.whole(lane) / 4).max(1)
            }
            _ => 1,
        }
    }

    /// Whether the fresh lane takes a claim of new messages now.
    fn has_room(&self) -> bool {
        let lane = &self.options.fresh_lane;
        let least = self.least(lane, Due::New(Urgency::Normal));
        self.capacity.free(lane) >= least && !self.publisher.is_busy(lane)
    }

    /// Publishes a claimed batch beside the next claim.
    fn publish(&mut self, lane: String, batch: BatchId, tickets: Vec<Ticket>) {
        if !tickets.is_empty() {
            self.capacity.published(&lane, &tickets);
            self.publisher.publish(lane, batch, tickets, &self.stop);
        }
    }

    /// Makes sure that the feeds mean something in this database. It may be another one than before: a restored dump.
    async fn check_feeds(&mut self, now: Now) -> Result<()> {
        if self.context.store.check_feeds(now.time).await? {
            tracing::warn!(
                "the database has come from another server; messages without a place are looked for"
            );
        }
        (self.feeds_checked, self.checks) = (true, self.checks.wrapping_add(1));
        Ok(())
    }

    /// Reserves times for deliveries of endpoints with a rate, and has them claimed at once: they come to their consumers
    /// ahead of those times.
    async fn reserve(&mut self, now: Now) -> Result<()> {
        self.next.reserve = now.instant.after(RESERVE);
        if self.context.directory.snapshot().rated {
            let (from, until) = (now.time.after(RESERVE_FROM), now.time.after(RESERVE_UNTIL));
            if self.context.store.reserve(from, until).await? > 0 {
                self.next.timed = now.instant;
            }
        }
        Ok(())
    }

    /// Frees deliveries that were held for an endpoint which is enabled again, or has a rate no longer.
    async fn unhold(&mut self, now: Now) -> Result<()> {
        let directory = self.context.directory.snapshot();
        let all = self.context.store.held().await?;
        let mut more = false;
        for reason in [Held::EndpointDisabled, Held::EndpointRate] {
            let is_over = |(endpoint, held): &&(String, Held)| {
                let endpoint = directory.enabled_endpoint(endpoint).filter(|_| *held == reason);
                endpoint.is_some_and(|endpoint| reason == Held::EndpointDisabled || endpoint.rate.is_none())
            };
            let limit = self.options.batch;
            let unhold = |(endpoint, _): &(String, Held)| Unhold { endpoint: endpoint.clone(), limit };
            let wanted: Vec<Unhold> = all.iter().filter(is_over).map(unhold).collect();
            if !wanted.is_empty() {
                let freed = self.context.store.unhold(&wanted, reason, now.time).await?;
                more |= freed.into_iter().any(|freed| freed > 0);
            }
        }
        self.next.unhold = now.instant.after(if more { UNHOLD_MORE } else { UNHOLD });
        Ok(())
    }
}

/// The gap after work, and by how much it grows with each look in vain: slowly, so that steady traffic is looked for
/// as often as it comes.
const GAP_MIN: Duration = Duration::from_millis(1);
const GAP_GROWTH: f64 = 1.25;
const GAP_MAX: Duration = Duration::from_millis(100);

/// What a claim came to.
#[derive(Clone, Copy)]
enum Taken {
    /// As many as were asked for: there may be more. `late`: the time of one of them had come before.
    Full {
        late: bool,
    },
    Some {
        late: bool,
    },
    Nothing,
    /// Nothing was asked for.
    NoCapacity,
}

#[cfg(test)]
mod tests;
