//! Ledger, leases, instances and leadership: how what died is found and given back.

use std::sync::Arc;
use std::time::Duration;

use super::{Bench, FRESH, LEASE, RETRY, pairs, recovery};
use crate::clock::Timestamp;
use crate::message::{MessageId, Status};
use crate::store::{BatchId, Bid, Due, InstanceId, Leadership, LeaseId, Place, Recovered, Store};

const PLACE: Place = Place { partition: 3, offset: 41 };
const NOTHING: Recovered = Recovered { instances: 0, messages: 0, ahead: Vec::new() };

pub(crate) async fn the_ledger_remembers_batches_and_places(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    bench.fill(2).await;
    let batch = bench.claim_fresh().await.batch.expect("a batch");
    let ledger = bench.store.batches(bench.now(), 10).await.unwrap();
    assert_eq!(ledger.len(), 1);
    assert_eq!((ledger[0].id, ledger[0].lane.as_str(), ledger[0].owner), (batch, FRESH, bench.owner));
    assert_eq!((ledger[0].created_at, ledger[0].place, ledger[0].orphaned), (bench.now(), None, false));
    for _ in 0..2 {
        bench.store.acknowledge(batch, PLACE).await.unwrap();
        assert_eq!(bench.store.batches(bench.now(), 10).await.unwrap()[0].place, Some(PLACE));
    }
    bench.store.acknowledge(BatchId(batch.0 + 1_000), PLACE).await.unwrap();
    assert_eq!(bench.store.batches(bench.now(), 10).await.unwrap().len(), 1);
}

pub(crate) async fn the_ledger_gives_the_oldest_first(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    bench.fill(4).await;
    let mut made = Vec::new();
    for _ in 0..4 {
        made.push(bench.claim(Due::after(MessageId(0)), 1).await.batch.expect("a batch"));
        bench.pass(1);
    }
    let ledger = bench.store.batches(bench.now(), 3).await.unwrap();
    assert_eq!(ledger.iter().map(|batch| batch.id).collect::<Vec<_>>(), made[..3]);
}

pub(crate) async fn a_batch_of_a_dead_owner_is_orphaned(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    bench.fill(1).await;
    bench.claim_fresh().await;
    let orphaned = async |now| bench.store.batches(now, 10).await.unwrap()[0].orphaned;
    assert!(!orphaned(bench.in_seconds(9)).await);
    assert!(orphaned(bench.in_seconds(11)).await);
    bench.store.renew(bench.owner, bench.now(), bench.in_seconds(60)).await.unwrap();
    assert!(!orphaned(bench.in_seconds(11)).await);
    bench.store.retire(bench.owner).await.unwrap();
    assert!(orphaned(bench.now()).await);
}

pub(crate) async fn a_requeue_gives_back_only_what_is_still_queued(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    bench.fill(4).await;
    let claimed = bench.claim_fresh().await;
    let tickets = pairs(&claimed);
    bench.begin(1, &tickets[..2]).await;
    bench.record(&[bench.sent(tickets[0], 1)]).await;
    let batch = claimed.batch.expect("a batch");
    assert_eq!(bench.store.requeue(&[batch], bench.now()).await.unwrap(), 2);
    assert!(bench.store.batches(bench.now(), 10).await.unwrap().is_empty());
    let words = [Status::Sent, Status::Processing, Status::Pending, Status::Pending];
    for (ticket, status) in tickets.iter().zip(words) {
        assert_eq!(bench.message(ticket.0).await.status, status);
    }
    assert_eq!(bench.store.requeue(&[batch], bench.now()).await.unwrap(), 0);
    assert_eq!(bench.store.requeue(&[], bench.now()).await.unwrap(), 0);
    assert_eq!(pairs(&bench.claim_fresh().await), [(tickets[2].0, 2), (tickets[3].0, 2)]);
}

pub(crate) async fn a_requeue_does_not_touch_a_later_epoch(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    let first = bench.processing(1, 2).await;
    let batch = bench.store.batches(bench.now(), 10).await.unwrap()[0].id;
    let records = [bench.released(first[0]), bench.failed(first[1], 1)];
    bench.record(&records).await;
    bench.pass(3);
    let fresh = pairs(&bench.claim_fresh().await);
    let timed = bench.claim_timed(RETRY).await;
    assert_eq!((fresh.len(), timed.tickets.len()), (1, 1));
    assert_eq!(bench.store.requeue(&[batch], bench.now()).await.unwrap(), 0);
    assert_eq!(bench.begin(2, &[fresh[0], pairs(&timed)[0]]).await.len(), 2);
    // A row that was tried before is due again, not pending.
    bench.record(&[bench.failed((first[1].0, 2), 2)]).await;
    bench.pass(3);
    let third = bench.claim_timed(RETRY).await;
    bench.pass(1);
    assert_eq!(bench.store.requeue(&[third.batch.expect("a batch")], bench.now()).await.unwrap(), 1);
    let row = bench.message(first[1].0).await;
    assert_eq!((row.status, row.due_at, row.attempts), (Status::Retrying, Some(bench.now()), 2));
}

