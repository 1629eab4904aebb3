//! Kept connections, by origin: the one used last is used next, so that the others grow old and go.

use std::collections::HashMap;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::budget::{Budget, Permit};
use super::connect::{Connector, NotConnected};
use super::connection::Connection;
use super::lock;
use super::names::AddressCache;
use super::target::Origin;
use crate::shortage::Shortage;

/// How often idle connections are looked through. A receiver that closes one waits for us that long at most, and
/// for [`UNDOUBTED`].
pub(super) const SWEEP: Duration = Duration::from_secs(3);

/// A connection that was in use so lately is not looked at.
const UNDOUBTED: Duration = Duration::from_secs(1);

/// After this long in idleness the system is asked once more whether the other side has closed.
const DOUBTED_AFTER: Duration = Duration::from_millis(2);

/// When idle connections must make room, one in so many goes, so that the search for the oldest pays for many.
const CLOSED_AT_ONCE: usize = 16;

/// How many connections there may be, and for how long.
#[derive(Clone, Copy, Debug)]
pub(super) struct Bounds {
    /// Open at once, over all origins.
    pub(super) open: usize,
    /// Idle at once, over all origins, and of one.
    pub(super) idle: usize,
    pub(super) idle_of_origin: usize,
    /// How long one is kept idle.
    pub(super) idle_for: Duration,
}

/// Kept connections to all origins. Times are since the start of the process's deliveries.
pub(super) struct Pool {
    connector: Connector,
    bounds: Bounds,
    budget: Arc<Budget>,
    hosts: Mutex<HashMap<Origin, Arc<Host>>>,
}

/// One origin's connections that are not in use.
pub(super) struct Host {
    origin: Origin,
    names: Arc<AddressCache>,
    /// Open ones, in use and idle.
    open: Arc<AtomicUsize>,
    idle: Mutex<Vec<Idle>>,
}

struct Idle {
    connection: Connection,
    since: Duration,
    until: Duration,
}

impl Host {
    fn in_use(&self) -> usize {
        let idle = lock(&self.idle).len();
        self.open.load(Ordering::Relaxed).saturating_sub(idle)
    }
}

impl Pool {
    pub(super) fn new(connector: Connector, bounds: Bounds) -> Pool {
        Pool { connector, bounds, budget: Budget::new(bounds.open), hosts: Mutex::default() }
    }

    /// What is kept of an origin: its idle connections and addresses.
    pub(super) fn host(&self, origin: &Origin) -> Arc<Host> {
        let mut hosts = lock(&self.hosts);
        if let Some(host) = hosts.get(origin) {
            return Arc::clone(host);
        }
        let host = Arc::new(Host {
            origin: origin.clone(),
            names: Arc::default(),
            open: Arc::default(),
            idle: Mutex::default(),
        });
        hosts.insert(origin.clone(), Arc::clone(&host));
        host
    }

    /// A kept connection that is still open, as far as can be known; the others on the way are dropped.
    pub(super) async fn take(&self, host: &Host, now: Duration) -> Option<Connection> {
        let mut asked = false;
        loop {
            let mut idle = self.pop(host)?;
            if now >= idle.until {
                continue;
            }
            if !asked && now.saturating_sub(idle.since) >= DOUBTED_AFTER {
                // The runtime looks at all sockets before this returns, so a close that has
                // arrived is seen below. Without it a busy runtime may not have looked yet.
                tokio::task::yield_now().await;
                asked = true;
            }
            if idle.connection.is_usable() {
                return Some(idle.connection);
            }
        }
    }

    fn pop(&self, host: &Host) -> Option<Idle> {
        let mut kept = lock(&host.idle);
        let idle = kept.pop()?;
        self.budget.leave_rest(1);
        Some(idle)
    }

