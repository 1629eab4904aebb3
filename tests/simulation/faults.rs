//! What goes wrong, and how often: calls that fail before they happen or after they happened, parts that are away for a
//! while, and processes that end in the middle of a call.

pub mod cache;
pub mod queue;
pub mod store;

use std::sync::Mutex;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use ams::clock::{Clock, Timestamp};

use crate::node::Process;
use crate::report::Report;
use crate::world::wait;

/// A part that all processes share.
#[derive(Clone, Copy)]
pub enum Part {
    Store,
    Queue,
    Cache,
}

impl Part {
    const ALL: [Part; 3] = [Part::Store, Part::Queue, Part::Cache];

    fn faults(self) -> &'static str {
        match self {
            Part::Store => "faults of the store",
            Part::Queue => "faults of the queue",
            Part::Cache => "faults of the cache",
        }
    }

    fn outages(self) -> &'static str {
        match self {
            Part::Store => "outages of the store",
            Part::Queue => "outages of the queue",
            Part::Cache => "outages of the cache",
        }
    }
}

/// How often calls of a part go wrong, in thousandths.
#[derive(Clone, Copy, Debug)]
struct Rates {
    before: u32,
    after: u32,
    outage: u32,
}

/// Decides the fate of each call, and counts.
pub struct Faults {
    clock: Clock,
    /// Nothing goes wrong from then on.
    calm_at: Timestamp,
    parts: [Rates; 3],
    crash: u32,
    /// In thousandths of attempts.
    short: u32,
    /// In thousandths of batches.
    partly: u32,
    /// Until when a part is away, in microseconds.
    away_until: [AtomicI64; 3],
    pub report: Mutex<Report>,
}

impl Faults {
    /// Faults at random rates until `calm_at`, by the world's own clock.
    pub fn random(clock: Clock, calm_at: Timestamp) -> Faults {
        // Half of the worlds are without each kind, so that every kind is also seen apart from others.
        let rate = |max| if fastrand::bool() { 0 } else { fastrand::u32(1..=max) };
        Faults {
            clock,
            calm_at,
            // The fewer calls a part has, the more of them fail.
            parts: Part::ALL.map(|part| {
                let times = [1, 3, 20][part as usize];
                Rates { before: rate(20 * times), after: rate(20 * times), outage: rate(3 * times) }
            }),
            crash: rate(3),
            short: rate(300),
            partly: rate(50),
            away_until: [0, 0, 0].map(AtomicI64::new),
            report: Mutex::default(),
        }
    }

    /// Whether things may still go wrong.
    pub fn are_on(&self) -> bool {
        self.clock.now() < self.calm_at
    }

    pub fn count(&self, what: &'static str, times: u64) {
        self.report.lock().unwrap().count(what, times);
    }

    fn happens(&self, per_mille: u32, what: &'static str) -> bool {
        let happens = self.are_on() && fastrand::u32(0..1000) < per_mille;
        if happens {
            self.count(what, 1);
        }
        happens
    }

    /// Ends the process here, or not.
    pub async fn maybe_crash(&self, process: &Process) {
        if self.are_on() && fastrand::u32(0..1000) < self.crash {
            process.kill();
        }
        process.is_alive().await;
    }

    /// Whether the process is short of what an attempt needs.
    pub fn is_short(&self) -> bool {
        self.happens(self.short, "shortages")
    }

    /// Whether a batch is only published in part.
    fn is_partial(&self) -> bool {
        self.happens(self.partly, "half-published batches")
    }

    /// Whether a part is away. It leaves for up to 20 s, so that some leases run out and others do not.
    fn is_away(&self, part: Part) -> bool {
        let (now, until) = (self.clock.now(), &self.away_until[part as usize]);
        if self.happens(self.parts[part as usize].outage, part.outages()) {
            let back = now.after(Duration::from_millis(fastrand::u64(100..20_000))).min(self.calm_at);
            until.fetch_max(back.as_micros(), Ordering::Relaxed);
        }
        now.as_micros() < until.load(Ordering::Relaxed)
    }

    /// Carries a call out, or fails it on one side or the other.
    pub async fn call<T, E>(
        &self,
        part: Part,
        process: &Process,
        lost: impl Fn(String) -> E,
        call: impl Future<Output = Result<T, E>>,
    ) -> Result<T, E> {
        self.maybe_crash(process).await;
        let rates = self.parts[part as usize];
        if self.is_away(part) {
            // Some calls are refused, others hear nothing for a while.
            wait(Duration::from_millis(fastrand::u64(0..1_000) * fastrand::u64(0..3))).await;
            process.is_alive().await;
            return Err(lost("the simulation took it away".to_owned()));
        }
        if self.happens(rates.before, part.faults()) {
            return Err(lost("the simulation cut the connection before the call".to_owned()));
        }
        let answer = call.await;
        // The other services get their turn between any two calls.
        for _ in 0..fastrand::u32(0..3) {
            tokio::task::yield_now().await;
        }
        self.maybe_crash(process).await;
        if self.happens(rates.after, part.faults()) {
            return Err(lost("the simulation cut the connection after the call".to_owned()));
        }
        answer
    }
}
