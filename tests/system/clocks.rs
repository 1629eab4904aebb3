//! A host whose clock was an hour ahead led, worked and died: what it wrote down keeps nobody waiting.

use std::process::{Command, Stdio};
use std::time::Duration;

use ams::testclient::TestClientOptions;

use crate::harness::*;

/// The promise: work resumes within 30 s.
const HEALED: Duration = Duration::from_secs(30);

/// How a store counts an hour: what is to be added to its times.
fn an_hour_ahead(hour: &str) -> String {
    format!(
        "update leader set until = until + {hour}, steady_since = steady_since + {hour}, \
             paced_until = paced_until + {hour}; \
         update instances set started_at = started_at + {hour}, seen_at = seen_at + {hour}, \
             lease_until = lease_until + {hour}; \
         update batches set created_at = created_at + {hour}"
    )
}

/// Waits until a message that is inserted now has arrived, and the one that the dead process had in flight has been
/// sent again; its first answer reached nobody.
async fn healed(what: &str, receiver: &Receiver) {
    let arrived = |id, times| receiver.accepted().get(&id) == Some(&times);
    let new = until(what, HEALED, async || arrived(2, 1)).await;
    let again = until(what, HEALED.saturating_sub(new), async || arrived(1, 2)).await;
    println!(
        "{what}: a new message after {:.1} s, the old one after {:.1} s",
        new.as_secs_f64(),
        (new + again).as_secs_f64()
    );
}

/// A receiver that takes its time, so that a message is in flight when its sender dies.
async fn slow() -> Receiver {
    Receiver::start(TestClientOptions { latency: Duration::from_secs(3), ..TestClientOptions::default() })
        .await
}

#[tokio::test]
async fn a_dead_leader_from_the_future_is_succeeded_on_postgres() {
    let receiver = slow().await;
    let stack = Stack::new("clocks", &receiver).await;
    let paced: &[(&str, &str)] = &[("INTERVAL", "1s"), ("BATCH_COUNT", "100")];
    let (producer, consumer) = (stack.start("producer", paced), stack.start("consumer", &[]));
    stack.insert(1).await;
    until("it is in flight", Duration::from_secs(30), async || {
        stack.statuses().await.contains_key("processing")
    })
    .await;
    producer.kill();
    consumer.kill();
    let hour = "interval '1 hour'";
    stack.sql().await.batch_execute(&an_hour_ahead(hour)).await.unwrap();
    let _again = [stack.start("producer", paced), stack.start("consumer", &[])];
    stack.insert(1).await;
    healed("PostgreSQL", &receiver).await;
}

#[tokio::test]
async fn a_dead_leader_from_the_future_is_succeeded_on_sqlite() {
    let _alone = tokio::task::spawn_blocking(alone).await.unwrap();
    let receiver = slow().await;
    let folder = tempfile::tempdir().unwrap();
    let start = || {
        let mut command = Command::new(env!("CARGO_BIN_EXE_ams"));
        for name in ["DATABASE_URL", "KAFKA_BROKERS", "REDIS_URL"] {
            command.env_remove(name);
        }
        command.args(["up", "--port", "0"]).env("REQUEST_URL", &receiver.url).current_dir(folder.path());
        command.stdin(Stdio::null()).stdout(Stdio::null()).spawn().unwrap()
    };
    let mut up = start();
    let file = folder.path().join("ams-data/ams.db");
    until("the store is there", Duration::from_secs(10), async || file.exists()).await;
    let sql = rusqlite::Connection::open(&file).unwrap();
    let insert = "insert into messages (recipient, content) values ('+90', 'Hello')";
    until("the store is migrated", Duration::from_secs(10), async || sql.execute_batch(insert).is_ok()).await;
    let begun = "select count(*) from message_status where status = 'processing'";
    until("it is in flight", Duration::from_secs(10), async || {
        sql.query_row(begun, [], |row| row.get::<_, i64>(0)).is_ok_and(|count| count == 1)
    })
    .await;
    up.kill().unwrap();
    up.wait().unwrap();
    sql.execute_batch(&an_hour_ahead("3600000000")).unwrap();
    let mut up = start();
    sql.execute_batch(insert).unwrap();
    healed("SQLite", &receiver).await;
    up.kill().unwrap();
    up.wait().unwrap();
}
