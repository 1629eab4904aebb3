//! Begin and record: the guarded writes around a try.

use std::sync::Arc;

use super::{Bench, FRESH, RETRY, ids, pairs, text};
use crate::message::{Class, MessageId, NewMessage, Status};
use crate::store::{Begin, BegunMessage, LeaseId, Store};

pub(crate) async fn a_begin_takes_what_is_queued_in_the_tickets_epoch(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    bench.fill(3).await;
    let tickets = pairs(&bench.claim_fresh().await);
    let begun = bench.begin(1, &tickets[..2]).await;
    let expected = |(id, epoch)| BegunMessage { id, epoch, attempts: 0, lane_tries: 0 };
    assert_eq!(begun, [expected(tickets[0]), expected(tickets[1])]);
    assert_eq!(bench.message(tickets[0].0).await.status, Status::Processing);
    assert_eq!(bench.message(tickets[2].0).await.status, Status::Queued);
    assert!(bench.begin(2, &[]).await.is_empty());
}

pub(crate) async fn a_ticket_begins_once(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    bench.fill(2).await;
    let tickets = pairs(&bench.claim_fresh().await);
    let twice = [tickets[0], tickets[0]];
    assert_eq!(bench.begin(1, &twice).await.len(), 1);
    let begun = bench.begin(2, &tickets).await;
    assert_eq!(begun.iter().map(|message| message.id).collect::<Vec<_>>(), [tickets[1].0]);
    let other = bench.enroll().await;
    assert!(bench.begin_by(other, 3, &tickets).await.is_empty());
}

pub(crate) async fn a_stale_ticket_begins_nothing(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    let fresh = bench.fill(1).await[0];
    assert!(bench.begin(1, &[(fresh, 0), (fresh, 1)]).await.is_empty());
    let first = bench.claim_fresh().await;
    bench.store.requeue(&[first.batch.expect("a batch")], bench.now()).await.unwrap();
    assert!(bench.begin(2, &pairs(&first)).await.is_empty());
    let second = pairs(&bench.claim_fresh().await);
    assert!(bench.begin(3, &pairs(&first)).await.is_empty());
    // Distinct epochs in one call, and an id that is not there.
    let mixed = [(fresh, 1), second[0], (MessageId(fresh.0 + 1_000), 1)];
    let begun = bench.begin(4, &mixed).await;
    assert_eq!(begun.iter().map(|message| (message.id, message.epoch)).collect::<Vec<_>>(), second);
    assert!(bench.record(&[bench.sent(second[0], 1)]).await.is_empty());
    assert!(bench.begin(5, &second).await.is_empty());
}

pub(crate) async fn a_repeated_begin_answers_what_it_began(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    bench.fill(3).await;
    let tickets = pairs(&bench.claim_fresh().await);
    let begun = bench.begin(7, &tickets[..2]).await;
    let begin = Begin {
        lease: LeaseId(7),
        repeated: true,
        tickets: &tickets[..2],
        owner: bench.owner,
        now: bench.now(),
    };
    let mut again = bench.store.begin(&begin).await.unwrap().messages;
    again.sort_by_key(|message| message.id);
    assert_eq!(again, begun);
    // Another's lease says nothing about it.
    let other = Begin { lease: LeaseId(8), ..begin };
    assert!(bench.store.begin(&other).await.unwrap().messages.is_empty());
}

pub(crate) async fn a_repeated_begin_that_never_happened_begins(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    bench.fill(2).await;
    let tickets = pairs(&bench.claim_fresh().await);
    let begin =
        Begin { lease: LeaseId(7), repeated: true, tickets: &tickets, owner: bench.owner, now: bench.now() };
    assert_eq!(bench.store.begin(&begin).await.unwrap().messages.len(), 2);
    assert_eq!(bench.message(tickets[1].0).await.status, Status::Processing);
}

pub(crate) async fn an_expired_message_does_not_begin(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    let short = NewMessage { expires_at: Some(bench.in_seconds(5)), ..text("short") };
    bench.insert(&[short, text("long")]).await;
    let tickets = pairs(&bench.claim_fresh().await);
    assert_eq!(tickets.len(), 2);
    bench.pass(5);
    let begun = bench.begin(1, &tickets).await;
    assert_eq!(begun.iter().map(|message| message.id).collect::<Vec<_>>(), [tickets[1].0]);
    let row = bench.message(tickets[0].0).await;
    assert_eq!((row.status, row.finished_at), (Status::Expired, Some(bench.now())));
    // What has expired stays so, whatever comes back.
    bench.pass(60);
    bench.recover().await;
    assert_eq!(bench.message(tickets[0].0).await.status, Status::Expired);
}

