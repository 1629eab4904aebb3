//! A subscription's thread: polls, gathers batches, notes what is done, commits.
//!
//! librdkafka wants to be polled and nothing else done in between, so nothing here waits for anything
//! but the poll itself. Commits are hints: they are sent without waiting, and what they miss comes
//! again and is found stale.
//!
//! A client can be left behind for good: librdkafka ignores the leaders of a lane that was made anew when their
//! epoch is lower than the one it knew, and goes on at its old position in the new log. So somebody else asks the
//! broker now and then how far the group has come (`watch`): where records wait and none comes, or nobody moves on
//! while no partition is ours, the client is made anew and starts at what the group has committed, or at the beginning.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use rdkafka::client::ClientContext;
use rdkafka::config::{ClientConfig, RDKafkaLogLevel};
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer, ConsumerContext, Rebalance};
use rdkafka::error::{KafkaError, KafkaResult};
use rdkafka::message::{BorrowedMessage, Message};
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};
use tokio::sync::mpsc::{self, error::TryRecvError, error::TrySendError};
use tokio::sync::oneshot;

use super::log::LogContext;
use super::positions::Positions;
use super::refused;
use crate::clock::{Clock, Stopwatch, Timestamp};
use crate::queue::{
    Depth, QueueError, RECORD_CUT, RECORD_MAX, Receipt, Result, Subscription, Taken, Watermark,
};

/// Records given at once, at most.
const BATCH: usize = 1_000;
/// Their bytes; the last record may come on top.
const BATCH_BYTES: usize = 8 << 20;
const POLL: Duration = Duration::from_millis(10);
/// How long to wait for the client when nothing is out that could be done meanwhile.
const REST: Duration = Duration::from_millis(100);
/// How long to rest while the reader is busy.
const FULL: Duration = Duration::from_millis(1);
/// A reader that is busy for longer is waited for with the partitions paused, because the client must be polled.
const STALLED: Duration = Duration::from_secs(2);
const COMMIT: Duration = Duration::from_millis(150);
/// How often positions are committed that have not moved. One may have been lost on its way, and a lane that was
/// deleted and made anew has none: whoever asks would hear that the group has yet to read what it has in fact passed.
const REPEAT: Duration = Duration::from_secs(5);
/// How often the broker is asked whether records wait that do not come.
const WATCH: Duration = Duration::from_secs(3);
/// After so many answers in a row that say so the client is made anew: longer than a lost commit stays lost.
const UNREAD_MAX: u32 = 3;
/// Each time that this did not help it takes twice as many, up to so many, some 5 minutes: a log can have places
/// that are never read, such as the marks of another program's transactions.
const UNREAD_LIMIT: u32 = 100;
/// How long the end waits for its last commit.
const LAST_COMMIT: Duration = Duration::from_secs(1);

type Client = BaseConsumer<Assignment>;

pub(super) fn subscribe(
    config: &ClientConfig,
    lane: &str,
    group: &str,
    window: usize,
    positions: Arc<Positions>,
) -> Result<Subscription> {
    let mut config = config.clone();
    config
        .set("group.id", group)
        .set("enable.auto.commit", "false")
        .set("enable.auto.offset.store", "false")
        .set("auto.offset.reset", "earliest")
        .set("allow.auto.create.topics", "false")
        .set("partition.assignment.strategy", "cooperative-sticky")
        .set("session.timeout.ms", "10000")
        .set("heartbeat.interval.ms", "2000")
        .set("fetch.queue.backoff.ms", "10")
        .set("fetch.wait.max.ms", "250")
        .set("fetch.error.backoff.ms", "200")
        .set("queued.min.messages", "2000")
        .set("queued.max.messages.kbytes", "32768");
    let (give, taken) = mpsc::channel(2);
    let (done, receipts) = mpsc::unbounded_channel();
    let (ended, closed) = oneshot::channel();
    let client = connect(&config, lane)?;
    let clock = Clock::system();
    let (tell, told) = mpsc::channel(1);
    tokio::spawn(watch(positions, lane.to_owned(), group.to_owned(), tell));
    let poller = Poller {
        lane: lane.to_owned(),
        config,
        client,
        window,
        give,
        receipts,
        told,
        patience: UNREAD_MAX,
        pending: Vec::new(),
        stuck: None,
        paused: false,
        since_commit: clock.stopwatch(),
        since_repeat: clock.stopwatch(),
        clock,
    };
    std::thread::Builder::new()
        .name(format!("kafka {lane}"))
        .spawn(move || {
            poller.run();
            // Whoever dropped the subscription does not wait.
            let _ = ended.send(());
        })
        .map_err(|error| QueueError::Unavailable(format!("no thread for a subscription: {error}")))?;
    Ok(Subscription { taken, done, closed })
}

