//! Receivers that break the rules. Each is ended by its deadline, gets its class, and leaves no connection.

use tokio::io::AsyncReadExt;

use super::receiver::Receiver;
use super::*;

const HEAD: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\n";

/// Asserts what came of it, and that neither side still holds a connection.
async fn assert_ended(receiver: &Receiver, delivery: &Delivery, outcome: &Outcome, class: Class, why: &str) {
    assert_eq!(outcome.class, class, "{outcome:?}");
    let error = outcome.error.as_deref().unwrap_or_default();
    assert!(error.contains(why), "`{why}` is not in `{error}`");
    assert_eq!(idle(delivery), 0);
    receiver.until_open(0).await;
}

#[tokio::test]
async fn silence_is_a_timeout() {
    let receiver = Receiver::start(|mut wire| async move { wire.until_closed().await }).await;
    let delivery = delivery();
    let outcome = deliver_soon(&delivery, &receiver.url).await;
    assert_ended(&receiver, &delivery, &outcome, Class::Timeout, "no answer within 300ms").await;
    assert_eq!(outcome.status, None);
    assert!(outcome.times.head_us >= 200_000, "{:?}", outcome.times);
}

#[tokio::test]
async fn a_head_that_never_ends_is_a_timeout() {
    for drip in [&b"HTTP/1.1 200 OK\r\nx-slow: "[..], &b"a"[..]] {
        let receiver = Receiver::start(move |mut wire| async move {
            wire.request().await;
            let _ = wire.write(b"HTTP/1.1 200 OK\r\nx: ").await;
            wire.drip(&drip[drip.len() - 1..]).await;
        })
        .await;
        let delivery = delivery();
        let outcome = deliver_soon(&delivery, &receiver.url).await;
        assert_ended(&receiver, &delivery, &outcome, Class::Timeout, "no answer").await;
    }
}

#[tokio::test]
async fn a_status_line_counts_whatever_the_body_does() {
    let hangs = Receiver::start(|mut wire| async move {
        wire.request().await;
        let _ = wire.write(HEAD).await;
        let _ = wire.write(b"half").await;
        wire.until_closed().await;
    })
    .await;
    let drips = Receiver::start(|mut wire| async move {
        wire.request().await;
        let _ = wire.write(HEAD).await;
        wire.drip(b"half").await;
    })
    .await;
    for receiver in [hangs, drips] {
        let delivery = delivery();
        let outcome = deliver_soon(&delivery, &receiver.url).await;
        assert_ended(&receiver, &delivery, &outcome, Class::Accepted, "").await;
        assert!(outcome.answer.starts_with("half"), "{outcome:?}");
        assert!(outcome.times.body_us >= 200_000, "{:?}", outcome.times);
    }
}

#[tokio::test]
async fn a_body_that_breaks_off_changes_nothing() {
    let closes = Receiver::answering_once([HEAD, b"half"].concat()).await;
    let resets = Receiver::start(|mut wire| async move {
        wire.request().await;
        let _ = wire.write(HEAD).await;
        let _ = wire.write(b"half").await;
        wire.reset();
    })
    .await;
    let bad_chunk = Receiver::answering_once(
        &b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n4\r\nhalf\r\nzzz\r\n"[..],
    )
    .await;
    for receiver in [closes, resets, bad_chunk] {
        let delivery = delivery();
        let outcome = deliver(&delivery, &receiver.url).await;
        assert_ended(&receiver, &delivery, &outcome, Class::Accepted, "").await;
        assert_eq!((outcome.status, outcome.answer.as_str()), (Some(200), "half"));
    }
}

