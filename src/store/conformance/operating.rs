//! Searching, cancelling, redriving, deliveries, the pause, and keys.

use std::sync::Arc;
use std::time::Duration;

use super::{Bench, RETRY, ids, text, unhold};
use crate::clock::Timestamp;
use crate::message::{Held, MessageId, NewMessage, Status};
use crate::rate::Rate;
use crate::store::operate::{ApiKey, Change, Cursor, Deletion, Filter, Page, SCAN};
use crate::store::{Bid, Due, Endpoint, Store, Urgency};

impl Bench {
    async fn find(&self, filter: &Filter) -> Vec<MessageId> {
        self.store.search(filter, Cursor::start(filter), 100).await.unwrap().ids
    }

    async fn change(&self, change: Change, ids: &[MessageId]) -> Vec<MessageId> {
        let mut changed = self.store.change(change, ids, self.now()).await.unwrap();
        changed.sort();
        changed
    }

    /// Makes new messages dead.
    async fn make_dead(&self, count: usize) -> Vec<MessageId> {
        let deliveries = self.processing(count).await;
        let records: Vec<_> = deliveries.iter().map(|delivery| self.dead(delivery)).collect();
        self.record(&records).await;
        deliveries.iter().map(super::BegunDelivery::id).collect()
    }
}

fn status(status: Status) -> Filter {
    Filter { status: Some(status), ..Filter::default() }
}

pub(crate) async fn a_search_gives_newest_first_page_by_page(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    let all = Filter::default();
    assert_eq!(bench.store.search(&all, Cursor::start(&all), 3).await.unwrap(), Page::default());
    let mut ids = bench.fill(7).await;
    ids.reverse();
    for filter in [all, Filter { created_before: Some(bench.in_seconds(3600)), ..Filter::default() }] {
        let (mut pages, mut from) = (Vec::new(), Some(Cursor::start(&filter)));
        while let Some(cursor) = from {
            let found = bench.store.search(&filter, cursor, 3).await.unwrap();
            assert!(found.ids.len() <= 3);
            pages.push(found.ids);
            from = found.next;
        }
        assert_eq!(pages.iter().map(Vec::len).collect::<Vec<_>>(), [3, 3, 1]);
        assert_eq!(pages.concat(), ids);
    }
    let read = bench.store.messages(&[ids[0], MessageId(1 << 40), ids[6]]).await.unwrap();
    let mut read: Vec<_> = read.iter().map(|message| message.id).collect();
    read.sort();
    assert_eq!(read, [ids[6], ids[0]]);
}

