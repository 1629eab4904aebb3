//! From records of a lane to messages that may be tried: parse, then begin, in batches.

use std::collections::HashMap;
use std::sync::Arc;

use tokio_util::sync::CancellationToken;

use crate::clock::{Instant, Timestamp};
use crate::queue::{RECORD_MAX, Receipt, Taken};
use crate::service::{self, Context};
use crate::store::{Begin, Begun, Endpoint, InstanceId, LeaseId, Mask, Wanted};
use crate::ticket::{BatchId, Ticket};

/// Tickets begun in one call, at most.
pub(super) const BATCH: usize = 2_000;

/// Tickets that wait for the next begin call.
#[derive(Debug, Default)]
pub(super) struct ToBegin {
    /// Admitted: to be begun.
    pub(super) admitted: Vec<Admitted>,
    /// The records they came from.
    pub(super) receipts: Vec<Receipt>,
    /// When they are begun however few they are.
    pub(super) begin_at: Instant,
}

impl ToBegin {
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
    pub(super) ticket: Arc<Ticket>,
    pub(super) endpoint: Arc<Endpoint>,
    pub(super) ready_at: Timestamp,
    /// When its attempt is to begin, if its endpoint has a rate.
    pub(super) reserved_at: Option<Instant>,
}

/// A message that this process is to try.
#[derive(Debug)]
pub(super) struct BegunDelivery {
    pub(super) ticket: Arc<Ticket>,
    pub(super) endpoint: Arc<Endpoint>,
    pub(super) instance: InstanceId,
    pub(super) lease: LeaseId,
    /// The first batch that its delivery was in.
    pub(super) root: BatchId,
    /// When its ticket was published, or due if that was later.
    pub(super) ready_at: Timestamp,
    /// When its attempt is to begin, if its endpoint has a rate.
    pub(super) reserved_at: Option<Instant>,
    /// Its place among the messages that wait for a slot; `Waiting::add` gives it.
    pub(super) turn: u64,
}

/// What a begin call came to.
#[derive(Debug, Default)]
pub(super) struct Started {
    pub(super) begun: Vec<BegunDelivery>,
    /// Endpoints of admitted tickets that were stale: they leave the window again.
    pub(super) stale: Vec<Arc<Endpoint>>,
    /// Bytes of those tickets.
    pub(super) stale_bytes: usize,
    /// Records that are done with.
    pub(super) receipts: Vec<Receipt>,
}

/// The ticket in a record.
pub(super) fn parse(taken: &Taken) -> Result<Ticket, String> {
    if taken.is_cut() {
        return Err(format!("the record has {} bytes; a ticket has at most {RECORD_MAX}", taken.size));
    }
    Ticket::decode(&taken.value)
}

/// Begins a group of admitted tickets; waits for the store as long as it takes. When
/// `stop` comes first, nothing is said to be done, and the tickets will come again.
pub(super) async fn start(context: Context, to_begin: ToBegin, stop: CancellationToken) -> Started {
    let watch = context.clock.stopwatch();
    let Some((instance, begun)) = begin(&context, &to_begin.admitted, &stop).await else {
        return Started::default();
    };
    let mut started = sort(to_begin.admitted, instance, begun);
    if !started.begun.is_empty() {
        context.metrics.batch("begin", started.begun.len(), watch.elapsed());
    }
    context.metrics.stale("begin", started.stale.len());
    started.receipts = to_begin.receipts;
    started
}

