//! Plans: whatever the statistics say, no statement reads a table or partition from its start, none compares each row
//! with each, and none touches more pages than its rows need.

use tokio_postgres::Client;

use super::*;
use crate::store::operate::SCAN;
use crate::store::{BATCH_MAX, limit};

/// The statements of the hot path and of repairs, by the names under which the tests prepare them.
const STATEMENTS: [(&str, &str); 14] = [
    ("urgent", claim::URGENT),
    ("normal", claim::NORMAL),
    ("bulk", claim::BULK),
    ("timed", claim::TIMED),
    ("due", claim::DUE),
    ("begin", begin::BEGIN),
    ("reissue_batch", begin::REISSUE_BATCH),
    ("reissue_lease", begin::REISSUE_LEASE),
    ("sent", record::SENT),
    ("sent_late", record::SENT_LATE),
    ("unhold", hold::UNHOLD),
    ("expire", hold::EXPIRE),
    ("open", operate::OPEN),
    ("redrive", operate::REDRIVE),
];

/// With 20 bytes of content a page holds some 40 rows: a thousand rows by index touch a few thousand pages.
const PAGES: i64 = 40_000;

/// A connection with the settings of the store's own.
async fn as_the_store(url: &str) -> Client {
    let options = PostgresOptions::parse(url).unwrap();
    let (db, connection) = options.config.connect(tokio_postgres::NoTls).await.unwrap();
    tokio::spawn(connection);
    db
}

/// Prepares all statements, so that they are planned at their first execution from here on.
async fn prepare(db: &Client) {
    db.batch_execute("deallocate all").await.unwrap();
    for (name, text) in STATEMENTS {
        db.batch_execute(&format!("prepare {name} as {text}")).await.unwrap();
    }
}

async fn explain(db: &Client, options: &str, statement: &str) -> serde_json::Value {
    let row = db.query_one(&format!("explain ({options}format json) {statement}"), &[]).await;
    let plan: serde_json::Value = row.unwrap_or_else(|error| panic!("{error:?}: {statement}")).get(0);
    plan[0]["Plan"].clone()
}

/// The nodes of a plan, the outermost first.
fn nodes(plan: &serde_json::Value) -> Vec<&serde_json::Value> {
    let below = plan["Plans"].as_array().into_iter().flatten().flat_map(nodes);
    std::iter::once(plan).chain(below).collect()
}

/// Whether a node reads a table that grows with the messages; batches and leases are few.
fn grows(node: &serde_json::Value) -> bool {
    let table = node["Relation Name"].as_str().unwrap_or_default();
    ["messages", "deliveries", "attempts", "waiting"].iter().any(|grows| table.starts_with(grows))
}

/// Asserts that each table that grows is read by an index, from where it says.
fn assert_no_walk(name: &str, plan: &serde_json::Value) {
    for node in nodes(plan) {
        let [kind, table] = ["Node Type", "Relation Name"].map(|key| node[key].as_str().unwrap_or_default());
        let grows = grows(node);
        assert!(!grows || kind != "Seq Scan", "{name} reads {table} from its start: {node:#}");
        let by_index = matches!(kind, "Index Scan" | "Index Only Scan" | "Bitmap Index Scan");
        // An order by the index may stand in for a condition, where a limit ends it.
        assert!(!grows || !by_index || node.get("Index Cond").is_some(), "{name} walks {table}: {node:#}");
    }
}

/// Rows of tables that grow, and pairs of rows, that a plan read and threw away.
fn wasted(plan: &serde_json::Value) -> i64 {
    let of = |node: &serde_json::Value, key: &str| node[key].as_i64().unwrap_or(0);
    let own = |node: &&serde_json::Value| {
        let rows = if grows(node) { of(node, "Rows Removed by Filter") } else { 0 };
        (rows + of(node, "Rows Removed by Join Filter")) * of(node, "Actual Loops")
    };
    nodes(plan).iter().map(own).sum()
}

