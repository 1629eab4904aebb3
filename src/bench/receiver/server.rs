//! The receiver's process: `POST` counts, `GET /counts` and `GET /ages` tell, `DELETE` forgets. What arrives on a path is
//! told by itself, too (`GET /counts/PATH`). `POST /hang…` is counted and never answered, `POST /wait/MS…` after so
//! many milliseconds.
//!
//! It shares the machine with what is measured, so it does no more than it must: hyper's server costs
//! some 3 us a request more than this (measured with a prototype). It is for this benchmark's two clients only.

use std::cell::RefCell;
use std::collections::{HashMap, HashSet};
use std::rc::Rc;
use std::time::Duration;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::LocalSet;
use tokio_util::sync::CancellationToken;

use super::{Arrived, HANG, WAIT};
use crate::app::{self, Result};
use crate::clock::{Clock, Timestamp};

/// How long nothing is accepted after an accept failed.
const PAUSE: Duration = Duration::from_millis(50);
/// Ages that are kept: 8 MB.
const AGES_MAX: usize = 1_000_000;
/// Headers of a request, at most: more than the program and its benchmark send.
const HEADERS_MAX: usize = 32;
/// What every message is answered with.
const ACCEPTED: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 73\r\n\r\n\
    {\"message\":\"Accepted\",\"messageId\":\"00000000-0000-4000-8000-000000000000\"}";

/// Listens until `stop`, on the thread that runs it.
///
/// # Errors
/// When the port can't be listened on.
pub async fn serve(port: u16, stop: CancellationToken) -> Result<()> {
    let listener = app::listen("127.0.0.1", port, "--port").await?;
    let receiver = Rc::new(Receiver { clock: Clock::system(), counts: RefCell::default() });
    let connections = LocalSet::new();
    let accept = async {
        loop {
            match listener.accept().await {
                Ok((stream, _)) => {
                    let receiver = Rc::clone(&receiver);
                    connections.spawn_local(async move { receiver.converse(stream).await });
                }
                // Out of files, most likely: others must end first.
                Err(_) => tokio::time::sleep(PAUSE).await,
            }
        }
    };
    connections.run_until(stop.run_until_cancelled(accept)).await;
    Ok(())
}

struct Receiver {
    clock: Clock,
    /// By path. Never borrowed over an await.
    counts: RefCell<HashMap<String, Counts>>,
}

/// What has arrived on a path since the last `DELETE`.
#[derive(Clone, Default)]
struct Counts {
    arrivals: usize,
    ids: HashSet<i64>,
    first_us: i64,
    last_us: i64,
    ages_us: Vec<i64>,
}

impl Receiver {
    /// Answers one connection's requests until it ends or sends what is no request.
    async fn converse(&self, mut stream: TcpStream) {
        // A connection without it only answers later; it still answers.
        let _ = stream.set_nodelay(true);
        let mut taken = Vec::with_capacity(16 * 1024);
        loop {
            let request = match Request::parse(&taken) {
                Parsed::Whole(request) => request,
                Parsed::Part => match stream.read_buf(&mut taken).await {
                    Ok(count) if count > 0 => continue,
                    _ => return,
                },
                Parsed::Nonsense => return,
            };
            let length = request.length;
            let written = match self.answer(&request) {
                Answer::Accepted => stream.write_all(ACCEPTED).await,
                Answer::AcceptedAfter(wait) => {
                    tokio::time::sleep(wait).await;
                    stream.write_all(ACCEPTED).await
                }
                Answer::Told(told) => stream.write_all(&told).await,
                // Until the client has had enough.
                Answer::Never => return drop(stream.read_to_end(&mut taken).await),
            };
            if written.is_err() {
                return;
            }
            taken.drain(..length);
        }
    }

    /// Does what the request asks.
    fn answer(&self, request: &Request<'_>) -> Answer {
        let mut counts = self.counts.borrow_mut();
        let body = match request.method {
            "POST" => {
                match counts.get_mut(request.path) {
                    Some(counts) => counts.count(request.body, &self.clock),
                    None => {
                        counts.entry(request.path.to_owned()).or_default().count(request.body, &self.clock)
                    }
                }
                return Answer::to(request.path);
            }
            "GET" => match request.path.strip_prefix("/ages") {
                Some(path) => tell(&counts, path, true),
                None => tell(&counts, request.path.strip_prefix("/counts").unwrap_or(""), false),
            },
            _ => {
                counts.clear();
                Vec::new()
            }
        };
        let mut answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n", body.len()).into_bytes();
        answer.extend(body);
        Answer::Told(answer)
    }
}

/// How a request is answered.
#[derive(Debug, PartialEq)]
enum Answer {
    Accepted,
    AcceptedAfter(Duration),
    Told(Vec<u8>),
    Never,
}

impl Answer {
    /// The answer to a message on this path.
    fn to(path: &str) -> Answer {
        if path.starts_with(HANG) {
            return Answer::Never;
        }
        let wait = path.strip_prefix(WAIT).and_then(|rest| rest.split('/').next()?.parse().ok());
        wait.map_or(Answer::Accepted, |ms| Answer::AcceptedAfter(Duration::from_millis(ms)))
    }
}

/// One request, read whole.
struct Request<'a> {
    method: &'a str,
    path: &'a str,
    body: &'a [u8],
    /// Bytes of all of it.
    length: usize,
}

enum Parsed<'a> {
    Whole(Request<'a>),
    Part,
    Nonsense,
}

