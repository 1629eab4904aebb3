//! A store that a newer program has migrated and works on: what this one does with it. A backend's tests
//! say how statements are run beside the store.

use std::sync::Arc;

use super::{Bench, pairs};
use crate::message::{Class, Held, Status};
use crate::store::operate::{Change, Cursor, Filter};
use crate::store::{Store, StoreError};

/// What an additive migration does, in words that every backend understands.
pub(crate) const LATER: &str = "alter table messages add column colour text; \
    alter table endpoints add column rate integer not null default 7; \
    alter table lanes add column shade text; alter table instances add column room text; \
    alter table batches add column note text; alter table leases add column note text; \
    alter table leader add column note text; alter table attempts add column size integer; \
    create table colours (name text primary key); \
    insert into refinery_schema_history (version, name, applied_on, checksum) \
    select max(version) + 1, 'later', '', '1' from refinery_schema_history";

/// What a migration does that programs before it can't work with.
pub(crate) const NEEDED: &str =
    "update installation set needs_migration = (select max(version) from refinery_schema_history)";

pub(crate) async fn migrated_by_a_newer_program(store: &dyn Store, sql: impl AsyncFn(String)) {
    sql(LATER.to_owned()).await;
    let standing = store.standing().await.unwrap();
    assert_eq!((standing.missing, standing.newer.len()), (Vec::new(), 1));
    let (number, name) = standing.newer[0].split_once("__").unwrap();
    assert_eq!(name, "later");
    assert_eq!(store.migrate().await.unwrap(), Vec::<String>::new());
    sql(NEEDED.to_owned()).await;
    for refused in [store.standing().await.map(drop), store.migrate().await.map(drop)] {
        let Err(StoreError::Unsupported(sentence)) = refused else { panic!("{refused:?}") };
        let parts = [format!("{number}__later"), format!("knows {number}; use a newer")];
        assert!(parts.iter().all(|part| sentence.contains(part)), "{sentence}");
    }
}

pub(crate) async fn words_of_a_newer_program(store: Arc<dyn Store>, sql: impl AsyncFn(String)) {
    let bench = Bench::new(store).await;
    // One that was tried, one with a status, one held for a reason that this program does not know.
    let tried = bench.processing(1, 1).await[0];
    bench.record(&[bench.failed(tried, 1)]).await;
    let others = bench.fill(3).await;
    let (parked, held, known) = (others[0], others[1], others[2]);
    sql(format!("update attempts set class = 'throttled' where message_id = {}", tried.0)).await;
    sql(format!("update messages set status = 'parked' where id = {parked}")).await;
    sql(format!("update messages set held = 'quiet_hours' where id = {held}")).await;

    let all = [tried.0, parked, held, known];
    let read = bench.store.messages(&all).await.unwrap();
    let shown: Vec<_> = read.iter().map(|message| (message.id, message.status, message.held)).collect();
    let expected = [
        (tried.0, Status::Retrying, None),
        (parked, Status::Unknown, None),
        (held, Status::Pending, Some(Held::Unknown)),
        (known, Status::Pending, None),
    ];
    assert_eq!(shown, expected);
    assert_eq!(bench.store.attempts(tried.0).await.unwrap()[0].class, Class::Unknown);
    let every = Filter::default();
    assert_eq!(bench.store.search(&every, Cursor::start(&every), 10).await.unwrap().ids.len(), 4);
    let overview = bench.store.overview(bench.now()).await.unwrap();
    let pending = overview.counts.iter().find(|count| count.status == Status::Pending).unwrap();
    assert_eq!((pending.count, overview.counts.len()), (2, Status::ALL.len()));

    // Services pass them by and do the rest.
    bench.pass(3_600);
    assert_eq!(pairs(&bench.claim_fresh().await), [(known, 1)]);
    assert!(bench.store.held().await.unwrap().is_empty());
    for reason in [Held::EndpointBusy, Held::EndpointClosed] {
        assert_eq!(bench.store.unhold("default", reason, 10, bench.now()).await.unwrap(), 0);
    }
    bench.recover().await;
    for change in [Change::Cancel, Change::Redrive] {
        assert!(bench.store.change(change, &[parked], bench.now()).await.unwrap().is_empty());
    }
    assert_eq!(bench.message(parked).await.status, Status::Unknown);
}
