//! Held deliveries: kept back at no cost, freed urgent first, then oldest.

use std::sync::Arc;

use super::{Bench, RETRY, ids, record, text, unhold};
use crate::message::{Held, NewMessage, Status, Verdict};
use crate::store::{Due, Store, Suspect, Unhold, Urgency};

const BUSY: Held = Held::EndpointBusy;

pub(crate) async fn a_held_ticket_is_not_claimable(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    bench.fill(3).await;
    let tickets = bench.claim_fresh().await.tickets;
    assert_eq!(bench.store.hold("messages", &tickets[..2], BUSY, bench.now()).await.unwrap(), 2);
    let row = bench.message(tickets[0].id).await;
    assert_eq!((row.status, row.held, row.attempts), (Status::Pending, Some(BUSY), 0));
    assert!(bench.begin(&tickets[..2]).await.is_empty());
    bench.pass(3_600);
    assert_eq!(bench.claim_fresh().await.seen + bench.claim_timed("").await.seen, 0);
    assert_eq!(bench.store.held().await.unwrap(), [("default".to_owned(), BUSY)]);
    // The other reason, and another endpoint, free nothing.
    let (store, now) = (&bench.store, bench.now());
    assert_eq!(unhold(&**store, "default", Held::EndpointDisabled, 10, now).await, 0);
    assert_eq!(unhold(&**store, "other", BUSY, 10, now).await, 0);
    assert_eq!(unhold(&**store, "default", BUSY, 10, now).await, 2);
    assert_eq!(ids(&bench.claim_timed("").await), [tickets[0].id, tickets[1].id]);
    assert!(store.held().await.unwrap().is_empty());
}

pub(crate) async fn messages_of_a_saturated_endpoint_are_held_by_the_claim(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    bench.open("busy").await;
    let message = |endpoint: &str| NewMessage { endpoint: Some(endpoint.to_owned()), ..text("Hello") };
    let all = bench.insert(&["busy", "default", "closed", "busy"].map(message)).await;
    let saturated = &["busy", "closed"].map(str::to_owned);
    let claimed = bench.claim_beside(bench.owner, Due::New(Urgency::Normal), 10, saturated).await;
    assert_eq!((ids(&claimed), claimed.seen), (vec![all[1]], 4));
    let row = bench.message(all[0]).await;
    assert_eq!((row.status, row.held), (Status::Pending, Some(BUSY)));
    let held = bench.store.held().await.unwrap();
    assert_eq!(held, [("busy".to_owned(), BUSY), ("closed".to_owned(), Held::EndpointDisabled)]);
    assert_eq!(unhold(&*bench.store, "busy", BUSY, 10, bench.now()).await, 2);
    // They were freed because there is room for them, however busy their endpoint is.
    let due = Due::Timed { lane: "", by: bench.now() };
    assert_eq!(ids(&bench.claim_beside(bench.owner, due, 10, saturated).await), [all[0], all[3]]);
}

pub(crate) async fn held_deliveries_expire(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    let short = NewMessage { expires_at: Some(bench.in_seconds(5)), ..text("short") };
    let unknown = NewMessage { endpoint: Some("unknown".to_owned()), ..short.clone() };
    let ids = bench.insert(&[short, unknown, text("long")]).await;
    let tickets = bench.claim_fresh().await.tickets;
    bench.store.hold("messages", &tickets, BUSY, bench.now()).await.unwrap();
    assert_eq!(bench.store.expire(bench.in_seconds(4), 10).await.unwrap(), 0);
    bench.pass(5);
    assert_eq!(bench.store.expire(bench.now(), 1).await.unwrap(), 1);
    assert_eq!(bench.store.expire(bench.now(), 10).await.unwrap(), 1);
    assert_eq!(bench.store.expire(bench.now(), 10).await.unwrap(), 0);
    for (id, status) in ids.iter().zip([Status::Expired, Status::Expired, Status::Pending]) {
        let row = bench.message(*id).await;
        assert_eq!((row.status, row.finished_at.is_some()), (status, status == Status::Expired));
    }
    assert_eq!(bench.store.held().await.unwrap(), [("default".to_owned(), BUSY)]);
}

pub(crate) async fn what_instances_say_to_be_busy_is_known_while_they_live(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    let (one, two) = (bench.enroll().await, bench.enroll().await);
    let names = |names: &[&str]| names.iter().map(|name| (*name).to_owned()).collect::<Vec<_>>();
    assert!(bench.store.saturated().await.unwrap().is_empty());
    bench.store.report_saturated(one, &names(&["b", "a"])).await.unwrap();
    bench.store.report_saturated(two, &names(&["b", "c"])).await.unwrap();
    assert_eq!(bench.store.saturated().await.unwrap(), ["a", "b", "c"]);
    bench.store.report_saturated(one, &[]).await.unwrap();
    assert_eq!(bench.store.saturated().await.unwrap(), ["b", "c"]);
    bench.store.retire(two).await.unwrap();
    assert!(bench.store.saturated().await.unwrap().is_empty());
    bench.store.report_saturated(two, &names(&["a"])).await.unwrap();
    assert!(bench.store.saturated().await.unwrap().is_empty(), "it has retired");
}