/// Executes a statement, and bounds what it reads: its pages, and what it compares in vain.
async fn execute(db: &Client, name: &str, values: &str) {
    // Of all our relations, their indexes and the lists beside them.
    let fetched = "select sum(pg_stat_get_xact_blocks_fetched(oid))::bigint from pg_class \
                   where relnamespace <> 'pg_catalog'::regnamespace and relkind in ('r', 'i', 't')";
    db.batch_execute("begin").await.unwrap();
    let before: i64 = db.query_one(fetched, &[]).await.unwrap().get(0);
    let plan = explain(db, "analyze, ", &format!("execute {name} ({values})")).await;
    let after: i64 = db.query_one(fetched, &[]).await.unwrap().get(0);
    db.batch_execute("commit").await.unwrap();
    assert_no_walk(name, &plan);
    let (pages, wasted) = (after - before, wasted(&plan));
    assert!(pages < PAGES, "{name} touched {pages} pages: {plan:#}");
    assert!(wasted <= 1_000, "{name} threw away {wasted} rows or pairs of rows: {plan:#}");
}

fn list<T: ToString>(values: impl IntoIterator<Item = T>) -> String {
    let values: Vec<_> = values.into_iter().map(|value| value.to_string()).collect();
    format!("'{{{}}}'", values.join(","))
}

fn mask(count: usize) -> String {
    format!("'{{{}{}}}'", "1".repeat(count), "0".repeat(BATCH_MAX - count))
}

/// The columns of deliveries that were sent, but for their lanes.
fn columns(ids: &[i64], batch: i64) -> String {
    let all = |value: &str| list(ids.iter().map(|_| value));
    let batch = all(&batch.to_string());
    let [one, zero, now, text] = ["1", "0", "2030-01-01", "x"].map(all);
    let (ids, status) = (list(ids), all("200"));
    format!("{ids}, {one}, {one}, {batch}, {now}, {zero}, {zero}, {zero}, {status}, {text}, {text}, {text}")
}

async fn ids(db: &Client, query: &str) -> Vec<i64> {
    db.query(query, &[]).await.unwrap().iter().map(|row| row.get(0)).collect()
}

/// Writes so many messages that wait, are held or are sent, and 1,000 that are new, beside one that is committed late and
/// one that is rolled back. Those of one batch are far apart, as retries of old and new messages are.
async fn fill(url: &str, db: &Client, count: i64) {
    let (late, undone) = (client(url).await, client(url).await);
    for writer in [&late, &undone] {
        writer
            .batch_execute("begin; insert into messages (recipient, content) values ('+90', 'late')")
            .await
            .unwrap();
    }
    let base = ids(db, "select coalesce(max(id), 0) from messages").await[0];
    db.batch_execute(&format!(
        "insert into messages (recipient, content) select '+90', 'Hello' from generate_series(1, {count}); \
         insert into waiting (message_id, endpoint_id, due_at, held, attempts, lane, lane_tries, priority, expires_at) \
         select id, 1, case when id % 100 = 0 or id % 3 = 1 then now() - interval '1 s' else now() + interval '1 h' end, \
             case when id % 100 <> 0 and id % 3 = 1 then 'endpoint_busy' end, 1, \
             case when id % 100 <> 0 and id % 3 = 1 then 'held' else 'retry' end, 0, 0, \
             case when id % 3 = 2 and id % 10 = 7 then now() - interval '1 s' end \
         from messages where id > {base} and (id % 100 = 0 or id % 3 > 0); \
         insert into deliveries (message_id, endpoint_id, status, attempts, lane, finished_at) \
         select id, 1, 'sent', 1, 'messages', now() from messages where id > {base} and id % 100 <> 0 and id % 3 = 0"
    ))
    .await
    .unwrap();
    db.batch_execute(
        "update feed set done = pg_current_snapshot(), upto = pg_current_snapshot(), at_tx = null",
    )
    .await
    .unwrap();
    late.batch_execute("commit").await.unwrap();
    undone.batch_execute("rollback").await.unwrap();
    let new = "insert into messages (recipient, content) select '+90', 'Hello' from generate_series(1, 1000)";
    db.batch_execute(new).await.unwrap();
}

