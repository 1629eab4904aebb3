//! How many first tries may still start in this interval. Pure.

use std::time::Duration;

use crate::clock::Instant;
use crate::store::Pacing;

/// Counts what an interval has used. Windows follow one another on a fixed grid, so a late look does
/// not shift the later ones.
#[derive(Debug)]
pub(super) struct Pacer {
    pacing: Pacing,
    /// When the present window ends; nothing is known before the first.
    ends: Instant,
    used: usize,
}

impl Pacer {
    pub(super) fn new(pacing: Pacing) -> Pacer {
        Pacer { pacing, ends: Instant::START, used: 0 }
    }

    /// Takes over from a predecessor: the window that it had opened, of which so much is left, counts as used up. No
    /// window is longer than the interval, whatever a clock that was wrong has written down.
    pub(super) fn inherit(&mut self, left: Duration, now: Instant) {
        if left > Duration::ZERO {
            self.ends = now.after(left.min(self.pacing.interval));
            self.used = self.pacing.count;
        }
    }

    /// How many first tries may start now.
    pub(super) fn allowance(&self, now: Instant) -> usize {
        if self.opens_window(now) { self.pacing.count } else { self.pacing.count - self.used }
    }

    /// Whether a claim now would be the first of a new window.
    pub(super) fn opens_window(&self, now: Instant) -> bool {
        now >= self.ends
    }

    /// When a window opened now would end.
    pub(super) fn window_end(&self, now: Instant) -> Instant {
        let late = now.since(self.ends);
        let on_grid = self.ends.after(self.pacing.interval);
        if late < self.pacing.interval { on_grid } else { now.after(self.pacing.interval) }
    }

    /// Opens a window.
    pub(super) fn open_window(&mut self, now: Instant) {
        self.ends = self.window_end(now);
        self.used = 0;
    }

    /// Notes that `count` first tries started.
    pub(super) fn used(&mut self, count: usize) {
        self.used = (self.used + count).min(self.pacing.count);
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
        Pacer::new(Pacing { count: 100, interval: Duration::from_secs(1) })
    }

    /// Takes all that is allowed at `ms`; returns how many.
    fn take(pacer: &mut Pacer, ms: u64) -> usize {
        let allowed = pacer.allowance(at(ms));
        if allowed > 0 && pacer.opens_window(at(ms)) {
            pacer.open_window(at(ms));
        }
        pacer.used(allowed);
        allowed
    }

    #[test]
    fn a_late_look_does_not_shift_the_grid() {
        let mut pacer = pacer();
        let taken: Vec<_> = [0, 500, 1_040, 2_010, 2_999, 3_000].map(|ms| take(&mut pacer, ms)).into();
        assert_eq!(taken, [100, 0, 100, 100, 0, 100]);
    }

    #[test]
    fn a_successor_waits_for_its_predecessors_window() {
        let mut pacer = pacer();
        pacer.inherit(Duration::from_millis(200), at(500));
        assert_eq!((take(&mut pacer, 600), take(&mut pacer, 700)), (0, 100));
        pacer.inherit(Duration::from_secs(3_600), at(800));
        assert_eq!((take(&mut pacer, 1_799), take(&mut pacer, 1_800)), (0, 100));
        let mut first = super::Pacer::new(Pacing { count: 3, interval: Duration::from_secs(60) });
        first.inherit(Duration::ZERO, at(0));
        assert_eq!(take(&mut first, 0), 3);
    }

    proptest! {
        #[test]
        fn no_stretch_of_time_gets_more_than_its_windows(steps in prop::collection::vec(0..400_u64, 1..200)) {
            let (mut pacer, mut now, mut total) = (pacer(), 0, 0);
            for step in steps {
                now += step;
                total += take(&mut pacer, now);
                prop_assert!(total <= 100 * (usize::try_from(now).unwrap() / 1000 + 1));
            }
        }
    }
}
