//! A consumer's sign of life on its lane. A lane may have several groups of consumers, for a test or by mistake;
//! each group says that it is there, so that one that has gone is not waited for.

use std::time::Duration;

use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::lane::{Lane, LaneGroup};
use crate::service::{self, Context, LEASE, Service, Step};
use crate::store::StoreError;

/// How often a consumer says that it is there: three times in the time after which its group counts as gone.
const PERIOD: Duration = Duration::from_secs(LEASE.as_secs() / 3);

/// The heartbeat of one consumer.
pub(super) struct Heartbeat {
    context: Context,
    lane: Lane,
}

impl Heartbeat {
    pub(super) fn new(context: Context, lane: Lane) -> Heartbeat {
        Heartbeat { context, lane }
    }

    /// Beats until `stop`.
    pub(super) async fn run(mut self, stop: &CancellationToken) {
        service::run(&mut self, stop, &Notify::new()).await;
    }

    /// Whether the lane's settings in the store are those of a group that has gone.
    fn abandoned(&self) -> bool {
        let directory = self.context.directory.snapshot();
        let registered = directory.lanes.iter().find(|lane| lane.topic == self.lane.topic);
        registered.is_some_and(|registered| {
            registered.group != self.lane.group
                && !directory.groups_of(registered).contains(&registered.group.as_str())
        })
    }
}

impl Service for Heartbeat {
    const NAME: &'static str = "lane heartbeat";
    type Error = StoreError;

    async fn step(&mut self) -> Result<Step, StoreError> {
        announce(&self.context, &self.lane).await?;
        let now = self.context.clock.now();
        if self.abandoned() && self.context.store.put_lane(&self.lane, now).await?.is_some() {
            tracing::info!(
                lane = self.lane.topic,
                "lane {} has the settings of group {} again: the group that had set others has gone",
                self.lane.topic,
                self.lane.group
            );
        }
        Ok(Step::Idle(PERIOD))
    }
}

/// Announces that a consumer of this lane's group is there.
///
/// # Errors
/// Those of the store.
pub(super) async fn announce(context: &Context, lane: &Lane) -> Result<(), StoreError> {
    let (topic, group) = (lane.topic.clone(), lane.group.clone());
    context.store.put_lane_group(&LaneGroup { topic, group, seen_at: context.clock.now() }).await
}
