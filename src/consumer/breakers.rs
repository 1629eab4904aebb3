//! The breakers of one consumer's endpoints: what they allow, what the attempts here say of them, and how all consumers
//! come to know it.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use super::call::{Call, under_way};
use crate::breaker::{self, Breaker, Failures, Sign};
use crate::clock::{Clock, Instant, Now, Timestamp};
use crate::delivery::limits::{Admission, Limits};
use crate::message::Outcome;
use crate::service::{Context, Snapshot};
use crate::store::{Endpoint, StoreError, Unhold};

/// How long what was found out here is believed rather than the directory, once it stands in the store: by then every
/// directory has been read anew.
const SETTLED: Duration = Duration::from_millis(2_500);

/// How long a write waits after one that failed.
const WRITE_AGAIN: Duration = Duration::from_millis(500);

/// Endpoints whose failures are counted; beyond that, old ones are forgotten, and no further ones counted.
const COUNTED_MAX: usize = 10_000;

/// How often the right to probe an endpoint is asked for: another consumer may have it.
const PROBE_ASK: Duration = Duration::from_secs(1);

/// How long after an endpoint's own deadline a probe is believed to have been lost on its way.
const PROBE_LOST: Duration = Duration::from_secs(5);

/// Changes that one call writes, and which of them were made; `None`: nobody knows.
type Written = (Vec<(String, Option<Breaker>)>, Option<Vec<bool>>);

#[derive(Default)]
pub(super) struct Breakers {
    /// Of endpoints that have failed last.
    failures: HashMap<String, Failures>,
    /// Endpoints whose breakers are not closed, or have been closed lately.
    known: BTreeMap<String, Known>,
    unwritten: BTreeMap<String, Option<Breaker>>,
    writing: Option<Call<Written>>,
    /// When the next write may be made: at once, unless the last has failed.
    write_at: Instant,
}

/// What is known of one breaker.
struct Known {
    /// `None`: it is closed.
    breaker: Option<Breaker>,
    /// When it is no longer open, or has been closed.
    at: Instant,
    /// Until then it is as was found out here, whatever the directory says. `None`: that has still to be written.
    ours_until: Option<Instant>,
    /// When the right to probe may be asked for again.
    next_probe: Instant,
}

impl Known {
    fn new(breaker: Option<Breaker>, at: Instant, ours_until: Option<Instant>) -> Known {
        Known { breaker, at, ours_until, next_probe: Instant::START }
    }

    fn is_ours(&self, now: Instant) -> bool {
        self.ours_until.is_none_or(|until| now < until)
    }

    fn is_half_open(&self, now: Instant) -> bool {
        self.breaker.is_some() && now >= self.at
    }
}

impl Breakers {
    /// As [`Limits::admit`], within what the endpoint's breaker allows.
    pub(super) fn admit(&self, endpoint: &Endpoint, limits: &mut Limits, now: Instant) -> Admission {
        let half_open = self.known(&endpoint.name).is_some_and(|known| known.is_half_open(now));
        match self.allowed(endpoint, now) {
            0 => Admission::Hold,
            _ if half_open && limits.is_here(&endpoint.name) => Admission::Hold,
            allowed => limits.admit(&endpoint.name, allowed, now),
        }
    }

    /// As [`Limits::available`], within what the endpoint's breaker allows.
    pub(super) fn available(&self, endpoint: &Endpoint, limits: &Limits, now: Instant) -> usize {
        match self.known(&endpoint.name) {
            Some(known) if known.is_half_open(now) => {
                usize::from(now >= known.next_probe && !limits.is_here(&endpoint.name))
            }
            _ => match self.allowed(endpoint, now) {
                0 => 0,
                allowed => limits.available(&endpoint.name, allowed, now),
            },
        }
    }

    /// As [`Limits::start`], within what the endpoint's breaker allows.
    pub(super) fn start(&self, endpoint: &Endpoint, limits: &mut Limits, now: Instant) -> bool {
        match self.allowed(endpoint, now) {
            0 => false,
            allowed => limits.start(&endpoint.name, allowed, now),
        }
    }