pub(crate) async fn each_filter_finds_its_messages(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    let to = |recipient: &str| NewMessage { recipient: recipient.to_owned(), ..text("Hello") };
    let sms = NewMessage { endpoint: Some("sms".to_owned()), ..to("+90") };
    let later = NewMessage { send_at: Some(bench.in_seconds(60)), ..to("+91") };
    // pending: 5 (held), 6, 7; queued: 4; processing: 3; retrying: 2; dead: 1; sent: 0.
    let first = bench.insert(&vec![to("+90"); 5]).await;
    let tickets = bench.claim_fresh().await.tickets;
    let deliveries = bench.begin(&tickets[..4]).await;
    bench
        .record(&[bench.sent(&deliveries[0]), bench.dead(&deliveries[1]), bench.failed(&deliveries[2])])
        .await;
    let held = bench.insert(&[sms]).await[0];
    bench.claim_fresh().await;
    let (fresh, scheduled) = (bench.insert(&[to("+91")]).await[0], bench.insert(&[later]).await[0]);
    let [sent, dead, retrying, processing, queued] = first[..] else { panic!("{first:?}") };

    for (wanted, expected) in [
        (Status::Pending, vec![scheduled, fresh, held]),
        (Status::Queued, vec![queued]),
        (Status::Processing, vec![processing]),
        (Status::Sent, vec![sent]),
        (Status::Retrying, vec![retrying]),
        (Status::Dead, vec![dead]),
        (Status::Cancelled, vec![]),
        (Status::Expired, vec![]),
    ] {
        assert_eq!(bench.find(&status(wanted)).await, expected, "{wanted}");
        let here = Filter { endpoint: Some("default".to_owned()), ..status(wanted) };
        let expected: Vec<_> = expected.into_iter().filter(|id| *id != held).collect();
        assert_eq!(bench.find(&here).await, expected, "{wanted} of default");
        let (after, before) = (Some(Timestamp::EPOCH), Some(bench.in_seconds(3600)));
        let young = Filter { created_after: after, created_before: before, ..here.clone() };
        assert_eq!(bench.find(&young).await, expected, "{wanted} of default in time");
        let none = Filter { created_before: Some(Timestamp::EPOCH), ..here };
        assert_eq!(bench.find(&none).await, [], "{wanted} of long ago");
    }
    let of = |recipient: &str| Filter { recipient: Some(recipient.to_owned()), ..Filter::default() };
    assert_eq!(bench.find(&of("+91")).await, [scheduled, fresh]);
    assert_eq!(bench.find(&Filter { status: Some(Status::Sent), ..of("+90") }).await, [sent]);
    assert_eq!(bench.find(&of("+92")).await, []);
    let endpoint = Filter { endpoint: Some("sms".to_owned()), ..Filter::default() };
    assert_eq!(bench.find(&endpoint).await, [held]);
    for (reason, found) in [("all tries failed", vec![dead]), ("another", vec![])] {
        let filter = Filter { reason: Some(reason.to_owned()), ..status(Status::Dead) };
        assert_eq!(bench.find(&filter).await, found, "{reason}");
    }
    let young = Filter { created_after: Some(Timestamp::EPOCH), ..Filter::default() };
    assert_eq!(bench.find(&young).await.len(), 8);
}

pub(crate) async fn a_page_stays_right_while_rows_are_added(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    let ids = bench.fill(4).await;
    let filter = Filter::default();
    let first = bench.store.search(&filter, Cursor::start(&filter), 2).await.unwrap();
    assert_eq!(first.ids, [ids[3], ids[2]]);
    bench.fill(5).await;
    let second = bench.store.search(&filter, first.next.unwrap(), 2).await.unwrap();
    assert_eq!((second.ids, second.next), (vec![ids[1], ids[0]], None));
}

pub(crate) async fn a_search_goes_on_where_its_walk_met_its_bound(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    let wanted = NewMessage { recipient: "+1".to_owned(), ..text("first") };
    let wanted = bench.insert(&[wanted]).await[0];
    let other = NewMessage { recipient: "+2".to_owned(), ..text("other") };
    bench.insert(&vec![other; SCAN]).await;
    let by_age = Some(bench.in_seconds(3600));
    let walks = [
        Filter { endpoint: Some("default".to_owned()), status: Some(Status::Pending), ..Filter::default() },
        Filter { created_before: by_age, status: Some(Status::Pending), ..Filter::default() },
        Filter { created_before: by_age, ..Filter::default() },
    ];
    for filter in walks {
        // The reason sorts out what the index does not.
        let filter = Filter { reason: Some("none has one".to_owned()), ..filter };
        let first = bench.store.search(&filter, Cursor::start(&filter), 10).await.unwrap();
        assert_eq!(first.ids, []);
        let next = first.next.expect("there is one more row to look at");
        let second = bench.store.search(&filter, next, 10).await.unwrap();
        assert_eq!(second, Page::default());
    }
    let filter = Filter { recipient: Some("+1".to_owned()), ..Filter::default() };
    assert_eq!(bench.find(&filter).await, [wanted]);
}