pub(crate) async fn a_success_is_recorded_with_its_attempt(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    let ticket = bench.processing(1, 1).await[0];
    bench.pass(1);
    let sent = bench.sent(ticket, 1);
    assert!(bench.record_finished(std::slice::from_ref(&sent), &[LeaseId(1)]).await.unwrap().is_empty());
    let row = bench.message(ticket.0).await;
    assert_eq!((row.status, row.attempts, row.due_at), (Status::Sent, 1, None));
    assert_eq!((row.finished_at, row.epoch), (Some(bench.now()), 1));
    let attempts = bench.store.attempts(ticket.0).await.unwrap();
    assert_eq!(attempts.len(), 1);
    let (attempt, outcome) = (&attempts[0], sent.outcome.expect("an outcome"));
    assert_eq!((attempt.message_id, attempt.epoch, attempt.attempt), (ticket.0, 1, 1));
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
    let ticket = bench.processing(1, 1).await[0];
    let failed = bench.failed(ticket, 1);
    assert!(bench.record(&[failed]).await.is_empty());
    let row = bench.message(ticket.0).await;
    assert_eq!((row.status, row.attempts, row.epoch), (Status::Retrying, 1, 1));
    assert_eq!((row.lane.as_str(), row.due_at), (RETRY, Some(bench.in_seconds(3))));
    assert!(row.finished_at.is_none());
    assert!(row.reason.is_some_and(|reason| reason.contains("500")));
    bench.pass(2);
    assert_eq!(bench.claim_timed(RETRY).await.seen, 0);
    bench.pass(1);
    let second = bench.claim_timed(RETRY).await;
    assert_eq!((ids(&second), second.tickets[0].attempt, second.tickets[0].epoch), (vec![ticket.0], 2, 2));
    assert_eq!(bench.begin(2, &pairs(&second)).await[0].attempts, 1);
    assert!(bench.record(&[bench.sent((ticket.0, 2), 2)]).await.is_empty());
    let row = bench.message(ticket.0).await;
    assert_eq!((row.status, row.attempts, row.due_at), (Status::Sent, 2, None));
}

pub(crate) async fn the_last_failure_makes_a_message_dead(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    let ticket = bench.processing(1, 1).await[0];
    assert!(bench.record(&[bench.dead(ticket, 1)]).await.is_empty());
    let row = bench.message(ticket.0).await;
    assert_eq!((row.status, row.attempts, row.due_at), (Status::Dead, 1, None));
    assert_eq!((row.finished_at, row.reason.as_deref()), (Some(bench.now()), Some("all tries failed")));
    bench.pass(3_600);
    assert_eq!(bench.claim_fresh().await.seen + bench.claim_timed(RETRY).await.seen, 0);
}

pub(crate) async fn a_released_message_is_as_it_was(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    let ticket = bench.processing(1, 1).await[0];
    assert!(bench.record(&[bench.released(ticket)]).await.is_empty());
    let row = bench.message(ticket.0).await;
    assert_eq!((row.status, row.attempts, row.held), (Status::Pending, 0, None));
    assert!(bench.store.attempts(ticket.0).await.unwrap().is_empty());
    let second = pairs(&bench.claim_fresh().await);
    assert_eq!(second, [(ticket.0, 2)]);
    bench.begin(2, &second).await;
    bench.record(&[bench.failed(second[0], 1)]).await;
    bench.pass(3);
    let third = pairs(&bench.claim_timed(RETRY).await);
    bench.begin(3, &third).await;
    bench.pass(2);
    assert!(bench.record(&[bench.released(third[0])]).await.is_empty());
    let row = bench.message(ticket.0).await;
    assert_eq!((row.status, row.attempts, row.due_at), (Status::Retrying, 1, Some(bench.now())));
    assert_eq!(pairs(&bench.claim_timed(RETRY).await), [(ticket.0, 4)]);
}

pub(crate) async fn a_record_repeated_changes_nothing(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    let tickets = bench.processing(1, 3).await;
    let records = [bench.sent(tickets[0], 1), bench.failed(tickets[1], 1), bench.dead(tickets[2], 1)];
    assert!(bench.record_finished(&records, &[LeaseId(1)]).await.unwrap().is_empty());
    let mut before = Vec::new();
    for ticket in &tickets {
        before.push(bench.message(ticket.0).await);
    }
    bench.pass(1);
    let refused = bench.record_finished(&records, &[LeaseId(1)]).await.unwrap();
    assert!(!refused.contains(&tickets[0].0), "a success is never refused");
    for (ticket, before) in tickets.iter().zip(before) {
        assert_eq!(bench.message(ticket.0).await, before);
        assert_eq!(bench.store.attempts(ticket.0).await.unwrap().len(), 1);
    }
    assert_eq!(bench.store.dead_letters(bench.in_seconds(1), 10).await.unwrap().len(), 1);
}