fn connect(config: &ClientConfig, lane: &str) -> Result<Client> {
    let client: Client = config.create_with_context(Assignment::default()).map_err(refused)?;
    client.subscribe(&[lane]).map_err(refused)?;
    Ok(client)
}

/// Asks how far the group has come, for as long as anybody wants to know.
async fn watch(positions: Arc<Positions>, lane: String, group: String, tell: mpsc::Sender<Vec<Depth>>) {
    loop {
        tokio::select! {
            () = tell.closed() => return,
            () = tokio::time::sleep(WATCH) => {}
        }
        match positions.depth(&lane, &group).await {
            // When the poller has gone the next turn ends this.
            Ok(depths) => drop(tell.send(depths).await),
            Err(error) => tracing::debug!(target: "kafka", "how far {lane} was read is unknown: {error}"),
        }
    }
}

struct Poller {
    lane: String,
    config: ClientConfig,
    client: Client,
    window: usize,
    give: mpsc::Sender<Vec<Taken>>,
    receipts: mpsc::UnboundedReceiver<Vec<Receipt>>,
    /// How far the group has come, as others see it.
    told: mpsc::Receiver<Vec<Depth>>,
    /// Answers in a row that have the client made anew.
    patience: u32,
    /// Taken from the client and not given on yet.
    pending: Vec<Taken>,
    /// Since when a whole batch waits for a reader that is busy.
    stuck: Option<Stopwatch>,
    paused: bool,
    clock: Clock,
    since_commit: Stopwatch,
    since_repeat: Stopwatch,
}

impl Poller {
    fn run(mut self) {
        while self.note_done() {
            if self.stuck.is_some() && !self.paused {
                // The reader is busy for a moment. Pausing now would throw away what was fetched ahead.
                std::thread::sleep(FULL);
            } else {
                self.poll();
            }
            self.give();
            self.hold_back();
            self.check();
            if self.since_commit.elapsed() >= COMMIT {
                self.commit();
            }
        }
        self.commit();
        let watch = self.clock.stopwatch();
        while self.client.context().committing.load(Ordering::Relaxed) && watch.elapsed() < LAST_COMMIT {
            drop(self.client.poll(POLL));
        }
    }

    /// Notes what is done; `false` when the other side has gone.
    fn note_done(&mut self) -> bool {
        loop {
            match self.receipts.try_recv() {
                Ok(receipts) => self.client.context().trackers().done(&receipts),
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => return false,
            }
        }
    }

    /// Takes what the client has, up to a batch; waits a moment when it has nothing.
    fn poll(&mut self) {
        let mut wait = match self.client.context().trackers().out() {
            0 => REST,
            _ if self.pending.is_empty() => POLL,
            _ => Duration::ZERO,
        };
        let mut bytes = bytes(&self.pending);
        while self.pending.len() < BATCH && bytes < BATCH_BYTES {
            let taken = match self.client.poll(wait) {
                None => return,
                Some(Err(error)) => Err(error),
                Some(Ok(message)) => Ok(self.client.context().trackers().take(&message)),
            };
            match taken {
                Ok(taken) => {
                    bytes += taken.value.len();
                    self.pending.push(taken);
                }
                Err(error) => return self.failed(&error),
            }
            wait = Duration::ZERO;
        }
    }

    /// Most errors pass by themselves; a client that is dead for good is replaced.
    fn failed(&mut self, error: &KafkaError) {
        tracing::debug!(target: "kafka", lane = self.lane, "{}: {error}", self.lane);
        if self.client.client().fatal_error().is_some() {
            self.renew(&error.to_string());
        }
    }

