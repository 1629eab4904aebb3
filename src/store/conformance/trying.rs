//! Begin and record: the guarded writes around an attempt.

use std::sync::Arc;

use super::{Bench, FRESH, RETRY, deliveries, ids, text, wanted};
use crate::message::{Class, NewMessage, Status, Verdict};
use crate::store::{Begin, Record, Store, Suspect};
use crate::ticket::{BatchId, Ticket};

pub(crate) async fn a_begin_takes_what_is_left_in_the_batch(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    bench.fill(3).await;
    let tickets = bench.claim_fresh().await.tickets;
    let begun = bench.begin(&tickets[..2]).await;
    assert_eq!(begun.iter().map(|delivery| delivery.ticket.position).collect::<Vec<_>>(), [0, 1]);
    assert!(begun.iter().all(|delivery| delivery.root == tickets[0].batch), "{begun:?}");
    assert_eq!(bench.message(tickets[0].id).await.status, Status::Processing);
    assert_eq!(bench.message(tickets[2].id).await.status, Status::Queued);
    assert!(bench.begin(&[]).await.is_empty());
    // Several batches in one call, the rest of one among them.
    bench.fill(2).await;
    let more = bench.claim_fresh().await.tickets;
    let both = [&tickets[2..], &more].concat();
    assert_eq!(bench.begin(&both).await.len(), 3);
    assert!(bench.store.batches(bench.now(), 10).await.unwrap().is_empty(), "nothing is left of them");
}

pub(crate) async fn a_ticket_begins_once(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    bench.fill(2).await;
    let tickets = bench.claim_fresh().await.tickets;
    let twice = [tickets[0].clone(), tickets[0].clone()];
    assert_eq!(bench.begin(&twice).await.len(), 1);
    let begun = bench.begin(&tickets).await;
    assert_eq!(begun.iter().map(super::BegunDelivery::id).collect::<Vec<_>>(), [tickets[1].id]);
    let other = bench.enroll().await;
    assert!(bench.begin_by(other, &tickets).await.is_empty());
}

pub(crate) async fn a_stale_ticket_begins_nothing(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    bench.fill(1).await;
    let first = bench.claim_fresh().await.tickets;
    let foreign = Ticket { batch: BatchId::random(), ..first[0].clone() };
    assert!(bench.begin(&[foreign, Ticket { position: 1, ..first[0].clone() }]).await.is_empty());
    let second = bench.reissue(Suspect::Batch(first[0].batch)).await.expect("one is left").tickets;
    assert!(bench.begin(&first).await.is_empty());
    let begun = bench.begin(&[first[0].clone(), second[0].clone()]).await;
    assert_eq!(begun.iter().map(|delivery| delivery.ticket.batch).collect::<Vec<_>>(), [second[0].batch]);
    assert!(bench.record(&[bench.sent(&begun[0])]).await.is_empty());
    assert!(bench.begin(&second).await.is_empty());
}

pub(crate) async fn a_repeated_begin_answers_what_it_began(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    bench.fill(3).await;
    let tickets = bench.claim_fresh().await.tickets;
    let wants = wanted(&tickets[..2]);
    let begin = Begin { wanted: &wants, repeated: false, owner: bench.owner };
    let begun = bench.store.begin(&begin).await.unwrap();
    let again = bench.store.begin(&Begin { repeated: true, ..begin }).await.unwrap();
    assert_eq!(again, begun);
    // What is recorded since is not begun any more.
    let deliveries = deliveries(&tickets, &begun);
    bench.record(&[bench.sent(&deliveries[0])]).await;
    let again =
        bench.store.begin(&Begin { wanted: &wants, repeated: true, owner: bench.owner }).await.unwrap();
    assert_eq!(again[0].positions.positions().collect::<Vec<_>>(), [1]);
    // Another's lease says nothing about it.
    let others = wanted(&tickets[..2]);
    let other = Begin { wanted: &others, repeated: true, owner: bench.owner };
    assert!(bench.store.begin(&other).await.unwrap().is_empty());
}

