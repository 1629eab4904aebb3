//! Every metric as the outside sees it: what dashboards and alert rules may rely on.

use std::fmt::Write;

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

/// A metric's name and meaning.
#[derive(Clone, Copy, Debug)]
pub struct Metric {
    /// As it is exposed; a histogram has `_bucket`, `_sum` and `_count` added.
    pub name: &'static str,
    pub kind: Kind,
    /// What it counts, or what it is measured in.
    pub unit: &'static str,
    pub labels: &'static [&'static str],
    pub help: &'static str,
}

const fn metric(
    kind: Kind,
    name: &'static str,
    unit: &'static str,
    labels: &'static [&'static str],
    help: &'static str,
) -> Metric {
    Metric { name, kind, unit, labels, help }
}

use Kind::{Counter, Gauge, Histogram};

/// Every metric, in the order of a message's walk; last what concerns the whole installation.
pub const METRICS: &[Metric] = &[
    metric(Gauge, "ams_build_info", "1", &["version"], "always 1; its label is the program's version"),
    metric(
        Histogram,
        "ams_batch_rows",
        "rows",
        &["stage"],
        "rows of a batch that passed a stage: insert, claim, publish, begin, record, cache, hold, unhold",
    ),
    metric(
        Histogram,
        "ams_batch_seconds",
        "seconds",
        &["stage"],
        "how long that took: the store at insert, claim, begin, record, hold and unhold, the queue at publish, \
         the cache at cache; begin and record repeat what fails, and count the waits in between",
    ),
    metric(
        Gauge,
        "ams_is_active_producer",
        "0 or 1",
        &[],
        "1 in the one producer that claims, 0 in those that stand by",
    ),
    metric(
        Histogram,
        "ams_queue_wait_seconds",
        "seconds",
        &["lane"],
        "from a ticket's publishing, or the time it is due if that is later, to its begin, by the publisher's clock",
    ),
    metric(
        Counter,
        "ams_stale_total",
        "tickets",
        &["stage"],
        "what the store refused because its ticket was stale: tickets at begin, failures at record",
    ),
    metric(
        Counter,
        "ams_unreadable_records_total",
        "records",
        &["lane", "end"],
        "records on a lane that are no tickets, by what became of them on the dead-letter lane: published, \
         cut (published in part), given_up (the dead-letter lane did not take them)",
    ),
    metric(Gauge, "ams_in_flight", "tries", &["lane"], "tries under way in this process"),
    metric(
        Counter,
        "ams_attempts_total",
        "tries",
        &["lane", "class"],
        "tries that ended, by class of outcome",
    ),
    metric(Histogram, "ams_attempt_seconds", "seconds", &["lane"], "how long a try took"),
    metric(
        Histogram,
        "ams_attempt_phase_seconds",
        "seconds",
        &["lane", "phase"],
        "how long a try's phases took: connect (name, TCP and TLS; kept connections are not counted), \
         head (request to the answer's head), body",
    ),
    metric(
        Counter,
        "ams_verdicts_total",
        "messages",
        &["lane", "verdict"],
        "recorded verdicts: sent, retrying, dead, expired, and released (it was no try)",
    ),
    metric(
        Histogram,
        "ams_delivery_latency_seconds",
        "seconds",
        &["lane"],
        "from a message's creation to its delivery, by the lane that delivered it; time until send_at is part of it",
    ),
    metric(
        Counter,
        "ams_recovered_total",
        "messages",
        &["why"],
        "deliveries that the janitor queued again: instance_died, batch_orphaned, ticket_lost",
    ),
    metric(
        Counter,
        "ams_removed_total",
        "partitions or messages",
        &["what"],
        "what the retention removed: whole partitions of messages, and messages one by one where partitions fill slowly",
    ),
    metric(
        Counter,
        "ams_reconciled_total",
        "messages",
        &["what"],
        "messages that the reconciliation has checked, and those that had no place and were repaired",
    ),
    metric(
        Counter,
        "ams_put_off_total",
        "connections",
        &["of"],
        "connections to receivers or from clients of the API that had to wait because this process was short of \
         descriptors, ports or memory; none of them is an attempt",
    ),
    metric(
        Gauge,
        "ams_part_up",
        "0 or 1",
        &["part"],
        "whether store, queue and cache answer this process; asked at a scrape, within 1 s",
    ),
    metric(
        Gauge,
        "ams_part_answer_seconds",
        "seconds",
        &["part"],
        "how long store, queue and cache took to answer that question, or to fail at it",
    ),
    metric(
        Gauge,
        "ams_backlog_messages",
        "messages",
        &["status"],
        "messages that are not final; counting stops at 10,000",
    ),
    metric(
        Gauge,
        "ams_oldest_due_age_seconds",
        "seconds",
        &[],
        "for how long the oldest message that could be claimed now has been due; 0 when none is",
    ),
    metric(
        Gauge,
        "ams_lane_lag",
        "tickets",
        &["lane", "partition"],
        "tickets on a lane that its consumers have not begun; the producer stops at 16,000 a lane, or at about 128 MiB",
    ),
    metric(
        Gauge,
        "ams_active_producers",
        "producers",
        &[],
        "1 while the store knows of an active producer, else 0",
    ),
    metric(Gauge, "ams_producers_paused", "0 or 1", &[], "1 while all producers are paused by an operator"),
    metric(
        Gauge,
        "ams_breakers",
        "endpoints",
        &[],
        "endpoints whose circuit breaker is not closed: their messages are held",
    ),
];

/// The table of all metrics in `docs/operations.md`.
pub fn table() -> String {
    let mut text =
        String::from("| name | kind | unit | labels | meaning |\n| --- | --- | --- | --- | --- |\n");
    for Metric { name, kind, unit, labels, help } in METRICS {
        let labels: Vec<_> = labels.iter().map(|label| format!("`{label}`")).collect();
        // Writing to a string does not fail.
        let _ = writeln!(text, "| `{name}` | {} | {unit} | {} | {help} |", kind.as_str(), labels.join(", "));
    }
    text
}