impl Request<'_> {
    fn parse(taken: &[u8]) -> Parsed<'_> {
        let mut headers = [httparse::EMPTY_HEADER; HEADERS_MAX];
        let mut head = httparse::Request::new(&mut headers);
        let start = match head.parse(taken) {
            Ok(httparse::Status::Complete(start)) => start,
            Ok(httparse::Status::Partial) => return Parsed::Part,
            Err(_) => return Parsed::Nonsense,
        };
        let said = head.headers.iter().find(|header| header.name.eq_ignore_ascii_case("content-length"));
        let length = match said.map(|header| std::str::from_utf8(header.value).map(str::parse)) {
            None => 0,
            Some(Ok(Ok(length))) => length,
            Some(_) => return Parsed::Nonsense,
        };
        let (Some(method), Some(path)) = (head.method, head.path) else { return Parsed::Nonsense };
        match taken.get(start..start + length) {
            Some(body) => Parsed::Whole(Request { method, path, body, length: start + length }),
            None => Parsed::Part,
        }
    }
}

impl Counts {
    /// Counts a message, and how old it is.
    fn count(&mut self, body: &[u8], clock: &Clock) {
        #[derive(serde::Deserialize)]
        struct Body {
            id: i64,
            created_at: Timestamp,
        }
        let Ok(body) = serde_json::from_slice::<Body>(body) else { return };
        let now = clock.now();
        self.arrivals += 1;
        self.last_us = now.as_micros();
        if self.arrivals == 1 {
            self.first_us = now.as_micros();
        }
        if self.ids.insert(body.id) && self.ages_us.len() < AGES_MAX {
            self.ages_us.push(now.as_micros() - body.created_at.as_micros());
        }
    }
}

/// Tells what arrived on `path`, or on all paths when it is empty.
fn tell(counts: &HashMap<String, Counts>, path: &str, with_ages: bool) -> Vec<u8> {
    let mut arrived = Arrived::default();
    for (_, counts) in counts.iter().filter(|(on, _)| path.is_empty() || *on == path) {
        let first = [arrived.first_us, counts.first_us].into_iter().filter(|us| *us > 0).min();
        arrived.first_us = first.unwrap_or(0);
        arrived.last_us = arrived.last_us.max(counts.last_us);
        arrived.arrivals += counts.arrivals;
        // No message has two endpoints, and so none comes on two paths.
        arrived.distinct += counts.ids.len();
        if with_ages {
            arrived.ages_us.extend(&counts.ages_us);
        }
    }
    arrived.ages_us.sort_unstable();
    // Numbers always serialize.
    serde_json::to_vec(&arrived).unwrap_or_default()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn whole(taken: &[u8]) -> Option<(&str, &str, &[u8], usize)> {
        match Request::parse(taken) {
            Parsed::Whole(Request { method, path, body, length }) => Some((method, path, body, length)),
            Parsed::Part | Parsed::Nonsense => None,
        }
    }

    #[test]
    fn a_request_is_read_once_it_is_whole_and_the_next_one_stays() {
        let first = b"POST /hook HTTP/1.1\r\nhost: x\r\nContent-Length: 2\r\n\r\nHi";
        let both = [&first[..], b"GET /ages HTTP/1.1\r\n\r\n"].concat();
        for cut in 0..first.len() {
            assert!(matches!(Request::parse(&both[..cut]), Parsed::Part), "{cut}");
        }
        assert_eq!(whole(&both), Some(("POST", "/hook", &b"Hi"[..], first.len())));
        assert_eq!(whole(&both[first.len()..]).map(|request| request.1), Some("/ages"));
        for nonsense in ["\0", "POST / HTTP/1.1\r\ncontent-length: x\r\n\r\n"] {
            assert!(matches!(Request::parse(nonsense.as_bytes()), Parsed::Nonsense), "{nonsense}");
        }
    }

    #[test]
    fn what_arrives_is_counted_once_and_aged() {
        let clock = Clock::manual(Timestamp::EPOCH.after(Duration::from_secs(9)));
        let mut counts = Counts::default();
        for id in [1, 2, 2] {
            counts.count(format!(r#"{{"id":{id},"created_at":"1970-01-01T00:00:05Z"}}"#).as_bytes(), &clock);
        }
        counts.count(b"no message", &clock);
        let other =
            Counts { arrivals: 1, ids: HashSet::from([9]), first_us: 1, last_us: 2, ages_us: vec![3] };
        let all = HashMap::from([("/a".to_owned(), counts), ("/b".to_owned(), other)]);
        let told = |path, ages| serde_json::from_slice::<Arrived>(&tell(&all, path, ages)).unwrap();
        let on_a = told("/a", true);
        assert_eq!((on_a.arrivals, on_a.distinct, &on_a.ages_us[..]), (3, 2, &[4_000_000, 4_000_000][..]));
        let on_all = told("", true);
        assert_eq!((on_all.arrivals, on_all.distinct, on_all.ages_us.len()), (4, 3, 3));
        assert_eq!((on_all.first_us, on_all.last_us), (1, 9_000_000));
        assert!(told("", false).ages_us.is_empty() && told("/c", true).arrivals == 0);
    }

    #[test]
    fn a_path_says_how_it_is_answered() {
        assert_eq!(Answer::to("/"), Answer::Accepted);
        assert_eq!(Answer::to("/hang/7"), Answer::Never);
        assert_eq!(Answer::to("/wait/300/x"), Answer::AcceptedAfter(Duration::from_millis(300)));
        assert_eq!(Answer::to("/wait/x"), Answer::Accepted);
    }

    #[test]
    fn the_answer_says_how_long_it_is() {
        let mut headers = [httparse::EMPTY_HEADER; 4];
        let mut answer = httparse::Response::new(&mut headers);
        let httparse::Status::Complete(start) = answer.parse(ACCEPTED).unwrap() else { panic!("no head") };
        let length = answer.headers.iter().find(|header| header.name == "content-length").unwrap().value;
        assert_eq!(std::str::from_utf8(length).unwrap(), (ACCEPTED.len() - start).to_string());
    }
}
