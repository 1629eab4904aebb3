//! Attempts under way: each is a task of its own, and reports how it ended.

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::begin::BegunDelivery;
use crate::delivery::{Delivery, Tried};
use crate::service::Context;

/// A try that ended, or did not take place: `None` when the message is not ours to try any more.
pub(super) struct Finished {
    pub(super) begun: BegunDelivery,
    pub(super) tried: Option<Tried>,
    pub(super) took: Duration,
}

/// What every attempt needs, shared by all.
pub(super) struct Attempts {
    context: Context,
    delivery: Arc<Delivery>,
    stop: CancellationToken,
    finished: mpsc::UnboundedSender<Finished>,
}

impl Attempts {
    /// Attempts of one consumer; each tells `finished` how it ended.
    pub(super) fn new(
        context: Context,
        delivery: Arc<Delivery>,
        stop: CancellationToken,
        finished: mpsc::UnboundedSender<Finished>,
    ) -> Attempts {
        Attempts { context, delivery, stop, finished }
    }

    /// Makes an attempt beside everything else, if the message is still ours and its time not over.
    pub(super) fn start(self: &Arc<Attempts>, begun: BegunDelivery) {
        let attempts = Arc::clone(self);
        tokio::spawn(async move {
            let Attempts { context, delivery, stop, finished } = &*attempts;
            let watch = context.clock.stopwatch();
            let ours = context.presence.holds(begun.instance) && !stop.is_cancelled();
            let tried = match ours && !begun.ticket.is_expired(context.clock.now()) {
                true => Some(delivery.deliver(&begun.ticket, &begun.endpoint).await),
                false => None,
            };
            // Ignored: the dispatcher is gone only when a stop has run out of patience.
            let _ = finished.send(Finished { begun, tried, took: watch.elapsed() });
        });
    }
}
