//! The queue on Apache Kafka.
