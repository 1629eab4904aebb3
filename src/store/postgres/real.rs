//! Against a real server.

use std::sync::Arc;

use super::*;
use crate::message::{Class, Verdict};
use crate::store::conformance::{newer, store_conformance};
use crate::store::operate::WALK;

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
        "alter type message_state add value 'parked'; alter table messages drop constraint messages_held_known",
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
        "insert into messages (recipient, content, status) values ('+90', 'Hello', 'sent')",
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
        ("status", "'sent'"),
        ("epoch", "3"),
        ("held", "'endpoint_busy'"),
        ("due_at", "now()"),
        ("id", "4711"),
        ("id", "9223372036854775807"),
        ("id", "nextval('message_ids') - 1"),
    ] {
        let insert =
            format!("insert into messages (recipient, content, {column}) values ('+90', 'Hello', {value})");
        let error = owner.execute(&insert, &[]).await.unwrap_err();
        let sentence = error.as_db_error().unwrap().message().to_owned();
        assert_eq!(sentence, format!("{column} is set by AMS; insert without it"));
    }
}

const INSERT: &str = "insert into messages (recipient, content) values ('+90', 'Hello')";

/// Claims, begins and records everything that is new, and says how many messages are sent then.
async fn deliver_all(store: &PostgresStore, db: &tokio_postgres::Client) -> i64 {
    let now = crate::clock::Clock::system().now();
    let owner = store.enroll("up", "here", now, now.after(Duration::from_secs(60))).await.unwrap();
    let (open, lane) = (["default".to_owned()], "messages");
    let (due, limit) = (Due::after(MessageId(0)), 1_000);
    let claim = Claim { due, limit, lane, open: &open, busy: &[], pass_busy: false, owner, now };
    let tickets = store.claim(&claim).await.unwrap().tickets;
    let pairs: Vec<_> = tickets.iter().map(|ticket| (ticket.id, ticket.epoch)).collect();
    let begin = Begin { lease: LeaseId(1), repeated: false, tickets: &pairs, owner, now };
    assert_eq!(store.begin(&begin).await.unwrap().messages.len(), pairs.len());
    let outcome = crate::store::conformance::outcome(Class::Accepted, Some(200), now);
    let record = |(id, epoch): &(MessageId, Epoch)| Record {
        id: *id,
        epoch: *epoch,
        attempt: 1,
        lane: lane.to_owned(),
        outcome: Some(outcome.clone()),
        verdict: Verdict::Sent,
    };
    let records: Vec<_> = pairs.iter().map(record).collect();
    store.record(&Records { records: &records, finished: &[LeaseId(1)], now }).await.unwrap();
    let sent =
        "select count(*) from messages m join attempts a on a.message_id = m.id where m.status = 'sent'";
    db.query_one(sent, &[]).await.unwrap().get(0)
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
    other.batch_execute("select setval('message_ids', 1700000)").await.unwrap();
    let made = tokio::time::timeout(Duration::from_secs(10), store.make_partitions()).await;
    made.expect("making partitions waits for nobody who writes").unwrap();
    open.commit().await.unwrap();
    other.batch_execute("select setval('message_ids', 3600000)").await.unwrap();
    other.execute(INSERT, &[]).await.unwrap();
    let place = "select tableoid::regclass::text from messages order by id desc limit 1";
    assert_eq!(other.query_one(place, &[]).await.unwrap().get::<_, &str>(0), "messages_7");
}

/// A sequence that was moved ahead, a statement that runs past the last partition, and no producer for hours.
#[tokio::test]
async fn an_insert_always_finds_a_partition() {
    let scratch = scratch().await;
    let store = open(scratch.url());
    store.migrate().await.unwrap();
    let db = client(scratch.url()).await;
    db.batch_execute("select setval('message_ids', 2499950)").await.unwrap();
    let many = "insert into messages (recipient, content) select '+90', 'Hello' from generate_series(1, 100)";
    assert_eq!(db.execute(many, &[]).await.unwrap(), 100);
    store.make_partitions().await.unwrap();
    // Its partition would begin among rows that the default one has, so the next one is made.
    db.batch_execute("select setval('message_ids', 3000005)").await.unwrap();
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
    assert_eq!(places, [("messages_4", 49), ("messages_default", 55), ("messages_6", 1)]);
    assert_eq!(deliver_all(&store, &db).await, 105);
}

