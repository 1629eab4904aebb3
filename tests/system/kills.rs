//! `kill -9` of every process under steady load, at random moments: nothing lost, few repeats, soon back.
//!
//! The load is inserted by SQL; where the API is killed it is posted, and each client posts again with the
//! same key until it has an answer.
//!
//! `AMS_TEST_KILLS=25` kills each so often; `make test` does it three times each.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicI64, Ordering};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::client::conn::http1::SendRequest;
use hyper_util::rt::TokioIo;

use crate::harness::*;
use ams::clock::Clock;
use ams::testclient::TestClientOptions;

/// Rows a second that a loader inserts while processes die.
const RATE: i64 = 1_000;

fn kills() -> usize {
    setting("AMS_TEST_KILLS").map_or(3, |text| text.parse().unwrap())
}

/// Clients that post at once.
const CLIENTS: i64 = 20;

/// Sends at a steady rate until told to stop; gives back how many messages were committed.
pub struct Load {
    stop: Arc<AtomicBool>,
    committed: Arc<AtomicI64>,
    tasks: Vec<tokio::task::JoinHandle<()>>,
}

impl Load {
    pub fn start(stack: &Stack) -> Load {
        let (stop, committed) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicI64::new(0)));
        let (stopped, count, url) = (Arc::clone(&stop), Arc::clone(&committed), stack.database_url.clone());
        let task = tokio::spawn(async move {
            let statement = "insert into messages (recipient, content) select '+' || i, 'Hello' from generate_series(1, 20) i";
            let mut tick = tokio::time::interval(Duration::from_micros(20 * 1_000_000 / RATE.unsigned_abs()));
            let mut sql = None;
            while !stopped.load(Ordering::Relaxed) {
                tick.tick().await;
                // The server itself may be down; a writer's own retry is not what is tested.
                if sql.is_none() {
                    let Ok((client, connection)) = tokio_postgres::connect(&url, tokio_postgres::NoTls).await
                    else {
                        continue;
                    };
                    tokio::spawn(connection);
                    sql = Some(client);
                }
                match sql.as_ref().unwrap().execute(statement, &[]).await {
                    Ok(rows) => drop(count.fetch_add(i64::try_from(rows).unwrap(), Ordering::Relaxed)),
                    Err(_) => sql = None,
                }
            }
        });
        Load { stop, committed, tasks: vec![task] }
    }

    /// Posts to the API on `port`.
    fn through_api(port: u16) -> Load {
        let (stop, committed) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicI64::new(0)));
        let client = |client: i64| {
            let (stop, committed) = (Arc::clone(&stop), Arc::clone(&committed));
            tokio::spawn(async move {
                let mut tick =
                    tokio::time::interval(Duration::from_micros((CLIENTS * 1_000_000 / RATE) as u64));
                let mut connection = None;
                for number in 0.. {
                    if stop.load(Ordering::Relaxed) {
                        break;
                    }
                    tick.tick().await;
                    while !post(&mut connection, port, &format!("{client}-{number}")).await {
                        tick.tick().await;
                    }
                    committed.fetch_add(1, Ordering::Relaxed);
                }
            })
        };
        let tasks = (0..CLIENTS).map(client).collect();
        Load { stop, committed, tasks }
    }

    pub fn committed(&self) -> i64 {
        self.committed.load(Ordering::Relaxed)
    }

    pub async fn finish(self) {
        self.stop.store(true, Ordering::Relaxed);
        for task in self.tasks {
            task.await.unwrap();
        }
    }
}

