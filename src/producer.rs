//! Claimed and queued: takes due rows from the store and puts their tickets on a lane.
//!
//! One producer is active; a lease row elects it and a standby takes over within ten seconds. It
//! claims in batches, each of which goes to one partition, and never more than a lane has room for.
//! A claim and its publishing overlap: while one batch waits for the broker, the next is claimed.
//! What can't be published is given back; what is published twice is harmless, because the ticket's
//! epoch is stale by then.

mod pacing;
mod passing;
mod rooms;
mod ticket;

use std::time::Duration;

use tokio::sync::{Notify, watch};
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use crate::clock::{Instant, Now, Timestamp};
use crate::message::{Held, MessageId, Ticket};
use crate::service::{self, Parts, Service, Step};
use crate::store::{BatchId, Bid, Claim, Claimed, Due, DueNow, InstanceId, Pacing, Result, StoreError};

pub use ticket::{dead_letter_record, lane_record};

use pacing::Pacer;
use passing::{LEFT_MAX, Passing};
use rooms::Rooms;

/// How a producer works.
#[derive(Clone, Debug)]
pub struct ProducerOptions {
    /// The topic of first tries.
    pub fresh_lane: String,
    /// Rows a claim takes at most.
    pub batch: usize,
    /// Tickets that may be on a lane and not taken up.
    pub room: usize,
    /// The longest gap between two looks for new rows while nothing happens.
    pub poll: Duration,
    /// At most so many first tries per interval; `None`: as fast as the endpoints take them.
    pub pacing: Option<Pacing>,
}

/// How long leadership lasts without being renewed. With [`BID`] it bounds how long an outage of the store
/// can go unnoticed, which must be well under a lease's time: see ADR 6.
const LEADERSHIP: Duration = Duration::from_secs(4);
/// How often a producer bids.
const BID: Duration = Duration::from_millis(1_500);
/// How often the range behind the cursor is searched for rows that committed late or were given back.
const SWEEP: Duration = Duration::from_millis(200);
/// How many rows of busy endpoints that were passed by are held in each of these searches.
const HOLD: usize = 200;
/// How often timed rows are looked for. They are claimed [`Ticket::AHEAD`] of their time, so no wait that is
/// longer than both together becomes longer by it.
const TIMED: Duration = Duration::from_millis(100);
/// How often, while some came to be claimed after their time: shorter waits are exact to about this. Not more
/// often, because each round takes the store and the broker some 6 ms of work however few rows it has.
const TIMED_LATE: Duration = Duration::from_millis(20);
/// Rows come due in bursts, as their tries failed in bursts; for so long after one the looks stay frequent.
const BURST: Duration = Duration::from_secs(1);
/// How often consumers are asked, while rows are claimed, which endpoints are busy.
const BUSY: Duration = Duration::from_millis(20);
/// How often held rows of endpoints that are open again are looked for.
const UNHOLD: Duration = Duration::from_secs(1);
/// Batches waiting for the broker at once.
const PUBLISHING_MAX: usize = 8;

/// The leadership of the active producer, as the janitor beside it has to know it.
#[derive(Clone, Copy, Debug)]
pub struct Reign {
    /// Since when there has been an active producer without a break.
    pub steady_since: Timestamp,
    /// When it ends unless it is renewed: nothing is known of the store from then on.
    pub until: Instant,
}

/// One producer: active or standing by.
pub struct Producer {
    parts: Parts,
    options: ProducerOptions,
    /// For the janitor beside it.
    leading: watch::Sender<Option<Reign>>,
    rooms: Rooms,
    pacer: Option<Pacer>,
    publishing: JoinSet<()>,
    /// Set when a claim's answer was lost: then the ledger may hold batches that we don't know of.
    unsure: bool,
    led_until: Instant,
    /// Somebody has paused all producers.
    paused: bool,
    cursor: MessageId,
    next_bid: Instant,
    next_sweep: Instant,
    next_timed: Instant,
    burst_until: Instant,
    next_unhold: Instant,
    /// Endpoints whose new rows would only wait on the lane; nothing is known of them at rest.
    busy: Vec<String>,
    next_busy: Instant,
    passing: Passing,
    gap: Duration,
}

impl Service for Producer {
    const NAME: &'static str = "producer";
    type Error = StoreError;