pub(crate) async fn a_cancelled_message_is_tried_no_more(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    let ids = bench.fill(2).await;
    let tickets = bench.claim(Due::New(Urgency::Normal), 1).await.tickets;
    bench.pass(1);
    assert_eq!(bench.change(Change::Cancel, &ids).await, ids);
    assert!(bench.begin(&tickets).await.is_empty(), "its ticket is stale");
    assert!(bench.claim_fresh().await.tickets.is_empty());
    for id in &ids {
        let message = bench.message(*id).await;
        assert_eq!((message.status, message.finished_at), (Status::Cancelled, Some(bench.now())));
    }
    // One that had failed waits no more, and neither does one that is held.
    let retried = bench.processing(1).await.remove(0);
    bench.record(&[bench.failed(&retried)]).await;
    let saturated = &["default".to_owned()];
    let held = bench.fill(1).await[0];
    bench.claim_beside(bench.owner, Due::New(Urgency::Normal), 10, saturated).await;
    assert_eq!(bench.change(Change::Cancel, &[retried.id(), held]).await, [retried.id(), held]);
    assert_eq!(unhold(&*bench.store, "default", Held::EndpointBusy, 10, bench.now()).await, 0);
    bench.pass(60);
    assert!(bench.claim_timed(RETRY).await.tickets.is_empty());
    let row = bench.message(retried.id()).await;
    assert_eq!((row.status, row.attempts, row.due_at), (Status::Cancelled, 1, None));
}

pub(crate) async fn a_cancelled_try_that_succeeds_is_sent(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    let deliveries = bench.processing(2).await;
    let ids = [deliveries[0].id(), deliveries[1].id()];
    assert_eq!(bench.change(Change::Cancel, &ids).await, ids);
    let refused = bench.record(&[bench.sent(&deliveries[0]), bench.failed(&deliveries[1])]).await;
    assert_eq!(refused, [ids[1]]);
    assert_eq!(bench.message(ids[0]).await.status, Status::Sent);
    assert_eq!(bench.message(ids[1]).await.status, Status::Cancelled);
    // A recovery does not bring it back.
    bench.pass(60);
    assert!(bench.recover().await.leases.is_empty());
}

pub(crate) async fn a_redriven_message_begins_anew(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    let dead = bench.make_dead(1).await[0];
    bench.pass(5);
    assert_eq!(bench.change(Change::Redrive, &[dead]).await, [dead]);
    let message = bench.message(dead).await;
    assert_eq!((message.status, message.attempts, message.lane.as_str()), (Status::Pending, 1, ""));
    assert_eq!((message.finished_at, message.reason, message.due_at), (None, None, None));
    assert!(bench.store.dead_letters(bench.in_seconds(60), 10).await.unwrap().is_empty());
    let claimed = bench.claim_timed("").await;
    let ticket = &claimed.tickets[0];
    assert_eq!((ticket.id, ticket.attempt, ticket.lane_tries), (dead, 2, 0));
    let delivery = bench.begin(&claimed.tickets).await.remove(0);
    bench.record(&[bench.sent(&delivery)]).await;
    assert_eq!(bench.message(dead).await.status, Status::Sent);
    assert_eq!(bench.store.attempts(dead).await.unwrap().len(), 2);
    // One that was cancelled before its claim is new again.
    let new = bench.fill(1).await;
    assert_eq!(bench.change(Change::Cancel, &new).await, new);
    assert_eq!(bench.change(Change::Redrive, &new).await, new);
    assert_eq!(bench.message(new[0]).await.status, Status::Pending);
    let again = [bench.claim_fresh().await.tickets, bench.claim_timed("").await.tickets].concat();
    assert_eq!(again.iter().map(|ticket| ticket.id).collect::<Vec<_>>(), new);
    // One that was cancelled before its time still waits for it.
    let later = NewMessage { send_at: Some(bench.in_seconds(60)), ..text("later") };
    let later = bench.insert(&[later]).await;
    bench.claim_fresh().await;
    assert_eq!(bench.change(Change::Cancel, &later).await, later);
    assert_eq!(bench.change(Change::Redrive, &later).await, later);
    assert_eq!(bench.claim_timed("").await.seen, 0, "its time has not come");
    bench.pass(60);
    assert_eq!(ids(&bench.claim_timed("").await), later);
    // What had expired gets a life without an end.
    let short = NewMessage { expires_at: Some(bench.in_seconds(1)), ..text("short") };
    let short = bench.insert(&[short]).await[0];
    bench.pass(2);
    bench.claim_fresh().await;
    assert_eq!(bench.message(short).await.status, Status::Expired);
    assert_eq!(bench.change(Change::Redrive, &[short]).await, [short]);
    let again = bench.claim_timed("").await.tickets;
    assert_eq!((again[0].id, again[0].expires_at), (short, None));
    let reissued = bench.reissue(crate::store::Suspect::Batch(again[0].batch)).await.expect("it is left");
    assert_eq!(reissued.tickets[0].expires_at, None, "also when it is issued again");
}

