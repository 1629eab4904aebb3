//! Which rows a claim takes, and what it gives for them.

use std::collections::HashSet;
use std::sync::Arc;

use super::{Bench, FRESH, RETRY, ids, pairs, record, text};
use crate::message::{Held, MessageId, NewMessage, Status, Verdict};
use crate::store::{Claim, Due, DueNow, Store};

pub(crate) async fn a_claim_takes_fresh_rows_in_id_order(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    let all = bench.fill(5).await;
    let claimed = bench.claim(Due::after(all[1]), 10).await;
    assert_eq!(ids(&claimed), all[2..]);
    assert_eq!((claimed.seen, claimed.last), (3, Some(all[4])));
    assert!(claimed.batch.is_some());
    let row = bench.message(all[2]).await;
    assert_eq!((row.status, row.epoch, row.attempts), (Status::Queued, 1, 0));
    assert_eq!(bench.message(all[0]).await.status, Status::Pending);
}

pub(crate) async fn a_claim_takes_no_more_than_its_limit(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    let all = bench.fill(7).await;
    let first = bench.claim(Due::after(MessageId(0)), 4).await;
    assert_eq!((ids(&first), first.seen, first.last), (all[..4].to_vec(), 4, Some(all[3])));
    let second = bench.claim(Due::after(MessageId(0)), 4).await;
    assert_eq!((ids(&second), second.seen), (all[4..].to_vec(), 3));
}

pub(crate) async fn a_claimed_row_is_not_claimed_again(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    let all = bench.fill(3).await;
    assert_eq!(bench.claim_fresh().await.tickets.len(), 3);
    assert_eq!(bench.claim_fresh().await.seen, 0);
    assert_eq!(bench.claim(Due::up_to(all[2]), 10).await.seen, 0);
    bench.pass(3_600);
    assert_eq!(bench.claim_timed("").await.seen, 0);
}

pub(crate) async fn late_rows_are_found_behind_the_cursor(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    let all = bench.fill(4).await;
    assert_eq!(bench.claim(Due::after(all[1]), 1).await.last, Some(all[2]));
    let late = bench.claim(Due::up_to(all[2]), 10).await;
    assert_eq!(ids(&late), all[..2]);
    assert_eq!(ids(&bench.claim(Due::after(all[2]), 10).await), all[3..]);
}

pub(crate) async fn a_scheduled_row_waits_for_its_time(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    let scheduled = NewMessage { send_at: Some(bench.in_seconds(5)), ..text("later") };
    let id = bench.insert(&[scheduled]).await[0];
    assert_eq!(bench.claim_fresh().await.seen, 0);
    bench.pass(4);
    assert_eq!(bench.claim_timed("").await.seen, 0);
    bench.pass(1);
    assert_eq!(bench.claim_timed(RETRY).await.seen, 0);
    assert_eq!(bench.claim_fresh().await.seen, 0);
    let claimed = bench.claim_timed("").await;
    assert_eq!((ids(&claimed), claimed.tickets[0].attempt), (vec![id], 1));
}

pub(crate) async fn timed_rows_are_claimed_lane_by_lane_oldest_due_first(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    let tickets = bench.processing(1, 4).await;
    let lanes = [(RETRY, 9), (RETRY, 3), ("messages-slow", 1), (RETRY, 60)];
    let records: Vec<_> = tickets
        .iter()
        .zip(lanes)
        .map(|(ticket, (lane, seconds))| {
            let verdict =
                Verdict::Retry { lane: lane.to_owned(), lane_tries: 2, at: bench.in_seconds(seconds) };
            record(*ticket, 1, bench.failed(*ticket, 1).outcome, verdict)
        })
        .collect();
    assert!(bench.record(&records).await.is_empty());
    assert_eq!(bench.claim_timed(RETRY).await.seen, 0);
    bench.claim_fresh().await;
    let due = async |lanes: &[&str]| bench.store.due(lanes, bench.now()).await.unwrap();
    assert_eq!(due(&["", RETRY]).await, DueNow::default(), "before its time");
    bench.pass(10);
    assert_eq!(due(&[""]).await, DueNow::default(), "on another lane");
    assert_eq!(due(&[]).await, DueNow::default(), "on no lane that was asked for");
    let now_due = DueNow { new: false, lanes: vec![RETRY.to_owned()] };
    assert_eq!(due(&["", RETRY]).await, now_due, "when its time has come");
    let first = bench.claim(Due::Timed { lane: RETRY, by: bench.now() }, 1).await;
    assert_eq!((ids(&first), first.seen), (vec![tickets[1].0], 1));
    assert_eq!((first.tickets[0].attempt, first.tickets[0].epoch), (2, 2));
    let second = bench.claim_timed(RETRY).await;
    assert_eq!(ids(&second), [tickets[0].0]);
    assert_eq!(ids(&bench.claim_timed("messages-slow").await), [tickets[2].0]);
    assert_eq!(bench.claim_timed("").await.seen, 0);
    let begun = bench.begin(2, &pairs(&second)).await;
    assert_eq!((begun[0].attempts, begun[0].lane_tries), (1, 2));
}

