//! What the program says about itself: log set-up, and every metric declared once with its help.

use std::fmt::Write;
use std::io::IsTerminal;
use std::path::Path;
use std::sync::Mutex;
use std::time::Duration;

use prometheus_client::encoding::text::encode;
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::{Histogram, exponential_buckets};
use prometheus_client::registry::Registry;
use tracing_subscriber::filter::Targets;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;

use crate::message::Class;

/// What a metric does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// Only grows.
    Counter,
    /// Goes up and down.
    Gauge,
    /// Counts by size.
    Histogram,
}

impl Kind {
    /// The kind as it is written in the exposition.
    pub fn as_str(self) -> &'static str {
        match self {
            Kind::Counter => "counter",
            Kind::Gauge => "gauge",
            Kind::Histogram => "histogram",
        }
    }
}

/// Every metric as it is exposed, with its kind and help.
pub const METRICS: &[(&str, Kind, &str)] = &[
    (
        "ams_batch_rows",
        Kind::Histogram,
        "rows of batches by stage: insert, claim, publish, begin, record, hold, unhold",
    ),
    ("ams_batch_seconds", Kind::Histogram, "how long a batch took, by stage"),
    ("ams_attempts_total", Kind::Counter, "tries by lane and class of outcome"),
    ("ams_attempt_seconds", Kind::Histogram, "how long a try took, by lane"),
    ("ams_verdicts_total", Kind::Counter, "verdicts by lane: sent, retrying, dead, released"),
    ("ams_delivery_latency_seconds", Kind::Histogram, "from a message's creation to its delivery"),
    ("ams_stale_total", Kind::Counter, "tickets and failures that a guarded write refused, by stage"),
    ("ams_in_flight", Kind::Gauge, "tries under way in this process"),
    ("ams_lane_lag", Kind::Gauge, "records of a lane that its group has not taken up, by partition"),
    ("ams_part_up", Kind::Gauge, "whether store, queue or cache answered when last asked: 1 or 0"),
    ("ams_recovered_total", Kind::Counter, "rows given back by the janitor, by reason"),
];