    /// Whether the endpoint's breaker is open.
    pub(super) fn is_open(&self, endpoint: &str, now: Instant) -> bool {
        self.known(endpoint).is_some_and(|known| known.breaker.is_some() && now < known.at)
    }

    /// Whether the endpoint's breaker is not closed, or has been closed lately.
    pub(super) fn is_known(&self, endpoint: &str) -> bool {
        self.known(endpoint).is_some()
    }

    /// Whether the endpoint's breaker is closed: neither open nor half-open.
    pub(super) fn is_closed(&self, endpoint: &str) -> bool {
        self.known(endpoint).is_none_or(|known| known.breaker.is_none())
    }

    /// Attempts that may be in flight at an endpoint now, as far as its breaker is concerned.
    pub(super) fn allowed(&self, endpoint: &Endpoint, now: Instant) -> u32 {
        match self.known(&endpoint.name) {
            None => endpoint.in_flight_max,
            Some(Known { breaker: Some(_), at, .. }) => u32::from(now >= *at),
            Some(Known { breaker: None, at, .. }) => {
                breaker::ramp(now.since(*at), endpoint.in_flight_max).unwrap_or(endpoint.in_flight_max)
            }
        }
    }

    fn known(&self, endpoint: &str) -> Option<&Known> {
        // Asked for each message, and mostly there are none.
        if self.known.is_empty() { None } else { self.known.get(endpoint) }
    }

    /// The endpoints among these whose deliveries may only be freed with the right to probe, and until when each probe
    /// is believed to be on its way.
    pub(super) fn probes(
        &mut self,
        wanted: &[Unhold],
        directory: &Snapshot,
        now: Now,
    ) -> Vec<(String, Timestamp)> {
        let mut probes = Vec::new();
        for name in wanted.iter().map(|wanted| &wanted.endpoint) {
            let Some(known) = self.known.get_mut(name).filter(|known| known.is_half_open(now.instant)) else {
                continue;
            };
            known.next_probe = now.instant.after(PROBE_ASK);
            let timeout = directory.endpoints.get(name).map_or(Duration::ZERO, |endpoint| endpoint.timeout);
            probes.push((name.clone(), now.time.after(timeout + PROBE_LOST)));
        }
        probes
    }

    /// Notes what came of an attempt: the endpoint's breaker may open or close by it.
    pub(super) fn note(&mut self, endpoint: &Endpoint, outcome: &Outcome, now: Now) {
        let name = endpoint.name.as_str();
        match Sign::of(outcome, &endpoint.final_statuses) {
            Sign::Nothing => {}
            Sign::Works => {
                if !self.failures.is_empty() {
                    self.failures.remove(name);
                }
                if self.breaker(name).is_some() {
                    self.close(name, now.instant);
                }
            }
            Sign::Fails => {
                if self.opens(name, outcome, now) {
                    self.open(name, Breaker::opened(self.breaker(name), outcome, now.time), now);
                }
            }
        }
    }

    /// Whether a failure opens the endpoint's breaker: the last of many, a probe's, or one that asks for a longer pause.
    fn opens(&mut self, name: &str, outcome: &Outcome, now: Now) -> bool {
        let pause = breaker::asked_pause(outcome);
        if let Some(breaker) = self.breaker(name) {
            let longer = |pause| breaker.until < now.time.after(pause);
            return if breaker.is_open(now.time) { pause.is_some_and(longer) } else { true };
        }
        self.failed_for_long(name, now.instant) || pause.is_some()
    }

    /// Counts a failure of an endpoint whose breaker is closed. Whether it is the last of many.
    fn failed_for_long(&mut self, name: &str, now: Instant) -> bool {
        if let Some(failures) = self.failures.get_mut(name) {
            return failures.add(now);
        }
        if self.failures.len() >= COUNTED_MAX {
            self.failures.retain(|_, failures| !failures.is_old(now));
        }
        if self.failures.len() < COUNTED_MAX {
            let mut failures = Failures::none(now);
            failures.add(now);
            self.failures.insert(name.to_owned(), failures);
        }
        false
    }

    fn breaker(&self, name: &str) -> Option<&Breaker> {
        self.known.get(name).and_then(|known| known.breaker.as_ref())
    }

