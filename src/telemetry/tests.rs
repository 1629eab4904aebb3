//! Every metric is exposed as it is declared, and documented as it is exposed.

use std::collections::BTreeSet;

use super::*;
use crate::clock::Timestamp;
use crate::message::{Class, Times, Verdict};

/// Metrics of which each has at least one series.
fn all() -> Metrics {
    let metrics = Metrics::default();
    metrics.batch("claim", 1_000, Duration::from_millis(7));
    metrics.is_active_producer(true);
    metrics.stale("begin", 2);
    metrics.unreadable("messages", "cut", 2);
    metrics.recovered("ticket_lost", 4);
    metrics.removed(1, 2);
    metrics.reconciled(3, 1);
    metrics.part("cache", false, Duration::from_millis(500));
    let lane = metrics.lane("messages");
    lane.begun_after(Duration::from_millis(3));
    lane.in_flight(5);
    lane.attempted(
        Class::Timeout,
        &Times { connect_us: 0, head_us: 2_500, body_us: 0 },
        Duration::from_millis(3),
    );
    lane.judged(&Verdict::Sent);
    lane.judged(&Verdict::Retry { lane: String::new(), lane_tries: 0, at: Timestamp::EPOCH });
    lane.delivered_after(Duration::from_millis(20));
    metrics.installation(&Installation {
        backlog: vec![("pending", 12)],
        oldest_due: Some(Duration::from_millis(1_500)),
        lag: vec![("messages".to_owned(), 3, 17)],
        active: Some(true),
        paused: Some(false),
        breakers: Some(2),
    });
    metrics
}

#[test]
fn every_declared_metric_is_exposed_under_its_name_and_with_its_labels() {
    let text = all().encode();
    for metric in METRICS {
        let (name, kind) = (metric.name, metric.kind.as_str());
        assert!(text.contains(&format!("# HELP {name} {}.\n", metric.help)), "{name}: {text}");
        assert!(text.contains(&format!("# TYPE {name} {kind}\n")), "{name}: {text}");
        let suffix = if metric.kind == Kind::Histogram { "_count" } else { "" };
        let series = text.lines().find(|line| {
            line.strip_prefix(name)
                .and_then(|rest| rest.strip_prefix(suffix))
                .is_some_and(|rest| rest.starts_with(['{', ' ']))
        });
        let series = series.unwrap_or_else(|| panic!("{name} has no series: {text}"));
        let labels: BTreeSet<_> =
            series.split(['{', ',']).filter_map(|part| part.split_once("=\"")).map(|p| p.0).collect();
        assert_eq!(labels, metric.labels.iter().copied().collect(), "{series}");
    }
    let declared = text.lines().filter(|line| line.starts_with("# TYPE ")).count();
    assert_eq!(declared, METRICS.len(), "each is declared once: {text}");
}

#[test]
fn names_say_their_unit() {
    for Metric { name, kind, unit, .. } in METRICS {
        assert_eq!(name.ends_with("_total"), *kind == Kind::Counter, "{name}");
        let seconds = name.ends_with("_seconds");
        assert_eq!(seconds, *unit == "seconds", "{name} is in {unit}");
    }
}

#[test]
fn figures_come_out_as_they_went_in() {
    let text = all().encode();
    for line in [
        "ams_lane_lag{lane=\"messages\",partition=\"3\"} 17.0",
        "ams_in_flight{lane=\"messages\"} 5.0",
        "ams_attempts_total{lane=\"messages\",class=\"timeout\"} 1",
        "ams_attempts_total{lane=\"messages\",class=\"accepted\"} 0",
        "ams_attempt_phase_seconds_sum{lane=\"messages\",phase=\"head\"} 0.0025",
        "ams_attempt_phase_seconds_count{lane=\"messages\",phase=\"connect\"} 0",
        "ams_verdicts_total{lane=\"messages\",verdict=\"retrying\"} 1",
        "ams_verdicts_total{lane=\"messages\",verdict=\"dead\"} 0",
        "ams_oldest_due_age_seconds{} 1.5",
        "ams_part_up{part=\"cache\"} 0.0",
    ] {
        assert!(text.lines().any(|found| found == line), "{line}\n{text}");
    }
    assert!(!text.contains("# EOF") && !text.contains("# UNIT"), "{text}");
}

#[test]
fn two_lanes_of_one_process_do_not_overwrite_each_other() {
    let metrics = Metrics::default();
    let (fresh, retry) = (metrics.lane("messages"), metrics.lane("a\"b"));
    fresh.in_flight(5);
    retry.in_flight(0);
    let text = metrics.encode();
    assert!(text.contains("ams_in_flight{lane=\"messages\"} 5"), "{text}");
    assert!(text.contains("ams_in_flight{lane=\"a\\\"b\"} 0"), "{text}");
}

#[test]
fn what_is_no_longer_known_is_no_longer_shown() {
    let metrics = all();
    metrics.installation(&Installation::default());
    let text = metrics.encode();
    for name in ["ams_backlog_messages", "ams_oldest_due_age_seconds", "ams_lane_lag", "ams_active_producers"]
    {
        assert!(!text.lines().any(|line| line.starts_with(name)), "{name}: {text}");
    }
}

#[test]
fn the_table_of_metrics_is_the_committed_one() {
    let page = std::fs::read_to_string(concat!(env!("CARGO_MANIFEST_DIR"), "/docs/operations.md")).unwrap();
    let table = table();
    if !page.contains(&table) {
        let written = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("target/metrics.md");
        std::fs::create_dir_all(written.parent().unwrap()).unwrap();
        std::fs::write(&written, &table).unwrap();
        panic!("the table in docs/operations.md is out of date: put {} in its place", written.display());
    }
}
