//! Against a real server.

mod feed;
mod plans;
mod restored;

use std::sync::Arc;

use super::*;
use crate::message::Status;
use crate::message::{Class, Verdict};
use crate::store::conformance::{newer, store_conformance};
use crate::store::{Due, LeaseId, Mask, Record, Urgency, Wanted};

#[expect(clippy::disallowed_methods, reason = "tests are told by the environment where PostgreSQL is")]
fn server() -> String {
    std::env::var("DATABASE_URL")
        .expect("DATABASE_URL is set by `make test`, or by `eval \"$(dev/services env)\"`")
}

async fn scratch() -> Scratch {
    Scratch::create(&server(), &format!("test_{:016x}", fastrand::u64(..))).await.unwrap()
}

fn open(url: &str) -> PostgresStore {
    PostgresStore::open(&PostgresOptions::parse(url).unwrap()).unwrap()
}

async fn make() -> Arc<dyn Store> {
    let store = open(scratch().await.url());
    store.migrate().await.unwrap();
    Arc::new(store)
}

store_conformance!(make);

async fn client(url: &str) -> tokio_postgres::Client {
    let (client, connection) = tokio_postgres::connect(url, tokio_postgres::NoTls).await.unwrap();
    tokio::spawn(connection);
    client
}

#[tokio::test]
async fn two_processes_may_migrate_at_once() {
    let scratch = scratch().await;
    let (one, other) = (open(scratch.url()), open(scratch.url()));
    let (first, second) = tokio::join!(one.migrate(), other.migrate());
    let applied = "select count(*) from refinery_schema_history";
    let applied: i64 = client(scratch.url()).await.query_one(applied, &[]).await.unwrap().get(0);
    assert_eq!((first.unwrap().len() + second.unwrap().len()) as i64, applied, "each once");
    assert_eq!(one.missing_migrations().await.unwrap(), Vec::<String>::new());
}

#[tokio::test]
async fn a_newer_store_is_worked_on_as_long_as_it_needs_nothing_unknown() {
    let scratch = scratch().await;
    let store = open(scratch.url());
    store.migrate().await.unwrap();
    let db = client(scratch.url()).await;
    newer::migrated_by_a_newer_program(&store, async |sql| db.batch_execute(&sql).await.unwrap()).await;
}

#[tokio::test]
async fn words_of_a_newer_program_are_shown_and_left_alone() {
    let scratch = scratch().await;
    let store = open(scratch.url());
    store.migrate().await.unwrap();
    let db = client(scratch.url()).await;
    db.batch_execute(
        "alter type message_state add value 'parked'; alter table waiting drop constraint waiting_held_known",
    )
    .await
    .unwrap();
    newer::words_of_a_newer_program(Arc::new(store), async |sql| db.batch_execute(&sql).await.unwrap()).await;
}

#[tokio::test]
async fn a_writer_may_insert_and_nothing_else() {
    let scratch = scratch().await;
    open(scratch.url()).migrate().await.unwrap();
    let writer = client(scratch.url()).await;
    writer.batch_execute("set role ams_writer").await.unwrap();
    let insert = "insert into messages (recipient, content, idempotency_key) values ('+90', 'Hello', 'k')";
    writer.execute(insert, &[]).await.unwrap();
    let again = writer.execute(insert, &[]).await.unwrap_err();
    assert!(again.as_db_error().unwrap().message().contains("idempotency_key was used before"), "{again}");
    for forbidden in [
        "insert into messages (recipient, content, created_at) values ('+90', 'Hello', now())",
        "insert into messages (recipient, content, tx) values ('+90', 'Hello', pg_current_xact_id())",
        "select * from message_status",
        "insert into deliveries (message_id, endpoint_id, status, attempts, lane, finished_at) \
         values (1, 1, 'cancelled', 0, '', now())",
        "select * from messages",
        "update messages set content = ''",
        "delete from messages",
        "select * from endpoints",
        "select make_partitions()",
    ] {
        let error = writer.execute(forbidden, &[]).await.unwrap_err();
        assert_eq!(error.code(), Some(&SqlState::INSUFFICIENT_PRIVILEGE), "{forbidden}");
    }
}

