//! A stack of its own for each test: a database, lanes, a receiver, and `ams` processes.

use std::collections::BTreeMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use ams::clock::{Clock, Stopwatch, Timestamp};
use ams::testclient::{self, Seen, TestClientOptions};
use tokio::net::TcpListener;
use tokio::sync::{Mutex as AsyncMutex, MutexGuard};
use tokio_util::sync::CancellationToken;

/// The services are shared and some tests kill them.
static ONE_AT_A_TIME: AsyncMutex<()> = AsyncMutex::const_new(());

/// Waits until no other test runs: for those that have no [`Stack`] and still need the machine.
pub fn alone() -> MutexGuard<'static, ()> {
    ONE_AT_A_TIME.blocking_lock()
}

/// A setting of the tests themselves.
pub fn setting(name: &str) -> Option<String> {
    #[expect(
        clippy::disallowed_methods,
        reason = "the tests are told by the environment where the services are"
    )]
    std::env::var(name).ok()
}

/// Whether the program under test was built to be judged by its speed. The test build is several times
/// slower and shares its two cores with the services, so its figures are only looked at roughly.
pub fn release() -> bool {
    setting("AMS_TEST_BINARY").is_some()
}

fn service_url(name: &str) -> String {
    setting(name).unwrap_or_else(|| {
        panic!(
            "{name} is not set: run `make test`, or `dev/services start` and `eval \"$(dev/services env)\"`"
        )
    })
}

/// Calls `dev/services` on the services that the tests run on.
pub fn services(verb: &str, name: &str) {
    let status = Command::new("dev/services").args([verb, name]).stdout(Stdio::null()).status().unwrap();
    assert!(status.success(), "dev/services {verb} {name}: {status}");
}

/// Looks every 50 ms until `condition` holds; panics with `what` after `limit`.
pub async fn until(what: &str, limit: Duration, mut condition: impl AsyncFnMut() -> bool) -> Duration {
    let watch = Clock::system().stopwatch();
    let mut tick = tokio::time::interval(Duration::from_millis(50));
    loop {
        tick.tick().await;
        if condition().await {
            return watch.elapsed();
        }
        assert!(watch.elapsed() < limit, "after {limit:?} still not: {what}");
    }
}

/// Lets the system under test run for a while: time is what is tested then.
pub async fn let_run(time: Duration) {
    let _ = tokio::time::timeout(time, std::future::pending::<()>()).await;
}

/// A listener below the ephemeral range, so that no client takes the port first.
async fn listen() -> TcpListener {
    loop {
        if let Ok(listener) = TcpListener::bind(("127.0.0.1", fastrand::u16(20_000..28_000))).await {
            return listener;
        }
    }
}

/// A port for a service that is started again and again.
pub async fn free_port() -> u16 {
    listen().await.local_addr().unwrap().port()
}

/// A receiver in the test's own process, on a thread of its own: a test that waits for a tool must not keep
/// requests waiting too.
pub struct Receiver {
    pub url: String,
    log: Arc<Mutex<Log>>,
    stop: CancellationToken,
}

/// What a receiver has seen. How often each message was accepted is kept beside it, because tests ask for that
/// many times a second.
#[derive(Default)]
struct Log {
    seen: Vec<(Seen, Timestamp)>,
    accepted: BTreeMap<i64, usize>,
}

impl Log {
    fn add(&mut self, seen: Seen, at: Timestamp) {
        if (200..300).contains(&seen.status) {
            *self.accepted.entry(seen.id).or_default() += 1;
        }
        self.seen.push((seen, at));
    }
}

impl Receiver {
    pub async fn start(options: TestClientOptions) -> Receiver {
        Receiver::on(listen().await, options)
    }

    /// Another in its place: on its port, once that is free.
    pub async fn replace(self, options: TestClientOptions) -> Receiver {
        let address = self.url.trim_start_matches("http://").to_owned();
        drop(self);
        let mut listener = None;
        until("the port is free", Duration::from_secs(10), async || {
            listener = TcpListener::bind(&address).await.ok();
            listener.is_some()
        })
        .await;
        Receiver::on(listener.unwrap(), options)
    }

