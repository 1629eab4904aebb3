//! The one outbound call: a ticket, an endpoint, an outcome.
//!
//! ```text
//! ticket ──request──> kept or new connection ──head──> status decides ──body──> outcome
//!          signature    pool, connect, target            at most 64 KiB, answer
//! ```
//! One deadline covers everything. What the receiver does can end a try early, spoil it or delay it
//! up to that deadline, and nothing else: what is read is bounded, a redirect is never followed, and
//! a request that may have been written is never sent a second time by the same try.

mod answer;
mod budget;
mod caller;
mod connect;
mod connection;
pub mod limits;
mod names;
mod pool;
mod request;
mod signature;
mod target;

use std::collections::HashMap;
use std::error::Error as _;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use futures_util::future::BoxFuture;
use hyper::Request;
use hyper::body::Incoming;
use tokio_util::sync::CancellationToken;
use uuid::Uuid;

use self::answer::Answer;
use self::connect::{Connector, NotConnected};
use self::connection::{Body, Connection};
use self::pool::{Bounds, Host, Pool, SWEEP};
use self::request::Writer;
use self::signature::Key;
use self::target::{AddressRule, Target};
use crate::clock::{Clock, Stopwatch, Timestamp};
use crate::message::{Class, Outcome, Times};
use crate::redact;
use crate::shortage::Shortage;
use crate::store::Endpoint;
use crate::ticket::Ticket;

pub use self::caller::{CallError, Caller, Reply};

/// What a try came to, or what this process lacked to make it: then it was none.
pub type Tried = Result<Outcome, Shortage>;

/// What a scripted delivery calls instead of the network.
pub type Script = Arc<dyn Fn(Ticket, Endpoint) -> BoxFuture<'static, Tried> + Send + Sync>;

/// Endpoints whose URL and secret are kept ready, at most.
const PREPARED_MAX: usize = 4_096;

/// Whether requests can go to this URL.
///
/// # Errors
/// One sentence on why not; it never repeats a password.
pub fn check_url(url: &str) -> Result<(), String> {
    Target::parse(url).map(drop)
}

/// Whether requests can be signed with this secret.
///
/// # Errors
/// A few words on what is wrong with it, without the secret.
pub fn check_secret(secret: &str) -> Result<(), String> {
    Key::parse(secret).map(drop)
}

/// As much of an endpoint's URL as the log may have: its path and query may be what lets a caller in.
pub fn origin_of(url: &str) -> String {
    url::Url::parse(url)
        .map_or_else(|_| "an unreadable URL".to_owned(), |url| url.origin().ascii_serialization())
}

/// An endpoint's URL for those who may see the endpoint: as it is, unless it has a user and password. No request
/// can go to such a one; somebody has written it into the table.
pub fn shown_url(url: &str) -> String {
    if !url.contains('@') || check_url(url).is_ok() { url.to_owned() } else { redact::url(url) }
}

/// How deliveries are made.
#[derive(Clone, Debug)]
pub struct DeliveryOptions {
    /// PEM file of further authorities that sign endpoints' certificates.
    pub ca_file: Option<PathBuf>,
    /// Refuses link-local addresses, among them those where clouds keep their machines' credentials.
    pub refuse_link_local: bool,
    /// Connections open at once, idle ones included, over all origins. It belongs well below the process's limit
    /// of open files.
    pub connections_max: usize,
    /// Idle connections kept over all origins, at most.
    pub idle_total_max: usize,
    /// Idle connections kept for each origin, at most.
    pub idle_max: usize,
    /// How long a connection is kept idle, at most.
    pub idle_for: Duration,
}

impl Default for DeliveryOptions {
    fn default() -> DeliveryOptions {
        DeliveryOptions {
            ca_file: None,
            refuse_link_local: false,
            connections_max: 16_384,
            // Each keeps a buffer of 8 KiB or more.
            idle_total_max: 8_192,
            idle_max: 1024,
            idle_for: Duration::from_secs(30),
        }
    }
}

/// Why deliveries can't be made at all.
#[derive(Clone, Debug, thiserror::Error)]
pub enum DeliveryError {
    /// The file of further authorities can't be used; name another.
    #[error("the authorities in `{path}` can't be used: {why}")]
    CaFile { path: PathBuf, why: String },
    /// No request can go to this URL; name another.
    #[error("{0}")]
    Url(String),
    /// TLS can't be set up: a defect of ours.
    #[error("TLS can't be set up: {0}")]
    Tls(String),
}

/// Makes deliveries: one per process, shared by all of its lanes.
pub struct Delivery {
    clock: Clock,
    transport: Transport,
}

