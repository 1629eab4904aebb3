//! Random values in each column by SQL, on both stores: each row is refused, or ends and can be read; and one that
//! can't be read ends alone. Prints the seed; `AMS_COLUMNS_SEED` replays it.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use ams::testclient::TestClientOptions;
use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::{Config, RngAlgorithm, TestRng, TestRunner};
use serde_json::Value;

use crate::harness::*;

/// Rows tried on each store.
const ROWS: usize = 600;
/// Every column that an insert can name; SQLite has no `tx`.
const COLUMNS: [&str; 14] = [
    "id",
    "tx",
    "created_at",
    "priority",
    "send_at",
    "expires_at",
    "endpoint",
    "recipient",
    "ordering_key",
    "idempotency_key",
    "content_type",
    "headers",
    "tags",
    "content",
];

/// A value, before it is written for a store.
#[derive(Clone, Debug)]
enum Given {
    Sql(String),
    Text(String),
    Bytes(Vec<u8>),
}

const TIMES: [&str; 17] = [
    "9999-12-31T23:59:59Z",
    "9999-12-31",
    "20000-01-01",
    "0000-01-01",
    "0001-01-01",
    "-4713-11-24",
    "infinity",
    "-infinity",
    "2026-02-30",
    "2026-13-01",
    "2020-01-01T00:00:00Z",
    "2099-01-01 12:00",
    "12:00",
    "now",
    "epoch",
    "294276-12-31",
    "2020-01-01T00:00:00+14:00",
];
const JSON: [&str; 19] = [
    "{}",
    "[]",
    "null",
    "{\"a\":\"b\"}",
    "{\"a\":1}",
    "{\"a\":[\"b\"]}",
    "{\"a\":[]}",
    "{\"a\":null}",
    "{\"Host\":\"x\"}",
    "{\"x\":\"a\\r\\nb: c\"}",
    "{\"x y\":\"a\"}",
    "{\"x\":\"\\u0000\"}",
    "{\"x\":\"\\ud800\"}",
    "{\"x\":1e999}",
    "{\"a\":\"b\",\"a\":\"c\"}",
    "{\"\":\"x\"}",
    "{",
    "{\"webhook-id\":\"x\"}",
    "{\"x\":\"ü\"}",
];
const SQL: [&str; 11] =
    ["null", "0", "1", "-1", "101", "32768", "2147483648", "9223372036854775807", "1e400", "1.5", "default"];
const WORDS: [&str; 11] = [
    "default",
    "nowhere",
    "sent",
    "queued",
    "parked",
    "endpoint_busy",
    "text/plain",
    "a\nb",
    "a\tb",
    "",
    " ",
];

fn one_of(texts: &'static [&'static str]) -> impl Strategy<Value = Given> {
    prop::sample::select(texts).prop_map(|text| Given::Text(text.to_owned()))
}

fn sql() -> impl Strategy<Value = Given> {
    prop_oneof![
        prop::sample::select(&SQL[..]).prop_map(|sql| Given::Sql(sql.to_owned())),
        any::<i64>().prop_map(|number| Given::Sql(number.to_string())),
    ]
}

fn text() -> impl Strategy<Value = Given> {
    prop_oneof![
        3 => any::<String>().prop_map(Given::Text),
        2 => prop::collection::vec(any::<u8>(), 0..20).prop_map(Given::Bytes),
        2 => one_of(&WORDS),
        1 => (1..3_000_usize).prop_map(|count| Given::Text("x".repeat(count))),
    ]
}

fn json() -> impl Strategy<Value = Given> {
    let deep = format!("{{\"a\":{}{}}}", "[".repeat(400), "]".repeat(400));
    prop_oneof![5 => one_of(&JSON), 1 => Just(Given::Text(deep))]
}

/// A column, and a value of a kind that may belong there.
fn fitting() -> impl Strategy<Value = (&'static str, Given)> {
    let texts = ["endpoint", "recipient", "ordering_key", "idempotency_key", "content_type", "content"];
    prop_oneof![
        3 => (prop::sample::select(texts.to_vec()), text()),
        1 => (prop::sample::select(vec!["headers", "tags"]), json()),
        1 => (prop::sample::select(vec!["send_at", "expires_at"]), one_of(&TIMES)),
        1 => (Just("priority"), sql()),
    ]
}

/// Any column, and any value.
fn whatever() -> impl Strategy<Value = (&'static str, Given)> {
    (prop::sample::select(COLUMNS.to_vec()), prop_oneof![sql(), text(), json(), one_of(&TIMES)])
}

/// The columns of a row and what they are given; recipient and content always.
fn row() -> impl Strategy<Value = Vec<(&'static str, Given)>> {
    prop::collection::vec(prop_oneof![2 => fitting(), 1 => whatever()], 1..4).prop_map(|mut row| {
        row.sort_by_key(|(column, _)| *column);
        row.dedup_by_key(|(column, _)| *column);
        for column in ["recipient", "content"] {
            if row.iter().all(|(other, _)| *other != column) {
                row.push((column, Given::Text("Hello".to_owned())));
            }
        }
        row
    })
}

