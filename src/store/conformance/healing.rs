//! Batches, leases, instances and leadership: how what died is found and issued again.

use std::sync::Arc;
use std::time::Duration;

use super::{Bench, FRESH, LEASE, RETRY, batch, recovery, text};
use crate::clock::Timestamp;
use crate::message::{NewMessage, Status, Verdict};
use crate::store::{
    BatchId, Bid, Due, InstanceId, Leadership, LogPosition, Record, Recovered, Store, Suspect, Urgency,
};

const LOG_POSITION: LogPosition = LogPosition { partition: 3, offset: 41 };
const NOTHING: Recovered = Recovered { instances: 0, leases: Vec::new(), ahead: Vec::new() };

pub(crate) async fn batches_and_their_places_are_remembered(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    bench.fill(2).await;
    let id = batch(&bench.claim_fresh().await);
    let batches = bench.store.batches(bench.now(), 10).await.unwrap();
    assert_eq!(batches.len(), 1);
    assert_eq!((batches[0].id, batches[0].lane.as_str(), batches[0].owner), (id, FRESH, bench.owner));
    assert_eq!((batches[0].log_position, batches[0].orphaned), (None, false));
    for _ in 0..2 {
        bench.store.acknowledge(id, LOG_POSITION).await.unwrap();
        assert_eq!(bench.store.batches(bench.now(), 10).await.unwrap()[0].log_position, Some(LOG_POSITION));
    }
    bench.store.acknowledge(BatchId::random(), LOG_POSITION).await.unwrap();
    assert_eq!(bench.store.batches(bench.now(), 10).await.unwrap().len(), 1);
}

