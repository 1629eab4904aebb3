//! The network delivery against receivers of every kind.

mod answers;
mod calls;
mod connections;
mod hostile;
mod receiver;
mod shortages;
mod tls;

use super::*;

/// Long enough for a busy machine, short enough for a test that waits for it.
const DEADLINE: Duration = Duration::from_millis(300);

/// What a busy machine may take beyond a deadline.
const SLACK: Duration = Duration::from_secs(3);

/// The second try of a message.
pub(super) fn ticket(id: i64) -> Ticket {
    Ticket {
        recipient: "+905551111111".into(),
        content: "Hi \"there\"".into(),
        created_at: Timestamp::parse("2026-11-23T09:59:59Z").unwrap(),
        attempt: 2,
        ..crate::ticket::tests::ticket(id)
    }
}

fn endpoint(url: &str, timeout: Duration) -> Endpoint {
    Endpoint { timeout, ..Endpoint::new("default", url) }
}

fn delivery() -> Delivery {
    with_options(Clock::system(), DeliveryOptions::default())
}

fn with_options(clock: Clock, options: DeliveryOptions) -> Delivery {
    let installation = Uuid::parse_str("0123456789abcdef0123456789abcdef").unwrap();
    Delivery::new(clock, installation, options).unwrap()
}

/// A delivery whose TCP connections are opened as `dial` says.
fn dialling(dial: connect::Dial) -> Delivery {
    let (clock, options) = (Clock::system(), DeliveryOptions::default());
    let connector = Connector::new(None, AddressRule::default(), clock.stopwatch()).unwrap();
    Delivery::over(connector.dialling(dial), clock.stopwatch(), clock, Uuid::nil(), &options)
}

/// Delivers with a deadline that only a defect reaches.
async fn deliver(delivery: &Delivery, url: &str) -> Outcome {
    delivery.deliver(&ticket(7), &endpoint(url, 10 * SLACK)).await.unwrap()
}

/// Delivers with the short deadline, and asserts that it was kept.
async fn deliver_soon(delivery: &Delivery, url: &str) -> Outcome {
    let watch = Clock::system().stopwatch();
    let outcome = delivery.deliver(&ticket(7), &endpoint(url, DEADLINE)).await.unwrap();
    assert!(watch.elapsed() < DEADLINE + SLACK, "took {:?}", watch.elapsed());
    outcome
}

fn network(delivery: &Delivery) -> &Network {
    match &delivery.transport {
        Transport::Network(network) => network,
        Transport::Script(_) => panic!("a script has no network"),
    }
}

/// How many connections a delivery keeps.
fn idle(delivery: &Delivery) -> usize {
    network(delivery).pool.idle()
}

/// What its timer does every few seconds.
async fn sweep(delivery: &Delivery) {
    let network = network(delivery);
    network.pool.sweep(network.watch.elapsed()).await;
}

#[tokio::test]
async fn a_script_stands_in_for_the_network() {
    let script: Script = Arc::new(|ticket, endpoint| {
        Box::pin(async move {
            let progress = Progress { status: Some(202), ..Progress::new(Duration::ZERO) };
            Ok(outcome(&endpoint, ticket.created_at, progress, Ok(())))
        })
    });
    let delivery = Delivery::scripted(Clock::system(), script);
    let outcome = deliver(&delivery, "http://localhost/").await;
    assert_eq!((outcome.class, outcome.status), (Class::Accepted, Some(202)));
}
