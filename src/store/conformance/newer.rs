//! A store that a newer program has migrated and works on: what this one does with it. A backend's tests
//! say how statements are run beside the store.

use std::sync::Arc;

use super::{Bench, unhold};
use crate::message::{Class, Held, Status};
use crate::store::operate::{Change, Cursor, Filter};
use crate::store::{Due, Store, StoreError, Urgency};

/// What an additive migration does, in words that every backend understands.
pub(crate) const LATER: &str = "alter table messages add column colour text; \
    alter table endpoints add column rate integer not null default 7; \
    alter table lanes add column shade text; alter table instances add column room text; \
    alter table batches add column note text; alter table leases add column note text; \
    alter table leader add column note text; alter table attempts add column size integer; \
    alter table deliveries add column size integer; alter table waiting add column note text; \
    create table colours (name text primary key); \
    insert into refinery_schema_history (version, name, applied_on, checksum) \
    select max(version) + 1, 'later', '', '1' from refinery_schema_history";

/// What a migration does that programs before it can't work with.
pub(crate) const NEEDED: &str =
    "update installation set needs_migration = (select max(version) from refinery_schema_history)";

pub(crate) async fn migrated_by_a_newer_program(store: &dyn Store, sql: impl AsyncFn(String)) {
    sql(LATER.to_owned()).await;
    let version = store.schema_version().await.unwrap();
    assert_eq!((version.missing, version.newer.len()), (Vec::new(), 1));
    let (number, name) = version.newer[0].split_once("__").unwrap();
    assert_eq!(name, "later");
    assert_eq!(store.migrate().await.unwrap(), Vec::<String>::new());
    sql(NEEDED.to_owned()).await;
    for refused in [store.schema_version().await.map(drop), store.migrate().await.map(drop)] {
        let Err(StoreError::Unsupported(sentence)) = refused else { panic!("{refused:?}") };
        let parts = [format!("{number}__later"), format!("knows {number}; use a newer")];
        assert!(parts.iter().all(|part| sentence.contains(part)), "{sentence}");
    }
}

pub(crate) async fn words_of_a_newer_program(store: Arc<dyn Store>, sql: impl AsyncFn(String)) {
    let bench = Bench::new(store).await;
    // One that was tried, one with a status, one held for a reason that this program does not know.
    let deliveries = bench.processing(2).await;
    bench.record(&[bench.failed(&deliveries[0]), bench.dead(&deliveries[1])]).await;
    let (tried, parked) = (deliveries[0].id(), deliveries[1].id());
    let held = bench.fill(1).await[0];
    let saturated = &["default".to_owned()];
    bench.claim_beside(bench.owner, Due::New(Urgency::Normal), 10, saturated).await;
    let known = bench.fill(1).await[0];
    sql(format!("update attempts set class = 'throttled' where message_id = {tried}")).await;
    sql(format!("update deliveries set status = 'parked' where message_id = {parked}")).await;
    sql(format!("update waiting set held = 'quiet_hours' where message_id = {held}")).await;

    let all = [tried, parked, held, known];
    let read = bench.store.messages(&all).await.unwrap();
    let shown: Vec<_> = read.iter().map(|message| (message.id, message.status, message.held)).collect();
    let expected = [
        (tried, Status::Retrying, None),
        (parked, Status::Unknown, None),
        (held, Status::Pending, Some(Held::Unknown)),
        (known, Status::Pending, None),
    ];
    assert_eq!(shown, expected);
    assert_eq!(bench.store.attempts(tried).await.unwrap()[0].class, Class::Unknown);
    let every = Filter::default();
    assert_eq!(bench.store.search(&every, Cursor::start(&every), 10).await.unwrap().ids.len(), 4);
    let overview = bench.store.overview(bench.now()).await.unwrap();
    let pending = overview.counts.iter().find(|count| count.status == Status::Pending).unwrap();
    assert_eq!((pending.count, overview.counts.len()), (2, Status::ALL.len()));

    // Services pass them by and do the rest.
    bench.pass(3_600);
    assert_eq!(super::ids(&bench.claim_fresh().await), [known]);
    assert_eq!(bench.claim_timed("").await.seen, 0);
    assert!(bench.store.held().await.unwrap().is_empty());
    for reason in [Held::EndpointBusy, Held::EndpointRate, Held::EndpointDisabled] {
        assert_eq!(unhold(&*bench.store, "default", reason, 10, bench.now()).await, 0);
    }
    bench.recover().await;
    for change in [Change::Cancel, Change::Redrive] {
        assert!(bench.store.change(change, &[parked], bench.now()).await.unwrap().is_empty());
    }
    assert_eq!(bench.message(parked).await.status, Status::Unknown);
}
