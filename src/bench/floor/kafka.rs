//! Bare librdkafka: publish the bytes of all messages to one topic, and take them again.

use std::time::Duration;

use rdkafka::ClientConfig;
use rdkafka::admin::{AdminClient, AdminOptions, NewTopic, TopicReplication};
use rdkafka::client::DefaultClientContext;
use rdkafka::consumer::{BaseConsumer, Consumer};
use rdkafka::error::{KafkaError, RDKafkaErrorCode};
use rdkafka::producer::{BaseProducer, BaseRecord, Producer};
use rdkafka::{Message, Offset, TopicPartitionList};

use super::{Job, Meter, body};
use crate::app::{AppError, Result};
use crate::bench::failed;

/// How long the broker may take for all of it.
const PATIENCE: Duration = Duration::from_secs(60);

type Kafka<T> = std::result::Result<T, KafkaError>;

/// Measures publish and take.
pub(super) async fn measure(Job { testbed, content, count }: Job<'_>, meter: &mut Meter<'_>) -> Result<()> {
    let (config, topic) = (testbed.kafka(), testbed.name(&format!("floor_{:08x}", fastrand::u32(..))));
    let wrong = |error: KafkaError| failed("the floor's queue failed")(&error);
    let admin: AdminClient<DefaultClientContext> = config.create().map_err(wrong)?;
    let new = [NewTopic::new(&topic, 1, TopicReplication::Fixed(-1))];
    admin.create_topics(&new, &AdminOptions::new()).await.map_err(wrong)?;

    let records: Vec<String> = (0..count).map(|i| body(i, content)).collect();
    let before = meter.start();
    blocking({
        let (config, topic) = (config.clone(), topic.clone());
        move || publish(&config, &topic, &records)
    })
    .await?;
    meter.stop("publish", &before);

    let before = meter.start();
    let taken = blocking(move || take(&config, &topic, count)).await?;
    meter.stop("take", &before);
    if taken != count {
        return Err(AppError(format!("the floor took {taken} of {count} records within {PATIENCE:?}")));
    }
    Ok(())
}

async fn blocking<T: Send + 'static>(work: impl FnOnce() -> Kafka<T> + Send + 'static) -> Result<T> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|error| failed("the thread of the floor's queue failed")(&error))?
        .map_err(|error| failed("the floor's queue failed")(&error))
}

fn publish(config: &ClientConfig, topic: &str, records: &[String]) -> Kafka<()> {
    let producer: BaseProducer = config.clone().set("acks", "all").set("linger.ms", "5").create()?;
    for record in records {
        let mut record = BaseRecord::<str, str>::to(topic).payload(record);
        while let Err((error, back)) = producer.send(record) {
            if error.rdkafka_error_code() != Some(RDKafkaErrorCode::QueueFull) {
                return Err(error);
            }
            producer.poll(Duration::from_millis(10));
            record = back;
        }
    }
    producer.flush(PATIENCE)
}

/// How many records were taken.
fn take(config: &ClientConfig, topic: &str, count: usize) -> Kafka<usize> {
    let consumer: BaseConsumer =
        config.clone().set("group.id", topic).set("enable.auto.commit", "false").create()?;
    let mut partitions = TopicPartitionList::new();
    partitions.add_partition_offset(topic, 0, Offset::Beginning)?;
    consumer.assign(&partitions)?;
    let (mut taken, mut silent) = (0, Duration::ZERO);
    while taken < count && silent < PATIENCE {
        match consumer.poll(Duration::from_secs(1)) {
            Some(record) => {
                taken += usize::from(record?.payload().is_some());
                silent = Duration::ZERO;
            }
            None => silent += Duration::from_secs(1),
        }
    }
    Ok(taken)
}