pub(crate) async fn the_oldest_batches_come_first(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    bench.fill(4).await;
    let mut made = Vec::new();
    for _ in 0..4 {
        made.push(batch(&bench.claim(Due::New(Urgency::Normal), 1).await));
        bench.pass(1);
    }
    let batches = bench.store.batches(bench.now(), 3).await.unwrap();
    assert_eq!(batches.iter().map(|batch| batch.id).collect::<Vec<_>>(), made[..3]);
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

pub(crate) async fn a_reissue_takes_only_what_is_still_queued(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    bench.fill(4).await;
    let tickets = bench.claim_fresh().await.tickets;
    let begun = bench.begin(&tickets[..2]).await;
    bench.record(&[bench.sent(&begun[0])]).await;
    let reissued = bench.reissue(Suspect::Batch(tickets[0].batch)).await.expect("two are left");
    assert_eq!(reissued.lane, FRESH);
    let places: Vec<_> = reissued.tickets.iter().map(|ticket| (ticket.id, ticket.position)).collect();
    assert_eq!(places, [(tickets[2].id, 2), (tickets[3].id, 3)], "positions never change");
    assert_ne!(reissued.tickets[0].batch, tickets[0].batch);
    let statuses = [Status::Sent, Status::Processing, Status::Queued, Status::Queued];
    for (ticket, status) in tickets.iter().zip(statuses) {
        assert_eq!(bench.message(ticket.id).await.status, status);
    }
    assert!(bench.reissue(Suspect::Batch(tickets[0].batch)).await.is_none());
    assert!(bench.begin(&tickets[2..]).await.is_empty(), "the old tickets are stale");
    let begun = bench.begin(&reissued.tickets).await;
    assert_eq!((begun.len(), begun[0].root), (2, tickets[0].batch));
    assert!(bench.reissue(Suspect::Batch(reissued.tickets[0].batch)).await.is_none(), "nothing is left");
}

pub(crate) async fn a_reissue_keeps_what_its_tickets_said(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    let deliveries = bench.processing(2).await;
    bench.record(&[bench.failed(&deliveries[0]), bench.failed(&deliveries[1])]).await;
    bench.pass(3);
    let tickets = bench.claim_timed(RETRY).await.tickets;
    assert!(
        bench.reissue(Suspect::Batch(deliveries[0].ticket.batch)).await.is_none(),
        "that batch is long gone"
    );
    let reissued = bench.reissue(Suspect::Batch(tickets[0].batch)).await.expect("both are left");
    assert_eq!(reissued.lane, RETRY);
    let said =
        |ticket: &crate::ticket::Ticket| (ticket.id, ticket.position, ticket.attempt, ticket.lane_tries);
    let (before, after): (Vec<_>, Vec<_>) =
        (tickets.iter().map(said).collect(), reissued.tickets.iter().map(said).collect());
    assert_eq!(after, before);
    let begun = bench.begin(&reissued.tickets).await;
    bench.record(&[bench.sent(&begun[0]), bench.failed(&begun[1])]).await;
    assert_eq!(bench.message(deliveries[0].id()).await.status, Status::Sent);
    assert_eq!(bench.message(deliveries[1].id()).await.attempts, 2);
}

pub(crate) async fn recovery_lists_what_the_dead_had_begun(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    let dying = bench.enroll().await;
    bench.fill(4).await;
    let tickets = bench.claim_fresh().await.tickets;
    let first = bench.begin_by(dying, &tickets[..2]).await;
    let second = bench.begin_by(dying, &tickets[2..3]).await;
    bench.record(&[bench.failed(&first[0])]).await;
    bench.pass(4);
    let third = bench.begin_by(dying, &bench.claim_timed(RETRY).await.tickets).await;
    bench.store.renew(bench.owner, bench.now(), bench.in_seconds(60)).await.unwrap();
    assert_eq!(bench.recover().await, NOTHING);
    assert!(bench.reissue(Suspect::Lease(first[0].lease)).await.is_none(), "its owner lives");
    bench.pass(10);
    let recovered = bench.recover().await;
    let mut leases = vec![first[0].lease, second[0].lease, third[0].lease];
    leases.sort();
    assert_eq!(recovered, Recovered { instances: 1, leases: leases.clone(), ahead: Vec::new() });
    assert_eq!(bench.recover().await.leases, leases, "until they are issued again");
    let mut reissued = Vec::new();
    for lease in leases {
        reissued.extend(bench.reissue(Suspect::Lease(lease)).await.expect("something is left").tickets);
    }
    reissued.sort_by_key(|ticket| ticket.id);
    let said: Vec<_> = reissued.iter().map(|ticket| (ticket.id, ticket.attempt)).collect();
    assert_eq!(said, [(tickets[0].id, 2), (tickets[1].id, 1), (tickets[2].id, 1)]);
    for ticket in &tickets {
        assert_eq!(bench.message(ticket.id).await.status, Status::Queued);
    }
    assert_eq!(bench.recover().await, NOTHING);
    assert_eq!(bench.begin(&reissued).await.len(), 3);
}

pub(crate) async fn recovery_leaves_the_living_alone(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    let dying = bench.enroll().await;
    bench.fill(2).await;
    let tickets = bench.claim_fresh().await.tickets;
    let ours = bench.begin(&tickets[..1]).await;
    let theirs = bench.begin_by(dying, &tickets[1..]).await;
    bench.pass(9);
    assert!(bench.store.renew(bench.owner, bench.now(), bench.in_seconds(10)).await.unwrap());
    assert_eq!(bench.recover().await, NOTHING);
    bench.pass(9);
    let leases = vec![theirs[0].lease];
    assert_eq!(bench.recover().await, Recovered { instances: 1, leases, ahead: Vec::new() });
    assert_eq!(bench.message(tickets[0].id).await.status, Status::Processing);
    assert!(bench.record(&[bench.failed(&ours[0])]).await.is_empty());
}

pub(crate) async fn recovery_leaves_recorded_messages_alone(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    let deliveries = bench.processing(3).await;
    // The lease goes with its last record; here one of its deliveries was never recorded.
    bench.record(&[bench.sent(&deliveries[0]), bench.dead(&deliveries[1])]).await;
    let other = bench.processing(1).await.remove(0);
    bench.record(&[bench.sent(&other)]).await;
    bench.pass(11);
    let leases = vec![deliveries[0].lease];
    assert_eq!(bench.recover().await, Recovered { instances: 1, leases, ahead: Vec::new() });
    let reissued = bench.reissue(Suspect::Lease(deliveries[0].lease)).await.expect("one is left").tickets;
    assert_eq!(reissued.iter().map(|ticket| ticket.id).collect::<Vec<_>>(), [deliveries[2].id()]);
    for (delivery, status) in deliveries.iter().zip([Status::Sent, Status::Dead, Status::Queued]) {
        assert_eq!(bench.message(delivery.id()).await.status, status);
    }
}

pub(crate) async fn recovery_lists_what_the_retired_left(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    let delivery = bench.processing(1).await.remove(0);
    bench.store.retire(bench.owner).await.unwrap();
    assert_eq!(bench.message(delivery.id()).await.status, Status::Processing);
    assert_eq!(bench.recover().await.leases, [delivery.lease]);
    assert!(bench.reissue(Suspect::Lease(delivery.lease)).await.is_some());
    assert_eq!(bench.message(delivery.id()).await.status, Status::Queued);
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
    let delivery = bench.begin_by(ahead, &bench.claim_fresh().await.tickets).await.remove(0);
    assert_eq!(bench.recover().await, Recovered { ahead: vec![(ahead, hour)], ..NOTHING });
    assert_eq!(bench.message(delivery.id()).await.status, Status::Processing);
    let silent = [ahead, bench.owner];
    let recovered = bench.store.recover(&recovery(bench.now(), &silent)).await.unwrap();
    assert_eq!(
        (recovered.instances, recovered.leases),
        (1, vec![delivery.lease]),
        "the other one's lease is right"
    );
    assert!(bench.reissue(Suspect::Lease(delivery.lease)).await.is_some());
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

pub(crate) async fn a_clock_that_was_set_back_delays_no_retry(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    let hour = Duration::from_secs(3_600);
    let scheduled = NewMessage { send_at: Some(bench.in_seconds(7_200)), ..text("scheduled") };
    bench.insert(&[scheduled]).await;
    bench.claim_fresh().await;
    let deliveries = bench.processing(2).await;
    // Their times were written while the clock was an hour ahead.
    let failed = |delivery, at| Record {
        verdict: Verdict::Retry { lane: RETRY.to_owned(), lane_tries: 0, at },
        ..bench.failed(delivery)
    };
    let records =
        [failed(&deliveries[0], bench.in_seconds(3_603)), failed(&deliveries[1], bench.in_seconds(60))];
    bench.record(&records).await;
    bench.store.bring_forward(hour, bench.now()).await.unwrap();
    let has_clock = bench.store.time().await.unwrap().is_some();
    let at_once = bench.claim_timed(RETRY).await.seen;
    assert_eq!(at_once, if has_clock { 0 } else { 1 }, "none is due before now");
    bench.pass(3);
    let later = bench.claim_timed(RETRY).await.seen;
    assert_eq!(later, if has_clock { 0 } else { 1 });
    bench.pass(7_196);
    assert_eq!(bench.claim_timed("").await.seen, 0, "what is scheduled stays where its sender put it");
    bench.pass(1);
    assert_eq!(bench.claim_timed("").await.seen, 1);
}
