//! Puts a batch on its lane, and notes in the store where it is.

use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use tokio::task::JoinSet;

use tokio_util::sync::CancellationToken;

use crate::lane::dead_letter_of;
use crate::message::Verdict;
use crate::queue::{LaneRecord, QueueError};
use crate::service::{self, Backoff, Parts};
use crate::store::{Begin, LeaseId, LogPosition, Record, Records, Wanted};
use crate::ticket::{BatchId, Ticket};

/// Batches that a service has with the broker at once. One is enough for a broker that answers within the time that a
/// claim takes; more bridge the pauses of one that does not.
pub(crate) const PUBLISHING_MAX: usize = 8;

/// How long a stop waits for what is being published. A broker that answers takes milliseconds.
const DRAIN: Duration = Duration::from_secs(10);

/// Waits for what is being published when a service stops; how many batches are left.
pub(crate) async fn drain(publishing: &mut JoinSet<()>) -> usize {
    let drained = async { while publishing.join_next().await.is_some() {} };
    match tokio::time::timeout(DRAIN, drained).await {
        Ok(()) => 0,
        Err(_) => publishing.len(),
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
/// When `stop` comes first, the janitor of another process issues the batch again.
pub(crate) async fn publish(
    parts: &Parts,
    lane: &str,
    batch: BatchId,
    tickets: &[Ticket],
    stop: &CancellationToken,
) {
    let watch = parts.clock.stopwatch();
    let mut backoff = Backoff::new(&format!("publishing on {lane}"));
    let published = loop {
        let error = match put(parts, lane, tickets).await {
            Ok(published) => break published,
            Err(error) => error,
        };
        let wait = backoff.failed(&error);
        // A lane that is missing is the usual reason, and mending it is idempotent.
        if let Err(error) = parts.queue.ensure(&[lane.to_owned()]).await {
            tracing::debug!(lane, "{lane} could not be made sure of: {error}");
        }
        tokio::select! {
            () = stop.cancelled() => return,
            () = tokio::time::sleep(wait) => {}
        }
    };
    backoff.succeeded();
    parts.metrics.batch("publish", tickets.len(), watch.elapsed());
    if let Some(at) = published.at {
        service::persist("batches", stop, || parts.store.acknowledge(batch, at)).await;
    }
    if !published.refused.is_empty() {
        let (lease, tried) = (LeaseId::random(), AtomicBool::new(false));
        let end = || end(parts, lane, &published.refused, lease, tried.swap(true, Ordering::Relaxed));
        service::persist("refused tickets", stop, end).await;
    }
}

/// Publishes all tickets together. When the lane takes no record as large as one of them, or not so many bytes at once,
/// the halves go apart, down to the tickets that it never takes.
async fn put<'a>(parts: &Parts, lane: &str, tickets: &'a [Ticket]) -> Result<Published<'a>, QueueError> {
    let records = tickets.iter().map(lane_record).collect();
    match (parts.queue.publish(lane, records).await, tickets) {
        (Ok(at), _) => Ok(Published { at: Some(at), refused: Vec::new() }),
        (Err(QueueError::TooLarge(_)), [ticket]) => Ok(Published { at: None, refused: vec![ticket] }),
        (Err(QueueError::TooLarge(_)), _) => {
            let (first, second) = tickets.split_at(tickets.len() / 2);
            let mut published = Box::pin(put(parts, lane, first)).await?;
            let rest = Box::pin(put(parts, lane, second)).await?;
            published.at = rest.at.or(published.at);
            published.refused.extend(rest.refused);
            Ok(published)
        }
        (Err(error), _) => Err(error),
    }
}

/// Ends messages whose tickets no lane takes: nothing else would. They are begun for it, so that nobody else does.
async fn end(
    parts: &Parts,
    lane: &str,
    tickets: &[&Ticket],
    lease: LeaseId,
    repeated: bool,
) -> Result<(), String> {
    let owner = parts.presence.instance().ok_or_else(|| "not enrolled in the store yet".to_owned())?;
    let Some(first) = tickets.first() else { return Ok(()) };
    let positions = tickets.iter().map(|ticket| usize::from(ticket.position)).collect();
    let wanted = [Wanted { lease, batch: first.batch, positions }];
    let begin = Begin { wanted: &wanted, repeated, owner };
    let begun = parts.store.begin(&begin).await.map_err(|error| error.to_string())?;
    let directory = parts.directory.snapshot();
    let dead_letters = dead_letter_of(lane, &directory.lanes);
    let mut records = Vec::new();
    for begun in begun {
        let of_batch = tickets.iter().filter(|ticket| begun.positions.has(usize::from(ticket.position)));
        records.extend(of_batch.map(|ticket| Record {
            ticket: (*ticket).clone(),
            lane: lane.to_owned(),
            lease: begun.lease,
            root: begun.root,
            outcome: None,
            verdict: Verdict::Dead {
                reason: format!("its ticket has {} bytes, more than {lane} takes", ticket.encode().len()),
                lane: dead_letters.to_owned(),
            },
        }));
    }
    for record in &records {
        let id = record.ticket.id;
        tracing::error!(lane, id = id.0, "message {id} is dead: its ticket is larger than {lane} takes");
    }
    let records = Records { records: &records, now: parts.clock.now() };
    parts.store.record(&records).await.map(drop).map_err(|error| error.to_string())
}
