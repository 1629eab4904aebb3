//! The feeds: every message that is committed is claimed exactly once, however it was committed, and no other is.
//!
//! Two-phase commit is tested beside the feeds that are made anew. To a snapshot a prepared transaction is an open one, so
//! it is read as a late commit is.

use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use futures_util::SinkExt as _;
use tokio_postgres::Client;

use super::*;
use crate::store::operate::Change;

/// A store, and what has been claimed from it.
struct Feed {
    scratch: Scratch,
    store: PostgresStore,
    db: Client,
    claimed: Vec<i64>,
}

impl Feed {
    async fn new() -> Feed {
        let scratch = scratch().await;
        let (store, db) = (ready(scratch.url()).await, client(scratch.url()).await);
        Feed { scratch, store, db, claimed: Vec::new() }
    }

    async fn writer(&self) -> Client {
        client(self.scratch.url()).await
    }

    /// Claims all that is visible, few at a time, so that positions come to lie everywhere.
    async fn drain(&mut self) {
        drain(&self.store, Urgency::Normal, 7, &mut self.claimed).await;
    }

    fn has(&self, id: i64) -> bool {
        self.claimed.contains(&id)
    }

    /// Asserts that every committed message has been claimed once, and no other.
    async fn assert_exact(&mut self) {
        let committed = self.db.query("select id from messages order by id", &[]).await.unwrap();
        let committed: Vec<i64> = committed.iter().map(|row| row.get(0)).collect();
        self.claimed.sort_unstable();
        assert_eq!(self.claimed, committed);
        let batches = "select count(distinct id), count(*) from (select unnest(ids) as id from batches) b";
        let row = self.db.query_one(batches, &[]).await.unwrap();
        let count = i64::try_from(committed.len()).unwrap();
        assert_eq!((row.get::<_, i64>(0), row.get::<_, i64>(1)), (count, count), "each stands in one batch");
    }
}

/// Claims until nothing is left. A claim that ends a window may see nothing although there is more in the next one.
async fn drain(store: &PostgresStore, urgency: Urgency, limit: usize, claimed: &mut Vec<i64>) {
    let mut in_vain = 0;
    while in_vain < 2 {
        let taken = claim(store, urgency, limit).await;
        in_vain = if taken.seen == 0 { in_vain + 1 } else { 0 };
        claimed.extend(taken.tickets.iter().map(|ticket| ticket.id.0));
    }
}

/// Inserts some, and says which ids they have.
async fn insert(db: &Client, count: i64) -> Vec<i64> {
    let insert = "insert into messages (recipient, content) select '+90', 'Hello' from generate_series(1, $1::bigint) returning id";
    db.query(insert, &[&count]).await.unwrap().iter().map(|row| row.get(0)).collect()
}

const BEGIN: &str = "begin";
const COMMIT: &str = "commit";
const ROLLBACK: &str = "rollback";
/// Some of these rows are committed: those with an odd number of their own.
const SAVEPOINTS: &str = "begin; \
    insert into messages (recipient, content) values ('1', 'x'); \
    savepoint a; insert into messages (recipient, content) values ('2', 'x'); \
    savepoint b; insert into messages (recipient, content) values ('4', 'x'); rollback to a; \
    savepoint c; insert into messages (recipient, content) values ('3', 'x'), ('5', 'x'); release c; \
    insert into messages (recipient, content) values ('7', 'x'); commit";
const EXCEPTION: &str = "do $$ begin \
    insert into messages (recipient, content) values ('1', 'x'); \
    begin \
        insert into messages (recipient, content) values ('2', 'x'); \
        insert into messages (recipient, content) values ('', 'refused'); \
    exception when check_violation then \
        insert into messages (recipient, content) values ('3', 'x'); \
    end; \
    begin insert into messages (recipient, content) values ('5', 'x'); exception when others then null; end; \
end $$";

#[tokio::test]
async fn a_late_commit_is_claimed_behind_later_ids() {
    let mut feed = Feed::new().await;
    let late = [feed.writer().await, feed.writer().await, feed.writer().await];
    let mut ids = Vec::new();
    for writer in &late {
        writer.batch_execute(BEGIN).await.unwrap();
        ids.push(insert(writer, 10).await[9]);
        insert(&feed.db, 20).await;
    }
    feed.drain().await;
    assert_eq!(feed.claimed.len(), 60, "what is committed waits for nobody");
    // Not in the order in which they began, and each beside new ones.
    for i in [1, 2, 0] {
        late[i].batch_execute(COMMIT).await.unwrap();
        insert(&feed.db, 5).await;
        feed.drain().await;
        assert!(feed.has(ids[i]));
    }
    feed.assert_exact().await;
    assert_eq!(feed.claimed.len(), 105);
}

