//! The queue in this process: lanes of partitions in memory, with groups that share them.
//!
//! It does what a broker does and no more: what is lost with the process, the batches in the store find. There is
//! no thread in it, and its time is its clock's, so the simulation replays.

use std::collections::{BTreeMap, VecDeque};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use async_trait::async_trait;
use tokio::sync::{Notify, mpsc, oneshot};

use super::{Depth, LaneRecord, Queue, Receipt, Result, Subscription, Taken, Watermark};
use crate::clock::{Clock, Timestamp};
use crate::lane::Lane as LaneSettings;
use crate::store::LogPosition;

/// Records that are given to a member at once.
const BATCH: usize = 1_000;

/// Bytes of records that are kept on each partition of a dead-letter lane that nobody reads, about: they are in memory, and
/// the store has all of them.
const UNREAD_BYTES: usize = 1 << 20;

/// A queue that lives and dies with its process.
#[derive(Clone)]
pub struct EmbeddedQueue {
    partitions: i32,
    clock: Clock,
    // A plain lock, held for moves of memory only: never over an await.
    lanes: Arc<Mutex<BTreeMap<String, Lane>>>,
}

#[derive(Default)]
struct Lane {
    partitions: Vec<Partition>,
    next_partition: usize,
    groups: BTreeMap<String, Group>,
}

/// A log whose front is dropped once every group has done it.
#[derive(Default)]
struct Partition {
    first: i64,
    records: VecDeque<(Timestamp, LaneRecord)>,
    /// Bytes of these records' values.
    bytes: usize,
}

#[derive(Default)]
struct Group {
    members: BTreeMap<u64, Arc<Notify>>,
    next_member: u64,
    generation: u32,
    partitions: Vec<Progress>,
}

/// How far a group has come in one partition.
#[derive(Default)]
struct Progress {
    committed: i64,
    next: i64,
    watermark: Watermark,
}

impl EmbeddedQueue {
    /// An empty queue whose lanes have this many partitions, at least one.
    pub fn new(partitions: usize, clock: Clock) -> EmbeddedQueue {
        let partitions = i32::try_from(partitions).unwrap_or(1).max(1);
        EmbeddedQueue { partitions, clock, lanes: Arc::default() }
    }

    /// Loses all records and positions, as a broker does that comes back without its disk. Members stay. For the
    /// simulation.
    pub fn wipe(&self) {
        for lane in self.lock().values_mut() {
            lane.partitions.iter_mut().for_each(|partition| *partition = Partition::default());
            for group in lane.groups.values_mut() {
                group.partitions.iter_mut().for_each(|progress| *progress = Progress::default());
                group.rebalance();
            }
        }
    }

    /// Loses the newest records of each partition, at most so many, as a broker does that goes on from a copy which was
    /// behind. For the simulation.
    pub fn truncate(&self, records: usize) {
        for lane in self.lock().values_mut() {
            for partition in &mut lane.partitions {
                let kept = partition.records.len().saturating_sub(records);
                let lost: usize = partition.records.drain(kept..).map(|(_, lost)| lost.value.len()).sum();
                partition.bytes -= lost;
            }
            let ends: Vec<_> = lane.partitions.iter().map(Partition::end).collect();
            for group in lane.groups.values_mut() {
                for (progress, end) in group.partitions.iter_mut().zip(&ends) {
                    progress.committed = progress.committed.min(*end);
                }
                group.rebalance();
            }
        }
    }

    /// Shares all partitions out anew: what was taken and is not done is given once more. For the simulation.
    pub fn rebalance(&self) {
        for lane in self.lock().values_mut() {
            lane.groups.values_mut().for_each(Group::rebalance);
        }
    }

    fn lock(&self) -> MutexGuard<'_, BTreeMap<String, Lane>> {
        self.lanes.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lane<'a>(&self, lanes: &'a mut BTreeMap<String, Lane>, name: &str) -> &'a mut Lane {
        lanes.entry(name.to_owned()).or_insert_with(|| Lane {
            partitions: (0..self.partitions).map(|_| Partition::default()).collect(),
            ..Lane::default()
        })
    }
}

impl Partition {
    fn push(&mut self, now: Timestamp, record: LaneRecord) {
        self.bytes += record.value.len();
        self.records.push_back((now, record));
    }

    /// Drops the oldest record. Whether there was one.
    fn pop(&mut self) -> bool {
        let Some((_, record)) = self.records.pop_front() else { return false };
        self.bytes -= record.value.len();
        self.first += 1;
        true
    }

    fn end(&self) -> i64 {
        self.first + self.records.len() as i64
    }
}

impl Lane {
    fn group(&mut self, name: &str) -> &mut Group {
        let firsts: Vec<_> = self.partitions.iter().map(|partition| partition.first).collect();
        self.groups.entry(name.to_owned()).or_insert_with(|| Group {
            partitions: firsts
                .into_iter()
                .map(|first| Progress { committed: first, next: first, watermark: Watermark::default() })
                .collect(),
            ..Group::default()
        })
    }

