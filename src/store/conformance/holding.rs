//! Held rows: kept back at no cost, freed oldest first.

use std::sync::Arc;

use super::{Bench, FRESH, RETRY, ids, pairs, text};
use crate::message::{Held, MessageId, NewMessage, Status};
use crate::store::{Claim, Due, Store};

const BUSY: Held = Held::EndpointBusy;

pub(crate) async fn a_held_ticket_is_not_claimable(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    bench.fill(3).await;
    let tickets = pairs(&bench.claim_fresh().await);
    assert_eq!(bench.store.hold(&tickets[..2], BUSY, bench.now()).await.unwrap(), 2);
    let row = bench.message(tickets[0].0).await;
    assert_eq!((row.status, row.held, row.attempts, row.epoch), (Status::Pending, Some(BUSY), 0, 1));
    assert!(bench.begin(1, &tickets[..2]).await.is_empty());
    bench.pass(3_600);
    assert_eq!(bench.claim_fresh().await.seen + bench.claim_timed("").await.seen, 0);
    assert_eq!(bench.store.held().await.unwrap(), [("default".to_owned(), BUSY)]);
    // The other reason, and another endpoint, free nothing.
    let (store, now) = (&bench.store, bench.now());
    assert_eq!(store.unhold("default", Held::EndpointClosed, 10, now).await.unwrap(), 0);
    assert_eq!(store.unhold("other", BUSY, 10, now).await.unwrap(), 0);
    assert_eq!(store.unhold("default", BUSY, 10, now).await.unwrap(), 2);
    let claimed = bench.claim(Due::up_to(tickets[2].0), 10).await;
    assert_eq!(pairs(&claimed), [(tickets[0].0, 2), (tickets[1].0, 2)]);
    assert!(store.held().await.unwrap().is_empty());
}

pub(crate) async fn rows_of_a_busy_endpoint_are_held_by_the_claim(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    let message = |endpoint: &str| NewMessage { endpoint: Some(endpoint.to_owned()), ..text("Hello") };
    let all = bench.insert(&["busy", "default", "closed", "busy"].map(message)).await;
    let (open, busy) = (&["default", "busy"].map(str::to_owned), &["busy", "closed"].map(str::to_owned));
    let (due, owner) = (Due::after(MessageId(0)), bench.owner);
    let claim = Claim { due, limit: 10, lane: FRESH, open, busy, pass_busy: false, owner, now: bench.now() };
    let claimed = bench.store.claim(&claim).await.unwrap();
    assert_eq!((ids(&claimed), claimed.seen, claimed.last), (vec![all[1]], 4, Some(all[3])));
    let row = bench.message(all[0]).await;
    assert_eq!((row.status, row.held, row.epoch), (Status::Pending, Some(BUSY), 1));
    let held = bench.store.held().await.unwrap();
    assert_eq!(held, [("busy".to_owned(), BUSY), ("closed".to_owned(), Held::EndpointClosed)]);
    assert_eq!(bench.store.unhold("busy", BUSY, 10, bench.now()).await.unwrap(), 2);
    for pass_busy in [false, true] {
        // They were freed because there is room for them, however busy their endpoint is.
        let claim = Claim { due: Due::up_to(all[3]), limit: 1, pass_busy, ..claim };
        assert_eq!(bench.store.claim(&claim).await.unwrap().tickets.len(), 1);
    }
    assert_eq!(bench.message(all[3]).await.status, Status::Queued);
}

pub(crate) async fn new_rows_of_a_busy_endpoint_are_passed_by(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    let message = |endpoint: &str| NewMessage { endpoint: Some(endpoint.to_owned()), ..text("Hello") };
    let all = bench.insert(&["busy", "busy", "default", "busy", "closed", "default"].map(message)).await;
    let (open, busy) = (&["default", "busy"].map(str::to_owned), &["busy".to_owned()]);
    let (due, owner) = (Due::after(MessageId(0)), bench.owner);
    let claim = Claim { due, limit: 2, lane: FRESH, open, busy, pass_busy: true, owner, now: bench.now() };
    let claimed = bench.store.claim(&claim).await.unwrap();
    assert_eq!((ids(&claimed), claimed.seen, claimed.last), (vec![all[2]], 2, Some(all[4])));
    for id in [all[0], all[1], all[3]] {
        let row = bench.message(id).await;
        assert_eq!((row.status, row.held, row.epoch), (Status::Pending, None, 0));
    }
    let claim = Claim { due: Due::up_to(all[4]), ..claim };
    assert_eq!(bench.store.claim(&claim).await.unwrap().seen, 0);
    let claim = Claim { due: Due::after(all[4]), ..claim };
    assert_eq!(ids(&bench.store.claim(&claim).await.unwrap()), [all[5]]);
    let claim = Claim { due: Due::up_to(all[4]), pass_busy: false, limit: 10, ..claim };
    let held = bench.store.claim(&claim).await.unwrap();
    assert_eq!((held.seen, held.tickets.len(), bench.message(all[3]).await.held), (3, 0, Some(BUSY)));
}

