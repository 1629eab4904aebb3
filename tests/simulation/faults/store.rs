//! A store whose calls fail. What it has really done goes into the history.

use std::sync::Arc;
use std::time::Duration;

use ams::breaker::Breaker;
use ams::clock::Timestamp;
use ams::lane::{Lane, LaneGroup};
use ams::message::{Attempt, Held, Message, MessageId, NewMessage};
use ams::store::operate::*;
use ams::store::*;
use ams::ticket::{BatchId, Ticket};
use async_trait::async_trait;
use uuid::Uuid;

use super::Part;
use crate::node::Process;
use crate::world::World;

/// The store that one process sees.
pub struct FaultyStore {
    pub world: Arc<World>,
    pub process: Arc<Process>,
}

impl FaultyStore {
    async fn call<T>(&self, call: impl Future<Output = Result<T>>) -> Result<T> {
        self.world.faults.call(Part::Store, &self.process, StoreError::Unavailable, call).await
    }
}

macro_rules! faulty {
    ($trait:ident { $($as_is:tt)* } $($name:ident($($argument:ident: $type:ty),*) -> $answer:ty;)*) => {
        #[async_trait]
        impl $trait for FaultyStore {
            $($as_is)*
            $(async fn $name(&self, $($argument: $type),*) -> Result<$answer> {
                self.call(self.world.store.$name($($argument),*)).await
            })*
        }
    };
}

faulty! {
    Store {
        fn kind(&self) -> &'static str {
            self.world.store.kind()
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
    Registry {
        async fn time(&self) -> Result<Option<Timestamp>> {
            self.call(async { Ok(self.world.store_time()) }).await
        }

        async fn set_breakers(&self, changes: &[(String, Option<Breaker>)]) -> Result<Vec<bool>> {
            self.call(async {
                for (_, change) in changes {
                    let what = if change.is_some() { "breakers opened" } else { "breakers closed" };
                    self.world.faults.count(what, 1);
                }
                self.world.store.set_breakers(changes).await
            })
            .await
        }
    }
    enroll(service: &str, host: &str, now: Timestamp, lease_until: Timestamp) -> InstanceId;
    renew(instance: InstanceId, now: Timestamp, lease_until: Timestamp) -> bool;
    report_saturated(instance: InstanceId, endpoints: &[String]) -> ();
    saturated() -> Vec<String>;
    retire(instance: InstanceId) -> ();
    lead(bid: &Bid) -> Option<Leadership>;
    endpoints() -> Vec<Endpoint>;
    put_endpoint(endpoint: &Endpoint) -> ();
    delete_endpoint(name: &str) -> Deletion;
    breakers() -> Vec<(String, Breaker)>;
    probe(endpoints: &[(String, Timestamp)], now: Timestamp) -> Vec<String>;
    lanes() -> Vec<Lane>;
    put_lane(lane: &Lane, now: Timestamp) -> Option<Lane>;
    lane_groups() -> Vec<LaneGroup>;
    put_lane_group(group: &LaneGroup) -> ();
}

faulty! {
    Scheduling {
        async fn claim(&self, claim: &Claim<'_>) -> Result<Claimed> {
            self.call(async {
                let claimed = self.world.store.claim(claim).await?;
                self.world.claimed(&claimed);
                Ok(claimed)
            })
            .await
        }

        async fn reissue(&self, reissue: &Reissue) -> Result<Option<Reissued>> {
            self.call(async {
                let reissued = self.world.store.reissue(reissue).await?;
                let what = match reissue.suspect {
                    Suspect::Batch(_) => "batches reissued",
                    Suspect::Lease(_) => "leases reissued",
                };
                self.world.faults.count(what, u64::from(reissued.is_some()));
                Ok(reissued)
            })
            .await
        }

        async fn unhold(&self, wanted: &[Unhold], held: Held, now: Timestamp) -> Result<Vec<u64>> {
            self.call(async {
                let freed = self.world.store.unhold(wanted, held, now).await?;
                self.world.faults.count("deliveries freed", freed.iter().sum());
                Ok(freed)
            })
            .await
        }
    }
    due(lanes: &[&str], by: Timestamp) -> DueNow;
    acknowledge(batch: BatchId, at: LogPosition) -> ();
    batches(now: Timestamp, limit: usize) -> Vec<Batch>;
    held() -> Vec<(String, Held)>;
    reserve(from: Timestamp, until: Timestamp) -> u64;
    next_reserved(endpoint: &str) -> Option<Timestamp>;
    expire(now: Timestamp, limit: usize) -> u64;
}

faulty! {
    Execution {
        async fn record(&self, records: &Records<'_>) -> Result<Vec<MessageId>> {
            self.call(async {
                let refused = self.world.store.record(records).await?;
                self.world.history.lock().unwrap().recorded(records.records, &refused);
                Ok(refused)
            })
            .await
        }

        async fn hold(&self, lane: &str, tickets: &[Ticket], held: Held, now: Timestamp) -> Result<u64> {
            self.call(async {
                let count = self.world.store.hold(lane, tickets, held, now).await?;
                self.world.faults.count("deliveries held", count);
                Ok(count)
            })
            .await
        }
    }
    begin(begin: &Begin<'_>) -> Vec<Begun>;
    dead_letters(before: Timestamp, limit: usize) -> Vec<DeadLetter>;
    dead_lettered(ids: &[MessageId]) -> ();
}

faulty! {
    Upkeep {
        /// Only a store in the process itself does anything here, and its answer is not lost.
        async fn bring_forward(&self, by: Duration, now: Timestamp) -> Result<()> {
            self.process.is_alive().await;
            match self.world.store_clock {
                Some(_) => Ok(()),
                None => self.world.store.bring_forward(by, now).await,
            }
        }
    }
    recover(recovery: &Recovery<'_>) -> Recovered;
    remove_old(removal: &Removal) -> Removed;
    check_feeds(now: Timestamp) -> bool;
    reconcile(now: Timestamp, limit: usize) -> Reconciled;
    reconciliation() -> Reconciliation;
    make_partitions() -> ();
}

faulty! {
    Operations {}
    message(id: MessageId) -> Option<Message>;
    messages(ids: &[MessageId]) -> Vec<Message>;
    search(filter: &Filter, from: Cursor, limit: usize) -> Page;
    change(change: Change, ids: &[MessageId], now: Timestamp) -> Vec<MessageId>;
    open_operation(change: Change, filter: &Filter, now: Timestamp) -> Operation;
    work_operation(id: OperationId, limit: usize, now: Timestamp) -> Option<Operation>;
    operation(id: OperationId) -> Option<Operation>;
    idle_operations(before: Timestamp) -> Vec<OperationId>;
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