/// Its ticket says when it is due; and whoever gives it back, it does not become due before.
pub(crate) async fn a_row_that_is_claimed_ahead_keeps_its_time(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    let scheduled = NewMessage { send_at: Some(bench.in_seconds(9)), ..text("later") };
    let later = bench.insert(&[scheduled]).await[0];
    let ticket = bench.processing(1, 1).await[0];
    let due_at = bench.in_seconds(3);
    bench.record(&[bench.failed(ticket, 1)]).await;
    let ahead = async |lane: &str| {
        let by = bench.in_seconds(3);
        let due = bench.store.due(&["", RETRY], by).await.unwrap();
        assert!(due.lanes.contains(&lane.to_owned()), "{due:?}");
        bench.claim(Due::Timed { lane, by }, 10).await
    };
    assert_eq!(bench.claim_timed(RETRY).await.seen, 0);
    let mut claimed = ahead(RETRY).await;
    for give_back in 0..4 {
        let ticket = claimed.tickets[0].clone();
        assert_eq!((claimed.tickets.len(), ticket.due_at), (1, Some(due_at)));
        let (now, pair) = (bench.now(), [(ticket.id, ticket.epoch)]);
        match give_back {
            0 => drop(bench.store.requeue(&[claimed.batch.unwrap()], now).await.unwrap()),
            1 => {
                bench.store.hold(&pair, Held::EndpointBusy, now).await.unwrap();
                bench.store.unhold("default", Held::EndpointBusy, 1, now).await.unwrap();
            }
            2 => {
                bench.begin(2, &pair).await;
                bench.record(&[bench.released(pair[0])]).await;
            }
            _ => break,
        }
        assert_eq!(bench.message(ticket.id).await.due_at, Some(due_at), "given back in way {give_back}");
        claimed = ahead(RETRY).await;
    }
    bench.pass(6);
    let scheduled = ahead("").await;
    assert_eq!((ids(&scheduled), scheduled.tickets[0].due_at), (vec![later], Some(bench.in_seconds(3))));
    bench.store.requeue(&[scheduled.batch.unwrap()], bench.now()).await.unwrap();
    bench.pass(3);
    assert_eq!(bench.claim_timed("").await.tickets[0].due_at, None, "its time has come");
}

pub(crate) async fn an_expired_row_is_not_queued(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    let short = NewMessage { expires_at: Some(bench.in_seconds(5)), ..text("short") };
    let timed = NewMessage { send_at: Some(bench.in_seconds(4)), ..short.clone() };
    let all = bench.insert(&[short.clone(), text("long"), timed]).await;
    bench.pass(5);
    let claimed = bench.claim_fresh().await;
    assert_eq!((ids(&claimed), claimed.seen), (vec![all[1]], 2));
    let none = bench.claim_timed("").await;
    assert_eq!((none.seen, none.tickets.len(), none.batch), (1, 0, None));
    for id in [all[0], all[2]] {
        let row = bench.message(id).await;
        assert_eq!((row.status, row.finished_at), (Status::Expired, Some(bench.now())));
    }
    let next = bench.insert(&[NewMessage { expires_at: Some(bench.in_seconds(5)), ..short }]).await;
    bench.pass(4);
    assert_eq!(ids(&bench.claim_fresh().await), next);
}