pub(crate) async fn what_instances_say_to_be_busy_is_known_while_they_live(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    let (one, two) = (bench.enroll().await, bench.enroll().await);
    let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
    assert!(bench.store.busy().await.unwrap().is_empty());
    bench.store.say_busy(one, &names(&["b", "a"])).await.unwrap();
    bench.store.say_busy(two, &names(&["b", "c"])).await.unwrap();
    assert_eq!(bench.store.busy().await.unwrap(), ["a", "b", "c"]);
    bench.store.say_busy(one, &[]).await.unwrap();
    assert_eq!(bench.store.busy().await.unwrap(), ["b", "c"]);
    bench.store.retire(two).await.unwrap();
    assert!(bench.store.busy().await.unwrap().is_empty());
    bench.store.say_busy(two, &names(&["a"])).await.unwrap();
    assert!(bench.store.busy().await.unwrap().is_empty(), "it has retired");
}

pub(crate) async fn only_tickets_of_the_epoch_are_held(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    bench.fill(3).await;
    let first = bench.claim_fresh().await;
    bench.store.requeue(&[first.batch.expect("a batch")], bench.now()).await.unwrap();
    assert_eq!(bench.store.hold(&pairs(&first), BUSY, bench.now()).await.unwrap(), 0);
    let second = pairs(&bench.claim_fresh().await);
    assert_eq!(bench.store.hold(&pairs(&first), BUSY, bench.now()).await.unwrap(), 0);
    bench.begin(1, &second[..1]).await;
    assert_eq!(bench.store.hold(&second, BUSY, bench.now()).await.unwrap(), 2);
    assert_eq!(bench.store.hold(&second, BUSY, bench.now()).await.unwrap(), 0);
    assert_eq!(bench.message(second[0].0).await.status, Status::Processing);
    assert_eq!(bench.store.hold(&[], BUSY, bench.now()).await.unwrap(), 0);
}

pub(crate) async fn held_rows_are_freed_oldest_first(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    let all = bench.fill(5).await;
    let tickets = pairs(&bench.claim_fresh().await);
    bench.store.hold(&tickets, BUSY, bench.now()).await.unwrap();
    for part in [&all[..2], &all[2..4], &all[4..]] {
        let freed = bench.store.unhold("default", BUSY, 2, bench.now()).await.unwrap();
        assert_eq!(freed, part.len() as u64);
        assert_eq!(ids(&bench.claim_fresh().await), part);
    }
    assert_eq!(bench.store.unhold("default", BUSY, 2, bench.now()).await.unwrap(), 0);
}

pub(crate) async fn a_held_row_that_was_tried_is_due_again_when_freed(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    let first = bench.processing(1, 1).await[0];
    bench.record(&[bench.failed(first, 1)]).await;
    bench.pass(3);
    let second = pairs(&bench.claim_timed(RETRY).await);
    assert_eq!(bench.store.hold(&second, BUSY, bench.now()).await.unwrap(), 1);
    let row = bench.message(first.0).await;
    assert_eq!((row.status, row.held, row.attempts), (Status::Retrying, Some(BUSY), 1));
    assert_eq!(row.lane, RETRY);
    bench.pass(60);
    assert_eq!(bench.claim_timed(RETRY).await.seen, 0);
    assert_eq!(bench.store.unhold("default", BUSY, 10, bench.now()).await.unwrap(), 1);
    let claimed = bench.claim_timed(RETRY).await;
    assert_eq!((pairs(&claimed), claimed.tickets[0].attempt), (vec![(first.0, 3)], 2));
}