pub(crate) async fn a_repeated_begin_that_never_happened_begins(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    bench.fill(2).await;
    let tickets = bench.claim_fresh().await.tickets;
    let begin = Begin { wanted: &wanted(&tickets), repeated: true, owner: bench.owner };
    assert_eq!(deliveries(&tickets, &bench.store.begin(&begin).await.unwrap()).len(), 2);
    assert_eq!(bench.message(tickets[1].id).await.status, Status::Processing);
}

pub(crate) async fn a_repeated_begin_finds_all_of_its_leases(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    let mut tickets = Vec::new();
    for _ in 0..3 {
        bench.fill(2).await;
        tickets.extend(bench.claim_fresh().await.tickets);
    }
    // One is taken by another before.
    let other = bench.enroll().await;
    bench.begin_by(other, &tickets[2..3]).await;
    let wanted = wanted(&tickets);
    let begin = Begin { wanted: &wanted, repeated: false, owner: bench.owner };
    let mut begun = bench.store.begin(&begin).await.unwrap();
    let mut again = bench.store.begin(&Begin { repeated: true, ..begin }).await.unwrap();
    begun.sort_by_key(|begun| begun.lease);
    again.sort_by_key(|begun| begun.lease);
    assert_eq!((again, deliveries(&tickets, &begun).len()), (begun, 5));
}

pub(crate) async fn an_attempt_that_came_too_late_is_expired(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    let short = NewMessage { expires_at: Some(bench.in_seconds(5)), ..text("short") };
    bench.insert(&[short]).await;
    let delivery = bench.begin(&bench.claim_fresh().await.tickets).await.remove(0);
    bench.pass(5);
    let expired = super::record(&delivery, None, Verdict::Expired);
    assert!(bench.record(std::slice::from_ref(&expired)).await.is_empty());
    let row = bench.message(delivery.id()).await;
    assert_eq!((row.status, row.attempts, row.finished_at), (Status::Expired, 0, Some(bench.now())));
    // What has expired stays so, whatever comes back.
    assert_eq!(bench.record(&[expired]).await, [delivery.id()]);
    bench.pass(60);
    bench.recover().await;
    assert_eq!(bench.message(delivery.id()).await.status, Status::Expired);
}

pub(crate) async fn a_success_is_recorded_with_its_attempt(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    let delivery = bench.processing(1).await.remove(0);
    bench.pass(1);
    let sent = bench.sent(&delivery);
    assert!(bench.record(std::slice::from_ref(&sent)).await.is_empty());
    let row = bench.message(delivery.id()).await;
    assert_eq!((row.status, row.attempts, row.due_at), (Status::Sent, 1, None));
    assert_eq!(row.finished_at, Some(bench.now()));
    let attempts = bench.store.attempts(delivery.id()).await.unwrap();
    assert_eq!(attempts.len(), 1);
    let (attempt, outcome) = (&attempts[0], sent.outcome.expect("an outcome"));
    assert_eq!((attempt.message_id, attempt.attempt), (delivery.id(), 1));
    assert_eq!((attempt.lane.as_str(), attempt.class, attempt.status), (FRESH, Class::Accepted, Some(200)));
    assert_eq!(
        (&attempt.address, &attempt.error, &attempt.answer),
        (&outcome.address, &None, &outcome.answer)
    );
    assert_eq!(attempt.provider_message_id, outcome.provider_message_id);
    assert_eq!((attempt.started_at, attempt.times), (outcome.started_at, outcome.times));
}

