//! Calls whose whole answer is wanted.

use bytes::Bytes;
use hyper::header::HeaderMap;
use hyper::{Method, StatusCode};

use super::receiver::Receiver;
use super::*;

async fn call(caller: &Caller, within: Duration) -> Result<Reply, CallError> {
    caller.call(Method::POST, "/v1/x?y=1", HeaderMap::new(), Bytes::from_static(b"{}"), within).await
}

fn caller(url: &str) -> Caller {
    Caller::new(url, None, &Clock::system()).unwrap()
}

#[tokio::test]
async fn calls_share_a_kept_connection_below_the_path_of_the_url() {
    let receiver = Receiver::answering("HTTP/1.1 202 Accepted\r\ncontent-length: 5\r\n\r\nhello").await;
    let caller = caller(&receiver.url);
    for _ in 0..3 {
        let reply = call(&caller, 10 * SLACK).await.unwrap();
        assert_eq!((reply.status, reply.body.as_slice()), (StatusCode::ACCEPTED, b"hello".as_slice()));
    }
    assert_eq!(receiver.accepted(), 1);
    let request = receiver.requests().remove(0);
    assert!(request.starts_with("POST /hook/v1/x?y=1 HTTP/1.1\r\n"), "{request}");
    assert!(
        request.contains("content-type: application/json\r\n") && request.contains("\r\n\r\n{}"),
        "{request}"
    );
}

#[tokio::test]
async fn a_connection_that_was_closed_meanwhile_is_opened_anew() {
    let receiver = Receiver::answering_once("HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await;
    let caller = caller(&receiver.url);
    for _ in 0..2 {
        assert_eq!(call(&caller, 10 * SLACK).await.unwrap().status, StatusCode::OK);
        receiver.until_open(0).await;
    }
    assert_eq!(receiver.accepted(), 2);
}

#[tokio::test]
async fn no_answer_is_told_from_nobody_there() {
    let closed = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap();
    let refused = call(&caller(&format!("http://{closed}")), 10 * SLACK).await.unwrap_err();
    assert_eq!(refused, CallError::Refused("connection refused".to_owned()));
    let silent = Receiver::answering("").await;
    let late = call(&caller(&silent.url), DEADLINE).await.unwrap_err();
    assert_eq!(late, CallError::Broken("no answer within 300ms".to_owned()));
    let short = Receiver::answering_once("HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nshort").await;
    let broken = call(&caller(&short.url), 10 * SLACK).await.unwrap_err();
    assert_eq!(broken, CallError::Broken("the answer ended in the middle".to_owned()));
    assert!(Caller::new("ftp://x", None, &Clock::system()).is_err());
}