/// One round of everything for some hundred deliveries each. Batches and leases have numbers from `first` on.
async fn round(db: &Client, first: i64) {
    let [fresh, due, again, freed, lease, second, third] = [0, 1, 2, 3, 4, 5, 6].map(|i| first + i);
    let begin = async |batch: i64, lease: i64| {
        let begun = ids(db, &format!("select unnest(ids) from batches where id = {batch}")).await;
        let values = format!("'{{{batch}}}', {}, '{{{lease}}}', 1", mask(begun.len()));
        execute(db, "begin", &values).await;
        begun
    };
    let sent = async |batch: i64, lease: i64, begun: &[i64]| {
        let stats = "'{1}', '{2030-01-01}', '{1}', '{0}', '{0}', '{0}'";
        let mask = mask(begun.len());
        let columns = columns(begun, batch);
        execute(db, "sent", &format!("'{{{lease}}}', {mask}, {stats}, now(), 'messages', {columns}")).await;
        let written = format!("select count(*) from deliveries where batch = {batch} and status = 'sent'");
        assert_eq!(ids(db, &written).await, [begun.len() as i64]);
    };
    execute(db, "due", "'{retry,held}', now()").await;
    for feed in ["urgent", "normal", "bulk"] {
        let class = STATEMENTS.iter().position(|(name, _)| *name == feed).unwrap();
        execute(
            db,
            feed,
            &format!("{class}, 1000, 'messages', 1, {fresh}, '{{slow}}', now(), true, 8000000"),
        )
        .await;
    }
    let begun = begin(fresh, lease).await;
    assert_eq!(begun.len(), 1_000);
    sent(fresh, lease, &begun).await;

    execute(db, "timed", &format!("'retry', 1000, 'retry', 1, {due}, now(), now(), 8000000")).await;
    begin(due, second).await;
    execute(db, "reissue_lease", &format!("{second}, {again}, 1, now()")).await;
    execute(db, "reissue_batch", &format!("{again}, {due}, 1, now()")).await;
    let begun = begin(due, second).await;
    assert!(begun.len() >= 400, "far apart in {} of a batch", begun.len());
    execute(db, "open", &format!("{}, 1, {}", list(&begun), i64::MAX)).await;
    sent(due, second, &begun).await;

    execute(db, "unhold", "array['default'], array[1000], 'endpoint_busy', now()").await;
    execute(db, "timed", &format!("'held', 1000, 'retry', 1, {freed}, now(), now(), 8000000")).await;
    let begun = begin(freed, third).await;
    assert_eq!(begun.len(), 1_000);
    // A success that comes late finds its delivery in a lease, or waiting for another attempt.
    let late = |ids: &[i64], batch: i64| {
        let lanes = list(ids.iter().map(|_| "messages"));
        format!("now(), {}, {lanes}", columns(ids, batch))
    };
    execute(db, "sent_late", &late(&begun, freed)).await;
    let waiting = ids(db, "select message_id from waiting where held is null order by 1 limit 1000").await;
    execute(db, "sent_late", &late(&waiting, first)).await;
    execute(db, "expire", "now(), 1000").await;
    let expired =
        ids(db, "select message_id from deliveries where status = 'expired' and status <> 'sent'").await;
    execute(db, "redrive", &format!("{}, now(), 1, {}", list(&expired), i64::MAX)).await;
}

/// Plans are kept; one that is made while a partition is empty must be right when it is full.
#[tokio::test]
async fn plans_made_on_empty_partitions_use_the_indexes() {
    let scratch = scratch().await;
    ready(scratch.url()).await;
    let db = as_the_store(scratch.url()).await;
    db.batch_execute("analyze").await.unwrap();
    prepare(&db).await;
    for (name, text) in STATEMENTS {
        let values = (1..).take_while(|i| text.contains(&format!("${i}"))).map(|_| "null");
        let values = values.collect::<Vec<_>>().join(", ");
        let plan = explain(&db, "", &format!("execute {name} ({values})")).await;
        assert_no_walk(name, &plan);
    }
}