    /// Drops what every group has done.
    fn trim(&mut self) {
        for (i, partition) in self.partitions.iter_mut().enumerate() {
            let Some(done) = self.groups.values().map(|group| group.partitions[i].committed).min() else {
                continue;
            };
            while partition.first < done && partition.pop() {}
        }
    }
}

impl Group {
    /// Shares the partitions out anew: what was out and not done is given again.
    fn rebalance(&mut self) {
        self.generation += 1;
        for progress in &mut self.partitions {
            progress.next = progress.committed;
            progress.watermark = Watermark::default();
        }
        self.members.values().for_each(|member| member.notify_one());
    }

    /// The partitions of a member, by its rank among the members.
    fn share(&self, member: u64) -> Vec<usize> {
        let Some(rank) = self.members.keys().position(|id| *id == member) else {
            return Vec::new();
        };
        (0..self.partitions.len()).filter(|i| i % self.members.len() == rank).collect()
    }
}

/// One member of a group: takes for its subscription and notes what is done.
struct Member {
    queue: EmbeddedQueue,
    lane: String,
    group: String,
    id: u64,
    window: usize,
    wake: Arc<Notify>,
}

impl Member {
    /// The next records within the window.
    fn take(&self) -> Vec<Taken> {
        let mut lanes = self.queue.lock();
        let Some(lane) = lanes.get_mut(&self.lane) else {
            return Vec::new();
        };
        let Some(group) = lane.groups.get_mut(&self.group) else {
            return Vec::new();
        };
        let share = group.share(self.id);
        let out: usize = share.iter().map(|i| group.partitions[*i].watermark.out()).sum();
        let mut free = self.window.saturating_sub(out).min(BATCH);
        let mut taken = Vec::new();
        for i in share {
            let (progress, partition) = (&mut group.partitions[i], &lane.partitions[i]);
            while free > 0 && progress.next < partition.end() {
                let offset = progress.next;
                // Between `first` and `end` there is a record for every offset.
                let Some((published_at, record)) = partition.records.get((offset - partition.first) as usize)
                else {
                    break;
                };
                progress.watermark.take(offset);
                progress.next += 1;
                free -= 1;
                let receipt = Receipt { partition: i as i32, generation: group.generation, offset };
                let (published_at, key, value) = (*published_at, record.key.clone(), record.value.clone());
                let size = value.len();
                taken.push(Taken { receipt, published_at, key, value, size });
            }
        }
        taken
    }

    fn done(&self, receipts: &[Receipt]) {
        let mut lanes = self.queue.lock();
        let Some(lane) = lanes.get_mut(&self.lane) else {
            return;
        };
        let Some(group) = lane.groups.get_mut(&self.group) else {
            return;
        };
        for receipt in receipts.iter().filter(|receipt| receipt.generation == group.generation) {
            if let Some(progress) = group.partitions.get_mut(receipt.partition as usize) {
                progress.watermark.done(receipt.offset);
                progress.committed = progress.watermark.position().unwrap_or(progress.committed);
            }
        }
        lane.trim();
    }

    fn leave(&self) {
        let mut lanes = self.queue.lock();
        let group = lanes.get_mut(&self.lane).and_then(|lane| lane.groups.get_mut(&self.group));
        if let Some(group) = group {
            group.members.remove(&self.id);
            group.rebalance();
        }
    }

    async fn run(
        self,
        taken: mpsc::Sender<Vec<Taken>>,
        mut done: mpsc::UnboundedReceiver<Vec<Receipt>>,
        closed: oneshot::Sender<()>,
    ) {
        let mut next = Vec::new();
        loop {
            // Registered before the look, so that what is published meanwhile wakes us.
            let woken = self.wake.notified();
            if next.is_empty() {
                next = self.take();
            }
            tokio::select! {
                biased;
                receipts = done.recv() => match receipts {
                    Some(receipts) => self.done(&receipts),
                    None => break,
                },
                permit = taken.reserve(), if !next.is_empty() => match permit {
                    Ok(permit) => permit.send(std::mem::take(&mut next)),
                    Err(_) => {
                        // The reader has gone; what it did before still counts.
                        while let Some(receipts) = done.recv().await {
                            self.done(&receipts);
                        }
                        break;
                    }
                },
                () = woken, if next.is_empty() => {}
            }
        }
        self.leave();
        // Whoever dropped the subscription does not wait.
        let _ = closed.send(());
    }
}

