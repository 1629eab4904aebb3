//! Clocks that are wrong: hosts that disagree, clocks that are set while processes work, and a host whose clock was an
//! hour ahead and which died, so that what it wrote down is from the future.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::time::Duration;

use ams::testclient::TestClientOptions;

use crate::harness::*;
use crate::kills::{Load, rows};

/// The promise: work resumes within 30 s.
const HEALED: Duration = Duration::from_secs(30);

/// How a store counts an hour: what is to be added to its times.
fn an_hour_ahead(hour: &str) -> String {
    format!(
        "update leader set until = until + {hour}, steady_since = steady_since + {hour}, \
             paced_until = paced_until + {hour}; \
         update instances set started_at = started_at + {hour}, seen_at = seen_at + {hour}, \
             lease_until = lease_until + {hour}; \
         update batches set created_at = created_at + {hour}"
    )
}

/// Waits until a message that is inserted now has arrived, and the one that the dead process had in flight has been
/// sent again; its first answer reached nobody.
async fn healed(what: &str, receiver: &Receiver) {
    let arrived = |id, times| receiver.accepted().get(&id) == Some(&times);
    let new = until(what, HEALED, async || arrived(2, 1)).await;
    let again = until(what, HEALED.saturating_sub(new), async || arrived(1, 2)).await;
    println!(
        "{what}: a new message after {:.1} s, the old one after {:.1} s",
        new.as_secs_f64(),
        (new + again).as_secs_f64()
    );
}

/// A receiver that takes its time, so that a message is in flight when its sender dies.
async fn slow() -> Receiver {
    Receiver::start(TestClientOptions { latency: Duration::from_secs(3), ..TestClientOptions::default() })
        .await
}

#[tokio::test]
async fn a_dead_leader_from_the_future_is_succeeded_on_postgres() {
    let receiver = slow().await;
    let stack = Stack::new("clocks", &receiver).await;
    let paced: &[(&str, &str)] = &[("INTERVAL", "1s"), ("BATCH_COUNT", "100")];
    let (producer, consumer) = (stack.start("producer", paced), stack.start("consumer", &[]));
    stack.insert(1).await;
    until("it is in flight", Duration::from_secs(30), async || {
        stack.statuses().await.contains_key("processing")
    })
    .await;
    producer.kill();
    consumer.kill();
    let hour = "interval '1 hour'";
    stack.sql().await.batch_execute(&an_hour_ahead(hour)).await.unwrap();
    let _again = [stack.start("producer", paced), stack.start("consumer", &[])];
    stack.insert(1).await;
    healed("PostgreSQL", &receiver).await;
}

/// `ams up` without settings, in `folder`.
fn up(receiver: &Receiver, folder: &Path, more: &[(&str, &str)]) -> Child {
    let mut command = embedded(folder);
    command.args(["up", "--port", "0"]).env("REQUEST_URL", &receiver.url);
    command.envs(more.iter().copied()).stdout(Stdio::null()).spawn().unwrap()
}

#[tokio::test]
async fn a_dead_leader_from_the_future_is_succeeded_on_sqlite() {
    let _alone = tokio::task::spawn_blocking(alone).await.unwrap();
    let receiver = slow().await;
    let folder = tempfile::tempdir().unwrap();
    let start = || up(&receiver, folder.path(), &[]);
    let mut up = start();
    let file = folder.path().join("ams-data/ams.db");
    until("the store is there", Duration::from_secs(10), async || file.exists()).await;
    let sql = rusqlite::Connection::open(&file).unwrap();
    let insert = "insert into messages (recipient, content) values ('+90', 'Hello')";
    until("the store is migrated", Duration::from_secs(10), async || sql.execute_batch(insert).is_ok()).await;
    let begun = "select count(*) from message_status where status = 'processing'";
    until("it is in flight", Duration::from_secs(10), async || {
        sql.query_row(begun, [], |row| row.get::<_, i64>(0)).is_ok_and(|count| count == 1)
    })
    .await;
    up.kill().unwrap();
    up.wait().unwrap();
    sql.execute_batch(&an_hour_ahead("3600000000")).unwrap();
    let mut up = start();
    sql.execute_batch(insert).unwrap();
    healed("SQLite", &receiver).await;
    up.kill().unwrap();
    up.wait().unwrap();
}

/// The wall clock of one process: the machine's, and as far ahead of it as the test says.
struct WallClock {
    ahead_us: PathBuf,
    library: PathBuf,
}

impl WallClock {
    fn new(folder: &Path, name: &str, seconds: i64) -> WallClock {
        let clock = WallClock { ahead_us: folder.join(name), library: folder.join("wall_clock.so") };
        if !clock.library.exists() {
            let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/system/wall_clock.c");
            tool("cc", &["-shared", "-fPIC", "-O1", "-o", clock.library.to_str().unwrap(), source]);
        }
        File::create(&clock.ahead_us).unwrap();
        clock.set(seconds);
        clock
    }

