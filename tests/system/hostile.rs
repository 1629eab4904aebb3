//! Receivers that break the rules, through the whole system: each attempt ends by its deadline in its
//! class, and the process stays small.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use ams::testclient::TestClientOptions;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::harness::*;

/// What a receiver does once a request has come.
#[derive(Clone, Copy, PartialEq)]
enum Manner {
    Silent,
    SilentInBody,
    ByteASecond,
    EndlessBody,
    TenMegabytesOfHead,
    Garbage,
    Reset,
    AcceptThenReset,
    Redirect,
}

/// Each manner, its endpoint's name, and the class that its attempts must have.
const MANNERS: &[(Manner, &str, &str)] = &[
    (Manner::Silent, "silent", "timeout"),
    (Manner::SilentInBody, "silent_in_body", "accepted"),
    (Manner::ByteASecond, "byte_a_second", "timeout"),
    (Manner::EndlessBody, "endless_body", "accepted"),
    (Manner::TenMegabytesOfHead, "head", "bad_answer"),
    (Manner::Garbage, "garbage", "bad_answer"),
    (Manner::Reset, "reset", "reset"),
    (Manner::AcceptThenReset, "accept_then_reset", "accepted"),
    (Manner::Redirect, "redirect", "rejected"),
];

/// Messages to each of them, all at once.
const EACH: i64 = 200;

/// A port that behaves so; connections to `elsewhere` are counted.
async fn listen(manner: Manner, elsewhere: u16) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        while let Ok((stream, _)) = listener.accept().await {
            // How the other side ends the connection is not what is looked at.
            tokio::spawn(async move { drop(misbehave(stream, manner, elsewhere).await) });
        }
    });
    port
}

async fn misbehave(mut stream: TcpStream, manner: Manner, elsewhere: u16) -> std::io::Result<()> {
    let mut request = vec![0; 4_096];
    let _ = stream.read(&mut request).await?;
    let head = b"HTTP/1.1 200 OK\r\ncontent-length: 1000000000\r\n\r\nhalf";
    match manner {
        Manner::Silent => {}
        Manner::SilentInBody => stream.write_all(head).await?,
        Manner::ByteASecond => {
            let mut second = tokio::time::interval(Duration::from_secs(1));
            for byte in b"HTTP/1.1 200 OK and so on".chunks(1) {
                second.tick().await;
                stream.write_all(byte).await?;
            }
        }
        Manner::EndlessBody => {
            stream.write_all(head).await?;
            loop {
                stream.write_all(&[b'x'; 16_384]).await?;
            }
        }
        Manner::TenMegabytesOfHead => {
            stream.write_all(b"HTTP/1.1 200 OK\r\n").await?;
            for _ in 0..10_000 {
                stream.write_all(format!("x-filler: {}\r\n", "y".repeat(1_000)).as_bytes()).await?;
            }
        }
        Manner::Garbage => stream.write_all(b"\x00\xff garbage \x01\r\n\r\n").await?,
        Manner::Reset => return reset(&stream),
        Manner::AcceptThenReset => {
            stream.write_all(head).await?;
            return reset(&stream);
        }
        Manner::Redirect => {
            let answer = format!(
                "HTTP/1.1 307 Go on\r\nlocation: http://127.0.0.1:{elsewhere}/\r\ncontent-length: 0\r\n\r\n"
            );
            stream.write_all(answer.as_bytes()).await?;
            // The connection is kept, and the next request gets the same.
            while stream.read(&mut request).await? > 0 {
                stream.write_all(answer.as_bytes()).await?;
            }
        }
    }
    // Until the other side goes.
    while stream.read(&mut request).await? > 0 {}
    Ok(())
}

/// Has the connection end with a reset when it is dropped.
fn reset(stream: &TcpStream) -> std::io::Result<()> {
    stream.set_zero_linger()
}

/// A port where nobody should come; counts who does.
async fn elsewhere() -> (u16, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let visits = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&visits);
    tokio::spawn(async move {
        while listener.accept().await.is_ok() {
            count.fetch_add(1, Ordering::Relaxed);
        }
    });
    (port, visits)
}

#[tokio::test]
async fn hostile_receivers_get_their_class_and_no_memory() {
    let receiver = Receiver::start(TestClientOptions::default()).await;
    let stack = Stack::new("hostile", &receiver).await;
    let (elsewhere, visits) = elsewhere().await;
    let sql = stack.sql().await;
    for (manner, name, _) in MANNERS {
        let url = format!("http://127.0.0.1:{}/", listen(*manner, elsewhere).await);
        let endpoint = "insert into endpoints (name, url, timeout_ms) values ($1, $2, 3000)";
        sql.execute(endpoint, &[name, &url]).await.unwrap();
    }
    let up = stack.start("up", &[("RETRY_COUNT", "1"), ("RETRY_INTERVAL", "100ms")]);
    stack.insert(1_000).await;
    stack.all_final(1_000, Duration::from_secs(60)).await;
    let rest = up.memory_mb("VmRSS");

    let insert = "insert into messages (endpoint, recipient, content) \
                  select $1, '+' || i, 'Hello' from generate_series(1, $2::bigint) i";
    for (_, name, _) in MANNERS {
        sql.execute(insert, &[name, &EACH]).await.unwrap();
    }
    // Those that let every attempt time out fail for long, and what they have left is held.
    let open = "select count(*) from message_status where finished_at is null \
                and why not like 'held: endpoint % has failed for long (last: timeout%'";
    until("all have ended or are held", Duration::from_secs(60), async || {
        sql.query_one(open, &[]).await.unwrap().get::<_, i64>(0) == 0
    })
    .await;
    let grown = up.memory_mb("VmHWM") - rest;
    println!("hostile receivers: {rest:.0} MB at rest, at most {grown:.0} MB more");
    assert!(grown <= 50.0, "{grown} MB more than at rest");

    let classes = "select m.endpoint, h.what, count(*), (max(h.took_ms) * 1000)::bigint from messages m \
                   join message_history h on h.message_id = m.id \
                   where m.endpoint <> 'default' and h.took_ms is not null group by 1, 2";
    let mut seen: BTreeMap<String, Vec<(String, i64)>> = BTreeMap::new();
    for row in sql.query(classes, &[]).await.unwrap() {
        let longest: i64 = row.get(3);
        assert!(longest < 3_500_000, "an attempt took {longest} µs with a deadline of 3 s");
        seen.entry(row.get(0)).or_default().push((row.get(1), row.get(2)));
    }
    for (_, name, class) in MANNERS {
        let [(only, tries)] = &seen[*name][..] else { panic!("{name}: {:?}", seen[*name]) };
        let expected = match *class {
            "accepted" => EACH..=EACH,
            "timeout" => EACH / 10..=2 * EACH,
            _ => 2 * EACH..=2 * EACH,
        };
        assert!(only == class && expected.contains(tries), "{name}: {tries} attempts are {only}");
    }
    assert_eq!(visits.load(Ordering::Relaxed), 0, "a redirect was followed");
}
