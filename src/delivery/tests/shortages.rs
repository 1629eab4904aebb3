//! What this process is short of is no attempt; and what it may have open is bounded, in use and idle.

use std::io;
use std::sync::atomic::{AtomicUsize, Ordering};

use futures_util::FutureExt;

use super::receiver::Receiver;
use super::*;
use crate::shortage::Resource;

const OK: &str = "HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok";

/// Delivers, and tells what this process was short of.
async fn short(delivery: &Delivery, url: &str) -> Option<Resource> {
    let tried = delivery.deliver(&ticket(7), &endpoint(url, 10 * SLACK)).await;
    tried.err().map(|shortage| shortage.of)
}

fn bounded(connections_max: usize, idle_total_max: usize, clock: &Clock) -> Delivery {
    let options = DeliveryOptions { connections_max, idle_total_max, ..DeliveryOptions::default() };
    with_options(clock.clone(), options)
}

#[tokio::test]
async fn an_error_of_our_own_is_no_attempt_and_one_of_the_receivers_is() {
    for (code, name, of) in [
        (24, "EMFILE", Some(Resource::Descriptors)),
        (23, "ENFILE", Some(Resource::Descriptors)),
        (99, "EADDRNOTAVAIL", Some(Resource::Ports)),
        (98, "EADDRINUSE", Some(Resource::Ports)),
        (105, "ENOBUFS", Some(Resource::Memory)),
        (12, "ENOMEM", Some(Resource::Memory)),
        (11, "EAGAIN", Some(Resource::Memory)),
        (111, "ECONNREFUSED", None),
        (113, "EHOSTUNREACH", None),
    ] {
        let delivery =
            dialling(Box::new(move |_| std::future::ready(Err(io::Error::from_raw_os_error(code))).boxed()));
        for url in ["http://127.0.0.1:9/", "http://localhost:9/"] {
            assert_eq!(short(&delivery, url).await, of, "{name} at {url}");
        }
        if of.is_none() {
            assert_eq!(deliver(&delivery, "http://127.0.0.1:9/").await.class, Class::Refused, "{name}");
        }
        assert_eq!(network(&delivery).pool.open(), 0, "{name}: what was not opened is given back");
    }
}

#[tokio::test]
async fn deliveries_go_on_when_the_shortage_is_over() {
    let receiver = Receiver::answering(OK).await;
    let failures = Arc::new(AtomicUsize::new(3));
    let delivery = dialling(Box::new(move |address| {
        let fails = failures.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1));
        async move {
            match fails {
                Ok(_) => Err(io::Error::from_raw_os_error(24)),
                Err(_) => tokio::net::TcpStream::connect(address).await,
            }
        }
        .boxed()
    }));
    for _ in 0..3 {
        assert_eq!(short(&delivery, &receiver.url).await, Some(Resource::Descriptors));
    }
    assert_eq!(deliver(&delivery, &receiver.url).await.class, Class::Accepted);
    assert_eq!((receiver.accepted(), receiver.requests().len()), (1, 1));
}

/// Of several addresses the one that could not be tried may be the one that works.
#[tokio::test]
async fn an_address_that_could_not_be_tried_counts_for_more_than_one_that_refuses() {
    use connect::NotConnected;
    use names::AddressCache;
    let clock = Clock::manual(Timestamp::EPOCH);
    let origin = Target::parse("http://two.example/").unwrap().origin;
    let names = Arc::new(AddressCache::default());
    names.learn(&Ok(vec![([127, 0, 0, 1], 1).into(), ([127, 0, 0, 1], 2).into()]), &clock.stopwatch());
    for (codes, of) in
        [([24, 111], Some(Resource::Descriptors)), ([111, 99], Some(Resource::Ports)), ([111, 113], None)]
    {
        let connector = Connector::new(None, AddressRule::default(), clock.stopwatch()).unwrap();
        let connector = connector.dialling(Box::new(move |address| {
            let code = codes[usize::from(address.port()) - 1];
            std::future::ready(Err(io::Error::from_raw_os_error(code))).boxed()
        }));
        let permit = budget::Budget::new(1).take(&Arc::default()).unwrap();
        let why = connector.connect(&origin, &names, permit).await.err().unwrap();
        let short = match why {
            NotConnected::Short(shortage) => Some(shortage.of),
            NotConnected::Refused(_) => None,
        };
        assert_eq!(short, of, "{codes:?}");
    }
}

#[tokio::test]
async fn a_receiver_that_hangs_leaves_connections_to_the_others() {
    let hangs = Receiver::start(|mut wire| async move { wire.until_closed().await }).await;
    let healthy = Receiver::answering(OK).await;
    let delivery = Arc::new(bounded(4, 8, &Clock::system()));
    let mut tries = tokio::task::JoinSet::new();
    for _ in 0..2 {
        let (delivery, url) = (Arc::clone(&delivery), hangs.url.clone());
        tries.spawn(async move { deliver(&delivery, &url).await.class });
    }
    hangs.until_open(2).await;
    assert_eq!(short(&delivery, &hangs.url).await, Some(Resource::Descriptors), "half of them is its part");
    assert_eq!(hangs.accepted(), 2);
    for _ in 0..10 {
        assert_eq!(deliver(&delivery, &healthy.url).await.class, Class::Accepted);
    }
    tries.shutdown().await;
    hangs.until_open(0).await;
    assert_eq!(network(&delivery).pool.open(), 1, "the places of attempts that were given up are free");
}

