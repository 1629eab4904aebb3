//! A receiver that does exactly what a test says, byte by byte.

use std::io;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::watch;

/// Connections as they were counted: accepted so far, and open now.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Count {
    pub(super) accepted: usize,
    pub(super) open: usize,
}

/// Listens on loopback and lets a function serve each connection.
pub(super) struct Receiver {
    pub(super) url: String,
    pub(super) port: u16,
    count: Arc<watch::Sender<Count>>,
    requests: Arc<Mutex<Vec<String>>>,
}

impl Receiver {
    /// The connection counts as open until `serve` returns.
    pub(super) async fn start<F, S>(serve: F) -> Receiver
    where
        F: Fn(Wire) -> S + Send + 'static,
        S: Future<Output = ()> + Send + 'static,
    {
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        let port = listener.local_addr().unwrap().port();
        let count = Arc::new(watch::Sender::new(Count::default()));
        let requests: Arc<Mutex<Vec<String>>> = Arc::default();
        let (counted, recorded) = (Arc::clone(&count), Arc::clone(&requests));
        tokio::spawn(async move {
            while let Ok((stream, _)) = listener.accept().await {
                counted.send_modify(|count| {
                    count.accepted += 1;
                    count.open += 1;
                });
                let served = serve(Wire { stream, unread: Vec::new(), requests: Arc::clone(&recorded) });
                let counted = Arc::clone(&counted);
                tokio::spawn(async move {
                    served.await;
                    counted.send_modify(|count| count.open -= 1);
                });
            }
        });
        Receiver { url: format!("http://127.0.0.1:{port}/hook"), port, count, requests }
    }

    /// Answers every request with these bytes, and keeps the connection until the other side closes it.
    pub(super) async fn answering(answer: impl Into<Vec<u8>>) -> Receiver {
        let answer: Arc<[u8]> = answer.into().into();
        Receiver::start(move |mut wire| {
            let answer = Arc::clone(&answer);
            async move {
                while wire.request().await.is_some() {
                    let _ = wire.write(&answer).await;
                }
            }
        })
        .await
    }

    /// Answers one request with these bytes, and closes.
    pub(super) async fn answering_once(answer: impl Into<Vec<u8>>) -> Receiver {
        let answer: Arc<[u8]> = answer.into().into();
        Receiver::start(move |mut wire| {
            let answer = Arc::clone(&answer);
            async move {
                wire.request().await;
                let _ = wire.write(&answer).await;
            }
        })
        .await
    }

    pub(super) fn accepted(&self) -> usize {
        self.count.borrow().accepted
    }

    /// Every request that arrived whole.
    pub(super) fn requests(&self) -> Vec<String> {
        self.requests.lock().unwrap().clone()
    }

    /// Waits until `open` connections are open.
    pub(super) async fn until_open(&self, open: usize) {
        let mut count = self.count.subscribe();
        let reached = count.wait_for(|count| count.open == open);
        let reached = tokio::time::timeout(Duration::from_secs(10), reached).await;
        let Ok(Ok(_)) = reached else {
            panic!("{:?} instead of {open} open connections", *self.count.borrow())
        };
    }
}

/// The receiver's end of a connection.
pub(super) struct Wire {
    pub(super) stream: TcpStream,
    unread: Vec<u8>,
    requests: Arc<Mutex<Vec<String>>>,
}

impl Wire {
    /// Reads one request to its end; `None` when the other side has closed.
    pub(super) async fn request(&mut self) -> Option<String> {
        loop {
            if let Some(length) = request_length(&self.unread) {
                let rest = self.unread.split_off(length);
                let request = String::from_utf8(std::mem::replace(&mut self.unread, rest)).unwrap();
                self.requests.lock().unwrap().push(request.clone());
                return Some(request);
            }
            if self.stream.read_buf(&mut self.unread).await.ok()? == 0 {
                return None;
            }
        }
    }

    pub(super) async fn write(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.write_all(bytes).await
    }

    /// Writes one byte after the other, each 20 ms apart, until the other side has gone.
    pub(super) async fn drip(&mut self, bytes: &[u8]) {
        let mut tick = tokio::time::interval(Duration::from_millis(20));
        for byte in bytes.iter().cycle() {
            tick.tick().await;
            if self.write(&[*byte]).await.is_err() {
                return;
            }
        }
    }

    /// Writes the same bytes until the other side has gone.
    pub(super) async fn flood(&mut self, bytes: &[u8]) {
        while self.write(bytes).await.is_ok() {}
    }

    /// Says nothing more until the other side has gone.
    pub(super) async fn until_closed(&mut self) {
        let mut nothing = [0; 4096];
        while !matches!(self.stream.read(&mut nothing).await, Ok(0) | Err(_)) {}
    }

    /// Closes as a crash does.
    pub(super) fn reset(self) {
        self.stream.set_zero_linger().unwrap();
    }
}

/// How long the first request in `bytes` is, when it is whole.
fn request_length(bytes: &[u8]) -> Option<usize> {
    let head = bytes.windows(4).position(|window| window == b"\r\n\r\n")? + 4;
    let text = std::str::from_utf8(&bytes[..head]).unwrap();
    let length = text.lines().find_map(|line| line.strip_prefix("content-length: "));
    let whole = head + length.map_or(0, |length| length.parse::<usize>().unwrap());
    (bytes.len() >= whole).then_some(whole)
}
