//! What a claim takes, and what it gives for it.

use std::collections::HashSet;
use std::sync::Arc;

use super::{Bench, RETRY, batch, ids, text, unhold};
use crate::message::{Held, MessageId, NewMessage, Status, Verdict};
use crate::store::{Due, DueNow, Store, Suspect, Urgency};
use crate::ticket::Ticket;

pub(crate) async fn a_claim_takes_new_messages_in_id_order(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    let all = bench.fill(5).await;
    let claimed = bench.claim(Due::New(Urgency::Normal), 3).await;
    assert_eq!((ids(&claimed), claimed.seen), (all[..3].to_vec(), 3));
    let places: Vec<_> = claimed.tickets.iter().map(|ticket| (ticket.batch, ticket.position)).collect();
    assert_eq!(places, [0, 1, 2].map(|position| (batch(&claimed), position)));
    let row = bench.message(all[2]).await;
    assert_eq!((row.status, row.attempts), (Status::Queued, 0));
    assert_eq!(bench.message(all[3]).await.status, Status::Pending);
}

pub(crate) async fn a_claim_takes_no_more_than_its_limit(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    let all = bench.fill(7).await;
    let first = bench.claim(Due::New(Urgency::Normal), 4).await;
    assert_eq!((ids(&first), first.seen), (all[..4].to_vec(), 4));
    let second = bench.claim(Due::New(Urgency::Normal), 4).await;
    assert_eq!((ids(&second), second.seen), (all[4..].to_vec(), 3));
    assert_ne!(batch(&first), batch(&second));
}

pub(crate) async fn a_claimed_message_is_not_claimed_again(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    bench.fill(3).await;
    assert_eq!(bench.claim_fresh().await.tickets.len(), 3);
    assert_eq!(bench.claim_fresh().await.seen, 0);
    assert_eq!(bench.claim_timed("").await.seen, 0);
    // An exactly full claim is followed by what comes later.
    let next = bench.fill(2).await;
    assert_eq!(ids(&bench.claim(Due::New(Urgency::Normal), 2).await), next);
    assert_eq!(bench.claim_fresh().await.seen, 0);
    let last = bench.fill(1).await;
    assert_eq!(ids(&bench.claim_fresh().await), last);
    let many = bench.fill(300).await;
    assert_eq!(ids(&bench.claim(Due::New(Urgency::Normal), 300).await), many, "in the order of the ids");
}

pub(crate) async fn urgent_messages_have_a_feed_of_their_own(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    let of = |priority| NewMessage { priority, ..text("Hello") };
    let all = bench.insert(&[of(0), of(-1), of(100), of(0), of(1), of(-100)]).await;
    let at = |places: &[usize]| places.iter().map(|place| all[*place]).collect::<Vec<_>>();
    let urgent = bench.claim(Due::New(Urgency::Urgent), 10).await;
    assert_eq!(ids(&urgent), at(&[2, 4]));
    assert_eq!(urgent.tickets.iter().map(|ticket| ticket.priority).collect::<Vec<_>>(), [100, 1]);
    assert_eq!(ids(&bench.claim(Due::New(Urgency::Bulk), 10).await), at(&[1, 5]));
    assert_eq!(ids(&bench.claim_fresh().await), at(&[0, 3]));
    let later = bench.insert(&[of(7)]).await;
    assert_eq!(bench.claim_fresh().await.seen, 0);
    assert!(bench.store.due(&[], bench.now()).await.unwrap().new);
    assert_eq!(ids(&bench.claim(Due::New(Urgency::Urgent), 10).await), later);
}

pub(crate) async fn a_scheduled_message_waits_for_its_time(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    let scheduled = NewMessage { send_at: Some(bench.in_seconds(5)), priority: 3, ..text("later") };
    let id = bench.insert(&[scheduled]).await[0];
    let claimed = bench.claim(Due::New(Urgency::Urgent), 10).await;
    assert_eq!((claimed.seen, claimed.tickets.len()), (1, 0));
    let row = bench.message(id).await;
    assert_eq!((row.status, row.held, row.due_at), (Status::Pending, None, None));
    bench.pass(4);
    assert_eq!(bench.claim_timed("").await.seen, 0);
    bench.pass(1);
    assert_eq!(bench.claim_timed(RETRY).await.seen, 0);
    assert_eq!(bench.claim_fresh().await.seen, 0);
    let claimed = bench.claim_timed("").await;
    let ticket = &claimed.tickets[0];
    assert_eq!((ids(&claimed), ticket.attempt, ticket.priority), (vec![id], 1, 3));
}

