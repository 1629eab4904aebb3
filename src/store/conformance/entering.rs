//! How messages enter, and how they read back.

use std::sync::Arc;

use super::{Bench, new_id, text};
use crate::message::{NewMessage, Status};
use crate::store::{AllOrNone, Inserted, Store, StoreError};

pub(crate) async fn a_fresh_store_is_empty_and_of_this_version(store: Arc<dyn Store>) {
    assert_eq!(store.missing_migrations().await.unwrap(), Vec::<String>::new());
    assert_eq!(store.migrate().await.unwrap(), Vec::<String>::new());
    let installation = store.installation().await.unwrap();
    assert!(!installation.is_nil());
    assert_eq!(store.installation().await.unwrap(), installation);
    assert!(store.endpoints().await.unwrap().is_empty());
    assert!(store.lanes().await.unwrap().is_empty());
    assert!(store.held().await.unwrap().is_empty());
    let bench = Bench::new(store).await;
    let claimed = bench.claim_fresh().await;
    assert_eq!((claimed.seen, claimed.tickets.len()), (0, 0));
}

pub(crate) async fn a_message_reads_back_as_it_was_inserted(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    let full = NewMessage {
        endpoint: Some("default".to_owned()),
        recipient: "Ünal \"quoted\" 'apostrophe'".to_owned(),
        content: "line 1\nline 2 \u{1F600}".to_owned(),
        content_type: Some("text/plain".to_owned()),
        headers: Some(serde_json::json!({"x-a": "1", "x-b": "ü"})),
        ordering_key: Some("key".to_owned()),
        priority: -7,
        send_at: Some(bench.in_seconds(60)),
        expires_at: Some(bench.in_seconds(120)),
        idempotency_key: Some("once".to_owned()),
        tags: Some(serde_json::json!({"team": "a", "nested": {"n": 1.5}})),
    };
    let inserted = bench.store.insert(&[full.clone(), text("plain")], bench.now()).await.unwrap();
    let read = bench.message(new_id(&inserted[0])).await;
    let again = NewMessage {
        endpoint: Some(read.endpoint.clone()),
        recipient: read.recipient.clone(),
        content: read.content.clone(),
        content_type: read.content_type.clone(),
        headers: read.headers.clone(),
        ordering_key: read.ordering_key.clone(),
        priority: read.priority,
        send_at: read.send_at,
        expires_at: read.expires_at,
        idempotency_key: read.idempotency_key.clone(),
        tags: read.tags.clone(),
    };
    assert_eq!(again, full);
    let plain = bench.message(new_id(&inserted[1])).await;
    assert_eq!((plain.endpoint.as_str(), plain.content_type, plain.headers), ("default", None, None));
    assert_eq!((plain.status, plain.attempts), (Status::Pending, 0));
    assert_eq!((plain.held, plain.lane.as_str(), plain.due_at), (None, "", None));
    assert_eq!((plain.finished_at, plain.reason, plain.priority), (None, None, 0));
    let Inserted::New { created_at, .. } = inserted[1] else { panic!("{inserted:?}") };
    assert_eq!(plain.created_at, created_at);
}

pub(crate) async fn an_insert_takes_all_or_nothing(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    let bad = NewMessage { recipient: String::new(), ..text("x") };
    let refused = bench.store.insert(&[text("good"), bad], bench.now()).await;
    assert!(matches!(refused, Err(StoreError::Refused(_))), "{refused:?}");
    assert_eq!(bench.claim_fresh().await.seen, 0);
    assert!(bench.store.insert(&[], bench.now()).await.unwrap().is_empty());
}

/// Messages that no store takes, each wrong in one thing.
fn impossible(bench: &Bench) -> Vec<NewMessage> {
    let (soon, later) = (bench.in_seconds(5), bench.in_seconds(6));
    vec![
        NewMessage { recipient: "r".repeat(1025), ..text("x") },
        NewMessage { content: "c".repeat((1 << 20) + 1), ..text("x") },
        NewMessage { endpoint: Some(String::new()), ..text("x") },
        NewMessage { priority: 101, ..text("x") },
        NewMessage { priority: -101, ..text("x") },
        NewMessage { send_at: Some(later), expires_at: Some(soon), ..text("x") },
        NewMessage { send_at: Some(soon), expires_at: Some(soon), ..text("x") },
        NewMessage { idempotency_key: Some(String::new()), ..text("x") },
        NewMessage { idempotency_key: Some("k".repeat(256)), ..text("x") },
        NewMessage { headers: Some(serde_json::json!(["a"])), ..text("x") },
        NewMessage { headers: Some(serde_json::json!({"a": 1})), ..text("x") },
        NewMessage { tags: Some(serde_json::json!("a")), ..text("x") },
    ]
}

