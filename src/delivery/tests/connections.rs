//! Kept connections: used again, never trusted.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::receiver::Receiver;
use super::*;

const OK: &str = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";

#[tokio::test]
async fn a_connection_is_used_again() {
    let receiver = Receiver::answering(OK).await;
    let delivery = delivery();
    for i in 0..10 {
        let outcome = deliver(&delivery, &receiver.url).await;
        assert_eq!(outcome.class, Class::Accepted);
        assert_eq!(outcome.times.connect_us == 0, i > 0, "{:?}", outcome.times);
    }
    assert_eq!((receiver.accepted(), receiver.requests().len()), (1, 10));
    assert_eq!(idle(&delivery), 1);
}

#[tokio::test]
async fn a_kept_connection_that_was_closed_is_replaced_silently() {
    let closes = Receiver::answering_once(OK).await;
    let resets = Receiver::start(|mut wire| async move {
        wire.request().await;
        let _ = wire.write(OK.as_bytes()).await;
        wire.reset();
    })
    .await;
    for receiver in [closes, resets] {
        let delivery = delivery();
        for tries in 1..=5 {
            let outcome = deliver(&delivery, &receiver.url).await;
            assert_eq!(outcome.class, Class::Accepted, "{outcome:?}");
            // Closed between two deliveries.
            receiver.until_open(0).await;
            assert_eq!((receiver.accepted(), receiver.requests().len()), (tries, tries));
        }
    }
}

#[tokio::test]
async fn a_request_that_may_have_been_written_is_not_sent_again() {
    let receiver = Receiver::start(|mut wire| async move {
        wire.request().await;
        let _ = wire.write(OK.as_bytes()).await;
        // Takes the second request, and dies.
        wire.request().await;
        wire.reset();
    })
    .await;
    let delivery = delivery();
    assert_eq!(deliver(&delivery, &receiver.url).await.class, Class::Accepted);
    assert_eq!(deliver(&delivery, &receiver.url).await.class, Class::Reset);
    assert_eq!((receiver.accepted(), receiver.requests().len()), (1, 2));
    assert_eq!(idle(&delivery), 0);
}

#[tokio::test]
async fn an_answer_that_nobody_asked_for_is_not_taken_for_the_next() {
    let receiver = Receiver::start(|mut wire| async move {
        while wire.request().await.is_some() {
            let _ = wire.write(OK.as_bytes()).await;
            let _ = wire.write(b"HTTP/1.1 500 Smuggled\r\ncontent-length: 0\r\n\r\n").await;
        }
    })
    .await;
    let delivery = delivery();
    for _ in 0..3 {
        assert_eq!(deliver(&delivery, &receiver.url).await.status, Some(200));
        // The rest has arrived by the time that another connection has come and gone.
        let other = Receiver::answering_once("HTTP/1.1 204 No Content\r\n\r\n").await;
        deliver(&with_options(Clock::system(), DeliveryOptions::default()), &other.url).await;
    }
}

#[tokio::test]
async fn old_connections_are_closed() {
    let clock = Clock::manual(Timestamp::EPOCH);
    let delivery = with_options(clock.clone(), DeliveryOptions::default());
    let [busy, forgotten] = [Receiver::answering(OK).await, Receiver::answering(OK).await];
    deliver(&delivery, &forgotten.url).await;
    deliver(&delivery, &busy.url).await;
    clock.advance(Duration::from_secs(29));
    deliver(&delivery, &busy.url).await;
    assert_eq!(busy.accepted(), 1);
    clock.advance(Duration::from_secs(6));
    // Nothing is delivered meanwhile; the timer closes what is too old, of all origins.
    sweep(&delivery).await;
    forgotten.until_open(0).await;
    assert_eq!((busy.accepted(), idle(&delivery)), (1, 1));
    clock.advance(Duration::from_secs(31));
    deliver(&delivery, &busy.url).await;
    busy.until_open(1).await;
    assert_eq!((busy.accepted(), idle(&delivery)), (2, 1));
}

#[tokio::test]
async fn a_connection_is_left_before_the_receiver_leaves_it() {
    let receiver =
        Receiver::answering("HTTP/1.1 200 OK\r\nkeep-alive: timeout=5\r\ncontent-length: 0\r\n\r\n").await;
    let clock = Clock::manual(Timestamp::EPOCH);
    let delivery = with_options(clock.clone(), DeliveryOptions::default());
    for (wait, connections) in [(0, 1), (3, 1), (4, 2)] {
        clock.advance(Duration::from_secs(wait));
        deliver(&delivery, &receiver.url).await;
        assert_eq!(receiver.accepted(), connections, "after {wait} s");
    }
}

#[tokio::test]
async fn idle_connections_are_bounded() {
    let receiver = Receiver::answering(OK).await;
    let options = DeliveryOptions { idle_max: 2, ..DeliveryOptions::default() };
    let delivery = Arc::new(with_options(Clock::system(), options));
    let mut tries = tokio::task::JoinSet::new();
    for _ in 0..20 {
        let (delivery, url) = (Arc::clone(&delivery), receiver.url.clone());
        tries.spawn(async move { deliver(&delivery, &url).await.class });
    }
    assert_eq!(tries.join_all().await, [Class::Accepted; 20]);
    assert!(idle(&delivery) <= 2);
    receiver.until_open(idle(&delivery)).await;
    drop(delivery);
    receiver.until_open(0).await;
}

