//! A dump, taken under load and restored on another server, whose transactions have lower or higher numbers.

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Duration;

use ams::testclient::TestClientOptions;

use crate::harness::*;

/// A PostgreSQL server besides the tests' own, made anew.
struct Server {
    folder: PathBuf,
    port: u16,
}

impl Server {
    async fn start(name: &str) -> Server {
        let folder =
            PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}_{:08x}", fastrand::u32(..)));
        let server = Server { folder, port: free_port().await };
        server.services("start");
        let roles =
            ["ams_writer", "ams_reader", "ams_service"].map(|role| format!("create role {role} nologin; "));
        sql_on(&server.url("postgres")).await.batch_execute(&roles.concat()).await.unwrap();
        server
    }

    fn services(&self, verb: &str) {
        let mut command = Command::new("dev/services");
        command
            .args([verb, "postgres"])
            .env("AMS_DEV_DIR", &self.folder)
            .env("AMS_PG_PORT", self.port.to_string());
        assert!(command.stdout(Stdio::null()).status().unwrap().success(), "dev/services {verb}");
    }

    fn url(&self, database: &str) -> String {
        format!("postgres://postgres@127.0.0.1:{}/{database}", self.port)
    }

    /// Uses up numbers of transactions, up to this one.
    async fn burn(&self, up_to: u64) {
        let url = self.url("postgres");
        let (sql, count) = (sql_on(&url).await, up_to.saturating_sub(snapshot_of(&url).await));
        let burn = format!(
            "do $$ begin for i in 1..{count} loop perform pg_current_xact_id(); commit; end loop; end $$"
        );
        sql.batch_execute("set synchronous_commit = off").await.unwrap();
        sql.batch_execute(&burn).await.unwrap();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.services("stop");
        let _ = std::fs::remove_dir_all(&self.folder);
    }
}

async fn snapshot_of(url: &str) -> u64 {
    let sql = sql_on(url).await;
    let number = "select pg_snapshot_xmax(pg_current_snapshot())::text";
    sql.query_one(number, &[]).await.unwrap().get::<_, String>(0).parse().unwrap()
}

async fn restored_with(numbers: &str) {
    let options = TestClientOptions { error_rate: 0.2, ..TestClientOptions::default() };
    let receiver = Receiver::start(options).await;
    let mut stack = Stack::new("restored", &receiver).await;
    let retry: &[(&str, &str)] =
        &[("RETRY_INTERVAL", "1s"), ("RETRY_MAX_INTERVAL", "1s"), ("RETRY_COUNT", "30")];
    let running =
        [stack.start("producer", &[]), stack.start("consumer", &[]), stack.start("retry-consumer", retry)];
    stack.insert(4_000).await;
    until("some have arrived", Duration::from_secs(30), async || receiver.accepted().len() > 500).await;
    // A transaction that is open while the dump is made is not in it.
    let writer = stack.sql().await;
    writer
        .batch_execute("begin; insert into messages (recipient, content) values ('+1', 'open')")
        .await
        .unwrap();
    let dump = stack.log.with_extension("dump");
    let dump = dump.to_str().unwrap();
    tool("pg_dump", &["-Fc", "-f", dump, &stack.database_url]);
    stack.insert(1_000).await;
    writer.batch_execute("commit").await.unwrap();
    for service in running {
        assert!(service.stop().await.success());
    }

    let server = Server::start("elsewhere").await;
    let before = snapshot_of(&stack.database_url).await;
    if numbers == "higher" {
        server.burn(before + 10_000).await;
    }
    tool("pg_restore", &["--create", "-d", &server.url("postgres"), dump]);
    stack.database_url = server.url(&stack.name);
    stack.environment.insert("DATABASE_URL".to_owned(), stack.database_url.clone());
    assert_eq!(snapshot_of(&stack.database_url).await > before, numbers == "higher");
    // Numbers that were given since the dump are not given again, see docs/how-to/backup-and-restore.md.
    let move_on = "select setval('message_ids', (select last_value from message_ids) + 1000000)";
    stack.sql().await.query_one(move_on, &[]).await.unwrap();
    let sent = "select id from message_status where status = 'sent'";
    let sent: BTreeSet<i64> =
        stack.sql().await.query(sent, &[]).await.unwrap().iter().map(|row| row.get(0)).collect();
    let messages: i64 =
        stack.sql().await.query_one("select count(*) from messages", &[]).await.unwrap().get(0);
    let before = receiver.accepted();

    let _again =
        [stack.start("producer", &[]), stack.start("consumer", &[]), stack.start("retry-consumer", retry)];
    stack.insert(500).await;
    let watch = ams::clock::Clock::system().stopwatch();
    let ended = stack.all_final(messages + 500, Duration::from_secs(90)).await;
    println!(
        "{numbers} numbers: {messages} messages in the dump, {} sent; all final {:.1?} later: {ended:?}",
        sent.len(),
        watch.elapsed()
    );
    assert_eq!(ended.get("sent"), Some(&(messages + 500)), "{ended:?}");
    let after = receiver.accepted();
    let again: Vec<_> = sent.iter().filter(|id| after.get(id) != before.get(id)).collect();
    assert!(again.is_empty(), "sent in the dump, and sent again: {again:?}");
    let open: Vec<i64> = (1..=messages).filter(|id| !sent.contains(id)).collect();
    assert!(!open.is_empty(), "the dump was taken while messages were under way");
    let missing: Vec<_> = open.iter().filter(|id| after.get(id) == before.get(id)).collect();
    assert!(missing.is_empty(), "not delivered since the dump: {missing:?}");
    let doctor = stack.command("doctor", &[]).stdout(Stdio::piped()).output().unwrap();
    let said = String::from_utf8_lossy(&doctor.stdout);
    assert!(said.contains("the database came from another server at"), "{said}");
}

#[tokio::test]
async fn a_dump_restored_where_transactions_have_lower_numbers_goes_on() {
    restored_with("lower").await;
}

#[tokio::test]
async fn a_dump_restored_where_transactions_have_higher_numbers_goes_on() {
    restored_with("higher").await;
}