pub(crate) async fn recovery_gives_back_what_the_dead_had_begun(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    let dying = bench.enroll().await;
    bench.fill(4).await;
    let tickets = pairs(&bench.claim_fresh().await);
    bench.begin_by(dying, 1, &tickets[..2]).await;
    bench.begin_by(dying, 2, &tickets[2..3]).await;
    bench.record(&[bench.failed(tickets[0], 1)]).await;
    bench.pass(4);
    let again = pairs(&bench.claim_timed(RETRY).await);
    bench.begin_by(dying, 3, &again).await;
    bench.store.renew(bench.owner, bench.now(), bench.in_seconds(60)).await.unwrap();
    assert_eq!(bench.recover().await, NOTHING);
    bench.pass(10);
    let recovered = bench.recover().await;
    assert_eq!(recovered, Recovered { instances: 1, messages: 3, ahead: Vec::new() });
    let row = bench.message(tickets[0].0).await;
    assert_eq!((row.status, row.due_at, row.attempts), (Status::Retrying, Some(bench.now()), 1));
    assert_eq!(bench.message(tickets[1].0).await.status, Status::Pending);
    assert_eq!(bench.message(tickets[2].0).await.status, Status::Pending);
    assert_eq!(bench.message(tickets[3].0).await.status, Status::Queued);
    assert_eq!(bench.recover().await, NOTHING);
    assert_eq!(pairs(&bench.claim_fresh().await), [(tickets[1].0, 2), (tickets[2].0, 2)]);
    assert_eq!(pairs(&bench.claim_timed(RETRY).await), [(tickets[0].0, 3)]);
}

pub(crate) async fn recovery_leaves_the_living_alone(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    let dying = bench.enroll().await;
    bench.fill(2).await;
    let tickets = pairs(&bench.claim_fresh().await);
    bench.begin(1, &tickets[..1]).await;
    bench.begin_by(dying, 2, &tickets[1..]).await;
    bench.pass(9);
    assert!(bench.store.renew(bench.owner, bench.now(), bench.in_seconds(10)).await.unwrap());
    assert_eq!(bench.recover().await, NOTHING);
    bench.pass(9);
    let recovered = bench.recover().await;
    assert_eq!(recovered, Recovered { instances: 1, messages: 1, ahead: Vec::new() });
    assert_eq!(bench.message(tickets[0].0).await.status, Status::Processing);
    assert_eq!(bench.message(tickets[1].0).await.status, Status::Pending);
    assert!(bench.record(&[bench.failed(tickets[0], 1)]).await.is_empty());
}

pub(crate) async fn recovery_leaves_recorded_messages_alone(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    let tickets = bench.processing(1, 3).await;
    // The lease goes with its last record; here one of its messages was never recorded.
    bench.record(&[bench.sent(tickets[0], 1), bench.dead(tickets[1], 1)]).await;
    let other = bench.processing(2, 1).await[0];
    bench.record_finished(&[bench.sent(other, 1)], &[LeaseId(2), LeaseId(99)]).await.unwrap();
    bench.pass(11);
    assert_eq!(bench.recover().await, Recovered { instances: 1, messages: 1, ahead: Vec::new() });
    for (ticket, status) in tickets.iter().zip([Status::Sent, Status::Dead, Status::Pending]) {
        assert_eq!(bench.message(ticket.0).await.status, status);
    }
}

pub(crate) async fn recovery_gives_back_what_the_retired_left(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    let ticket = bench.processing(1, 1).await[0];
    bench.store.retire(bench.owner).await.unwrap();
    assert_eq!(bench.message(ticket.0).await.status, Status::Processing);
    assert_eq!(bench.recover().await.messages, 1);
    assert_eq!(bench.message(ticket.0).await.status, Status::Pending);
    assert_eq!(bench.recover().await, NOTHING);
}

pub(crate) async fn a_lease_that_was_taken_away_can_not_be_renewed(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    bench.pass(11);
    assert_eq!(bench.recover().await.instances, 1);
    assert!(!bench.store.renew(bench.owner, bench.now(), bench.in_seconds(10)).await.unwrap());
    let anew = bench.enroll().await;
    assert_ne!(anew, bench.owner);
    assert!(bench.store.renew(anew, bench.now(), bench.in_seconds(10)).await.unwrap());
    bench.store.retire(anew).await.unwrap();
    bench.store.retire(anew).await.unwrap();
    assert!(!bench.store.renew(anew, bench.now(), bench.in_seconds(10)).await.unwrap());
}