    fn on(listener: TcpListener, options: TestClientOptions) -> Receiver {
        let url = format!("http://{}", listener.local_addr().unwrap());
        let log: Arc<Mutex<Log>> = Arc::default();
        let (sink, stop, clock) = (Arc::clone(&log), CancellationToken::new(), Clock::system());
        let sink = move |one: Seen| sink.lock().unwrap().add(one, clock.now());
        let options = TestClientOptions { quiet: true, sink: Some(Arc::new(sink)), ..options };
        let (listener, stopped) = (listener.into_std().unwrap(), stop.clone());
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
            runtime.block_on(async {
                testclient::run(TcpListener::from_std(listener).unwrap(), options, stopped).await;
            });
        });
        Receiver { url, log, stop }
    }

    /// Everything that has arrived, oldest first.
    pub fn seen(&self) -> Vec<(Seen, Timestamp)> {
        self.log.lock().unwrap().seen.clone()
    }

    pub fn arrivals(&self) -> usize {
        self.log.lock().unwrap().seen.len()
    }

    /// How often each message was accepted.
    pub fn accepted(&self) -> BTreeMap<i64, usize> {
        self.log.lock().unwrap().accepted.clone()
    }

    /// Whether a message with this id or a higher one was accepted.
    pub fn accepted_from(&self, id: i64) -> bool {
        self.log.lock().unwrap().accepted.range(id..).next().is_some()
    }

    /// Accepted deliveries beyond the first of each message.
    pub fn duplicates(&self) -> usize {
        self.accepted().values().map(|count| count - 1).sum()
    }

    /// Asserts that every attempt of a message carried the same `webhook-id`, and that no two share one.
    pub fn assert_ids_are_stable(&self) {
        let mut ids: BTreeMap<i64, String> = BTreeMap::new();
        for (seen, _) in &self.log.lock().unwrap().seen {
            let known = ids.entry(seen.id).or_insert_with(|| seen.webhook_id.clone());
            assert_eq!(*known, seen.webhook_id, "message {}", seen.id);
        }
        let distinct: std::collections::BTreeSet<_> = ids.values().collect();
        assert_eq!(distinct.len(), ids.len());
    }
}

impl Drop for Receiver {
    fn drop(&mut self) {
        self.stop.cancel();
    }
}

/// An `ams` process.
pub struct Service {
    pub verb: String,
    child: Child,
}

