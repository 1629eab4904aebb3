//! What librdkafka says goes to our log, and not more often than a person wants to read.

use std::sync::atomic::{AtomicU32, Ordering};

use rdkafka::client::ClientContext;
use rdkafka::config::RDKafkaLogLevel;
use rdkafka::consumer::ConsumerContext;
use rdkafka::error::KafkaError;

/// A client's context that only logs.
#[derive(Debug, Default)]
pub(super) struct LogContext {
    repeats: AtomicU32,
}

impl LogContext {
    /// Warnings repeat with every attempt to connect: the first is shown, then every hundredth.
    fn warn(&self, text: &str) {
        if self.repeats.fetch_add(1, Ordering::Relaxed).is_multiple_of(100) {
            tracing::warn!(target: "kafka", "{text}");
        } else {
            tracing::debug!(target: "kafka", "{text}");
        }
    }
}

impl ClientContext for LogContext {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, message: &str) {
        match level {
            RDKafkaLogLevel::Emerg
            | RDKafkaLogLevel::Alert
            | RDKafkaLogLevel::Critical
            | RDKafkaLogLevel::Error
            | RDKafkaLogLevel::Warning => self.warn(&format!("{facility}: {message}")),
            RDKafkaLogLevel::Notice | RDKafkaLogLevel::Info => {
                tracing::debug!(target: "kafka", "{facility}: {message}")
            }
            RDKafkaLogLevel::Debug => tracing::trace!(target: "kafka", "{facility}: {message}"),
        }
    }

    fn error(&self, error: KafkaError, reason: &str) {
        self.warn(&format!("{error}: {reason}"));
    }
}

impl ConsumerContext for LogContext {}