pub(crate) async fn rows_of_a_closed_endpoint_are_held_by_the_claim(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    let closed = NewMessage { endpoint: Some("closed".to_owned()), ..text("x") };
    let all = bench.insert(&[closed.clone(), text("open"), closed]).await;
    let claimed = bench.claim_fresh().await;
    assert_eq!((ids(&claimed), claimed.seen, claimed.last), (vec![all[1]], 3, Some(all[2])));
    let row = bench.message(all[0]).await;
    assert_eq!((row.status, row.held, row.epoch), (Status::Pending, Some(Held::EndpointClosed), 1));
    assert_eq!(bench.claim_fresh().await.seen, 0);
    assert_eq!(bench.store.held().await.unwrap(), [("closed".to_owned(), Held::EndpointClosed)]);
    let open = &["closed".to_owned()];
    let freed = bench.store.unhold("closed", Held::EndpointClosed, 10, bench.now()).await.unwrap();
    assert_eq!(freed, 2);
    let due = Due::up_to(all[2]);
    let (owner, now) = (bench.owner, bench.now());
    let claim = Claim { due, limit: 10, lane: FRESH, open, busy: &[], pass_busy: false, owner, now };
    assert_eq!(ids(&bench.store.claim(&claim).await.unwrap()), [all[0], all[2]]);
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
    assert_eq!((ticket.id, ticket.epoch, ticket.attempt), (id, 1, 1));
    assert_eq!((ticket.endpoint.as_str(), ticket.recipient.as_str()), ("default", "+905551111111"));
    assert_eq!((ticket.content.as_str(), ticket.content_type.as_deref()), ("body", Some("text/plain")));
    assert_eq!(ticket.ordering_key.as_deref(), Some("key"));
    assert_eq!(ticket.created_at, bench.message(id).await.created_at);
    let headers = ticket.headers.as_ref().expect("headers").get();
    let headers: serde_json::Value = serde_json::from_str(headers).unwrap();
    assert_eq!(headers, serde_json::json!({"x-a": "1"}));
    let plain = &claimed.tickets[1];
    assert!(plain.headers.is_none() && plain.content_type.is_none() && plain.ordering_key.is_none());
}

pub(crate) async fn each_claim_raises_the_epoch(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    let id = bench.fill(1).await[0];
    for epoch in 1..5 {
        let claimed = bench.claim_fresh().await;
        assert_eq!(pairs(&claimed), [(id, epoch)]);
        let batch = claimed.batch.expect("a batch");
        assert_eq!(bench.store.requeue(&[batch], bench.now()).await.unwrap(), 1);
        assert_eq!(bench.message(id).await.epoch, epoch);
    }
}

pub(crate) async fn a_claim_of_nothing_writes_no_ledger(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    bench.insert(&[NewMessage { endpoint: Some("closed".to_owned()), ..text("x") }]).await;
    let claimed = bench.claim_fresh().await;
    assert_eq!((claimed.seen, claimed.batch), (1, None));
    assert_eq!(bench.claim_timed("").await.batch, None);
    assert!(bench.store.batches(bench.now(), 10).await.unwrap().is_empty());
}

pub(crate) async fn concurrent_claims_never_take_a_row_twice(store: Arc<dyn Store>) {
    let bench = Arc::new(Bench::new(store).await);
    let all = bench.fill(300).await;
    let claimers: Vec<_> = (0..4)
        .map(|_| {
            let bench = Arc::clone(&bench);
            tokio::spawn(async move {
                let mut mine = Vec::new();
                loop {
                    let claimed = bench.claim(Due::after(MessageId(0)), 7).await;
                    if claimed.seen == 0 {
                        return mine;
                    }
                    mine.extend(pairs(&claimed));
                }
            })
        })
        .collect();
    let mut taken = Vec::new();
    for claimer in claimers {
        taken.extend(claimer.await.unwrap());
    }
    // A claimer may leave rows that another is just taking; what is left is claimed now.
    taken.extend(pairs(&bench.claim_fresh().await));
    assert!(taken.iter().all(|ticket| ticket.1 == 1), "{taken:?}");
    let distinct: HashSet<_> = taken.iter().map(|ticket| ticket.0).collect();
    assert_eq!((distinct.len(), taken.len()), (all.len(), all.len()));
}

pub(crate) async fn a_store_says_when_something_is_due(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    bench.claim_fresh().await;
    bench.fill(3).await;
    let due = async |lanes: &[&str]| bench.store.due(lanes, bench.now()).await.unwrap();
    assert!(due(&[""]).await.new, "after an insert");
    // A question is no answer: until a claim has seen everything, there is something.
    assert!(due(&[""]).await.new, "after an insert, asked again");
    let some = bench.claim(Due::after(MessageId(0)), 2).await;
    assert!(due(&[""]).await.new, "after a claim that left something");
    bench.claim_fresh().await;
    assert_eq!(due(&["", RETRY]).await, DueNow::default(), "after a claim that left nothing");
    bench.store.requeue(&[some.batch.expect("a batch")], bench.now()).await.unwrap();
    assert!(due(&[""]).await.new, "after rows were given back");
}