impl Service {
    pub fn signal(&self, signal: &str) {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args([signal, &pid]).status().unwrap().success());
    }

    /// A line of `/proc/<pid>/status`, such as `VmRSS` or `VmHWM` (the most so far), in MB.
    pub fn memory_mb(&self, line: &str) -> f64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find(|found| found.starts_with(line)).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<f64>().unwrap() / 1_024.0
    }

    /// As a power cut would end it.
    pub fn kill(mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }

    /// Asks for a clean stop and waits for it.
    pub async fn stop(mut self) -> ExitStatus {
        self.signal("-TERM");
        let mut status = None;
        until("the process has stopped", Duration::from_secs(45), async || {
            status = self.child.try_wait().unwrap();
            status.is_some()
        })
        .await;
        status.unwrap()
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// An `ams` command on embedded parts, in `folder`.
pub fn embedded(folder: &Path) -> Command {
    let mut command = Command::new(program());
    command.current_dir(folder).stdin(Stdio::null());
    without_services(&mut command);
    command
}

/// Takes away what would have a command use the services of the tests.
pub fn without_services(command: &mut Command) {
    for name in ["DATABASE_URL", "KAFKA_BROKERS", "REDIS_URL"] {
        command.env_remove(name);
    }
}

/// The program under test.
pub fn program() -> PathBuf {
    // Commands run in folders of their own.
    setting("AMS_TEST_BINARY")
        .map_or_else(|| env!("CARGO_BIN_EXE_ams").into(), |path| std::fs::canonicalize(path).unwrap())
}

/// Enough to see what the processes last waited for.
const LOG_LINES: usize = 60;

/// A full stack: its database and lanes are named after it.
pub struct Stack {
    pub name: String,
    pub database_url: String,
    pub environment: BTreeMap<String, String>,
    pub log: PathBuf,
    _alone: MutexGuard<'static, ()>,
}

impl Stack {
    /// A migrated, empty stack whose default endpoint is `receiver`.
    pub async fn new(test: &str, receiver: &Receiver) -> Stack {
        let alone = ONE_AT_A_TIME.lock().await;
        let name = format!("{test}_{:08x}", fastrand::u32(..));
        let server = service_url("DATABASE_URL");
        let mut url = url::Url::parse(&server).unwrap();
        sql_on(&server).await.batch_execute(&format!("create database {name}")).await.unwrap();
        url.set_path(&name);
        let log = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}.log"));
        let set =
            |pairs: &[(&str, &str)]| pairs.iter().map(|(k, v)| ((*k).to_owned(), (*v).to_owned())).collect();
        let environment = set(&[
            ("DATABASE_URL", url.as_str()),
            ("KAFKA_BROKERS", &service_url("KAFKA_BROKERS")),
            ("REDIS_URL", &service_url("REDIS_URL")),
            ("REQUEST_URL", &receiver.url),
            ("KAFKA_GROUP_ID", &name),
            ("KAFKA_TOPIC", &format!("{name}-fresh")),
            ("KAFKA_TOPIC_RETRY", &format!("{name}-retry")),
            ("PORT", "0"),
        ]);
        let stack = Stack { name, database_url: url.into(), environment, log, _alone: alone };
        assert!(stack.command("migrate", &[]).status().unwrap().success());
        stack
    }

    /// An `ams` command in this stack's environment, logging to its file.
    pub fn command(&self, verb: &str, more: &[(&str, &str)]) -> Command {
        let log = || File::options().append(true).create(true).open(&self.log).unwrap();
        let mut command = Command::new(program());
        command.arg(verb).envs(&self.environment).stdin(Stdio::null()).stdout(log()).stderr(log());
        if verb == "retry-consumer" {
            let retry = [format!("{}-retry", self.name), format!("{}-dlq", self.name)];
            command.env("KAFKA_TOPIC", &retry[0]).env("KAFKA_TOPIC_RETRY", &retry[1]);
        }
        command.envs(more.iter().copied());
        command
    }

    pub fn start(&self, verb: &str, more: &[(&str, &str)]) -> Service {
        Service { verb: verb.to_owned(), child: self.command(verb, more).spawn().unwrap() }
    }

    pub async fn sql(&self) -> tokio_postgres::Client {
        sql_on(&self.database_url).await
    }

    /// Inserts `count` rows as any program would.
    pub async fn insert(&self, count: i64) {
        let statement = "insert into messages (recipient, content) select '+' || i, 'Hello ' || i from generate_series(1, $1::bigint) i";
        self.sql().await.execute(statement, &[&count]).await.unwrap();
    }

    /// How many deliveries are processing.
    pub async fn processing(&self) -> i64 {
        let statement = "select coalesce(sum(bit_count(\"left\")), 0)::bigint from leases";
        self.sql().await.query_one(statement, &[]).await.unwrap().get(0)
    }

    /// How many messages there are, and how many have ended: cheaper than to ask for each one's status.
    async fn ended(&self) -> Option<(i64, i64)> {
        let statement = "select (select count(*) from messages), (select count(*) from deliveries)";
        self.sql().await.query_one(statement, &[]).await.ok().map(|row| (row.get(0), row.get(1)))
    }

    /// How many messages have each status.
    pub async fn statuses(&self) -> BTreeMap<String, i64> {
        let statement = "select status::text, count(*) from message_status group by 1";
        let rows = self.sql().await.query(statement, &[]).await;
        // An outage is part of some tests; then nothing is known.
        rows.map(|rows| rows.iter().map(|row| (row.get(0), row.get(1))).collect()).unwrap_or_default()
    }

    /// Waits until every message is final and `count` exist; returns how many ended how.
    pub async fn all_final(&self, count: i64, limit: Duration) -> BTreeMap<String, i64> {
        let watch: Stopwatch = Clock::system().stopwatch();
        let mut tick = tokio::time::interval(Duration::from_millis(200));
        loop {
            tick.tick().await;
            let is_over = watch.elapsed() >= limit;
            if self.ended().await != Some((count, count)) && !is_over {
                continue;
            }
            let last = self.statuses().await;
            let ended =
                ["sent", "dead", "cancelled", "expired"].iter().filter_map(|s| last.get(*s)).sum::<i64>();
            if ended == count && last.values().sum::<i64>() == count {
                return last;
            }
            assert!(!is_over, "after {limit:?} not all final: {last:?}; log: {}", self.log.display());
        }
    }
}

impl Drop for Stack {
    /// A test that fails shows what the processes said last: their log may go with the machine.
    fn drop(&mut self) {
        if std::thread::panicking()
            && let Ok(log) = std::fs::read_to_string(&self.log)
        {
            let lines: Vec<_> = log.lines().collect();
            let last = &lines[lines.len().saturating_sub(LOG_LINES)..];
            eprintln!("the last lines of {}:\n{}", self.log.display(), last.join("\n"));
        }
    }
}

/// A connection whose other half runs until it is dropped.
pub async fn sql_on(url: &str) -> tokio_postgres::Client {
    let (client, connection) = tokio_postgres::connect(url, tokio_postgres::NoTls).await.unwrap();
    tokio::spawn(connection);
    client
}

/// Runs a tool that the tests need and returns what it printed.
pub fn tool(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).stdin(Stdio::null()).output();
    let output =
        output.unwrap_or_else(|error| panic!("{program} is needed: {error}; run `dev/packages services`"));
    assert!(output.status.success(), "{program}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}
