//! In which order the classes of priority are claimed. Pure.

use std::collections::BTreeMap;

use crate::store::Urgency;

/// Full claims of other classes that a class lets pass, at most: so each keeps a quarter of the claims, however many more
/// urgent messages there are. (With strict priorities a flood of urgent ones would stop all others for as long.)
const PASSED_MAX: u32 = 3;

/// How often each class was passed over since it was asked.
#[derive(Debug, Default)]
pub(super) struct Turns {
    passed: BTreeMap<Urgency, u32>,
}

impl Turns {
    /// The classes in the order in which they are asked: first those that were passed over so often, then the most urgent.
    pub(super) fn order(&self) -> Vec<Urgency> {
        let waits = |urgency: &Urgency| self.passed.get(urgency).is_some_and(|passed| *passed >= PASSED_MAX);
        let (first, then): (Vec<_>, Vec<_>) = Urgency::ALL.into_iter().partition(waits);
        first.into_iter().chain(then).collect()
    }

    /// Notes which classes of the order were asked: all up to the first full claim.
    pub(super) fn asked(&mut self, order: &[Urgency], asked: usize) {
        for (nth, urgency) in order.iter().enumerate() {
            let passed = self.passed.entry(*urgency).or_default();
            *passed = if nth < asked { 0 } else { *passed + 1 };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// How many of 120 claims each class gets, when these always have more.
    fn shares(floods: &[Urgency]) -> [usize; 3] {
        let (mut turns, mut claims) = (Turns::default(), [0; 3]);
        for _ in 0..120 {
            let order = turns.order();
            let full = order.iter().position(|urgency| floods.contains(urgency)).unwrap();
            claims[order[full] as usize] += 1;
            turns.asked(&order, full + 1);
        }
        claims
    }

    #[test]
    fn each_class_keeps_a_quarter_beside_more_urgent_ones() {
        use Urgency::*;
        for (floods, expected) in [
            (vec![Urgent], [120, 0, 0]),
            (vec![Urgent, Bulk], [90, 0, 30]),
            (vec![Normal, Bulk], [0, 90, 30]),
            (vec![Urgent, Normal, Bulk], [61, 30, 29]),
        ] {
            assert_eq!(shares(&floods), expected, "{floods:?}");
        }
        assert_eq!(Turns::default().order(), Urgency::ALL);
    }
}