    /// Sets the clock. What measures intervals goes on, as when somebody sets a real one.
    fn set(&self, seconds: i64) {
        // In place, because the process has mapped the file.
        let file = File::options().write(true).open(&self.ahead_us).unwrap();
        file.write_all_at(&(seconds * 1_000_000).to_ne_bytes(), 0).unwrap();
    }

    /// Makes a process go by this clock.
    fn environment(&self) -> [(&str, &str); 2] {
        [("LD_PRELOAD", self.library.to_str().unwrap()), ("WALL_CLOCK", self.ahead_us.to_str().unwrap())]
    }
}

/// By how many seconds clocks are set.
const STEPS: [i64; 4] = [3_600, -15, -3_600, 15];

/// A little longer than a lease: who is taken for dead because of a step is taken for dead within it.
const STEP: Duration = Duration::from_secs(11);

/// For so long at most nothing arrives: a third of what is promised, because nobody has died.
const SILENCE: Duration = Duration::from_secs(10);

/// The longest time without an arrival since the first one.
fn longest_silence(receiver: &Receiver) -> Duration {
    let times: Vec<_> = receiver.seen().into_iter().map(|(_, at)| at).collect();
    times.windows(2).map(|pair| pair[1].since(pair[0])).max().unwrap()
}

/// Each process is on a host of its own, and no two of these hosts ever agree.
#[tokio::test]
async fn clocks_that_are_set_stop_and_repeat_nothing() {
    let (folder, latency) = (tempfile::tempdir().unwrap(), Duration::from_millis(100));
    let options = TestClientOptions { latency, error_rate: 0.02, ..TestClientOptions::default() };
    let receiver = Receiver::start(options).await;
    let stack = Stack::new("wrong_clocks", &receiver).await;
    let verbs = ["producer", "producer", "consumer", "consumer", "retry-consumer"];
    let clocks: Vec<_> =
        (0..verbs.len()).map(|i| WallClock::new(folder.path(), &i.to_string(), STEPS[i % 4])).collect();
    let _services: Vec<_> =
        clocks.iter().zip(verbs).map(|(clock, verb)| stack.start(verb, &clock.environment())).collect();
    let load = Load::start(&stack);
    until("it runs", HEALED, async || receiver.arrivals() > 1_000).await;
    for round in 1..=STEPS.len() {
        for (i, clock) in clocks.iter().enumerate() {
            clock.set(STEPS[(i + round) % 4]);
        }
        let_run(STEP).await;
    }
    load.finish().await;
    let count = rows(&stack).await;
    let ended = stack.all_final(count, HEALED).await;
    let (silence, repeats) = (longest_silence(&receiver), receiver.duplicates());
    println!("clocks set: {count} messages, {ended:?}, {repeats} repeats, silent for at most {silence:?}");
    assert_eq!(receiver.accepted().len() as i64, *ended.get("sent").unwrap());
    assert_eq!(repeats, 0);
    assert!(silence < SILENCE, "{silence:?}");
}

#[tokio::test]
async fn a_clock_that_is_set_stops_and_repeats_nothing_on_sqlite() {
    let _alone = tokio::task::spawn_blocking(alone).await.unwrap();
    let latency = Duration::from_millis(100);
    let options = TestClientOptions { latency, error_rate: 0.05, ..TestClientOptions::default() };
    let receiver = Receiver::start(options).await;
    let folder = tempfile::tempdir().unwrap();
    let clock = WallClock::new(folder.path(), "clock", 0);
    let mut up = up(&receiver, folder.path(), &clock.environment());
    let file = folder.path().join("ams-data/ams.db");
    until("the store is there", Duration::from_secs(10), async || file.exists()).await;
    let sql = rusqlite::Connection::open(&file).unwrap();
    sql.busy_timeout(Duration::from_secs(5)).unwrap();
    let insert = "insert into messages (recipient, content) values ('+90', 'Hello')";
    until("the store is migrated", Duration::from_secs(10), async || sql.execute_batch(insert).is_ok()).await;
    let mut tick = tokio::time::interval(Duration::from_millis(20));
    for step in STEPS {
        clock.set(step);
        let watch = ams::clock::Clock::system().stopwatch();
        while watch.elapsed() < STEP {
            tick.tick().await;
            sql.execute_batch(insert).unwrap();
        }
    }
    let open = "select count(*) from messages where id not in (select message_id from deliveries)";
    until("all have ended", HEALED, async || {
        sql.query_row(open, [], |row| row.get::<_, i64>(0)).is_ok_and(|count| count == 0)
    })
    .await;
    let (silence, repeats) = (longest_silence(&receiver), receiver.duplicates());
    println!("clock set on SQLite: {} arrivals, silent for at most {silence:?}", receiver.arrivals());
    assert_eq!(repeats, 0);
    assert!(silence < SILENCE, "{silence:?}");
    up.kill().unwrap();
    up.wait().unwrap();
}