#[tokio::test]
async fn an_endless_body_is_left_after_64_kib() {
    for head in ["HTTP/1.1 200 OK\r\n\r\n", "HTTP/1.1 200 OK\r\ncontent-length: 99999999999\r\n\r\n"] {
        let receiver = Receiver::start(move |mut wire| async move {
            wire.request().await;
            let _ = wire.write(head.as_bytes()).await;
            wire.flood(&[b'x'; 16 * 1024]).await;
        })
        .await;
        let delivery = delivery();
        let watch = Clock::system().stopwatch();
        let outcome = deliver(&delivery, &receiver.url).await;
        assert!(watch.elapsed() < SLACK, "the deadline had to end it");
        assert_ended(&receiver, &delivery, &outcome, Class::Accepted, "").await;
        assert_eq!(outcome.answer.len(), 4096);
    }
}

#[tokio::test]
async fn ten_megabytes_of_head_are_not_read() {
    for line in [format!("x-filler: {}\r\n", "y".repeat(1000)), "y".repeat(10_000), "a: b\r\n".to_owned()] {
        let receiver = Receiver::start(move |mut wire| {
            let line = line.clone();
            async move {
                wire.request().await;
                let _ = wire.write(b"HTTP/1.1 200 OK\r\nx: ").await;
                for _ in 0..10_000_000 / line.len() {
                    if wire.write(line.as_bytes()).await.is_err() {
                        break;
                    }
                }
            }
        })
        .await;
        let delivery = delivery();
        let watch = Clock::system().stopwatch();
        let outcome = deliver(&delivery, &receiver.url).await;
        assert!(watch.elapsed() < SLACK, "the deadline had to end it");
        assert_ended(&receiver, &delivery, &outcome, Class::BadAnswer, "head is larger").await;
    }
}

#[tokio::test]
async fn endless_interim_answers_are_ended_by_the_deadline() {
    let receiver = Receiver::start(|mut wire| async move {
        wire.request().await;
        wire.flood(&b"HTTP/1.1 100 Continue\r\n\r\n".repeat(500)).await;
    })
    .await;
    let delivery = delivery();
    let outcome = deliver_soon(&delivery, &receiver.url).await;
    assert_ended(&receiver, &delivery, &outcome, Class::Timeout, "no answer").await;
}

#[tokio::test]
async fn garbage_is_a_bad_answer() {
    for garbage in [
        "hello, world\r\n\r\n",
        "SSH-2.0-OpenSSH_9.2\r\n",
        "HTTP/1.1 abc OK\r\n\r\n",
        "HTTP/1.1 200 OK\r\ncontent-length: -5\r\n\r\n",
        "HTTP/1.1 200 OK\r\ncontent-length: 5\r\ncontent-length: 6\r\n\r\nhello",
        "HTTP/1.1 200 OK\r\nbad header\r\n\r\n",
        "HTTP/2.0 200 OK\r\n\r\n",
        "\0\u{1}\u{2}\u{3}\u{4}\u{5}",
    ] {
        let receiver = Receiver::answering(garbage).await;
        let delivery = delivery();
        let outcome = deliver(&delivery, &receiver.url).await;
        assert_ended(&receiver, &delivery, &outcome, Class::BadAnswer, "not HTTP").await;
    }
}

#[tokio::test]
async fn a_connection_that_breaks_before_the_answer_is_a_reset() {
    let closes = Receiver::start(|mut wire| async move {
        wire.request().await;
    })
    .await;
    let resets = Receiver::start(|mut wire| async move {
        wire.request().await;
        wire.reset();
    })
    .await;
    let half_a_head = Receiver::answering_once("HTTP/1.1 200 O").await;
    for (receiver, why) in [(closes, "closed"), (resets, "reset"), (half_a_head, "closed")] {
        let delivery = delivery();
        let outcome = deliver(&delivery, &receiver.url).await;
        assert_ended(&receiver, &delivery, &outcome, Class::Reset, why).await;
        assert_eq!(receiver.accepted(), 1, "it must not be sent again");
    }
}

