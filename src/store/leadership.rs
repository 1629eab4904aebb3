//! Who is the one active producer, until when, and at what pace it works.

use std::time::Duration;

use super::InstanceId;
use crate::clock::Timestamp;

/// At most `count` first tries per `interval`, over all producers together.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Pacing {
    pub count: usize,
    pub interval: Duration,
}

impl Pacing {
    /// What a store has written down: a count, and an interval in milliseconds.
    pub(super) fn of(count: i64, ms: i64) -> Pacing {
        Pacing {
            count: usize::try_from(count).unwrap_or(0),
            interval: Duration::from_millis(ms.unsigned_abs()),
        }
    }

    /// What a store writes down.
    pub(super) fn numbers(self) -> (i64, i64) {
        (
            i64::try_from(self.count).unwrap_or(i64::MAX),
            i64::try_from(self.interval.as_millis()).unwrap_or(i64::MAX),
        )
    }
}

/// An instance's wish to be the one active producer.
#[derive(Clone, Copy, Debug)]
pub struct Bid {
    pub instance: InstanceId,
    pub now: Timestamp,
    /// Until when it leads without saying so again.
    pub until: Timestamp,
    /// No further first tries before this time; `None` leaves what stands in the store.
    pub paced_until: Option<Timestamp>,
    /// Its own setting, for people to see.
    pub pacing: Option<Pacing>,
}

impl Bid {
    /// No living leader's term ends later than this, as long as the clocks of all hosts agree to four terms. A later
    /// end was written by a clock that was wrong, and would keep everybody from leading until then.
    pub(super) fn latest_until(&self) -> Timestamp {
        self.now.after(self.until.since(self.now).saturating_mul(5))
    }
}

/// What the one active producer has to know of its predecessor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leadership {
    /// Since when somebody has led without a break of 1 s or more between two terms: so long every
    /// instance could have renewed its lease.
    pub steady_since: Timestamp,
    /// The pacing window that stands in the store ends then: pacing holds over all producers together.
    pub paced_until: Option<Timestamp>,
    /// Somebody has paused all producers: nothing may be claimed.
    pub paused: bool,
}
