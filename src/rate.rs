//! How often something may happen: at most so many times in any interval. Pure.

use std::time::Duration;

use crate::clock::Timestamp;

/// At most `count` in any `interval`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Rate {
    /// At least 1.
    pub count: usize,
    pub interval: Duration,
}

impl Rate {
    /// The interval that a rate has unless another is named.
    pub const INTERVAL: Duration = Duration::from_secs(1);

    /// How late an attempt may begin after the time that is reserved for it. So much longer than the interval `count`
    /// reserved times take, hence no interval has more than `count` attempts however late some of them are: at 100 a second
    /// this costs 3 % of the rate. A busy machine wakes a task some milliseconds late.
    pub const LATE: Duration = Duration::from_millis(30);

    /// What a store has written down: a count, and an interval in milliseconds.
    pub(crate) fn of(count: i64, ms: i64) -> Rate {
        Rate {
            count: usize::try_from(count).unwrap_or(0).max(1),
            interval: Duration::from_millis(ms.unsigned_abs()),
        }
    }

    /// What a store writes down.
    pub(crate) fn numbers(self) -> (i64, i64) {
        (
            i64::try_from(self.count).unwrap_or(i64::MAX),
            i64::try_from(self.interval.as_millis()).unwrap_or(i64::MAX),
        )
    }

    /// What a store writes down of an endpoint's rate: without one an interval stands there, too.
    pub(crate) fn columns(rate: Option<Rate>) -> (Option<i64>, i64) {
        let (count, ms) = rate.unwrap_or(Rate { count: 0, interval: Rate::INTERVAL }).numbers();
        (rate.map(|_| count), ms)
    }

    /// From one reserved time to the `nth` after it.
    fn distance(self, nth: usize) -> Duration {
        let all = self.interval.saturating_add(Rate::LATE).as_micros();
        let micros = all.saturating_mul(nth as u128) / self.count.max(1) as u128;
        Duration::from_micros(u64::try_from(micros).unwrap_or(u64::MAX))
    }

    /// Times that may be reserved between `from` and `until`, the first of them not before `next`.
    pub fn reservable(self, next: Option<Timestamp>, from: Timestamp, until: Timestamp) -> Reservable {
        // A later one was written by a clock that was wrong, or for a rate that was lower.
        let latest = until.after(self.distance(1));
        let first = next.filter(|next| *next <= latest).map_or(from, |next| next.max(from));
        let count = (0..RESERVED_MAX).take_while(|nth| first.after(self.distance(*nth)) <= until).count();
        Reservable { rate: self, first, count }
    }
}

/// Times that are reserved at once, at most: for half a second of 4,000 a second.
const RESERVED_MAX: usize = 2_000;

/// Times that may be reserved, one after the other.
#[derive(Clone, Copy, Debug)]
pub struct Reservable {
    rate: Rate,
    first: Timestamp,
    /// How many.
    pub count: usize,
}

impl Reservable {
    /// The times of the first `used` ones.
    pub fn times(self, used: usize) -> Vec<Timestamp> {
        (0..used.min(self.count)).map(|nth| self.after(nth)).collect()
    }

    /// When the next may come, after so many.
    pub fn after(self, used: usize) -> Timestamp {
        self.first.after(self.rate.distance(used))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const NOW: Timestamp = Timestamp::EPOCH;

    fn ms(ms: u64) -> Timestamp {
        NOW.after(Duration::from_millis(ms))
    }

    fn rate(count: usize, ms: u64) -> Rate {
        Rate { count, interval: Duration::from_millis(ms) }
    }

    #[test]
    fn times_are_even_and_follow_on_the_last() {
        let all = rate(10, 970).reservable(None, ms(500), ms(800));
        assert_eq!(all.times(9), [ms(500), ms(600), ms(700), ms(800)]);
        assert_eq!((all.times(2), all.after(2)), (vec![ms(500), ms(600)], ms(700)));
        assert_eq!(rate(10, 970).reservable(Some(ms(750)), ms(600), ms(800)).times(9), [ms(750)]);
        assert_eq!(rate(10, 970).reservable(Some(ms(50)), ms(600), ms(700)).times(9), [ms(600), ms(700)]);
        assert_eq!(rate(10, 970).reservable(Some(ms(850)), ms(600), ms(800)).count, 0);
    }

    #[test]
    fn a_time_far_ahead_was_written_by_mistake() {
        assert_eq!(rate(10, 970).reservable(Some(ms(901)), ms(600), ms(800)).times(1), [ms(600)]);
        assert_eq!(rate(1, 86_400_000).reservable(Some(ms(86_000_000)), ms(600), ms(800)).count, 0);
        assert_eq!(rate(1_000_000, 1_000).reservable(None, ms(0), ms(500)).count, RESERVED_MAX);
        assert_eq!(Rate::of(0, -5), rate(1, 5));
        assert_eq!(Rate::of(7, 1_500).numbers(), (7, 1_500));
        assert_eq!(Rate::columns(Some(rate(7, 1_500))), (Some(7), 1_500));
        assert_eq!(Rate::columns(None), (None, 1_000));
    }

    proptest! {
        /// However many are used at each look, and however late each begins.
        #[test]
        fn no_interval_has_more_than_the_count(
            looks in prop::collection::vec((0_u64..400, 0_usize..40), 1..100),
            late in prop::collection::vec(0_u64..30, 1..50),
            count in 1_usize..30,
        ) {
            let (rate, mut now, mut next, mut begun) = (rate(count, 1_000), 0, None, Vec::new());
            for (pause, wanted) in looks {
                now += pause;
                let all = rate.reservable(next, ms(now), ms(now + 300));
                let times = all.times(wanted);
                next = Some(all.after(times.len()));
                begun.extend(times);
            }
            let mut late = late.iter().cycle();
            let mut begun: Vec<_> =
                begun.into_iter().map(|at| at.after(Duration::from_millis(*late.next().unwrap()))).collect();
            begun.sort();
            for most in begun.windows(count + 1) {
                prop_assert!(most[count].since(most[0]) >= Duration::from_secs(1));
            }
        }
    }
}
