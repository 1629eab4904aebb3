//! Saturated endpoints, whose deliveries are held: which they are, who is told, and how many deliveries are made due at a time.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use super::begin::BATCH;
use super::breakers::Breakers;
use super::call::{Call, under_way};
use crate::clock::{Clock, Instant, Timestamp};
use crate::delivery::limits::Limits;
use crate::message::Held;
use crate::service::{Context, Snapshot};
use crate::store::{InstanceId, StoreError, Unhold};

/// How often the store is asked which endpoints have held deliveries that we don't know of.
const HELD: Duration = Duration::from_secs(1);

/// How long an endpoint counts as saturated after it was last seen to be slow: one that hangs answers nothing
/// for the whole of its deadline, then all of its attempts end at once.
const SLOW_FOR: Duration = Duration::from_millis(300);

/// Endpoints that are reported, at most.
const REPORTED_MAX: usize = 10_000;

/// After this, deliveries that were made due and did not come here are believed to have gone to another consumer.
const EXPECTED: Duration = Duration::from_secs(2);
/// So many held deliveries are made due at first; one more for each that comes. Those of another lane never come here:
/// its own consumer knows whether it has room for them.
const TRIAL: usize = 256;
/// Fewer are not worth a write while an endpoint has room for more.
const LEAST: usize = 32;

/// Which endpoints an instance has reported.
type Report = (InstanceId, Vec<String>);

/// What a call to free held deliveries came to: which endpoints have such deliveries, and how many were made due.
#[derive(Default)]
struct Freed {
    found: Vec<String>,
    freed: Vec<(Unhold, usize)>,
}

/// Endpoints with deliveries held because they were saturated.
#[derive(Default)]
pub(super) struct Saturated {
    endpoints: BTreeMap<String, Saturation>,
    /// The failing endpoint for which deliveries were freed last: the others come before it.
    last_failing: String,
    freeing: Option<Call<Freed>>,
    /// When the store is asked for further ones.
    look_at: Instant,
    reporting: Option<Call<Option<Report>>>,
    /// What was reported last, and by whom.
    reported: Option<Report>,
}

impl Saturated {
    /// Waits until one of the calls under way has come back, and notes what it came to.
    pub(super) async fn progress(&mut self, clock: &Clock) {
        tokio::select! {
            biased;
            freed = under_way(&mut self.freeing) => self.freed(freed, clock.instant()),
            report = under_way(&mut self.reporting) => {
                self.reporting = None;
                self.reported = report.or(self.reported.take());
            }
        }
    }

    /// Notes that a ticket came.
    pub(super) fn came(&mut self, endpoint: &str) {
        if let Some(saturation) = self.endpoints.get_mut(endpoint) {
            saturation.came();
        }
    }

    /// Notes that a ticket was refused. Whether its endpoint has just become saturated.
    pub(super) fn refused(&mut self, endpoint: &str, now: Instant) -> bool {
        if let Some(saturation) = self.endpoints.get_mut(endpoint) {
            saturation.slow_at = now;
            return false;
        }
        self.endpoints.insert(endpoint.to_owned(), Saturation::new(now, now));
        true
    }

    /// Reports which endpoints are saturated, when that has changed.
    pub(super) fn report(&mut self, context: &Context, now: Instant) {
        let Some(instance) = context.presence.instance() else { return };
        if self.reporting.is_some() {
            return;
        }
        let slow = self.endpoints.iter().filter(|(_, saturation)| now.since(saturation.slow_at) < SLOW_FOR);
        let report = (instance, slow.map(|(name, _)| name.clone()).take(REPORTED_MAX).collect::<Vec<_>>());
        if self.reported.as_ref() == Some(&report) || self.reported.is_none() && report.1.is_empty() {
            return;
        }
        let store = Arc::clone(&context.store);
        self.reporting = Some(Box::pin(async move {
            // It is a hint: without it the deliveries come here and are held then. The next tick reports again.
            let reported = store.report_saturated(report.0, &report.1).await;
            reported
                .inspect_err(|error| tracing::debug!("saturated endpoints could not be reported: {error}"))
                .ok()?;
            Some(report)
        }));
    }

    /// Whether held deliveries are just being freed.
    pub(super) fn is_freeing(&self) -> bool {
        self.freeing.is_some()
    }

    /// How many held deliveries of which endpoints there is room for. Those that fail have theirs in turn.
    pub(super) fn wanted(
        &mut self,
        directory: &Snapshot,
        breakers: &Breakers,
        limits: &Limits,
        now: Instant,
    ) -> Vec<Unhold> {
        let mut for_failing = limits.free_for_failing();
        let mut wanted = Vec::new();
        let last_failing = self.last_failing.clone();
        let (before, after) =
            self.endpoints.iter_mut().partition::<Vec<_>, _>(|(name, _)| **name <= last_failing);
        for (name, saturation) in after.into_iter().chain(before) {
            let Some(endpoint) = directory.enabled_endpoint(name) else {
                continue;
            };
            if limits.is_slow(name, endpoint.in_flight_max, now) || !breakers.is_closed(name) {
                saturation.slow_at = now;
            }
            let available = breakers.available(endpoint, limits, now);
            let fails = limits.is_failing(name);
            let available = if fails { available.min(for_failing) } else { available };
            let limit = saturation.wanted(available, now);
            // Not one by one, if more can follow: a write for each delivery that ends would cost what holding saves.
            let least = (breakers.slots(endpoint, limits, now) / 2).clamp(1, LEAST);
            if limit >= least {
                wanted.push(Unhold { endpoint: name.clone(), limit });
                if fails {
                    for_failing -= limit;
                    self.last_failing.clone_from(name);
                }
            }
        }
        wanted
    }

