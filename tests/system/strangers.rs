//! What others put beside us on a lane: records that are no tickets, and consumer groups that are not ours.

use std::time::Duration;

use ams::testclient::TestClientOptions;
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::config::ClientConfig;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::message::{Headers, Message};

use crate::harness::*;

/// How soon messages arrive beside what does not work.
const SOON: Duration = Duration::from_secs(20);

async fn receiver() -> Receiver {
    Receiver::start(TestClientOptions::default()).await
}

fn kafka(stack: &Stack) -> ClientConfig {
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", &stack.environment["KAFKA_BROKERS"]).set("group.id", "reader");
    config.set("auto.offset.reset", "earliest");
    config
}

/// Puts a file of zeros on the fresh lane, as one record each time. Compressed it is small, so the broker takes it.
fn zeros(stack: &Stack, megabytes: usize, times: usize) {
    let folder = tempfile::tempdir().unwrap();
    let file = folder.path().join("zeros");
    std::fs::write(&file, vec![0; megabytes << 20]).unwrap();
    let (brokers, topic) = (&stack.environment["KAFKA_BROKERS"], format!("{}-fresh", stack.name));
    let fixed = ["-P", "-b", brokers, "-t", &topic, "-z", "gzip", "-X", "message.max.bytes=50000000"];
    let mut arguments = fixed.to_vec();
    arguments.extend(std::iter::repeat_n(file.to_str().unwrap(), times));
    tool("kcat", &arguments);
}

/// Makes the dead-letter lane with these settings before any service does.
async fn dead_letter_lane(stack: &Stack, settings: &[(&str, &str)]) {
    let admin: AdminClient<DefaultClientContext> = kafka(stack).create().unwrap();
    let name = format!("{}-dlq", stack.name);
    let topic = NewTopic::new(&name, 1, TopicReplication::Fixed(1));
    let topic = settings.iter().fold(topic, |topic, (key, value)| topic.set(key, value));
    let made = admin.create_topics(&[topic], &AdminOptions::new()).await.unwrap();
    assert!(made.iter().all(Result::is_ok), "{made:?}");
}

/// What is on the dead-letter lane: bytes of the value, and the headers.
async fn dead_letters(stack: &Stack, count: usize) -> Vec<(usize, Vec<(String, String)>)> {
    let reader: BaseConsumer = kafka(stack).create().unwrap();
    reader.subscribe(&[&format!("{}-dlq", stack.name)]).unwrap();
    let mut found = Vec::new();
    until("the dead letters are there", Duration::from_secs(60), async || {
        while let Some(Ok(record)) = reader.poll(Duration::from_millis(20)) {
            let text = |value: Option<&[u8]>| String::from_utf8(value.unwrap_or_default().to_vec()).unwrap();
            let headers = record.headers().into_iter().flat_map(|headers| headers.iter());
            let headers = headers.map(|header| (header.key.to_owned(), text(header.value))).collect();
            found.push((record.payload().unwrap_or_default().len(), headers));
        }
        found.len() >= count
    })
    .await;
    found
}

/// How many unreadable records ended so, as the consumer counts them.
fn counted(port: u16, stack: &Stack, end: &str) -> u64 {
    let text = tool("curl", &["-s", &format!("http://127.0.0.1:{port}/metrics")]);
    let lane = format!("lane=\"{}-fresh\"", stack.name);
    let line = text.lines().find(|line| {
        line.starts_with("ams_unreadable_records_total")
            && line.contains(&lane)
            && line.contains(&format!("end=\"{end}\""))
    });
    line.and_then(|line| line.split_whitespace().last()?.parse().ok()).unwrap_or(0)
}

struct Bench {
    receiver: Receiver,
    stack: Stack,
    consumer: Service,
    _others: Vec<Service>,
    port: u16,
}

impl Bench {
    async fn start(name: &str, dead_letter: &[(&str, &str)]) -> Bench {
        let receiver = receiver().await;
        let stack = Stack::new(name, &receiver).await;
        if !dead_letter.is_empty() {
            dead_letter_lane(&stack, dead_letter).await;
        }
        let port = free_port().await;
        let others = vec![stack.start("producer", &[]), stack.start("retry-consumer", &[])];
        // A consumer that starts after the retry lane was registered knows from its start where the chain ends.
        let registered = "select count(*) from lanes where topic = $1";
        let topic = format!("{}-retry", stack.name);
        until("the retry lane is registered", SOON, async || {
            stack.sql().await.query_one(registered, &[&topic]).await.unwrap().get::<_, i64>(0) == 1
        })
        .await;
        let consumer = stack.start("consumer", &[("METRICS_PORT", &port.to_string())]);
        stack.insert(100).await;
        until("it runs", Duration::from_secs(30), async || receiver.accepted().len() == 100).await;
        Bench { receiver, stack, consumer, _others: others, port }
    }

    /// Messages arrive as soon as ever.
    async fn goes_on(&self, what: &str) {
        let before = self.receiver.accepted().len();
        self.stack.insert(2_000).await;
        let all = async || self.receiver.accepted().len() == before + 2_000;
        let took = until("messages arrive beside it", SOON, all).await;
        assert_eq!(self.receiver.duplicates(), 0);
        println!("{what}: 2,000 messages arrive {took:.1?} later");
    }
}

