//! What is here ahead of its time waits for it: tickets that were taken from the lane, and begun deliveries of endpoints
//! with a rate.
//!
//! Tickets are not begun meanwhile: they stay in their batch, so that a cancelled one is dropped when its time
//! comes, and one that a stop leaves behind is given again by the lane. How many there are is bounded by the
//! subscription's window.

use std::collections::BTreeMap;

use crate::clock::{Clock, Instant};

/// What waits, by its time; the number keeps those of one moment apart, in the order in which they came.
#[derive(Debug)]
pub(super) struct Early<T> {
    waiting: BTreeMap<(Instant, u64), T>,
    came: u64,
}

impl<T> Default for Early<T> {
    fn default() -> Early<T> {
        Early { waiting: BTreeMap::new(), came: 0 }
    }
}

impl<T> Early<T> {
    /// Keeps `what` until `due_at`.
    pub(super) fn keep(&mut self, what: T, due_at: Instant) {
        self.came += 1;
        self.waiting.insert((due_at, self.came), what);
    }

    /// Takes out one whose time has come: the one that was due first.
    pub(super) fn take(&mut self, now: Instant) -> Option<T> {
        let first = self.waiting.first_entry()?;
        (first.key().0 <= now).then(|| first.remove())
    }

    /// All that waits, by its time.
    pub(super) fn into_all(self) -> impl Iterator<Item = T> {
        self.waiting.into_values()
    }

    /// Waits until the time of one has come.
    pub(super) async fn due(&self, clock: &Clock) {
        match self.waiting.first_key_value() {
            Some(((due_at, _), _)) => tokio::time::sleep(due_at.since(clock.instant())).await,
            None => std::future::pending().await,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::clock::Timestamp;

    #[tokio::test(start_paused = true)]
    async fn each_comes_at_its_time_and_in_its_order() {
        let clock = Clock::virtual_from(Timestamp::EPOCH);
        let at = |ms| Instant::START.after(Duration::from_millis(ms));
        let mut early = Early::default();
        for (what, ms) in [("last", 300), ("first", 100), ("second", 100), ("past", 0)] {
            early.keep(what, at(ms));
        }
        let mut came = Vec::new();
        while !early.waiting.is_empty() {
            early.due(&clock).await;
            while let Some(what) = early.take(clock.instant()) {
                came.push((what, clock.instant().since(Instant::START).as_millis()));
            }
        }
        assert_eq!(came, [("past", 0), ("first", 100), ("second", 100), ("last", 300)]);
        let never = tokio::time::timeout(Duration::from_secs(60), early.due(&clock));
        assert!(never.await.is_err(), "nothing is due when nothing waits");
    }
}