    /// Makes the client anew when records wait on its partitions and it does not get them.
    fn check(&mut self) {
        let Ok(depths) = self.told.try_recv() else { return };
        let takes = !self.paused && self.stuck.is_none() && self.pending.is_empty();
        let (unread, behind) = self.client.context().trackers().unread(&depths, takes);
        if unread >= self.patience {
            self.patience = (self.patience * 2).min(UNREAD_LIMIT);
            self.renew("records wait there and do not come; was the lane made anew?");
        } else if !behind {
            self.patience = UNREAD_MAX;
        }
    }

    fn renew(&mut self, why: &str) {
        match connect(&self.config, &self.lane) {
            Ok(client) => {
                tracing::warn!(target: "kafka", lane = self.lane, "the client of {} is made anew: {why}", self.lane);
                // Receipts of the old client must not count for the new one, nor its positions for the lane.
                let mut old = self.client.context().trackers();
                client.context().trackers().generation = old.generation + 1;
                old.partitions.clear();
                drop(old);
                let old = std::mem::replace(&mut self.client, client);
                self.paused = false;
                close(old);
            }
            Err(error) => tracing::warn!(target: "kafka", lane = self.lane, "{}: {error}", self.lane),
        }
    }

    fn give(&mut self) {
        if self.pending.is_empty() {
            return;
        }
        match self.give.try_send(std::mem::take(&mut self.pending)) {
            // A reader that has gone will drop the other end too.
            Ok(()) | Err(TrySendError::Closed(_)) => self.stuck = None,
            Err(TrySendError::Full(back)) => {
                if (back.len() >= BATCH || bytes(&back) >= BATCH_BYTES) && self.stuck.is_none() {
                    self.stuck = Some(self.clock.stopwatch());
                }
                self.pending = back;
            }
        }
    }

    /// Pauses when enough is out, and goes on when a good part of it is done: each change costs a refetch.
    fn hold_back(&mut self) {
        let (out, reassigned) = {
            let mut trackers = self.client.context().trackers();
            (trackers.out(), std::mem::take(&mut trackers.reassigned))
        };
        let stalled = self.stuck.as_ref().is_some_and(|since| since.elapsed() > STALLED);
        let full = stalled || out >= self.window;
        let roomy = self.pending.is_empty() && out <= self.window / 4 * 3;
        let pause = full || (self.paused && !roomy && !reassigned);
        // Partitions that have just come are not paused, and those that were there before may be.
        if pause == self.paused && !reassigned {
            return;
        }
        let changed = self.client.assignment().and_then(|all| match pause {
            true => self.client.pause(&all),
            false => self.client.resume(&all),
        });
        match changed {
            Ok(()) => self.paused = pause,
            Err(error) => {
                tracing::debug!(target: "kafka", "{} can't be paused or resumed: {error}", self.lane)
            }
        }
    }

    /// Sends the positions that have moved, and now and then the others.
    fn commit(&mut self) {
        self.since_commit = self.clock.stopwatch();
        let context = self.client.context();
        if self.since_repeat.elapsed() >= REPEAT {
            self.since_repeat = self.clock.stopwatch();
            context.trackers().repeat();
        }
        let positions = context.trackers().moved();
        commit(&self.client, &self.lane, &positions);
    }
}

/// Closes a client beside the work of the next: one that is stuck may never have left its group, and the crate waits
/// for that.
fn close(client: Client) {
    let closing = std::thread::Builder::new().name("kafka close".to_owned()).spawn(move || drop(client));
    if let Err(error) = closing {
        tracing::debug!(target: "kafka", "a client was closed at once, because no thread was to be had: {error}");
    }
}

fn commit(client: &BaseConsumer<Assignment>, lane: &str, positions: &[(i32, i64)]) {
    let mut list = TopicPartitionList::with_capacity(positions.len());
    for (partition, offset) in positions {
        if let Err(error) = list.add_partition_offset(lane, *partition, Offset::Offset(*offset)) {
            tracing::debug!(target: "kafka", "{lane}: {error}");
        }
    }
    if list.count() == 0 {
        return;
    }
    client.context().committing.store(true, Ordering::Relaxed);
    if let Err(error) = client.commit(&list, CommitMode::Async) {
        client.context().committing.store(false, Ordering::Relaxed);
        tracing::debug!(target: "kafka", "{lane}: positions were not committed: {error}");
    }
}

