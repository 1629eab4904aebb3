//! Judges a try: a pure function of the outcome, the lanes, the time and a random number.

use std::time::Duration;

use crate::clock::Timestamp;
use crate::lane::Lane;
use crate::message::{Class, Outcome, Verdict};

/// The longest `Retry-After` that is obeyed.
pub const RETRY_AFTER_MAX: Duration = Duration::from_secs(24 * 3600);

/// What decides a message's way after a try.
#[derive(Clone, Copy, Debug)]
pub struct Policy<'a> {
    pub lane: &'a Lane,
    /// The lane that `lane.next` names, when it has registered and is not terminal.
    pub next: Option<&'a Lane>,
    /// The terminal lane of this chain, see [`crate::lane::dead_letter_of`].
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
    use crate::lane::tests::lane;
    use crate::message::Times;

    pub(crate) fn outcome(class: Class, status: Option<u16>) -> Outcome {
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

    proptest! {
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
}
