//! Publishes batches: every record of a batch to one partition, and one answer for all of them.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicI64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use arc_swap::ArcSwap;
use rdkafka::client::ClientContext;
use rdkafka::config::{ClientConfig, RDKafkaLogLevel};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::message::{Header, Message, OwnedHeaders};
use rdkafka::producer::{BaseProducer, BaseRecord, DeliveryResult, Producer, ProducerContext};
use tokio::sync::oneshot;

use super::log::LogContext;
use super::{lock, unavailable, unpublished};
use crate::queue::{LaneRecord, Result};
use crate::store::LogPosition;

/// The rest between two tries to put a record into a full client buffer.
const FULL: Duration = Duration::from_millis(5);

/// How long a client is polled for at once. An acknowledgement ends the wait, but the last millisecond of an idle
/// one is spun away: at 100 ms, as the crate's own thread has it, that was half of an idle producer's time.
const POLL: Duration = Duration::from_secs(5);

pub(super) type Client = BaseProducer<AckContext>;

/// The producing client, and what it knows of lanes.
pub(super) struct Publisher {
    config: ClientConfig,
    // Replaced when librdkafka declares it dead; read by every publish.
    client: ArcSwap<Client>,
    rotation: AtomicUsize,
    /// How many partitions each lane has. A plain lock, held for a look-up only.
    partitions: Mutex<BTreeMap<String, i32>>,
}

impl Publisher {
    pub(super) fn new(config: &ClientConfig) -> std::result::Result<Publisher, KafkaError> {
        let mut config = config.clone();
        config
            .set("enable.idempotence", "true")
            .set("acks", "all")
            // Not less: the client's thread waits in whole milliseconds, and spins through what is left of one.
            .set("linger.ms", "1")
            .set("batch.num.messages", "10000")
            .set("batch.size", "2000000")
            .set("queue.buffering.max.messages", "500000")
            .set("queue.buffering.max.kbytes", "262144")
            .set("message.timeout.ms", "15000");
        let client = connect(&config)?;
        Ok(Publisher {
            config,
            client: ArcSwap::new(client),
            rotation: AtomicUsize::new(fastrand::usize(..1_000)),
            partitions: Mutex::default(),
        })
    }

    /// The client as it is now.
    pub(super) fn client(&self) -> Arc<Client> {
        self.client.load_full()
    }

    pub(super) fn known_partitions(&self, lane: &str) -> Option<i32> {
        lock(&self.partitions).get(lane).copied()
    }

    pub(super) fn know(&self, lane: &str, partitions: i32) {
        lock(&self.partitions).insert(lane.to_owned(), partitions);
    }

    pub(super) fn forget(&self, lanes: &[String]) {
        let mut known = lock(&self.partitions);
        for lane in lanes {
            known.remove(lane);
        }
    }

    /// Publishes a batch to the next partition in turn.
    pub(super) async fn publish(
        &self,
        lane: &str,
        partitions: i32,
        records: Vec<LaneRecord>,
    ) -> Result<LogPosition> {
        let turn = self.rotation.fetch_add(1, Ordering::Relaxed);
        let partition = i32::try_from(turn % usize::try_from(partitions).unwrap_or(1).max(1)).unwrap_or(0);
        let client = self.client.load_full();
        let (acks, answer) = Acks::new(records.len());
        for record in &records {
            if let Err(error) = send(&client, lane, partition, record, &acks).await {
                acks.failed(error);
            }
        }
        let published = answer.await.unwrap_or_else(|_| Err(KafkaError::Canceled));
        if let Err(error) = &published {
            // A client that gets nothing out may know leaders of a lane that was made anew since, and keeps to them.
            let late = error.rdkafka_error_code() == Some(RDKafkaErrorCode::MessageTimedOut);
            if late || client.client().fatal_error().is_some() {
                self.replace(&client, error)?;
            }
        }
        published.map(|offset| LogPosition { partition, offset }).map_err(unpublished)
    }

