//! Answers that HTTP allows, ordinary and odd.

use super::receiver::Receiver;
use super::*;

#[tokio::test]
async fn an_accepted_message_is_told_whole() {
    let body = r#"{"message":"Accepted","messageId":"m-1"}"#;
    let head = "HTTP/1.1 202 Accepted\r\ncontent-type: application/json\r\n";
    let receiver = Receiver::answering(format!("{head}content-length: {}\r\n\r\n{body}", body.len())).await;
    let outcome = deliver(&delivery(), &receiver.url).await;
    assert_eq!((outcome.class, outcome.status), (Class::Accepted, Some(202)));
    assert_eq!(outcome.answer, body);
    assert_eq!(outcome.provider_message_id.as_deref(), Some("m-1"));
    assert_eq!(outcome.provider_message.as_deref(), Some("Accepted"));
    assert_eq!(outcome.address, receiver.url);
    assert_eq!((outcome.error, outcome.retry_after_ms), (None, None));
    assert!(outcome.times.connect_us > 0 && outcome.times.head_us > 0, "{:?}", outcome.times);
    assert!(outcome.started_at > Timestamp::EPOCH);
    let requests = receiver.requests();
    assert_eq!(requests.len(), 1);
    assert!(requests[0].starts_with("POST /hook HTTP/1.1\r\nhost: 127.0.0.1:"), "{}", requests[0]);
    assert!(requests[0].contains("\r\nwebhook-id: msg_0123456789ab_7\r\n"), "{}", requests[0]);
}

#[tokio::test]
async fn the_signature_covers_the_bytes_that_arrive() {
    let receiver = Receiver::answering("HTTP/1.1 204 No Content\r\n\r\n").await;
    let secret = "whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw";
    let signed = Endpoint { secret: Some(secret.into()), ..endpoint(&receiver.url, SLACK) };
    delivery().deliver(&ticket(7), &signed).await.unwrap();
    let request = receiver.requests().remove(0);
    let (head, body) = request.split_once("\r\n\r\n").unwrap();
    let header = |name: &str| {
        let found = head.lines().find_map(|line| line.strip_prefix(&format!("{name}: ")));
        found.unwrap_or_else(|| panic!("no {name} in {head}"))
    };
    let (id, timestamp) = (header("webhook-id").as_bytes(), header("webhook-timestamp").as_bytes());
    let expected = Key::parse(secret).unwrap().sign(id, timestamp, body.as_bytes());
    assert_eq!(header("webhook-signature"), expected);
}

#[tokio::test]
async fn a_refusal_is_told_with_its_wait() {
    let receiver =
        Receiver::answering("HTTP/1.1 503 Busy\r\nretry-after: 30\r\ncontent-length: 4\r\n\r\nbusy").await;
    let outcome = deliver(&delivery(), &receiver.url).await;
    assert_eq!((outcome.class, outcome.status), (Class::Rejected, Some(503)));
    assert_eq!((outcome.answer.as_str(), outcome.retry_after_ms), ("busy", Some(30_000)));
    assert_eq!(outcome.error, None);
}

#[tokio::test]
async fn a_wait_is_obeyed_only_of_failures() {
    let receiver =
        Receiver::answering("HTTP/1.1 200 OK\r\nretry-after: 30\r\ncontent-length: 0\r\n\r\n").await;
    assert_eq!(deliver(&delivery(), &receiver.url).await.retry_after_ms, None);
}

