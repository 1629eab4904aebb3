//! Figures over rounds: a machine is never quiet, so each is measured several times and told with its spread.

use std::collections::{BTreeMap, BTreeSet};

/// One figure over all rounds.
#[derive(Clone, Copy, Debug, Default, PartialEq)]
pub(super) struct Spread {
    pub(super) median: f64,
    pub(super) low: f64,
    pub(super) high: f64,
}

impl Spread {
    /// The spread of these values; all zero without any.
    pub(super) fn of(values: impl IntoIterator<Item = f64>) -> Spread {
        let mut values: Vec<f64> = values.into_iter().collect();
        values.sort_by(f64::total_cmp);
        let (Some(low), Some(high)) = (values.first().copied(), values.last().copied()) else {
            return Spread::default();
        };
        let (below, above) = (values[(values.len() - 1) / 2], values[values.len() / 2]);
        Spread { median: f64::midpoint(below, above), low, high }
    }

    /// Lowest and highest.
    pub(super) fn range(&self) -> [f64; 2] {
        [self.low, self.high]
    }

    /// Whether the highest is at most by this share above the lowest.
    pub(super) fn is_within(&self, share: f64) -> bool {
        self.high <= self.low * (1.0 + share)
    }
}

/// The median of each named figure over all rounds; where a round lacks one, it counts as zero.
pub(super) fn medians<'a, K: Clone + Ord + 'a>(
    rounds: impl IntoIterator<Item = &'a BTreeMap<K, f64>>,
) -> BTreeMap<K, f64> {
    let rounds: Vec<_> = rounds.into_iter().collect();
    let names: BTreeSet<&K> = rounds.iter().flat_map(|round| round.keys()).collect();
    let median = |name| Spread::of(rounds.iter().map(|round| round.get(name).copied().unwrap_or(0.0))).median;
    names.into_iter().map(|name| (name.clone(), median(name))).collect()
}

/// A distribution of times, in milliseconds.
#[derive(Clone, Copy, Debug, Default, PartialEq, serde::Serialize)]
pub struct Latency {
    pub p50: f64,
    pub p99: f64,
    pub max: f64,
}

impl Latency {
    /// Of times in µs, sorted.
    pub(super) fn of_sorted(us: &[i64]) -> Latency {
        let at = |share: f64| {
            let index = us.len().saturating_sub(1) as f64 * share;
            us.get(index as usize).map_or(0.0, |us| *us as f64 / 1_000.0)
        };
        Latency { p50: at(0.5), p99: at(0.99), max: at(1.0) }
    }

    /// The median of each number.
    pub(super) fn median(all: &[Latency]) -> Latency {
        let of = |number: fn(&Latency) -> f64| Spread::of(all.iter().map(number)).median;
        Latency { p50: of(|l| l.p50), p99: of(|l| l.p99), max: of(|l| l.max) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_spread_is_the_middle_and_both_ends() {
        assert_eq!(Spread::of([]), Spread::default());
        assert_eq!(Spread::of([3.0, 1.0, 2.0]), Spread { median: 2.0, low: 1.0, high: 3.0 });
        assert_eq!(Spread::of([4.0, 1.0, 2.0, 3.0]).median, 2.5);
        let spread = Spread::of([100.0, 109.0]);
        assert!(spread.is_within(0.10) && !spread.is_within(0.05));
    }

    #[test]
    fn medians_are_taken_name_by_name() {
        let round = |a, b| BTreeMap::from([("a", a), ("b", b)]);
        let rounds = [round(1.0, 9.0), round(2.0, 7.0), BTreeMap::from([("a", 3.0)])];
        assert_eq!(medians(&rounds), BTreeMap::from([("a", 2.0), ("b", 7.0)]));
    }

    #[test]
    fn a_latency_is_told_in_milliseconds() {
        let us: Vec<i64> = (1..=1_000).map(|i| i * 1_000).collect();
        assert_eq!(Latency::of_sorted(&us), Latency { p50: 500.0, p99: 990.0, max: 1_000.0 });
        assert_eq!(Latency::of_sorted(&[]), Latency::default());
        let all = [1.0, 5.0, 2.0].map(|p50| Latency { p50, p99: p50 * 2.0, max: p50 * 3.0 });
        assert_eq!(Latency::median(&all), all[2]);
    }
}