pub(crate) async fn waiting_deliveries_are_claimed_lane_by_lane_oldest_due_first(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    let deliveries = bench.processing(4).await;
    let lanes = [(RETRY, 9), (RETRY, 3), ("messages-slow", 1), (RETRY, 60)];
    let records: Vec<_> = deliveries
        .iter()
        .zip(lanes)
        .map(|(delivery, (lane, seconds))| {
            let verdict =
                Verdict::Retry { lane: lane.to_owned(), lane_tries: 2, at: bench.in_seconds(seconds) };
            crate::store::Record { verdict, ..bench.failed(delivery) }
        })
        .collect();
    assert!(bench.record(&records).await.is_empty());
    assert_eq!(bench.claim_timed(RETRY).await.seen, 0);
    let none: Vec<String> = Vec::new();
    assert_eq!(bench.at_rest(&["", RETRY]).await, none, "before its time");
    bench.pass(10);
    assert_eq!(bench.at_rest(&[""]).await, none, "on another lane");
    assert_eq!(bench.at_rest(&[]).await, none, "on no lane that was asked for");
    assert_eq!(bench.at_rest(&["", RETRY]).await, [RETRY], "when its time has come");
    let first = bench.claim(Due::Timed { lane: RETRY, by: bench.now() }, 1).await;
    assert_eq!((ids(&first), first.seen), (vec![deliveries[1].id()], 1));
    assert_eq!((first.tickets[0].attempt, first.tickets[0].lane_tries), (2, 2));
    assert_ne!(batch(&first), deliveries[1].ticket.batch);
    let second = bench.claim_timed(RETRY).await;
    assert_eq!(ids(&second), [deliveries[0].id()]);
    assert_eq!(ids(&bench.claim_timed("messages-slow").await), [deliveries[2].id()]);
    assert_eq!(bench.claim_timed("").await.seen, 0);
    assert_eq!(bench.begin(&second.tickets).await.len(), 1);
}

/// Its ticket says when it is due; and whoever gives it back, it does not become due before.
pub(crate) async fn a_delivery_that_is_claimed_ahead_keeps_its_time(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    let scheduled = NewMessage { send_at: Some(bench.in_seconds(9)), ..text("later") };
    let later = bench.insert(&[scheduled]).await[0];
    bench.claim_fresh().await;
    let delivery = bench.processing(1).await.remove(0);
    let due_at = bench.in_seconds(3);
    bench.record(&[bench.failed(&delivery)]).await;
    let ahead = async |lane: &str| {
        let by = bench.in_seconds(3);
        let due = bench.store.due(&["", RETRY], by).await.unwrap();
        assert!(due.lanes.contains(&lane.to_owned()), "{due:?}");
        bench.claim(Due::Timed { lane, by }, 10).await.tickets
    };
    assert_eq!(bench.claim_timed(RETRY).await.seen, 0);
    let mut tickets = ahead(RETRY).await;
    let reissued = bench.reissue(Suspect::Batch(tickets[0].batch)).await.expect("one is left");
    assert_eq!((reissued.lane.as_str(), reissued.tickets[0].due_at), (RETRY, Some(due_at)));
    tickets = reissued.tickets;
    for released in [false, true] {
        assert_eq!((tickets.len(), tickets[0].due_at), (1, Some(due_at)));
        let now = bench.now();
        if released {
            let begun = bench.begin(&tickets).await;
            let record = crate::store::Record { lane: RETRY.into(), ..bench.released(&begun[0]) };
            bench.record(&[record]).await;
        } else {
            bench.store.hold(RETRY, &tickets, Held::EndpointBusy, now).await.unwrap();
            unhold(&*bench.store, "default", Held::EndpointBusy, 1, now).await;
        }
        assert_eq!(bench.message(delivery.id()).await.due_at, Some(due_at), "released: {released}");
        tickets = ahead(RETRY).await;
    }
    bench.pass(6);
    let scheduled: Vec<Ticket> = ahead("").await;
    assert_eq!((scheduled[0].id, scheduled[0].due_at), (later, Some(bench.in_seconds(3))));
    bench.store.hold("messages", &scheduled, Held::EndpointBusy, bench.now()).await.unwrap();
    bench.pass(3);
    unhold(&*bench.store, "default", Held::EndpointBusy, 1, bench.now()).await;
    assert_eq!(bench.claim_timed("").await.tickets[0].due_at, None, "its time has come");
}

