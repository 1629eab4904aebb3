//! Tickets that were not admitted: their deliveries are held, in large groups, because nobody waits for it.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::call::{Call, under_way};
use crate::clock::Instant;
use crate::message::Held;
use crate::queue::Receipt;
use crate::service::{self, Context};
use crate::ticket::Ticket;

/// How long refused tickets wait before their deliveries are held: many at once cost less. No longer, because the lane's
/// position can't pass them meanwhile, and the producer takes what is behind it for work that is still to be done: with a
/// second of it, an endpoint beside 2,000 that hang had a quarter of its rate.
const HOLD_AFTER: Duration = Duration::from_millis(50);

#[derive(Default)]
pub(super) struct Holding {
    refused: Vec<(Ticket, Held)>,
    /// The records they came from.
    receipts: Vec<Receipt>,
    /// When their deliveries are held however few they are.
    hold_at: Instant,
    /// The call under way that holds deliveries: apart from the one that begins, which must not wait for it.
    call: Option<Call<Vec<Receipt>>>,
}

impl Holding {
    /// Tickets whose deliveries are still to be held.
    pub(super) fn len(&self) -> usize {
        self.refused.len()
    }

    pub(super) fn is_due(&self, now: Instant) -> bool {
        !self.refused.is_empty() && now >= self.hold_at
    }

    /// Keeps a refused ticket, without the message that a held delivery does not need.
    pub(super) fn add(&mut self, ticket: &Ticket, held: Held, receipt: Receipt, now: Instant) {
        if self.refused.is_empty() {
            self.hold_at = now.after(HOLD_AFTER);
        }
        self.receipts.push(receipt);
        self.refused.push((ticket.without_message(), held));
    }

    /// Holds the deliveries of refused tickets, unless a call is under way.
    pub(super) fn start(&mut self, context: &Context, lane: &str, stop: &CancellationToken) {
        if self.call.is_none() && !self.refused.is_empty() {
            let (refused, receipts) = (std::mem::take(&mut self.refused), std::mem::take(&mut self.receipts));
            self.call =
                Some(Box::pin(hold(context.clone(), lane.to_owned(), refused, receipts, stop.clone())));
        }
    }

    /// Waits for the call under way, and gives the records that are done with; waits for ever when there is none.
    pub(super) async fn done(&mut self) -> Vec<Receipt> {
        let receipts = under_way(&mut self.call).await;
        self.call = None;
        receipts
    }

    /// As [`Holding::done`]; nothing when no call is under way.
    pub(super) async fn finish(&mut self) -> Vec<Receipt> {
        if self.call.is_some() { self.done().await } else { Vec::new() }
    }
}

/// Holds the deliveries of refused tickets; waits for the store as long as it takes. Gives back the records
/// that are done with: none when `stop` comes first, and the tickets will come again.
async fn hold(
    context: Context,
    lane: String,
    refused: Vec<(Ticket, Held)>,
    receipts: Vec<Receipt>,
    stop: CancellationToken,
) -> Vec<Receipt> {
    let mut by_reason: BTreeMap<&str, (Held, Vec<Ticket>)> = BTreeMap::new();
    for (ticket, held) in refused {
        by_reason.entry(held.as_str()).or_insert_with(|| (held, Vec::new())).1.push(ticket);
    }
    for (held, tickets) in by_reason.into_values() {
        let watch = context.clock.stopwatch();
        let call = || context.store.hold(&lane, &tickets, held, context.clock.now());
        if service::persist("hold", &stop, call).await.is_none() {
            return Vec::new();
        }
        context.metrics.batch("hold", tickets.len(), watch.elapsed());
    }
    receipts
}