#[tokio::test]
async fn even_an_owner_can_not_insert_what_is_ours() {
    let scratch = scratch().await;
    open(scratch.url()).migrate().await.unwrap();
    let owner = client(scratch.url()).await;
    for (column, value) in [
        ("tx", "'1'"),
        ("tx", "'9223372036854775807'"),
        ("tx", "null"),
        ("id", "4711"),
        ("id", "9223372036854775807"),
        ("id", "nextval('message_ids') - 1"),
        ("id", "null"),
    ] {
        let insert =
            format!("insert into messages (recipient, content, {column}) values ('+90', 'Hello', {value})");
        let error = owner.execute(&insert, &[]).await.unwrap_err();
        let sentence = error.as_db_error().unwrap().message().to_owned();
        assert_eq!(sentence, format!("{column} is set by AMS; insert without it"));
    }
    // What becomes of a message stands elsewhere.
    for column in ["status", "held", "due_at", "attempts"] {
        let insert = format!("insert into messages (recipient, content, {column}) values ('+90', 'x', null)");
        let error = owner.execute(&insert, &[]).await.unwrap_err();
        assert_eq!(error.code(), Some(&SqlState::UNDEFINED_COLUMN), "{column}");
    }
}

/// Everybody asks at once and nobody lets go; a heartbeat goes on.
#[tokio::test]
async fn readers_keep_no_connection_from_heartbeats_and_work() {
    let scratch = scratch().await;
    let store = ready(scratch.url()).await;
    let now = crate::clock::Clock::system().now();
    let owner = store.enroll("up", "here", now, now.after(Duration::from_secs(60))).await.unwrap();
    let mut taken = Vec::new();
    for _ in 0..READS {
        taken.push(connection(&store.reads).await.unwrap());
    }
    let asking = store.overview(now);
    tokio::pin!(asking);
    assert!(futures_util::poll!(&mut asking).is_pending(), "it waits for a connection");
    assert!(store.renew(owner, now, now.after(Duration::from_secs(60))).await.unwrap());
    assert_eq!(claim(&store, Urgency::Normal, 10).await.seen, 0);
    drop(taken);
    asking.await.unwrap();
}

const INSERT: &str = "insert into messages (recipient, content) values ('+90', 'Hello')";

/// Claims at most `limit` new messages of a class into a batch of a process that lives.
async fn claim(store: &PostgresStore, urgency: Urgency, limit: usize) -> Claimed {
    let (now, batch) = (crate::clock::Clock::system().now(), BatchId::random());
    let (due, lane) = (Due::New(urgency), "messages");
    let claim = Claim { due, limit, lane, batch, saturated: &[], owner: InstanceId(1), now };
    store.claim(&claim).await.unwrap()
}

/// A migrated store with an open endpoint of the usual name.
async fn ready(url: &str) -> PostgresStore {
    let store = open(url);
    store.migrate().await.unwrap();
    store.put_endpoint(&Endpoint::new("default", "http://localhost:3000")).await.unwrap();
    store
}

/// Claims, begins and records everything that is new, and says how many messages are sent then.
async fn deliver_all(store: &PostgresStore, db: &tokio_postgres::Client) -> i64 {
    let now = crate::clock::Clock::system().now();
    let owner = store.enroll("up", "here", now, now.after(Duration::from_secs(60))).await.unwrap();
    let tickets = claim(store, Urgency::Normal, 1_000).await.tickets;
    let (lease, batch) = (LeaseId::random(), tickets[0].batch);
    let wanted = [Wanted { lease, batch, positions: Mask::first(tickets.len()) }];
    let begun = store.begin(&Begin { wanted: &wanted, repeated: false, owner }).await.unwrap();
    assert_eq!(begun[0].positions.count(), tickets.len());
    let outcome = crate::store::conformance::outcome(Class::Accepted, Some(200), now);
    let record = |ticket: Ticket| Record {
        ticket: ticket.into(),
        lane: "messages".into(),
        lease,
        root: batch,
        outcome: Some(outcome.clone().into()),
        verdict: Verdict::Sent,
        judged_at: now,
    };
    let records: Vec<_> = tickets.into_iter().map(record).collect();
    store.record(&Records { records: &records, now }).await.unwrap();
    let sent =
        "select count(*) from messages m join deliveries d on d.message_id = m.id where d.status = 'sent'";
    db.query_one(sent, &[]).await.unwrap().get(0)
}