enum Transport {
    Network(Box<Network>),
    Script(Script),
}

impl Delivery {
    /// Deliveries over the network. `installation` becomes part of every `webhook-id`.
    ///
    /// # Errors
    /// [`DeliveryError`], when the options can't be met.
    pub fn new(
        clock: Clock,
        installation: Uuid,
        options: DeliveryOptions,
    ) -> Result<Delivery, DeliveryError> {
        let watch = clock.stopwatch();
        let rule = AddressRule { refuse_link_local: options.refuse_link_local };
        let connector = Connector::new(options.ca_file.as_deref(), rule, watch.clone())?;
        Ok(Delivery::over(connector, watch, clock, installation, &options))
    }

    fn over(
        connector: Connector,
        watch: Stopwatch,
        clock: Clock,
        installation: Uuid,
        options: &DeliveryOptions,
    ) -> Delivery {
        let bounds = Bounds {
            open: options.connections_max,
            idle: options.idle_total_max,
            idle_of_origin: options.idle_max,
            idle_for: options.idle_for,
        };
        let network = Network {
            writer: Writer::new(installation),
            pool: Pool::new(connector, bounds),
            prepared: Mutex::default(),
            watch,
        };
        Delivery { clock, transport: Transport::Network(Box::new(network)) }
    }

    /// Deliveries that `script` makes up. For the simulation.
    pub fn scripted(clock: Clock, script: Script) -> Delivery {
        Delivery { clock, transport: Transport::Script(script) }
    }

    /// Opens a connection to where `url` points, TLS included, and closes it again: no request is sent.
    ///
    /// # Errors
    /// A few words on why there is none after `within`.
    pub async fn reach(&self, url: &str, within: Duration) -> Result<(), String> {
        let Transport::Network(network) = &self.transport else { return Ok(()) };
        let host = network.pool.host(&Target::parse(url)?.origin);
        let connected = tokio::time::timeout(within, network.pool.connect(&host)).await;
        match connected {
            Ok(connected) => connected.map(drop).map_err(NotConnected::reason),
            Err(_) => Err(format!("no connection within {within:?}")),
        }
    }

    /// Closes idle connections that have grown old or that the other side has closed, every few seconds until
    /// `stop`. One such task for each process is enough.
    pub async fn tend(&self, stop: &CancellationToken) {
        let Transport::Network(network) = &self.transport else { return };
        let mut tick = tokio::time::interval(SWEEP);
        tick.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            tokio::select! {
                () = stop.cancelled() => return,
                _ = tick.tick() => network.pool.sweep(network.watch.elapsed()).await,
            }
        }
    }

    /// Tries `ticket` at `endpoint` once. Ends by the endpoint's deadline, whatever the receiver does.
    ///
    /// # Errors
    /// [`Shortage`]: this process could not open a connection, nothing was sent, and the receiver has no part in it.
    pub async fn deliver(&self, ticket: &Ticket, endpoint: &Endpoint) -> Tried {
        match &self.transport {
            Transport::Script(script) => script(ticket.clone(), endpoint.clone()).await,
            Transport::Network(network) => network.deliver(ticket, endpoint, &self.clock).await,
        }
    }
}

/// Deliveries over the network.
struct Network {
    writer: Writer,
    pool: Pool,
    prepared: Mutex<HashMap<String, Arc<Prepared>>>,
    /// Runs since the start of the process's deliveries.
    watch: Stopwatch,
}

/// What an endpoint's URL and secret come to, so that they are read once and not for every try.
struct Prepared {
    url: String,
    secret: Option<String>,
    target: Target,
    key: Option<Key>,
    host: Arc<Host>,
}

/// How far a try has come. It lives outside of the deadline, which may stop the try anywhere.
struct Progress {
    stage: Stage,
    /// When this stage began; and before, how long the others took.
    since: Duration,
    times: Times,
    status: Option<u16>,
    retry_after_ms: Option<u64>,
    body: Vec<u8>,
    whole: bool,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Stage {
    Connecting,
    Waiting,
    Reading,
}

impl Progress {
    fn new(start: Duration) -> Progress {
        Progress {
            stage: Stage::Connecting,
            since: start,
            times: Times::default(),
            status: None,
            retry_after_ms: None,
            body: Vec::new(),
            whole: false,
        }
    }