#[tokio::test]
async fn a_record_larger_than_any_lane_takes_is_dead_lettered_in_part() {
    let bench = Bench::start("large", &[]).await;
    zeros(&bench.stack, 20, 1);
    bench.goes_on("a record of 20 MB of zeros").await;
    let letters = dead_letters(&bench.stack, 1).await;
    let (bytes, headers) = &letters[0];
    assert!((1..=1 << 20).contains(bytes), "{bytes}");
    let header = |name| headers.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str());
    assert_eq!(header("size"), Some("20971520"));
    assert!(header("reason").is_some_and(|reason| reason.contains("20971520 bytes")), "{headers:?}");
    until("it is counted", SOON, async || counted(bench.port, &bench.stack, "cut") == 1).await;
}

#[tokio::test]
async fn many_large_records_do_not_fill_the_memory() {
    let bench = Bench::start("many_large", &[]).await;
    let before = bench.consumer.memory_mb("VmHWM");
    zeros(&bench.stack, 20, 100);
    bench.goes_on("100 records of 20 MB of zeros").await;
    until("they are dead letters", Duration::from_secs(60), async || {
        counted(bench.port, &bench.stack, "cut") == 100
    })
    .await;
    let after = bench.consumer.memory_mb("VmHWM");
    println!("100 records of 20 MB: the consumer grew from {before:.0} to {after:.0} MB");
    assert!(after < before + 400.0, "{before} to {after} MB");
}

#[tokio::test]
async fn a_dead_letter_lane_with_a_small_limit_takes_the_start_of_a_record_or_is_given_up() {
    // Whole, in part, not at all: a record of 2 MB on lanes that take so many bytes.
    for (limit, end) in [("1048588", "cut"), ("2000", "given_up")] {
        let bench = Bench::start("small_limit", &[("max.message.bytes", limit)]).await;
        // Zeros would be small enough once compressed, but our own producer does not compress.
        zeros(&bench.stack, 2, 1);
        bench.goes_on(&format!("a dead-letter lane that takes {limit} bytes")).await;
        until("it has ended", SOON, async || counted(bench.port, &bench.stack, end) == 1).await;
        if end == "cut" {
            let letters = dead_letters(&bench.stack, 1).await;
            assert!(letters[0].1.contains(&("size".to_owned(), "2097152".to_owned())), "{letters:?}");
        }
    }
}

#[tokio::test]
async fn a_dead_letter_lane_that_takes_nothing_stops_no_message() {
    // It takes only what was written in the very millisecond: nearly every write fails, as if it might pass.
    let bench = Bench::start("takes_nothing", &[("message.timestamp.before.max.ms", "0")]).await;
    for _ in 0..3 {
        zeros(&bench.stack, 1, 1);
        bench.goes_on("a dead-letter lane that takes nothing").await;
    }
    let ended = |end| counted(bench.port, &bench.stack, end);
    let all = async || ended("given_up") + ended("published") == 3;
    let took = until("all have ended", Duration::from_secs(120), all).await;
    let given_up = ended("given_up");
    assert!(given_up > 0, "the lane took all of them, so this has shown nothing");
    println!("{given_up} of 3 given up, {took:.1?} later");
    bench.goes_on("after that").await;
}

#[tokio::test]
async fn a_second_group_that_comes_and_goes_stops_nothing() {
    let receiver = receiver().await;
    let stack = Stack::new("second_group", &receiver).await;
    let _services = ["producer", "consumer", "retry-consumer"].map(|verb| stack.start(verb, &[]));
    stack.insert(2_000).await;
    until("it runs", Duration::from_secs(30), async || receiver.accepted().len() > 1_000).await;
    let registered = async || -> (String, i32) {
        let statement = "select consumer_group, tries from lanes where topic = $1";
        let topic = format!("{}-fresh", stack.name);
        let row = stack.sql().await.query_one(statement, &[&topic]).await.unwrap();
        (row.get(0), row.get(1))
    };
    let group = format!("{}_test", stack.name);
    let second = stack.start("consumer", &[("KAFKA_GROUP_ID", &group), ("RETRY_COUNT", "7")]);
    let theirs = (group.clone(), 7);
    until("the second group is there", SOON, async || registered().await == theirs).await;
    stack.insert(2_000).await;
    until("it works", SOON, async || receiver.accepted().len() == 4_000).await;
    assert_eq!(registered().await, theirs, "the newest settings win while both groups are there");
    assert!(second.stop().await.success());

    stack.insert(40_000).await;
    let watch = ams::clock::Clock::system().stopwatch();
    let ended = stack.all_final(44_000, Duration::from_secs(90)).await;
    assert_eq!(ended.get("sent"), Some(&44_000), "{ended:?}");
    assert_eq!((receiver.accepted().len(), receiver.duplicates()), (44_000, 0));
    println!("a second group has gone: 40,000 messages arrive {:.1?} later", watch.elapsed());
    let ours = (stack.name.clone(), 1);
    until("the settings are ours again", SOON, async || registered().await == ours).await;
}
