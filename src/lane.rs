//! Lanes: the topics that tickets travel on, how they follow each other, and how long their waits are.

use std::time::Duration;

use crate::clock::Timestamp;

/// The largest part of a wait that jitter adds, so that messages which failed together do not
/// come back together: a wait of 10 s lasts from 10 to 11 s.
pub const JITTER: f64 = 0.1;

/// A lane as its consumer registered it.
#[derive(Clone, Debug, PartialEq)]
pub struct Lane {
    /// The topic it reads.
    pub topic: String,
    /// The consumer group of the consumer that registered it; see [`LaneGroup`] for all that read it.
    pub group: String,
    /// Where a message goes once this lane's tries are used up.
    pub next: String,
    /// Whether messages come here for their first try, which waits for nothing.
    pub fresh: bool,
    /// Tries in this lane, at least 1.
    pub tries: i32,
    /// The wait before the first try of a retry lane; it doubles with each further try.
    pub interval: Duration,
    /// No wait is longer.
    pub interval_max: Duration,
}

/// A consumer group of a lane, as one of its consumers last said.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct LaneGroup {
    /// The lane it reads.
    pub topic: String,
    /// Its name at the broker.
    pub group: String,
    /// When one of its consumers was last heard of.
    pub seen_at: Timestamp,
}

impl LaneGroup {
    /// The groups of `topic` that are alive: those heard of within `lease` of the one heard of last. When all
    /// are silent, that is those that fell silent last. Empty when none was ever heard of.
    pub fn living<'a>(groups: &'a [LaneGroup], topic: &str, lease: Duration) -> Vec<&'a str> {
        let of_lane = || groups.iter().filter(|group| group.topic == topic);
        let Some(newest) = of_lane().map(|group| group.seen_at).max() else { return Vec::new() };
        let living = of_lane().filter(|group| newest.since(group.seen_at) < lease);
        living.map(|group| group.group.as_str()).collect()
    }
}

impl Lane {
    /// Whether a topic is the end of a chain: nothing is tried there.
    pub fn is_terminal(topic: &str) -> bool {
        topic.ends_with("-dlq")
    }

    /// The wait before the `k`-th try in this lane, from 1, without jitter. On a fresh lane the first
    /// try waits for nothing and the second waits one interval.
    pub fn wait(&self, k: i32) -> Duration {
        let doublings = k - if self.fresh { 2 } else { 1 };
        if doublings < 0 {
            return Duration::ZERO;
        }
        let factor = 2_u32.checked_pow(u32::try_from(doublings).unwrap_or(0)).unwrap_or(u32::MAX);
        self.interval.saturating_mul(factor).min(self.interval_max)
    }

    /// When the `k`-th try in this lane is due after one that ended `now`. `jitter` is a random number in 0..=1.
    pub fn due(&self, k: i32, now: Timestamp, jitter: f64) -> Timestamp {
        let wait = self.wait(k).mul_f64(1.0 + JITTER * jitter.clamp(0.0, 1.0));
        now.after(wait.min(self.interval_max))
    }
}

/// The terminal lane that the chain from `topic` ends in; `messages-dlq` when the chain is not
/// (yet) registered to its end or goes round in a circle.
pub fn dead_letter_of<'a>(topic: &'a str, lanes: &'a [Lane]) -> &'a str {
    let mut at = topic;
    for _ in 0..=lanes.len() {
        if Lane::is_terminal(at) {
            return at;
        }
        match lanes.iter().find(|lane| lane.topic == at) {
            Some(lane) => at = &lane.next,
            None => break,
        }
    }
    "messages-dlq"
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;

    const NOW: Timestamp = Timestamp::EPOCH;

    pub(crate) fn lane(topic: &str, next: &str, fresh: bool, tries: i32) -> Lane {
        Lane {
            topic: topic.into(),
            group: "message-consumer".into(),
            next: next.into(),
            fresh,
            tries,
            interval: Duration::from_secs(3),
            interval_max: Duration::from_secs(3600),
        }
    }

    #[test]
    fn the_dead_letter_lane_is_the_end_of_the_chain() {
        let lanes = [
            lane("a", "b", true, 1),
            lane("b", "c", false, 1),
            lane("c", "c-dlq", false, 1),
            lane("x", "x", false, 1),
        ];
        assert_eq!(dead_letter_of("a", &lanes), "c-dlq");
        assert_eq!(dead_letter_of("x", &lanes), "messages-dlq");
        assert_eq!(dead_letter_of("unknown", &lanes), "messages-dlq");
    }

    proptest! {
        #[test]
        fn waits_stay_within_jitter_and_maximum(k in 1..80_i32, jitter in 0.0..=1.0_f64, fresh: bool) {
            let lane = Lane { fresh, ..lane("l", "l-dlq", fresh, 99) };
            let wait = lane.due(k, NOW, jitter).since(NOW);
            prop_assert!(wait >= lane.wait(k));
            prop_assert!(wait <= lane.interval_max);
            prop_assert!(wait <= lane.wait(k).mul_f64(1.0 + JITTER) + Duration::from_micros(1));
            prop_assert!(lane.wait(k + 1) >= lane.wait(k));
        }
    }

    #[test]
    fn groups_that_are_silent_for_a_lease_do_not_count_beside_others() {
        let seen = |topic: &str, group: &str, second: u64| LaneGroup {
            topic: topic.into(),
            group: group.into(),
            seen_at: Timestamp::EPOCH.after(Duration::from_secs(second)),
        };
        let lease = Duration::from_secs(10);
        let (ours, theirs) = (seen("a", "ours", 109), seen("a", "theirs", 100));
        let groups = [ours, theirs, seen("b", "ours", 500)];
        assert_eq!(LaneGroup::living(&groups, "a", lease), ["ours", "theirs"]);
        let later = [seen("a", "ours", 110), groups[1].clone()];
        assert_eq!(LaneGroup::living(&later, "a", lease), ["ours"]);
        // However long ago: the last that were heard of, while nobody else is.
        assert_eq!(LaneGroup::living(&groups[1..2], "a", lease), ["theirs"]);
        assert!(LaneGroup::living(&groups, "c", lease).is_empty());
    }
}
