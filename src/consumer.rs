//! Begun, delivered, recorded. The same code serves the fresh lane and every retry lane.
//!
//! A ticket comes from the lane, waits for its time if it came ahead of that, is admitted if its endpoint
//! has room (else its delivery is held), and is begun with others in one guarded write. From then on the lane's
//! record is done with: the store's lease remembers the message (see `docs/adr/`), so a slow receiver holds
//! back no position of the lane. The message waits for a free slot of its endpoint, is delivered and judged,
//! and its record goes to the `recorder`, which writes in batches beside all this.

mod arrivals;
mod attempts;
mod begin;
mod breakers;
mod call;
mod dispatcher;
mod early;
mod heartbeat;
mod hold;
mod recorder;
mod saturation;
mod unreadable;
mod waiting;

use std::time::Duration;

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::delivery::Delivery;
use crate::lane::Lane;
use crate::queue::{QueueError, Subscription};
use crate::service::{self, Context};

use dispatcher::Dispatcher;
use heartbeat::Heartbeat;

/// How a consumer works.
#[derive(Clone, Debug)]
pub struct ConsumerOptions {
    /// The lane it reads, with its tries and waits.
    pub lane: Lane,
    /// Messages begun and not recorded, at most.
    pub window: usize,
    /// How long a stop waits for the attempts in flight.
    pub drain: Duration,
}

/// Works on one lane until `stop`; then takes nothing new, gives back what it has begun and not tried,
/// waits for what is in flight, and leaves the lane.
///
/// # Errors
/// The name of the lane when its subscription ended by itself: nothing is taken from it any more.
pub async fn run(
    context: Context,
    delivery: std::sync::Arc<Delivery>,
    options: ConsumerOptions,
    stop: &CancellationToken,
) -> Result<(), String> {
    let lane = &options.lane;
    let name = format!("consumer of {}", lane.topic);
    if service::persist(&name, stop, || register(&context, lane)).await.is_none() {
        return Ok(());
    }
    // Ends with the work, which may end by itself.
    let reads = stop.child_token();
    let heartbeat = Heartbeat::new(context.clone(), lane.clone());
    let work = async {
        if let Some(subscription) = service::persist(&name, stop, || subscribe(&context, &options)).await {
            work(&context, delivery, &options, subscription, stop).await;
        }
        reads.cancel();
    };
    tokio::join!(work, heartbeat.run(&reads));
    if stop.is_cancelled() {
        Ok(())
    } else {
        Err(format!("the subscription of {} has ended by itself", lane.topic))
    }
}

async fn work(
    context: &Context,
    delivery: std::sync::Arc<Delivery>,
    options: &ConsumerOptions,
    subscription: Subscription,
    stop: &CancellationToken,
) {
    let (records, taken) = mpsc::unbounded_channel();
    let (recorded, written) = mpsc::unbounded_channel();
    let metrics = context.metrics.lane(&options.lane.topic);
    // Results are written until the stop has run out of patience.
    let give_up = CancellationToken::new();
    let recorder = recorder::run(context.clone(), metrics.clone(), taken, recorded, &give_up);
    let dispatcher = Dispatcher::new(
        context.clone(),
        metrics,
        delivery,
        options.clone(),
        subscription,
        records,
        stop.clone(),
    );
    let dispatcher = async {
        let subscription = dispatcher.run(written).await;
        give_up.cancel();
        subscription
    };
    let (subscription, ()) = tokio::join!(dispatcher, recorder);
    subscription.close().await;
}

async fn register(context: &Context, lane: &Lane) -> Result<(), crate::store::StoreError> {
    // Said first: settings of a group that nobody has heard of would be replaced.
    heartbeat::announce(context, lane).await?;
    if let Some(before) = context.store.put_lane(lane, context.clock.now()).await? {
        tracing::warn!(
            lane = lane.topic,
            "lane {} was registered with other settings ({} tries, then {}); the newest win",
            lane.topic,
            before.tries,
            before.next
        );
    }
    context.directory.refresh().await.map(drop)
}

async fn subscribe(context: &Context, options: &ConsumerOptions) -> Result<Subscription, QueueError> {
    let lane = &options.lane;
    context.queue.ensure(&[lane.topic.clone(), lane.next.clone()]).await?;
    context.queue.subscribe(&lane.topic, &lane.group, options.window).await
}

#[cfg(test)]
mod tests;