#[tokio::test]
async fn idle_connections_make_room_for_other_receivers_the_oldest_first() {
    let clock = Clock::manual(Timestamp::EPOCH);
    // Either bound: on all that are open, and on the idle ones.
    for (connections_max, idle_total_max) in [(3, 100), (100, 3)] {
        let delivery = bounded(connections_max, idle_total_max, &clock);
        let mut receivers = Vec::new();
        for _ in 0..5 {
            clock.advance(Duration::from_millis(1));
            let receiver = Receiver::answering(OK).await;
            assert_eq!(deliver(&delivery, &receiver.url).await.class, Class::Accepted);
            receivers.push(receiver);
        }
        for (receiver, open) in receivers.iter().zip([0, 0, 1, 1, 1]) {
            receiver.until_open(open).await;
        }
        assert_eq!((idle(&delivery), network(&delivery).pool.open()), (3, 3));
        // What was closed is opened again.
        assert_eq!(deliver(&delivery, &receivers[0].url).await.class, Class::Accepted);
        receivers[2].until_open(0).await;
    }
}

/// A receiver that answers one request on each connection, and closes them all when it is told.
async fn closing_when_told() -> (Receiver, CancellationToken) {
    let close = CancellationToken::new();
    let closed = close.clone();
    let receiver = Receiver::start(move |mut wire| {
        let closed = closed.clone();
        async move {
            wire.request().await;
            let _ = wire.write(OK.as_bytes()).await;
            closed.cancelled().await;
        }
    });
    (receiver.await, close)
}

#[tokio::test]
async fn what_the_other_side_has_closed_is_closed_by_the_timer() {
    let clock = Clock::manual(Timestamp::EPOCH);
    let delivery = bounded(100, 100, &clock);
    let (closes, close) = closing_when_told().await;
    let stays = Receiver::answering(OK).await;
    deliver(&delivery, &closes.url).await;
    deliver(&delivery, &stays.url).await;
    close.cancel();
    closes.until_open(0).await;
    sweep(&delivery).await;
    assert_eq!(idle(&delivery), 2, "it was in use a moment ago");
    clock.advance(Duration::from_secs(1));
    sweep(&delivery).await;
    assert_eq!((idle(&delivery), network(&delivery).pool.open()), (1, 1));
    assert_eq!(stays.accepted(), 1);
    deliver(&delivery, &stays.url).await;
    assert_eq!(stays.accepted(), 1, "the sweep leaves what is open");
    clock.advance(Duration::from_secs(30));
    sweep(&delivery).await;
    stays.until_open(0).await;
    assert_eq!((idle(&delivery), network(&delivery).pool.open()), (0, 0));
}

/// More than a task may look at in one go.
#[tokio::test]
async fn a_sweep_sees_all_that_were_closed() {
    let clock = Clock::manual(Timestamp::EPOCH);
    let delivery = Arc::new(bounded(2_000, 2_000, &clock));
    let count = 300;
    let (together, close) = (Arc::new(tokio::sync::Barrier::new(count)), CancellationToken::new());
    let closed = close.clone();
    let receiver = Receiver::start(move |mut wire| {
        let (together, closed) = (Arc::clone(&together), closed.clone());
        async move {
            wire.request().await;
            // So that each request has a connection of its own.
            together.wait().await;
            let _ = wire.write(OK.as_bytes()).await;
            closed.cancelled().await;
        }
    })
    .await;
    let mut tries = tokio::task::JoinSet::new();
    for _ in 0..count {
        let (delivery, url) = (Arc::clone(&delivery), receiver.url.clone());
        tries.spawn(async move { deliver(&delivery, &url).await.class });
    }
    assert!(tries.join_all().await.iter().all(|class| *class == Class::Accepted));
    assert_eq!(idle(&delivery), count);
    close.cancel();
    receiver.until_open(0).await;
    clock.advance(Duration::from_secs(1));
    sweep(&delivery).await;
    assert_eq!(idle(&delivery), 0);
}

#[tokio::test]
async fn the_timer_runs_until_it_is_stopped() {
    let clock = Clock::manual(Timestamp::EPOCH);
    let delivery = Arc::new(bounded(100, 100, &clock));
    let receiver = Receiver::answering(OK).await;
    let (stop, tended) = (CancellationToken::new(), Arc::clone(&delivery));
    let stopped = stop.clone();
    let timer = tokio::spawn(async move { tended.tend(&stopped).await });
    for _ in 0..2 {
        deliver(&delivery, &receiver.url).await;
        assert_eq!(idle(&delivery), 1);
        clock.advance(Duration::from_secs(30));
        tokio::time::pause();
        tokio::time::advance(SWEEP).await;
        tokio::time::resume();
        receiver.until_open(0).await;
        assert_eq!(idle(&delivery), 0);
    }
    stop.cancel();
    timer.await.unwrap();
}
