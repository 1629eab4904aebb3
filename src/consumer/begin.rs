//! From records of a lane to messages that may be tried: parse, then begin or hold, in batches.

use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use crate::clock::Timestamp;
use crate::message::{Epoch, Held, MessageId, Ticket};
use crate::queue::{RECORD_MAX, Receipt, Taken};
use crate::service::{self, Parts};
use crate::store::{Begin, BegunMessage, Endpoint, InstanceId, LeaseId};

/// Tickets begun in one call, at most.
pub(super) const BATCH: usize = 2_000;

/// Tickets that wait for the next begin call.
#[derive(Debug, Default)]
pub(super) struct Arrivals {
    /// Admitted: to be begun.
    pub(super) admitted: Vec<Admitted>,
    /// The records they came from.
    pub(super) receipts: Vec<Receipt>,
}

impl Arrivals {
    pub(super) fn is_empty(&self) -> bool {
        self.receipts.is_empty()
    }

    pub(super) fn len(&self) -> usize {
        self.receipts.len()
    }
}

/// A ticket whose endpoint has room for it.
#[derive(Debug)]
pub(super) struct Admitted {
    pub(super) ticket: Ticket,
    pub(super) endpoint: Arc<Endpoint>,
    pub(super) ready_at: Timestamp,
}

/// Tickets that were not admitted: their rows are to be held.
#[derive(Debug, Default)]
pub(super) struct Refused {
    pub(super) rows: Vec<(MessageId, Epoch, Held)>,
    /// The records they came from.
    pub(super) receipts: Vec<Receipt>,
}

/// A message that this process is to try.
#[derive(Debug)]
pub(super) struct Job {
    pub(super) ticket: Ticket,
    pub(super) endpoint: Arc<Endpoint>,
    pub(super) instance: InstanceId,
    pub(super) lease: Arc<Lease>,
    /// The number of this try, over all lanes and on this one.
    pub(super) attempt: i32,
    pub(super) lane_try: i32,
    /// When its ticket was published, or due if that was later.
    pub(super) ready_at: Timestamp,
    /// Its place among the messages that wait for a slot; the desk gives it.
    pub(super) turn: u64,
}

/// A begun group; the recorder counts down what of it is not recorded yet.
#[derive(Debug)]
pub(super) struct Lease {
    pub(super) id: LeaseId,
    pub(super) unrecorded: std::sync::atomic::AtomicUsize,
}

/// What a begin call came to.
#[derive(Debug, Default)]
pub(super) struct Started {
    pub(super) jobs: Vec<Job>,
    /// Endpoints of admitted tickets that were stale: they leave the window again.
    pub(super) stale: Vec<Arc<Endpoint>>,
    /// Records that are done with.
    pub(super) receipts: Vec<Receipt>,
}

/// The ticket in a record.
pub(super) fn parse(taken: &Taken) -> Result<Ticket, String> {
    if taken.is_cut() {
        return Err(format!("the record has {} bytes; a ticket has at most {RECORD_MAX}", taken.size));
    }
    let text =
        std::str::from_utf8(&taken.value).map_err(|error| format!("the record is not UTF-8: {error}"))?;
    serde_json::from_str(text).map_err(|error| format!("the record is not a ticket: {error}"))
}

/// Does what is to be done with a group of arrivals; waits for the store as long as it takes. When
/// `stop` comes first, nothing is said to be done, and the tickets will come again.
pub(super) async fn start(parts: Parts, arrivals: Arrivals, stop: CancellationToken) -> Started {
    let watch = parts.clock.stopwatch();
    let Some((lease, instance, messages)) = begin(&parts, &arrivals.admitted, &stop).await else {
        let stale = arrivals.admitted.into_iter().map(|admitted| admitted.endpoint).collect();
        return Started { stale, ..Started::default() };
    };
    if !messages.is_empty() {
        parts.metrics.batch("begin", messages.len(), watch.elapsed());
    }
    let mut started = sort(arrivals.admitted, lease, instance, messages);
    parts.metrics.stale("begin", started.stale.len());
    started.receipts = arrivals.receipts;
    started
}