/// A window of late ones is left in its middle, and others of them are committed meanwhile.
#[tokio::test]
async fn transactions_that_end_while_a_window_is_read_are_in_the_next_one() {
    let mut feed = Feed::new().await;
    let mut late = Vec::new();
    for _ in 0..6 {
        let writer = feed.writer().await;
        writer.batch_execute(BEGIN).await.unwrap();
        insert(&writer, 5).await;
        late.push(writer);
    }
    insert(&feed.db, 10).await;
    feed.drain().await;
    for i in [3, 0, 5, 1] {
        late[i].batch_execute(COMMIT).await.unwrap();
        insert(&feed.db, 3).await;
        let taken = claim(&feed.store, Urgency::Normal, 4).await;
        feed.claimed.extend(taken.tickets.iter().map(|ticket| ticket.id.0));
    }
    late[2].batch_execute(ROLLBACK).await.unwrap();
    late[4].batch_execute(COMMIT).await.unwrap();
    feed.drain().await;
    feed.assert_exact().await;
    assert_eq!(feed.claimed.len(), 10 + 5 * 5 + 4 * 3);
}

#[tokio::test]
async fn what_is_rolled_back_is_never_claimed() {
    let mut feed = Feed::new().await;
    let writer = feed.writer().await;
    for _ in 0..5 {
        writer.batch_execute(BEGIN).await.unwrap();
        let undone = insert(&writer, 10).await;
        insert(&feed.db, 10).await;
        feed.drain().await;
        writer.batch_execute(ROLLBACK).await.unwrap();
        feed.drain().await;
        assert!(!undone.iter().any(|id| feed.has(*id)));
    }
    feed.assert_exact().await;
    assert_eq!(feed.claimed.len(), 50);
}

#[tokio::test]
async fn savepoints_exceptions_and_copies_are_claimed_as_they_were_committed() {
    let mut feed = Feed::new().await;
    let writer = feed.writer().await;
    for _ in 0..5 {
        writer.batch_execute(SAVEPOINTS).await.unwrap();
        feed.drain().await;
        writer.batch_execute(EXCEPTION).await.unwrap();
        copy(&writer, 20).await;
        feed.drain().await;
    }
    feed.assert_exact().await;
    assert_eq!(feed.claimed.len(), 5 * (4 + 3 + 20));
    let undone = "select count(*) from messages where recipient in ('2', '4')";
    assert_eq!(feed.db.query_one(undone, &[]).await.unwrap().get::<_, i64>(0), 0);
}

async fn copy(db: &Client, count: usize) {
    let sink = db.copy_in::<_, Bytes>("copy messages (recipient, content) from stdin").await.unwrap();
    let mut sink = std::pin::pin!(sink);
    sink.send(Bytes::from("+90\tcopied\n".repeat(count))).await.unwrap();
    assert_eq!(sink.finish().await.unwrap(), count as u64);
}

#[tokio::test]
async fn a_transaction_that_is_open_throughout_holds_nothing_back() {
    let mut feed = Feed::new().await;
    let open = feed.writer().await;
    open.batch_execute("begin isolation level repeatable read").await.unwrap();
    let undone = insert(&open, 3).await;
    for round in 1..=20 {
        insert(&feed.db, 30).await;
        feed.drain().await;
        assert_eq!(feed.claimed.len(), 30 * round, "everything else is claimed at once");
    }
    open.batch_execute(ROLLBACK).await.unwrap();
    insert(&feed.db, 1).await;
    feed.drain().await;
    assert!(!undone.iter().any(|id| feed.has(*id)));
    feed.assert_exact().await;
}

/// A window that ends on a full claim must still be written down as read.
#[tokio::test]
async fn a_claim_that_is_exactly_full_hides_nothing_that_comes_after_it() {
    let mut feed = Feed::new().await;
    for _ in 0..4 {
        insert(&feed.db, 14).await;
        feed.drain().await;
    }
    insert(&feed.db, 7).await;
    let full = claim(&feed.store, Urgency::Normal, 7).await;
    insert(&feed.db, 7).await;
    feed.claimed.extend(full.tickets.iter().map(|ticket| ticket.id.0));
    feed.drain().await;
    feed.assert_exact().await;
    assert_eq!(feed.claimed.len(), 70);
}

