//! Heals what died: leases that ran out, batches whose producer died, tickets that the broker lost,
//! dead letters that did not get out. Runs beside the active producer.
//!
//! What it believes lost it only issues again; a new batch makes all tickets of the old one stale, so that is harmless
//! when it was wrong. It still waits before it believes that somebody is dead: when the store itself was away, nobody could renew
//! a lease, so everybody gets a whole lease's time to speak up first. The leader's row says since when
//! the store has been there, because the janitor may itself have been away.

mod silence;

use std::collections::BTreeMap;
use std::convert::Infallible;
use std::time::Duration;

use tokio::sync::{Notify, watch};
use tokio::task::JoinHandle;
use tokio_util::sync::CancellationToken;

use crate::clock::{Instant, Now, Timestamp};
use crate::dead_letter;
use crate::message::MessageId;
use crate::producer::Term;
use crate::publish::Publisher;
use crate::queue::Depth;
use crate::service::{self, Backoff, Context, LEASE, Service, Step};
use crate::store::{Batch, InstanceId, LogPosition, Recovery, Removal, StoreError, Suspect};
use crate::ticket::BatchId;

use silence::Silence;

const ROUND: Duration = Duration::from_secs(1);
/// A dead letter that its consumer has not published by then is published here.
const DEAD_LETTER_AGE: Duration = Duration::from_secs(30);
/// A batch that another living producer has not got acknowledged by then is issued again: it leads no more, and an answer
/// of the store may have been lost on its way there. Well under the 30 s in which work must resume, and harmless where
/// only the broker is away.
const UNACKNOWLEDGED_MAX: Duration = Duration::from_secs(15);
/// The answer to a claim or a reissue of this process may take so long, and needs no more than that. A batch that was issued
/// again in vain does no harm.
const ANSWERED: Duration = ROUND;
/// An operation that nobody has touched for so long has lost its caller.
const OPERATION_IDLE: Duration = Duration::from_secs(5);
/// Messages of an operation that are changed in one transaction.
pub const OPERATION_PIECE: usize = 500;
/// Pieces of an operation in one round, so that the rest of the round is not late.
const OPERATION_PIECES: usize = 20;
/// Batches looked at in a round: more than all lanes together can hold in batches of one.
const BATCHES: usize = 100_000;
/// Batches on their way, with those that wait for their turn: what is left has to wait for a later round.
const REISSUED_MAX: usize = 2_000;
/// Deliveries that a removal looks at in one statement: some 20 ms of work.
const REMOVED: usize = 2_000;
/// Messages that the reconciliation looks at in a round: some 2 ms of work.
const RECONCILED: usize = 500;
/// As many while messages may lack a place after a restore, and pieces of them in a round, so that the other duties go on.
const RECONCILED_URGENT: usize = 10_000;
const RECONCILED_AT_ONCE: usize = 50;
/// How long the reconciliation rests once it has looked at everything.
const RECONCILIATION_REST: Duration = Duration::from_secs(3_600);
/// How long the removal rests once it has looked at everything.
const REMOVAL_REST: Duration = Duration::from_secs(600);
/// Messages are removed one by one only a part of the retention later than partitions are removed whole, a day at most.
const ROWS_LATER: u32 = 10;
const ROWS_LATER_MAX: Duration = Duration::from_secs(24 * 3600);
/// A clock that is set back by less delays nothing by much.
const SET_BACK: Duration = Duration::from_secs(1);
/// Waiting deliveries that are ended in one statement.
const EXPIRED: usize = 1_000;
/// Such statements in a round: about a second of work, so that the other duties go on.
const EXPIRY_PIECES: usize = 100;

/// Why deliveries were issued again, as the metrics say it.
const DIED: &str = "instance_died";
const ORPHANED: &str = "batch_orphaned";
const LOST: &str = "ticket_lost";

/// How each duty has gone lately. One that fails is tried again in the next round.
struct Duties {
    settle: Backoff,
    recover: Backoff,
    letters: Backoff,
    expire: Backoff,
    operations: Backoff,
    partitions: Backoff,
    retention: Backoff,
    reconcile: Backoff,
    clock: Backoff,
}

impl Default for Duties {
    fn default() -> Duties {
        Duties {
            settle: Backoff::new("lost batches"),
            recover: Backoff::new("recovery"),
            letters: Backoff::new("dead letters"),
            expire: Backoff::new("expiry"),
            operations: Backoff::new("bulk changes"),
            partitions: Backoff::new("partitions"),
            retention: Backoff::new("retention"),
            reconcile: Backoff::new("reconciliation"),
            clock: Backoff::new("clock"),
        }
    }
}

