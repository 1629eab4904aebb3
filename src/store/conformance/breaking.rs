//! Circuit breakers: shared by all consumers, obeyed by claims, probed by one at a time.

use std::sync::Arc;
use std::time::Duration;

use super::{Bench, RETRY, ids, outcome, text, unhold};
use crate::breaker::{Breaker, Cause};
use crate::clock::Timestamp;
use crate::message::{Class, Held, NewMessage, Status};
use crate::store::operate::Deletion;
use crate::store::{Due, Endpoint, Store, Urgency};

/// A breaker that was opened so often, until then.
fn opened(openings: i32, until: Timestamp, now: Timestamp) -> Option<Breaker> {
    let failed = outcome(Class::Rejected, Some(503), now);
    Some(Breaker { openings, until, ..Breaker::opened(None, &failed, now) })
}

async fn set(bench: &Bench, endpoint: &str, breaker: Option<Breaker>) {
    bench.store.set_breakers(&[(endpoint.to_owned(), breaker)]).await.unwrap();
}

async fn breakers(bench: &Bench) -> Vec<(String, Breaker)> {
    bench.store.breakers().await.unwrap()
}

pub(crate) async fn a_breaker_stays_until_it_is_closed(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    bench.open("sms").await;
    let (now, second) = (bench.now(), Duration::from_secs(1));
    let until = now.after(second * 10);
    set(&bench, "nobody", opened(1, until, now)).await;
    assert_eq!(breakers(&bench).await, []);
    let twice = opened(2, until, now).unwrap();
    set(&bench, "sms", Some(twice.clone())).await;
    assert_eq!(breakers(&bench).await, [], "it was closed by another consumer");
    set(&bench, "sms", opened(1, until, now)).await;
    set(&bench, "sms", Some(twice.clone())).await;
    assert_eq!(breakers(&bench).await, [("sms".to_owned(), twice.clone())]);
    for same_or_less in [opened(1, until.after(second), now), opened(2, until, now), opened(2, now, now)] {
        set(&bench, "sms", same_or_less).await;
        assert_eq!(breakers(&bench).await, [("sms".to_owned(), twice.clone())]);
    }
    for more in [opened(2, until.after(second), now), opened(3, until, now)] {
        set(&bench, "sms", more.clone()).await;
        assert_eq!(breakers(&bench).await, [("sms".to_owned(), more.unwrap())]);
    }
    set(&bench, "default", opened(1, until, now)).await;
    set(&bench, "sms", None).await;
    let left: Vec<_> = breakers(&bench).await.into_iter().map(|(name, _)| name).collect();
    assert_eq!(left, ["default"]);
    set(&bench, "default", None).await;
    assert_eq!(breakers(&bench).await, []);
}

/// A retry lane may see nothing but the failures of a few bad messages.
pub(crate) async fn a_breaker_does_not_open_beside_successes(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    let begun = bench.processing(1).await;
    bench.record(&[bench.sent(&begun[0])]).await;
    let open = async |openings| {
        let change = ("default".to_owned(), opened(openings, bench.in_seconds(5), bench.now()));
        bench.store.set_breakers(&[change]).await.unwrap()
    };
    bench.pass(9);
    assert_eq!((open(1).await, breakers(&bench).await), (vec![false], vec![]));
    bench.pass(1);
    assert_eq!((open(1).await, breakers(&bench).await.len()), (vec![true], 1));
    // From then on probes decide; and the endpoint itself, when it asks for a pause.
    assert_eq!(open(2).await, [true]);
    set(&bench, "default", None).await;
    let begun = bench.processing(1).await;
    bench.record(&[bench.sent(&begun[0])]).await;
    let asked = opened(1, bench.in_seconds(5), bench.now()).unwrap();
    let asked = Some(Breaker { cause: Cause::RetryAfter, ..asked });
    assert_eq!(bench.store.set_breakers(&[("default".to_owned(), asked)]).await.unwrap(), [true]);
}

pub(crate) async fn a_breaker_goes_with_a_change_of_its_endpoint(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    let open = || opened(1, bench.in_seconds(60), bench.now());
    set(&bench, "default", open()).await;
    bench.open("default").await;
    assert_eq!(breakers(&bench).await.len(), 1, "nothing has changed");
    bench.store.put_endpoint(&Endpoint::new("default", "http://localhost:3001")).await.unwrap();
    assert_eq!(breakers(&bench).await, []);
    bench.open("unused").await;
    set(&bench, "unused", open()).await;
    assert_eq!(bench.store.delete_endpoint("unused").await.unwrap(), Deletion::Deleted);
    bench.open("unused").await;
    assert_eq!(breakers(&bench).await, []);
}

pub(crate) async fn deliveries_are_held_while_their_breaker_is_open(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    bench.open("sms").await;
    let message = |endpoint: &str| NewMessage { endpoint: Some(endpoint.to_owned()), ..text("Hello") };
    let first = bench.insert(&[message("sms")]).await[0];
    let begun = bench.begin(&bench.claim_fresh().await.tickets).await;
    bench.record(&[bench.failed(&begun[0])]).await;
    set(&bench, "sms", opened(1, bench.in_seconds(10), bench.now())).await;
    let rest = bench.insert(&["sms", "default"].map(message)).await;
    assert_eq!(ids(&bench.claim(Due::New(Urgency::Normal), 10).await), [rest[1]]);
    bench.pass(3);
    let due = bench.claim_timed(RETRY).await;
    assert_eq!((due.tickets.len(), due.seen), (0, 1));
    for (id, status, attempts) in [(first, Status::Retrying, 1), (rest[0], Status::Pending, 0)] {
        let row = bench.message(id).await;
        assert_eq!((row.status, row.held, row.attempts), (status, Some(Held::EndpointBusy), attempts));
    }
    // It is half-open: what is freed goes out, and so does what is new.
    bench.pass(7);
    assert_eq!(unhold(&*bench.store, "sms", Held::EndpointBusy, 1, bench.now()).await, 1);
    assert_eq!(ids(&bench.claim_timed(RETRY).await), [first]);
    let new = bench.insert(&[message("sms")]).await;
    assert_eq!(ids(&bench.claim_fresh().await), new);
}

pub(crate) async fn one_probes_at_a_time(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    bench.open("sms").await;
    let probe = async || {
        let wanted = ["sms", "default", "nobody"].map(|name| (name.to_owned(), bench.in_seconds(20)));
        bench.store.probe(&wanted, bench.now()).await.unwrap()
    };
    set(&bench, "sms", opened(1, bench.in_seconds(5), bench.now())).await;
    assert!(probe().await.is_empty(), "it is open");
    bench.pass(5);
    assert_eq!(probe().await, ["sms"]);
    bench.pass(19);
    assert!(probe().await.is_empty(), "somebody probes it");
    bench.pass(1);
    assert_eq!(probe().await, ["sms"], "the probe was lost");
    set(&bench, "sms", opened(2, bench.in_seconds(1), bench.now())).await;
    bench.pass(1);
    assert_eq!(probe().await, ["sms"], "it has failed, and this is another");
}
