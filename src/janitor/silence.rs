//! Tells the dead from the living when an instance's lease says nothing, because its clock was ahead. Pure.

use std::collections::BTreeMap;
use std::time::Duration;

use crate::clock::{Instant, Timestamp};
use crate::store::InstanceId;

/// Instances whose lease ends later than any can: when each renewed it last, and since when we have seen it so.
#[derive(Debug, Default)]
pub(super) struct Silence {
    watched: BTreeMap<InstanceId, (Timestamp, Instant)>,
}

impl Silence {
    /// Notes which instances are ahead now. One that has renewed its lease since is watched anew.
    pub(super) fn watch(&mut self, ahead: &[(InstanceId, Timestamp)], now: Instant) {
        let before = std::mem::take(&mut self.watched);
        for (id, seen_at) in ahead {
            let since = before.get(id).filter(|(last, _)| last == seen_at).map_or(now, |(_, since)| *since);
            self.watched.insert(*id, (*seen_at, since));
        }
    }

    /// Those that have not renewed their lease for so long, by our own watch.
    pub(super) fn longer_than(&self, lease: Duration, now: Instant) -> Vec<InstanceId> {
        let silent = self.watched.iter().filter(|(_, (_, since))| now.since(*since) > lease);
        silent.map(|(id, _)| *id).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_instance_is_silent_once_it_has_not_renewed_its_lease_for_as_long_as_one_lasts() {
        let lease = Duration::from_secs(10);
        let at = |seconds| Instant::START.after(Duration::from_secs(seconds));
        let seen = |seconds| Timestamp::EPOCH.after(Duration::from_secs(seconds));
        let (living, dead) = (InstanceId(1), InstanceId(2));
        let mut silence = Silence::default();
        for second in 0..=10 {
            // The living one's clock is an hour ahead, and it renews its lease.
            silence.watch(&[(living, seen(3_600 + second)), (dead, seen(3_600))], at(second));
            assert_eq!(silence.longer_than(lease, at(second)), []);
        }
        assert_eq!(silence.longer_than(lease, at(11)), [dead]);
        // Who is no longer ahead is judged by his lease.
        silence.watch(&[], at(12));
        assert_eq!(silence.longer_than(lease, at(60)), []);
    }
}
