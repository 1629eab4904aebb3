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

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};
use std::time::Duration;

use rdkafka::client::ClientContext;
use rdkafka::config::{ClientConfig, RDKafkaLogLevel};
use rdkafka::consumer::{BaseConsumer, CommitMode, Consumer, ConsumerContext, Rebalance};
use rdkafka::error::{KafkaError, KafkaResult};
use rdkafka::topic_partition_list::{Offset, TopicPartitionList};
use tokio::sync::mpsc::{self, error::TryRecvError, error::TrySendError};
use tokio::sync::oneshot;

use super::log::LogContext;
use super::positions::Positions;
use super::trackers::Trackers;
use super::{lock, refused};
use crate::clock::{Clock, Stopwatch};
use crate::queue::{Depth, QueueError, Receipt, Result, Subscription, Taken};

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
/// How often positions are committed. The producer learns from them how much room there is on the lane: with this and its
/// own looks it knows of a ticket that was taken up within 80 ms, in which a lane that holds a third of a second's work
/// does not run dry.
const COMMIT: Duration = Duration::from_millis(50);
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
/// After so many answers that the poller has not taken it counts as stuck: it looks for one every 100 ms at least. Calls that
/// pause and resume wait for librdkafka's threads without a limit; a consumer was seen that read nothing after a restart
/// of the broker, and that did not see how far behind it was.
const UNTAKEN_MAX: u32 = 3;
/// How long the end waits for its last commit.
const LAST_COMMIT: Duration = Duration::from_secs(1);

type Client = BaseConsumer<Assignment>;

/// Starts a subscription: its poller, and who watches over it.
pub(super) fn subscribe(
    config: &ClientConfig,
    lane: &str,
    group: &str,
    window: usize,
    positions: Arc<Positions>,
) -> Result<Subscription> {
    let (subscription, shared) = prepare(config, lane, group, window);
    let tell = start(&shared)?;
    tokio::spawn(watch(positions, group.to_owned(), shared, tell));
    Ok(subscription)
}

/// A subscription without a poller.
fn prepare(config: &ClientConfig, lane: &str, group: &str, window: usize) -> (Subscription, Arc<Shared>) {
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
        // Its poller polls every two seconds at least. One that is stuck leaves its partitions to the next.
        .set("max.poll.interval.ms", "15000")
        .set("fetch.queue.backoff.ms", "10")
        .set("fetch.wait.max.ms", "250")
        .set("fetch.error.backoff.ms", "200")
        .set("queued.min.messages", "2000")
        .set("queued.max.messages.kbytes", "32768");
    let (give, taken) = mpsc::channel(2);
    let (done, receipts) = mpsc::unbounded_channel();
    let (ended, closed) = oneshot::channel();
    let shared = Arc::new(Shared {
        lane: lane.to_owned(),
        config,
        window,
        give,
        receipts: Mutex::new(receipts),
        current: AtomicU32::new(0),
        ended: Mutex::new(Some(ended)),
    });
    (Subscription { taken, done, closed }, shared)
}

/// What the pollers of a subscription have in common. One after the other is its poller: one that is stuck in a call of
/// librdkafka's is left there, and holds none of these locks.
struct Shared {
    lane: String,
    config: ClientConfig,
    window: usize,
    give: mpsc::Sender<Vec<Taken>>,
    /// Locked by the poller for as long as it takes what is there.
    receipts: Mutex<mpsc::UnboundedReceiver<Vec<Receipt>>>,
    /// The number of the poller whose turn it is.
    current: AtomicU32,
    ended: Mutex<Option<oneshot::Sender<()>>>,
}

