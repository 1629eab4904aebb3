//! Puts batches on their lanes, and notes in the store where they are. Producer and janitor of a process share it, so
//! that each knows of the other's batches.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;

use crate::lane::dead_letter_of;
use crate::message::Verdict;
use crate::queue::{LaneRecord, QueueError};
use crate::service::{self, Backoff, Context};
use crate::store::{
    Begin, InstanceId, LeaseId, LogPosition, Record, Records, Reissue, StoreError, Suspect, Wanted,
};
use crate::ticket::{BatchId, Ticket};

/// Batches of one lane that are with the broker at once. One is enough for a broker that answers within the time that a
/// claim takes; more bridge the pauses of one that does not.
const AT_ONCE: usize = 8;

/// How long a stop waits for what is being published. A broker that answers takes milliseconds.
const DRAIN: Duration = Duration::from_secs(10);

/// Publishes the batches of a process, each beside the work of the service that it comes from. Its clones are one.
#[derive(Clone)]
pub struct Publisher {
    context: Context,
    tasks: TaskTracker,
    // A plain lock, held for a look-up: never over an await.
    under_way: Arc<Mutex<UnderWay>>,
}

#[derive(Default)]
struct UnderWay {
    /// With their lanes.
    batches: BTreeMap<BatchId, String>,
    /// Each lane's turns: a lane that takes nothing keeps no other waiting.
    lanes: BTreeMap<String, Arc<Semaphore>>,
}

/// A batch that is on its way, until this is dropped.
struct Known {
    batch: BatchId,
    publisher: Publisher,
}

impl Drop for Known {
    fn drop(&mut self) {
        self.publisher.lock().batches.remove(&self.batch);
    }
}

impl Publisher {
    /// A publisher with nothing on its way.
    pub fn new(context: Context) -> Publisher {
        Publisher { context, tasks: TaskTracker::new(), under_way: Arc::default() }
    }

    fn lock(&self) -> MutexGuard<'_, UnderWay> {
        self.under_way.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Publishes a batch as soon as its lane has a turn for it. When `stop` comes first, the janitor of another process
    /// issues it again.
    pub(crate) fn publish(
        &self,
        lane: String,
        batch: BatchId,
        tickets: Vec<Ticket>,
        stop: &CancellationToken,
    ) {
        let turns = {
            let mut under_way = self.lock();
            under_way.batches.insert(batch, lane.clone());
            let turns = under_way.lanes.entry(lane.clone());
            Arc::clone(turns.or_insert_with(|| Arc::new(Semaphore::new(AT_ONCE))))
        };
        let known = Known { batch, publisher: self.clone() };
        let (context, stop) = (self.context.clone(), stop.clone());
        self.tasks.spawn(async move {
            // The semaphore is never closed.
            let _turn = turns.acquire().await;
            publish(&context, &lane, batch, &tickets, &stop).await;
            drop(known);
        });
    }

    /// Issues what is left in a batch or lease again, in a new batch of `owner`'s. Returns how many deliveries were left.
    ///
    /// # Errors
    /// Those of the store. It may hold the new batch all the same, unknown to this process.
    pub(crate) async fn reissue(
        &self,
        suspect: Suspect,
        owner: InstanceId,
        stop: &CancellationToken,
    ) -> Result<usize, StoreError> {
        let (batch, now) = (BatchId::random(), self.context.clock.now());
        let Some(reissued) = self.context.store.reissue(&Reissue { suspect, batch, owner, now }).await?
        else {
            return Ok(0);
        };
        let count = reissued.tickets.len();
        self.publish(reissued.lane, batch, reissued.tickets, stop);
        Ok(count)
    }

    /// Whether a batch is on its way to its lane.
    pub(crate) fn knows(&self, batch: BatchId) -> bool {
        self.lock().batches.contains_key(&batch)
    }

    /// Whether all turns of a lane are taken.
    pub(crate) fn is_busy(&self, lane: &str) -> bool {
        self.lock().batches.values().filter(|to| *to == lane).nth(AT_ONCE - 1).is_some()
    }

    /// How many batches are on their way, or wait for their turn.
    pub(crate) fn len(&self) -> usize {
        self.lock().batches.len()
    }

    /// Waits for what is on its way when a service stops; how many batches are left.
    pub(crate) async fn drain(&self) -> usize {
        self.tasks.close();
        // What is left is issued again by another process.
        let _ = tokio::time::timeout(DRAIN, self.tasks.wait()).await;
        self.len()
    }
}

/// The record of a ticket. It has no headers: they cost 2.8 us a message from end to end (measured with a prototype).
pub fn lane_record(ticket: &Ticket) -> LaneRecord {
    LaneRecord { key: ticket.key(), value: ticket.encode(), headers: Vec::new() }
}

