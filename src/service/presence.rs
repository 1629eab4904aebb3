//! This process's row in `instances`: the lease under which its claims and begun messages are its own.

use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwapOption;
use tokio_util::sync::CancellationToken;

use super::{Backoff, Service, Step};
use crate::clock::{Clock, Instant};
use crate::store::{InstanceId, Result, Store, StoreError};

/// How long an instance lives without renewing its lease. After a crash its work is issued again this
/// much later, so it is well under the 30 s in which work must resume.
pub const LEASE: Duration = Duration::from_secs(10);

const RENEWAL: Duration = Duration::from_secs(2);

/// A clock that was so far off is told of: somebody has set one, or this machine follows no time server.
const NOTEWORTHY: Duration = Duration::from_millis(500);

/// The presence of one process; all of its services share it.
pub struct Presence {
    store: Arc<dyn Store>,
    clock: Clock,
    service: String,
    host: String,
    // Read for every delivery, written every two seconds: hence not behind a mutex.
    lease: ArcSwapOption<(InstanceId, Instant)>,
}

impl Presence {
    /// The presence of a process that runs `service` on `host`; it is not enrolled yet.
    pub fn new(store: Arc<dyn Store>, clock: Clock, service: &str, host: &str) -> Presence {
        Presence {
            store,
            clock,
            service: service.to_owned(),
            host: host.to_owned(),
            lease: ArcSwapOption::empty(),
        }
    }

    /// The instance that this process is now; `None` while it is not enrolled.
    pub fn instance(&self) -> Option<InstanceId> {
        self.lease.load().as_ref().map(|lease| lease.0)
    }

    /// Whether `instance` is still this process and its lease has not run out. A process that was
    /// frozen for longer than its lease learns here that what it had begun is no longer its own.
    pub fn holds(&self, instance: InstanceId) -> bool {
        self.lease.load().as_ref().is_some_and(|lease| lease.0 == instance && self.clock.instant() < lease.1)
    }

    /// Sets this process's clock by the store's, and renews the lease; enrolls when there is none or it was taken away.
    ///
    /// # Errors
    /// Those of the store; the lease then runs on as it was.
    pub async fn renew(&self) -> Result<()> {
        self.follow_store().await?;
        let (now, held_until) = (self.clock.now(), self.clock.instant().after(LEASE));
        let until = now.after(LEASE);
        let kept = match self.instance() {
            Some(id) => self.store.renew(id, now, until).await?.then_some(id),
            None => None,
        };
        let id = match kept {
            Some(id) => id,
            None => {
                if let Some(lost) = self.instance() {
                    tracing::warn!(
                        instance = lost.0,
                        "the lease of instance {} had run out; enrolling anew",
                        lost.0
                    );
                }
                let id = self.store.enroll(&self.service, &self.host, now, until).await?;
                tracing::debug!(instance = id.0, "enrolled as instance {}", id.0);
                id
            }
        };
        self.lease.store(Some(Arc::new((id, held_until))));
        Ok(())
    }

    /// Sets this process's clock by the store's, where the store has one.
    ///
    /// # Errors
    /// Those of the store; the clock then goes on as it was.
    pub async fn follow_store(&self) -> Result<()> {
        let asked = self.clock.instant();
        let Some(told) = self.store.time().await? else { return Ok(()) };
        let change = self.clock.follow(told, asked);
        if Duration::from_micros(change.unsigned_abs()) >= NOTEWORTHY {
            tracing::warn!(
                "the time of this process is set by {:+.3} s, to what the store's clock says",
                change as f64 / 1e6
            );
        }
        Ok(())
    }

    /// Keeps the lease renewed until `stop`.
    pub async fn run(&self, stop: &CancellationToken) {
        super::run(&mut &*self, stop, &tokio::sync::Notify::new()).await;
    }

    /// Ends the instance in good order, when the store can be reached.
    pub async fn retire(&self) {
        let Some(lease) = self.lease.swap(None) else {
            return;
        };
        if let Err(error) = self.store.retire(lease.0).await {
            Backoff::new("retire").failed(&error);
        }
    }
}

impl Service for &Presence {
    const NAME: &'static str = "heartbeat";
    type Error = StoreError;

    async fn step(&mut self) -> Result<Step> {
        self.renew().await.map(|()| Step::Idle(RENEWAL))
    }
}