/// Starts the subscription's next poller, on a thread of its own. Returns how to tell it how far the group has come.
fn start(shared: &Arc<Shared>) -> Result<mpsc::Sender<Vec<Depth>>> {
    let number = shared.current.fetch_add(1, Ordering::Relaxed) + 1;
    let client = connect(&shared.config, &shared.lane)?;
    // Receipts of the poller before must not count for this one.
    client.context().trackers().generation = number << 16;
    let clock = Clock::system();
    let (tell, told) = mpsc::channel(1);
    let poller = Poller {
        shared: Arc::clone(shared),
        number,
        client,
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
        .name(format!("kafka {}", shared.lane))
        .spawn(move || poller.run())
        .map_err(|error| QueueError::Unavailable(format!("no thread for a subscription: {error}")))?;
    Ok(tell)
}

fn connect(config: &ClientConfig, lane: &str) -> Result<Client> {
    let client: Client = config.create_with_context(Assignment::default()).map_err(refused)?;
    client.subscribe(&[lane]).map_err(refused)?;
    Ok(client)
}

/// Asks how far the group has come, for as long as anybody wants to know, and tells the poller. One that does not take what
/// it is told is replaced.
async fn watch(
    positions: Arc<Positions>,
    group: String,
    shared: Arc<Shared>,
    mut tell: mpsc::Sender<Vec<Depth>>,
) {
    let (lane, mut untaken) = (&shared.lane, 0);
    loop {
        tokio::select! {
            () = tell.closed() => return,
            () = tokio::time::sleep(WATCH) => {}
        }
        let depths = match positions.depth(lane, &group).await {
            Ok(depths) => depths,
            Err(error) => {
                tracing::debug!(target: "kafka", lane, "how far {lane} was read is unknown: {error}");
                continue;
            }
        };
        untaken = match tell.try_send(depths) {
            Ok(()) => 0,
            Err(TrySendError::Full(_)) => untaken + 1,
            Err(TrySendError::Closed(_)) => return,
        };
        if untaken >= UNTAKEN_MAX {
            tracing::warn!(target: "kafka", lane, "the poller of {lane} is stuck in its client; another takes its place");
            match start(&shared) {
                Ok(next) => (tell, untaken) = (next, 0),
                Err(error) => tracing::warn!(target: "kafka", lane, "{lane}: {error}"),
            }
        }
    }
}

struct Poller {
    shared: Arc<Shared>,
    number: u32,
    client: Client,
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
        while self.is_current() && self.note_done() {
            if self.stuck.is_some() && !self.paused {
                // The reader is busy for a moment. Pausing now would throw away what was fetched ahead, and the next
                // fetch takes up to half a second.
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
        if !self.is_current() {
            return;
        }
        self.commit();
        let watch = self.clock.stopwatch();
        while self.client.context().committing.load(Ordering::Relaxed) && watch.elapsed() < LAST_COMMIT {
            drop(self.client.poll(POLL));
        }
        let shared = Arc::clone(&self.shared);
        drop(self);
        if let Some(ended) = lock(&shared.ended).take() {
            // Whoever dropped the subscription does not wait.
            let _ = ended.send(());
        }
    }

    /// Whether no other has taken its place.
    fn is_current(&self) -> bool {
        self.shared.current.load(Ordering::Relaxed) == self.number
    }

    /// Notes what is done; `false` when the other side has gone.
    fn note_done(&mut self) -> bool {
        let mut receipts = lock(&self.shared.receipts);
        loop {
            match receipts.try_recv() {
                Ok(receipts) => self.client.context().trackers().done(&receipts),
                Err(TryRecvError::Empty) => return true,
                Err(TryRecvError::Disconnected) => return false,
            }
        }
    }

    /// Takes what the client has, up to a batch; waits a moment when it has nothing. Polls once at least: a client that is
    /// not polled for `max.poll.interval.ms` loses its place in the group, paused or not.
    fn poll(&mut self) {
        let mut wait = match self.client.context().trackers().out() {
            0 => REST,
            _ if self.paused || self.pending.is_empty() => POLL,
            // What is pending has been offered, and the reader was busy.
            _ => FULL,
        };
        let mut bytes = bytes(&self.pending);
        loop {
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
            if self.pending.len() >= BATCH || bytes >= BATCH_BYTES {
                return;
            }
            wait = Duration::ZERO;
        }
    }

    /// Most errors pass by themselves; a client that is dead for good is replaced.
    fn failed(&mut self, error: &KafkaError) {
        tracing::debug!(target: "kafka", lane = self.shared.lane, "{}: {error}", self.shared.lane);
        if self.client.client().fatal_error().is_some() {
            self.renew(&error.to_string());
        }
    }

    /// Makes the client anew when records wait on its partitions and it does not get them.
    fn check(&mut self) {
        let Ok(depths) = self.told.try_recv() else { return };
        let takes = !self.paused && self.stuck.is_none() && self.pending.is_empty();
        let (unread, behind) = self.client.context().trackers().unread(&depths, takes);
        if behind {
            let (lane, out) = (&self.shared.lane, self.client.context().trackers().out());
            tracing::debug!(target: "kafka", lane, unread, takes, out, paused = self.paused, "{lane} is behind: {depths:?}");
        }
        if unread >= self.patience {
            self.patience = (self.patience * 2).min(UNREAD_LIMIT);
            self.renew("records wait there and do not come; was the lane made anew?");
        } else if !behind {
            self.patience = UNREAD_MAX;
        }
    }

    fn renew(&mut self, why: &str) {
        match connect(&self.shared.config, &self.shared.lane) {
            Ok(client) => {
                tracing::warn!(target: "kafka", lane = self.shared.lane, "the client of {} is made anew: {why}", self.shared.lane);
                // Receipts of the old client must not count for the new one, nor its positions for the lane.
                let mut old = self.client.context().trackers();
                client.context().trackers().generation = old.generation + 1;
                old.partitions.clear();
                drop(old);
                let old = std::mem::replace(&mut self.client, client);
                self.paused = false;
                close(old);
            }
            Err(error) => {
                tracing::warn!(target: "kafka", lane = self.shared.lane, "{}: {error}", self.shared.lane)
            }
        }
    }

    fn give(&mut self) {
        let mut busy = false;
        if !self.pending.is_empty() {
            match self.shared.give.try_send(std::mem::take(&mut self.pending)) {
                // A reader that has gone will drop the other end too.
                Ok(()) | Err(TrySendError::Closed(_)) => {}
                Err(TrySendError::Full(back)) => {
                    busy = back.len() >= BATCH || bytes(&back) >= BATCH_BYTES;
                    self.pending = back;
                }
            }
        }
        if !busy && self.client.context().trackers().out() < self.shared.window {
            self.stuck = None;
        } else if self.stuck.is_none() {
            self.stuck = Some(self.clock.stopwatch());
        }
    }

    /// Pauses when the reader has been busy for long, and goes on when a good part of what is out is done.
    fn hold_back(&mut self) {
        let (out, reassigned) = {
            let mut trackers = self.client.context().trackers();
            (trackers.out(), std::mem::take(&mut trackers.reassigned))
        };
        let stalled = self.stuck.as_ref().is_some_and(|since| since.elapsed() > STALLED);
        let roomy = self.pending.is_empty() && out <= self.shared.window / 4 * 3;
        let pause = stalled || (self.paused && !roomy && !reassigned);
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
                tracing::debug!(target: "kafka", "{} can't be paused or resumed: {error}", self.shared.lane)
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
        commit(&self.client, &self.shared.lane, &positions);
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
        lock(&self.trackers)
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
    use crate::queue::Queue;
    use crate::queue::conformance::{self, receipts, records, take};
    use crate::queue::kafka::real::queue;

    #[tokio::test]
    async fn a_poller_that_is_stuck_is_replaced_and_nothing_is_passed_over() {
        let (queue, lane) = (queue(), conformance::lane());
        queue.ensure(std::slice::from_ref(&lane)).await.unwrap();
        let (mut subscription, shared) = prepare(&queue.config, &lane, &lane, 1_000);
        let tell = start(&shared).unwrap();
        tokio::spawn(watch(Arc::clone(&queue.positions), lane.clone(), Arc::clone(&shared), tell));
        queue.publish(&lane, records(0..100)).await.unwrap();
        let first = take(&mut subscription, 100).await;
        subscription.done.send(receipts(&first)).unwrap();
        // Whoever holds what the poller needs keeps it from everything else.
        let (held, release) = (Arc::clone(&shared), std::sync::mpsc::channel::<()>());
        let holder = std::thread::spawn(move || {
            let _receipts = lock(&held.receipts);
            release.1.recv().unwrap_err();
        });
        queue.publish(&lane, records(100..200)).await.unwrap();
        let replaced = async {
            while shared.current.load(Ordering::Relaxed) == 1 {
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        };
        tokio::time::timeout(Duration::from_secs(40), replaced).await.expect("another takes its place");
        drop(release.0);
        holder.join().unwrap();
        let mut keys = std::collections::BTreeSet::new();
        while keys.len() < 100 {
            let more = tokio::time::timeout(Duration::from_secs(40), subscription.taken.recv()).await;
            let more = more.expect("the rest comes").expect("the subscription goes on");
            subscription.done.send(receipts(&more)).unwrap();
            keys.extend(
                more.into_iter()
                    .map(|taken| taken.value)
                    .filter(|value| first.iter().all(|seen| seen.value != *value)),
            );
        }
        subscription.close().await;
    }
}