pub(crate) async fn an_instance_whose_clock_was_ahead_is_dead_once_it_is_silent(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    let hour = bench.in_seconds(3_600);
    let ahead = bench.store.enroll("consumer", "there", hour, hour.after(LEASE)).await.unwrap();
    bench.fill(1).await;
    let ticket = pairs(&bench.claim_fresh().await)[0];
    bench.begin_by(ahead, 1, &[ticket]).await;
    assert_eq!(bench.recover().await, Recovered { ahead: vec![(ahead, hour)], ..NOTHING });
    assert_eq!(bench.message(ticket.0).await.status, Status::Processing);
    let silent = [ahead, bench.owner];
    let recovered = bench.store.recover(&recovery(bench.now(), &silent)).await.unwrap();
    assert_eq!((recovered.instances, recovered.messages), (1, 1), "the other one's lease is right");
    assert_eq!(bench.message(ticket.0).await.status, Status::Pending);
    assert_eq!(bench.recover().await, NOTHING);
}

fn bid(instance: InstanceId, now: Timestamp) -> Bid {
    Bid { instance, now, until: now.after(Duration::from_secs(6)), paced_until: None, pacing: None }
}

pub(crate) async fn one_instance_leads_until_its_term_ends(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    let (first, second) = (bench.owner, bench.enroll().await);
    let lead = async |instance| bench.store.lead(&bid(instance, bench.now())).await.unwrap();
    assert_eq!(
        lead(first).await,
        Some(Leadership { steady_since: bench.now(), paced_until: None, paused: false })
    );
    assert_eq!(lead(second).await, None);
    let began = bench.now();
    bench.pass(5);
    let renewed = lead(first).await.expect("a leader may go on");
    assert_eq!(renewed.steady_since, began, "nobody has missed a term");
    bench.pass(5);
    assert_eq!(lead(second).await, None);
    bench.pass(1);
    let succeeded = lead(second).await.expect("the term is over");
    assert_eq!(succeeded.steady_since, began, "a successor in time makes no break");
    bench.pass(7);
    let late = lead(second).await.expect("nobody else came");
    assert_eq!(late.steady_since, bench.now(), "for a second nobody led");
    assert_eq!(lead(first).await, None);
}

/// Its clock was an hour ahead when it died.
pub(crate) async fn a_term_in_the_far_future_keeps_nobody_from_leading(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    let (dead, second) = (bench.owner, bench.enroll().await);
    let hour = bench.in_seconds(3_600);
    assert!(bench.store.lead(&bid(dead, hour)).await.unwrap().is_some());
    assert!(!bench.store.control(bench.now()).await.unwrap().active, "nobody leads now");
    let led = bench.store.lead(&bid(second, bench.now())).await.unwrap().expect("no term is that long");
    assert_eq!(led.steady_since, bench.now(), "what an hour from now says is no reason to be sure");
    assert!(bench.store.control(bench.now()).await.unwrap().active);
    // A clock that is a little ahead is waited for.
    bench.store.retire(second).await.unwrap();
    let third = bench.enroll().await;
    assert!(bench.store.lead(&bid(second, bench.in_seconds(20))).await.unwrap().is_some());
    assert!(bench.store.lead(&bid(third, bench.now())).await.unwrap().is_none());
    bench.pass(26);
    assert!(bench.store.lead(&bid(third, bench.now())).await.unwrap().is_some());
}

pub(crate) async fn a_leader_that_retires_is_succeeded_at_once(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    let second = bench.enroll().await;
    assert!(bench.store.lead(&bid(bench.owner, bench.now())).await.unwrap().is_some());
    bench.store.retire(second).await.unwrap();
    assert!(bench.store.lead(&bid(second, bench.now())).await.unwrap().is_none());
    bench.store.retire(bench.owner).await.unwrap();
    let third = bench.enroll().await;
    assert!(bench.store.lead(&bid(third, bench.now())).await.unwrap().is_some());
    // A leader whose lease has run out is gone with it.
    let until = bench.now().after(LEASE * 100);
    assert!(bench.store.lead(&Bid { until, ..bid(third, bench.now()) }).await.unwrap().is_some());
    bench.pass(11);
    bench.recover().await;
    let fourth = bench.enroll().await;
    assert!(bench.store.lead(&bid(fourth, bench.now())).await.unwrap().is_some());
}

pub(crate) async fn pacing_holds_over_all_leaders(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    let paced_until = Some(bench.in_seconds(40));
    let first = bench.store.lead(&Bid { paced_until, ..bid(bench.owner, bench.now()) }).await.unwrap();
    assert_eq!(first, Some(Leadership { steady_since: bench.now(), paced_until, paused: false }));
    assert_eq!(bench.store.lead(&bid(bench.owner, bench.now())).await.unwrap(), first);
    let second = bench.enroll().await;
    let later = Bid { paced_until: Some(bench.in_seconds(99)), ..bid(second, bench.now()) };
    assert_eq!(bench.store.lead(&later).await.unwrap(), None, "the loser changes nothing");
    bench.pass(6);
    assert_eq!(bench.store.lead(&bid(second, bench.now())).await.unwrap(), first);
    bench.store.retire(second).await.unwrap();
    let third = bench.enroll().await;
    assert_eq!(bench.store.lead(&bid(third, bench.now())).await.unwrap(), first);
}
