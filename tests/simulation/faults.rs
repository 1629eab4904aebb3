//! A store whose calls fail: before they happen, after they happened, by the end of the process, or
//! because the store is away for a while.

use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

use ams::clock::{Clock, Timestamp};
use ams::lane::{Lane, LaneGroup};
use ams::message::{Attempt, Held, Message, MessageId, NewMessage};
use ams::store::operate::*;
use ams::store::*;
use ams::ticket::{BatchId, Ticket};
use async_trait::async_trait;
use tokio::sync::Notify;
use uuid::Uuid;

/// How often what goes wrong, in thousandths of calls.
#[derive(Clone, Copy, Debug)]
pub struct Rates {
    pub before: u32,
    pub after: u32,
    pub crash: u32,
    pub outage: u32,
    /// In thousandths of attempts.
    pub short: u32,
}

/// Decides the fate of each call, and remembers how often.
pub struct Faults {
    rates: Rates,
    pub crashed: Notify,
    pub count: AtomicU64,
    /// Until when the store is away, in microseconds.
    away_until: AtomicI64,
    /// Off while the world is set up and inspected.
    pub on: std::sync::atomic::AtomicBool,
}

impl Faults {
    pub fn new(rates: Rates) -> Faults {
        Faults {
            rates,
            crashed: Notify::new(),
            count: AtomicU64::new(0),
            away_until: AtomicI64::new(0),
            on: true.into(),
        }
    }

    fn happens(&self, per_mille: u32) -> bool {
        let happens = self.on.load(Ordering::Relaxed) && fastrand::u32(0..1000) < per_mille;
        self.count.fetch_add(u64::from(happens), Ordering::Relaxed);
        happens
    }

    /// Ends the process here, or not.
    pub async fn maybe_crash(&self) {
        if self.happens(self.rates.crash) {
            self.crashed.notify_one();
            std::future::pending::<()>().await;
        }
    }

    /// Whether the process is short of what this attempt needs.
    pub fn is_short(&self) -> bool {
        self.happens(self.rates.short)
    }

    /// Whether the store is away; it leaves for up to half a minute, so that leases run out and others do not.
    fn away(&self, clock: &Clock) -> bool {
        if self.happens(self.rates.outage) {
            let back = clock.now().after(Duration::from_millis(fastrand::u64(100..30_000)));
            self.away_until.fetch_max(back.as_micros(), Ordering::Relaxed);
        }
        clock.now().as_micros() < self.away_until.load(Ordering::Relaxed)
    }

    /// Carries a call out, or fails it on one side or the other.
    pub async fn call<T>(&self, clock: &Clock, call: impl Future<Output = Result<T>>) -> Result<T> {
        self.maybe_crash().await;
        let lost = || StoreError::Unavailable("the simulation cut the connection".to_owned());
        if self.happens(self.rates.before) {
            return Err(lost());
        }
        if self.away(clock) {
            // Some calls are refused, others hear nothing for a while.
            let silence = Duration::from_millis(fastrand::u64(0..1_000) * fastrand::u64(0..3));
            let _ = tokio::time::timeout(silence, std::future::pending::<()>()).await;
            return Err(lost());
        }
        let answer = call.await;
        // The other services get their turn between any two calls.
        for _ in 0..fastrand::u32(0..3) {
            tokio::task::yield_now().await;
        }
        self.maybe_crash().await;
        if self.happens(self.rates.after) { Err(lost()) } else { answer }
    }
}

/// The store that the services see.
pub struct FaultyStore {
    pub inner: Arc<dyn Store>,
    pub faults: Arc<Faults>,
    pub clock: Clock,
}

macro_rules! faulty {
    ($trait:ident { $($as_is:tt)* } $($name:ident($($argument:ident: $type:ty),*) -> $answer:ty;)*) => {
        #[async_trait]
        impl $trait for FaultyStore {
            $($as_is)*
            $(async fn $name(&self, $($argument: $type),*) -> Result<$answer> {
                self.faults.call(&self.clock, self.inner.$name($($argument),*)).await
            })*
        }
    };
}

