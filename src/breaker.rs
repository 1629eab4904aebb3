//! An endpoint's circuit breaker: whether it may be tried at all, after it has failed for long or asked for a pause. Pure.
//!
//! | state | attempts | it ends |
//! | --- | --- | --- |
//! | closed | as many as the endpoint's window allows | when only failures have come for [`FAILING_FOR`], or the endpoint asks for a pause |
//! | open | none: what is due is held, which costs no attempt | at [`Breaker::until`] |
//! | half-open | one at a time, to probe | with a success: closed; with a failure: open for twice as long |
//!
//! A breaker that is not closed is one row in the store, so all consumers share it and it survives restarts. After it was
//! closed each consumer lets the endpoint's window grow from one, at most twofold in a second ([`ramp`]): what was held
//! for hours must not knock over a receiver that has just come back.

use std::time::Duration;

use crate::clock::{Instant, Timestamp};
use crate::message::{Class, Outcome};
use crate::retry::{RETRY_AFTER_MAX, summary};

/// A breaker opens after so many failures in a row, when they have come for so long. A receiver that restarts is back
/// sooner, and the default lanes make their last attempt 21 s after the first: what they carry is kept by then.
const FAILURES: u32 = 5;
pub const FAILING_FOR: Duration = Duration::from_secs(10);

/// How long a breaker stays open at first, and at most: doubled with each probe that fails. Short, because for so long
/// an endpoint that is back may wait; bounded, because nobody is to wait for hours for one that is back.
const OPEN_FIRST: Duration = Duration::from_secs(5);
const OPEN_MAX: Duration = Duration::from_secs(300);

/// No breaker stays open for longer from any moment on. A later end was written by a clock that was wrong.
const OPEN_BOUND: Duration = Duration::from_secs(25 * 3600);

/// Why a breaker is not closed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Cause {
    /// Its endpoint has failed for long.
    Failing,
    /// Its endpoint asked for a pause: a 429 or 503 with `Retry-After` (RFC 9110, section 10.2.3).
    RetryAfter,
}

impl Cause {
    /// The cause as it is written in the store and in JSON.
    pub fn as_str(self) -> &'static str {
        match self {
            Cause::Failing => "failing",
            Cause::RetryAfter => "retry_after",
        }
    }

    /// The cause that a store has written. A word that only a newer program knows is a failure of some kind.
    pub(crate) fn read(text: &str) -> Cause {
        if text == Cause::RetryAfter.as_str() { Cause::RetryAfter } else { Cause::Failing }
    }
}

/// A breaker that is not closed.
#[derive(Clone, Debug, PartialEq)]
pub struct Breaker {
    pub cause: Cause,
    /// Since when it has not been closed.
    pub since: Timestamp,
    /// Until when it is open; then it is half-open.
    pub until: Timestamp,
    /// How often it was opened since then; from 1.
    pub openings: i32,
    /// What the last attempt came to.
    pub reason: String,
}

impl Breaker {
    /// Whether it is open, else half-open.
    pub fn is_open(&self, now: Timestamp) -> bool {
        is_open(self.until, now)
    }

    /// The breaker of an endpoint whose attempt failed: open for the pause that it asked for, else for longer each time.
    pub fn opened(before: Option<&Breaker>, outcome: &Outcome, now: Timestamp) -> Breaker {
        let openings = before.map_or(0, |before| before.openings).saturating_add(1);
        let asked = asked_pause(outcome);
        Breaker {
            cause: if asked.is_some() { Cause::RetryAfter } else { Cause::Failing },
            since: before.map_or(now, |before| before.since),
            until: now.after(asked.unwrap_or_else(|| open_for(openings))),
            openings,
            reason: summary(outcome),
        }
    }

    /// It is not opened if a success was recorded since then, by whatever consumer: those of a retry lane may see the
    /// failures of a few bad messages only. `None`: nothing speaks against it.
    pub fn unless_sent_since(&self) -> Option<Timestamp> {
        let is_first = self.openings == 1 && self.cause == Cause::Failing;
        is_first.then(|| self.since.before(FAILING_FOR))
    }

    /// What there is to say of its endpoint. The view `message_status` says the same.
    pub fn explain(&self, endpoint: &str) -> String {
        let (until, reason) = (self.until, &self.reason);
        match self.cause {
            Cause::Failing => {
                format!(
                    "endpoint {endpoint} has failed for long (last: {reason}); it is probed from {until} on"
                )
            }
            Cause::RetryAfter => {
                format!("endpoint {endpoint} asked for a pause ({reason}); it is tried again from {until} on")
            }
        }
    }
}

