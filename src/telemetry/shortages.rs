//! What this process is short of now: said in the log when it begins and when it is over, not each time.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::clock::{Instant, Now, Timestamp};
use crate::shortage::{Resource, Shortage};

/// A shortage is over when nothing has met it for this long: longer than the pauses after which one more
/// connection is tried (2 s), so that a lasting one is told once.
const OVER_AFTER: Duration = Duration::from_secs(5);

/// What this process is short of.
#[derive(Debug, Default)]
pub(super) struct Shortages {
    lasting: Mutex<BTreeMap<Resource, Lasting>>,
    /// Whether there is one, for those who ask often.
    any: AtomicBool,
}

/// A shortage that is not over.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lasting {
    pub shortage: Shortage,
    /// When it was first met, for people.
    pub since: Timestamp,
    /// When it was first met, and when last.
    first: Instant,
    last: Instant,
}

impl Shortages {
    /// Notes that this process met a shortage.
    pub(super) fn met(&self, shortage: &Shortage, now: Now) {
        let mut lasting = self.lasting();
        self.any.store(true, Ordering::Relaxed);
        let before = lasting.entry(shortage.of).or_insert_with(|| {
            let of = shortage.of.as_str();
            tracing::warn!(of, "short of {of}: {shortage}; what needs them waits");
            Lasting { shortage: shortage.clone(), since: now.time, first: now.instant, last: now.instant }
        });
        before.shortage = shortage.clone();
        before.last = before.last.max(now.instant);
    }

    /// Ends what has not been met lately, and tells what lasts.
    pub(super) fn lasting_at(&self, now: Instant) -> Vec<Lasting> {
        if !self.any.load(Ordering::Relaxed) {
            return Vec::new();
        }
        let mut lasting = self.lasting();
        lasting.retain(|of, shortage| {
            let lasts = now.since(shortage.last) < OVER_AFTER;
            if !lasts {
                let of = of.as_str();
                let took = shortage.last.since(shortage.first).as_secs();
                tracing::info!(of, "no longer short of {of}, after {took} s");
            }
            lasts
        });
        self.any.store(!lasting.is_empty(), Ordering::Relaxed);
        lasting.values().cloned().collect()
    }

    fn lasting(&self) -> MutexGuard<'_, BTreeMap<Resource, Lasting>> {
        self.lasting.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shortage_lasts_until_nothing_has_met_it_for_a_while() {
        let shortages = Shortages::default();
        let short = |of: Resource, why: &str| Shortage { of, why: why.to_owned() };
        let at = |ms| Timestamp::EPOCH.after(Duration::from_millis(ms));
        let instant = |ms| Instant::START.after(Duration::from_millis(ms));
        let now = |ms| Now { time: at(ms), instant: instant(ms) };
        let seen = |ms| -> Vec<_> {
            let lasting = shortages.lasting_at(instant(ms)).into_iter();
            lasting.map(|l| (l.shortage.of, l.shortage.why, l.since)).collect()
        };
        assert_eq!(seen(0), []);
        shortages.met(&short(Resource::Descriptors, "of this process"), now(0));
        shortages.met(&short(Resource::Descriptors, "of this machine"), now(3_000));
        shortages.met(&short(Resource::Ports, "to a receiver"), now(4_000));
        let descriptors = (Resource::Descriptors, "of this machine".to_owned(), at(0));
        let ports = (Resource::Ports, "to a receiver".to_owned(), at(4_000));
        assert_eq!(seen(7_999), [descriptors, ports.clone()]);
        assert_eq!(seen(8_000), [ports]);
        assert_eq!(seen(9_000), []);
        shortages.met(&short(Resource::Descriptors, "again"), now(10_000));
        assert_eq!(seen(10_000), [(Resource::Descriptors, "again".to_owned(), at(10_000))]);
    }
}
