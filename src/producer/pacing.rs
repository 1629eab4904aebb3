//! How many first tries may start now: no interval has more than the count, wherever it begins. Pure.

use std::collections::VecDeque;
use std::time::Duration;

use crate::clock::Instant;
use crate::rate::Rate;

/// Remembers the claims of the last interval.
#[derive(Debug)]
pub(super) struct Pacer {
    rate: Rate,
    /// When, and how many first tries each was of.
    claims: VecDeque<(Instant, usize)>,
    /// Until then the claims of a predecessor may count: it had as many as it may.
    inherited_until: Instant,
    /// A successor waits until then, by what the store says.
    written_until: Instant,
}

impl Pacer {
    pub(super) fn new(rate: Rate) -> Pacer {
        let (inherited_until, written_until) = (Instant::START, Instant::START);
        Pacer { rate, claims: VecDeque::new(), inherited_until, written_until }
    }

    /// Takes over from a predecessor, of whose claims the last may count for so long. Not for longer than it may have
    /// written down, whatever a clock that was wrong has.
    pub(super) fn inherit(&mut self, left: Duration, now: Instant) {
        self.inherited_until = now.after(left.min(self.written_ahead()));
    }

    /// How many first tries may start now.
    pub(super) fn allowance(&mut self, now: Instant) -> usize {
        while self.claims.front().is_some_and(|(at, _)| now.since(*at) >= self.rate.interval) {
            self.claims.pop_front();
        }
        let used: usize = self.claims.iter().map(|(_, count)| count).sum();
        if now < self.inherited_until { 0 } else { self.rate.count.saturating_sub(used) }
    }

    /// For how long nothing may start, if the count is used up.
    pub(super) fn used_up_for(&mut self, now: Instant) -> Option<Duration> {
        if self.allowance(now) > 0 {
            return None;
        }
        let oldest = self.claims.front().map(|(at, _)| at.after(self.rate.interval));
        oldest.map(|frees| frees.max(self.inherited_until).since(now))
    }

    /// Until when a successor has to wait after a claim now, if that does not stand in the store yet. So far ahead that it
    /// is written once in an interval.
    pub(super) fn to_write(&self, now: Instant) -> Option<Instant> {
        let counts_until = now.after(self.rate.interval);
        (self.written_until < counts_until).then(|| now.after(self.written_ahead()))
    }

    fn written_ahead(&self) -> Duration {
        self.rate.interval.saturating_mul(2)
    }

    /// Notes that this stands in the store now.
    pub(super) fn written(&mut self, until: Instant) {
        self.written_until = until;
    }

    /// Notes that `count` first tries started.
    pub(super) fn used(&mut self, count: usize, now: Instant) {
        if count > 0 {
            self.claims.push_back((now, count));
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn at(ms: u64) -> Instant {
        Instant::START.after(Duration::from_secs(60) + Duration::from_millis(ms))
    }

    fn pacer() -> Pacer {
        Pacer::new(Rate { count: 100, interval: Duration::from_secs(1) })
    }

    /// Takes at most so many at `ms`; returns how many it got.
    fn take(pacer: &mut Pacer, most: usize, ms: u64) -> usize {
        let allowed = pacer.allowance(at(ms)).min(most);
        pacer.used(allowed, at(ms));
        allowed
    }

    #[test]
    fn what_was_used_late_counts_for_a_whole_interval() {
        let mut pacer = pacer();
        let asked = [(60, 0), (60, 900), (60, 999), (60, 1_000), (60, 1_000), (60, 1_900), (60, 2_000)];
        let taken: Vec<_> = asked.map(|(most, ms)| take(&mut pacer, most, ms)).into();
        assert_eq!(taken, [60, 40, 0, 60, 0, 40, 60]);
        assert_eq!(pacer.used_up_for(at(2_100)), Some(Duration::from_millis(800)));
        assert_eq!(pacer.used_up_for(at(2_900)), None);
    }

    #[test]
    fn a_successor_waits_for_what_its_predecessor_may_have_used() {
        let mut pacer = pacer();
        pacer.inherit(Duration::from_millis(200), at(500));
        assert_eq!((take(&mut pacer, 500, 699), take(&mut pacer, 500, 700)), (0, 100));
        pacer.inherit(Duration::from_secs(3_600), at(800));
        assert_eq!((take(&mut pacer, 500, 2_799), take(&mut pacer, 500, 2_800)), (0, 100));
        let mut first = Pacer::new(Rate { count: 3, interval: Duration::from_secs(60) });
        first.inherit(Duration::ZERO, at(0));
        assert_eq!(take(&mut first, 500, 0), 3);
    }

    #[test]
    fn a_claim_is_written_down_before_it_is_made_and_once_an_interval() {
        let mut pacer = pacer();
        let mut writes = Vec::new();
        for ms in (0..4_000).step_by(250) {
            if let Some(until) = pacer.to_write(at(ms)) {
                assert!(until >= at(ms + 1_000));
                pacer.written(until);
                writes.push(ms);
            }
        }
        assert_eq!(writes, [0, 1_250, 2_500, 3_750]);
    }

    proptest! {
        #[test]
        fn no_interval_has_more_than_the_count(takes in prop::collection::vec((0..400_u64, 0..90_usize), 1..200)) {
            let (mut pacer, mut now, mut all) = (pacer(), 0, Vec::new());
            for (step, most) in takes {
                now += step;
                all.push((now, take(&mut pacer, most, now)));
                let last = all.iter().filter(|(at, _)| now - at < 1_000).map(|(_, count)| count);
                prop_assert!(last.sum::<usize>() <= 100);
            }
        }
    }
}