    /// Frees these deliveries, where they are `probes` with the right to them, and looks for further endpoints when it is
    /// time for that.
    pub(super) fn free(
        &mut self,
        context: &Context,
        wanted: Vec<Unhold>,
        probes: Vec<(String, Timestamp)>,
        now: Instant,
    ) {
        let look = now >= self.look_at;
        if look {
            self.look_at = now.after(HELD);
        }
        if look || !wanted.is_empty() {
            self.freeing = Some(Box::pin(free(context.clone(), wanted, probes, look)));
        }
    }

    fn freed(&mut self, freed: Freed, now: Instant) {
        self.freeing = None;
        for (wanted, got) in freed.freed {
            if got < wanted.limit {
                self.endpoints.remove(&wanted.endpoint);
            } else if let Some(saturation) = self.endpoints.get_mut(&wanted.endpoint) {
                saturation.expected += got;
                saturation.since = now;
            }
        }
        for name in freed.found {
            self.endpoints.entry(name).or_insert(Saturation::new(now, Instant::START));
        }
    }
}

async fn free(
    context: Context,
    mut wanted: Vec<Unhold>,
    probes: Vec<(String, Timestamp)>,
    look: bool,
) -> Freed {
    let mut freed = Freed::default();
    let now = context.clock.now();
    if !probes.is_empty() {
        let won = context.store.probe(&probes, now).await;
        let failed = |error: &StoreError| tracing::debug!("the right to probe could not be had: {error}");
        let won = won.inspect_err(failed).unwrap_or_default();
        let is_lost =
            |endpoint: &String| probes.iter().any(|(probe, _)| probe == endpoint) && !won.contains(endpoint);
        wanted.retain(|wanted| !is_lost(&wanted.endpoint));
    }
    if !wanted.is_empty() {
        let watch = context.clock.stopwatch();
        match context.store.unhold(&wanted, Held::EndpointBusy, now).await {
            Ok(got) => {
                let got = got.into_iter().map(|got| usize::try_from(got).unwrap_or(usize::MAX));
                freed.freed.extend(wanted.into_iter().zip(got));
                let rows = freed.freed.iter().map(|(_, got)| got).sum();
                context.metrics.batch("unhold", rows, watch.elapsed());
            }
            // The next tick tries again.
            Err(error) => tracing::debug!("held deliveries could not be freed: {error}"),
        }
    }
    if look {
        match context.store.held().await {
            Ok(held) => {
                freed.found.extend(held.into_iter().filter(|h| h.1 == Held::EndpointBusy).map(|h| h.0))
            }
            Err(error) => tracing::debug!("held deliveries could not be looked for: {error}"),
        }
    }
    freed
}

/// One endpoint.
#[derive(Debug)]
struct Saturation {
    /// Rows made due that have not come back as tickets.
    expected: usize,
    since: Instant,
    /// How many of those there may be.
    trial: usize,
    /// When it was last seen to be slow.
    slow_at: Instant,
}

impl Saturation {
    fn new(now: Instant, slow_at: Instant) -> Saturation {
        Saturation { expected: 0, since: now, trial: TRIAL, slow_at }
    }

    /// Notes that a ticket came.
    fn came(&mut self) {
        if self.expected > 0 {
            self.expected -= 1;
            self.trial = (self.trial + 1).min(BATCH);
        }
    }

    /// Rows to make due now, when there is room for this many more.
    fn wanted(&mut self, available: usize, now: Instant) -> usize {
        if self.expected > 0 && now.since(self.since) > EXPECTED {
            self.expected = 0;
            self.trial = TRIAL;
        }
        available.min(self.trial).saturating_sub(self.expected)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_that_never_come_are_made_due_a_few_at_a_time() {
        let start = Instant::START.after(EXPECTED);
        let mut busy = Saturation::new(start, start);
        assert_eq!((busy.wanted(10, start), busy.wanted(10_000, start)), (10, TRIAL));
        // All of them come, round by round.
        for _ in 0..2 {
            busy.expected = busy.wanted(10_000, start);
            (0..busy.expected).for_each(|_| busy.came());
        }
        assert_eq!((busy.expected, busy.wanted(10_000, start)), (0, TRIAL * 4));
        // Tickets that were not made due by us tell nothing.
        busy.came();
        assert_eq!(busy.wanted(10_000, start), TRIAL * 4);
        // None comes any more.
        busy.expected = TRIAL * 4;
        assert_eq!(busy.wanted(10_000, start.after(EXPECTED)), 0);
        assert_eq!(busy.wanted(10_000, start.after(EXPECTED * 2)), TRIAL);
    }
}