/// Tells begun from stale. A ticket that came twice in one call was begun once.
fn sort(admitted: Vec<Admitted>, instance: InstanceId, begun: Vec<Begun>) -> Started {
    let mut begun: HashMap<BatchId, Begun> = begun.into_iter().map(|begun| (begun.batch, begun)).collect();
    let mut started = Started::default();
    for Admitted { ticket, endpoint, ready_at, reserved_at } in admitted {
        let position = usize::from(ticket.position);
        match begun.get_mut(&ticket.batch).filter(|begun| begun.positions.has(position)) {
            Some(begun) => {
                begun.positions.clear(position);
                let (lease, root) = (begun.lease, begun.root);
                started.begun.push(BegunDelivery {
                    ticket,
                    endpoint,
                    instance,
                    lease,
                    root,
                    ready_at,
                    reserved_at,
                    turn: 0,
                });
            }
            None => {
                started.stale_bytes += ticket.bytes();
                started.stale.push(endpoint);
            }
        }
    }
    started
}

/// Begins tickets in one guarded write, repeated under the same lease numbers until its answer is known.
async fn begin(
    context: &Context,
    admitted: &[Admitted],
    stop: &CancellationToken,
) -> Option<(InstanceId, Vec<Begun>)> {
    let wanted = wanted(admitted.iter().map(|admitted| &*admitted.ticket));
    if wanted.is_empty() {
        return Some((InstanceId(0), Vec::new()));
    }
    let tried = std::sync::atomic::AtomicBool::new(false);
    service::persist("begin", stop, || async {
        let instance =
            context.presence.instance().ok_or_else(|| "not enrolled in the store yet".to_owned())?;
        let repeated = tried.swap(true, std::sync::atomic::Ordering::Relaxed);
        let begin = Begin { wanted: &wanted, repeated, owner: instance };
        let begun = context.store.begin(&begin).await.map_err(|error| error.to_string())?;
        Ok::<_, String>((instance, begun))
    })
    .await
}

/// The positions of each batch, in the order in which the batches came.
fn wanted<'a>(tickets: impl Iterator<Item = &'a Ticket>) -> Vec<Wanted> {
    let mut wanted: Vec<Wanted> = Vec::new();
    let mut places: HashMap<BatchId, usize> = HashMap::new();
    for ticket in tickets {
        let place = *places.entry(ticket.batch).or_insert(wanted.len());
        if place == wanted.len() {
            let lease = LeaseId::random();
            wanted.push(Wanted { lease, batch: ticket.batch, positions: Mask::EMPTY });
        }
        wanted[place].positions.set(usize::from(ticket.position));
    }
    wanted
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ticket::tests::ticket;

    fn admitted(batch: i64, position: u16) -> Admitted {
        let ticket = Ticket { batch: BatchId(batch), position, ..ticket(batch * 10 + i64::from(position)) };
        let endpoint = Arc::new(Endpoint::new("default", "http://localhost:3000"));
        Admitted { ticket: ticket.into(), endpoint, ready_at: Timestamp::EPOCH, reserved_at: None }
    }

    #[test]
    fn tickets_are_wanted_batch_by_batch() {
        let all = [admitted(7, 3), admitted(5, 0), admitted(7, 1), admitted(7, 3)];
        let wanted = wanted(all.iter().map(|admitted| &*admitted.ticket));
        let seen: Vec<_> =
            wanted.iter().map(|w| (w.batch.0, w.positions.positions().collect::<Vec<_>>())).collect();
        assert_eq!(seen, [(7, vec![1, 3]), (5, vec![0])]);
        assert_ne!(wanted[0].lease, wanted[1].lease);
    }

    #[test]
    fn of_two_equal_tickets_one_is_tried_and_stale_ones_are_not() {
        let all = vec![admitted(7, 3), admitted(5, 0), admitted(7, 3), admitted(7, 1)];
        let positions = [3].into_iter().collect();
        let begun = vec![Begun { lease: LeaseId(1), batch: BatchId(7), root: BatchId(6), positions }];
        let started = sort(all, InstanceId(1), begun);
        let begun: Vec<_> = started
            .begun
            .iter()
            .map(|begun| (begun.ticket.batch.0, begun.ticket.position, begun.root.0))
            .collect();
        assert_eq!((begun, started.stale.len(), started.stale_bytes), (vec![(7, 3, 6)], 3, 3 * "Hi".len()));
    }
}
