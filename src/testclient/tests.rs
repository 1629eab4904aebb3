//! The test client, asked by a real delivery and by hand.

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use super::*;
use crate::delivery::{Delivery, DeliveryOptions};
use crate::message::{Class, Outcome};
use crate::store::Endpoint;
use crate::ticket::Ticket;

struct Client {
    url: String,
    seen: mpsc::UnboundedReceiver<Seen>,
    stop: CancellationToken,
    running: JoinHandle<TestClientSummary>,
}

async fn start(options: TestClientOptions) -> Client {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let url = format!("http://{}/any/path", listener.local_addr().unwrap());
    let (sender, seen) = mpsc::unbounded_channel();
    let sink: Sink = Arc::new(move |one| sender.send(one).unwrap());
    let options = TestClientOptions { quiet: true, sink: Some(sink), ..options };
    let stop = CancellationToken::new();
    let running = tokio::spawn(run(listener, options, stop.clone()));
    Client { url, seen, stop, running }
}

impl Client {
    async fn stop(self) -> TestClientSummary {
        self.stop.cancel();
        self.running.await.unwrap()
    }
}

fn delivery() -> Delivery {
    let installation = Uuid::parse_str("0123456789abcdef0123456789abcdef").unwrap();
    Delivery::new(Clock::system(), installation, DeliveryOptions::default()).unwrap()
}

async fn send(delivery: &Delivery, url: &str, id: i64) -> Outcome {
    let ticket = Ticket { attempt: 3, ..crate::ticket::tests::ticket(id) };
    let endpoint = Endpoint { timeout: Duration::from_millis(300), ..Endpoint::new("default", url) };
    delivery.deliver(&ticket, &endpoint).await.unwrap()
}

#[tokio::test]
async fn it_accepts_and_tells_what_it_saw() {
    let mut client = start(TestClientOptions::default()).await;
    let delivery = delivery();
    for id in 1..=3 {
        let outcome = send(&delivery, &client.url, id).await;
        assert_eq!((outcome.class, outcome.status), (Class::Accepted, Some(200)));
        assert_eq!(outcome.provider_message.as_deref(), Some("Accepted"));
        let message_id = outcome.provider_message_id.unwrap();
        assert_eq!(Uuid::parse_str(&message_id).unwrap().get_version_num(), 4);
        let seen = client.seen.recv().await.unwrap();
        assert_eq!(seen.id, id);
        assert_eq!(seen.webhook_id, format!("msg_0123456789ab_{id}"));
        assert_eq!((seen.attempt, seen.recipient.as_str(), seen.status), (3, "+90", 200));
        assert!(seen.at > Timestamp::EPOCH);
    }
    let summary = client.stop().await;
    assert_eq!((summary.accepted, summary.failed, summary.hung), (3, 0, 0));
}

#[tokio::test]
async fn it_fails_as_told() {
    let options = TestClientOptions {
        error_rate: 1.0,
        status: 429,
        retry_after: Some(Duration::from_millis(1500)),
        ..TestClientOptions::default()
    };
    let client = start(options).await;
    let outcome = send(&delivery(), &client.url, 1).await;
    assert_eq!((outcome.class, outcome.status), (Class::Rejected, Some(429)));
    assert_eq!(outcome.retry_after_ms, Some(2_000));
    assert_eq!(outcome.provider_message_id, None);
    assert_eq!(client.stop().await.failed, 1);
}

#[tokio::test]
async fn it_fails_about_the_share_it_was_told() {
    let options = TestClientOptions { error_rate: 0.25, ..TestClientOptions::default() };
    let client = start(options).await;
    let delivery = delivery();
    for id in 0..400 {
        send(&delivery, &client.url, id).await;
    }
    let summary = client.stop().await;
    assert_eq!(summary.accepted + summary.failed, 400);
    // Fewer or more would be six standard deviations away.
    assert!((48..=152).contains(&summary.failed), "{summary:?}");
}

#[tokio::test]
async fn it_hangs_as_told_and_stops_all_the_same() {
    let options = TestClientOptions { hang: 1.0, ..TestClientOptions::default() };
    let mut client = start(options).await;
    assert_eq!(send(&delivery(), &client.url, 1).await.class, Class::Timeout);
    assert_eq!(client.seen.recv().await.unwrap().status, 0);
    let url = client.url.clone();
    let waiting = tokio::spawn(async move { send(&delivery(), &url, 2).await });
    client.seen.recv().await.unwrap();
    assert_eq!(client.stop().await.hung, 2);
    assert_ne!(waiting.await.unwrap().class, Class::Accepted);
}

#[tokio::test]
async fn it_answers_late_as_told() {
    let options = TestClientOptions { latency: Duration::from_millis(50), ..TestClientOptions::default() };
    let client = start(options).await;
    let outcome = send(&delivery(), &client.url, 1).await;
    assert_eq!(outcome.class, Class::Accepted);
    assert!(outcome.times.head_us >= 50_000, "{:?}", outcome.times);
}

#[tokio::test]
async fn only_posts_are_messages() {
    let mut client = start(TestClientOptions::default()).await;
    let address = client.url.strip_prefix("http://").unwrap().split('/').next().unwrap().to_owned();
    let mut stream = TcpStream::connect(address).await.unwrap();
    let request = b"GET / HTTP/1.1\r\nhost: x\r\nconnection: close\r\n\r\n";
    stream.write_all(request).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    assert!(answer.starts_with("HTTP/1.1 405"), "{answer}");
    assert!(client.seen.try_recv().is_err());
}

#[test]
fn options_are_checked() {
    let default = TestClientOptions::default();
    assert_eq!(default.check(), Ok(()));
    for (options, why) in [
        (TestClientOptions { error_rate: 1.5, ..default.clone() }, "error_rate is 1.5"),
        (TestClientOptions { error_rate: f64::NAN, ..default.clone() }, "error_rate is NaN"),
        (TestClientOptions { hang: -0.1, ..default.clone() }, "hang is -0.1"),
        (TestClientOptions { status: 99, ..default.clone() }, "status is 99"),
    ] {
        let error = options.check().unwrap_err();
        assert!(error.starts_with(why), "{error}");
    }
}