fn rows() -> Vec<Vec<(&'static str, Given)>> {
    let seed =
        setting("AMS_COLUMNS_SEED").and_then(|seed| seed.parse().ok()).unwrap_or_else(|| fastrand::u64(..));
    println!("AMS_COLUMNS_SEED={seed}");
    let mut bytes = [0; 32];
    bytes[..8].copy_from_slice(&seed.to_le_bytes());
    let rng = TestRng::from_seed(RngAlgorithm::ChaCha, &bytes);
    let mut runner = TestRunner::new_with_rng(Config::default(), rng);
    (0..ROWS).map(|_| row().new_tree(&mut runner).unwrap().current()).collect()
}

fn insert(row: &[(&str, Given)], written: impl Fn(&Given) -> String) -> String {
    let columns: Vec<_> = row.iter().map(|(column, _)| *column).collect();
    let values: Vec<_> = row.iter().map(|(_, given)| written(given)).collect();
    format!("insert into messages ({}) values ({})", columns.join(", "), values.join(", "))
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// What became of the rows, once nothing is on its way any more.
#[derive(Debug, Default)]
struct Ends {
    refused: usize,
    sent: usize,
    waiting: usize,
    expired: usize,
    unreadable: usize,
}

/// `ams up`, and a client of its API.
struct Up {
    child: Child,
    url: String,
}

impl Up {
    fn start(mut command: Command, folder: &Path, port: u16) -> Up {
        let log = std::fs::File::create(folder.join("up.log")).unwrap();
        command.args(["--port", &port.to_string(), "--retry-interval", "100ms"]);
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(log).spawn().unwrap();
        Up { child, url: format!("http://127.0.0.1:{port}") }
    }

    /// The answer of a GET as JSON, once the API is there.
    fn get(&self, path: &str) -> Value {
        let patient =
            ["-sf", "--retry", "40", "--retry-delay", "1", "--retry-connrefused", "--retry-max-time", "60"];
        let text = tool("curl", &[&patient[..], &[&format!("{}{path}", self.url)]].concat());
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{path}: {error}: {text}"))
    }

    /// Every page of the list.
    fn all(&self) -> Vec<Value> {
        let (mut all, mut path) = (Vec::new(), "/v1/messages?limit=100".to_owned());
        loop {
            let page = self.get(&path);
            all.extend(page["data"].as_array().unwrap().iter().cloned());
            match page["next_cursor"].as_str() {
                Some(cursor) => path = format!("/v1/messages?limit=100&cursor={cursor}"),
                None => return all,
            }
        }
    }

    /// Waits until each message has ended or says what it waits for, and counts.
    async fn ends(&self, accepted: usize) -> Ends {
        let (mut ends, mut last) = (Ends::default(), String::new());
        let watch = ams::clock::Clock::system().stopwatch();
        until(
            "each row has ended, or waits for something that it names",
            Duration::from_secs(60),
            async || {
                assert!(
                    watch.elapsed() < Duration::from_secs(40),
                    "it neither ended nor says what it waits for: {last}"
                );
                let all = self.all();
                assert_eq!(all.len(), accepted);
                ends = Ends::default();
                for message in &all {
                    let text = |name: &str| message[name].as_str().unwrap_or_default().to_owned();
                    match text("status").as_str() {
                        "sent" => ends.sent += 1,
                        "expired" => ends.expired += 1,
                        // For an endpoint that does not exist, or for a time in the far future.
                        "pending" if text("endpoint") != "default" || text("send_at").as_str() > "2027" => {
                            assert!(!text("why").is_empty(), "{message}");
                            ends.waiting += 1;
                        }
                        "dead" => {
                            assert!(text("why").starts_with("the message can't be read: "), "{message}");
                            ends.unreadable += 1;
                        }
                        _ => {
                            last = message.to_string();
                            return false;
                        }
                    }
                }
                true
            },
        )
        .await;
        ends
    }

    /// Asks for a stop, which must not take long: nothing hangs.
    async fn stop(mut self) {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
        until("it stops", Duration::from_secs(15), async || self.child.try_wait().unwrap().is_some()).await;
    }
}

fn check(store: &str, refused: usize, ends: Ends) {
    let ends = Ends { refused, ..ends };
    println!("{store}: {ends:?}");
    for (what, count) in [("refused", ends.refused), ("sent", ends.sent), ("waiting", ends.waiting)] {
        assert!(count >= 5, "{store}: too few {what} to mean anything: {ends:?}");
    }
}

#[tokio::test]
async fn random_values_in_postgres_are_refused_or_end_and_can_be_read() {
    let receiver = Receiver::start(TestClientOptions::default()).await;
    let stack = Stack::new("columns", &receiver).await;
    let (sql, folder, port) = (stack.sql().await, tempfile::tempdir().unwrap(), free_port().await);
    let written = |given: &Given| match given {
        Given::Sql(sql) => sql.clone(),
        Given::Text(text) => format!("'{}'", text.replace('\'', "''").replace('\0', "")),
        Given::Bytes(bytes) => {
            format!("e'{}'", bytes.iter().map(|byte| format!("\\x{byte:02x}")).collect::<String>())
        }
    };
    let mut accepted = 0;
    for row in rows() {
        accepted += usize::from(sql.batch_execute(&insert(&row, written)).await.is_ok());
    }
    let mut command = stack.command("up", &[]);
    for name in ["KAFKA_BROKERS", "REDIS_URL", "KAFKA_TOPIC", "KAFKA_TOPIC_RETRY", "PORT"] {
        command.env_remove(name);
    }
    let up = Up::start(command, folder.path(), port);
    let ends = up.ends(accepted).await;
    assert_eq!(ends.unreadable, 0, "PostgreSQL takes only what can be read");
    check("PostgreSQL", ROWS - accepted, ends);
    up.stop().await;
}

fn up(folder: &Path, receiver: &Receiver) -> Command {
    let mut command = embedded(folder);
    command.arg("up").env("REQUEST_URL", &receiver.url);
    command
}

/// A migrated, empty store in this folder, and a connection to it.
fn store(folder: &Path, receiver: &Receiver) -> rusqlite::Connection {
    assert!(
        embedded(folder)
            .env("REQUEST_URL", &receiver.url)
            .arg("migrate")
            .stdout(Stdio::null())
            .status()
            .unwrap()
            .success()
    );
    rusqlite::Connection::open(folder.join("ams-data/ams.db")).unwrap()
}

#[tokio::test]
async fn random_values_in_sqlite_are_refused_or_end_and_can_be_read() {
    let _alone = tokio::task::spawn_blocking(alone).await.unwrap();
    let receiver = Receiver::start(TestClientOptions::default()).await;
    let (folder, port) = (tempfile::tempdir().unwrap(), free_port().await);
    let sql = store(folder.path(), &receiver);
    let written = |given: &Given| match given {
        // SQLite has no such word in a list of values.
        Given::Sql(sql) if sql == "default" => "null".to_owned(),
        Given::Sql(sql) => sql.clone(),
        Given::Text(text) => format!("cast(x'{}' as text)", hex(text.as_bytes())),
        Given::Bytes(bytes) => format!("cast(x'{}' as text)", hex(bytes)),
    };
    let mut accepted = 0;
    for row in rows() {
        accepted += usize::from(sql.execute_batch(&insert(&row, written)).is_ok());
    }
    let up = Up::start(up(folder.path(), &receiver), folder.path(), port);
    let ends = up.ends(accepted).await;
    check("SQLite", ROWS - accepted, ends);
    up.stop().await;
}

/// Rows from before the store refused them took a whole core for ever, and no other row was delivered.
#[tokio::test]
async fn rows_that_can_not_be_read_stop_no_other_and_no_stop() {
    let _alone = tokio::task::spawn_blocking(alone).await.unwrap();
    let receiver = Receiver::start(TestClientOptions::default()).await;
    let (folder, port) = (tempfile::tempdir().unwrap(), free_port().await);
    let sql = store(folder.path(), &receiver);
    sql.execute_batch(
        "drop trigger messages_text; \
         insert into messages (recipient, content, endpoint) values ('+90', 'x', cast(x'6dfc6c6c6572' as text)); \
         insert into unknown_endpoints (name) values (cast(x'6dfc6c6c6572' as text)); \
         insert into waiting (message_id, endpoint_id, due_at, held, attempts, lane, lane_tries, priority) \
         select 1, id, 0, 'endpoint_disabled', 0, '', 0, 0 from unknown_endpoints; \
         update feed set position = 1; \
         insert into messages (recipient, content, endpoint) values ('+90', 'x', cast(x'6dfc6c6c6573' as text)); \
         insert into messages (recipient, content) values ('+90', cast(x'ff' as text)); \
         insert into messages (recipient, content) values ('+90', 'Hello')",
    )
    .unwrap();
    let up = Up::start(up(folder.path(), &receiver), folder.path(), port);
    until("the good one arrives", Duration::from_secs(30), async || receiver.accepted().contains_key(&4))
        .await;
    let ends = up.ends(4).await;
    assert_eq!((ends.sent, ends.waiting, ends.unreadable), (1, 1, 2), "{ends:?}");
    let cpu = || std::fs::read_to_string(format!("/proc/{}/stat", up.child.id())).unwrap();
    let ticks =
        |stat: String| stat.split(' ').skip(13).take(2).map(|n| n.parse::<u64>().unwrap()).sum::<u64>();
    let before = ticks(cpu());
    let_run(Duration::from_secs(2)).await;
    let used = ticks(cpu()) - before;
    assert!(used < 100, "at rest it used {used} hundredths of a second in two");
    up.stop().await;
}