pub(crate) async fn an_expired_message_is_not_queued(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    let short = NewMessage { expires_at: Some(bench.in_seconds(5)), ..text("short") };
    let timed = NewMessage { send_at: Some(bench.in_seconds(4)), ..short.clone() };
    let scheduled = bench.insert(&[timed]).await[0];
    assert_eq!(bench.claim_fresh().await.seen, 1);
    let all = bench.insert(&[short.clone(), text("long")]).await;
    bench.pass(5);
    let claimed = bench.claim_fresh().await;
    assert_eq!((ids(&claimed), claimed.seen), (vec![all[1]], 2));
    let none = bench.claim_timed("").await;
    assert_eq!((none.seen, none.tickets.len()), (1, 0));
    for id in [all[0], scheduled] {
        let row = bench.message(id).await;
        assert_eq!((row.status, row.finished_at), (Status::Expired, Some(bench.now())));
    }
    let expires_at = Some(bench.in_seconds(5));
    let next = bench.insert(&[NewMessage { expires_at, ..short }]).await;
    bench.pass(4);
    let claimed = bench.claim_fresh().await;
    assert_eq!((ids(&claimed), claimed.tickets[0].expires_at), (next, expires_at));
}

pub(crate) async fn messages_of_a_closed_endpoint_are_held_by_the_claim(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    let closed = NewMessage { endpoint: Some("closed".to_owned()), ..text("x") };
    let all = bench.insert(&[closed.clone(), text("open"), closed]).await;
    let claimed = bench.claim_fresh().await;
    assert_eq!((ids(&claimed), claimed.seen), (vec![all[1]], 3));
    let row = bench.message(all[0]).await;
    assert_eq!((row.status, row.held, row.attempts), (Status::Pending, Some(Held::EndpointDisabled), 0));
    assert_eq!(bench.claim_fresh().await.seen, 0);
    assert_eq!(bench.store.held().await.unwrap(), [("closed".to_owned(), Held::EndpointDisabled)]);
    bench.open("closed").await;
    let freed = unhold(&*bench.store, "closed", Held::EndpointDisabled, 10, bench.now()).await;
    assert_eq!(freed, 2);
    let claimed = bench.claim_timed("").await;
    assert_eq!(ids(&claimed), [all[0], all[2]]);
    // One that is closed by the time a delivery is due holds it again.
    bench.record(&[bench.failed(&bench.begin(&claimed.tickets).await[0])]).await;
    let disabled =
        crate::store::Endpoint { enabled: false, ..crate::store::Endpoint::new("closed", "http://a/") };
    bench.store.put_endpoint(&disabled).await.unwrap();
    bench.pass(3);
    let none = bench.claim_timed(RETRY).await;
    assert_eq!((none.seen, none.tickets.len()), (1, 0));
    let row = bench.message(all[0]).await;
    assert_eq!((row.status, row.held), (Status::Retrying, Some(Held::EndpointDisabled)));
    assert_eq!(bench.claim_timed(RETRY).await.seen, 0);
}

pub(crate) async fn an_endpoint_takes_over_the_number_that_its_messages_have(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    let to = |endpoint: &str| NewMessage { endpoint: Some(endpoint.to_owned()), ..text("x") };
    bench.insert(&[to("later"), to("never"), to("later")]).await;
    assert_eq!(bench.claim_fresh().await.seen, 3);
    for endpoint in ["first", "later"] {
        bench.open(endpoint).await;
        bench.insert(&[to(endpoint)]).await;
    }
    let fresh = bench.claim_fresh().await.tickets;
    assert_eq!(unhold(&*bench.store, "later", Held::EndpointDisabled, 10, bench.now()).await, 2);
    let held = bench.claim_timed("").await.tickets;
    let numbers: HashSet<_> = fresh.iter().map(|ticket| ticket.endpoint_id).collect();
    assert_eq!(numbers.len(), 2, "each has its own");
    assert!(held.iter().all(|ticket| ticket.endpoint_id == fresh[1].endpoint_id), "{held:?}");
}