    /// Ends the stage at `now`; the time of a wait on a dead kept connection counts as connecting.
    fn enter(&mut self, stage: Stage, now: Duration) {
        let took = i32::try_from(now.saturating_sub(self.since).as_micros()).unwrap_or(i32::MAX);
        let phase = match (self.stage, stage) {
            (_, Stage::Connecting) | (Stage::Connecting, _) => &mut self.times.connect_us,
            (Stage::Waiting, _) => &mut self.times.head_us,
            (Stage::Reading, _) => &mut self.times.body_us,
        };
        *phase = phase.saturating_add(took);
        self.stage = stage;
        self.since = now;
    }
}

/// A try that ended without a status line.
struct Failure {
    class: Class,
    error: String,
}

/// Why there is no status line.
enum Ended {
    /// It was no try.
    Short(Shortage),
    Failed(Failure),
}

impl From<Failure> for Ended {
    fn from(failure: Failure) -> Ended {
        Ended::Failed(failure)
    }
}

impl From<NotConnected> for Ended {
    fn from(why: NotConnected) -> Ended {
        match why {
            NotConnected::Short(shortage) => Ended::Short(shortage),
            NotConnected::Refused(why) => Ended::Failed(refused(why)),
        }
    }
}

impl Network {
    async fn deliver(&self, ticket: &Ticket, endpoint: &Endpoint, clock: &Clock) -> Tried {
        let started_at = clock.now();
        let mut progress = Progress::new(self.watch.elapsed());
        let request = self.prepare(endpoint).and_then(|prepared| {
            let (target, key) = (&prepared.target, prepared.key.as_ref());
            let request = self.writer.write(ticket, target, key, started_at)?;
            Ok((prepared, request))
        });
        let (prepared, request) = match request {
            Ok(request) => request,
            Err(error) => {
                let failure = Failure { class: Class::Invalid, error };
                let ended = outcome(endpoint, started_at, progress, Err(failure));
                return Ok(Outcome { address: shown_url(&endpoint.url), ..ended });
            }
        };
        let attempt = self.attempt(&prepared.host, request, clock, &mut progress);
        let ended = tokio::time::timeout(endpoint.timeout, attempt).await;
        let stage = progress.stage;
        progress.enter(stage, self.watch.elapsed());
        let ended = match (ended, stage) {
            (Ok(Ok(())), _) => Ok(()),
            (Ok(Err(Ended::Short(shortage))), _) => return Err(shortage),
            (Ok(Err(Ended::Failed(failure))), _) => Err(failure),
            (Err(_), Stage::Connecting) => Err(late(Class::Refused, "connection", endpoint)),
            (Err(_), Stage::Waiting) => Err(late(Class::Timeout, "answer", endpoint)),
            // The status line has said what matters.
            (Err(_), Stage::Reading) => Ok(()),
        };
        Ok(outcome(endpoint, started_at, progress, ended))
    }

    /// Sends the request on a kept connection or a new one and reads the answer into `progress`.
    async fn attempt(
        &self,
        host: &Host,
        mut request: Request<Body>,
        clock: &Clock,
        progress: &mut Progress,
    ) -> Result<(), Ended> {
        let mut kept = self.pool.take(host, progress.since).await;
        if kept.is_some() {
            // Nothing was connected: the little time that passed belongs to the request.
            progress.stage = Stage::Waiting;
        }
        let (mut connection, answer) = loop {
            let is_kept = kept.is_some();
            let mut connection = match kept.take() {
                Some(connection) => connection,
                None => {
                    let connect = Box::pin(self.pool.connect(host));
                    let connection = connect.await?;
                    progress.enter(Stage::Waiting, self.watch.elapsed());
                    connection
                }
            };
            match connection.send(request).await {
                Ok(answer) => break (connection, answer),
                Err(mut error) => match error.take_message() {
                    // Closed by the other side before anything was written: not a try yet.
                    Some(unsent) if is_kept => {
                        request = unsent;
                        progress.enter(Stage::Connecting, self.watch.elapsed());
                    }
                    Some(_) => return Err(unsent(error.error())),
                    None => return Err(broken(error.error()).into()),
                },
            }
        };
        progress.status = Some(answer.status().as_u16());
        progress.enter(Stage::Reading, self.watch.elapsed());
        if !answer.status().is_success() {
            progress.retry_after_ms = answer::retry_after_ms(answer.headers(), clock.now());
        }
        let told = answer::keeps_idle_for(answer.headers());
        let kept = &mut progress.body;
        progress.whole = read(&mut connection, answer.into_body(), answer::BODY_MAX, |frame| {
            kept.extend_from_slice(frame);
            kept.truncate(answer::useful(kept));
        })
        .await;
        if progress.whole {
            self.pool.give_back(host, connection, self.watch.elapsed(), told);
        }
        Ok(())
    }