pub(crate) async fn only_what_is_left_in_its_batch_is_held(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    bench.fill(3).await;
    let first = bench.claim_fresh().await.tickets;
    let second = bench.reissue(Suspect::Batch(first[0].batch)).await.expect("all are left").tickets;
    let hold = async |tickets| bench.store.hold("messages", tickets, BUSY, bench.now()).await.unwrap();
    assert_eq!(hold(&first).await, 0);
    bench.begin(&second[..1]).await;
    assert_eq!(hold(&second).await, 2);
    assert_eq!(hold(&second).await, 0);
    assert_eq!(bench.message(second[0].id).await.status, Status::Processing);
    assert_eq!(hold(&[]).await, 0);
    assert!(bench.store.batches(bench.now(), 10).await.unwrap().is_empty(), "nothing is left of it");
}

pub(crate) async fn held_deliveries_are_freed_urgent_first_then_oldest(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    let urgent = NewMessage { priority: 5, ..text("urgent") };
    let all = bench.insert(&[text("a"), text("b"), urgent, text("c"), text("d")]).await;
    let saturated = &["default".to_owned()];
    for urgency in Urgency::ALL {
        bench.claim_beside(bench.owner, Due::New(urgency), 10, saturated).await;
    }
    for part in [vec![all[0], all[2]], vec![all[1], all[3]], vec![all[4]]] {
        let freed = unhold(&*bench.store, "default", BUSY, 2, bench.now()).await;
        assert_eq!(freed, part.len() as u64);
        assert_eq!(ids(&bench.claim_timed("").await), part);
    }
    assert_eq!(unhold(&*bench.store, "default", BUSY, 2, bench.now()).await, 0);
}

pub(crate) async fn a_quarter_of_what_is_freed_is_of_the_lowest_priority(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    let of = |priority| NewMessage { priority, ..text("Hello") };
    let bulk = bench.insert(&vec![of(-1); 3]).await;
    let urgent = bench.insert(&vec![of(5); 12]).await;
    let saturated = &["default".to_owned()];
    for urgency in Urgency::ALL {
        bench.claim_beside(bench.owner, Due::New(urgency), 20, saturated).await;
    }
    for part in [
        [&bulk[..2], &urgent[..6]].concat(),
        [&bulk[2..], &urgent[6..7]].concat(),
        urgent[7..8].to_vec(),
        urgent[8..].to_vec(),
    ] {
        let freed = unhold(&*bench.store, "default", BUSY, part.len(), bench.now()).await;
        assert_eq!(freed, part.len() as u64);
        assert_eq!(ids(&bench.claim_timed("").await), part);
    }
}

pub(crate) async fn a_held_delivery_that_was_tried_is_due_again_when_freed(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    let first = bench.processing(1).await.remove(0);
    bench.record(&[bench.failed(&first)]).await;
    bench.pass(3);
    let second = bench.claim_timed(RETRY).await.tickets;
    assert_eq!(bench.store.hold(RETRY, &second, BUSY, bench.now()).await.unwrap(), 1);
    let row = bench.message(first.id()).await;
    assert_eq!((row.status, row.held, row.attempts), (Status::Retrying, Some(BUSY), 1));
    assert_eq!(row.lane, RETRY);
    bench.pass(60);
    assert_eq!(bench.claim_timed(RETRY).await.seen, 0);
    assert_eq!(unhold(&*bench.store, "default", BUSY, 10, bench.now()).await, 1);
    let claimed = bench.claim_timed(RETRY).await;
    assert_eq!((ids(&claimed), claimed.tickets[0].attempt), (vec![first.id()], 2));
}

pub(crate) async fn deliveries_of_several_endpoints_are_freed_in_one_call(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    bench.open("a").await;
    bench.open("b").await;
    let message = |endpoint: &str| NewMessage { endpoint: Some(endpoint.to_owned()), ..text("Hello") };
    let all = bench.insert(&["a", "b", "a", "b", "b"].map(message)).await;
    let saturated = &["a", "b"].map(str::to_owned);
    bench.claim_beside(bench.owner, Due::New(Urgency::Normal), 10, saturated).await;
    let wanted = [("b", 2), ("unknown", 5), ("a", 5), ("default", 1)]
        .map(|(endpoint, limit)| Unhold { endpoint: endpoint.to_owned(), limit });
    assert_eq!(bench.store.unhold(&wanted, BUSY, bench.now()).await.unwrap(), [2, 0, 2, 0]);
    assert_eq!(ids(&bench.claim_timed("").await), all[..4]);
    assert_eq!(bench.store.unhold(&wanted, BUSY, bench.now()).await.unwrap(), [1, 0, 0, 0]);
}

pub(crate) async fn a_begun_delivery_is_given_back_and_held(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    let begun = bench.processing(2).await;
    let held = |delivery| record(delivery, None, Verdict::Release { held: Some(BUSY) });
    assert!(bench.record(&[held(&begun[0]), held(&begun[1])]).await.is_empty());
    let row = bench.message(begun[0].id()).await;
    assert_eq!((row.status, row.held, row.attempts), (Status::Pending, Some(BUSY), 0));
    bench.pass(60);
    assert_eq!(bench.claim_timed("").await.seen, 0);
    assert_eq!(unhold(&*bench.store, "default", BUSY, 1, bench.now()).await, 1);
    let again = bench.claim_timed("").await.tickets;
    assert_eq!((again[0].id, again[0].attempt), (begun[0].id(), 1));
}