/// What became of the tickets of a batch.
#[derive(Default)]
struct Published<'a> {
    /// Where the last of them is.
    at: Option<LogPosition>,
    /// Those that are larger than the lane takes.
    refused: Vec<&'a Ticket>,
}

/// Publishes a batch, and tries again until the broker has it: what is published twice is stale once it has begun.
async fn publish(
    context: &Context,
    lane: &str,
    batch: BatchId,
    tickets: &[Ticket],
    stop: &CancellationToken,
) {
    let watch = context.clock.stopwatch();
    let mut backoff = Backoff::new(&format!("publishing on {lane}"));
    let published = loop {
        let error = match put(context, lane, tickets).await {
            Ok(published) => break published,
            Err(error) => error,
        };
        let wait = backoff.failed(&error);
        // A lane that is missing is the usual reason, and mending it is idempotent.
        if let Err(error) = context.queue.ensure(&[lane.to_owned()]).await {
            tracing::debug!(lane, "{lane} could not be made sure of: {error}");
        }
        tokio::select! {
            biased;
            () = stop.cancelled() => return,
            () = tokio::time::sleep(wait) => {}
        }
    };
    backoff.succeeded();
    context.metrics.batch("publish", tickets.len(), watch.elapsed());
    if let Some(at) = published.at {
        service::persist("batches", stop, || context.store.acknowledge(batch, at)).await;
    }
    if !published.refused.is_empty() {
        let (lease, tried) = (LeaseId::random(), AtomicBool::new(false));
        let end = || end(context, lane, &published.refused, lease, tried.swap(true, Ordering::Relaxed));
        service::persist("refused tickets", stop, end).await;
    }
}

/// Publishes all tickets together. When the lane takes no record as large as one of them, or not so many bytes at once,
/// the halves go apart, down to the tickets that it never takes.
async fn put<'a>(context: &Context, lane: &str, tickets: &'a [Ticket]) -> Result<Published<'a>, QueueError> {
    let records = tickets.iter().map(lane_record).collect();
    match (context.queue.publish(lane, records).await, tickets) {
        (Ok(at), _) => Ok(Published { at: Some(at), refused: Vec::new() }),
        (Err(QueueError::TooLarge(_)), [ticket]) => Ok(Published { at: None, refused: vec![ticket] }),
        (Err(QueueError::TooLarge(_)), _) => {
            let (first, second) = tickets.split_at(tickets.len() / 2);
            let mut published = Box::pin(put(context, lane, first)).await?;
            let rest = Box::pin(put(context, lane, second)).await?;
            published.at = rest.at.or(published.at);
            published.refused.extend(rest.refused);
            Ok(published)
        }
        (Err(error), _) => Err(error),
    }
}

/// Ends messages whose tickets no lane takes: nothing else would. They are begun for it, so that nobody else does.
async fn end(
    context: &Context,
    lane: &str,
    tickets: &[&Ticket],
    lease: LeaseId,
    repeated: bool,
) -> Result<(), String> {
    let owner = context.presence.instance().ok_or_else(|| "not enrolled in the store yet".to_owned())?;
    let Some(first) = tickets.first() else { return Ok(()) };
    let positions = tickets.iter().map(|ticket| usize::from(ticket.position)).collect();
    let wanted = [Wanted { lease, batch: first.batch, positions }];
    let begin = Begin { wanted: &wanted, repeated, owner };
    let begun = context.store.begin(&begin).await.map_err(|error| error.to_string())?;
    let directory = context.directory.snapshot();
    let dead_letters = dead_letter_of(lane, &directory.lanes);
    let (mut records, now) = (Vec::new(), context.clock.now());
    for begun in begun {
        let of_batch = tickets.iter().filter(|ticket| begun.positions.has(usize::from(ticket.position)));
        records.extend(of_batch.map(|ticket| Record {
            ticket: Arc::new((*ticket).clone()),
            lane: lane.into(),
            lease: begun.lease,
            root: begun.root,
            outcome: None,
            verdict: Verdict::Dead {
                reason: format!("its ticket has {} bytes, more than {lane} takes", ticket.encode().len()),
                lane: dead_letters.to_owned(),
            },
            judged_at: now,
        }));
    }
    for record in &records {
        let id = record.ticket.id;
        tracing::error!(lane, id = id.0, "message {id} is dead: its ticket is larger than {lane} takes");
    }
    let records = Records { records: &records, now };
    context.store.record(&records).await.map(drop).map_err(|error| error.to_string())
}