#[tokio::test]
async fn a_redirect_is_never_followed() {
    let other = Receiver::answering("HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await;
    for status in [301, 302, 303, 307, 308] {
        let answer =
            format!("HTTP/1.1 {status} Gone\r\nlocation: {}\r\ncontent-length: 0\r\n\r\n", other.url);
        let receiver = Receiver::answering(answer).await;
        let outcome = deliver(&delivery(), &receiver.url).await;
        assert_eq!((outcome.class, outcome.status), (Class::Rejected, Some(status)));
        assert!(outcome.error.unwrap().contains("redirects"));
    }
    assert_eq!(other.accepted(), 0);
}

/// Every way in which HTTP ends a body.
#[tokio::test]
async fn bodies_end_in_many_ways() {
    let chunked = "transfer-encoding: chunked\r\n\r\n5\r\nhello\r\n6;x=y\r\n world\r\n0\r\n";
    for (answer, body, kept) in [
        ("HTTP/1.1 200 OK\r\ncontent-length: 11\r\n\r\nhello world".to_owned(), "hello world", 1),
        (format!("HTTP/1.1 200 OK\r\n{chunked}\r\n"), "hello world", 1),
        (format!("HTTP/1.1 200 OK\r\n{chunked}x-trailer: 1\r\n\r\n"), "hello world", 1),
        ("HTTP/1.1 204 No Content\r\n\r\n".to_owned(), "", 1),
        ("HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n".to_owned(), "", 1),
        ("HTTP/1.1 200 OK\r\nconnection: close\r\ncontent-length: 2\r\n\r\nok".to_owned(), "ok", 0),
        ("HTTP/1.0 200 OK\r\ncontent-length: 2\r\n\r\nok".to_owned(), "ok", 0),
        ("HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok".to_owned(), "ok", 1),
        (
            "HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\nHTTP/1.1 102 Processing\r\n\r\nHTTP/1.1 200 OK\r\n\
             content-length: 2\r\n\r\nok"
                .to_owned(),
            "ok",
            1,
        ),
    ] {
        let receiver = Receiver::answering(answer.clone()).await;
        let delivery = delivery();
        let outcome = deliver(&delivery, &receiver.url).await;
        assert_eq!((outcome.class, outcome.answer.as_str()), (Class::Accepted, body), "{answer}");
        assert_eq!(idle(&delivery), kept, "{answer}");
        receiver.until_open(kept).await;
    }
}

#[tokio::test]
async fn a_body_may_end_with_its_connection() {
    for version in ["HTTP/1.0", "HTTP/1.1"] {
        let receiver = Receiver::answering_once(format!("{version} 200 OK\r\n\r\n{{\"messageId\":9}}")).await;
        let delivery = delivery();
        let outcome = deliver(&delivery, &receiver.url).await;
        assert_eq!((outcome.class, outcome.status), (Class::Accepted, Some(200)));
        assert_eq!(outcome.provider_message_id.as_deref(), Some("9"));
        assert_eq!(idle(&delivery), 0);
    }
}

#[tokio::test]
async fn what_can_not_be_asked_for_makes_no_connection() {
    let receiver = Receiver::answering("HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await;
    let good = endpoint(&receiver.url, SLACK);
    let bad_secret = Endpoint { secret: Some("secret".into()), ..good.clone() };
    let bad_url = Endpoint { url: "ftp://localhost/".into(), ..good.clone() };
    let with_user = Endpoint { url: "http://user:planted@localhost/x".into(), ..good.clone() };
    let reserved = Ticket {
        headers: Some(serde_json::value::RawValue::from_string(r#"{"Host":"x"}"#.into()).unwrap()),
        ..ticket(7)
    };
    for (ticket, endpoint, why) in [
        (&ticket(7), &bad_secret, "`default` does not begin with `whsec_`"),
        (&ticket(7), &bad_url, "scheme is neither http nor https"),
        (&ticket(7), &with_user, "a user name or password"),
        (&reserved, &good, "`host`"),
    ] {
        let outcome = delivery().deliver(ticket, endpoint).await.unwrap();
        assert_eq!((outcome.class, outcome.status), (Class::Invalid, None));
        assert!(outcome.error.as_ref().unwrap().contains(why), "{outcome:?}");
        assert_eq!(outcome.address, endpoint.url.replace("user:planted", "(hidden)"));
    }
    assert_eq!(receiver.accepted(), 0);
}

#[tokio::test]
async fn a_changed_endpoint_takes_effect_at_once() {
    let [first, second] = [
        Receiver::answering("HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await,
        Receiver::answering("HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await,
    ];
    let delivery = delivery();
    for (url, requests) in [(&first.url, [1, 0]), (&second.url, [1, 1]), (&first.url, [2, 1])] {
        deliver(&delivery, url).await;
        assert_eq!([first.requests().len(), second.requests().len()], requests);
    }
}