/// A plan made while a partition is empty expects one row. Its batches must not read what lies between their rows.
#[tokio::test]
async fn plans_made_on_empty_partitions_read_only_the_rows_of_a_batch() {
    let scratch = scratch().await;
    ready(scratch.url()).await;
    let db = as_the_store(scratch.url()).await;
    prepare(&db).await;
    for (name, text) in STATEMENTS {
        let values = (1..).take_while(|i| text.contains(&format!("${i}"))).map(|_| "null");
        let values = values.collect::<Vec<_>>().join(", ");
        // The plan is made, whatever becomes of the values.
        let _ = db.batch_execute(&format!("execute {name} ({values})")).await;
    }
    fill(scratch.url(), &db, 100_000).await;
    round(&db, 100).await;
}

/// Statistics that say "nothing waits" or "nothing is sent" must not make a plan quadratic, or make it read a table to
/// its end.
#[tokio::test]
async fn hostile_statistics_change_nothing() {
    let scratch = scratch().await;
    ready(scratch.url()).await;
    let db = as_the_store(scratch.url()).await;
    let steps = ["analyze", "analyze", "delete from waiting; analyze", "delete from deliveries; analyze"];
    for (step, i) in steps.iter().zip(1..) {
        db.batch_execute(step).await.unwrap();
        fill(scratch.url(), &db, 40_000).await;
        prepare(&db).await;
        round(&db, i * 100).await;
    }
}

/// Statistics that say "all messages go to one endpoint" must not let a search for another one read them all.
#[tokio::test]
async fn a_search_reads_few_rows_whatever_the_statistics_say() {
    let scratch = scratch().await;
    let store = ready(scratch.url()).await;
    let db = client(scratch.url()).await;
    // It was open when the feed looked last, and had begun before everything else.
    let open = client(scratch.url()).await;
    open.batch_execute("begin; insert into messages (recipient, content) values ('+90', 'never')")
        .await
        .unwrap();
    for statement in [
        "insert into messages (recipient, content) select '+90', 'Hello' from generate_series(1, 30000)",
        "insert into deliveries (message_id, endpoint_id, status, attempts, lane, finished_at, batch) \
         select id, 1, case when id <= 1000 then 'sent' else 'dead' end::message_state, 1, '', now(), \
             case when id <= 1000 then 1 end from messages",
        "insert into attempts select id, 1, 1, 1, now(), 0, 0, 0, 500, '', 'rejected', '', null, null, '' from messages",
        "update feed set done = pg_current_snapshot(), upto = pg_current_snapshot()",
        "analyze",
    ] {
        db.batch_execute(statement).await.unwrap();
    }
    let mut db = connection(&store.pool).await.unwrap();
    // Counts go on over transactions until the server has published them, so it is asked before and after.
    let read = "select coalesce(sum(seq_tup_read), 0)::bigint, coalesce(sum(idx_tup_fetch), 0)::bigint \
                from pg_stat_xact_user_tables where relname ~ '^(messages|deliveries|attempts|waiting)'";
    for filter in filters() {
        let transaction = db.transaction().await.unwrap();
        let before = transaction.query_one(read, &[]).await.unwrap();
        let found = search::search(&transaction, &filter, Cursor::start(&filter), 20).await.unwrap();
        let after = transaction.query_one(read, &[]).await.unwrap();
        let [scanned, fetched] = [0, 1].map(|i| after.get::<_, i64>(i) - before.get::<_, i64>(i));
        assert_eq!(scanned, 0, "{filter:?} reads a table from its start");
        // Each message of the walk, where it stands, and what led to it; once more the walk, to see where it ended. When
        // the page is full, hardly more than the page and, where ids are sorted, what led to them.
        let most = if found.ids.len() == 20 { limit(SCAN) + 200 } else { 6 * limit(SCAN) + 200 };
        assert!(fetched <= most, "{filter:?} reads {fetched} rows for {}", found.ids.len());
    }
}

fn filters() -> Vec<Filter> {
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
    filters
}
