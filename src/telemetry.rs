//! What the program says about itself: log set-up, and every metric, declared once with its help.
//!
//! A room asks once for what it counts on a lane and keeps it ([`Metrics::lane`]): nothing is looked up,
//! named or allocated for a message.

mod declared;
mod installation;
mod lane;
mod log;
mod shortages;

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use prometheus_client::encoding::text::encode_registry;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge as WholeGauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::{self, Registry};

use crate::clock::{Instant, Now};
use crate::shortage::{Resource, Shortage};

pub use declared::{Kind, METRICS, Metric, table};
pub use installation::Installation;
use installation::InstallationMetrics;
pub use lane::LaneMetrics;
use lane::Lanes;
pub use log::start_log;
pub use shortages::Lasting;
use shortages::Shortages;

type Gauge = WholeGauge<f64, std::sync::atomic::AtomicU64>;
/// Labels whose values are words of the program.
type Words<const N: usize> = [(&'static str, &'static str); N];
/// Labels with values that are known only when it runs.
type Names<const N: usize> = [(&'static str, String); N];

/// Every metric of a process. Cheap to share by reference; rooms call these methods and know nothing
/// of registries.
#[derive(Debug)]
pub struct Metrics {
    // Locked only to be read out.
    registry: Mutex<Registry>,
    build_info: Family<Words<1>, Gauge>,
    batch_rows: Family<Words<1>, Histogram>,
    batch_seconds: Family<Words<1>, Histogram>,
    is_active_producer: Family<Words<0>, Gauge>,
    stale: Family<Words<1>, Counter>,
    lanes: Lanes,
    unreadable: Family<Names<2>, Counter>,
    recovered: Family<Words<1>, Counter>,
    removed: Family<Words<1>, Counter>,
    reconciled: Family<Words<1>, Counter>,
    put_off: Family<Words<1>, Counter>,
    shortages: Shortages,
    part_up: Family<Words<1>, Gauge>,
    part_answer: Family<Words<1>, Gauge>,
    installation: InstallationMetrics,
}

fn rows() -> Histogram {
    Histogram::new(exponential_buckets(1.0, 2.0, 15))
}

/// From half a millisecond to about a minute.
fn seconds() -> Histogram {
    Histogram::new(exponential_buckets(0.0005, 2.0, 18))
}

impl Default for Metrics {
    fn default() -> Metrics {
        let metrics = Metrics {
            registry: Mutex::default(),
            build_info: Family::default(),
            batch_rows: Family::new_with_constructor(rows),
            batch_seconds: Family::new_with_constructor(seconds),
            is_active_producer: Family::default(),
            stale: Family::default(),
            lanes: Lanes::default(),
            unreadable: Family::default(),
            recovered: Family::default(),
            removed: Family::default(),
            reconciled: Family::default(),
            put_off: Family::default(),
            shortages: Shortages::default(),
            part_up: Family::default(),
            part_answer: Family::default(),
            installation: InstallationMetrics::default(),
        };
        metrics.register();
        // Without a 0 a first one could not be seen as a growth.
        for of in Resource::ALL {
            metrics.put_off.get_or_create(&[("of", of.as_str())]).inc_by(0);
        }
        metrics.build_info.get_or_create(&[("version", env!("CARGO_PKG_VERSION"))]).set(1.0);
        metrics
    }
}

impl Metrics {
    fn register(&self) {
        let mut all = self.registry();
        register(&mut all, "ams_build_info", &self.build_info);
        register(&mut all, "ams_batch_rows", &self.batch_rows);
        register(&mut all, "ams_batch_seconds", &self.batch_seconds);
        register(&mut all, "ams_is_active_producer", &self.is_active_producer);
        register(&mut all, "ams_stale_total", &self.stale);
        self.lanes.register(&mut all);
        register(&mut all, "ams_unreadable_records_total", &self.unreadable);
        register(&mut all, "ams_recovered_total", &self.recovered);
        register(&mut all, "ams_removed_total", &self.removed);
        register(&mut all, "ams_reconciled_total", &self.reconciled);
        register(&mut all, "ams_put_off_total", &self.put_off);
        register(&mut all, "ams_part_up", &self.part_up);
        register(&mut all, "ams_part_answer_seconds", &self.part_answer);
        self.installation.register(&mut all);
    }

    fn registry(&self) -> MutexGuard<'_, Registry> {
        self.registry.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// All metrics in Prometheus' text format, version 0.0.4.
    pub fn encode(&self) -> String {
        let mut text = String::new();
        if encode_registry(&mut text, &self.registry()).is_err() {
            // Writing to a string does not fail; should it, the scrape says so.
            text.push_str("# the metrics could not be written\n");
        }
        classic(&text)
    }

    /// What is counted on a lane, for whoever works on it to keep.
    pub fn lane(&self, lane: &str) -> LaneMetrics {
        self.lanes.of(lane)
    }

    /// A batch of `rows` messages passed a stage; [`METRICS`] names the stages.
    pub fn batch(&self, stage: &'static str, rows: usize, took: Duration) {
        let labels = [("stage", stage)];
        self.batch_rows.get_or_create(&labels).observe(rows as f64);
        self.batch_seconds.get_or_create(&labels).observe(took.as_secs_f64());
    }

    /// Whether this process has the active producer. Not told where none runs.
    pub fn is_active_producer(&self, active: bool) {
        self.is_active_producer.get_or_create(&[]).set(f64::from(u8::from(active)));
    }

    /// Tickets that the guarded begin, or failures that the guarded record, refused. Telling of none shows a 0,
    /// without which a first one could not be seen as a growth.
    pub fn stale(&self, at: &'static str, count: usize) {
        self.stale.get_or_create(&[("stage", at)]).inc_by(count as u64);
    }

    /// Records of a lane that are no tickets ended so: `published`, `cut`, `given_up`. Telling of none shows a 0.
    pub fn unreadable(&self, lane: &str, end: &'static str, count: usize) {
        let labels = [("lane", lane.to_owned()), ("end", end.to_owned())];
        self.unreadable.get_or_create(&labels).inc_by(count as u64);
    }

    /// The reconciliation looked at messages, and found some without a place.
    pub fn reconciled(&self, checked: u64, repaired: u64) {
        self.reconciled.get_or_create(&[("what", "checked")]).inc_by(checked);
        self.reconciled.get_or_create(&[("what", "repaired")]).inc_by(repaired);
    }

    /// The retention removed whole partitions, and single messages besides. Telling of none shows a 0.
    pub fn removed(&self, partitions: u64, messages: u64) {
        self.removed.get_or_create(&[("what", "partitions")]).inc_by(partitions);
        self.removed.get_or_create(&[("what", "messages")]).inc_by(messages);
    }

    /// The janitor issued deliveries again: `why` is `instance_died`, `batch_orphaned`, `ticket_lost`. Telling of none
    /// shows a 0.
    pub fn recovered(&self, why: &'static str, rows: u64) {
        self.recovered.get_or_create(&[("why", why)]).inc_by(rows);
    }

    /// This process could not open or accept a connection, because it is short of something.
    pub fn put_off(&self, shortage: &Shortage, now: Now) {
        self.put_off.get_or_create(&[("of", shortage.of.as_str())]).inc();
        self.shortages.met(shortage, now);
    }

    /// What this process is short of; to be asked now and then, so that the log says when a shortage is over.
    pub fn shortages(&self, now: Instant) -> Vec<Lasting> {
        self.shortages.lasting_at(now)
    }

    /// Whether a part (`store`, `queue`, `cache`) answered when it was asked, and how long that took.
    pub fn part(&self, part: &'static str, up: bool, took: Duration) {
        self.part_up.get_or_create(&[("part", part)]).set(f64::from(u8::from(up)));
        self.part_answer.get_or_create(&[("part", part)]).set(took.as_secs_f64());
    }

    /// How the whole installation is, as store and queue say. What is not known is not shown: an old figure
    /// would pass for a new one.
    pub fn installation(&self, known: &Installation) {
        self.installation.show(known);
    }
}

fn register<M: registry::Metric + Clone>(all: &mut Registry, name: &str, metric: &M) {
    let declared = METRICS.iter().find(|metric| metric.name == name);
    debug_assert!(declared.is_some(), "{name} is not declared");
    // The encoder adds `_total` to counters itself, and a full stop to the help.
    let short = name.trim_end_matches("_total");
    all.register(short, declared.map_or("", |declared| declared.help), metric.clone());
}

/// OpenMetrics text as Prometheus' older text format, which everything understands: there a counter's `_total`
/// is part of the name that help and type are given for.
fn classic(text: &str) -> String {
    let mut lines = String::with_capacity(text.len());
    for line in text.lines() {
        let mut words = line.splitn(4, ' ');
        match (words.next(), words.next(), words.next(), words.next()) {
            (Some("#"), Some(word @ ("HELP" | "TYPE")), Some(name), rest) => {
                let total = METRICS.iter().any(|metric| metric.name.strip_suffix("_total") == Some(name));
                let suffix = if total { "_total" } else { "" };
                lines.extend(["# ", word, " ", name, suffix, " ", rest.unwrap_or_default()]);
            }
            _ => lines.push_str(line),
        }
        lines.push('\n');
    }
    lines
}

#[cfg(test)]
mod tests;
