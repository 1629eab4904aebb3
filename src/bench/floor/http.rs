//! A hand-written HTTP/1.1 client on one thread: writes requests on kept connections and reads the answers.

use std::cell::Cell;
use std::net::SocketAddr;
use std::rc::Rc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::LocalSet;

use crate::app::{AppError, Result};
use crate::bench::failed;
use crate::clock::Clock;

/// Headers of an answer, at most: more than the servers here send.
const HEADERS_MAX: usize = 32;

/// Sends `count` requests on so many connections, one after the other on each.
#[derive(Clone, Copy, Debug)]
pub(in crate::bench) struct Client {
    pub(in crate::bench) address: SocketAddr,
    pub(in crate::bench) connections: usize,
    pub(in crate::bench) count: usize,
}

impl Client {
    /// Sends all requests; returns how long that took. `write` appends the whole request of a number, from 0 on.
    ///
    /// # Errors
    /// When one is not answered with a status from 200 to 299.
    pub(in crate::bench) async fn run(
        self,
        write: impl Fn(usize, &mut Vec<u8>) + Send + 'static,
    ) -> Result<Duration> {
        let (tell, told) = tokio::sync::oneshot::channel();
        // A thread and a runtime of its own: what else this process does is not on its way.
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_io().build();
            let ran = runtime.map_err(|error| failed("no runtime for the client")(&error));
            // Whoever asked has gone when nobody listens.
            let _ =
                tell.send(ran.and_then(|runtime| LocalSet::new().block_on(&runtime, self.send_all(write))));
        });
        told.await.map_err(|_| AppError("the client's thread has failed".to_owned()))?
    }

    async fn send_all(self, write: impl Fn(usize, &mut Vec<u8>) + 'static) -> Result<Duration> {
        let (write, next, clock) = (Rc::new(write), Rc::new(Cell::new(0)), Clock::system());
        let watch = clock.stopwatch();
        let connections: Vec<_> = (0..self.connections)
            .map(|_| {
                let (write, next) = (Rc::clone(&write), Rc::clone(&next));
                tokio::task::spawn_local(async move { self.converse(&*write, &next).await })
            })
            .collect();
        for connection in connections {
            let ended =
                connection.await.map_err(|error| failed("a connection of the client failed")(&error))?;
            ended.map_err(|error| failed("the client failed")(&error))?;
        }
        Ok(watch.elapsed())
    }

    async fn converse(self, write: &impl Fn(usize, &mut Vec<u8>), next: &Cell<usize>) -> std::io::Result<()> {
        let mut stream = TcpStream::connect(self.address).await?;
        stream.set_nodelay(true)?;
        let (mut request, mut answer) = (Vec::with_capacity(4_096), Vec::with_capacity(4_096));
        loop {
            let number = next.get();
            if number >= self.count {
                return Ok(());
            }
            next.set(number + 1);
            request.clear();
            write(number, &mut request);
            stream.write_all(&request).await?;
            answer.clear();
            while !is_whole(&answer)? {
                if stream.read_buf(&mut answer).await? == 0 {
                    return Err(std::io::ErrorKind::UnexpectedEof.into());
                }
            }
        }
    }
}

/// Whether a successful answer has been read to its end.
fn is_whole(answer: &[u8]) -> std::io::Result<bool> {
    let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
    let mut head = httparse::Response::new(&mut headers);
    let httparse::Status::Complete(start) = head.parse(answer).map_err(std::io::Error::other)? else {
        return Ok(false);
    };
    if !head.code.is_some_and(|code| (200..300).contains(&code)) {
        return Err(std::io::Error::other(String::from_utf8_lossy(answer).into_owned()));
    }
    let said = head.headers.iter().find(|header| header.name.eq_ignore_ascii_case("content-length"));
    let length = said.and_then(|header| std::str::from_utf8(header.value).ok()?.parse::<usize>().ok());
    Ok(answer.len() >= start + length.unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_whole_once_its_body_is() {
        let answer = b"HTTP/1.1 202 Accepted\r\nContent-Length: 2\r\n\r\nok";
        for cut in 0..answer.len() {
            assert!(!is_whole(&answer[..cut]).unwrap(), "{cut}");
        }
        assert!(is_whole(answer).unwrap());
        assert!(is_whole(b"HTTP/1.1 204 No Content\r\n\r\n").unwrap());
    }

    #[test]
    fn what_is_no_success_is_an_error_that_shows_it() {
        let error = is_whole(b"HTTP/1.1 503 Away\r\ncontent-length: 4\r\n\r\nwait").unwrap_err();
        assert!(error.to_string().contains("503 Away"), "{error}");
        assert!(is_whole(b"no http").is_err());
    }

    #[tokio::test]
    async fn each_request_is_sent_once() {
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let client = Client { address: listener.local_addr().unwrap(), connections: 3, count: 10 };
        let (tell, mut told) = tokio::sync::mpsc::unbounded_channel();
        tokio::spawn(async move {
            while let Ok((mut stream, _)) = listener.accept().await {
                let tell = tell.clone();
                tokio::spawn(async move {
                    let mut line = [0; 1];
                    while stream.read_exact(&mut line).await.is_ok() {
                        tell.send(line[0]).unwrap();
                        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await.unwrap();
                    }
                });
            }
        });
        client.run(|i, request| request.push(i as u8)).await.unwrap();
        let mut seen = Vec::new();
        told.recv_many(&mut seen, 100).await;
        while seen.len() < 10 {
            seen.push(told.recv().await.unwrap());
        }
        seen.sort_unstable();
        assert_eq!(seen, (0..10).collect::<Vec<u8>>());
    }
}
