//! An endpoint with held rows: how many of them are made due at a time.

use std::time::Duration;

use super::begin::BATCH;
use crate::clock::Instant;

/// After this, rows that were made due and did not come here are believed to have gone to another consumer.
const EXPECTED: Duration = Duration::from_secs(2);
/// So many held rows are made due at first; one more for each that comes. Those of another lane never come here:
/// its own consumer knows whether it has room for them.
pub(super) const TRIAL: usize = 32;

#[derive(Debug)]
pub(super) struct Saturation {
    /// Rows made due that have not come back as tickets.
    pub(super) expected: usize,
    pub(super) since: Instant,
    /// How many of those there may be.
    trial: usize,
    /// When it was last seen to be slow.
    pub(super) slow_at: Instant,
}

impl Saturation {
    pub(super) fn new(now: Instant, slow_at: Instant) -> Saturation {
        Saturation { expected: 0, since: now, trial: TRIAL, slow_at }
    }

    /// Notes that a ticket came.
    pub(super) fn came(&mut self) {
        if self.expected > 0 {
            self.expected -= 1;
            self.trial = (self.trial + 1).min(BATCH);
        }
    }

    /// Rows to make due now, when there is room for this many more.
    pub(super) fn wanted(&mut self, room: usize, now: Instant) -> usize {
        if self.expected > 0 && now.since(self.since) > EXPECTED {
            self.expected = 0;
            self.trial = TRIAL;
        }
        room.min(self.trial).saturating_sub(self.expected)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_that_never_come_are_made_due_a_few_at_a_time() {
        let start = Instant::START.after(EXPECTED);
        let mut busy = Saturation::new(start, start);
        assert_eq!((busy.wanted(10, start), busy.wanted(1_000, start)), (10, TRIAL));
        // All of them come, round by round.
        for _ in 0..3 {
            busy.expected = busy.wanted(1_000, start);
            (0..busy.expected).for_each(|_| busy.came());
        }
        assert_eq!((busy.expected, busy.wanted(1_000, start)), (0, TRIAL * 8));
        // Tickets that were not made due by us tell nothing.
        busy.came();
        assert_eq!(busy.wanted(1_000, start), TRIAL * 8);
        // None comes any more.
        busy.expected = TRIAL * 8;
        assert_eq!(busy.wanted(1_000, start.after(EXPECTED)), 0);
        assert_eq!(busy.wanted(1_000, start.after(EXPECTED * 2)), TRIAL);
    }
}
