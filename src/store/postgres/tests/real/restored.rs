//! Feeds of a database that has come from another server, and what the reconciliation finds.

use super::*;

struct Restored {
    scratch: Scratch,
    store: PostgresStore,
    db: tokio_postgres::Client,
}

impl Restored {
    /// Ten messages in each place and three that no feed has come to, of which one is cancelled.
    async fn new() -> Restored {
        let scratch = scratch().await;
        let (store, db) = (ready(scratch.url()).await, client(scratch.url()).await);
        let restored = Restored { scratch, store, db };
        restored.insert(10).await;
        assert_eq!(deliver_all(&restored.store, &restored.db).await, 10);
        restored.insert(10).await;
        assert_eq!(claim(&restored.store, Urgency::Normal, 10).await.tickets.len(), 10);
        let wait = "insert into waiting (message_id, endpoint_id, due_at, attempts, lane, lane_tries, priority) \
                    select id, 1, now() + interval '1 day', 1, 'messages-retry', 0, 0 from messages where id > 20";
        restored.insert(10).await;
        assert_eq!(claim(&restored.store, Urgency::Normal, 10).await.tickets.len(), 10);
        restored.run("delete from batches where lo > 20").await;
        restored.run(wait).await;
        restored.insert(3).await;
        let cancelled =
            restored.store.change(Change::Cancel, &[MessageId(31)], Timestamp::EPOCH).await.unwrap();
        assert_eq!(cancelled, [MessageId(31)]);
        restored
    }

    async fn run(&self, sql: &str) {
        self.db.batch_execute(sql).await.unwrap();
    }

    async fn insert(&self, count: i64) {
        let insert = "insert into messages (recipient, content) select '+90', 'Hello' from generate_series(1, $1::bigint)";
        self.db.execute(insert, &[&count]).await.unwrap();
    }

    async fn check_feeds(&self) -> bool {
        self.store.check_feeds(crate::clock::Clock::system().now()).await.unwrap()
    }

    /// Looks at everything; how many had no place.
    async fn reconcile(&self) -> u64 {
        let mut repaired = 0;
        loop {
            let now = crate::clock::Clock::system().now();
            let done = self.store.reconcile(now, 7).await.unwrap();
            repaired += done.repaired;
            if done.finished {
                assert!(!done.urgent);
                return repaired;
            }
        }
    }

    async fn due(&self) -> Vec<i64> {
        let now = crate::clock::Clock::system().now();
        let (due, batch) = (Due::Timed { lane: "", by: now }, BatchId::random());
        let claim =
            Claim { due, limit: 100, lane: "messages", batch, saturated: &[], owner: InstanceId(1), now };
        self.store.claim(&claim).await.unwrap().tickets.iter().map(|ticket| ticket.id.0).collect()
    }
}

/// What a database that has come from another server says: another server's number, or transactions still to come.
const FOREIGN: [&str; 2] = [
    "update reconciliation set server = server - 1",
    "update feed set done = '90000000000:90000000000:', upto = '90000000000:90000000000:' where class = 1",
];

#[tokio::test]
async fn feeds_of_another_server_are_made_anew() {
    for foreign in FOREIGN {
        let restored = Restored::new().await;
        assert!(!restored.check_feeds().await, "they are its own");
        restored.run(foreign).await;
        assert!(restored.check_feeds().await, "{foreign}");
        assert!(!restored.check_feeds().await, "once is enough");
        restored.insert(2).await;
        let new = claim(&restored.store, Urgency::Normal, 100).await;
        assert_eq!(new.tickets.iter().map(|ticket| ticket.id.0).collect::<Vec<_>>(), [34, 35]);
        assert_eq!(restored.reconcile().await, 2, "{foreign}");
        assert_eq!(restored.due().await, [32, 33]);
        assert_eq!(restored.reconcile().await, 0);
        let stands = restored.store.reconciliation().await.unwrap();
        assert_eq!((stands.checked, stands.repaired, stands.feeds_made_at.is_some()), (70, 2, true));
    }
}

