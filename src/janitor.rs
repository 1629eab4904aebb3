//! Heals what died: leases that ran out, batches whose producer died, tickets that the broker lost,
//! dead letters that did not get out. Runs beside the active producer.
//!
//! It gives rows back and nothing else; the epoch makes that harmless when it was wrong. It still
//! waits before it believes that somebody is dead: when the store itself was away, nobody could renew
//! a lease, so everybody gets a whole lease's time to speak up first. The leader's row says since when
//! the store has been there, because the janitor may itself have been away.

mod silence;

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::clock::{Now, Timestamp};
use crate::consumer::publish_dead_letters;
use crate::producer::Reign;
use crate::queue::Depth;
use crate::service::{self, Backoff, LEASE, Parts, Service, Step};
use crate::store::{Batch, BatchId, Recovery, StoreError};

use silence::Silence;

const ROUND: Duration = Duration::from_secs(1);
/// A dead letter that its consumer has not published by then is published here.
const DEAD_LETTER_AGE: Duration = Duration::from_secs(30);
/// A batch that is not acknowledged by then never will be: publishing is bounded well below it.
const UNACKNOWLEDGED_MAX: Duration = Duration::from_secs(60);
/// A job that nobody has touched for so long has lost its caller.
const JOB_IDLE: Duration = Duration::from_secs(5);
/// Messages of a job that are changed in one transaction.
pub const JOB_PIECE: usize = 500;
/// Pieces of a job in one round, so that the rest of the round is not late.
const JOB_PIECES: usize = 20;
/// Ledger rows looked at in a round: more than all rooms together can hold in single-row batches.
const BATCHES: usize = 100_000;

/// Why messages were given back, as the metrics say it.
const DIED: &str = "instance_died";
const ORPHANED: &str = "batch_orphaned";
const LOST: &str = "ticket_lost";

/// The janitor of one process.
pub struct Janitor {
    parts: Parts,
    leading: watch::Receiver<Option<Reign>>,
    rounds: u64,
    silence: Silence,
    /// Of making partitions: it must keep nothing else from being done.
    partitions: Backoff,
    /// Dead letters on their way: their lane may be slow or gone, and the rest of the round must not wait for it.
    letters: Option<JoinHandle<()>>,
}

impl Service for Janitor {
    const NAME: &'static str = "janitor";
    type Error = StoreError;

    /// One round.
    ///
    /// # Errors
    /// Those of the store. The broker's are taken as "not now": its positions are only hints.
    async fn step(&mut self) -> Result<Step, StoreError> {
        let now = self.parts.clock.reading();
        let reign = *self.leading.borrow();
        // After an outage the first bid says how long the store was away; nobody is judged before it.
        if let Some(reign) = reign.filter(|reign| now.instant < reign.until) {
            self.round(reign.steady_since, now).await?;
        }
        Ok(Step::Idle(ROUND))
    }
}

impl Janitor {
    /// A janitor that works while the producer beside it is the active one, which `leading` says.
    pub fn new(parts: Parts, leading: watch::Receiver<Option<Reign>>) -> Janitor {
        for why in [DIED, ORPHANED, LOST] {
            parts.metrics.recovered(why, 0);
        }
        Janitor {
            parts,
            leading,
            rounds: 0,
            silence: Silence::default(),
            partitions: Backoff::new("partitions"),
            letters: None,
        }
    }

    /// Works until `stop`.
    pub async fn run(mut self, stop: &CancellationToken) {
        service::run(&mut self, stop, &Notify::new()).await;
    }

    async fn round(&mut self, steady_since: Timestamp, moment: Now) -> Result<(), StoreError> {
        let now = moment.time;
        if self.rounds.is_multiple_of(5) {
            self.make_partitions().await;
        }
        self.rounds += 1;
        let sure = now.since(steady_since) >= LEASE;
        self.settle_batches(now, sure).await?;
        if sure {
            let silent = self.silence.longer_than(LEASE, moment.instant);
            // Hosts whose clocks differ by a little have leases that end a little later.
            let latest = now.after(LEASE * 2);
            let recovered = self.parts.store.recover(&Recovery { now, latest, silent: &silent }).await?;
            self.silence.watch(&recovered.ahead, moment.instant);
            if recovered.messages > 0 {
                tracing::warn!(
                    "{} messages of {} processes that died are due again",
                    recovered.messages,
                    recovered.instances
                );
            }
            self.parts.metrics.recovered(DIED, recovered.messages);
            self.publish_left_letters(now).await?;
        }
        self.finish_jobs(now).await
    }