/// Whether a breaker with this end is open.
pub fn is_open(until: Timestamp, now: Timestamp) -> bool {
    now < until && until <= now.after(OPEN_BOUND)
}

fn open_for(openings: i32) -> Duration {
    let doublings = u32::try_from(openings - 1).unwrap_or(0).min(16);
    OPEN_FIRST.saturating_mul(1 << doublings).min(OPEN_MAX)
}

/// The pause that an endpoint asks for, for all of its messages.
pub fn asked_pause(outcome: &Outcome) -> Option<Duration> {
    let asks = outcome.class == Class::Rejected && matches!(outcome.status, Some(429 | 503));
    let pause = outcome.retry_after_ms.filter(|ms| asks && *ms > 0)?;
    Some(Duration::from_millis(pause).min(RETRY_AFTER_MAX))
}

/// Attempts that may be in flight at an endpoint, so long after its breaker was closed: twice as many each second.
/// `None`: the ramp is over.
pub fn ramp(since: Duration, in_flight_max: u32) -> Option<u32> {
    let slots = 1_u32.checked_shl(u32::try_from(since.as_secs()).unwrap_or(u32::MAX))?;
    Some(slots).filter(|slots| *slots < in_flight_max)
}

/// What an attempt is evidence of: whether its endpoint works. (How much it bears is told by
/// [`crate::delivery::limits::Feedback`].)
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Evidence {
    /// It has taken the message, or has refused this one message.
    Success,
    Failure,
    /// It was not reached, for a reason that lies in the message.
    Nothing,
}

impl Evidence {
    /// What an outcome is evidence of. `final_statuses` are those by which the endpoint itself decides on a message.
    pub fn of(outcome: &Outcome, final_statuses: &[u16]) -> Evidence {
        match (outcome.class, outcome.status) {
            (Class::Accepted, _) => Evidence::Success,
            (Class::Rejected, Some(status)) if final_statuses.contains(&status) => Evidence::Success,
            // What was wrong with the message: RFC 9110, section 15.5.
            (Class::Rejected, Some(400 | 409 | 410 | 411 | 413 | 414 | 415 | 422)) => Evidence::Success,
            (Class::Invalid | Class::Unknown, _) => Evidence::Nothing,
            _ => Evidence::Failure,
        }
    }
}

/// Failures of one endpoint in a row, as one consumer sees them.
#[derive(Clone, Copy, Debug)]
pub struct Failures {
    since: Instant,
    last: Instant,
    count: u32,
}

impl Failures {
    /// Before the first.
    pub fn none(now: Instant) -> Failures {
        Failures { since: now, last: now, count: 0 }
    }

    /// Notes one more. Whether the breaker is to open.
    pub fn add(&mut self, now: Instant) -> bool {
        if self.is_old(now) {
            *self = Failures::none(now);
        }
        self.count = self.count.saturating_add(1);
        self.last = now;
        self.count >= FAILURES && now.since(self.since) >= FAILING_FOR
    }

