//! How many tickets each lane still takes: what the group has not taken up, known from the broker
//! some moments ago, and what was published since.

use std::collections::HashMap;
use std::time::Duration;

use tokio::task::JoinHandle;

use crate::clock::Instant;
use crate::queue::{Depth, QueueError};
use crate::service::{Backoff, Context};
use crate::ticket::Ticket;

/// How often the broker is asked, and how often while a lane is more than half full: a producer that waits for room learns
/// of it soon.
const REFRESH: Duration = Duration::from_millis(100);
const REFRESH_FULL: Duration = Duration::from_millis(30);

/// Bytes of tickets that may be on a lane and not taken up, about: embedded they are in this process's memory.
const BYTES_MAX: usize = 128 << 20;

/// How much each lane takes.
pub(super) struct Capacity {
    context: Context,
    limit: usize,
    lanes: HashMap<String, LaneCapacity>,
    next_refresh: Instant,
    asking: Option<JoinHandle<Result<Answers, QueueError>>>,
    backoff: Backoff,
}

#[derive(Debug, Default)]
struct LaneCapacity {
    /// Tickets that the group had not taken up at the last look.
    lag: usize,
    /// Published since that look began.
    since: usize,
    /// Bytes of the tickets that were last published, one with another.
    weight: usize,
    known: bool,
    /// Whether a consumer has registered the lane.
    registered: bool,
}

/// What the broker said: lane, what had been published when it was asked, depth.
type Answers = Vec<(String, usize, Vec<Depth>)>;

impl Capacity {
    pub(super) fn new(context: Context, limit: usize) -> Capacity {
        Capacity {
            context,
            limit,
            lanes: HashMap::new(),
            next_refresh: Instant::START,
            asking: None,
            backoff: Backoff::new("capacity of the lanes"),
        }
    }

    /// Asks the broker how far each lane's group has come, when it is time to. The question goes on
    /// beside the claims, because a broker may take its time. While it gives no answer, capacities are as they were
    /// last known.
    pub(super) async fn refresh(&mut self, fresh_lane: &str, now: Instant) {
        // Before any consumer has registered the fresh lane, tickets may already wait for it there.
        self.lanes.entry(fresh_lane.to_owned()).or_default();
        if let Some(asking) = self.asking.take_if(|asking| asking.is_finished()) {
            // A task that was cut off has no answer, and the next one will.
            let wait = match asking.await.unwrap_or_else(|_| Ok(Vec::new())) {
                Ok(answers) => {
                    for (lane, before, depth) in answers {
                        self.learn(&lane, before, &depth);
                    }
                    self.backoff.succeeded();
                    let is_full = |lane: &String| self.free(lane) < self.whole(lane) / 2;
                    if self.lanes.keys().any(is_full) { REFRESH_FULL } else { REFRESH }
                }
                Err(error) => self.backoff.failed(&error).max(REFRESH),
            };
            self.next_refresh = now.after(wait);
        }
        if self.asking.is_none() && now >= self.next_refresh {
            if !self.is_registered(fresh_lane) && self.free(fresh_lane) == 0 {
                // Its first consumer may have come since the directory was read; else that is read again in a second.
                let read = self.context.directory.refresh().await;
                drop(read.inspect_err(|error| tracing::debug!("lanes could not be looked for: {error}")));
            }
            self.ask(now);
        }
    }

    fn ask(&mut self, now: Instant) {
        let directory = self.context.directory.snapshot();
        let mut questions = Vec::new();
        for lane in &directory.lanes {
            let lane_capacity = self.lanes.entry(lane.topic.clone()).or_default();
            lane_capacity.registered = true;
            // A quiet lane needs no look: nothing was published that could have filled it.
            if !(lane_capacity.known && lane_capacity.lag == 0 && lane_capacity.since == 0) {
                questions.push((lane.clone(), lane_capacity.since));
            }
        }
        if questions.is_empty() {
            self.next_refresh = now.after(REFRESH);
            return;
        }
        let context = self.context.clone();
        self.asking = Some(tokio::spawn(async move {
            let mut answers = Vec::with_capacity(questions.len());
            for (lane, before) in questions {
                let depth = context.depth(&lane).await?;
                answers.push((lane.topic, before, depth));
            }
            Ok(answers)
        }));
    }

    fn learn(&mut self, lane: &str, before: usize, depth: &[Depth]) {
        let lane_capacity = self.lanes.entry(lane.to_owned()).or_default();
        lane_capacity.lag = lag(depth);
        lane_capacity.since = lane_capacity.since.saturating_sub(before);
        lane_capacity.known = true;
    }

    fn is_registered(&self, lane: &str) -> bool {
        self.lanes.get(lane).is_some_and(|lane| lane.registered)
    }

    /// How many tickets `lane` takes now.
    pub(super) fn free(&self, lane: &str) -> usize {
        match self.lanes.get(lane) {
            // Its consumer is known, and how far it has come is not yet.
            Some(lane_capacity) if lane_capacity.registered && !lane_capacity.known => 0,
            Some(lane_capacity) => self.whole(lane).saturating_sub(lane_capacity.lag + lane_capacity.since),
            None => self.limit,
        }
    }

    /// How many tickets `lane` takes when it is empty.
    pub(super) fn whole(&self, lane: &str) -> usize {
        let weight = self.lanes.get(lane).map_or(0, |lane_capacity| lane_capacity.weight);
        self.limit.min(BYTES_MAX / weight.max(1)).max(1)
    }

    /// Notes that these tickets are on their way to `lane`.
    pub(super) fn published(&mut self, lane: &str, tickets: &[Ticket]) {
        let lane = self.lanes.entry(lane.to_owned()).or_default();
        lane.since += tickets.len();
        // A light batch does not make one forget at once that heavy ones are on the lane.
        let weight = tickets.iter().map(Ticket::bytes).sum::<usize>() / tickets.len().max(1);
        lane.weight = weight.max(lane.weight - lane.weight / 4);
    }
}

fn lag(depth: &[Depth]) -> usize {
    depth.iter().map(|d| usize::try_from(d.end - d.position).unwrap_or(0)).sum()
}