/// As a receiver with a bound on requests for each connection does, but rudely: without saying so.
#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_tries_over_connections_that_close_arrive_once_each() {
    let receiver = Receiver::start(|mut wire| async move {
        for _ in 0..5 {
            if wire.request().await.is_none() {
                return;
            }
            let _ = wire.write(OK.as_bytes()).await;
        }
    })
    .await;
    let delivery = Arc::new(delivery());
    let accepted = Arc::new(AtomicUsize::new(0));
    let mut clients = tokio::task::JoinSet::new();
    for client in 0..8 {
        let (delivery, url, accepted) = (Arc::clone(&delivery), receiver.url.clone(), Arc::clone(&accepted));
        clients.spawn(async move {
            for i in 0..50 {
                let endpoint = endpoint(&url, 10 * SLACK);
                let outcome = delivery.deliver(&ticket(client * 1000 + i), &endpoint).await.unwrap();
                // The close may cross a request; that one is a failed try, and nothing else may be.
                assert!(matches!(outcome.class, Class::Accepted | Class::Reset), "{outcome:?}");
                accepted.fetch_add(usize::from(outcome.class == Class::Accepted), Ordering::Relaxed);
            }
        });
    }
    clients.join_all().await;
    assert_eq!(receiver.requests().len(), accepted.load(Ordering::Relaxed));
    assert!(accepted.load(Ordering::Relaxed) >= 300);
}

#[tokio::test]
async fn a_name_with_several_addresses_is_tried_at_each() {
    // Where `localhost` is ::1 as well, nothing listens there.
    let receiver = Receiver::answering(OK).await;
    let outcome = deliver(&delivery(), &format!("http://localhost:{}/", receiver.port)).await;
    assert_eq!(outcome.class, Class::Accepted, "{outcome:?}");
}

/// A connector over this `dial`, and what it comes to for an origin with these ports as addresses.
async fn connect_to(ports: &[u16], dial: connect::Dial) -> Result<(), connect::NotConnected> {
    let clock = Clock::manual(Timestamp::EPOCH);
    let origin = Target::parse("http://several.example/").unwrap().origin;
    let names = Arc::new(names::AddressCache::default());
    let addresses = ports.iter().map(|port| ([127, 0, 0, 1], *port).into()).collect();
    names.learn(&Ok(addresses), &clock.stopwatch());
    let connector = Connector::new(None, AddressRule::default(), clock.stopwatch()).unwrap().dialling(dial);
    let permit = budget::Budget::new(1).take(&Arc::default()).unwrap();
    connector.connect(&origin, &names, permit).await.map(drop)
}

/// A dead address is passed by after a quarter of a second, whatever the deadline is, and one that refuses at once.
#[tokio::test]
async fn the_next_address_is_tried_beside_one_that_does_not_answer() {
    let receiver = Receiver::answering(OK).await;
    let good = receiver.port;
    // Port 1 never answers, port 2 refuses, port 3 takes a third of a second and is good then.
    for (ports, least_ms) in [
        (vec![good], 0),
        (vec![2, 2, good], 0),
        (vec![1, good], 250),
        (vec![1, 1, good], 500),
        (vec![1, 2, good], 250),
        (vec![3, 1], 333),
    ] {
        let dial: connect::Dial = Box::new(move |address| {
            Box::pin(async move {
                match address.port() {
                    1 => std::future::pending().await,
                    2 => Err(std::io::Error::from_raw_os_error(111)),
                    3 => {
                        let wait = Duration::from_millis(333);
                        let _ = tokio::time::timeout(wait, std::future::pending::<()>()).await;
                        tokio::net::TcpStream::connect(("127.0.0.1", good)).await
                    }
                    _ => tokio::net::TcpStream::connect(address).await,
                }
            })
        });
        let watch = Clock::system().stopwatch();
        connect_to(&ports, dial).await.unwrap();
        let took = watch.elapsed().as_millis();
        assert!((least_ms..least_ms + 1_000).contains(&took), "{ports:?} took {took} ms");
    }
}

#[tokio::test(start_paused = true)]
async fn at_most_two_addresses_of_a_name_are_tried_at_once() {
    let (open, most) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(0)));
    struct Open(Arc<AtomicUsize>);
    impl Drop for Open {
        fn drop(&mut self) {
            self.0.fetch_sub(1, Ordering::Relaxed);
        }
    }
    let (now, peak) = (Arc::clone(&open), Arc::clone(&most));
    let dial: connect::Dial = Box::new(move |_| {
        peak.fetch_max(now.fetch_add(1, Ordering::Relaxed) + 1, Ordering::Relaxed);
        let held = Open(Arc::clone(&now));
        Box::pin(async move {
            let _held = held;
            std::future::pending().await
        })
    });
    let all = connect_to(&[1, 2, 3, 4, 5], dial);
    assert!(tokio::time::timeout(Duration::from_secs(8), all).await.is_err(), "none of them answers");
    assert_eq!((most.load(Ordering::Relaxed), open.load(Ordering::Relaxed)), (2, 0));
}
