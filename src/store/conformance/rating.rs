//! Endpoints with a rate: their deliveries are held until a time is reserved for each.

use std::sync::Arc;
use std::time::Duration;

use super::{Bench, RETRY, ids, text, unhold};
use crate::clock::Timestamp;
use crate::message::{Held, MessageId, NewMessage, Status};
use crate::rate::Rate;
use crate::store::{Due, Endpoint, Store};

/// With the allowance for those that are late: one each 103 ms.
const TEN_A_SECOND: Rate = Rate { count: 10, interval: Duration::from_secs(1) };

/// What is reserved between these times of a second, in milliseconds.
async fn reserve(bench: &Bench, from: u64, until: u64) -> u64 {
    let at = |ms| bench.now().after(Duration::from_millis(ms));
    bench.store.reserve(at(from), at(until)).await.unwrap()
}

/// A bench with an endpoint that has a rate.
async fn rated(store: Arc<dyn Store>, rate: Rate) -> Bench {
    let bench = Bench::new(store).await;
    let endpoint = Endpoint { rate: Some(rate), ..Endpoint::new("sms", "http://localhost:3000") };
    bench.store.put_endpoint(&endpoint).await.unwrap();
    bench
}

fn message(priority: i16) -> NewMessage {
    NewMessage { endpoint: Some("sms".to_owned()), priority, ..text("Hello") }
}

/// Claims ahead of time; what came, and after how many milliseconds each is due.
async fn claimed(bench: &Bench, lane: &str) -> Vec<(MessageId, u128)> {
    let due = Due::Timed { lane, by: bench.in_seconds(1) };
    let tickets = bench.claim(due, 1_000).await.tickets;
    let ahead = |at: Option<Timestamp>| at.map_or(0, |at| at.since(bench.now()).as_millis());
    tickets.iter().map(|ticket| (ticket.id, ahead(ticket.due_at))).collect()
}

pub(crate) async fn deliveries_of_an_endpoint_with_a_rate_go_one_by_one(store: Arc<dyn Store>) {
    let bench = rated(store, Rate { count: 10, interval: Duration::from_millis(1_470) }).await;
    let all = bench.insert(&[message(0), message(0), text("free"), message(0)]).await;
    assert_eq!(ids(&bench.claim_fresh().await), [all[2]]);
    let row = bench.message(all[0]).await;
    assert_eq!((row.status, row.held), (Status::Pending, Some(Held::EndpointRate)));
    assert_eq!(bench.store.held().await.unwrap(), [("sms".to_owned(), Held::EndpointRate)]);
    assert_eq!(claimed(&bench, "").await, []);
    assert_eq!(bench.store.next_reserved("sms").await.unwrap(), None);
    // One each 150 ms, which no further look before its time changes.
    assert_eq!((reserve(&bench, 200, 400).await, reserve(&bench, 200, 400).await), (2, 0));
    assert_eq!(claimed(&bench, "").await, [(all[0], 200), (all[1], 350)]);
    let next = bench.store.next_reserved("sms").await.unwrap();
    assert_eq!(next, Some(bench.now().after(Duration::from_millis(500))));
    assert_eq!(reserve(&bench, 200, 600).await, 1);
    assert_eq!(claimed(&bench, "").await, [(all[3], 500)]);
    bench.pass(5);
    let new = bench.insert(&[message(0)]).await;
    bench.claim_fresh().await;
    assert_eq!((reserve(&bench, 200, 400).await, claimed(&bench, "").await), (1, vec![(new[0], 200)]));
}

