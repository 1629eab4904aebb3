//! Judges a try: a pure function of the outcome, the lanes, the time and a random number.

use std::time::Duration;

use crate::clock::Timestamp;
use crate::message::{Class, Outcome, Verdict};

/// The largest part of a wait that jitter adds, so that messages which failed together do not
/// come back together: a wait of 10 s lasts from 10 to 11 s.
pub const JITTER: f64 = 0.1;

/// The longest `Retry-After` that is obeyed.
pub const RETRY_AFTER_MAX: Duration = Duration::from_secs(24 * 3600);

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

    fn due(&self, k: i32, now: Timestamp, jitter: f64) -> Timestamp {
        let wait = self.wait(k).mul_f64(1.0 + JITTER * jitter.clamp(0.0, 1.0));
        now.after(wait.min(self.interval_max))
    }
}

/// What decides a message's way after a try.
#[derive(Clone, Copy, Debug)]
pub struct Policy<'a> {
    pub lane: &'a Lane,
    /// The lane that `lane.next` names, when it has registered and is not terminal.
    pub next: Option<&'a Lane>,
    /// The terminal lane of this chain, see [`dead_letter_of`].
    pub dead_letter: &'a str,
    /// Statuses after which this endpoint wants no further try.
    pub final_statuses: &'a [u16],
}

impl Policy<'_> {
    /// The verdict on the `lane_try`-th try (from 1) in this lane. `jitter` is a random number in 0..=1.
    pub fn judge(&self, outcome: &Outcome, lane_try: i32, now: Timestamp, jitter: f64) -> Verdict {
        match outcome.class {
            Class::Accepted => return Verdict::Sent,
            Class::Invalid => return self.dead("the request can't be made", outcome),
            Class::Rejected if outcome.status.is_some_and(|s| self.final_statuses.contains(&s)) => {
                return self.dead("the endpoint's answer is final", outcome);
            }
            _ => {}
        }
        let asked = Duration::from_millis(outcome.retry_after_ms.unwrap_or(0)).min(RETRY_AFTER_MAX);
        let retry = |lane: &Lane, lane_tries: i32| Verdict::Retry {
            lane: lane.topic.clone(),
            lane_tries,
            at: lane.due(lane_tries + 1, now, jitter).max(now.after(asked)),
        };
        if lane_try < self.lane.tries {
            return retry(self.lane, lane_try);
        }
        if Lane::is_terminal(&self.lane.next) {
            return self.dead("all tries failed", outcome);
        }
        match self.next {
            Some(next) => retry(next, 0),
            // Nobody has registered the next lane yet: its first wait is then ours.
            None => retry(&Lane { topic: self.lane.next.clone(), fresh: false, ..self.lane.clone() }, 0),
        }
    }

    fn dead(&self, why: &str, outcome: &Outcome) -> Verdict {
        Verdict::Dead {
            reason: format!("{why}; last: {}", summary(outcome)),
            lane: self.dead_letter.to_owned(),
        }
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

/// A try's end in a few words: `status 500`, `timeout: no answer within 15s`.
pub fn summary(outcome: &Outcome) -> String {
    match (outcome.status, &outcome.error) {
        (Some(status), None) => format!("status {status}"),
        (Some(status), Some(error)) => format!("status {status}, {}: {error}", outcome.class.as_str()),
        (None, Some(error)) => format!("{}: {error}", outcome.class.as_str()),
        (None, None) => outcome.class.as_str().to_owned(),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::message::Times;

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

    fn outcome(class: Class, status: Option<u16>) -> Outcome {
        Outcome {
            class,
            status,
            address: "http://localhost:3000/".into(),
            error: None,
            answer: String::new(),
            provider_message_id: None,
            provider_message: None,
            retry_after_ms: None,
            started_at: Timestamp::default(),
            times: Times::default(),
        }
    }

    fn policy<'a>(lane: &'a Lane, next: Option<&'a Lane>) -> Policy<'a> {
        Policy { lane, next, dead_letter: "messages-dlq", final_statuses: &[410] }
    }

    const NOW: Timestamp = Timestamp::EPOCH;

    fn retry(lane: &str, lane_tries: i32, seconds: u64) -> Verdict {
        Verdict::Retry { lane: lane.into(), lane_tries, at: NOW.after(Duration::from_secs(seconds)) }
    }

    #[test]
    fn the_original_systems_chain_makes_four_tries_after_0_3_6_and_12_seconds() {
        let fresh = lane("messages", "messages-retry", true, 1);
        let again = lane("messages-retry", "messages-dlq", false, 3);
        let failed = outcome(Class::Rejected, Some(500));
        let judge = |policy: Policy<'_>, lane_try| policy.judge(&failed, lane_try, NOW, 0.0);
        assert_eq!(judge(policy(&fresh, Some(&again)), 1), retry("messages-retry", 0, 3));
        assert_eq!(judge(policy(&again, None), 1), retry("messages-retry", 1, 6));
        assert_eq!(judge(policy(&again, None), 2), retry("messages-retry", 2, 12));
        let dead = Verdict::Dead {
            reason: "all tries failed; last: status 500".into(),
            lane: "messages-dlq".into(),
        };
        assert_eq!(judge(policy(&again, None), 3), dead);
    }

    #[test]
    fn classes_decide() {
        let fresh = lane("messages", "messages-retry", true, 2);
        for class in Class::ALL {
            let verdict = policy(&fresh, None).judge(&outcome(class, None), 1, NOW, 0.0);
            match class {
                Class::Accepted => assert_eq!(verdict, Verdict::Sent),
                Class::Invalid => assert!(matches!(verdict, Verdict::Dead { .. })),
                _ => assert_eq!(verdict, retry("messages", 1, 3), "{class:?}"),
            }
        }
        let gone = policy(&fresh, None).judge(&outcome(Class::Rejected, Some(410)), 1, NOW, 0.0);
        assert!(matches!(gone, Verdict::Dead { .. }), "{gone:?}");
    }

    #[test]
    fn retry_after_only_lengthens_and_is_bounded() {
        let fresh = lane("messages", "messages-dlq", true, 9);
        let judge = |ms| {
            let asked = Outcome { retry_after_ms: Some(ms), ..outcome(Class::Rejected, Some(429)) };
            policy(&fresh, None).judge(&asked, 1, NOW, 0.0)
        };
        assert_eq!(judge(1_000), retry("messages", 1, 3));
        assert_eq!(judge(60_000), retry("messages", 1, 60));
        assert_eq!(judge(u64::MAX), retry("messages", 1, 24 * 3600));
    }

    #[test]
    fn an_unregistered_next_lane_gets_this_lanes_wait() {
        let fresh = lane("messages", "later", true, 1);
        assert_eq!(
            policy(&fresh, None).judge(&outcome(Class::Reset, None), 1, NOW, 0.0),
            retry("later", 0, 3)
        );
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

        #[test]
        fn every_failure_ends(class in 1..7_usize, tries in 1..20_i32) {
            let only = lane("l", "l-dlq", true, tries);
            let failed = outcome(Class::ALL[class], None);
            let mut lane_try = 1;
            while let Verdict::Retry { lane_tries, .. } = policy(&only, None).judge(&failed, lane_try, NOW, 0.5) {
                prop_assert_eq!(lane_tries, lane_try);
                lane_try += 1;
            }
            prop_assert!(lane_try <= tries);
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
