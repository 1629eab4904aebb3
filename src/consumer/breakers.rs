//! The breakers of one consumer's endpoints: what they allow, what the attempts here say of them, and how all consumers
//! come to know it.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use super::call::{Call, under_way};
use crate::breaker::{self, Breaker, Evidence, Failures};
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
    state: State,
    /// Until then it is as was found out here, whatever the directory says. `None`: that has still to be written.
    ours_until: Option<Instant>,
    /// When the right to probe may be asked for again.
    next_probe: Instant,
}

enum State {
    /// Open until that moment, and half-open after it.
    Tripped {
        breaker: Breaker,
        open_until: Instant,
    },
    Closed {
        at: Instant,
    },
}

/// What a breaker allows now.
enum Allowed {
    Nothing,
    /// One attempt at a time.
    Probe,
    /// So many attempts in flight.
    Slots(u32),
}

impl State {
    fn tripped(breaker: Breaker, now: Now) -> State {
        let left = if breaker.is_open(now.time) { breaker.until.since(now.time) } else { Duration::ZERO };
        State::Tripped { breaker, open_until: now.instant.after(left) }
    }
}

impl Known {
    fn new(state: State, ours_until: Option<Instant>) -> Known {
        Known { state, ours_until, next_probe: Instant::START }
    }

    fn is_ours(&self, now: Instant) -> bool {
        self.ours_until.is_none_or(|until| now < until)
    }

    fn breaker(&self) -> Option<&Breaker> {
        match &self.state {
            State::Tripped { breaker, .. } => Some(breaker),
            State::Closed { .. } => None,
        }
    }

    fn allowed(&self, in_flight_max: u32, now: Instant) -> Allowed {
        match self.state {
            State::Tripped { open_until, .. } if now < open_until => Allowed::Nothing,
            State::Tripped { .. } => Allowed::Probe,
            State::Closed { at } => {
                Allowed::Slots(breaker::ramp(now.since(at), in_flight_max).unwrap_or(in_flight_max))
            }
        }
    }
}

impl Breakers {
    /// As [`Limits::admit`], within what the endpoint's breaker allows.
    pub(super) fn admit(&self, endpoint: &Endpoint, limits: &mut Limits, now: Instant) -> Admission {
        match self.allowed(endpoint, now) {
            Allowed::Nothing => Admission::Hold,
            Allowed::Probe if limits.is_here(&endpoint.name) => Admission::Hold,
            Allowed::Probe => limits.admit(&endpoint.name, 1, now),
            Allowed::Slots(slots) => limits.admit(&endpoint.name, slots, now),
        }
    }

    /// As [`Limits::available`], within what the endpoint's breaker allows.
    pub(super) fn available(&self, endpoint: &Endpoint, limits: &Limits, now: Instant) -> usize {
        let may_ask = || self.known(&endpoint.name).is_some_and(|known| now >= known.next_probe);
        match self.allowed(endpoint, now) {
            Allowed::Nothing => 0,
            Allowed::Probe => usize::from(may_ask() && !limits.is_here(&endpoint.name)),
            Allowed::Slots(slots) => limits.available(&endpoint.name, slots, now),
        }
    }

    /// As [`Limits::slots`], within what the endpoint's breaker allows.
    pub(super) fn slots(&self, endpoint: &Endpoint, limits: &Limits, now: Instant) -> usize {
        match self.allowed(endpoint, now) {
            Allowed::Nothing => 0,
            Allowed::Probe => 1,
            Allowed::Slots(slots) => limits.slots(&endpoint.name, slots),
        }
    }

    /// As [`Limits::start`], within what the endpoint's breaker allows.
    pub(super) fn start(&self, endpoint: &Endpoint, limits: &mut Limits, now: Instant) -> bool {
        match self.allowed(endpoint, now) {
            Allowed::Nothing => false,
            Allowed::Probe => limits.start(&endpoint.name, 1, now),
            Allowed::Slots(slots) => limits.start(&endpoint.name, slots, now),
        }
    }

    /// Whether the endpoint's breaker is open.
    pub(super) fn is_open(&self, endpoint: &Endpoint, now: Instant) -> bool {
        matches!(self.allowed(endpoint, now), Allowed::Nothing)
    }

    /// Whether the endpoint's breaker is not closed, or has been closed lately.
    pub(super) fn is_known(&self, endpoint: &str) -> bool {
        self.known(endpoint).is_some()
    }

    /// Whether the endpoint's breaker is closed: neither open nor half-open.
    pub(super) fn is_closed(&self, endpoint: &str) -> bool {
        self.breaker(endpoint).is_none()
    }

    fn allowed(&self, endpoint: &Endpoint, now: Instant) -> Allowed {
        match self.known(&endpoint.name) {
            None => Allowed::Slots(endpoint.in_flight_max),
            Some(known) => known.allowed(endpoint.in_flight_max, now),
        }
    }

    fn known(&self, endpoint: &str) -> Option<&Known> {
        // Asked for each message, and mostly there are none.
        if self.known.is_empty() { None } else { self.known.get(endpoint) }
    }

    fn breaker(&self, endpoint: &str) -> Option<&Breaker> {
        self.known(endpoint).and_then(Known::breaker)
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
            let is_probe = |known: &&mut Known| matches!(known.allowed(0, now.instant), Allowed::Probe);
            let Some(known) = self.known.get_mut(name).filter(is_probe) else { continue };
            known.next_probe = now.instant.after(PROBE_ASK);
            let timeout = directory.endpoints.get(name).map_or(Duration::ZERO, |endpoint| endpoint.timeout);
            probes.push((name.clone(), now.time.after(timeout + PROBE_LOST)));
        }
        probes
    }

    /// Notes what came of an attempt: the endpoint's breaker may open or close by it.
    pub(super) fn note(&mut self, endpoint: &Endpoint, outcome: &Outcome, now: Now) {
        let name = endpoint.name.as_str();
        match Evidence::of(outcome, &endpoint.final_statuses) {
            Evidence::Nothing => {}
            Evidence::Success => {
                if !self.failures.is_empty() {
                    self.failures.remove(name);
                }
                if self.breaker(name).is_some() {
                    self.close(name, now.instant);
                }
            }
            Evidence::Failure => {
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

    fn close(&mut self, name: &str, now: Instant) {
        tracing::info!(endpoint = name, "endpoint {name} works again; its attempts in flight grow by and by");
        self.known.insert(name.to_owned(), Known::new(State::Closed { at: now }, None));
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
        self.known.insert(name.to_owned(), Known::new(State::tripped(opened, now), ours_until));
    }

    /// Learns what other consumers have found out, and forgets endpoints that have all of their window again.
    pub(super) fn learn(&mut self, directory: &Snapshot, now: Now) {
        for (name, breaker) in &directory.breakers {
            let state = State::tripped(breaker.clone(), now);
            match self.known.get_mut(name) {
                Some(known) if known.is_ours(now.instant) => {}
                Some(known) => known.state = state,
                None => drop(self.known.insert(name.clone(), Known::new(state, Some(Instant::START)))),
            }
        }
        self.known.retain(|name, known| {
            if known.is_ours(now.instant) || directory.breakers.contains_key(name) {
                return true;
            }
            let at = match known.state {
                State::Tripped { .. } => now.instant,
                State::Closed { at } => at,
            };
            known.state = State::Closed { at };
            let most = directory.endpoints.get(name).map_or(0, |endpoint| endpoint.in_flight_max);
            breaker::ramp(now.instant.since(at), most).is_some()
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