    /// A new connection.
    ///
    /// # Errors
    /// [`NotConnected`]: this process is short of something, or the receiver can't be reached.
    pub(super) async fn connect(&self, host: &Host) -> Result<Connection, NotConnected> {
        let permit = self.permit(host).map_err(NotConnected::Short)?;
        self.connector.connect(&host.origin, &host.names, permit).await
    }

    /// A permit for a new connection; when all are taken, the oldest idle connections make room.
    fn permit(&self, host: &Host) -> Result<Arc<Permit>, Shortage> {
        let short = || Shortage::of_budget(self.budget.max());
        if !self.budget.has_share(host.in_use()) {
            return Err(short());
        }
        if let Some(permit) = self.budget.take(&host.open) {
            return Ok(permit);
        }
        self.close_oldest();
        self.budget.take(&host.open).ok_or_else(short)
    }

    /// Keeps a connection whose last answer was read to its end. `told` is how long the receiver
    /// says that it keeps it.
    pub(super) fn give_back(
        &self,
        host: &Host,
        mut connection: Connection,
        now: Duration,
        told: Option<Duration>,
    ) {
        if !connection.is_ready() && !connection.is_usable() {
            return;
        }
        if self.budget.idle() >= self.bounds.idle {
            self.close_oldest();
        }
        // Sooner than the receiver, so that its close does not cross our next request.
        let idle_for = self.bounds.idle_for;
        let idle_for = told.map_or(idle_for, |told| idle_for.min(told.mul_f64(0.75)));
        let mut idle = lock(&host.idle);
        if idle.len() < self.bounds.idle_of_origin {
            idle.push(Idle { connection, since: now, until: now + idle_for });
            self.budget.rests();
        }
    }

    /// Closes what has been idle for too long and what the other side has closed, and forgets origins that nobody
    /// uses. To be called every [`SWEEP`].
    pub(super) async fn sweep(&self, now: Duration) {
        for host in self.hosts() {
            // Without the bound on what a task may do at a time, at which a closed connection seems open.
            tokio::task::unconstrained(async {
                self.retain(&host, |idle| {
                    let doubted = now.saturating_sub(idle.since) >= UNDOUBTED;
                    now < idle.until && (!doubted || idle.connection.is_usable())
                });
            })
            .await;
            // Others have their turn between two origins.
            tokio::task::yield_now().await;
        }
        lock(&self.hosts).retain(|_, host| Arc::strong_count(host) > 1 || !lock(&host.idle).is_empty());
    }

    /// Closes a part of the idle connections: those that have not been used for longest.
    fn close_oldest(&self) {
        let hosts = self.hosts();
        let mut since: Vec<Duration> = Vec::new();
        for host in &hosts {
            since.extend(lock(&host.idle).iter().map(|idle| idle.since));
        }
        if since.is_empty() {
            return;
        }
        let mut left = since.len().div_ceil(CLOSED_AT_ONCE);
        let (_, last, _) = since.select_nth_unstable(left - 1);
        for host in &hosts {
            self.retain(host, |idle| {
                let goes = idle.since <= *last && left > 0;
                left -= usize::from(goes);
                !goes
            });
        }
    }

    /// Closes those idle connections of an origin that `stays` says no of.
    fn retain(&self, host: &Host, stays: impl FnMut(&mut Idle) -> bool) {
        let mut idle = lock(&host.idle);
        let before = idle.len();
        idle.retain_mut(stays);
        self.budget.leave_rest(before - idle.len());
    }

    fn hosts(&self) -> Vec<Arc<Host>> {
        lock(&self.hosts).values().cloned().collect()
    }

    /// How many connections are open, in use or idle.
    #[cfg(test)]
    pub(super) fn open(&self) -> usize {
        self.budget.in_use() + self.budget.idle()
    }

    /// How many connections are kept, over all origins.
    #[cfg(test)]
    pub(super) fn idle(&self) -> usize {
        let counted = self.hosts().iter().map(|host| lock(&host.idle).len()).sum();
        assert_eq!(counted, self.budget.idle(), "the budget counts the same");
        counted
    }
}