#[tokio::test]
async fn closing_at_once_is_no_answer() {
    let receiver = Receiver::start(|wire| async move { wire.reset() }).await;
    let outcome = deliver(&delivery(), &receiver.url).await;
    // Which of both depends on whether the request was faster than the close.
    assert!(matches!(outcome.class, Class::Reset | Class::Refused), "{outcome:?}");
}

#[tokio::test]
async fn an_answer_before_the_request_was_read_counts() {
    let receiver = Receiver::start(|mut wire| async move {
        let mut some = [0; 1024];
        let _ = wire.stream.read(&mut some).await;
        let _ = wire.write(b"HTTP/1.1 413 Too Large\r\ncontent-length: 3\r\n\r\nbig").await;
        wire.until_closed().await;
    })
    .await;
    let large = Ticket { content: "x".repeat(20_000_000), ..ticket(7) };
    let delivery = delivery();
    let outcome = delivery.deliver(&large, &endpoint(&receiver.url, 10 * SLACK)).await.unwrap();
    assert_eq!((outcome.status, outcome.answer.as_str()), (Some(413), "big"));
    assert_ended(&receiver, &delivery, &outcome, Class::Rejected, "").await;
}

#[tokio::test]
async fn nobody_there_is_refused() {
    let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/", listener.local_addr().unwrap());
    drop(listener);
    let outcome = deliver(&delivery(), &url).await;
    assert_eq!(outcome.class, Class::Refused);
    assert_eq!(outcome.error.as_deref(), Some("connection refused"));
    assert_eq!(outcome.times.head_us, 0);
}

#[tokio::test]
async fn a_name_that_does_not_exist_is_refused() {
    let delivery = delivery();
    for _ in 0..3 {
        let outcome = deliver(&delivery, "http://nobody.invalid/").await;
        assert_eq!(outcome.class, Class::Refused);
        assert!(outcome.error.as_ref().unwrap().contains("`nobody.invalid`"), "{outcome:?}");
    }
}

#[tokio::test]
async fn a_forbidden_address_is_refused_without_a_connection() {
    let options = DeliveryOptions { refuse_link_local: true, ..DeliveryOptions::default() };
    let delivery = with_options(Clock::system(), options);
    for url in ["http://169.254.169.254/latest", "http://[::ffff:169.254.169.254]/", "http://0xa9fea9fe/"] {
        let outcome = deliver(&delivery, url).await;
        assert_eq!(outcome.class, Class::Refused);
        assert!(outcome.error.as_ref().unwrap().contains("169.254.169.254 is link-local"), "{outcome:?}");
    }
}

#[tokio::test]
async fn a_full_backlog_is_refused_at_the_deadline() {
    // Nobody accepts, and the backlog is one connection long: further handshakes get no answer.
    let socket = tokio::net::TcpSocket::new_v4().unwrap();
    socket.bind("127.0.0.1:0".parse().unwrap()).unwrap();
    let listener = socket.listen(0).unwrap();
    let address = listener.local_addr().unwrap();
    let mut waiting = Vec::new();
    while let Ok(Ok(stream)) = tokio::time::timeout(DEADLINE, tokio::net::TcpStream::connect(address)).await {
        waiting.push(stream);
    }
    let outcome = deliver_soon(&delivery(), &format!("http://{address}/")).await;
    assert_eq!(outcome.class, Class::Refused);
    assert_eq!(outcome.error.as_deref(), Some("no connection within 300ms"));
    assert!(outcome.times.connect_us >= 200_000, "{:?}", outcome.times);
}

#[tokio::test]
async fn giving_up_on_a_try_closes_its_connection() {
    let receiver = Receiver::start(|mut wire| async move { wire.until_closed().await }).await;
    let url = receiver.url.clone();
    let delivery = Arc::new(delivery());
    let trying = Arc::clone(&delivery);
    let task = tokio::spawn(async move { deliver(&trying, &url).await });
    receiver.until_open(1).await;
    task.abort();
    receiver.until_open(0).await;
    assert_eq!(idle(&delivery), 0);
}