pub(crate) async fn only_what_a_status_allows_is_changed(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    let delivery = bench.processing(1).await.remove(0);
    bench.record(&[bench.sent(&delivery)]).await;
    let (sent, pending) = (delivery.id(), bench.fill(1).await[0]);
    let nobody = MessageId(1 << 40);
    assert_eq!(bench.change(Change::Cancel, &[sent, nobody]).await, []);
    assert_eq!(bench.change(Change::Redrive, &[sent, pending, nobody]).await, []);
    assert_eq!(bench.change(Change::Cancel, &[pending]).await, [pending]);
    assert_eq!(bench.change(Change::Cancel, &[pending]).await, [], "it is cancelled already");
    assert_eq!(bench.change(Change::Redrive, &[pending]).await, [pending]);
    assert_eq!(bench.change(Change::Redrive, &[]).await, []);
}

pub(crate) async fn a_job_changes_what_matched_when_it_was_opened(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    let dead = bench.make_dead(5).await;
    let operation =
        bench.store.open_operation(Change::Redrive, &status(Status::Dead), bench.now()).await.unwrap();
    assert_eq!((operation.matched, operation.changed, operation.finished_at), (0, 0, None));
    // It came later.
    let later = bench.make_dead(1).await[0];
    let mut worked = operation.clone();
    while worked.finished_at.is_none() {
        worked = bench
            .store
            .work_operation(operation.id, 2, bench.now())
            .await
            .unwrap()
            .expect("the operation is there");
    }
    assert_eq!((worked.matched, worked.changed), (5, 5));
    assert_eq!(bench.store.operation(operation.id).await.unwrap().as_ref(), Some(&worked));
    for id in dead {
        assert_eq!(bench.message(id).await.status, Status::Pending);
    }
    assert_eq!(bench.message(later).await.status, Status::Dead);
    let again = bench.store.work_operation(operation.id, 2, bench.now()).await.unwrap();
    assert_eq!(again, Some(worked), "a finished operation does nothing more");
}

pub(crate) async fn a_job_goes_on_after_a_break(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    let pending = bench.fill(3).await;
    let operation =
        bench.store.open_operation(Change::Cancel, &status(Status::Pending), bench.now()).await.unwrap();
    bench.store.work_operation(operation.id, 2, bench.now()).await.unwrap();
    assert!(bench.store.idle_operations(bench.now()).await.unwrap().is_empty());
    bench.pass(10);
    assert_eq!(bench.store.idle_operations(bench.now()).await.unwrap(), [operation.id]);
    let done = bench.store.work_operation(operation.id, 10, bench.now()).await.unwrap().unwrap();
    assert_eq!((done.matched, done.changed, done.finished_at), (3, 3, Some(bench.now())));
    assert!(bench.store.idle_operations(bench.in_seconds(60)).await.unwrap().is_empty());
    assert_eq!(bench.find(&status(Status::Cancelled)).await.len(), pending.len());
    assert_eq!(bench.store.operation(crate::store::operate::OperationId(99)).await.unwrap(), None);
}