type Labels<const N: usize> = [(&'static str, String); N];

/// Every metric of a process. Cheap to share by reference; rooms call these methods and know nothing
/// of registries.
#[derive(Debug)]
pub struct Metrics {
    // Locked only to be read out.
    registry: Mutex<Registry>,
    batch_rows: Family<Labels<1>, Histogram>,
    batch_seconds: Family<Labels<1>, Histogram>,
    attempts: Family<Labels<2>, Counter>,
    attempt_seconds: Family<Labels<1>, Histogram>,
    verdicts: Family<Labels<2>, Counter>,
    latency: Histogram,
    stale: Family<Labels<1>, Counter>,
    in_flight: Gauge,
    lag: Family<Labels<2>, Gauge>,
    part_up: Family<Labels<1>, Gauge>,
    recovered: Family<Labels<1>, Counter>,
}

fn rows() -> Histogram {
    Histogram::new(exponential_buckets(1.0, 2.0, 15))
}

/// From half a millisecond to about a minute and a half.
fn seconds() -> Histogram {
    Histogram::new(exponential_buckets(0.0005, 2.0, 18))
}

impl Default for Metrics {
    fn default() -> Metrics {
        let metrics = Metrics {
            registry: Mutex::default(),
            batch_rows: Family::new_with_constructor(rows),
            batch_seconds: Family::new_with_constructor(seconds),
            attempts: Family::default(),
            attempt_seconds: Family::new_with_constructor(seconds),
            verdicts: Family::default(),
            latency: seconds(),
            stale: Family::default(),
            in_flight: Gauge::default(),
            lag: Family::default(),
            part_up: Family::default(),
            recovered: Family::default(),
        };
        metrics.register();
        metrics
    }
}

impl Metrics {
    fn register(&self) {
        let mut registry = self.registry.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        for (name, _, help) in METRICS {
            // The encoder adds `_total` to counters itself.
            let short = name.trim_end_matches("_total");
            match *name {
                "ams_batch_rows" => registry.register(short, *help, self.batch_rows.clone()),
                "ams_batch_seconds" => registry.register(short, *help, self.batch_seconds.clone()),
                "ams_attempts_total" => registry.register(short, *help, self.attempts.clone()),
                "ams_attempt_seconds" => registry.register(short, *help, self.attempt_seconds.clone()),
                "ams_verdicts_total" => registry.register(short, *help, self.verdicts.clone()),
                "ams_delivery_latency_seconds" => registry.register(short, *help, self.latency.clone()),
                "ams_stale_total" => registry.register(short, *help, self.stale.clone()),
                "ams_in_flight" => registry.register(short, *help, self.in_flight.clone()),
                "ams_lane_lag" => registry.register(short, *help, self.lag.clone()),
                "ams_part_up" => registry.register(short, *help, self.part_up.clone()),
                "ams_recovered_total" => registry.register(short, *help, self.recovered.clone()),
                _ => {}
            }
        }
    }

    /// All metrics as OpenMetrics text.
    pub fn encode(&self) -> String {
        let registry = self.registry.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        let mut text = String::new();
        if encode(&mut text, &registry).is_err() {
            // Writing to a string does not fail; should it, the scrape says so.
            let _ = writeln!(text, "# the metrics could not be written");
        }
        text
    }

    /// A batch of `rows` messages passed a stage: `insert`, `claim`, `publish`, `begin`, `record`, `hold`, `unhold`.
    pub fn batch(&self, stage: &'static str, rows: usize, took: Duration) {
        let labels = [("stage", stage.to_owned())];
        self.batch_rows.get_or_create(&labels).observe(rows as f64);
        self.batch_seconds.get_or_create(&labels).observe(took.as_secs_f64());
    }

    /// One try ended.
    pub fn attempted(&self, lane: &str, class: Class, took: Duration) {
        self.attempts.get_or_create(&[("lane", lane.to_owned()), ("class", class.as_str().to_owned())]).inc();
        self.attempt_seconds.get_or_create(&[("lane", lane.to_owned())]).observe(took.as_secs_f64());
    }

    /// A message became `sent`, `retrying` or `dead` on a lane (`verdict` is that word, or `released`).
    pub fn judged(&self, lane: &str, verdict: &'static str) {
        self.verdicts.get_or_create(&[("lane", lane.to_owned()), ("verdict", verdict.to_owned())]).inc();
    }

    /// From a message's creation to its delivery.
    pub fn delivered_after(&self, latency: Duration) {
        self.latency.observe(latency.as_secs_f64());
    }

    /// Tickets that the guarded begin, or failures that the guarded record, refused.
    pub fn stale(&self, at: &'static str, count: usize) {
        if count > 0 {
            self.stale.get_or_create(&[("stage", at.to_owned())]).inc_by(count as u64);
        }
    }

    /// Tries under way in this process now.
    pub fn in_flight(&self, count: usize) {
        self.in_flight.set(i64::try_from(count).unwrap_or(i64::MAX));
    }

    /// A lane's records that its group has not done.
    pub fn lag(&self, lane: &str, partition: i32, lag: i64) {
        self.lag.get_or_create(&[("lane", lane.to_owned()), ("partition", partition.to_string())]).set(lag);
    }

    /// Whether a part (`store`, `queue`, `cache`) answered when it was last used.
    pub fn part_up(&self, part: &'static str, up: bool) {
        self.part_up.get_or_create(&[("part", part.to_owned())]).set(i64::from(up));
    }

    /// The janitor gave rows back: `why` is `instance_died`, `batch_orphaned`, `ticket_lost`.
    pub fn recovered(&self, why: &'static str, rows: u64) {
        if rows > 0 {
            self.recovered.get_or_create(&[("why", why.to_owned())]).inc_by(rows);
        }
    }
}

/// Starts the log: text for people, or JSON for machines, to standard error or a file.
///
/// # Errors
/// When the level can't be understood or the file can't be opened.
pub fn start_log(level: &str, json: bool, colour: bool, file: Option<&Path>) -> Result<(), String> {
    let filter: Targets = level
        .parse()
        .map_err(|_| format!("LOG_LEVEL is `{level}`, which is no log level; write info or debug"))?;
    let file = file
        .map(|path| {
            let opened = std::fs::File::options().create(true).append(true).open(path);
            opened.map_err(|error| {
                format!("LOG_FILE {} can't be opened: {error}; name another", path.display())
            })
        })
        .transpose()?;
    let colour = colour && file.is_none() && std::io::stderr().is_terminal();
    let writer: tracing_subscriber::fmt::writer::BoxMakeWriter = match file {
        Some(file) => tracing_subscriber::fmt::writer::BoxMakeWriter::new(Mutex::new(file)),
        None => tracing_subscriber::fmt::writer::BoxMakeWriter::new(std::io::stderr),
    };
    let layer = tracing_subscriber::fmt::layer().with_writer(writer).with_ansi(colour);
    let registry = tracing_subscriber::registry().with(filter);
    let started = if json { registry.with(layer.json()).try_init() } else { registry.with(layer).try_init() };
    started.map_err(|error| format!("the log can't be started: {error}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_declared_metric_is_exposed_under_its_name() {
        let metrics = Metrics::default();
        metrics.batch("claim", 1_000, Duration::from_millis(7));
        metrics.attempted("messages", Class::Accepted, Duration::from_millis(3));
        metrics.judged("messages", "sent");
        metrics.delivered_after(Duration::from_millis(20));
        metrics.stale("begin", 2);
        metrics.in_flight(5);
        metrics.lag("messages", 3, 17);
        metrics.part_up("cache", false);
        metrics.recovered("ticket_lost", 4);
        let text = metrics.encode();
        for (name, kind, help) in METRICS {
            assert!(text.contains(help), "{name}: {text}");
            let kind = format!("# TYPE {} {}\n", name.trim_end_matches("_total"), kind.as_str());
            assert!(text.contains(&kind), "{kind}{text}");
            assert!(text.lines().any(|line| line.starts_with(name)), "{name}: {text}");
        }
        assert!(text.contains("ams_lane_lag{lane=\"messages\",partition=\"3\"} 17"), "{text}");
    }

    #[test]
    fn a_bad_level_or_file_is_told_in_a_sentence() {
        assert!(start_log("info=loud", false, false, None).unwrap_err().contains("info=loud"));
        let nowhere = Path::new("/nowhere/ams.log");
        assert!(start_log("info", false, false, Some(nowhere)).unwrap_err().contains("/nowhere/ams.log"));
    }
}