/// Posts one message under this key; `false`: nobody knows whether it was stored.
async fn post(connection: &mut Option<SendRequest<Full<Bytes>>>, port: u16, key: &str) -> bool {
    if connection.as_ref().is_none_or(SendRequest::is_closed) {
        let Ok(stream) = tokio::net::TcpStream::connect(("127.0.0.1", port)).await else { return false };
        let Ok((sender, driver)) = hyper::client::conn::http1::handshake(TokioIo::new(stream)).await else {
            return false;
        };
        tokio::spawn(driver);
        *connection = Some(sender);
    }
    let sender = connection.as_mut().unwrap();
    let request = hyper::Request::post("/v1/messages")
        .header("host", "127.0.0.1")
        .header("content-type", "application/json")
        .header("idempotency-key", key)
        .body(Full::new(Bytes::from(r#"{"recipient":"+90","content":"Hello"}"#)))
        .unwrap();
    let answered = async {
        sender.ready().await?;
        let answer = sender.send_request(request).await?;
        let status = answer.status();
        http_body_util::BodyExt::collect(answer.into_body()).await?;
        Ok::<_, hyper::Error>(status.is_success())
    };
    answered.await.unwrap_or(false)
}

/// How many rows exist: a commit whose answer was lost counts too.
pub async fn rows(stack: &Stack) -> i64 {
    stack.sql().await.query_one("select count(*) from messages", &[]).await.unwrap().get(0)
}

struct Line {
    verb: &'static str,
    kills: usize,
    lost: usize,
    duplicates: usize,
    in_flight: i64,
    resumed_max: Duration,
}

/// Kills `verb` again and again beside the other services, then settles and counts.
async fn kill(verb: &'static str, others: &[&str]) -> Line {
    let receiver = Receiver::start(TestClientOptions {
        latency: Duration::from_millis(5),
        ..TestClientOptions::default()
    })
    .await;
    let stack = Stack::new("kills", &receiver).await;
    let _others: Vec<_> = others.iter().map(|other| stack.start(other, &[])).collect();
    let port = free_port().await;
    let port_text = port.to_string();
    let settings: &[(&str, &str)] = if verb == "api" { &[("PORT", &port_text)] } else { &[] };
    let mut service = stack.start(verb, settings);
    let load = if verb == "api" { Load::through_api(port) } else { Load::start(&stack) };
    until("it runs", Duration::from_secs(30), async || receiver.arrivals() > 500).await;
    let mut line =
        Line { verb, kills: kills(), lost: 0, duplicates: 0, in_flight: 0, resumed_max: Duration::ZERO };
    for _ in 0..line.kills {
        let_run(Duration::from_millis(fastrand::u64(200..1_500))).await;
        service.kill();
        line.in_flight += stack.processing().await;
        let watch = Clock::system().stopwatch();
        // Rows of before the kill may still arrive from elsewhere; what counts is one committed after it.
        let newest: i64 =
            stack.sql().await.query_one("select max(id) from messages", &[]).await.unwrap().get(0);
        service = stack.start(verb, settings);
        until("a row committed after the kill arrives", Duration::from_secs(30), async || {
            receiver.accepted_from(newest + 1)
        })
        .await;
        line.resumed_max = line.resumed_max.max(watch.elapsed());
        // The next kill meets a steady load again, not what is left of this one.
        until("it has caught up", Duration::from_secs(120), async || {
            receiver.arrivals() + 1_000 > usize::try_from(load.committed()).unwrap()
        })
        .await;
    }
    let committed = Arc::clone(&load.committed);
    load.finish().await;
    let count = rows(&stack).await;
    if verb == "api" {
        assert_eq!(count, committed.load(Ordering::Relaxed), "one message for each key that was answered");
    }
    let ended = stack.all_final(count, Duration::from_secs(60)).await;
    assert_eq!(ended.get("sent"), Some(&count), "{verb}: {ended:?}");
    receiver.assert_ids_are_stable();
    line.lost = usize::try_from(count).unwrap() - receiver.accepted().len();
    line.duplicates = receiver.duplicates();
    line
}

fn check(lines: &[Line]) {
    println!("| killed | times | lost | repeats | in flight at the kills | back within |");
    println!("| --- | --- | --- | --- | --- | --- |");
    for line in lines {
        let (verb, kills, lost, duplicates) = (line.verb, line.kills, line.lost, line.duplicates);
        println!(
            "| {verb} | {kills} | {lost} | {duplicates} | {} | {:.1?} |",
            line.in_flight, line.resumed_max
        );
    }
    for line in lines {
        assert_eq!(line.lost, 0, "{}", line.verb);
        assert!(
            i64::try_from(line.duplicates).unwrap() <= line.in_flight,
            "{}: {} repeats",
            line.verb,
            line.duplicates
        );
    }
}

#[tokio::test]
async fn kills_of_each_service_lose_nothing() {
    let lines = [
        kill("producer", &["api", "consumer", "retry-consumer"]).await,
        kill("consumer", &["api", "producer", "retry-consumer"]).await,
        kill("retry-consumer", &["api", "producer", "consumer"]).await,
        kill("api", &["producer", "consumer", "retry-consumer"]).await,
        kill("up", &[]).await,
    ];
    check(&lines);
}
