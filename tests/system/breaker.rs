//! An outage of a receiver costs its messages no attempts.

use std::time::Duration;

use crate::harness::*;
use ams::testclient::TestClientOptions;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

async fn texts(stack: &Stack, statement: &str) -> Vec<String> {
    stack.sql().await.query(statement, &[]).await.unwrap().iter().map(|row| row.get(0)).collect()
}

fn failing() -> TestClientOptions {
    TestClientOptions { error_rate: 1.0, status: 503, ..TestClientOptions::default() }
}

#[tokio::test]
async fn an_endpoint_that_fails_for_long_is_only_probed_over_restarts_and_until_it_is_back() {
    let receiver = Receiver::start(failing()).await;
    let stack = Stack::new("breaker", &receiver).await;
    let _producer = stack.start("producer", &[]);
    let start =
        || [stack.start("consumer", &[]), stack.start("consumer", &[]), stack.start("retry-consumer", &[])];
    let consumers = start();
    stack.insert(500).await;
    let opened = "select reason from breakers";
    until("its breaker opens", Duration::from_secs(40), async || !texts(&stack, opened).await.is_empty())
        .await;
    assert_eq!(texts(&stack, opened).await, ["status 503"]);
    for consumer in consumers {
        consumer.stop().await;
    }
    let _consumers = start();
    stack.insert(500).await;
    let all_held = "select id::text from message_status \
                    where why not like 'held: endpoint default has failed for long (last: status 503); it is probed from %'";
    until("all are held", Duration::from_secs(20), async || texts(&stack, all_held).await.len() <= 1).await;
    let before = receiver.arrivals();
    let_run(Duration::from_secs(12)).await;
    // Open for 5, 10, 20 s and so on; those are probes.
    let probes = receiver.arrivals() - before;
    assert!(probes <= 3, "{probes} attempts in 12 s");

    let failed = receiver.arrivals();
    let receiver = receiver.replace(TestClientOptions::default()).await;
    let ended = stack.all_final(1_000, Duration::from_secs(150)).await;
    // A probe is somebody's attempt, and may be the last.
    let (sent, dead) = (ended.get("sent").copied().unwrap_or(0), ended.get("dead").copied().unwrap_or(0));
    assert!(sent + dead == 1_000 && dead <= 3, "{ended:?}");
    assert_eq!((receiver.accepted().len() as i64, receiver.duplicates()), (sent, 0));
    let attempts = "select sum(attempts)::text from message_status";
    // The connections that nobody took while the receiver was replaced.
    let made: i64 = texts(&stack, attempts).await[0].parse().unwrap();
    let refused = made - failed as i64 - sent;
    assert!((0..=3).contains(&refused), "{made} attempts, {failed} at the one that failed, {sent} sent");
    assert!(texts(&stack, opened).await.is_empty());
}

#[tokio::test]
async fn retry_after_pauses_an_endpoint_for_all_consumers_and_a_change_of_it_ends_the_pause() {
    let pause = Some(Duration::from_secs(3_600));
    let receiver = Receiver::start(TestClientOptions { status: 429, retry_after: pause, ..failing() }).await;
    let stack = Stack::new("pause", &receiver).await;
    let _services = ["producer", "consumer", "consumer", "retry-consumer"].map(|verb| stack.start(verb, &[]));
    stack.insert(200).await;
    let held = "select why from message_status where why like 'held: endpoint default asked for a pause (status 429); it is %'";
    until("the rest is held", Duration::from_secs(30), async || texts(&stack, held).await.len() >= 150).await;
    let before = receiver.arrivals();
    assert!(before <= 50, "{before} came before the pause was known");
    let_run(Duration::from_secs(3)).await;
    assert_eq!(receiver.arrivals(), before);

    let well = Receiver::start(TestClientOptions::default()).await;
    let change = format!("update endpoints set url = '{}'", well.url);
    stack.sql().await.batch_execute(&change).await.unwrap();
    let sent = "select id::text from message_status where status = 'sent'";
    until("the rest is sent", Duration::from_secs(60), async || texts(&stack, sent).await.len() >= 150).await;
    assert_eq!(well.duplicates(), 0);
    assert_eq!(receiver.arrivals(), before);
}

/// A receiver that answers 500 to messages with `poison` in them, and 200 to the others; one request a connection.
async fn picky() -> String {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}", listener.local_addr().unwrap());
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            tokio::spawn(async move {
                let (mut request, mut read) = (vec![0; 4_096], 0);
                // The body is JSON, and short.
                while read == 0 || request[read - 1] != b'}' {
                    read += stream.read(&mut request[read..]).await.unwrap_or(0).max(1);
                }
                let poison = request[..read].windows(6).any(|text| text == b"poison");
                let status = if poison { "500 No" } else { "200 OK" };
                let answer = format!("HTTP/1.1 {status}\r\ncontent-length: 0\r\nconnection: close\r\n\r\n");
                // How the other side ends the connection is not what is looked at.
                drop(stream.write_all(answer.as_bytes()).await);
            });
        }
    });
    url
}

/// The consumer of the retry lane sees failures only.
#[tokio::test]
async fn bad_messages_among_good_ones_open_no_breaker() {
    let receiver = Receiver::start(TestClientOptions::default()).await;
    let stack = Stack::new("poison", &receiver).await;
    let sql = stack.sql().await;
    sql.execute("insert into endpoints (name, url) values ('picky', $1)", &[&picky().await]).await.unwrap();
    let retry = [("RETRY_INTERVAL", "1s"), ("RETRY_COUNT", "15"), ("RETRY_MAX_INTERVAL", "1s")];
    let _services =
        [stack.start("producer", &[]), stack.start("consumer", &[]), stack.start("retry-consumer", &retry)];
    let insert = "insert into messages (endpoint, recipient, content) \
                  select 'picky', '+' || i, $1 from generate_series(1, $2::bigint) i";
    sql.execute(insert, &[&"poison", &10_i64]).await.unwrap();
    let poison = "select count(*) from deliveries where status = 'dead'";
    let mut good = 0;
    until("the bad ones are dead", Duration::from_secs(90), async || {
        sql.execute(insert, &[&"Hello", &10_i64]).await.unwrap();
        good += 10;
        sql.query_one(poison, &[]).await.unwrap().get::<_, i64>(0) == 10
    })
    .await;
    let ended = stack.all_final(10 + good, Duration::from_secs(30)).await;
    assert_eq!((ended.get("sent"), ended.get("dead")), (Some(&good), Some(&10)), "{ended:?}");
    let took = "select extract(epoch from max(finished_at) - min(finished_at))::float8 from deliveries";
    assert!(sql.query_one(took, &[]).await.unwrap().get::<_, f64>(0) > 12.0, "they failed for long");
    sql.batch_execute("select pg_stat_force_next_flush()").await.unwrap();
    let opened = "select n_tup_ins from pg_stat_user_tables where relname = 'breakers'";
    assert_eq!(sql.query_one(opened, &[]).await.unwrap().get::<_, i64>(0), 0);
}
