//! What is counted on each lane.

use std::time::Duration;

use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;

use super::{Gauge, Names, register, seconds};
use crate::message::{Class, Times, Verdict};

/// From a millisecond to about half an hour.
fn long_seconds() -> Histogram {
    Histogram::new(exponential_buckets(0.001, 2.0, 22))
}

/// What is counted on all lanes.
#[derive(Debug)]
pub(super) struct Lanes {
    queue_wait: Family<Names<1>, Histogram>,
    in_flight: Family<Names<1>, Gauge>,
    attempts: Family<Names<2>, Counter>,
    attempt_seconds: Family<Names<1>, Histogram>,
    phase_seconds: Family<Names<2>, Histogram>,
    verdicts: Family<Names<2>, Counter>,
    latency: Family<Names<1>, Histogram>,
}

impl Default for Lanes {
    fn default() -> Lanes {
        Lanes {
            queue_wait: Family::new_with_constructor(seconds),
            in_flight: Family::default(),
            attempts: Family::default(),
            attempt_seconds: Family::new_with_constructor(seconds),
            phase_seconds: Family::new_with_constructor(seconds),
            verdicts: Family::default(),
            latency: Family::new_with_constructor(long_seconds),
        }
    }
}

impl Lanes {
    pub(super) fn register(&self, all: &mut Registry) {
        register(all, "ams_queue_wait_seconds", &self.queue_wait);
        register(all, "ams_in_flight", &self.in_flight);
        register(all, "ams_attempts_total", &self.attempts);
        register(all, "ams_attempt_seconds", &self.attempt_seconds);
        register(all, "ams_attempt_phase_seconds", &self.phase_seconds);
        register(all, "ams_verdicts_total", &self.verdicts);
        register(all, "ams_delivery_latency_seconds", &self.latency);
    }

    /// What is counted on one of them.
    pub(super) fn of(&self, lane: &str) -> LaneMetrics {
        let one = || [("lane", lane.to_owned())];
        let two = |label, value: &str| [("lane", lane.to_owned()), (label, value.to_owned())];
        let phase = |name| self.phase_seconds.get_or_create_owned(&two("phase", name));
        let verdict = |name| self.verdicts.get_or_create_owned(&two("verdict", name));
        LaneMetrics {
            queue_wait: self.queue_wait.get_or_create_owned(&one()),
            in_flight: self.in_flight.get_or_create_owned(&one()),
            attempts: Class::ALL
                .map(|class| self.attempts.get_or_create_owned(&two("class", class.as_str()))),
            attempt_seconds: self.attempt_seconds.get_or_create_owned(&one()),
            connect: phase("connect"),
            head: phase("head"),
            body: phase("body"),
            sent: verdict("sent"),
            retrying: verdict("retrying"),
            dead: verdict("dead"),
            expired: verdict("expired"),
            released: verdict("released"),
            latency: self.latency.get_or_create_owned(&one()),
        }
    }
}

/// What is counted on one lane; kept by those who work on it, so that counting costs next to nothing.
#[derive(Clone, Debug)]
pub struct LaneMetrics {
    queue_wait: Histogram,
    in_flight: Gauge,
    /// In the order of [`Class::ALL`].
    attempts: [Counter; Class::ALL.len()],
    attempt_seconds: Histogram,
    connect: Histogram,
    head: Histogram,
    body: Histogram,
    sent: Counter,
    retrying: Counter,
    dead: Counter,
    expired: Counter,
    released: Counter,
    latency: Histogram,
}

impl LaneMetrics {
    /// A ticket was begun, so long after it was published or due.
    pub fn begun_after(&self, wait: Duration) {
        self.queue_wait.observe(wait.as_secs_f64());
    }

    /// Tries under way in this process now.
    pub fn in_flight(&self, count: usize) {
        self.in_flight.set(count as f64);
    }

    /// One try ended.
    pub fn attempted(&self, class: Class, times: &Times, took: Duration) {
        self.attempts[class as usize].inc();
        self.attempt_seconds.observe(took.as_secs_f64());
        let phases =
            [(&self.connect, times.connect_us), (&self.head, times.head_us), (&self.body, times.body_us)];
        // A phase that did not take place took no time.
        for (phase, micros) in phases.into_iter().filter(|(_, micros)| *micros > 0) {
            phase.observe(f64::from(micros) / 1e6);
        }
    }

    /// A verdict was recorded.
    pub fn judged(&self, verdict: &Verdict) {
        let verdicts = match verdict {
            Verdict::Sent => &self.sent,
            Verdict::Retry { .. } => &self.retrying,
            Verdict::Dead { .. } => &self.dead,
            Verdict::Expired => &self.expired,
            Verdict::Release { .. } => &self.released,
        };
        verdicts.inc();
    }

    /// A message was delivered, so long after its creation.
    pub fn delivered_after(&self, latency: Duration) {
        self.latency.observe(latency.as_secs_f64());
    }
}