    /// One look for due rows: claims and publishes what there is.
    ///
    /// # Errors
    /// Those of the store; nothing is lost by any of them, and all of it passes by waiting.
    async fn step(&mut self) -> Result<Step> {
        while self.publishing.try_join_next().is_some() {}
        let now = self.parts.clock.reading();
        let Some(instance) = self.parts.presence.instance() else {
            return Ok(Step::Idle(GAP_MAX));
        };
        if !self.lead(instance, now).await? {
            return Ok(Step::Idle(BID));
        }
        if self.paused {
            return Ok(Step::Idle(GAP_MAX.max(self.options.poll)));
        }
        self.rooms.refresh(&self.options.fresh_lane, now.instant).await;
        if self.unsure {
            self.give_back_unknown(instance).await?;
        }
        if now.instant >= self.next_unhold {
            self.unhold(now).await?;
        }
        let DueNow { new, lanes } = self.due(now).await?;
        let mut worked = false;
        if new {
            worked |= self.claim_late(instance, now).await?;
            worked |= self.claim_fresh(instance, now).await?;
        } else {
            // What was true before a pause would only delay the first rows after it.
            self.passing = Passing::default();
            self.busy.clear();
        }
        if now.instant >= self.next_timed {
            worked |= self.claim_timed(&lanes, instance, now).await?;
        }
        Ok(self.rest(worked, now))
    }
}

impl Producer {
    /// A producer that has not bid for leadership yet.
    pub fn new(parts: Parts, options: ProducerOptions) -> Producer {
        let rooms = Rooms::new(parts.clone(), options.room);
        let pacer = options.pacing.map(Pacer::new);
        Producer {
            parts,
            rooms,
            pacer,
            options,
            leading: watch::Sender::new(None),
            publishing: JoinSet::new(),
            unsure: false,
            led_until: Instant::START,
            paused: false,
            cursor: MessageId(0),
            next_bid: Instant::START,
            next_sweep: Instant::START,
            next_timed: Instant::START,
            burst_until: Instant::START,
            next_unhold: Instant::START,
            busy: Vec::new(),
            next_busy: Instant::START,
            passing: Passing::default(),
            gap: GAP_MIN,
        }
    }

    /// Tells of this producer's leadership; `None` while it has none.
    pub fn leading(&self) -> watch::Receiver<Option<Reign>> {
        self.leading.subscribe()
    }

    /// Works until `stop`; then waits for what is being published, so that a clean stop leaves no
    /// batch in doubt. `wake` cuts an idle wait short.
    pub async fn run(mut self, stop: &CancellationToken, wake: &Notify) {
        service::run(&mut self, stop, wake).await;
        while self.publishing.join_next().await.is_some() {}
        self.leading.send_replace(None);
        self.parts.metrics.is_active_producer(false);
    }

    /// After work the next look follows at once; then the gap doubles up to the poll interval. In a burst the
    /// looks begin at even times, however long each takes.
    fn rest(&mut self, worked: bool, now: Now) -> Step {
        if worked {
            self.gap = GAP_MIN;
            return Step::Worked;
        }
        let mut gap = self.gap.min(self.options.poll);
        self.gap = (gap * 2).min(self.options.poll);
        if now.instant < self.burst_until {
            gap = gap.min(self.next_timed.since(self.parts.clock.instant())).max(GAP_MIN);
        }
        Step::Idle(gap)
    }

    /// Bids for leadership when it is time to. A leader that could not renew stops before its term ends.
    async fn lead(&mut self, instance: InstanceId, now: Now) -> Result<bool> {
        if now.instant < self.next_bid {
            return Ok(now.instant < self.led_until);
        }
        let (until, led_until) = (now.time.after(LEADERSHIP), now.instant.after(LEADERSHIP));
        let bid = Bid { instance, now: now.time, until, paced_until: None, pacing: self.options.pacing };
        let led = now.instant < self.led_until;
        let won =
            self.parts.store.lead(&bid).await.inspect_err(|_| self.parts.metrics.is_active_producer(led))?;
        self.parts.metrics.is_active_producer(won.is_some());
        self.next_bid = now.instant.after(BID);
        match won {
            Some(leadership) => {
                self.led_until = led_until;
                self.paused = leadership.paused;
                if !led {
                    tracing::info!(instance = instance.0, "instance {} is the active producer", instance.0);
                    self.cursor = MessageId(0);
                    self.unsure = true;
                    if let Some(pacer) = &mut self.pacer {
                        let left = leadership.paced_until.map_or(Duration::ZERO, |ends| ends.since(now.time));
                        pacer.inherit(left, now.instant);
                    }
                }
            }
            None => self.led_until = Instant::START,
        }
        self.leading.send_replace(won.map(|led| Reign { steady_since: led.steady_since, until: led_until }));
        Ok(won.is_some())
    }

    /// What is worth claiming: after work new rows, without a question, and else what the store says. One
    /// question in place of a claim for each lane keeps a producer at rest below 1 % of a core.
    async fn due(&self, now: Now) -> Result<DueNow> {
        if now.instant < self.next_timed {
            return match self.gap {
                GAP_MIN => Ok(DueNow { new: true, lanes: Vec::new() }),
                _ => self.parts.store.due(&[], now.time).await,
            };
        }
        let directory = self.parts.directory.snapshot();
        let topics = directory.lanes.iter().map(|lane| lane.topic.as_str());
        let lanes: Vec<&str> = std::iter::once("").chain(topics).collect();
        self.parts.store.due(&lanes, now.time.after(Ticket::AHEAD)).await
    }

