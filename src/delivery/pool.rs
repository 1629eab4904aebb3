//! Kept connections, by origin: the one used last is used next, so that the others grow old and go.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use super::connect::{Connector, Names};
use super::connection::Connection;
use super::target::Origin;

/// All connections that lay idle for too long are closed about this often.
const SWEEP: Duration = Duration::from_secs(5);

/// After this long in idleness the system is asked once more whether the other side has closed.
const DOUBTED_AFTER: Duration = Duration::from_millis(2);

/// Kept connections to all origins. Times are since the start of the process's deliveries.
pub(super) struct Pool {
    connector: Connector,
    idle_max: usize,
    idle_for: Duration,
    hosts: Mutex<HashMap<Origin, Arc<Host>>>,
    next_sweep_ms: AtomicU64,
}

/// One origin's connections that are not in use.
pub(super) struct Host {
    origin: Origin,
    names: Arc<Names>,
    idle: Mutex<Vec<Idle>>,
}

struct Idle {
    connection: Connection,
    since: Duration,
    until: Duration,
}

impl Pool {
    pub(super) fn new(connector: Connector, idle_max: usize, idle_for: Duration) -> Pool {
        Pool { connector, idle_max, idle_for, hosts: Mutex::default(), next_sweep_ms: AtomicU64::new(0) }
    }

    /// The place of an origin's connections.
    pub(super) fn host(&self, origin: &Origin) -> Arc<Host> {
        let mut hosts = lock(&self.hosts);
        if let Some(host) = hosts.get(origin) {
            return Arc::clone(host);
        }
        let host = Arc::new(Host { origin: origin.clone(), names: Arc::default(), idle: Mutex::default() });
        hosts.insert(origin.clone(), Arc::clone(&host));
        host
    }

    /// A kept connection that is still open, as far as can be known; the others on the way are dropped.
    pub(super) async fn take(&self, host: &Host, now: Duration) -> Option<Connection> {
        self.sweep(now);
        let mut asked = false;
        loop {
            let mut idle = lock(&host.idle).pop()?;
            if now >= idle.until {
                continue;
            }
            if !asked && now.saturating_sub(idle.since) >= DOUBTED_AFTER {
                // The runtime looks at all sockets before this returns, so a close that has
                // arrived is seen below. Without it a busy runtime may not have looked yet.
                tokio::task::yield_now().await;
                asked = true;
            }
            if idle.connection.is_usable().await {
                return Some(idle.connection);
            }
        }
    }

    /// A new connection.
    pub(super) async fn connect(&self, host: &Host, within: Duration) -> Result<Connection, String> {
        self.connector.connect(&host.origin, &host.names, within).await
    }

    /// Keeps a connection whose last answer was read to its end. `told` is how long the receiver
    /// says that it keeps it.
    pub(super) async fn give_back(
        &self,
        host: &Host,
        mut connection: Connection,
        now: Duration,
        told: Option<Duration>,
    ) {
        if !connection.is_ready() && !connection.is_usable().await {
            return;
        }
        // Sooner than the receiver, so that its close does not cross our next request.
        let idle_for = told.map_or(self.idle_for, |told| self.idle_for.min(told.mul_f64(0.75)));
        let mut idle = lock(&host.idle);
        if idle.len() < self.idle_max {
            idle.push(Idle { connection, since: now, until: now + idle_for });
        }
    }

    /// Closes what has been idle for too long and forgets origins that nobody uses, every now and then.
    fn sweep(&self, now: Duration) {
        let now_ms = u64::try_from(now.as_millis()).unwrap_or(u64::MAX);
        if now_ms < self.next_sweep_ms.load(Ordering::Relaxed) {
            return;
        }
        let next = now_ms.saturating_add(u64::try_from(SWEEP.as_millis()).unwrap_or(u64::MAX));
        self.next_sweep_ms.store(next, Ordering::Relaxed);
        lock(&self.hosts).retain(|_, host| {
            let mut idle = lock(&host.idle);
            idle.retain(|idle| now < idle.until);
            !idle.is_empty() || Arc::strong_count(host) > 1
        });
    }

    /// How many connections are kept, over all origins.
    #[cfg(test)]
    pub(super) fn idle(&self) -> usize {
        lock(&self.hosts).values().map(|host| lock(&host.idle).len()).sum()
    }
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
