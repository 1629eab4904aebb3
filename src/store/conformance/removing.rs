//! The reconciliation, and the retention: what is old and final goes, and nothing else.

use std::sync::Arc;

use super::{Bench, RETRY, text};
use crate::message::{MessageId, NewMessage};
use crate::store::operate::Change;
use crate::store::{Due, Inserted, Removal, Store, Urgency};

impl Bench {
    /// Removes what became final `seconds` ago or earlier, `limit` rows a call; returns how many messages went.
    async fn remove(&self, seconds: i64, limit: usize) -> u64 {
        let before = crate::clock::Timestamp::from_micros(self.now().as_micros() - seconds * 1_000_000);
        let (mut messages, mut from) = (0, Some(MessageId(0)));
        while let Some(id) = from {
            let removal = Removal { before, rows_before: before, from: id, limit };
            let removed = self.store.remove_old(&removal).await.unwrap();
            messages += removed.messages;
            from = removed.next;
        }
        messages
    }

    async fn is_there(&self, id: MessageId) -> bool {
        self.store.message(id).await.unwrap().is_some()
    }
}

pub(crate) async fn every_place_is_found_by_the_reconciliation(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    assert!(!bench.store.check_feeds(bench.now()).await.unwrap(), "the feeds are this store's own");
    let deliveries = bench.processing(4).await;
    bench
        .record(&[bench.sent(&deliveries[0]), bench.failed(&deliveries[1]), bench.dead(&deliveries[2])])
        .await;
    let cancelled = bench.fill(1).await;
    bench.store.change(Change::Cancel, &cancelled, bench.now()).await.unwrap();
    bench.fill(2).await;
    bench.claim(Due::New(Urgency::Normal), 2).await;
    bench.fill(3).await;
    for round in 1..3 {
        let (mut checked, mut finished) = (0, false);
        while !finished {
            let done = bench.store.reconcile(bench.now(), 4).await.unwrap();
            assert_eq!((done.repaired, done.urgent), (0, false));
            checked += done.checked;
            finished = done.finished;
        }
        assert_eq!(checked, 10);
        let stands = bench.store.reconciliation().await.unwrap();
        assert_eq!((stands.at, stands.checked, stands.repaired), (MessageId(0), 10 * round, 0));
        assert_eq!((stands.finished_at, stands.feeds_made_at), (Some(bench.now()), None));
        bench.pass(1);
    }
}

pub(crate) async fn what_is_old_and_final_goes(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    let deliveries = bench.processing(7).await;
    let (old, young) = deliveries.split_at(5);
    let failed = bench.failed(&old[4]);
    bench
        .record(&[bench.sent(&old[0]), bench.sent(&old[1]), bench.dead(&old[2]), bench.dead(&old[3]), failed])
        .await;
    bench.store.dead_lettered(&[old[2].id()]).await.unwrap();
    bench.pass(3);
    let retried = bench.begin(&bench.claim_timed(RETRY).await.tickets).await;
    bench.record(&[bench.sent(&retried[0])]).await;
    bench.pass(100);
    bench.record(&[bench.sent(&young[0]), bench.sent(&young[1])]).await;
    assert_eq!(bench.remove(200, 2).await, 0, "nothing is that old");
    // The fourth has a dead letter that is not published yet.
    assert_eq!(bench.remove(50, 2).await, 4);
    for (n, delivery) in deliveries.iter().enumerate() {
        assert_eq!(bench.is_there(delivery.id()).await, [3, 5, 6].contains(&n), "message {n}");
        assert_eq!(
            bench.store.attempts(delivery.id()).await.unwrap().len(),
            usize::from([3, 5, 6].contains(&n))
        );
    }
    assert_eq!(bench.remove(50, 2).await, 0);
    bench.pass(100);
    assert_eq!(bench.remove(50, 100).await, 2);
}

pub(crate) async fn what_has_not_ended_stays_however_old_it_is(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    let begun = bench.processing(2).await;
    bench.record(&[bench.failed(&begun[0])]).await;
    let queued = bench.fill(1).await[0];
    bench.claim_fresh().await;
    let held = bench.fill(1).await[0];
    bench.claim_beside(bench.owner, Due::New(Urgency::Normal), 10, &["default".to_owned()]).await;
    let new = bench.fill(1).await[0];
    bench.pass(100_000);
    assert_eq!(bench.remove(10, 10).await, 0);
    for id in [begun[0].id(), begun[1].id(), queued, held, new] {
        assert!(bench.is_there(id).await, "{id}");
    }
}

pub(crate) async fn keys_go_with_their_messages(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    let keyed = |key: &str| NewMessage { idempotency_key: Some(key.to_owned()), ..text("x") };
    let ids = bench.insert(&[keyed("sent"), keyed("open")]).await;
    let delivery = bench.begin(&bench.claim_fresh().await.tickets[..1]).await.remove(0);
    bench.record(&[bench.sent(&delivery)]).await;
    bench.pass(1_000);
    assert_eq!(bench.remove(500, 10).await, 1);
    let again = bench.store.insert(&[keyed("sent"), keyed("open")], bench.now()).await.unwrap();
    assert!(matches!(again[0], Inserted::New { .. }), "its key may be used again: {again:?}");
    assert_eq!(again[1], Inserted::Existing(ids[1]), "its message is still open");
}