    /// Whether the last was so long ago that it tells nothing of now.
    pub fn is_old(&self, now: Instant) -> bool {
        now.since(self.last) > OPEN_MAX
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::retry::tests::outcome;

    const NOW: Timestamp = Timestamp::EPOCH;

    fn s(seconds: u64) -> Duration {
        Duration::from_secs(seconds)
    }

    #[test]
    fn it_opens_for_twice_as_long_each_time_up_to_a_bound() {
        let failed = outcome(Class::Rejected, Some(500));
        let (mut breaker, mut now) = (None, NOW);
        for expected in [5, 10, 20, 40, 80, 160, 300, 300, 300] {
            let opened = Breaker::opened(breaker.as_ref(), &failed, now);
            assert_eq!((opened.until, opened.since), (now.after(s(expected)), NOW));
            assert!(opened.is_open(now) && !opened.is_open(opened.until));
            (now, breaker) = (opened.until, Some(opened));
        }
        let forever = Breaker { openings: i32::MAX, ..breaker.unwrap() };
        assert_eq!(Breaker::opened(Some(&forever), &failed, now).until, now.after(OPEN_MAX));
    }

    #[test]
    fn an_endpoint_that_asks_for_a_pause_gets_it() {
        let asks =
            |status, ms| Outcome { retry_after_ms: Some(ms), ..outcome(Class::Rejected, Some(status)) };
        for (outcome, expected) in [
            (asks(429, 60_000), Some(s(60))),
            (asks(503, 1_000), Some(s(1))),
            (asks(503, u64::MAX), Some(RETRY_AFTER_MAX)),
            (asks(503, 0), None),
            (asks(500, 60_000), None),
            (outcome(Class::Rejected, Some(429)), None),
            (outcome(Class::Timeout, None), None),
        ] {
            assert_eq!(asked_pause(&outcome), expected, "{outcome:?}");
            let opened = Breaker::opened(None, &outcome, NOW);
            let cause = if expected.is_some() { Cause::RetryAfter } else { Cause::Failing };
            assert_eq!((opened.cause, opened.until), (cause, NOW.after(expected.unwrap_or(OPEN_FIRST))));
            assert_eq!(Cause::read(cause.as_str()), cause);
        }
    }

    #[test]
    fn a_clock_that_was_wrong_keeps_nothing_open() {
        assert!(is_open(NOW.after(RETRY_AFTER_MAX), NOW));
        assert!(!is_open(NOW.after(OPEN_BOUND + s(1)), NOW));
    }

    #[test]
    fn only_failures_in_a_row_for_long_open_it() {
        let at = |seconds| Instant::START.after(s(seconds));
        for (times, expected) in [
            (vec![0, 1, 2, 3, 9], false),
            (vec![0, 1, 2, 3, 10], true),
            (vec![0, 3, 9, 21], false),
            (vec![0, 3, 9, 21, 22], true),
        ] {
            let mut failures = Failures::none(at(0));
            let opens = times.iter().map(|time| failures.add(at(*time))).collect::<Vec<_>>();
            assert_eq!(opens.last(), Some(&expected), "{times:?}");
            assert!(opens.iter().rev().skip(1).all(|opens| !opens), "{times:?}");
        }
        let mut failures = Failures::none(at(0));
        failures.add(at(5));
        assert!(!failures.is_old(at(305)) && failures.is_old(at(306)));
        let much_later = [400, 401, 402, 403, 409, 410].map(|time| failures.add(at(time)));
        assert_eq!(much_later, [false, false, false, false, false, true], "those of long ago do not count");
    }

    #[test]
    fn what_is_wrong_with_one_message_says_nothing_against_its_endpoint() {
        for (class, status, expected) in [
            (Class::Accepted, Some(200), Evidence::Success),
            (Class::Rejected, Some(422), Evidence::Success),
            (Class::Rejected, Some(418), Evidence::Success),
            (Class::Rejected, Some(404), Evidence::Failure),
            (Class::Rejected, Some(500), Evidence::Failure),
            (Class::Rejected, Some(429), Evidence::Failure),
            (Class::Rejected, Some(302), Evidence::Failure),
            (Class::Refused, None, Evidence::Failure),
            (Class::Timeout, None, Evidence::Failure),
            (Class::Reset, None, Evidence::Failure),
            (Class::BadAnswer, None, Evidence::Failure),
            (Class::Invalid, None, Evidence::Nothing),
        ] {
            assert_eq!(Evidence::of(&outcome(class, status), &[418]), expected, "{class:?} {status:?}");
        }
    }

    #[test]
    fn a_window_doubles_each_second_until_it_is_whole() {
        let at = |ms| ramp(Duration::from_millis(ms), 10);
        let slots = [0, 999, 1_000, 2_500, 3_999, 4_000, 31_000, 32_000, 99_000_000].map(at);
        assert_eq!(slots, [Some(1), Some(1), Some(2), Some(4), Some(8), None, None, None, None]);
        assert_eq!(ramp(Duration::ZERO, 1), None);
    }

    #[test]
    fn it_explains_itself() {
        let asks = Outcome { retry_after_ms: Some(60_000), ..outcome(Class::Rejected, Some(429)) };
        let failing = Breaker::opened(None, &outcome(Class::Rejected, Some(503)), NOW);
        let paused = Breaker::opened(None, &asks, NOW);
        assert_eq!(
            failing.explain("sms"),
            "endpoint sms has failed for long (last: status 503); it is probed from 1970-01-01T00:00:05Z on"
        );
        assert_eq!(
            paused.explain("sms"),
            "endpoint sms asked for a pause (status 429); it is tried again from 1970-01-01T00:01:00Z on"
        );
    }
}