#[tokio::test]
async fn making_partitions_gives_way_to_a_reader_who_takes_hours() {
    let scratch = scratch().await;
    let store = open(scratch.url());
    store.migrate().await.unwrap();
    let mut reader = client(scratch.url()).await;
    let backup = reader.transaction().await.unwrap();
    backup.batch_execute("lock table messages in access share mode").await.unwrap();
    let db = client(scratch.url()).await;
    db.batch_execute("select setval('message_ids', 600000)").await.unwrap();
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
    for refused in [store.migrate().await.map(drop), store.standing().await.map(drop)] {
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
    open(scratch.url()).migrate().await.unwrap();
    let db = client(scratch.url()).await;
    db.batch_execute("update pg_database set encoding = 0 where datname = current_database()").await.unwrap();
    let careless = client(scratch.url()).await;
    careless
        .batch_execute(
            "set client_encoding = 'SQL_ASCII'; \
             insert into messages (recipient, content) select '+90', case n when 70 then e'm\\xfcller' else 'x' end \
             from generate_series(1, 100) n; \
             insert into messages (recipient, content, send_at) values (e'\\xff', 'x', '2020-01-01'), ('+90', 'x', '2020-01-01')",
        )
        .await
        .unwrap();
    let store = open(scratch.url());
    let now = crate::clock::Clock::system().now();
    let open = ["default".to_owned()];
    let (mut claimed, mut unreadable) = (0, Vec::new());
    for due in [Due::after(MessageId(0)), Due::Timed { lane: "", by: now }] {
        for _ in 0..20 {
            let claim = Claim {
                due,
                limit: 1_000,
                lane: "messages",
                open: &open,
                busy: &[],
                pass_busy: false,
                owner: InstanceId(1),
                now,
            };
            let taken = store.claim(&claim).await.unwrap();
            claimed += taken.tickets.len();
            unreadable.extend(taken.unreadable);
        }
    }
    assert_eq!((claimed, unreadable), (100, vec![MessageId(70), MessageId(101)]));
    let dead = "select reason from messages where status = 'dead' and finished_at is not null";
    for row in db.query(dead, &[]).await.unwrap() {
        let reason: &str = row.get(0);
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

/// Pages that a statement touches, by its plan. None of its joins may compare each row with each.
async fn pages(db: &tokio_postgres::Client, statement: &str) -> i64 {
    let explained =
        db.query(&format!("explain (analyze, buffers, format json) {statement}"), &[]).await.unwrap();
    let plan: serde_json::Value = explained[0].get(0);
    let compared = compared(&plan[0]["Plan"]);
    assert!(compared <= 1_000, "a join threw away {compared} pairs of rows: {plan:#}");
    let at = |name: &str| plan[0]["Plan"][name].as_i64().unwrap();
    at("Shared Hit Blocks") + at("Shared Read Blocks")
}

/// The pairs of rows that the joins of a plan compared in vain.
fn compared(plan: &serde_json::Value) -> i64 {
    let loops = plan["Actual Loops"].as_i64().unwrap_or(1);
    let own = plan["Rows Removed by Join Filter"].as_i64().unwrap_or(0) * loops;
    own + plan["Plans"].as_array().into_iter().flatten().map(compared).sum::<i64>()
}

/// Plans are kept; one that is made while a partition is empty must be right when it is full.
#[tokio::test]
async fn plans_made_on_empty_partitions_use_the_indexes() {
    let scratch = scratch().await;
    let store = open(scratch.url());
    store.migrate().await.unwrap();
    let options = PostgresOptions::parse(scratch.url()).unwrap();
    let (db, connection) = options.config.connect(tokio_postgres::NoTls).await.unwrap();
    tokio::spawn(connection);
    db.batch_execute("analyze").await.unwrap();
    let claim = "bigint, bigint, timestamptz, text[], text, bigint, text[], bigint, text[]";
    let timed = "text, bigint, timestamptz, text[], text, bigint, text[], timestamptz";
    let begin = "bigint[], int, bigint, bigint, timestamptz, bigint, bigint";
    let retry = "bigint[], int[], text[], int[], timestamptz[], text[], bigint, bigint";
    for (name, kinds, values, text) in [
        ("new", claim, "0, 1000, now(), '{default}', 'messages', 1, '{}', 9, '{}'", claim::NEW),
        (
            "timed",
            timed,
            "'messages-retry', 1000, now(), '{default}', 'messages-retry', 1, '{}', now()",
            claim::TIMED,
        ),
        ("due_new", "", "", claim::DUE_NEW),
        ("due", "text[], timestamptz", "'{messages-retry}', now()", claim::DUE),
        ("begin", begin, "'{1,2}', 1, 1, 2, now(), 1, 1", begin::BEGIN),
        ("retry", retry, "'{1}', '{1}', '{messages}', '{0}', '{2030-01-01}', '{x}', 1, 2", record::RETRY),
    ] {
        let listed = |list: &str| if list.is_empty() { String::new() } else { format!("({list})") };
        db.batch_execute(&format!("prepare {name} {} as {text}", listed(kinds))).await.unwrap();
        let plan = db.query(&format!("explain execute {name} {}", listed(values)), &[]).await.unwrap();
        let plan: Vec<String> = plan.iter().map(|row| row.get(0)).collect();
        assert!(!plan.iter().any(|line| line.contains("Seq Scan on messages")), "{name}: {plan:#?}");
    }
}

/// A plan made while a partition is empty expects one row. Its batches must not read what lies between their
/// rows: these are far apart, as retries of old and new messages are.
#[tokio::test]
async fn plans_made_on_empty_partitions_read_only_the_rows_of_a_batch() {
    let scratch = scratch().await;
    let store = open(scratch.url());
    store.migrate().await.unwrap();
    let db = client(scratch.url()).await;
    // Every hundredth of 100,000.
    let each = |value: &str| format!("(select array_agg({value}) from generate_series(100, 100000, 100) i)");
    let literal = async |value: &str, kind: &str| -> String {
        let text: String = db.query_one(&format!("select {}::text", each(value)), &[]).await.unwrap().get(0);
        format!("'{text}'::{kind}")
    };
    let (ids, reasons) = (literal("i", "bigint[]").await, literal("'x'::text", "text[]").await);
    let (lanes, zeros) = (literal("'retry'::text", "text[]").await, literal("0", "int[]").await);
    let (times, statuses) = (literal("now()", "timestamptz[]").await, literal("500", "smallint[]").await);
    let epochs = [literal("1", "int[]").await, literal("2", "int[]").await, literal("3", "int[]").await];
    let begin = |epoch: usize| format!("execute begin ({ids}, {epoch}, 100, 100000, now(), {epoch}, 1)");
    let timed = "execute timed ('retry', 1000, now(), '{default}', 'retry', 1, '{}', now())".to_owned();
    let [first, second, third] = &epochs;
    let steps = [
        ("claim", timed.clone()),
        ("begin", begin(1)),
        (
            "retry",
            format!("execute retry ({ids}, {first}, {lanes}, {zeros}, {times}, {reasons}, 100, 100000)"),
        ),
        ("claim", timed.clone()),
        ("begin", begin(2)),
        ("release", format!("execute release ({ids}, {second}, 100, 100000, now())")),
        ("claim", timed),
        ("begin", begin(3)),
        (
            "dead",
            format!(
                "execute dead ({ids}, {third}, {lanes}, {reasons}, {statuses}, {reasons}, 100, 100000, now())"
            ),
        ),
    ];
    db.batch_execute("set plan_cache_mode = force_generic_plan").await.unwrap();
    for (name, kinds, text) in [
        ("timed", "text, bigint, timestamptz, text[], text, bigint, text[], timestamptz", claim::TIMED),
        ("begin", "bigint[], int, bigint, bigint, timestamptz, bigint, bigint", begin::BEGIN),
        ("retry", "bigint[], int[], text[], int[], timestamptz[], text[], bigint, bigint", record::RETRY),
        ("release", "bigint[], int[], bigint, bigint, timestamptz", record::RELEASE),
        (
            "dead",
            "bigint[], int[], text[], text[], smallint[], text[], bigint, bigint, timestamptz",
            record::DEAD,
        ),
    ] {
        db.batch_execute(&format!("prepare {name} ({kinds}) as {text}")).await.unwrap();
    }
    for (_, statement) in &steps {
        db.query(statement, &[]).await.unwrap();
    }
    db.batch_execute(
        "insert into messages (recipient, content) select '+90', 'Hello' from generate_series(1, 100000); \
         update messages set status = 'retrying', lane = 'retry', attempts = 1, due_at = now() - interval '1 s' \
         where id % 100 = 0",
    )
    .await
    .unwrap();
    for (name, statement) in &steps {
        let touched = pages(&db, statement).await;
        assert!(touched < 40_000, "{name} touched {touched} pages");
    }
    let row =
        db.query_one("select count(*), min(epoch) from messages where status = 'dead'", &[]).await.unwrap();
    assert_eq!((row.get::<_, i64>(0), row.get::<_, i32>(1)), (1_000, 3));
}

/// Statistics that say "all messages go to one endpoint" must not let a search for another one read them all.
#[tokio::test]
async fn a_search_reads_few_rows_whatever_the_statistics_say() {
    let scratch = scratch().await;
    let store = open(scratch.url());
    store.migrate().await.unwrap();
    client(scratch.url())
        .await
        .batch_execute(
            "insert into messages (recipient, content) select '+90', 'Hello' from generate_series(1, 30000); \
             update messages set status = 'sent'; update messages set status = 'dead' where id > 1000; \
             insert into attempts select id, 1, 1, now(), 0, 0, 0, 200, '', 'accepted', '', null, null, '' \
             from messages; analyze",
        )
        .await
        .unwrap();
    let at = Some(Timestamp::from_micros(1));
    let filter = Filter::default;
    let text = |text: &str| Some(text.to_owned());
    let mut filters = vec![
        filter(),
        Filter { endpoint: text("default"), ..filter() },
        Filter { endpoint: text("rare"), ..filter() },
        Filter { recipient: text("+90"), ..filter() },
        Filter { recipient: text("+91"), ..filter() },
        Filter { created_after: at, ..filter() },
        Filter { created_before: at, ..filter() },
        Filter { reason: text("status 500"), ..filter() },
        Filter { endpoint: text("rare"), status: Some(Status::Sent), ..filter() },
        Filter { recipient: text("+91"), endpoint: text("rare"), created_after: at, ..filter() },
    ];
    filters.extend(Status::ALL.map(|status| Filter { status: Some(status), ..filter() }));
    let mut db = store.connection().await.unwrap();
    // Counts go on over transactions until the server has published them, so it is asked before and after.
    let read = "select coalesce(sum(seq_tup_read), 0)::bigint, coalesce(sum(idx_tup_fetch), 0)::bigint \
                from pg_stat_xact_user_tables where relname like 'messages%'";
    for filter in filters {
        let transaction = db.transaction().await.unwrap();
        let before = transaction.query_one(read, &[]).await.unwrap();
        let found = search::search(&transaction, &filter, Cursor::start(&filter), 20).await.unwrap();
        let after = transaction.query_one(read, &[]).await.unwrap();
        let [scanned, fetched] = [0, 1].map(|i| after.get::<_, i64>(i) - before.get::<_, i64>(i));
        assert_eq!(scanned, 0, "{filter:?} reads a table from its start");
        // The walk, and once more to see where it ended; when the page is full, hardly more than the page.
        let most = if found.ids.len() == 20 { 100 } else { 2 * limit(WALK) + 100 };
        assert!(fetched <= most, "{filter:?} reads {fetched} rows for {}", found.ids.len());
    }
}

/// Prepares one round's three statements anew, so that each is planned with the statistics of that round.
async fn prepare(db: &tokio_postgres::Client, round: i64) {
    for (name, kinds, text) in [
        ("claim", "bigint, bigint, timestamptz, text[], text, bigint, text[], bigint, text[]", claim::NEW),
        ("begin", "bigint[], int, bigint, bigint, timestamptz, bigint, bigint", begin::BEGIN),
        ("retry", "bigint[], int[], text[], int[], timestamptz[], text[], bigint, bigint", record::RETRY),
    ] {
        db.batch_execute(&format!("prepare {name}_{round} ({kinds}) as {text}")).await.unwrap();
    }
}

/// Statistics that say "no row is queued" or "no row is pending" must not make a plan quadratic, or
/// make it read a partition to its end: claim, begin and record touch a bounded number of pages.
#[tokio::test]
async fn hostile_statistics_change_nothing() {
    let scratch = scratch().await;
    let store = open(scratch.url());
    store.migrate().await.unwrap();
    let db = client(scratch.url()).await;
    db.batch_execute(
        "set plan_cache_mode = force_generic_plan; \
         insert into messages (recipient, content) select '+90', 'Hello' from generate_series(1, 100000)",
    )
    .await
    .unwrap();
    // With 20 bytes of content a page holds some 40 rows: a thousand rows by index touch a few thousand pages.
    const BOUND: i64 = 40_000;
    for round in 0..3_i64 {
        prepare(&db, round).await;
        let first = round * 1_000 + 1;
        let run = format!(
            "execute claim_{round} ({}, 1000, now(), '{{default}}', 'messages', 1, '{{slow}}', 9999999, '{{slow}}')",
            first - 1
        );
        let claimed = pages(&db, &run).await;
        let ids = format!("(select array_agg(i) from generate_series({first}, {}) i)", first + 999);
        let ids: String = db.query_one(&format!("select {ids}::text"), &[]).await.unwrap().get(0);
        let run = format!("execute begin_{round} ('{ids}', 1, {first}, {}, now(), {round}, 1)", first + 999);
        let begun = pages(&db, &run).await;
        let each = |what: &str| {
            format!("(select array_agg({what}) from generate_series({first}, {}) i)", first + 999)
        };
        let literal = async |what: &str, kind: &str| -> String {
            let text: String =
                db.query_one(&format!("select {}::text", each(what)), &[]).await.unwrap().get(0);
            format!("'{text}'::{kind}")
        };
        let run = format!(
            "execute retry_{round} ({}, {}, {}, {}, {}, {}, {first}, {})",
            literal("i", "bigint[]").await,
            literal("1", "int[]").await,
            literal("'messages-retry'::text", "text[]").await,
            literal("0", "int[]").await,
            literal("now()", "timestamptz[]").await,
            literal("'status 500'::text", "text[]").await,
            first + 999
        );
        let retried = pages(&db, &run).await;
        println!("round {round}: claim {claimed} pages, begin {begun}, retry {retried}");
        for (what, pages) in [("claim", claimed), ("begin", begun), ("retry", retried)] {
            assert!(pages < BOUND, "{what} of round {round} touched {pages} pages");
        }
        let next = match round {
            0 => "analyze messages",
            _ => "update messages set status = 'sent' where id > 50000; analyze messages",
        };
        db.batch_execute(next).await.unwrap();
    }
}