    /// Makes a new client in the place of a dead one, unless somebody else has.
    fn replace(&self, dead: &Arc<Client>, why: &KafkaError) -> Result<()> {
        if !Arc::ptr_eq(&self.client.load(), dead) {
            return Ok(());
        }
        tracing::warn!(target: "kafka", "the producing client is made anew: {why}");
        self.client.store(connect(&self.config).map_err(unavailable)?);
        Ok(())
    }
}

/// A client, and a thread that takes its acknowledgements for as long as anybody holds it.
fn connect(config: &ClientConfig) -> std::result::Result<Arc<Client>, KafkaError> {
    let client: Arc<Client> = Arc::new(config.create_with_context(AckContext::default())?);
    let held = Arc::downgrade(&client);
    let poll = move || {
        while let Some(client) = held.upgrade() {
            client.poll(POLL);
        }
    };
    let thread = std::thread::Builder::new().name("kafka-acks".to_owned()).spawn(poll);
    thread.map_err(|error| {
        KafkaError::ClientCreation(format!("no thread for the acknowledgements: {error}"))
    })?;
    Ok(client)
}

/// Puts one record into the client's buffer, waiting while that is full.
async fn send(
    client: &Client,
    lane: &str,
    partition: i32,
    record: &LaneRecord,
    acks: &Arc<Acks>,
) -> std::result::Result<(), KafkaError> {
    let mut next = BaseRecord::with_opaque_to(lane, Arc::clone(acks))
        .partition(partition)
        .key(&record.key[..])
        .payload(&record.value[..]);
    if !record.headers.is_empty() {
        let mut headers = OwnedHeaders::new_with_capacity(record.headers.len());
        for (key, value) in &record.headers {
            headers = headers.insert(Header { key, value: Some(value) });
        }
        next = next.headers(headers);
    }
    loop {
        match client.send(next) {
            Ok(()) => return Ok(()),
            Err((KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull), back)) => {
                next = back;
                tokio::time::sleep(FULL).await;
            }
            Err((error, _)) => return Err(error),
        }
    }
}

/// Counts a batch's acknowledgements; the last one answers for all.
pub(super) struct Acks {
    left: AtomicUsize,
    last_offset: AtomicI64,
    // Plain locks: taken once a batch, and on failures.
    error: Mutex<Option<KafkaError>>,
    answer: Mutex<Option<oneshot::Sender<std::result::Result<i64, KafkaError>>>>,
}

impl Acks {
    fn new(count: usize) -> (Arc<Acks>, oneshot::Receiver<std::result::Result<i64, KafkaError>>) {
        let (answer, answered) = oneshot::channel();
        let acks = Acks {
            left: AtomicUsize::new(count),
            last_offset: AtomicI64::new(-1),
            error: Mutex::default(),
            answer: Mutex::new(Some(answer)),
        };
        (Arc::new(acks), answered)
    }

    fn acknowledged(&self, offset: i64) {
        self.last_offset.fetch_max(offset, Ordering::Relaxed);
        self.count();
    }

    fn failed(&self, error: KafkaError) {
        lock(&self.error).get_or_insert(error);
        self.count();
    }

    fn count(&self) {
        if self.left.fetch_sub(1, Ordering::AcqRel) > 1 {
            return;
        }
        let error = lock(&self.error).take();
        let answer = lock(&self.answer).take();
        if let Some(answer) = answer {
            // Whoever published may have been stopped meanwhile; the batch in the store is issued again.
            let _ = answer.send(error.map_or_else(|| Ok(self.last_offset.load(Ordering::Relaxed)), Err));
        }
    }
}

/// The producing client's context: logs, and passes acknowledgements to their batch.
#[derive(Default)]
pub(super) struct AckContext {
    log: LogContext,
}

impl ClientContext for AckContext {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        self.log.log(level, facility, message);
    }

    fn error(&self, error: KafkaError, reason: &str) {
        self.log.error(error, reason);
    }
}

impl ProducerContext for AckContext {
    type DeliveryOpaque = Arc<Acks>;

    fn delivery(&self, result: &DeliveryResult<'_>, acks: Arc<Acks>) {
        match result {
            Ok(message) => acks.acknowledged(message.offset()),
            Err((error, _)) => acks.failed(error.clone()),
        }
    }
}