#[tokio::test]
async fn the_urls_own_options_count_and_ours_win() {
    let scratch = scratch().await;
    client(scratch.url()).await.batch_execute("create schema app").await.unwrap();
    let url = format!("{}?options=-c%20search_path%3Dapp%20-c%20jit%3Don", scratch.url());
    let store = ready(&url).await;
    let db = client(&url).await;
    db.execute(INSERT, &[]).await.unwrap();
    assert_eq!(deliver_all(&store, &db).await, 1);
    let tables = "select count(*) filter (where schemaname = 'app'), count(*) filter (where schemaname = 'public') \
                  from pg_tables where tablename in ('messages', 'deliveries', 'batches', 'refinery_schema_history')";
    let tables = db.query_one(tables, &[]).await.unwrap();
    assert_eq!((tables.get(0), tables.get(1)), (4_i64, 0_i64), "all of it is in the schema that was named");
    let jit: String = store.pool.get().await.unwrap().query_one("show jit", &[]).await.unwrap().get(0);
    assert_eq!(jit, "off");
}

#[tokio::test]
async fn partitions_are_made_ahead_while_a_writer_holds_a_transaction_open() {
    let scratch = scratch().await;
    let store = open(scratch.url());
    store.migrate().await.unwrap();
    let mut writer = client(scratch.url()).await;
    let open = writer.transaction().await.unwrap();
    open.execute(INSERT, &[]).await.unwrap();
    let other = client(scratch.url()).await;
    other.batch_execute("select setval('message_ids', 17000000)").await.unwrap();
    let made = tokio::time::timeout(Duration::from_secs(10), store.make_partitions()).await;
    made.expect("making partitions waits for nobody who writes").unwrap();
    open.commit().await.unwrap();
    other.batch_execute("select setval('message_ids', 33000000)").await.unwrap();
    other.execute(INSERT, &[]).await.unwrap();
    let place = "select tableoid::regclass::text from messages order by id desc limit 1";
    assert_eq!(other.query_one(place, &[]).await.unwrap().get::<_, &str>(0), "messages_6");
    let made = "select relname::text from pg_class where relname ~ '_[0-9]+$' and relkind = 'r' order by 1";
    let made = other.query(made, &[]).await.unwrap();
    let made: Vec<&str> = made.iter().map(|row| row.get(0)).collect();
    let wanted =
        ["attempts", "deliveries", "messages"].map(|table| (0..=6).map(move |i| format!("{table}_{i}")));
    assert_eq!(made, wanted.into_iter().flatten().collect::<Vec<_>>());
}

/// A sequence that was moved ahead, a statement that runs past the last partition, and no producer for hours.
#[tokio::test]
async fn an_insert_always_finds_a_partition() {
    let scratch = scratch().await;
    let store = ready(scratch.url()).await;
    let db = client(scratch.url()).await;
    db.batch_execute("select setval('message_ids', 19999950)").await.unwrap();
    let many = "insert into messages (recipient, content) select '+90', 'Hello' from generate_series(1, 100)";
    assert_eq!(db.execute(many, &[]).await.unwrap(), 100);
    store.make_partitions().await.unwrap();
    // Its partition would begin among rows that the default one has, so the next one is made.
    db.batch_execute("select setval('message_ids', 25000005)").await.unwrap();
    store.make_partitions().await.unwrap();
    db.execute(INSERT, &[]).await.unwrap();
    for moved in [10_000_000_000_000_i64, i64::MAX - 10] {
        db.execute("select setval('message_ids', $1)", &[&moved]).await.unwrap();
        db.execute(INSERT, &[]).await.unwrap();
        store.make_partitions().await.unwrap();
        db.execute(INSERT, &[]).await.unwrap();
    }
    let places = "select tableoid::regclass::text, count(*) from messages group by 1 order by min(id)";
    let places = db.query(places, &[]).await.unwrap();
    let places: Vec<(&str, i64)> = places.iter().map(|row| (row.get(0), row.get(1))).collect();
    assert_eq!(places, [("messages_3", 49), ("messages_default", 55), ("messages_5", 1)]);
    assert_eq!(deliver_all(&store, &db).await, 105);
}