pub(crate) async fn times_are_reserved_for_urgent_and_due_deliveries_first(store: Arc<dyn Store>) {
    let bench = rated(store, TEN_A_SECOND).await;
    let tried = bench.insert(&[message(0)]).await;
    bench.claim_fresh().await;
    reserve(&bench, 0, 1).await;
    let begun = bench.begin(&bench.claim_timed("").await.tickets).await;
    bench.record(&[bench.failed(&begun[0])]).await;
    bench.pass(2);
    let all = bench.insert(&[message(0), message(5)]).await;
    bench.claim_fresh().await;
    bench.claim(Due::New(crate::store::Urgency::Urgent), 10).await;
    // The retry is claimed ahead of its time, and must not be tried before it.
    assert_eq!(claimed(&bench, RETRY).await, []);
    assert_eq!(bench.message(tried[0]).await.held, Some(Held::EndpointRate));
    assert_eq!(reserve(&bench, 100, 300).await, 2);
    assert_eq!(claimed(&bench, "").await, [(all[1], 100), (all[0], 203)]);
    bench.pass(1);
    assert_eq!((reserve(&bench, 100, 101).await, claimed(&bench, RETRY).await), (1, vec![(tried[0], 100)]));
}

pub(crate) async fn a_reserved_time_that_was_not_used_is_given_up(store: Arc<dyn Store>) {
    let bench = rated(store, TEN_A_SECOND).await;
    let all = bench.insert(&[message(0)]).await;
    bench.claim_fresh().await;
    assert_eq!(reserve(&bench, 100, 101).await, 1);
    let tickets = bench.claim(Due::Timed { lane: "", by: bench.in_seconds(1) }, 10).await.tickets;
    bench.store.hold("messages", &tickets, Held::EndpointRate, bench.now()).await.unwrap();
    assert_eq!(claimed(&bench, "").await, []);
    assert_eq!((reserve(&bench, 100, 300).await, claimed(&bench, "").await), (1, vec![(all[0], 203)]));
    // And one of an endpoint that is saturated meanwhile, and free again, has none.
    let new = bench.insert(&[message(0)]).await;
    bench.claim_fresh().await;
    assert_eq!(reserve(&bench, 500, 600).await, 1);
    let tickets = bench.claim(Due::Timed { lane: "", by: bench.in_seconds(1) }, 10).await.tickets;
    bench.store.hold("messages", &tickets, Held::EndpointBusy, bench.now()).await.unwrap();
    assert_eq!(unhold(&*bench.store, "sms", Held::EndpointBusy, 10, bench.now()).await, 1);
    assert_eq!(claimed(&bench, "").await, []);
    assert_eq!(bench.message(new[0]).await.held, Some(Held::EndpointRate));
}

pub(crate) async fn a_rate_is_kept_and_taken_away(store: Arc<dyn Store>) {
    let bench = rated(store, TEN_A_SECOND).await;
    let known = async || {
        let endpoints = bench.store.endpoints().await.unwrap();
        endpoints.into_iter().find(|endpoint| endpoint.name == "sms").unwrap().rate
    };
    assert_eq!(known().await, Some(TEN_A_SECOND));
    let all = bench.insert(&[message(0)]).await;
    bench.claim_fresh().await;
    bench.open("sms").await;
    assert_eq!(known().await, None);
    assert_eq!(reserve(&bench, 0, 1_000).await, 0);
    assert_eq!(unhold(&*bench.store, "sms", Held::EndpointRate, 10, bench.now()).await, 1);
    assert_eq!(ids(&bench.claim_timed("").await), all);
}

/// Producers may believe for a moment that both of them lead.
pub(crate) async fn two_who_reserve_at_once_keep_the_rate(store: Arc<dyn Store>) {
    let bench = rated(store, TEN_A_SECOND).await;
    bench.insert(&vec![message(0); 200]).await;
    bench.claim_fresh().await;
    let at = |ms| bench.now().after(Duration::from_millis(ms));
    let mut calls = Vec::new();
    for _ in 0..4 {
        let (store, from, until) = (Arc::clone(&bench.store), at(100), at(900));
        calls.push(tokio::spawn(async move { store.reserve(from, until).await.unwrap() }));
    }
    let counts = futures_util::future::join_all(calls).await.into_iter().map(Result::unwrap);
    assert_eq!(counts.sum::<u64>(), 8, "one each 103 ms");
    let mut times: Vec<_> = claimed(&bench, "").await.into_iter().map(|(_, at)| at).collect();
    times.sort_unstable();
    assert_eq!(times, [100, 203, 306, 409, 512, 615, 718, 821]);
}