/// Bytes of the values of a batch.
fn bytes(batch: &[Taken]) -> usize {
    batch.iter().map(|taken| taken.value.len()).sum()
}

/// What is out of each assigned partition.
#[derive(Default)]
struct Trackers {
    partitions: BTreeMap<i32, Tracker>,
    generation: u32,
    reassigned: bool,
    /// What the broker last said of the group, and how often in a row it has now said that records wait where nobody moves
    /// on. Kept while no partition is ours.
    heard: Vec<Depth>,
    unmoved: u32,
}

#[derive(Default)]
struct Tracker {
    generation: u32,
    watermark: Watermark,
    committed: Option<i64>,
    last: Option<i64>,
    /// How often in a row the broker was heard to have records for us that did not come.
    unread: u32,
}

impl Trackers {
    fn assign(&mut self, partitions: &[i32]) {
        self.generation += 1;
        self.reassigned = true;
        (self.heard, self.unmoved) = (Vec::new(), 0);
        for partition in partitions {
            let tracker = Tracker { generation: self.generation, ..Tracker::default() };
            self.partitions.insert(*partition, tracker);
        }
    }

    fn take(&mut self, message: &BorrowedMessage<'_>) -> Taken {
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

    fn done(&mut self, receipts: &[Receipt]) {
        for receipt in receipts {
            if let Some(tracker) = self.partitions.get_mut(&receipt.partition)
                && tracker.generation == receipt.generation
            {
                tracker.watermark.done(receipt.offset);
            }
        }
    }

    fn out(&self) -> usize {
        self.partitions.values().map(|tracker| tracker.watermark.out()).sum()
    }

    /// Compares with what the broker says of the group. Returns how often in a row it has now said of some partition
    /// of ours that records wait there while we have none of them, and whether it says so of any. Means nothing
    /// while we do not take (`takes`). While no partition is ours, those count where nobody moves on.
    fn unread(&mut self, depths: &[Depth], takes: bool) -> (u32, bool) {
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
    fn repeat(&mut self) {
        self.partitions.values_mut().for_each(|tracker| tracker.committed = None);
    }

    /// The positions that have moved since they were last asked for.
    fn moved(&mut self) -> Vec<(i32, i64)> {
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

/// The client's context: it is told of assignments from inside the poll.
#[derive(Default)]
struct Assignment {
    log: LogContext,
    // Only the polling thread comes here; the lock is what the context's sharing asks for.
    trackers: Mutex<Trackers>,
    committing: Arc<AtomicBool>,
}

impl Assignment {
    fn trackers(&self) -> MutexGuard<'_, Trackers> {
        self.trackers.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn partitions(list: &TopicPartitionList) -> Vec<i32> {
    list.elements().iter().map(rdkafka::topic_partition_list::TopicPartitionListElem::partition).collect()
}

impl ClientContext for Assignment {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        self.log.log(level, facility, message);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        self.log.error(error, reason);
    }
}

impl ConsumerContext for Assignment {
    fn pre_rebalance(&self, client: &BaseConsumer<Self>, rebalance: &Rebalance<'_>) {
        match rebalance {
            Rebalance::Assign(list) => self.trackers().assign(&partitions(list)),
            Rebalance::Revoke(list) => {
                let revoked = partitions(list);
                let moved = self.trackers().moved();
                // A lost assignment can't be committed any more; the attempt then fails, and does no harm.
                if let Some(first) = list.elements().first() {
                    commit(client, first.topic(), &moved);
                }
                self.trackers().partitions.retain(|partition, _| !revoked.contains(partition));
            }
            Rebalance::Error(error) => tracing::debug!(target: "kafka", "rebalance: {error}"),
        }
    }

    fn commit_callback(&self, result: KafkaResult<()>, _offsets: &TopicPartitionList) {
        self.committing.store(false, Ordering::Relaxed);
        if let Err(error) = result {
            tracing::debug!(target: "kafka", "positions were not committed: {error}");
        }
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