    /// Claims new rows that appeared behind the cursor, when it is time to.
    async fn claim_late(&mut self, instance: InstanceId, now: Now) -> Result<bool> {
        if now.instant < self.next_sweep {
            return Ok(false);
        }
        let (due, pass_busy) = (Due::up_to(self.cursor), self.passing.has_left());
        let taken = self.claim(instance, Look { due, most: self.options.batch, pass_busy }, now).await?;
        match taken {
            Taken::Full(_) => return Ok(true),
            Taken::NoRoom => return Ok(false),
            Taken::Some(_) | Taken::Nothing => self.next_sweep = now.instant.after(SWEEP),
        }
        if pass_busy {
            match self.claim(instance, Look { due, most: HOLD, pass_busy: false }, now).await? {
                Taken::Full(rows) => self.passing.held(Some(rows.seen)),
                Taken::Some(_) | Taken::Nothing => self.passing.held(None),
                Taken::NoRoom => {}
            }
        }
        Ok(false)
    }

    /// Claims new rows after the cursor. Asks which endpoints are busy while there are any.
    async fn claim_fresh(&mut self, instance: InstanceId, now: Now) -> Result<bool> {
        let (after, pass_busy) = (self.cursor, self.passing.passes());
        let up_to = if pass_busy { after.0.saturating_add(LEFT_MAX) } else { i64::MAX };
        let due = Due::New { after, up_to: MessageId(up_to) };
        let taken = self.claim(instance, Look { due, most: self.options.batch, pass_busy }, now).await?;
        match taken {
            Taken::Full(rows) | Taken::Some(rows) => {
                let gone_past = usize::try_from(rows.last.0.abs_diff(after.0)).unwrap_or(usize::MAX);
                let left = if pass_busy { gone_past.saturating_sub(rows.seen) } else { 0 };
                self.passing.claimed(matches!(taken, Taken::Full(_)), left);
                self.cursor = rows.last;
            }
            Taken::Nothing => self.passing.claimed(false, 0),
            Taken::NoRoom => {}
        }
        if now.instant >= self.next_busy {
            self.busy = self.parts.store.busy().await?;
            self.next_busy = now.instant.after(BUSY);
        }
        Ok(matches!(taken, Taken::Full(_) | Taken::Some(_)))
    }

    /// Claims rows whose time has almost come, lane by lane. A paced first try takes its place in the window in
    /// which it goes out, so it is not claimed ahead.
    async fn claim_timed(&mut self, lanes: &[String], instance: InstanceId, now: Now) -> Result<bool> {
        let mut full = false;
        for lane in lanes {
            let paced = lane.is_empty() && self.pacer.is_some();
            let by = if paced { now.time } else { now.time.after(Ticket::AHEAD) };
            let look = Look { due: Due::Timed { lane, by }, most: self.options.batch, pass_busy: false };
            let taken = self.claim(instance, look, now).await?;
            full |= matches!(taken, Taken::Full(_));
            if matches!(taken, Taken::Full(rows) | Taken::Some(rows) if rows.late) {
                self.burst_until = now.instant.after(BURST);
            }
        }
        if !full {
            self.next_timed =
                now.instant.after(if now.instant < self.burst_until { TIMED_LATE } else { TIMED });
        }
        Ok(full)
    }

    /// One claim, as large as room and pacing allow.
    async fn claim(&mut self, owner: InstanceId, look: Look<'_>, now: Now) -> Result<Taken> {
        let Look { due, most, pass_busy } = look;
        let (lane, first_tries) = match due {
            Due::Timed { lane, .. } if !lane.is_empty() => (lane, false),
            _ => (self.options.fresh_lane.as_str(), true),
        };
        let mut limit = self.rooms.room(lane).min(most);
        if let (true, Some(pacer)) = (first_tries, &mut self.pacer) {
            limit = limit.min(pacer.allowance(now.instant));
            if limit > 0 && pacer.opens_window(now.instant) {
                // The window is written down before it is used: a successor must not use it again.
                let written = |at: Instant| now.time.after(at.since(now.instant));
                let bid = Bid {
                    instance: owner,
                    now: now.time,
                    until: written(self.led_until),
                    paced_until: Some(written(pacer.window_end(now.instant))),
                    pacing: self.options.pacing,
                };
                if self.parts.store.lead(&bid).await?.is_none() {
                    self.led_until = Instant::START;
                    return Ok(Taken::Nothing);
                }
                pacer.open_window(now.instant);
            }
        }
        if limit == 0 || self.publishing.len() >= PUBLISHING_MAX {
            return Ok(Taken::NoRoom);
        }
        let directory = self.parts.directory.snapshot();
        let (open, busy) = (&directory.open, &self.busy);
        let claim = Claim { due, limit, lane, open, busy, pass_busy, owner, now: now.time };
        let watch = self.parts.clock.stopwatch();
        let claimed = self.parts.store.claim(&claim).await.inspect_err(|_| self.unsure = true)?;
        let Some(last) = claimed.last else { return Ok(Taken::Nothing) };
        for id in &claimed.unreadable {
            tracing::error!(id = id.0, "message {id} can't be read and is dead; its reason says why");
        }
        self.parts.metrics.batch("claim", claimed.tickets.len(), watch.elapsed());
        let late = claimed.tickets.iter().any(|ticket| ticket.due_at.is_none());
        let rows = Rows { seen: claimed.seen, last, late };
        let taken = if claimed.seen >= limit { Taken::Full(rows) } else { Taken::Some(rows) };
        if let (true, Some(pacer)) = (first_tries, &mut self.pacer) {
            pacer.used(claimed.tickets.len());
        }
        let lane = lane.to_owned();
        self.publish(lane, claimed);
        Ok(taken)
    }

