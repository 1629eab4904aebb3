//! A queue whose calls fail, whose batches arrive in part, and whose commits are late or lost. What the broker itself
//! loses or gives twice is among the events.

use std::sync::Arc;
use std::time::Duration;

use ams::lane::Lane;
use ams::message::MessageId;
use ams::queue::{Depth, LaneRecord, Queue, QueueError, Receipt, Result, Subscription};
use ams::store::LogPosition;
use async_trait::async_trait;
use tokio::sync::mpsc;

use super::Part;
use crate::node::Process;
use crate::world::World;

/// The queue that one process sees.
pub struct FaultyQueue {
    pub world: Arc<World>,
    pub process: Arc<Process>,
}

impl FaultyQueue {
    async fn call<T>(&self, call: impl Future<Output = Result<T>>) -> Result<T> {
        self.world.faults.call(Part::Queue, &self.process, QueueError::Unavailable, call).await
    }

    /// The broker takes all records, or only the first ones.
    async fn put(&self, lane: &str, mut records: Vec<LaneRecord>) -> Result<LogPosition> {
        if self.world.faults.is_partial() {
            records.truncate(fastrand::usize(0..records.len()));
            if !records.is_empty() {
                self.world.queue.publish(lane, records).await?;
            }
            return Err(QueueError::Unavailable("the simulation lost some of the records".to_owned()));
        }
        if Lane::is_terminal(lane) {
            self.note_letters(&records);
        }
        self.world.queue.publish(lane, records).await
    }

    fn note_letters(&self, letters: &[LaneRecord]) {
        for (_, id) in letters.iter().flat_map(|letter| &letter.headers).filter(|header| header.0 == "ams-id")
        {
            self.world.history.lock().unwrap().of(MessageId(id.parse().unwrap())).letters += 1;
            self.world.faults.count("dead letters published", 1);
        }
    }
}

#[async_trait]
impl Queue for FaultyQueue {
    fn kind(&self) -> &'static str {
        "embedded"
    }

    async fn ensure(&self, lanes: &[String]) -> Result<()> {
        self.call(self.world.queue.ensure(lanes)).await
    }

    async fn publish(&self, lane: &str, records: Vec<LaneRecord>) -> Result<LogPosition> {
        self.call(self.put(lane, records)).await
    }

    async fn subscribe(&self, lane: &str, group: &str, window: usize) -> Result<Subscription> {
        let subscribe = async {
            let mut subscription = self.world.queue.subscribe(lane, group, window).await?;
            let (done, receipts) = mpsc::unbounded_channel();
            let commit = std::mem::replace(&mut subscription.done, done);
            tokio::spawn(commit_later(Arc::clone(&self.process), receipts, commit));
            Ok(subscription)
        };
        self.call(subscribe).await
    }

    async fn depth(&self, lane: &str, group: &str) -> Result<Vec<Depth>> {
        self.call(self.world.queue.depth(lane, group)).await
    }

    async fn ping(&self) -> Result<()> {
        self.call(self.world.queue.ping()).await
    }
}

/// Commits what is done some time later, as clients of brokers do. A process that dies takes with it what it has not
/// committed; one that leaves in order commits the rest.
async fn commit_later(
    process: Arc<Process>,
    mut receipts: mpsc::UnboundedReceiver<Vec<Receipt>>,
    commit: mpsc::UnboundedSender<Vec<Receipt>>,
) {
    let mut done = Vec::new();
    let mut open = true;
    while open {
        match receipts.recv().await {
            Some(more) => done.extend(more),
            None => open = false,
        }
        let period = Duration::from_millis(fastrand::u64(0..400));
        let more = async {
            while let Some(more) = receipts.recv().await {
                done.extend(more);
            }
        };
        open &= tokio::time::timeout(period, more).await.is_err();
        if process.is_dead() {
            return;
        }
        // The subscription may have ended.
        let _ = commit.send(std::mem::take(&mut done));
    }
}
