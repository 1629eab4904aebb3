//! A proxy between a service and its store or cache that is slow, or loses answers.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};
use tokio::net::{TcpListener, TcpStream};

use crate::harness::let_run;

/// What happens to answers.
#[derive(Clone, Copy)]
pub enum Fault {
    /// Each comes so much later.
    Late(Duration),
    /// This share of them never comes: the other side has done what it was asked, and the connection ends.
    Lost(f64),
}

/// A proxy that runs as long as the test.
pub struct Proxy {
    /// The URL of what is behind it, by way of the proxy.
    pub url: String,
    lost: Arc<AtomicUsize>,
}

impl Proxy {
    pub async fn start(url: &str, fault: Fault) -> Proxy {
        let mut url = url::Url::parse(url).unwrap();
        let target = (url.host_str().unwrap().to_owned(), url.port().unwrap());
        let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
        url.set_host(Some("127.0.0.1")).unwrap();
        url.set_port(Some(listener.local_addr().unwrap().port())).unwrap();
        let lost = Arc::new(AtomicUsize::new(0));
        let count = Arc::clone(&lost);
        tokio::spawn(async move {
            while let Ok((near, _)) = listener.accept().await {
                let Ok(far) = TcpStream::connect((target.0.as_str(), target.1)).await else { continue };
                let ((near_read, near_write), (far_read, far_write)) = (near.into_split(), far.into_split());
                let asked = tokio::spawn(questions(near_read, far_write));
                let count = Arc::clone(&count);
                tokio::spawn(async move {
                    answers(far_read, near_write, fault, &count).await;
                    asked.abort();
                });
            }
        });
        Proxy { url: url.into(), lost }
    }

    /// Answers lost so far.
    pub fn lost(&self) -> usize {
        self.lost.load(Ordering::Relaxed)
    }
}

async fn questions(mut from: OwnedReadHalf, mut to: OwnedWriteHalf) {
    // Either side may end; then the other does.
    let _ = tokio::io::copy(&mut from, &mut to).await;
}

async fn answers(mut from: OwnedReadHalf, mut to: OwnedWriteHalf, fault: Fault, lost: &AtomicUsize) {
    let mut buffer = vec![0; 65_536];
    while let Ok(read @ 1..) = from.read(&mut buffer).await {
        match fault {
            Fault::Late(time) => let_run(time).await,
            Fault::Lost(share) if fastrand::f64() < share => {
                lost.fetch_add(1, Ordering::Relaxed);
                return;
            }
            Fault::Lost(_) => {}
        }
        if to.write_all(&buffer[..read]).await.is_err() {
            return;
        }
    }
}