pub(crate) async fn a_ticket_carries_what_the_request_needs(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    let message = NewMessage {
        content_type: Some("text/plain".to_owned()),
        headers: Some(serde_json::json!({"x-a": "1"})),
        ordering_key: Some("key".to_owned()),
        ..text("body")
    };
    let id = bench.insert(&[message, text("plain")]).await[0];
    let claimed = bench.claim_fresh().await;
    let ticket = &claimed.tickets[0];
    assert_eq!((ticket.id, ticket.attempt, ticket.lane_tries), (id, 1, 0));
    assert_eq!((ticket.endpoint.as_str(), ticket.recipient.as_str()), ("default", "+905551111111"));
    assert_eq!((ticket.content.as_str(), ticket.content_type.as_deref()), ("body", Some("text/plain")));
    assert_eq!(ticket.ordering_key.as_deref(), Some("key"));
    assert_eq!(ticket.created_at, bench.message(id).await.created_at);
    let headers = ticket.headers.as_ref().expect("headers").get();
    let headers: serde_json::Value = serde_json::from_str(headers).unwrap();
    assert_eq!(headers, serde_json::json!({"x-a": "1"}));
    let plain = &claimed.tickets[1];
    assert!(plain.headers.is_none() && plain.content_type.is_none() && plain.ordering_key.is_none());
    assert_eq!((plain.expires_at, plain.due_at, plain.priority), (None, None, 0));
    // What is issued again says the same.
    let again = bench.reissue(Suspect::Batch(ticket.batch)).await.unwrap().tickets;
    let written =
        |ticket: &Ticket| serde_json::to_value(Ticket { batch: batch(&claimed), ..ticket.clone() }).unwrap();
    assert_eq!(
        again.iter().map(written).collect::<Vec<_>>(),
        claimed.tickets.iter().map(written).collect::<Vec<_>>()
    );
}

pub(crate) async fn a_claim_of_nothing_writes_no_batch(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    bench.insert(&[NewMessage { endpoint: Some("closed".to_owned()), ..text("x") }]).await;
    let claimed = bench.claim_fresh().await;
    assert_eq!((claimed.seen, claimed.tickets.len()), (1, 0));
    assert_eq!(bench.claim_timed("").await.seen, 0);
    assert!(bench.store.batches(bench.now(), 10).await.unwrap().is_empty());
}

pub(crate) async fn concurrent_claims_never_take_a_message_twice(store: Arc<dyn Store>) {
    let bench = Arc::new(Bench::new(store).await);
    let all = bench.fill(300).await;
    let claimers: Vec<_> = (0..4)
        .map(|_| {
            let bench = Arc::clone(&bench);
            tokio::spawn(async move {
                let mut mine = Vec::new();
                loop {
                    let claimed = bench.claim(Due::New(Urgency::Normal), 7).await;
                    if claimed.seen == 0 {
                        return mine;
                    }
                    mine.extend(ids(&claimed));
                }
            })
        })
        .collect();
    let mut taken: Vec<MessageId> = Vec::new();
    for claimer in claimers {
        taken.extend(claimer.await.unwrap());
    }
    // A claimer that another was faster than takes nothing; what is left is claimed now.
    taken.extend(ids(&bench.claim_fresh().await));
    let distinct: HashSet<_> = taken.iter().collect();
    assert_eq!((distinct.len(), taken.len()), (all.len(), all.len()));
}

impl Bench {
    /// Claims until the store says that there is nothing new, and returns the lanes that have something due. A store may
    /// say so in vain, because something else happens on the same server.
    async fn at_rest(&self, lanes: &[&str]) -> Vec<String> {
        for _ in 0..1_000 {
            for urgency in Urgency::ALL {
                while self.claim(Due::New(urgency), 1_000).await.seen > 0 {}
            }
            let DueNow { new, lanes } = self.store.due(lanes, self.now()).await.unwrap();
            if !new {
                return lanes;
            }
        }
        panic!("the store says again and again that there is something new");
    }
}

pub(crate) async fn a_store_says_when_something_is_due(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    bench.at_rest(&[]).await;
    bench.fill(3).await;
    let new = async |lanes: &[&str]| bench.store.due(lanes, bench.now()).await.unwrap().new;
    assert!(new(&[""]).await, "after an insert");
    // A question is no answer: until a claim has seen everything, there is something.
    assert!(new(&[""]).await, "after an insert, asked again");
    bench.claim(Due::New(Urgency::Normal), 2).await;
    assert!(new(&[""]).await, "after a claim that left something");
    assert!(bench.at_rest(&["", RETRY]).await.is_empty(), "after a claim that left nothing");
    bench.fill(1).await;
    assert!(new(&[]).await, "after another insert");
}