    /// Publishes a claimed batch beside the next claim.
    fn publish(&mut self, lane: String, claimed: Claimed) {
        let Some(batch) = claimed.batch else { return };
        self.rooms.published(&lane, claimed.tickets.len());
        let parts = self.parts.clone();
        let known = self.rooms.under_way(batch);
        self.publishing.spawn(async move {
            publish(&parts, &lane, batch, claimed).await;
            drop(known);
        });
    }

    /// After a claim whose answer was lost, and after an election: batches of ours in the ledger that
    /// nobody is publishing are given back.
    async fn give_back_unknown(&mut self, instance: InstanceId) -> Result<()> {
        let batches = self.parts.store.batches(self.parts.clock.now(), 10_000).await?;
        let unknown: Vec<BatchId> = batches
            .iter()
            .filter(|batch| {
                batch.owner == instance && batch.place.is_none() && !self.rooms.is_under_way(batch.id)
            })
            .map(|batch| batch.id)
            .collect();
        for chunk in unknown.chunks(100) {
            self.parts.store.requeue(chunk, self.parts.clock.now()).await?;
        }
        self.unsure = false;
        Ok(())
    }

    /// Frees rows that were held for an endpoint which is open again.
    async fn unhold(&mut self, now: Now) -> Result<()> {
        let directory = self.parts.directory.snapshot();
        let mut more = false;
        for (endpoint, held) in self.parts.store.held().await? {
            if held == Held::EndpointClosed && directory.open_endpoint(&endpoint).is_some() {
                let freed = self.parts.store.unhold(&endpoint, held, self.options.batch, now.time).await?;
                more |= freed > 0;
            }
        }
        if more {
            self.next_sweep = now.instant;
        } else {
            self.next_unhold = now.instant.after(UNHOLD);
        }
        Ok(())
    }
}

/// The gap after work; it doubles from here.
const GAP_MIN: Duration = Duration::from_millis(2);
const GAP_MAX: Duration = Duration::from_millis(100);

/// What one claim is to look at: [`Claim`] without what all have in common.
#[derive(Clone, Copy)]
struct Look<'a> {
    due: Due<'a>,
    most: usize,
    pass_busy: bool,
}

#[derive(Clone, Copy)]
enum Taken {
    /// As many as were asked for: there may be more.
    Full(Rows),
    Some(Rows),
    Nothing,
    /// Nothing was asked for.
    NoRoom,
}

#[derive(Clone, Copy)]
struct Rows {
    seen: usize,
    last: MessageId,
    /// The time of one of them had come before.
    late: bool,
}

/// Publishes one batch, then notes it in the ledger; gives its rows back when the broker does not take it.
async fn publish(parts: &Parts, lane: &str, batch: BatchId, claimed: Claimed) {
    let watch = parts.clock.stopwatch();
    let records: Vec<_> = claimed.tickets.iter().map(lane_record).collect();
    let count = records.len();
    let only = &[batch];
    let never = CancellationToken::new();
    match parts.queue.publish(lane, records).await {
        Ok(place) => {
            parts.metrics.batch("publish", count, watch.elapsed());
            service::persist("ledger", &never, || parts.store.acknowledge(batch, place)).await;
        }
        Err(error) => {
            tracing::warn!(
                lane,
                "{count} tickets could not be published on {lane}: {error}; they are given back"
            );
            service::persist("ledger", &never, || parts.store.requeue(only, parts.clock.now())).await;
            // A lane that is missing is the usual reason, and mending it is idempotent.
            if let Err(error) = parts.queue.ensure(&[lane.to_owned()]).await {
                tracing::debug!(lane, "{lane} could not be made sure of: {error}");
            }
        }
    }
}

#[cfg(test)]
mod tests;