    fn close(&mut self, name: &str, now: Instant) {
        tracing::info!(endpoint = name, "endpoint {name} works again; its attempts in flight grow by and by");
        self.known.insert(name.to_owned(), Known::new(None, now, None));
        self.unwritten.insert(name.to_owned(), None);
    }

    /// Has a breaker opened. The first opening after failures counts only once the store has made it.
    fn open(&mut self, name: &str, opened: Breaker, now: Now) {
        self.failures.remove(name);
        if opened.unless_sent_since().is_none() {
            self.opened(name, opened.clone(), None, now);
        }
        self.unwritten.insert(name.to_owned(), Some(opened));
    }

    fn opened(&mut self, name: &str, opened: Breaker, ours_until: Option<Instant>, now: Now) {
        match opened.openings {
            1 => tracing::warn!(endpoint = name, "{}; its messages are held", opened.explain(name)),
            _ => tracing::debug!(endpoint = name, "{}", opened.explain(name)),
        }
        let at = now.instant.after(opened.until.since(now.time));
        self.known.insert(name.to_owned(), Known::new(Some(opened), at, ours_until));
    }

    /// Learns what other consumers have found out, and forgets endpoints that have all of their window again.
    pub(super) fn learn(&mut self, directory: &Snapshot, now: Now) {
        for (name, breaker) in &directory.breakers {
            let left = if breaker.is_open(now.time) { breaker.until.since(now.time) } else { Duration::ZERO };
            let at = now.instant.after(left);
            match self.known.get_mut(name) {
                Some(known) if known.is_ours(now.instant) => {}
                Some(known) if known.breaker.is_some() => {
                    (known.breaker, known.at) = (Some(breaker.clone()), at);
                }
                _ => {
                    let known = Known::new(Some(breaker.clone()), at, Some(Instant::START));
                    self.known.insert(name.clone(), known);
                }
            }
        }
        self.known.retain(|name, known| {
            if known.is_ours(now.instant) || directory.breakers.contains_key(name) {
                return true;
            }
            if known.breaker.take().is_some() {
                known.at = now.instant;
            }
            let most = directory.endpoints.get(name).map_or(0, |endpoint| endpoint.in_flight_max);
            breaker::ramp(now.instant.since(known.at), most).is_some()
        });
    }

    /// Writes what was found out, unless a call is under way.
    pub(super) fn write(&mut self, context: &Context) {
        if self.writing.is_some() || self.unwritten.is_empty() || context.clock.instant() < self.write_at {
            return;
        }
        let changes: Vec<_> = std::mem::take(&mut self.unwritten).into_iter().collect();
        let store = Arc::clone(&context.store);
        self.writing = Some(Box::pin(async move {
            let written = store.set_breakers(&changes).await;
            let failed = |error: &StoreError| tracing::debug!("breakers could not be written: {error}");
            (changes, written.inspect_err(failed).ok())
        }));
    }

    /// Waits for the call under way, by which breakers may have opened; for ever when there is none.
    pub(super) async fn written(&mut self, clock: &Clock) {
        let (changes, made) = under_way(&mut self.writing).await;
        self.writing = None;
        let now = clock.reading();
        if made.is_none() {
            self.write_at = now.instant.after(WRITE_AGAIN);
        }
        for (nth, (name, change)) in changes.into_iter().enumerate() {
            let settled = Some(now.instant.after(SETTLED));
            let is_first = |breaker: &Breaker| breaker.unless_sent_since().is_some();
            match (made.as_ref().map(|made| made.get(nth) == Some(&true)), change) {
                // Unless a newer change follows.
                (None, change) => drop(self.unwritten.entry(name).or_insert(change)),
                (Some(made), Some(breaker)) if is_first(&breaker) => {
                    if made {
                        self.opened(&name, breaker, settled, now);
                    }
                }
                (Some(_), _) if self.unwritten.contains_key(&name) => {}
                (Some(_), _) => {
                    if let Some(known) = self.known.get_mut(&name) {
                        known.ours_until = settled;
                    }
                }
            }
        }
    }
}