pub(crate) async fn dead_messages_are_counted_by_reason(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    assert!(bench.store.dead_reasons().await.unwrap().is_empty());
    let dead = bench.make_dead(3).await;
    let reasons = bench.store.dead_reasons().await.unwrap();
    assert_eq!(reasons.len(), 1);
    assert_eq!((reasons[0].reason.as_str(), reasons[0].count), ("all tries failed", 3));
    assert_eq!(reasons[0].newest, dead[2]);
}

pub(crate) async fn a_pause_holds_for_every_leader(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    let pacing = Some(Rate { count: 100, interval: Duration::from_secs(1) });
    let until = |seconds| bench.in_seconds(seconds);
    let bid = |instance| Bid { instance, now: bench.now(), until: until(4), paced_until: None, pacing };
    let before = bench.store.control(bench.now()).await.unwrap();
    assert_eq!((before.paused, before.active, before.pacing), (false, false, None));
    bench.store.set_paused(true).await.unwrap();
    assert!(bench.store.lead(&bid(bench.owner)).await.unwrap().unwrap().paused);
    let control = bench.store.control(bench.now()).await.unwrap();
    assert_eq!((control.paused, control.active, control.pacing), (true, true, pacing));
    bench.store.retire(bench.owner).await.unwrap();
    let successor = bench.enroll().await;
    assert!(bench.store.lead(&bid(successor)).await.unwrap().unwrap().paused);
    bench.store.set_paused(false).await.unwrap();
    assert!(!bench.store.lead(&bid(successor)).await.unwrap().unwrap().paused);
    bench.pass(5);
    assert!(!bench.store.control(bench.now()).await.unwrap().active, "its term is over");
}

pub(crate) async fn an_endpoint_is_deleted_when_unused(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    bench.store.put_endpoint(&Endpoint::new("sms", "http://localhost:3000")).await.unwrap();
    assert_eq!(bench.store.delete_endpoint("mail").await.unwrap(), Deletion::Missing);
    assert_eq!(bench.store.delete_endpoint("sms").await.unwrap(), Deletion::Deleted);
    assert_eq!(bench.store.delete_endpoint("sms").await.unwrap(), Deletion::Missing);
    bench.store.put_endpoint(&Endpoint::new("sms", "http://localhost:3000")).await.unwrap();
    bench.insert(&[NewMessage { endpoint: Some("sms".to_owned()), ..text("Hello") }]).await;
    assert_eq!(bench.store.delete_endpoint("sms").await.unwrap(), Deletion::Used);
    let left = bench.store.endpoints().await.unwrap();
    assert_eq!(left.iter().map(|endpoint| endpoint.name.as_str()).collect::<Vec<_>>(), ["default", "sms"]);
}

pub(crate) async fn keys_are_kept_used_and_revoked(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    let key = |id: &str, expires_at| ApiKey {
        id: id.to_owned(),
        name: "the billing delivery".to_owned(),
        hash: vec![1, 2, 255],
        scopes: vec!["read".to_owned(), "write".to_owned()],
        created_at: bench.now(),
        expires_at,
        last_used_at: None,
        revoked_at: None,
    };
    let (first, second) = (key("ams_a", None), key("ams_b", Some(bench.in_seconds(60))));
    bench.store.put_key(&first).await.unwrap();
    bench.store.put_key(&second).await.unwrap();
    assert_eq!(bench.store.keys().await.unwrap(), [first.clone(), second.clone()]);
    bench.pass(1);
    bench.store.keys_used(&["ams_b".to_owned(), "ams_z".to_owned()], bench.now()).await.unwrap();
    assert!(bench.store.revoke_key("ams_a", bench.now()).await.unwrap());
    assert!(!bench.store.revoke_key("ams_a", bench.now()).await.unwrap());
    assert!(!bench.store.revoke_key("ams_z", bench.now()).await.unwrap());
    let now = Some(bench.now());
    let expected = [ApiKey { revoked_at: now, ..first }, ApiKey { last_used_at: now, ..second }];
    assert_eq!(bench.store.keys().await.unwrap(), expected);
}