/// The janitor of one process.
pub struct Janitor {
    context: Context,
    leading: watch::Receiver<Option<Term>>,
    rounds: u64,
    silence: Silence,
    /// [`Clock::own_offset`] in the last round.
    ///
    /// [`Clock::own_offset`]: crate::clock::Clock::own_offset
    offset: Option<i64>,
    duties: Duties,
    /// Dead letters on their way: their lane may be slow or gone, and the rest of the round must not wait for it.
    letters: Option<JoinHandle<()>>,
    /// How long final messages are kept; `None`: for ever.
    retention: Option<Duration>,
    /// How far the removal has come, and when it begins again.
    removed_to: MessageId,
    next_removal: Instant,
    next_reconciliation: Instant,
    urgent: bool,
    publisher: Publisher,
    /// Batches that this process does not publish and nobody has acknowledged, and since when that is seen.
    unpublished: BTreeMap<BatchId, Instant>,
    /// [`Term::checks`] in the last round.
    checks: u32,
    stop: CancellationToken,
}

impl Service for Janitor {
    const NAME: &'static str = "janitor";
    /// Each duty tells of its own failures.
    type Error = Infallible;

    /// One round.
    async fn step(&mut self) -> Result<Step, Infallible> {
        let instant = self.context.clock.instant();
        let term = *self.leading.borrow();
        // After an outage the first bid says how long the store was away; nobody is judged before it.
        if let Some(term) = term.filter(|term| instant < term.until) {
            self.round(term).await;
        }
        Ok(Step::Idle(ROUND))
    }
}

impl Janitor {
    /// A janitor that works while the producer beside it is the active one, which `leading` says. It shares `publisher`
    /// with that producer. Final messages are kept for `retention`; `None`: for ever.
    pub fn new(
        context: Context,
        publisher: Publisher,
        leading: watch::Receiver<Option<Term>>,
        retention: Option<Duration>,
    ) -> Janitor {
        for why in [DIED, ORPHANED, LOST] {
            context.metrics.recovered(why, 0);
        }
        Janitor {
            context,
            leading,
            rounds: 0,
            silence: Silence::default(),
            offset: None,
            duties: Duties::default(),
            letters: None,
            retention,
            removed_to: MessageId(0),
            next_removal: Instant::START,
            next_reconciliation: Instant::START,
            urgent: false,
            publisher,
            unpublished: BTreeMap::new(),
            checks: 0,
            stop: CancellationToken::new(),
        }
    }

    /// Works until `stop`.
    pub async fn run(mut self, stop: &CancellationToken) {
        self.stop = stop.clone();
        service::run(&mut self, stop, &Notify::new()).await;
        // What is not published by then is issued again by the next janitor.
        self.publisher.drain().await;
    }

    /// Each duty by itself: one that fails keeps no other from being done.
    async fn round(&mut self, term: Term) {
        let looked = self.look_at_clock().await;
        let moment = self.context.clock.reading();
        let sure = looked.is_ok() && term.is_sure(moment, LEASE);
        self.duties.clock.note(looked);
        let now = moment.time;
        if std::mem::replace(&mut self.checks, term.checks) != term.checks {
            self.next_reconciliation = moment.instant;
        }
        if let Some(owner) = self.context.presence.instance() {
            let settled = self.settle_batches(owner, moment, sure).await;
            self.duties.settle.note(settled);
            let recovered = self.recover(owner, moment, sure).await;
            self.duties.recover.note(recovered);
        }
        if sure {
            let published = self.publish_left_letters(now).await;
            self.duties.letters.note(published);
        }
        let expired = self.expire(now).await;
        self.duties.expire.note(expired);
        let finished = self.finish_operations(now).await;
        self.duties.operations.note(finished);
        let reconciled = self.reconcile(moment).await;
        self.duties.reconcile.note(reconciled);
        let removed = self.remove_old(moment).await;
        self.duties.retention.note(removed);
        if self.rounds.is_multiple_of(5) {
            // Last, because it may wait for a lock. Nobody waits for it: the default partition takes what has none of its own.
            let made = self.context.store.make_partitions().await;
            self.duties.partitions.note(made);
        }
        self.rounds += 1;
    }

    /// Proves of a few messages that each has a place; of many when the feeds were made anew.
    async fn reconcile(&mut self, moment: Now) -> Result<(), StoreError> {
        if moment.instant < self.next_reconciliation {
            return Ok(());
        }
        for _ in 0..RECONCILED_AT_ONCE {
            let piece = if self.urgent { RECONCILED_URGENT } else { RECONCILED };
            let done = self.context.store.reconcile(moment.time, piece).await?;
            self.context.metrics.reconciled(done.checked, done.repaired);
            if done.repaired > 0 {
                tracing::warn!("{} messages had no place and are due now", done.repaired);
            }
            self.urgent = done.urgent;
            if done.finished {
                self.next_reconciliation = moment.instant.after(RECONCILIATION_REST);
            }
            if !done.urgent {
                break;
            }
        }
        Ok(())
    }

