//! The loop of a service, written once: step, idle wait, backoff, stop; and what services share.
//!
//! A service is a `step` that does one unit of work and says what it did. [`run`] calls it until the
//! stop token is cancelled. A failing step is repeated with backoff and never ends the service: store,
//! broker and cache may come and go (P4).

mod directory;
mod presence;

use std::fmt::Display;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Notify;
use tokio_util::sync::CancellationToken;

use crate::cache::Cache;
use crate::clock::Clock;
use crate::lane::Lane;
use crate::queue::{Depth, Queue, furthest};
use crate::store::Store;
use crate::telemetry::Metrics;

pub use directory::{Directory, Snapshot};
pub use presence::{LEASE, Presence};

/// What every service is given.
#[derive(Clone)]
pub struct Context {
    pub store: Arc<dyn Store>,
    pub queue: Arc<dyn Queue>,
    pub cache: Arc<dyn Cache>,
    pub clock: Clock,
    pub metrics: Arc<Metrics>,
    pub presence: Arc<Presence>,
    pub directory: Arc<Directory>,
}

impl Context {
    /// How far a lane has been read and written, for the furthest of its groups in each partition. Empty when the
    /// lane does not exist.
    ///
    /// # Errors
    /// Those of the queue, for whichever group.
    pub async fn depth(&self, lane: &Lane) -> crate::queue::Result<Vec<Depth>> {
        let directory = self.directory.snapshot();
        let groups = directory.groups_of(lane).into_iter();
        let depths = groups.map(|group| self.queue.depth(&lane.topic, group));
        Ok(furthest(futures_util::future::try_join_all(depths).await?))
    }
}

/// What a step did.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Step {
    /// Something; there may be more to do at once.
    Worked,
    /// Nothing; look again after this long, or when woken.
    Idle(Duration),
}

/// What [`run`] calls again and again.
pub trait Service: Send {
    /// How it is called in the log.
    const NAME: &'static str;

    /// Why a step failed. All of it passes by waiting.
    type Error: Display + Send;

    /// Does one unit of work.
    fn step(&mut self) -> impl Future<Output = Result<Step, Self::Error>> + Send;
}

/// Calls `step` until `stop` is cancelled; `wake` cuts an idle wait short. A step that has begun is always
/// finished.
pub async fn run<S: Service>(service: &mut S, stop: &CancellationToken, wake: &Notify) {
    let mut backoff = Backoff::new(S::NAME);
    while !stop.is_cancelled() {
        // Registered before the step looks, so that a wake-up during the step is not missed.
        let woken = wake.notified();
        let wait = match service.step().await {
            Ok(Step::Worked) => {
                backoff.succeeded();
                // A step that found everything ready must still let the other services run.
                tokio::task::yield_now().await;
                continue;
            }
            Ok(Step::Idle(wait)) => {
                backoff.succeeded();
                wait
            }
            Err(error) => backoff.failed(&error),
        };
        tokio::select! {
            biased;
            () = stop.cancelled() => {}
            () = woken => {}
            () = tokio::time::sleep(wait) => {}
        }
    }
}

/// Repeats `call` with backoff until it succeeds; `None` when `stop` is cancelled first.
pub async fn persist<T, E: Display, F: Future<Output = Result<T, E>>>(
    name: &str,
    stop: &CancellationToken,
    mut call: impl FnMut() -> F,
) -> Option<T> {
    let mut backoff = Backoff::new(name);
    loop {
        match call().await {
            Ok(value) => {
                backoff.succeeded();
                return Some(value);
            }
            Err(error) => {
                let wait = backoff.failed(&error);
                tokio::select! {
                    biased;
                    () = stop.cancelled() => return None,
                    () = tokio::time::sleep(wait) => {}
                }
            }
        }
    }
}

/// How long to wait after a failure: 50 ms, doubling up to 2 s, so that work resumes soon after an outage.
/// Says in the log when trouble starts, and when it is over; not each time.
#[derive(Debug)]
pub struct Backoff {
    name: String,
    failures: u32,
}

impl Backoff {
    const FIRST: Duration = Duration::from_millis(50);
    const MAX: Duration = Duration::from_secs(2);

    /// A backoff for the work called `name` in the log.
    pub fn new(name: &str) -> Backoff {
        Backoff { name: name.to_owned(), failures: 0 }
    }

    /// Notes a failure; returns how long to wait.
    pub fn failed(&mut self, error: &impl Display) -> Duration {
        if self.failures == 0 {
            tracing::warn!(service = self.name, "{}: {error}; trying again until it works", self.name);
        } else {
            tracing::debug!(service = self.name, failures = self.failures, "{}: {error}", self.name);
        }
        let wait = Backoff::FIRST.saturating_mul(2_u32.saturating_pow(self.failures)).min(Backoff::MAX);
        self.failures = self.failures.saturating_add(1);
        wait
    }

    /// Notes how a call has ended.
    pub fn note<E: Display>(&mut self, result: Result<(), E>) {
        match result {
            Ok(()) => self.succeeded(),
            Err(error) => drop(self.failed(&error)),
        }
    }

    /// Notes a success.
    pub fn succeeded(&mut self) {
        if self.failures > 0 {
            tracing::info!(
                service = self.name,
                "{}: works again after {} failures",
                self.name,
                self.failures
            );
            self.failures = 0;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Its steps are the calls of a closure.
    struct Scripted<F>(F);

    impl<F: FnMut() -> Result<Step, &'static str> + Send> Service for Scripted<F> {
        const NAME: &'static str = "test";
        type Error = &'static str;

        async fn step(&mut self) -> Result<Step, &'static str> {
            (self.0)()
        }
    }

    #[tokio::test(start_paused = true)]
    async fn a_failing_step_is_repeated_with_growing_waits_until_stopped() {
        let stop = CancellationToken::new();
        let mut calls = 0;
        let clock = Clock::virtual_from(crate::clock::Timestamp::EPOCH);
        let mut at = Vec::new();
        let mut service = Scripted(|| {
            calls += 1;
            at.push(clock.now().as_micros() / 1000);
            match calls {
                1..=3 => Err("away"),
                4 => Ok(Step::Worked),
                5 => Ok(Step::Idle(Duration::from_millis(7))),
                _ => {
                    stop.cancel();
                    Err("away again")
                }
            }
        });
        run(&mut service, &stop, &Notify::new()).await;
        assert_eq!(at, [0, 50, 150, 350, 350, 357]);
    }

    #[tokio::test(start_paused = true)]
    async fn a_wake_up_during_the_step_is_not_missed() {
        let (stop, wake) = (CancellationToken::new(), Notify::new());
        let clock = Clock::virtual_from(crate::clock::Timestamp::EPOCH);
        let mut calls = 0;
        let mut service = Scripted(|| {
            calls += 1;
            wake.notify_waiters();
            wake.notify_one();
            if calls == 3 {
                stop.cancel();
            }
            Ok(Step::Idle(Duration::from_secs(3600)))
        });
        run(&mut service, &stop, &wake).await;
        assert_eq!(clock.now(), crate::clock::Timestamp::EPOCH);
    }

    #[test]
    fn backoff_is_bounded() {
        let mut backoff = Backoff::new("test");
        let waits: Vec<_> = (0..40).map(|_| backoff.failed(&"away")).collect();
        assert_eq!(waits[0], Backoff::FIRST);
        assert_eq!(waits[39], Backoff::MAX);
        backoff.succeeded();
        assert_eq!(backoff.failed(&"away"), Backoff::FIRST);
    }
}