faulty! {
    Store {
        fn kind(&self) -> &'static str {
            self.inner.kind()
        }
    }
    migrate() -> Vec<String>;
    schema_version() -> SchemaVersion;
    installation() -> Uuid;
    insert(messages: &[NewMessage], now: Timestamp) -> Vec<Inserted>;
    insert_whole(messages: &[NewMessage], now: Timestamp) -> AllOrNone;
    about() -> About;
}

faulty! {
    Registry {}
    time() -> Option<Timestamp>;
    enroll(service: &str, host: &str, now: Timestamp, lease_until: Timestamp) -> InstanceId;
    renew(instance: InstanceId, now: Timestamp, lease_until: Timestamp) -> bool;
    report_saturated(instance: InstanceId, endpoints: &[String]) -> ();
    saturated() -> Vec<String>;
    retire(instance: InstanceId) -> ();
    lead(bid: &Bid) -> Option<Leadership>;
    endpoints() -> Vec<Endpoint>;
    put_endpoint(endpoint: &Endpoint) -> ();
    delete_endpoint(name: &str) -> Deletion;
    lanes() -> Vec<Lane>;
    put_lane(lane: &Lane, now: Timestamp) -> Option<Lane>;
    lane_groups() -> Vec<LaneGroup>;
    put_lane_group(group: &LaneGroup) -> ();
}

faulty! {
    Scheduling {}
    due(lanes: &[&str], by: Timestamp) -> DueNow;
    claim(claim: &Claim<'_>) -> Claimed;
    acknowledge(batch: BatchId, at: LogPosition) -> ();
    batches(now: Timestamp, limit: usize) -> Vec<Batch>;
    reissue(reissue: &Reissue) -> Option<Reissued>;
    held() -> Vec<(String, Held)>;
    unhold(endpoint: &str, held: Held, limit: usize, now: Timestamp) -> u64;
    expire(now: Timestamp, limit: usize) -> u64;
}

faulty! {
    Execution {}
    begin(begin: &Begin<'_>) -> Vec<Begun>;
    record(records: &Records<'_>) -> Vec<MessageId>;
    hold(lane: &str, tickets: &[Ticket], held: Held, now: Timestamp) -> u64;
    dead_letters(before: Timestamp, limit: usize) -> Vec<DeadLetter>;
    dead_lettered(ids: &[MessageId]) -> ();
}

faulty! {
    Upkeep {}
    recover(recovery: &Recovery<'_>) -> Recovered;
    remove_old(removal: &Removal) -> Removed;
    check_feeds(now: Timestamp) -> bool;
    reconcile(now: Timestamp, limit: usize) -> Reconciled;
    reconciliation() -> Reconciliation;
    bring_forward(by: Duration, now: Timestamp) -> ();
    make_partitions() -> ();
}

faulty! {
    Operations {}
    message(id: MessageId) -> Option<Message>;
    messages(ids: &[MessageId]) -> Vec<Message>;
    search(filter: &Filter, from: Cursor, limit: usize) -> Page;
    change(change: Change, ids: &[MessageId], now: Timestamp) -> Vec<MessageId>;
    open_job(change: Change, filter: &Filter, now: Timestamp) -> Job;
    work_job(id: JobId, limit: usize, now: Timestamp) -> Option<Job>;
    job(id: JobId) -> Option<Job>;
    idle_jobs(before: Timestamp) -> Vec<JobId>;
    dead_reasons() -> Vec<DeadReason>;
    set_paused(paused: bool) -> ();
    control(now: Timestamp) -> Control;
    put_key(key: &ApiKey) -> ();
    keys() -> Vec<ApiKey>;
    revoke_key(id: &str, now: Timestamp) -> bool;
    keys_used(ids: &[String], now: Timestamp) -> ();
    attempts(id: MessageId) -> Vec<Attempt>;
    overview(now: Timestamp) -> Overview;
}