pub(crate) async fn values_that_can_not_be_are_refused(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    for message in impossible(&bench) {
        let refused = bench.store.insert(std::slice::from_ref(&message), bench.now()).await;
        let Err(StoreError::Refused(sentence)) = refused else {
            panic!("{refused:?} for {:.300}", format!("{message:?}"))
        };
        assert!(!sentence.is_empty());
    }
    let longest = NewMessage {
        recipient: "ü".repeat(1024),
        content: "c".repeat(1 << 20),
        idempotency_key: Some("k".repeat(255)),
        ..text("")
    };
    let id = bench.insert(&[longest, NewMessage { content: String::new(), ..text("") }]).await[0];
    assert_eq!(bench.message(id).await.content.len(), 1 << 20);
}

pub(crate) async fn an_idempotency_key_is_used_once(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    let keyed = NewMessage { idempotency_key: Some("k1".to_owned()), ..text("x") };
    let id = bench.insert(std::slice::from_ref(&keyed)).await[0];
    bench.pass(1);
    let other = NewMessage { content: "y".to_owned(), ..keyed.clone() };
    let new_key = NewMessage { idempotency_key: Some("k2".to_owned()), ..keyed.clone() };
    let inserted = bench.store.insert(&[keyed, other, new_key], bench.now()).await.unwrap();
    assert_eq!(inserted[..2], [Inserted::Existing(id), Inserted::Conflict(id)]);
    let second = new_id(&inserted[2]);
    assert_eq!(super::ids(&bench.claim_fresh().await), [id, second]);
}

pub(crate) async fn idempotency_keys_are_checked_within_a_batch(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    let keyed = NewMessage { idempotency_key: Some("k".to_owned()), ..text("x") };
    let other = NewMessage { recipient: "another".to_owned(), ..keyed.clone() };
    let batch = [text("a"), keyed.clone(), keyed, other, text("b")];
    let inserted = bench.store.insert(&batch, bench.now()).await.unwrap();
    let first = new_id(&inserted[1]);
    assert_eq!(inserted[2..4], [Inserted::Existing(first), Inserted::Conflict(first)]);
    assert_eq!(super::ids(&bench.claim_fresh().await), [new_id(&inserted[0]), first, new_id(&inserted[4])]);
}

pub(crate) async fn one_conflict_keeps_a_whole_batch_out(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    let keyed = NewMessage { idempotency_key: Some("k".to_owned()), ..text("x") };
    let id = bench.insert(std::slice::from_ref(&keyed)).await[0];
    let other = NewMessage { content: "y".to_owned(), ..keyed.clone() };
    let within = NewMessage { idempotency_key: Some("l".to_owned()), ..text("x") };
    let without = NewMessage { content: "y".to_owned(), ..within.clone() };
    let batch = [text("a"), other, within.clone(), without, keyed.clone()];
    let kept_out = bench.store.insert_whole(&batch, bench.now()).await.unwrap();
    assert_eq!(kept_out, AllOrNone::Conflicts(vec![1, 3]));
    // Nothing of it is stored, and its keys are free.
    assert_eq!(super::ids(&bench.claim_fresh().await), [id]);
    let stored = bench.store.insert_whole(&[keyed, within.clone(), within], bench.now()).await.unwrap();
    let AllOrNone::Stored(inserted) = stored else { panic!("{stored:?}") };
    let new = new_id(&inserted[1]);
    assert_eq!((&inserted[0], &inserted[2]), (&Inserted::Existing(id), &Inserted::Existing(new)));
    assert_eq!(super::ids(&bench.claim_fresh().await), [new]);
}

pub(crate) async fn inserts_are_numbered_in_order(store: Arc<dyn Store>) {
    let bench = Bench::new(store).await;
    let mut all = bench.fill(20).await;
    all.extend(bench.fill(20).await);
    assert!(all.is_sorted(), "{all:?}");
    let last = bench.message(all[39]).await;
    assert_eq!(last.content, "text 19");
}
