//! What carries tickets from producer to consumers: the contract of the queue.
//!
//! A lane is a topic of partitions; each partition is an ordered log. A batch goes to one partition.
//! Delivery is at least once and may repeat or lose anything: the guarded begin in the store makes
//! repeats harmless, the batches in the store find losses. Committed positions are hints.

#[cfg(test)]
pub(crate) mod conformance;
pub mod embedded;
pub mod kafka;
mod watermark;

use std::collections::BTreeMap;

use async_trait::async_trait;
use bytes::Bytes;
use tokio::sync::mpsc;

use crate::clock::Timestamp;
use crate::store::LogPosition;

pub use watermark::Watermark;

/// What a caller can do about a failed queue call.
#[derive(Clone, Debug, thiserror::Error)]
pub enum QueueError {
    /// The broker can't be reached or did not answer in time; the call may have happened. Try again.
    #[error("the queue is unavailable: {0}")]
    Unavailable(String),
    /// The lane takes no record as large as one of these: repeating it is useless, a smaller one may go.
    #[error("a record is too large for the lane: {0}")]
    TooLarge(String),
    /// The broker refused this: repeating it is useless until somebody mends what the sentence names.
    #[error("the queue refused: {0}")]
    Refused(String),
}

/// The result of a queue call.
pub type Result<T> = std::result::Result<T, QueueError>;

/// The largest record of a lane, in bytes: a content of 1 MiB may grow six times when JSON escapes it.
pub const RECORD_MAX: usize = 8 << 20;
/// What a consumer is given of a record that is larger, in bytes: enough to see what it is. Any lane takes so much.
pub const RECORD_CUT: usize = 64 << 10;

/// One record to publish.
#[derive(Clone, Debug)]
pub struct LaneRecord {
    pub key: Bytes,
    pub value: Bytes,
    pub headers: Vec<(&'static str, String)>,
}

/// One record as a consumer takes it.
#[derive(Clone, Debug)]
pub struct Taken {
    pub receipt: Receipt,
    /// When it was published, by its publisher's clock; in whole milliseconds from a broker.
    pub published_at: Timestamp,
    pub key: Bytes,
    pub value: Bytes,
    /// Bytes of the value as it was published: more than `value` has when it was too large for a lane and was cut.
    pub size: usize,
}

impl Taken {
    /// Whether only the start of the value is here.
    pub fn is_cut(&self) -> bool {
        self.size > self.value.len()
    }
}

/// Names a taken record to the subscription that gave it.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Receipt {
    pub partition: i32,
    /// Which assignment of the partition it was taken under: a receipt of an older one is ignored.
    pub generation: u32,
    pub offset: i64,
}

/// A consumer's end of a lane. Dropping it leaves the lane; [`Subscription::close`] does so in order.
#[derive(Debug)]
pub struct Subscription {
    /// Records in batches, in order within each partition. Closed when the subscription has ended.
    pub taken: mpsc::Receiver<Vec<Taken>>,
    /// Records that are done with, in any order.
    pub done: mpsc::UnboundedSender<Vec<Receipt>>,
    /// Ends the subscription once all receipts sent before are committed.
    pub(crate) closed: tokio::sync::oneshot::Receiver<()>,
}

impl Subscription {
    /// Leaves the lane: positions of everything done so far are committed first.
    pub async fn close(self) {
        drop(self.done);
        drop(self.taken);
        // An error means that the other side is gone already, which is what we wait for.
        let _ = tokio::time::timeout(std::time::Duration::from_secs(5), self.closed).await;
    }
}

/// How far one partition has been read and written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Depth {
    pub partition: i32,
    /// Everything before this offset is done with, for the group asked about.
    pub position: i64,
    /// The offset that the next record will get.
    pub end: i64,
}

/// Of several groups' depths of one lane, the furthest position in each partition. Every group takes each ticket,
/// and the first to come begins it: what one of them has passed, none has still to begin.
pub fn furthest(groups: impl IntoIterator<Item = Vec<Depth>>) -> Vec<Depth> {
    let mut furthest = BTreeMap::<i32, Depth>::new();
    for depth in groups.into_iter().flatten() {
        let known = furthest.entry(depth.partition).or_insert(depth);
        known.position = known.position.max(depth.position);
        known.end = known.end.max(depth.end);
    }
    furthest.into_values().collect()
}

/// The queue.
#[async_trait]
pub trait Queue: Send + Sync + 'static {
    /// `kafka` or `embedded`.
    fn kind(&self) -> &'static str;

    /// Creates the lanes that are missing.
    async fn ensure(&self, lanes: &[String]) -> Result<()>;

    /// Publishes a batch to one partition of a lane and waits for the broker's acknowledgement of all
    /// of it. Batches rotate over the partitions. An empty batch is a mistake of the caller's.
    async fn publish(&self, lane: &str, records: Vec<LaneRecord>) -> Result<LogPosition>;

    /// Joins a group of consumers on a lane. At most `window` records are out (taken and not done)
    /// before the subscription stops giving more.
    async fn subscribe(&self, lane: &str, group: &str, window: usize) -> Result<Subscription>;

    /// How far `group` has come on a lane. Empty when the lane does not exist.
    async fn depth(&self, lane: &str, group: &str) -> Result<Vec<Depth>>;

    /// Whether the broker answers.
    async fn ping(&self) -> Result<()>;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_furthest_group_of_each_partition_counts() {
        let depth = |partition, position, end| Depth { partition, position, end };
        let (ours, theirs) = (vec![depth(0, 5, 9), depth(1, 2, 2)], vec![depth(0, 3, 10), depth(2, 1, 4)]);
        for groups in [vec![ours.clone(), theirs.clone()], vec![theirs, ours.clone()]] {
            assert_eq!(furthest(groups), [depth(0, 5, 10), depth(1, 2, 2), depth(2, 1, 4)]);
        }
        assert_eq!(furthest([ours.clone()]), ours);
        assert_eq!(furthest([]), []);
    }
}