/// What a restore does to the feeds: messages of before carry numbers of transactions that this server has still to
/// give out. They got their places when the feeds were made anew, and are not claimed when the numbers come.
#[tokio::test]
async fn messages_of_before_a_restore_are_not_claimed_when_their_numbers_come() {
    let mut feed = Feed::new().await;
    let before = insert(&feed.db, 20).await;
    feed.drain().await;
    let foreign = "update messages set tx = (pg_current_xact_id()::text::bigint + 1 + id % 10)::text::xid8";
    feed.db.batch_execute(foreign).await.unwrap();
    let anew = "update feed set done = pg_current_snapshot(), upto = pg_current_snapshot(), at_tx = null, \
                at_id = null, base_id = (select max(id) from messages)";
    feed.db.batch_execute(anew).await.unwrap();
    for _ in 0..15 {
        insert(&feed.db, 1).await;
        feed.drain().await;
    }
    assert_eq!(before.len(), 20);
    feed.assert_exact().await;
}

/// Writes as many kinds of transactions as there are, at random.
async fn write(writer: Client, rounds: usize) {
    for _ in 0..rounds {
        match fastrand::u8(0..8) {
            0 => writer.batch_execute(SAVEPOINTS).await.unwrap(),
            1 => writer.batch_execute(EXCEPTION).await.unwrap(),
            2 => copy(&writer, fastrand::usize(1..20)).await,
            kind @ 3..=5 => {
                writer.batch_execute(BEGIN).await.unwrap();
                insert(&writer, fastrand::i64(1..10)).await;
                for _ in 0..fastrand::u8(0..20) {
                    writer.batch_execute("select 1").await.unwrap();
                }
                insert(&writer, fastrand::i64(1..10)).await;
                writer.batch_execute(if kind == 3 { ROLLBACK } else { COMMIT }).await.unwrap();
            }
            _ => drop(insert(&writer, fastrand::i64(1..10)).await),
        }
    }
}

#[tokio::test]
async fn two_racing_claimers_take_each_message_of_four_writers_once() {
    let mut feed = Feed::new().await;
    let open_throughout = feed.writer().await;
    open_throughout.batch_execute(BEGIN).await.unwrap();
    insert(&open_throughout, 1).await;
    let other = open(feed.scratch.url());
    let done = AtomicBool::new(false);
    let race = async |store: &PostgresStore| {
        let mut claimed = Vec::new();
        while !done.load(Ordering::Relaxed) {
            let taken = claim(store, Urgency::Normal, 7).await;
            claimed.extend(taken.tickets.iter().map(|ticket| ticket.id.0));
        }
        claimed
    };
    let writers = async {
        let [a, b, c, d] = [0, 1, 2, 3].map(|_| feed.writer());
        let (a, b, c, d) = tokio::join!(a, b, c, d);
        tokio::join!(write(a, 150), write(b, 150), write(c, 150), write(d, 150));
        // The claimers go on until they have found the end.
        let newest = "select count(*) from messages m where not exists (select from batches b where m.id = any(b.ids))";
        while feed.db.query_one(newest, &[]).await.unwrap().get::<_, i64>(0) > 0 {
            tokio::task::yield_now().await;
        }
        done.store(true, Ordering::Relaxed);
    };
    let limit = tokio::time::timeout(Duration::from_secs(60), async {
        tokio::join!(race(&feed.store), race(&other), writers)
    });
    let (ours, theirs, ()) = limit.await.expect("all is claimed in time");
    println!("{} and {} claimed", ours.len(), theirs.len());
    assert!(!ours.is_empty() && !theirs.is_empty());
    feed.claimed = [ours, theirs].concat();
    open_throughout.batch_execute(ROLLBACK).await.unwrap();
    feed.drain().await;
    feed.assert_exact().await;
}

#[tokio::test]
async fn an_urgent_message_waits_behind_no_other() {
    let mut feed = Feed::new().await;
    insert(&feed.db, 10_000).await;
    let of_priority =
        "insert into messages (recipient, content, priority) values ('+90', 'Hello', $1) returning id";
    let mut ids = Vec::new();
    for priority in [-1_i16, 1, -100, 100] {
        ids.push(feed.db.query_one(of_priority, &[&priority]).await.unwrap().get::<_, i64>(0));
    }
    for (urgency, expected) in [(Urgency::Urgent, [ids[1], ids[3]]), (Urgency::Bulk, [ids[0], ids[2]])] {
        let taken = claim(&feed.store, urgency, 1_000).await;
        assert_eq!(taken.tickets.iter().map(|ticket| ticket.id.0).collect::<Vec<_>>(), expected);
    }
    drain(&feed.store, Urgency::Normal, 1_000, &mut feed.claimed).await;
    assert_eq!(feed.claimed.len(), 10_000);
    feed.claimed.extend(ids);
    feed.assert_exact().await;
}

