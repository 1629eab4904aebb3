//! What a subscription has out of each partition, how far that lets the group's position move, and whether records wait
//! there that do not come.

use std::collections::BTreeMap;

use bytes::Bytes;
use rdkafka::message::{BorrowedMessage, Message};

use crate::clock::Timestamp;
use crate::queue::{Depth, RECORD_CUT, RECORD_MAX, Receipt, Taken, Watermark};

/// What is out of each assigned partition.
#[derive(Default)]
pub(super) struct Trackers {
    pub(super) partitions: BTreeMap<i32, Tracker>,
    /// Which assignment is the current one; see [`Receipt`].
    pub(super) generation: u32,
    /// An assignment has come since somebody looked.
    pub(super) reassigned: bool,
    /// What the broker last said of the group, and how often in a row it has now said that records wait where nobody moves
    /// on. Kept while no partition is ours.
    heard: Vec<Depth>,
    unmoved: u32,
}

#[derive(Default)]
pub(super) struct Tracker {
    generation: u32,
    watermark: Watermark,
    committed: Option<i64>,
    last: Option<i64>,
    /// How often in a row the broker was heard to have records for us that did not come.
    unread: u32,
}

impl Trackers {
    pub(super) fn assign(&mut self, partitions: &[i32]) {
        self.generation += 1;
        self.reassigned = true;
        (self.heard, self.unmoved) = (Vec::new(), 0);
        for partition in partitions {
            let tracker = Tracker { generation: self.generation, ..Tracker::default() };
            self.partitions.insert(*partition, tracker);
        }
    }

    pub(super) fn take(&mut self, message: &BorrowedMessage<'_>) -> Taken {
        let (partition, offset) = (message.partition(), message.offset());
        let tracker = self.partitions.entry(partition).or_default();
        if tracker.last.is_some_and(|last| offset <= last) {
            // The log was made anew, or the position was set back: what was out before counts no more.
            self.generation += 1;
            *tracker = Tracker { generation: self.generation, ..Tracker::default() };
        }
        tracker.last = Some(offset);
        tracker.unread = 0;
        tracker.watermark.take(offset);
        let value = message.payload().unwrap_or_default();
        // What no lane takes is no ticket: its start says what it is, and the rest must not fill the memory.
        let kept = if value.len() > RECORD_MAX { &value[..RECORD_CUT] } else { value };
        Taken {
            receipt: Receipt { partition, generation: tracker.generation, offset },
            published_at: Timestamp::from_micros(message.timestamp().to_millis().unwrap_or(0) * 1_000),
            key: Bytes::copy_from_slice(message.key().unwrap_or_default()),
            value: Bytes::copy_from_slice(kept),
            size: value.len(),
        }
    }

    pub(super) fn done(&mut self, receipts: &[Receipt]) {
        for receipt in receipts {
            if let Some(tracker) = self.partitions.get_mut(&receipt.partition)
                && tracker.generation == receipt.generation
            {
                tracker.watermark.done(receipt.offset);
            }
        }
    }

    pub(super) fn out(&self) -> usize {
        self.partitions.values().map(|tracker| tracker.watermark.out()).sum()
    }

    /// Compares with what the broker says of the group. Returns how often in a row it has now said of some partition
    /// of ours that records wait there while we have none of them, and whether it says so of any. Means nothing
    /// while we do not take (`takes`). While no partition is ours, those count where nobody moves on.
    pub(super) fn unread(&mut self, depths: &[Depth], takes: bool) -> (u32, bool) {
        if self.partitions.is_empty() {
            return self.unmoved(depths);
        }
        let (mut most, mut behind) = (0, false);
        for depth in depths {
            let Some(tracker) = self.partitions.get_mut(&depth.partition) else { continue };
            behind |= depth.position < depth.end;
            let waits = takes && depth.position < depth.end && tracker.watermark.out() == 0;
            tracker.unread = if waits { tracker.unread + 1 } else { 0 };
            most = most.max(tracker.unread);
        }
        (most, behind)
    }

    /// The same while no partition is ours: perhaps the group has forgotten us.
    fn unmoved(&mut self, depths: &[Depth]) -> (u32, bool) {
        let mut behind = depths.iter().filter(|depth| depth.position < depth.end).peekable();
        let is_behind = behind.peek().is_some();
        let stands = |depth: &Depth| {
            self.heard.iter().any(|last| (last.partition, last.position) == (depth.partition, depth.position))
        };
        self.unmoved = if behind.any(stands) { self.unmoved + 1 } else { 0 };
        self.heard = depths.to_vec();
        (self.unmoved, is_behind)
    }

    /// Has all positions count as moved.
    pub(super) fn repeat(&mut self) {
        self.partitions.values_mut().for_each(|tracker| tracker.committed = None);
    }

    /// The positions that have moved since they were last asked for.
    pub(super) fn moved(&mut self) -> Vec<(i32, i64)> {
        let mut moved = Vec::new();
        for (partition, tracker) in &mut self.partitions {
            let position = tracker.watermark.position();
            if let (Some(offset), true) = (position, position != tracker.committed) {
                tracker.committed = position;
                moved.push((*partition, offset));
            }
        }
        moved
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn depth(partition: i32, position: i64, end: i64) -> Depth {
        Depth { partition, position, end }
    }

    #[test]
    fn records_that_wait_and_do_not_come_are_counted_answer_by_answer() {
        let mut trackers = Trackers::default();
        trackers.assign(&[0, 1]);
        let behind = [depth(0, 5, 5), depth(1, 3, 9), depth(2, 0, 9)];
        for unread in 1..4 {
            assert_eq!(trackers.unread(&behind, true), (unread, true));
        }
        assert_eq!(trackers.unread(&behind, false), (0, true), "nothing is taken: it is full or paused");
        assert_eq!(trackers.unread(&behind, true), (1, true));
        assert_eq!(trackers.unread(&[depth(0, 5, 5), depth(1, 9, 9)], true), (0, false));
        assert_eq!(trackers.unread(&[depth(2, 0, 9)], true), (0, false), "another member's");
        // What is out is on its way: a slow reader is no reason.
        trackers.unread(&behind, true);
        trackers.partitions.get_mut(&1).unwrap().watermark.take(3);
        assert_eq!(trackers.unread(&behind, true), (0, true));
        trackers.unread(&behind, true);
        trackers.assign(&[0, 1]);
        assert_eq!(trackers.unread(&behind, true), (1, true), "a new assignment has its time");
    }

    #[test]
    fn without_a_partition_those_count_where_nobody_moves_on() {
        let mut trackers = Trackers::default();
        for (depths, said) in [
            (vec![depth(0, 3, 9)], (0, true)),
            (vec![depth(0, 5, 9)], (0, true)),
            (vec![depth(0, 5, 12)], (1, true)),
            (vec![depth(0, 5, 12), depth(1, 0, 4)], (2, true)),
            (vec![depth(0, 12, 12), depth(1, 0, 4)], (3, true)),
            (vec![depth(0, 12, 12), depth(1, 4, 4)], (0, false)),
            (vec![], (0, false)),
        ] {
            assert_eq!(trackers.unread(&depths, true), said, "{depths:?}");
        }
        trackers.unread(&[depth(1, 0, 4)], true);
        assert_eq!(trackers.unread(&[depth(1, 0, 4)], true), (1, true));
        trackers.assign(&[]);
        assert_eq!(trackers.unread(&[depth(1, 0, 4)], true), (0, true), "a new assignment has its time");
    }
}