/// Numbers of transactions that the new server reaches later mean nothing, either.
#[tokio::test]
async fn a_message_before_the_new_feeds_is_never_claimed_by_them() {
    let restored = Restored::new().await;
    let next = "select (pg_snapshot_xmax(pg_current_snapshot())::text::bigint + 20)::text";
    let next: String = restored.db.query_one(next, &[]).await.unwrap().get(0);
    restored.run(&format!("update messages set tx = '{next}'; {}", FOREIGN[0])).await;
    assert!(restored.check_feeds().await);
    for _ in 0..40 {
        restored.insert(1).await;
    }
    let mut claimed = Vec::new();
    for _ in 0..10 {
        let taken = claim(&restored.store, Urgency::Normal, 10).await;
        claimed.extend(taken.tickets.iter().map(|ticket| ticket.id.0));
    }
    assert_eq!(claimed, (34..74).collect::<Vec<_>>());
    assert_eq!(restored.reconcile().await, 2);
}

/// A prepared transaction is open to everybody until it is committed, also after a restart of its client.
#[tokio::test]
async fn a_two_phase_commit_is_read_once_it_is_committed() {
    let scratch = scratch().await;
    let (store, db) = (ready(scratch.url()).await, client(scratch.url()).await);
    let name = scratch.url().rsplit('/').next().unwrap().to_owned();
    for (n, end) in ["commit prepared", "rollback prepared"].into_iter().enumerate() {
        let other = client(scratch.url()).await;
        let prepare = format!("begin; {INSERT}; {INSERT}; prepare transaction '{name}_{n}'");
        other.batch_execute(&prepare).await.unwrap();
        drop(other);
        db.batch_execute(INSERT).await.unwrap();
        assert_eq!(claim(&store, Urgency::Normal, 10).await.tickets.len(), 1, "the one that is committed");
        assert_eq!(claim(&store, Urgency::Normal, 10).await.tickets.len(), 0);
        db.batch_execute(&format!("{end} '{name}_{n}'")).await.unwrap();
        let expected = if end == "commit prepared" { 2 } else { 0 };
        assert_eq!(claim(&store, Urgency::Normal, 10).await.tickets.len(), expected, "{end}");
    }
}

/// Partitions in which everything has ended long ago go whole, with what belongs to them.
#[tokio::test]
async fn an_old_partition_is_dropped_whole_and_only_when_all_of_it_has_ended() {
    let restored = Restored::new().await;
    let drop_old = async || {
        let now = crate::clock::Clock::system().now();
        let before = now.after(Duration::from_secs(3_600));
        let removal = Removal { before, rows_before: Timestamp::EPOCH, from: MessageId(0), limit: 10 };
        restored.store.remove_old(&removal).await.unwrap().partitions
    };
    assert_eq!(drop_old().await, 0, "ids in it are still to be given");
    restored.run("select setval('message_ids', 5000100)").await;
    restored.insert(1).await;
    assert_eq!(drop_old().await, 0, "not all of it has ended");
    restored
        .run(
            "delete from waiting; delete from batches; delete from cancels; \
             insert into deliveries (message_id, endpoint_id, status, attempts, lane, finished_at) \
             select id, 1, 'sent', 1, 'messages', now() from messages where id < 5000000 on conflict do nothing",
        )
        .await;
    assert_eq!(drop_old().await, 0, "no feed has passed its last transaction");
    assert_eq!(claim(&restored.store, Urgency::Normal, 10).await.seen, 4);
    restored.run("delete from batches where lo < 5000000; delete from batches where hi < 5000000").await;
    // A feed of which nothing comes moves on now and then.
    for urgency in Urgency::ALL {
        for _ in 0..250 {
            assert_eq!(claim(&restored.store, urgency, 10).await.seen, 0);
        }
    }
    let reader = client(restored.scratch.url()).await;
    reader.batch_execute("begin; select count(*) from messages").await.unwrap();
    let now = crate::clock::Clock::system().now();
    let removal = Removal {
        before: now.after(Duration::from_secs(3_600)),
        rows_before: Timestamp::EPOCH,
        from: MessageId(0),
        limit: 10,
    };
    let refused = restored.store.remove_old(&removal).await;
    assert!(matches!(refused, Err(StoreError::Unavailable(_))), "a reader is given way to: {refused:?}");
    reader.batch_execute("commit").await.unwrap();
    assert_eq!(drop_old().await, 1);
    let left = "select (select count(*) from messages), (select count(*) from deliveries), \
                to_regclass('messages_0') is null and to_regclass('attempts_0') is null";
    let row = restored.db.query_one(left, &[]).await.unwrap();
    assert_eq!((row.get::<_, i64>(0), row.get::<_, i64>(1), row.get(2)), (1, 0, true));
}
