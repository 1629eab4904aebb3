//! How many tickets each lane still takes: what the group has not taken up, known from the broker
//! some moments ago, and what was published since.

use std::collections::{HashMap, HashSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use crate::clock::Timestamp;
use crate::queue::{Depth, QueueError};
use crate::service::Parts;
use crate::store::BatchId;

const REFRESH: Duration = Duration::from_millis(100);

/// The rooms of all lanes, and the batches on their way there.
pub(super) struct Rooms {
    parts: Parts,
    limit: usize,
    lanes: HashMap<String, Room>,
    next_refresh: Timestamp,
    /// A lock because publishing tasks end on their own; held for a look-up only, never over an await.
    under_way: Arc<Mutex<HashSet<BatchId>>>,
}

#[derive(Debug, Default)]
struct Room {
    /// Tickets that the group had not taken up at the last look.
    lag: usize,
    /// Published since that look began.
    since: usize,
    known: bool,
}

/// A batch that is being published; it stops being so when this is dropped.
pub(super) struct UnderWay {
    batch: BatchId,
    all: Arc<Mutex<HashSet<BatchId>>>,
}

impl Drop for UnderWay {
    fn drop(&mut self) {
        self.all.lock().unwrap_or_else(PoisonError::into_inner).remove(&self.batch);
    }
}

impl Rooms {
    pub(super) fn new(parts: Parts, limit: usize) -> Rooms {
        Rooms {
            parts,
            limit,
            lanes: HashMap::new(),
            next_refresh: Timestamp::EPOCH,
            under_way: Arc::default(),
        }
    }

    /// Asks the broker how far each lane's group has come, when it is time to.
    pub(super) async fn refresh(&mut self, fresh_lane: &str, now: Timestamp) -> Result<(), QueueError> {
        if now < self.next_refresh {
            return Ok(());
        }
        let directory = self.parts.directory.snapshot();
        for lane in &directory.lanes {
            let room = self.lanes.entry(lane.topic.clone()).or_default();
            // A quiet lane needs no look: nothing was published that could have filled it.
            if room.known && room.lag == 0 && room.since == 0 {
                continue;
            }
            let before = room.since;
            let depth = self.parts.queue.depth(&lane.topic, &lane.group).await?;
            room.lag = lag(&depth);
            room.since -= before;
            room.known = true;
            for d in depth {
                self.parts.metrics.lag(&lane.topic, d.partition, d.end - d.position);
            }
        }
        // Before any consumer has registered the fresh lane, tickets may already wait for it there.
        self.lanes.entry(fresh_lane.to_owned()).or_default();
        self.next_refresh = now.after(REFRESH);
        Ok(())
    }

    /// How many tickets `lane` takes now.
    pub(super) fn room(&self, lane: &str) -> usize {
        let taken = self.lanes.get(lane).map_or(0, |room| room.lag + room.since);
        self.limit.saturating_sub(taken)
    }

    /// Notes that `count` tickets are on their way to `lane`.
    pub(super) fn published(&mut self, lane: &str, count: usize) {
        self.lanes.entry(lane.to_owned()).or_default().since += count;
    }

    /// Notes that a batch is being published, until the result is dropped.
    pub(super) fn under_way(&self, batch: BatchId) -> UnderWay {
        self.under_way.lock().unwrap_or_else(PoisonError::into_inner).insert(batch);
        UnderWay { batch, all: Arc::clone(&self.under_way) }
    }

    /// Whether a batch is being published by this process.
    pub(super) fn is_under_way(&self, batch: BatchId) -> bool {
        self.under_way.lock().unwrap_or_else(PoisonError::into_inner).contains(&batch)
    }
}

fn lag(depth: &[Depth]) -> usize {
    depth.iter().map(|d| usize::try_from(d.end - d.position).unwrap_or(0)).sum()
}