    fn prepare(&self, endpoint: &Endpoint) -> Result<Arc<Prepared>, String> {
        let mut all = lock(&self.prepared);
        if let Some(known) = all.get(&endpoint.name)
            && known.url == endpoint.url
            && known.secret == endpoint.secret
        {
            return Ok(Arc::clone(known));
        }
        let (target, key) = read_settings(endpoint)?;
        let prepared = Arc::new(Prepared {
            url: endpoint.url.clone(),
            secret: endpoint.secret.clone(),
            host: self.pool.host(&target.origin),
            target,
            key,
        });
        if all.len() >= PREPARED_MAX {
            all.clear();
        }
        all.insert(endpoint.name.clone(), Arc::clone(&prepared));
        Ok(prepared)
    }
}

fn read_settings(endpoint: &Endpoint) -> Result<(Target, Option<Key>), String> {
    let target = Target::parse(&endpoint.url)?;
    let key = endpoint.secret.as_deref().map(Key::parse).transpose();
    let key = key.map_err(|why| format!("the secret of the endpoint `{}` {why}", endpoint.name))?;
    Ok((target, key))
}

/// What is wrong with an endpoint's URL or secret, if anything: then no request can be made of any message, which is no
/// fault of theirs.
pub fn fault_of(endpoint: &Endpoint) -> Option<String> {
    read_settings(endpoint).err()
}

/// Reads a body up to its end, or to `most` bytes; whether it was the end. What `keep` wants of a frame it
/// copies, because a slice would keep the connection's whole read buffer alive for as long as the outcome.
async fn read(
    connection: &mut Connection,
    mut body: Incoming,
    most: usize,
    mut keep: impl FnMut(&[u8]),
) -> bool {
    let mut unread = most;
    while let Some(frame) = connection.read(&mut body).await {
        let Ok(frame) = frame else { return false };
        // Trailers say nothing to us.
        let Ok(data) = frame.into_data() else { continue };
        let taken = data.len().min(unread);
        keep(&data[..taken]);
        unread -= taken;
        if taken < data.len() {
            return false;
        }
    }
    true
}

fn outcome(
    endpoint: &Endpoint,
    started_at: Timestamp,
    progress: Progress,
    ended: Result<(), Failure>,
) -> Outcome {
    let (class, error) = match (ended, progress.status) {
        (Err(failure), _) => (failure.class, Some(failure.error)),
        (Ok(()), Some(200..=299)) => (Class::Accepted, None),
        (Ok(()), Some(300..=399)) => (Class::Rejected, Some("redirects are not followed".to_owned())),
        (Ok(()), _) => (Class::Rejected, None),
    };
    let answer = Answer::read(progress.body, progress.whole);
    Outcome {
        class,
        status: progress.status,
        address: endpoint.url.clone(),
        error,
        answer: answer.text,
        provider_message_id: answer.id,
        provider_message: answer.message,
        retry_after_ms: progress.retry_after_ms,
        started_at,
        times: progress.times,
    }
}

fn refused(error: String) -> Failure {
    Failure { class: Class::Refused, error }
}

/// A new connection on which nothing could be written.
fn unsent(error: &hyper::Error) -> Ended {
    let cause = error.source().and_then(|source| source.downcast_ref());
    match cause.and_then(Shortage::in_error) {
        Some(shortage) => Ended::Short(shortage),
        None => refused(describe(error)).into(),
    }
}

fn late(class: Class, what: &str, endpoint: &Endpoint) -> Failure {
    Failure { class, error: format!("no {what} within {}", humantime::format_duration(endpoint.timeout)) }
}

/// A connection that broke after the request may have gone out.
fn broken(error: &hyper::Error) -> Failure {
    if error.is_parse_too_large() {
        return Failure {
            class: Class::BadAnswer,
            error: format!("the answer's head is larger than {} KiB", connection::HEAD_MAX / 1024),
        };
    }
    if error.is_parse() {
        return Failure { class: Class::BadAnswer, error: format!("the answer is not HTTP: {error}") };
    }
    Failure { class: Class::Reset, error: describe(error) }
}

/// What lies behind an error of the HTTP library, in plain words.
fn describe(error: &hyper::Error) -> String {
    if error.is_incomplete_message() {
        return "the connection was closed before the answer".to_owned();
    }
    match error.source() {
        None => error.to_string(),
        Some(source) => match source.downcast_ref() {
            Some(error) => connect::describe(error),
            None => source.to_string(),
        },
    }
}

/// Locks what a panic elsewhere can't have left half done.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests;