#[tokio::test]
async fn a_message_that_is_cancelled_before_its_claim_is_never_claimed() {
    let mut feed = Feed::new().await;
    let now = crate::clock::Clock::system().now();
    let ids = insert(&feed.db, 20).await;
    let cancelled: Vec<_> = ids.iter().copied().filter(|id| id % 3 == 0).map(MessageId).collect();
    let mut changed = feed.store.change(Change::Cancel, &cancelled, now).await.unwrap();
    changed.sort_unstable();
    assert_eq!(changed, cancelled);
    feed.drain().await;
    feed.claimed.extend(cancelled.iter().map(|id| id.0));
    feed.claimed.sort_unstable();
    assert_eq!(feed.claimed, ids, "the others are claimed once");
    let left = "select (select count(*) from cancels), (select count(*) from message_status where status = 'cancelled')";
    let left = feed.db.query_one(left, &[]).await.unwrap();
    assert_eq!((left.get::<_, i64>(0), left.get::<_, i64>(1)), (0, 6), "the feed has come past them");
}

/// Of a message: how often it stands in a batch, whether it is cancelled, whether a feed would still pass over it.
async fn places(db: &Client, id: i64) -> (i64, bool, bool) {
    let places = "select (select count(*) from batches b where get_bit(b.\"left\", array_position(b.ids, $1) - 1) = 1), \
                      exists (select from deliveries where message_id = $1 and status = 'cancelled'), \
                      exists (select from cancels where message_id = $1)";
    let row = db.query_one(places, &[&id]).await.unwrap();
    (row.get(0), row.get(1), row.get(2))
}

#[tokio::test]
async fn a_cancel_that_races_the_claim_leaves_the_message_in_one_place() {
    let feed = Feed::new().await;
    let other = open(feed.scratch.url());
    let (mut before, mut taken_out, mut missed) = (0, 0, 0);
    for round in 0..150 {
        let id = insert(&feed.db, 1).await[0];
        let ids = [MessageId(id)];
        let cancel = async {
            // At first the claim is ahead, at last the cancel.
            for _ in 0..(round % 5) {
                tokio::task::yield_now().await;
            }
            other.change(Change::Cancel, &ids, crate::clock::Clock::system().now()).await.unwrap()
        };
        let claims = async {
            let mut claimed = Vec::new();
            drain(&feed.store, Urgency::Normal, 7, &mut claimed).await;
            claimed
        };
        let (cancelled, claimed) = tokio::join!(cancel, claims);
        let mut late = Vec::new();
        drain(&feed.store, Urgency::Normal, 7, &mut late).await;
        assert_eq!(
            late.iter().filter(|_| !cancelled.is_empty()).count(),
            0,
            "claimed after its cancel was answered"
        );
        let (batches, is_cancelled, is_passed) = places(&feed.db, id).await;
        assert_eq!(is_cancelled, cancelled == ids, "round {round}");
        assert_eq!(batches, i64::from(!is_cancelled), "round {round}: in its batch, or cancelled");
        assert!(!is_passed, "round {round}: the feed has come past it");
        match (is_cancelled, claimed.is_empty()) {
            (true, true) => before += 1,
            (true, false) => taken_out += 1,
            (false, _) => missed += 1,
        }
    }
    println!(
        "{before} cancelled before the claim, {taken_out} taken out of their batch, {missed} not at all"
    );
    assert_eq!(missed, 0, "what has not begun can be cancelled");
    assert!(before > 0 && taken_out > 0, "they did not race: {before}, {taken_out}");
}

/// The feeds' indexes are in the order of the transactions, and pages in the order of the ids.
#[tokio::test]
async fn a_search_for_what_is_new_misses_nothing_of_transactions_that_ran_side_by_side() {
    let feed = Feed::new().await;
    let writers = [feed.writer().await, feed.writer().await];
    for writer in &writers {
        writer.batch_execute(BEGIN).await.unwrap();
    }
    let mut ids = Vec::new();
    for round in 0..100 {
        ids.extend(insert(&writers[round % 2], 50).await);
    }
    for writer in &writers {
        writer.batch_execute(COMMIT).await.unwrap();
    }
    let filter = Filter { status: Some(Status::Pending), ..Filter::default() };
    let (mut from, mut found) = (Cursor::start(&filter), Vec::new());
    loop {
        let page = feed.store.search(&filter, from, 700).await.unwrap();
        found.extend(page.ids.iter().map(|id| id.0));
        let Some(next) = page.next else { break };
        from = next;
    }
    ids.reverse();
    assert_eq!(found, ids);
}