pub(crate) async fn a_stale_failure_is_refused_and_its_attempt_kept(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    let tickets = bench.processing(1, 2).await;
    bench.pass(30);
    assert_eq!(bench.recover().await.messages, 2);
    let owner = bench.enroll().await;
    let second = pairs(&bench.claim_by(owner, crate::store::Due::after(MessageId(0)), 10).await);
    assert_eq!(second.len(), 2);
    let stale = [bench.failed(tickets[0], 1), bench.dead(tickets[1], 1)];
    let mut refused = bench.record(&stale).await;
    refused.sort_unstable();
    assert_eq!(refused, [tickets[0].0, tickets[1].0]);
    assert_eq!(bench.begin_by(owner, 2, &second).await.len(), 2);
    assert_eq!(bench.record(&stale).await.len(), 2);
    for (id, epoch) in second {
        let row = bench.message(id).await;
        assert_eq!((row.status, row.epoch, row.attempts), (Status::Processing, epoch, 0));
        assert_eq!(bench.store.attempts(id).await.unwrap().len(), 1);
    }
    assert!(bench.store.dead_letters(bench.in_seconds(1), 10).await.unwrap().is_empty());
}

pub(crate) async fn a_late_success_is_accepted_from_an_old_epoch(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    let tickets = bench.processing(1, 3).await;
    bench.pass(30);
    bench.recover().await;
    let owner = bench.enroll().await;
    // One is due again, one queued again, one under way again.
    let second = pairs(&bench.claim_by(owner, crate::store::Due::after(tickets[0].0), 10).await);
    assert_eq!(bench.begin_by(owner, 2, &second[1..]).await.len(), 1);
    let late: Vec<_> = tickets.iter().map(|ticket| bench.sent(*ticket, 1)).collect();
    assert!(bench.record(&late).await.is_empty());
    for (id, _) in &tickets {
        let row = bench.message(*id).await;
        assert_eq!((row.status, row.attempts), (Status::Sent, 1));
    }
    assert_eq!(bench.claim_fresh().await.seen, 0);
    assert!(bench.begin_by(owner, 3, &second).await.is_empty());
    // The second receiver of the message says so too: counted as an attempt, and nothing else.
    assert!(bench.record(&[bench.sent(second[1], 1)]).await.is_empty());
    assert_eq!(bench.store.attempts(second[1].0).await.unwrap().len(), 2);
    assert_eq!(bench.record(&[bench.failed(second[1], 1)]).await, [second[1].0]);
    assert_eq!(bench.message(second[1].0).await.status, Status::Sent);
}

pub(crate) async fn a_late_success_takes_the_dead_letter_back(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    let first = bench.processing(1, 1).await[0];
    bench.pass(30);
    bench.recover().await;
    let second = pairs(&bench.claim_fresh().await)[0];
    bench.begin(2, &[second]).await;
    bench.record(&[bench.dead(second, 1)]).await;
    assert!(bench.record(&[bench.sent(first, 1)]).await.is_empty());
    let row = bench.message(first.0).await;
    assert_eq!((row.status, row.reason), (Status::Sent, None));
    assert!(bench.store.dead_letters(bench.in_seconds(60), 10).await.unwrap().is_empty());
}

pub(crate) async fn one_write_takes_every_kind_of_verdict(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    let tickets = bench.processing(1, 40).await;
    let mut records = Vec::new();
    for (n, ticket) in tickets.iter().enumerate() {
        records.push(match n % 4 {
            0 => bench.sent(*ticket, 1),
            1 => bench.failed(*ticket, 1),
            2 => bench.dead(*ticket, 1),
            _ => bench.released(*ticket),
        });
    }
    assert!(bench.record_finished(&records, &[LeaseId(1)]).await.unwrap().is_empty());
    let words = [Status::Sent, Status::Retrying, Status::Dead, Status::Pending];
    for (n, ticket) in tickets.iter().enumerate() {
        assert_eq!(bench.message(ticket.0).await.status, words[n % 4], "message {n}");
    }
    assert_eq!(bench.store.dead_letters(bench.in_seconds(1), 100).await.unwrap().len(), 10);
    bench.pass(60);
    assert_eq!(bench.recover().await.messages, 0);
    assert!(bench.record(&[]).await.is_empty());
}