    /// Removes what is old, a little at a time, and rests once all of it has been looked at.
    async fn remove_old(&mut self, moment: Now) -> Result<(), StoreError> {
        let Some(kept) = self.retention.filter(|_| moment.instant >= self.next_removal) else {
            return Ok(());
        };
        let before = moment.time.before(kept);
        let rows_before = before.before((kept / ROWS_LATER).min(ROWS_LATER_MAX));
        let removal = Removal { before, rows_before, from: self.removed_to, limit: REMOVED };
        let removed = self.context.store.remove_old(&removal).await?;
        if removed.partitions + removed.messages > 0 {
            tracing::debug!(
                "removed {} old messages, and {} partitions whole",
                removed.messages,
                removed.partitions
            );
        }
        self.context.metrics.removed(removed.partitions, removed.messages);
        self.removed_to = removed.next.unwrap_or(MessageId(0));
        if removed.next.is_none() {
            self.next_removal = moment.instant.after(REMOVAL_REST.min(kept / 10));
        }
        Ok(())
    }

    /// Ends what has waited beyond its time.
    async fn expire(&self, now: Timestamp) -> Result<(), StoreError> {
        for _ in 0..EXPIRY_PIECES {
            if self.context.store.expire(now, EXPIRED).await? < EXPIRED as u64 {
                break;
            }
        }
        Ok(())
    }

    /// Hears of it first when somebody has set the clock that this process goes by. When it is this machine's that was set
    /// back, retries wait no longer for that.
    async fn look_at_clock(&mut self) -> Result<(), StoreError> {
        self.context.presence.follow_store().await?;
        let offset = self.context.clock.own_offset();
        let before = std::mem::replace(&mut self.offset, offset);
        let change = before.zip(offset).map_or(0, |(before, offset)| offset.saturating_sub(before));
        let back = Duration::from_micros(change.min(0).unsigned_abs());
        if back >= SET_BACK {
            tracing::warn!("the clock was set back by {back:.1?}; retries come as much sooner");
            self.context.store.bring_forward(back, self.context.clock.now()).await?;
        }
        Ok(())
    }

    /// Takes dead instances away when it is `sure`, and issues again what those had begun that are gone. Whose clock seems
    /// to be ahead is watched all the time.
    async fn recover(&mut self, owner: InstanceId, moment: Now, sure: bool) -> Result<(), StoreError> {
        let (now, silent) = match sure {
            true => (moment.time, self.silence.longer_than(LEASE, moment.instant)),
            // No lease has run out by then.
            false => (Timestamp::MIN, Vec::new()),
        };
        // A clock that was read a little earlier or later makes leases that end a little later.
        let latest = moment.time.after(LEASE * 2);
        let recovered = self.context.store.recover(&Recovery { now, latest, silent: &silent }).await?;
        self.silence.watch(&recovered.ahead, moment.instant);
        let mut count = 0;
        for lease in recovered.leases {
            if !self.has_capacity() {
                break;
            }
            count += self.reissue(Suspect::Lease(lease), owner).await?;
        }
        if count > 0 {
            tracing::warn!(
                "{count} deliveries of {} processes that died are queued again",
                recovered.instances
            );
        }
        self.context.metrics.recovered(DIED, count);
        Ok(())
    }

    /// Whether another batch may be issued again now.
    fn has_capacity(&self) -> bool {
        self.publisher.len() < REISSUED_MAX
    }

    /// Issues a batch or lease again, and returns how many deliveries were left in it. They go to their lane beside all
    /// this.
    async fn reissue(&self, suspect: Suspect, owner: InstanceId) -> Result<u64, StoreError> {
        match self.publisher.reissue(suspect, owner, &self.stop).await {
            Ok(count) => Ok(count as u64),
            // One that can't be read keeps no other from being issued again.
            Err(StoreError::Refused(why)) => {
                tracing::error!("{suspect:?} can't be issued again: {why}");
                Ok(0)
            }
            Err(error) => Err(error),
        }
    }

    /// Goes on with operations whose caller has gone away.
    async fn finish_operations(&mut self, now: Timestamp) -> Result<(), StoreError> {
        for id in self.context.store.idle_operations(now.before(OPERATION_IDLE)).await? {
            let mut left = OPERATION_PIECES;
            while left > 0
                && self
                    .context
                    .store
                    .work_operation(id, OPERATION_PIECE, now)
                    .await?
                    .is_some_and(|operation| operation.finished_at.is_none())
            {
                left -= 1;
            }
        }
        Ok(())
    }

