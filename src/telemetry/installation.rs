//! How the whole installation is, as its store and queue say.

use std::time::Duration;

use prometheus_client::metrics::family::Family;
use prometheus_client::registry::Registry;

use super::{Gauge, Names, Words, register};

#[derive(Debug, Default)]
pub(super) struct InstallationMetrics {
    backlog: Family<Words<1>, Gauge>,
    oldest_due: Family<Words<0>, Gauge>,
    lag: Family<Names<2>, Gauge>,
    active_producers: Family<Words<0>, Gauge>,
    paused: Family<Words<0>, Gauge>,
    breakers: Family<Words<0>, Gauge>,
}

impl InstallationMetrics {
    pub(super) fn register(&self, all: &mut Registry) {
        register(all, "ams_backlog_messages", &self.backlog);
        register(all, "ams_oldest_due_age_seconds", &self.oldest_due);
        register(all, "ams_lane_lag", &self.lag);
        register(all, "ams_active_producers", &self.active_producers);
        register(all, "ams_producers_paused", &self.paused);
        register(all, "ams_breakers", &self.breakers);
    }

    /// Shows what is known, and takes away what is not.
    pub(super) fn show(&self, known: &Installation) {
        let (backlog, lag) = (&self.backlog, &self.lag);
        backlog.clear();
        lag.clear();
        for (status, count) in &known.backlog {
            backlog.get_or_create(&[("status", *status)]).set(*count as f64);
        }
        for (lane, partition, count) in &known.lag {
            let labels = [("lane", lane.clone()), ("partition", partition.to_string())];
            lag.get_or_create(&labels).set(*count as f64);
        }
        show(&self.oldest_due, known.oldest_due.map(|age| age.as_secs_f64()));
        show(&self.active_producers, known.active.map(|active| f64::from(u8::from(active))));
        show(&self.paused, known.paused.map(|paused| f64::from(u8::from(paused))));
        show(&self.breakers, known.breakers.map(|count| count as f64));
    }
}

/// Shows a gauge, or takes it away.
fn show(gauge: &Family<Words<0>, Gauge>, value: Option<f64>) {
    match value {
        Some(value) => drop(gauge.get_or_create(&[]).set(value)),
        None => gauge.clear(),
    }
}

/// How the whole installation is; what is not known is empty.
#[derive(Clone, Debug, Default)]
pub struct Installation {
    /// Messages that are not final, by status.
    pub backlog: Vec<(&'static str, u64)>,
    /// For how long the oldest due message has been due; zero when none is.
    pub oldest_due: Option<Duration>,
    /// Lane, partition, and tickets there that are not begun.
    pub lag: Vec<(String, i32, i64)>,
    /// Whether a producer is active, and whether producers are paused.
    pub active: Option<bool>,
    pub paused: Option<bool>,
    /// Circuit breakers that are not closed.
    pub breakers: Option<usize>,
}