#[tokio::test]
async fn making_partitions_gives_way_to_a_reader_who_takes_hours() {
    let scratch = scratch().await;
    let store = ready(scratch.url()).await;
    let mut reader = client(scratch.url()).await;
    let backup = reader.transaction().await.unwrap();
    backup.batch_execute("lock table messages in access share mode").await.unwrap();
    let db = client(scratch.url()).await;
    db.batch_execute("select setval('message_ids', 6000000)").await.unwrap();
    let refused = store.make_partitions().await;
    assert!(matches!(refused, Err(StoreError::Unavailable(_))), "{refused:?}");
    db.execute(INSERT, &[]).await.unwrap();
    assert_eq!(deliver_all(&store, &db).await, 1, "meanwhile all goes on");
    backup.commit().await.unwrap();
    store.make_partitions().await.unwrap();
}

#[tokio::test]
async fn a_database_in_which_a_text_need_not_be_readable_is_refused() {
    let scratch = scratch().await;
    let db = client(scratch.url()).await;
    let name = format!("ascii_{:016x}", fastrand::u64(..));
    let create = "encoding 'SQL_ASCII' template template0 lc_collate 'C' lc_ctype 'C'";
    db.batch_execute(&format!("create database {name} {create}")).await.unwrap();
    let mut url = url::Url::parse(scratch.url()).unwrap();
    url.set_path(&name);
    let store = open(url.as_str());
    for refused in [store.migrate().await.map(drop), store.schema_version().await.map(drop)] {
        let Err(StoreError::Unsupported(sentence)) = refused else { panic!("{refused:?}") };
        assert!(sentence.contains("SQL_ASCII") && sentence.contains("createdb -E UTF8"), "{sentence}");
    }
    drop(store);
    db.batch_execute(&format!("drop database {name} with (force)")).await.unwrap();
}

/// As a damaged page is, this row can't be given by the server: the database has been made to believe that any
/// bytes are a text.
#[tokio::test]
async fn a_row_that_the_server_can_not_give_ends_alone() {
    let scratch = scratch().await;
    ready(scratch.url()).await;
    let db = client(scratch.url()).await;
    db.batch_execute("update pg_database set encoding = 0 where datname = current_database()").await.unwrap();
    let careless = client(scratch.url()).await;
    careless
        .batch_execute(
            "set client_encoding = 'SQL_ASCII'; \
             insert into messages (recipient, content) select '+90', case n when 70 then e'm\\xfcller' else 'x' end \
             from generate_series(1, 100) n; \
             insert into messages (recipient, content, send_at) values (e'\\xff', 'x', '2100-01-01'), ('+90', 'x', '2100-01-01')",
        )
        .await
        .unwrap();
    let store = open(scratch.url());
    let now = crate::clock::Clock::system().now();
    let later = Timestamp::parse("2100-01-02T00:00:00Z").unwrap();
    let (mut claimed, mut unreadable) = (0, Vec::new());
    for (due, now) in [(Due::New(Urgency::Normal), now), (Due::Timed { lane: "", by: later }, later)] {
        for _ in 0..20 {
            let (lane, batch, owner) = ("messages", BatchId::random(), InstanceId(1));
            let claim = Claim { due, limit: 1_000, lane, batch, saturated: &[], owner, now };
            let taken = store.claim(&claim).await.unwrap();
            claimed += taken.tickets.len();
            unreadable.extend(taken.unreadable);
        }
    }
    assert_eq!((claimed, unreadable), (100, vec![MessageId(70), MessageId(101)]));
    let dead = "select s.id, d.reason from message_status s join deliveries d on d.message_id = s.id \
                where s.status = 'dead' and s.finished_at is not null order by 1";
    let dead = db.query(dead, &[]).await.unwrap();
    assert_eq!(dead.iter().map(|row| row.get(0)).collect::<Vec<i64>>(), [70, 101]);
    for row in dead {
        let reason: &str = row.get(1);
        assert!(reason.starts_with("the message can't be read: ") && reason.contains("UTF8"), "{reason}");
    }
}