#[async_trait]
impl Queue for EmbeddedQueue {
    fn kind(&self) -> &'static str {
        "embedded"
    }

    async fn ensure(&self, names: &[String]) -> Result<()> {
        let mut lanes = self.lock();
        for name in names {
            self.lane(&mut lanes, name);
        }
        Ok(())
    }

    async fn publish(&self, lane: &str, records: Vec<LaneRecord>) -> Result<LogPosition> {
        let now = self.clock.now();
        let mut lanes = self.lock();
        let is_terminal = LaneSettings::is_terminal(lane);
        let lane = self.lane(&mut lanes, lane);
        let unread = is_terminal && lane.groups.is_empty();
        let at = lane.next_partition;
        lane.next_partition = (at + 1) % lane.partitions.len();
        let partition = &mut lane.partitions[at];
        records.into_iter().for_each(|record| partition.push(now, record));
        while unread && partition.bytes > UNREAD_BYTES && partition.records.len() > 1 && partition.pop() {}
        let published = LogPosition { partition: at as i32, offset: partition.end() - 1 };
        for group in lane.groups.values() {
            group.members.values().for_each(|member| member.notify_one());
        }
        Ok(published)
    }

    async fn subscribe(&self, lane: &str, group: &str, window: usize) -> Result<Subscription> {
        let (give, taken) = mpsc::channel(2);
        let (done, receipts) = mpsc::unbounded_channel();
        let (ended, closed) = oneshot::channel();
        let wake = Arc::new(Notify::new());
        let member = {
            let mut lanes = self.lock();
            let group_state = self.lane(&mut lanes, lane).group(group);
            let id = group_state.next_member;
            group_state.next_member += 1;
            group_state.members.insert(id, Arc::clone(&wake));
            group_state.rebalance();
            let (lane, group) = (lane.to_owned(), group.to_owned());
            Member { queue: self.clone(), lane, group, id, window, wake }
        };
        tokio::spawn(member.run(give, receipts, ended));
        Ok(Subscription { taken, done, closed })
    }

    async fn depth(&self, lane: &str, group: &str) -> Result<Vec<Depth>> {
        let lanes = self.lock();
        let Some(lane) = lanes.get(lane) else {
            return Ok(Vec::new());
        };
        let progress = lane.groups.get(group);
        Ok(lane
            .partitions
            .iter()
            .enumerate()
            .map(|(i, partition)| Depth {
                partition: i as i32,
                position: progress.map_or(partition.first, |group| group.partitions[i].committed),
                end: partition.end(),
            })
            .collect())
    }

    async fn ping(&self) -> Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::queue::conformance;

    #[tokio::test]
    async fn conforms() {
        conformance::all(&EmbeddedQueue::new(3, Clock::system())).await;
    }

    #[tokio::test]
    async fn dead_letters_that_nobody_reads_are_kept_within_bounds() {
        let queue = EmbeddedQueue::new(2, Clock::system());
        let letter = |n: usize| LaneRecord {
            key: bytes::Bytes::new(),
            value: vec![0; 2_000 + n % 7].into(),
            headers: Vec::new(),
        };
        for n in 0..2_000 {
            queue.publish("messages-dlq", vec![letter(n)]).await.unwrap();
        }
        let kept: usize =
            queue.lock()["messages-dlq"].partitions.iter().map(|partition| partition.bytes).sum();
        assert!(kept <= 2 * UNREAD_BYTES && kept > UNREAD_BYTES, "{kept}");
        let depth = queue.depth("messages-dlq", "late").await.unwrap();
        assert_eq!((depth[0].end, depth[0].position > 0), (1_000, true));
        // Tickets are not dropped, however late their consumer comes; and what is read is there.
        for n in 0..2_000 {
            queue.publish("messages", vec![letter(n)]).await.unwrap();
        }
        assert_eq!(queue.depth("messages", "late").await.unwrap()[0].position, 0);
    }

    #[tokio::test]
    async fn a_broker_that_forgets_gives_what_it_still_has_and_what_comes_after() {
        let queue = EmbeddedQueue::new(1, Clock::system());
        let mut subscription = queue.subscribe("lane", "group", 1_000).await.unwrap();
        let mut next = async |queue: &EmbeddedQueue, published: std::ops::Range<u32>| {
            if !published.is_empty() {
                queue.publish("lane", conformance::records(published)).await.unwrap();
            }
            let taken = subscription.taken.recv().await.unwrap();
            taken.iter().map(|taken| taken.receipt.offset).collect::<Vec<_>>()
        };
        assert_eq!(next(&queue, 0..4).await, [0, 1, 2, 3]);
        queue.rebalance();
        assert_eq!(next(&queue, 0..0).await, [0, 1, 2, 3], "nothing was done");
        queue.truncate(2);
        assert_eq!(next(&queue, 4..5).await, [0, 1, 2], "the third is another record now");
        queue.wipe();
        assert_eq!(queue.depth("lane", "group").await.unwrap()[0].end, 0);
        assert_eq!(next(&queue, 5..7).await, [0, 1]);
    }

    #[tokio::test]
    async fn what_every_group_has_done_leaves_memory() {
        let queue = EmbeddedQueue::new(1, Clock::system());
        let mut subscription = queue.subscribe("lane", "group", 1_000).await.unwrap();
        queue.publish("lane", conformance::records(0..100)).await.unwrap();
        let batch = subscription.taken.recv().await.unwrap();
        subscription.done.send(batch.iter().map(|taken| taken.receipt).collect()).unwrap();
        subscription.close().await;
        assert!(queue.lock()["lane"].partitions[0].records.is_empty());
    }
}