pub(crate) async fn a_retry_waits_for_its_time_on_its_lane(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    let delivery = bench.processing(1).await.remove(0);
    assert!(bench.record(&[bench.failed(&delivery)]).await.is_empty());
    let row = bench.message(delivery.id()).await;
    assert_eq!((row.status, row.attempts), (Status::Retrying, 1));
    assert_eq!((row.lane.as_str(), row.due_at), (RETRY, Some(bench.in_seconds(3))));
    assert!(row.finished_at.is_none());
    assert!(row.reason.is_some_and(|reason| reason.contains("500")));
    bench.pass(2);
    assert_eq!(bench.claim_timed(RETRY).await.seen, 0);
    bench.pass(1);
    let second = bench.claim_timed(RETRY).await;
    assert_eq!((ids(&second), second.tickets[0].attempt), (vec![delivery.id()], 2));
    let row = bench.message(delivery.id()).await;
    assert_eq!((row.status, row.attempts, row.lane.as_str()), (Status::Queued, 1, RETRY));
    let begun = bench.begin(&second.tickets).await;
    assert!(bench.record(&[bench.sent(&begun[0])]).await.is_empty());
    let row = bench.message(delivery.id()).await;
    assert_eq!((row.status, row.attempts, row.due_at), (Status::Sent, 2, None));
}

pub(crate) async fn the_last_failure_makes_a_message_dead(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    let delivery = bench.processing(1).await.remove(0);
    assert!(bench.record(&[bench.dead(&delivery)]).await.is_empty());
    let row = bench.message(delivery.id()).await;
    assert_eq!((row.status, row.attempts, row.due_at), (Status::Dead, 1, None));
    assert_eq!((row.finished_at, row.reason.as_deref()), (Some(bench.now()), Some("all tries failed")));
    bench.pass(3_600);
    assert_eq!(bench.claim_fresh().await.seen + bench.claim_timed(RETRY).await.seen, 0);
}

pub(crate) async fn a_released_message_is_as_it_was(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    let delivery = bench.processing(1).await.remove(0);
    assert!(bench.record(&[bench.released(&delivery)]).await.is_empty());
    let row = bench.message(delivery.id()).await;
    assert_eq!((row.status, row.attempts, row.held), (Status::Pending, 0, None));
    assert!(bench.store.attempts(delivery.id()).await.unwrap().is_empty());
    let second = bench.claim_timed("").await.tickets;
    assert_eq!((second[0].id, second[0].attempt), (delivery.id(), 1));
    bench.record(&[bench.failed(&bench.begin(&second).await[0])]).await;
    bench.pass(3);
    let third = bench.begin(&bench.claim_timed(RETRY).await.tickets).await.remove(0);
    bench.pass(2);
    let released = Record { lane: RETRY.into(), ..bench.released(&third) };
    assert!(bench.record(&[released]).await.is_empty());
    let row = bench.message(delivery.id()).await;
    assert_eq!((row.status, row.attempts, row.due_at), (Status::Retrying, 1, Some(bench.now())));
    let fourth = bench.claim_timed(RETRY).await.tickets;
    assert_eq!((fourth[0].id, fourth[0].attempt), (delivery.id(), 2));
}

pub(crate) async fn a_record_repeated_changes_nothing(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    let deliveries = bench.processing(3).await;
    let records = [bench.sent(&deliveries[0]), bench.failed(&deliveries[1]), bench.dead(&deliveries[2])];
    assert!(bench.record(&records).await.is_empty());
    let mut before = Vec::new();
    for delivery in &deliveries {
        before.push(bench.message(delivery.id()).await);
    }
    bench.pass(1);
    let refused = bench.record(&records).await;
    assert!(!refused.contains(&deliveries[0].id()), "a success is never refused");
    for (delivery, before) in deliveries.iter().zip(before) {
        assert_eq!(bench.message(delivery.id()).await, before);
        assert_eq!(bench.store.attempts(delivery.id()).await.unwrap().len(), 1);
    }
    assert_eq!(bench.store.dead_letters(bench.in_seconds(1), 10).await.unwrap().len(), 1);
}