/// Tells begun from stale. A ticket that came twice in one batch was begun once; of several tickets of one
/// message at most one was.
fn sort(
    admitted: Vec<Admitted>,
    lease: LeaseId,
    instance: InstanceId,
    messages: Vec<BegunMessage>,
) -> Started {
    let lease = Arc::new(Lease { id: lease, unrecorded: messages.len().into() });
    let mut begun: std::collections::HashMap<_, _> =
        messages.into_iter().map(|m| ((m.id, m.epoch), m)).collect();
    let mut started = Started::default();
    for Admitted { ticket, endpoint, ready_at } in admitted {
        match begun.remove(&(ticket.id, ticket.epoch)) {
            Some(message) => started.jobs.push(Job {
                ticket,
                endpoint,
                instance,
                lease: Arc::clone(&lease),
                attempt: message.attempts + 1,
                lane_try: message.lane_tries + 1,
                ready_at,
                turn: 0,
            }),
            None => started.stale.push(endpoint),
        }
    }
    started
}

type BegunGroup = (LeaseId, InstanceId, Vec<BegunMessage>);

/// Begins tickets in one guarded write, repeated under the same lease number until its answer is known.
async fn begin(parts: &Parts, admitted: &[Admitted], stop: &CancellationToken) -> Option<BegunGroup> {
    let lease = LeaseId(fastrand::i64(1..));
    if admitted.is_empty() {
        return Some((lease, InstanceId(0), Vec::new()));
    }
    let tickets: Vec<_> = admitted.iter().map(|a| (a.ticket.id, a.ticket.epoch)).collect();
    let tried = std::sync::atomic::AtomicBool::new(false);
    service::persist("begin", stop, || async {
        let instance = parts.presence.instance().ok_or_else(|| "not enrolled in the store yet".to_owned())?;
        let repeated = tried.swap(true, std::sync::atomic::Ordering::Relaxed);
        let begin = Begin { lease, repeated, tickets: &tickets, owner: instance, now: parts.clock.now() };
        let begun = parts.store.begin(&begin).await.map_err(|error| error.to_string())?;
        Ok::<_, String>((lease, instance, begun.messages))
    })
    .await
}

/// Holds the rows of refused tickets; waits for the store as long as it takes. Gives back the records
/// that are done with: none when `stop` comes first, and the tickets will come again.
pub(super) async fn hold(parts: Parts, refused: Refused, stop: CancellationToken) -> Vec<Receipt> {
    for held in [Held::EndpointBusy, Held::EndpointClosed] {
        let tickets: Vec<_> = refused.rows.iter().filter(|r| r.2 == held).map(|r| (r.0, r.1)).collect();
        if tickets.is_empty() {
            continue;
        }
        let watch = parts.clock.stopwatch();
        let call = || parts.store.hold(&tickets, held, parts.clock.now());
        if service::persist("hold", &stop, call).await.is_none() {
            return Vec::new();
        }
        parts.metrics.batch("hold", tickets.len(), watch.elapsed());
    }
    refused.receipts
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ticket(id: i64, epoch: Epoch) -> Admitted {
        let ticket = Ticket {
            id: MessageId(id),
            epoch,
            attempt: epoch,
            endpoint: "default".to_owned(),
            created_at: Timestamp::EPOCH,
            recipient: "r".to_owned(),
            content: "c".to_owned(),
            content_type: None,
            headers: None,
            ordering_key: None,
            due_at: None,
        };
        let endpoint = Arc::new(Endpoint::new("default", "http://localhost:3000"));
        Admitted { ticket, endpoint, ready_at: Timestamp::EPOCH }
    }

    #[test]
    fn of_two_tickets_of_one_message_the_one_that_was_begun_is_tried() {
        let admitted = vec![ticket(5, 2), ticket(6, 1), ticket(5, 3), ticket(5, 3)];
        let begun = |id, epoch| BegunMessage { id: MessageId(id), epoch, attempts: 1, lane_tries: 0 };
        let messages = vec![begun(5, 3), begun(6, 1)];
        let started = sort(admitted, LeaseId(1), InstanceId(1), messages);
        let jobs: Vec<_> = started.jobs.iter().map(|job| (job.ticket.id.0, job.ticket.epoch)).collect();
        assert_eq!((jobs, started.stale.len()), (vec![(6, 1), (5, 3)], 2));
    }
}