    /// Makes partitions ahead. Nobody waits for them, because the default one takes what has none of its own.
    async fn make_partitions(&mut self) {
        match self.parts.store.make_partitions().await {
            Ok(()) => self.partitions.succeeded(),
            Err(error) => drop(self.partitions.failed(&error)),
        }
    }

    /// Goes on with jobs whose caller has gone away.
    async fn finish_jobs(&mut self, now: Timestamp) -> Result<(), StoreError> {
        let before = Timestamp::from_micros(now.as_micros() - JOB_IDLE.as_micros() as i64);
        for id in self.parts.store.idle_jobs(before).await? {
            let mut left = JOB_PIECES;
            while left > 0
                && self
                    .parts
                    .store
                    .work_job(id, JOB_PIECE, now)
                    .await?
                    .is_some_and(|job| job.finished_at.is_none())
            {
                left -= 1;
            }
        }
        Ok(())
    }

    /// Takes finished batches out of the ledger, and gives back the rows of lost ones.
    async fn settle_batches(&mut self, now: Timestamp, sure: bool) -> Result<(), StoreError> {
        // The ledger first: a batch that is in it was published before the broker is asked.
        let batches = self.parts.store.batches(now, BATCHES).await?;
        let depths = self.depths(&batches).await;
        let mut settled: BTreeMap<Fate, Vec<BatchId>> = BTreeMap::new();
        for batch in &batches {
            let depth = depths.get(&batch.lane).map(Vec::as_slice);
            let fate = fate(batch, depth, now);
            if fate != Fate::UnderWay && (sure || fate != Fate::Orphaned) {
                settled.entry(fate).or_default().push(batch.id);
            }
        }
        for (fate, ids) in settled {
            let mut rows = 0;
            for chunk in ids.chunks(100) {
                rows += self.parts.store.requeue(chunk, now).await?;
            }
            if rows > 0 {
                tracing::warn!("{rows} messages are due again: {}", fate.reason());
            }
            self.parts.metrics.recovered(fate.word(), rows);
        }
        Ok(())
    }

    /// How far the groups of all lanes in these batches have come; lanes that can't be asked are left out.
    async fn depths(&self, batches: &[Batch]) -> BTreeMap<String, Vec<Depth>> {
        let directory = self.parts.directory.snapshot();
        let mut depths = BTreeMap::new();
        for lane in &directory.lanes {
            if batches.iter().any(|batch| batch.lane == lane.topic) {
                match self.parts.depth(lane).await {
                    Ok(depth) => drop(depths.insert(lane.topic.clone(), depth)),
                    Err(error) => tracing::debug!("the depth of {} is unknown: {error}", lane.topic),
                }
            }
        }
        depths
    }

    async fn publish_left_letters(&mut self, now: Timestamp) -> Result<(), StoreError> {
        if self.letters.as_ref().is_some_and(|letters| !letters.is_finished()) {
            return Ok(());
        }
        let before = Timestamp::from_micros(
            now.as_micros() - i64::try_from(DEAD_LETTER_AGE.as_micros()).unwrap_or(i64::MAX),
        );
        let letters = self.parts.store.dead_letters(before, 1_000).await?;
        if !letters.is_empty() {
            self.letters = Some(tokio::spawn(publish_dead_letters(self.parts.clone(), letters)));
        }
        Ok(())
    }
}

#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Fate {
    /// Its tickets may still be taken.
    UnderWay,
    /// Its group has come past it: what is still queued was skipped.
    Passed,
    /// The broker's log ends before it: it was wiped.
    Wiped,
    /// It was never acknowledged, and its producer is gone.
    Orphaned,
}

impl Fate {
    fn word(self) -> &'static str {
        match self {
            Fate::UnderWay | Fate::Passed | Fate::Wiped => LOST,
            Fate::Orphaned => ORPHANED,
        }
    }

    fn reason(self) -> &'static str {
        match self {
            Fate::UnderWay => "their tickets are under way",
            Fate::Passed => "their consumers skipped their tickets",
            Fate::Wiped => "the broker has lost their tickets",
            Fate::Orphaned => "their producer died before the broker had their tickets",
        }
    }
}

