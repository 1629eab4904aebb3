//! Calls to one server, whose whole answer is wanted: how operators' verbs reach the API.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{CONTENT_TYPE, HOST, HeaderMap, HeaderValue, USER_AGENT};
use hyper::{Method, Request, StatusCode};

use super::connect::Connector;
use super::pool::{Bounds, Host, Pool};
use super::target::{AddressRule, Target};
use super::{DeliveryError, describe, read};
use crate::clock::{Clock, Stopwatch};

/// Bytes of an answer that are read, at most.
const ANSWER_MAX: usize = 64 << 20;
/// Connections open at once, those of them that are kept, and for how long.
const BOUNDS: Bounds =
    Bounds { open: 1_024, idle: 16, idle_of_origin: 16, idle_for: Duration::from_secs(60) };

/// Calls one server on kept connections; as many at once as the caller likes.
pub struct Caller {
    pool: Pool,
    host: Arc<Host>,
    target: Target,
    watch: Stopwatch,
}

/// What the server answered.
#[derive(Debug)]
pub struct Reply {
    pub status: StatusCode,
    pub headers: HeaderMap,
    pub body: Vec<u8>,
}

/// Why there is no answer.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
pub enum CallError {
    /// Nothing was sent: nobody is there.
    #[error("{0}")]
    Refused(String),
    /// The request may have arrived.
    #[error("{0}")]
    Broken(String),
}

impl Caller {
    /// Calls to the server of `url`, which begins every path. `ca_file` (PEM) names further authorities to trust.
    ///
    /// # Errors
    /// When the URL or the file can't be used.
    pub fn new(url: &str, ca_file: Option<&Path>, clock: &Clock) -> Result<Caller, DeliveryError> {
        let target = Target::parse(url).map_err(DeliveryError::Url)?;
        let watch = clock.stopwatch();
        let connector = Connector::new(ca_file, AddressRule::default(), watch.clone())?;
        let pool = Pool::new(connector, BOUNDS);
        Ok(Caller { host: pool.host(&target.origin), pool, target, watch })
    }

    /// Makes one call and reads the whole answer, all of it `within` that time. `path` begins with a slash.
    ///
    /// # Errors
    /// [`CallError`], in a few plain words.
    pub async fn call(
        &self,
        method: Method,
        path: &str,
        headers: HeaderMap,
        body: Bytes,
        within: Duration,
    ) -> Result<Reply, CallError> {
        let request = self.request(method, path, headers, body)?;
        let mut sent = false;
        let called = tokio::time::timeout(within, self.converse(request, &mut sent)).await;
        called.unwrap_or_else(|_| {
            let late = format!("no answer within {}", humantime::format_duration(within));
            Err(if sent { CallError::Broken(late) } else { CallError::Refused(late) })
        })
    }

    fn request(
        &self,
        method: Method,
        path: &str,
        headers: HeaderMap,
        body: Bytes,
    ) -> Result<Request<Full<Bytes>>, CallError> {
        let base = self.target.path.path().trim_end_matches('/');
        let uri = format!("{base}{path}").parse();
        let mut request = Request::new(Full::new(body));
        *request.uri_mut() = uri.map_err(|_| CallError::Refused(format!("`{path}` is no path")))?;
        *request.method_mut() = method;
        *request.headers_mut() = headers;
        let agent = HeaderValue::from_static(concat!("ams/", env!("CARGO_PKG_VERSION")));
        request.headers_mut().insert(USER_AGENT, agent);
        request.headers_mut().insert(HOST, self.target.host.clone());
        request.headers_mut().entry(CONTENT_TYPE).or_insert(HeaderValue::from_static("application/json"));
        Ok(request)
    }

    async fn converse(&self, mut request: Request<Full<Bytes>>, sent: &mut bool) -> Result<Reply, CallError> {
        let mut kept = self.pool.take(&self.host, self.watch.elapsed()).await;
        let (mut connection, answer) = loop {
            let is_kept = kept.is_some();
            let mut connection = match kept.take() {
                Some(connection) => connection,
                None => {
                    let connected = self.pool.connect(&self.host).await;
                    connected.map_err(|why| CallError::Refused(why.reason()))?
                }
            };
            *sent = true;
            match connection.send(request).await {
                Ok(answer) => break (connection, answer),
                Err(mut error) => match error.take_message() {
                    // Closed by the other side before anything was written.
                    Some(unsent) if is_kept => request = unsent,
                    Some(_) => return Err(CallError::Refused(describe(error.error()))),
                    None => return Err(CallError::Broken(describe(error.error()))),
                },
            }
        };
        let (head, incoming) = answer.into_parts();
        let mut body = Vec::new();
        if !read(&mut connection, incoming, ANSWER_MAX, |frame| body.extend_from_slice(frame)).await {
            return Err(CallError::Broken("the answer ended in the middle".to_owned()));
        }
        self.pool.give_back(&self.host, connection, self.watch.elapsed(), None);
        Ok(Reply { status: head.status, headers: head.headers, body })
    }
}