    /// Issues lost batches again.
    async fn settle_batches(&mut self, owner: InstanceId, moment: Now, sure: bool) -> Result<(), StoreError> {
        // The store first: a batch that is there was published before the broker is asked.
        let batches = self.context.store.batches(moment.time, BATCHES).await?;
        let depths = self.depths(&batches).await;
        let mut counts: BTreeMap<Loss, u64> = BTreeMap::new();
        self.note_unpublished(&batches, moment.instant);
        for batch in &batches {
            let loss = match batch.log_position {
                Some(at) => passed_or_wiped(at, depths.get(&batch.lane).map(Vec::as_slice)),
                None => self.unpublished.get(&batch.id).and_then(|since| {
                    unpublished(batch.owner == owner, batch.orphaned, moment.instant.since(*since))
                }),
            };
            let Some(loss) = loss else { continue };
            if (sure || loss != Loss::Orphaned) && self.has_capacity() {
                let count = self.reissue(Suspect::Batch(batch.id), owner).await?;
                *counts.entry(loss).or_default() += count;
            }
        }
        for (loss, count) in counts {
            if count > 0 {
                tracing::warn!("{count} deliveries are queued again: {}", loss.reason());
            }
            self.context.metrics.recovered(loss.word(), count);
        }
        Ok(())
    }

    /// Notes since when nobody has acknowledged batches that this process does not publish. By its own watch: when they were
    /// made is told by a clock that may have been set since.
    fn note_unpublished(&mut self, batches: &[Batch], now: Instant) {
        let before = std::mem::take(&mut self.unpublished);
        let is_unpublished = |batch: &&Batch| batch.log_position.is_none() && !self.publisher.knows(batch.id);
        let since = |batch: &Batch| (batch.id, *before.get(&batch.id).unwrap_or(&now));
        self.unpublished = batches.iter().filter(is_unpublished).map(since).collect();
    }

    /// How far the groups of all lanes in these batches have come; lanes that can't be asked are left out.
    async fn depths(&self, batches: &[Batch]) -> BTreeMap<String, Vec<Depth>> {
        let directory = self.context.directory.snapshot();
        let mut depths = BTreeMap::new();
        for lane in &directory.lanes {
            if batches.iter().any(|batch| batch.lane == lane.topic) {
                match self.context.depth(lane).await {
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
        let letters = self.context.store.dead_letters(now.before(DEAD_LETTER_AGE), 1_000).await?;
        if !letters.is_empty() {
            self.letters = Some(tokio::spawn(dead_letter::publish(self.context.clone(), letters)));
        }
        Ok(())
    }
}

/// Why a batch is issued again.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Loss {
    /// Its group has come past it: what is still queued was skipped.
    Passed,
    /// The broker's log ends before it: it was wiped.
    Wiped,
    /// It was never acknowledged, and its producer is gone.
    Orphaned,
    /// It is this process's own, and nothing publishes it: the store's answer was lost.
    Forgotten,
}

impl Loss {
    fn word(self) -> &'static str {
        match self {
            Loss::Passed | Loss::Wiped => LOST,
            Loss::Orphaned | Loss::Forgotten => ORPHANED,
        }
    }

    fn reason(self) -> &'static str {
        match self {
            Loss::Passed => "their consumers skipped their tickets",
            Loss::Wiped => "the broker has lost their tickets",
            Loss::Orphaned => "their producer died before the broker had their tickets",
            Loss::Forgotten => "the answer to their claim was lost",
        }
    }
}

/// Whether a batch is lost that this process does not publish and no broker has acknowledged, as far as anybody has noted.
/// It may be this process's `own`, or its owner may be dead; it was first seen so `ago`.
fn unpublished(own: bool, orphaned: bool, ago: Duration) -> Option<Loss> {
    match own {
        true => (ago >= ANSWERED).then_some(Loss::Forgotten),
        false => (orphaned || ago >= UNACKNOWLEDGED_MAX).then_some(Loss::Orphaned),
    }
}

/// Whether a batch at this place is lost, by what the broker says of its lane (`None`: it could not be asked). `None`: its
/// tickets may still be taken.
fn passed_or_wiped(at: LogPosition, depth: Option<&[Depth]>) -> Option<Loss> {
    match depth?.iter().find(|depth| depth.partition == at.partition) {
        Some(depth) if depth.end <= at.offset => Some(Loss::Wiped),
        Some(depth) if depth.position > at.offset => Some(Loss::Passed),
        Some(_) => None,
        None => Some(Loss::Wiped),
    }
}

#[cfg(test)]
mod tests;