/// What became of a batch, by what the broker says of its lane. `None`: the lane could not be asked.
fn fate(batch: &Batch, depth: Option<&[Depth]>, now: Timestamp) -> Fate {
    let Some(place) = batch.place else {
        let stuck = now.since(batch.created_at) > UNACKNOWLEDGED_MAX;
        return if batch.orphaned || stuck { Fate::Orphaned } else { Fate::UnderWay };
    };
    let Some(depth) = depth else { return Fate::UnderWay };
    match depth.iter().find(|depth| depth.partition == place.partition) {
        Some(depth) if depth.end <= place.offset => Fate::Wiped,
        Some(depth) if depth.position > place.offset => Fate::Passed,
        Some(_) => Fate::UnderWay,
        None => Fate::Wiped,
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::*;
    use crate::clock::{Clock, Instant};
    use crate::service::{Directory, Presence};
    use crate::store::sqlite::SqliteStore;
    use crate::store::{InstanceId, Place, Store};

    fn batch(place: Option<Place>, orphaned: bool) -> Batch {
        Batch {
            id: BatchId(1),
            lane: "messages".into(),
            owner: InstanceId(1),
            created_at: Timestamp::EPOCH,
            place,
            orphaned,
        }
    }

    fn parts(clock: &Clock) -> Parts {
        let store: Arc<dyn Store> = Arc::new(SqliteStore::in_memory().unwrap());
        Parts {
            queue: Arc::new(crate::queue::embedded::EmbeddedQueue::new(1, clock.clone())),
            cache: Arc::new(crate::cache::memory::MemoryCache::new()),
            clock: clock.clone(),
            metrics: Arc::default(),
            presence: Arc::new(Presence::new(Arc::clone(&store), clock.clone(), "test", "here")),
            directory: Arc::new(Directory::new(Arc::clone(&store))),
            store,
        }
    }

    /// The store is back after an outage, and the janitor is the first to reach it.
    #[tokio::test(start_paused = true)]
    async fn nobody_is_taken_for_dead_before_the_producer_has_bid_again() {
        let clock = Clock::virtual_from(Timestamp::EPOCH);
        let parts = parts(&clock);
        parts.presence.renew().await.unwrap();
        let instance = parts.presence.instance().unwrap();
        let reign =
            Reign { steady_since: Timestamp::EPOCH, until: Instant::START.after(Duration::from_secs(4)) };
        let (led, leading) = watch::channel(Some(reign));
        let mut janitor = Janitor::new(parts.clone(), leading);

        tokio::time::advance(LEASE * 2).await;
        let now = clock.now();
        janitor.step().await.unwrap();
        assert!(
            parts.store.renew(instance, now, now).await.unwrap(),
            "its lease could not be renewed before"
        );

        led.send_replace(Some(Reign { steady_since: now, until: clock.instant().after(LEASE * 2) }));
        janitor.step().await.unwrap();
        assert!(parts.store.renew(instance, now, now).await.unwrap(), "it has had no time to renew");

        tokio::time::advance(LEASE).await;
        janitor.step().await.unwrap();
        assert!(!parts.store.renew(instance, now, now).await.unwrap(), "a lease's time without a word");
    }

    #[test]
    fn a_batchs_fate_follows_from_what_the_broker_says() {
        let at = |offset| Some(Place { partition: 2, offset });
        let depth = |position, end| vec![Depth { partition: 2, position, end }];
        let soon = Timestamp::EPOCH.after(Duration::from_secs(1));
        let late = Timestamp::EPOCH.after(Duration::from_secs(61));
        for (batch, depth, now, expected) in [
            (batch(None, false), None, soon, Fate::UnderWay),
            (batch(None, false), None, late, Fate::Orphaned),
            (batch(None, true), None, soon, Fate::Orphaned),
            (batch(at(9), true), None, late, Fate::UnderWay),
            (batch(at(9), false), Some(depth(9, 10)), late, Fate::UnderWay),
            (batch(at(9), false), Some(depth(10, 10)), soon, Fate::Passed),
            (batch(at(9), false), Some(depth(0, 9)), soon, Fate::Wiped),
            (batch(at(9), false), Some(Vec::new()), soon, Fate::Wiped),
        ] {
            assert_eq!(fate(&batch, depth.as_deref(), now), expected, "{batch:?} {depth:?}");
        }
    }
}