/// What a sender may store can be read back, and what the program can't hold is refused.
#[tokio::test]
async fn what_sql_accepts_the_program_can_hold() {
    let scratch = scratch().await;
    let store = open(scratch.url());
    store.migrate().await.unwrap();
    let db = client(scratch.url()).await;
    let deep = format!("{}{}", "[".repeat(300), "]".repeat(300));
    let large = format!("1{}", "0".repeat(400));
    let insert = format!(
        "insert into messages (recipient, content, send_at, expires_at, created_at, tags) values \
         ('+90', 'x', '0001-01-01T00:00:00Z', '9999-12-31T23:59:59Z', '9999-12-31T23:59:59.999999Z', \
             '{{\"deep\": {deep}, \"large\": {large}}}')"
    );
    db.batch_execute(&insert).await.unwrap();
    let message = store.message(MessageId(1)).await.unwrap().unwrap();
    assert_eq!(message.expires_at.unwrap().to_string(), "9999-12-31T23:59:59Z");
    assert_eq!((message.send_at, message.created_at), (Some(Timestamp::MIN), Timestamp::MAX));
    assert!(message.tags.unwrap().to_string().contains(&large));
    for (column, value) in [
        ("send_at", "20000-01-01"),
        ("expires_at", "20000-01-01"),
        ("created_at", "20000-01-01"),
        ("created_at", "0001-01-01 BC"),
        ("send_at", "infinity"),
        ("expires_at", "-infinity"),
    ] {
        let insert =
            format!("insert into messages (recipient, content, {column}) values ('+90', 'x', '{value}')");
        let refused = db.batch_execute(&insert).await.unwrap_err();
        assert_eq!(refused.code(), Some(&SqlState::CHECK_VIOLATION), "{column} {value}: {refused}");
    }
}

/// Before the store refused such settings, one endpoint could have stopped the messages of all.
#[tokio::test]
async fn an_endpoint_that_can_not_be_is_refused_and_harms_no_other() {
    let scratch = scratch().await;
    let store = open(scratch.url());
    store.migrate().await.unwrap();
    let db = client(scratch.url()).await;
    for values in [
        "'a', 'http://user:hunter2@host/', '{}'",
        "'a', 'HTTPS://user@host/', '{}'",
        "'a', e'ht\ntp:\\\\u:p@host', '{}'",
        "'a', 'http://host/', '{null}'",
        "'a', 'http://host/', '{70000}'",
        "'a', 'http://host/', '{{410,411},{412,413}}'",
    ] {
        let insert = format!("insert into endpoints (name, url, final_statuses) values ({values})");
        let refused = db.batch_execute(&insert).await.unwrap_err();
        assert_eq!(refused.code(), Some(&SqlState::CHECK_VIOLATION), "{values}: {refused}");
        assert!(!format!("{refused:?}").contains("hunter2"), "{refused}");
    }
    db.batch_execute(
        "insert into endpoints (name, url) values ('good', 'http://host/@?a=@'); \
         alter table endpoints disable trigger endpoints_values; \
         insert into endpoints (name, url, final_statuses) values \
             ('a', 'http://host/', '{null,70000,404}'), ('b', 'http://host/', '{{410,411},{412,413}}')",
    )
    .await
    .unwrap();
    let endpoints = store.endpoints().await.unwrap();
    let read: Vec<_> = endpoints.iter().map(|e| (e.name.as_str(), e.final_statuses.as_slice())).collect();
    assert_eq!(read[..2], [("a", [404].as_slice()), ("b", &[])]);
    assert_eq!(read[2], ("good", [410].as_slice()));
}