pub(crate) async fn a_stale_failure_is_refused_and_its_attempt_kept(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    let deliveries = bench.processing(2).await;
    bench.pass(30);
    let recovered = bench.recover().await;
    assert_eq!(recovered.leases, [deliveries[0].lease]);
    let owner = bench.enroll().await;
    let second = bench.reissue(Suspect::Lease(deliveries[0].lease)).await.expect("two are left").tickets;
    assert_eq!(second.len(), 2);
    let stale = [bench.failed(&deliveries[0]), bench.dead(&deliveries[1])];
    let mut refused = bench.record(&stale).await;
    refused.sort_unstable();
    assert_eq!(refused, [deliveries[0].id(), deliveries[1].id()]);
    assert_eq!(bench.begin_by(owner, &second).await.len(), 2);
    assert_eq!(bench.record(&stale).await.len(), 2);
    for ticket in second {
        let row = bench.message(ticket.id).await;
        assert_eq!((row.status, row.attempts), (Status::Processing, 0));
        assert_eq!(bench.store.attempts(ticket.id).await.unwrap().len(), 1);
    }
    assert!(bench.store.dead_letters(bench.in_seconds(1), 10).await.unwrap().is_empty());
}

pub(crate) async fn a_late_success_is_accepted_wherever_its_delivery_stands(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    let deliveries = bench.processing(4).await;
    bench.pass(30);
    bench.recover().await;
    let owner = bench.enroll().await;
    let second = bench.reissue(Suspect::Lease(deliveries[0].lease)).await.expect("all are left").tickets;
    // One is queued again, one under way again, one waits after it failed again, one has been sent again.
    let begun = bench.begin_by(owner, &second[1..]).await;
    bench.record(&[bench.failed(&begun[1]), bench.sent(&begun[2])]).await;
    let late: Vec<_> = deliveries.iter().map(|delivery| bench.sent(delivery)).collect();
    assert!(bench.record(&late).await.is_empty());
    for delivery in &deliveries {
        let row = bench.message(delivery.id()).await;
        assert_eq!((row.status, row.attempts), (Status::Sent, 1), "{}", delivery.id());
    }
    bench.pass(60);
    assert_eq!(bench.claim_timed(RETRY).await.seen + bench.claim_fresh().await.seen, 0);
    assert!(bench.begin_by(owner, &second).await.is_empty());
    assert_eq!(bench.record(&[bench.failed(&begun[0])]).await, [deliveries[1].id()]);
    // The second receiver of the message says so too: counted as an attempt, and nothing else.
    assert!(bench.record(&[bench.sent(&begun[0])]).await.is_empty());
    let attempts = [deliveries[1].id(), deliveries[2].id(), deliveries[3].id()];
    for id in attempts {
        assert_eq!(bench.store.attempts(id).await.unwrap().len(), 2, "{id}");
        assert_eq!(bench.message(id).await.status, Status::Sent);
    }
}

pub(crate) async fn a_late_success_takes_the_dead_letter_back(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    let first = bench.processing(1).await.remove(0);
    bench.pass(30);
    bench.recover().await;
    let second = bench.reissue(Suspect::Lease(first.lease)).await.expect("one is left").tickets;
    let owner = bench.enroll().await;
    let second = bench.begin_by(owner, &second).await.remove(0);
    bench.record(&[bench.dead(&second)]).await;
    assert!(bench.record(&[bench.sent(&first)]).await.is_empty());
    let row = bench.message(first.id()).await;
    assert_eq!((row.status, row.reason), (Status::Sent, None));
    assert!(bench.store.dead_letters(bench.in_seconds(60), 10).await.unwrap().is_empty());
}

pub(crate) async fn one_write_takes_every_kind_of_verdict(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    let deliveries = bench.processing(40).await;
    let records: Vec<_> = deliveries
        .iter()
        .enumerate()
        .map(|(n, delivery)| match n % 4 {
            0 => bench.sent(delivery),
            1 => bench.failed(delivery),
            2 => bench.dead(delivery),
            _ => bench.released(delivery),
        })
        .collect();
    assert!(bench.record(&records).await.is_empty());
    let statuses = [Status::Sent, Status::Retrying, Status::Dead, Status::Pending];
    for (n, delivery) in deliveries.iter().enumerate() {
        assert_eq!(bench.message(delivery.id()).await.status, statuses[n % 4], "message {n}");
    }
    assert_eq!(bench.store.dead_letters(bench.in_seconds(1), 100).await.unwrap().len(), 10);
    bench.pass(60);
    assert!(bench.recover().await.leases.is_empty(), "nothing is left of the lease");
    assert!(bench.record(&[]).await.is_empty());
}
