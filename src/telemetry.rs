//! What the program says about itself: log set-up, and every metric declared once with its help.

use std::time::Duration;

use crate::message::Class;

/// Every metric of a process. Cheap to share by reference; rooms call these methods and know nothing of registries.
#[derive(Debug, Default)]
pub struct Metrics {}

impl Metrics {
    /// A batch of `rows` messages passed a stage: `insert`, `claim`, `publish`, `begin`, `record`, `hold`, `unhold`.
    pub fn batch(&self, _stage: &'static str, _rows: usize, _took: Duration) {}
    /// One try ended.
    pub fn attempted(&self, _lane: &str, _class: Class, _took: Duration) {}
    /// A message became `sent`, `retrying` or `dead` on a lane (`verdict` is that word, or `released`).
    pub fn judged(&self, _lane: &str, _verdict: &'static str) {}
    /// From a message's creation to its delivery.
    pub fn delivered_after(&self, _latency: Duration) {}
    /// Tickets that the guarded begin, or failures that the guarded record, refused.
    pub fn stale(&self, _at: &'static str, _count: usize) {}
    /// Tries under way in this process now.
    pub fn in_flight(&self, _count: usize) {}
    /// A lane's records that its group has not done.
    pub fn lag(&self, _lane: &str, _partition: i32, _lag: i64) {}
    /// Whether a part (`store`, `queue`, `cache`) answered when it was last used.
    pub fn part_up(&self, _part: &'static str, _up: bool) {}
    /// The janitor gave rows back: `why` is `instance_died`, `batch_orphaned`, `ticket_lost`.
    pub fn recovered(&self, _why: &'static str, _rows: u64) {}
}
