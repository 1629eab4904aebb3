//! The benchmark: what it prints, and that it leaves nothing behind and heeds no setting that would bend its figures.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::process::{Command, Stdio};
use std::time::Duration;

use rdkafka::consumer::{BaseConsumer, Consumer};
use serde_json::Value;

use crate::harness::*;

/// What one run printed, in a folder of its own, on the services of the tests or on embedded parts.
fn report(is_full: bool, arguments: &[&str]) -> Value {
    let folder = tempfile::tempdir().unwrap();
    std::fs::write(folder.path().join("ams.toml"), "interval = \"1h\"\nbatch_count = 1\n").unwrap();
    let mut command = match is_full {
        true => Command::new(env!("CARGO_BIN_EXE_ams")),
        false => embedded(folder.path()),
    };
    command.current_dir(folder.path()).args(["bench", "--json", "--rounds", "1", "--seconds", "1"]);
    // Whoever paces their own system, or gives it a port, does not mean the benchmark's.
    command.args(arguments).envs([("INTERVAL", "1h"), ("BATCH_COUNT", "1"), ("METRICS_PORT", "1")]);
    let output = command.output().unwrap();
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    let left: Vec<_> = std::fs::read_dir(folder.path().join("ams-data")).unwrap().collect();
    assert!(left.is_empty(), "{left:?} is left");
    serde_json::from_slice(&output.stdout).unwrap()
}

fn number(report: &Value, name: &str) -> f64 {
    report[name].as_f64().unwrap_or_else(|| panic!("{name} is no number in {report}"))
}

fn sum(report: &Value, name: &str) -> f64 {
    report[name].as_object().unwrap().values().map(|us| us.as_f64().unwrap()).sum()
}

#[test]
fn throughput_prints_what_the_contract_names() {
    let _alone = alone();
    for (is_full, stack) in [(true, "full"), (false, "embedded")] {
        let report = report(is_full, &["throughput", "--messages", "10000", "--rate", "200"]);
        assert_eq!(
            (&report["stack"], &report["messages"], &report["lost"], &report["duplicates"]),
            (&stack.into(), &10_000.into(), &0.into(), &0.into())
        );
        let (delivered, limit) = (number(&report, "delivered_per_s"), number(&report, "limit_per_s"));
        assert!((number(&report, "ratio") - delivered / limit).abs() < 1e-9, "{report}");
        let (floor, system) = (sum(&report, "floor_us_per_message"), sum(&report, "cpu_us_per_message"));
        assert!((number(&report, "floor_ratio") - floor / system).abs() < 1e-9, "{report}");
        assert!((sum(&report, "floor_stages_us") - floor).abs() < 0.01, "{report}");
        let latency = &report["latency_ms"];
        let [p50, p99, max] = ["p50", "p99", "max"].map(|name| number(latency, name));
        assert!(0.0 < p50 && p50 <= p99 && p99 <= max, "{report}");
        let service = if is_full { "consumer" } else { "up" };
        assert!(number(&report["cpu_us_per_message"], service) > 0.0, "{report}");
        assert!(number(&report["memory_mb"], service) > 1.0, "{report}");
        assert_eq!(report["sql_statements_per_message"].is_number(), is_full, "{report}");
    }
}

#[test]
fn each_scenario_measures_what_it_is_for() {
    let _alone = alone();
    let latency = report(false, &["latency", "--rate", "200"]);
    assert!(number(&latency["rest_latency_ms"], "p50") > 0.0, "{latency}");
    assert!(latency["idle_cpu_percent"]["up"].is_number(), "{latency}");

    let ingest = report(false, &["ingest", "--messages", "4000"]);
    let ratio = number(&ingest, "singles_per_s") / number(&ingest, "stores_nothing_per_s");
    assert!((number(&ingest, "singles_ratio") - ratio).abs() < 1e-9 && ratio > 0.0, "{ingest}");
    assert!(number(&ingest, "batches_ratio") > 0.0, "{ingest}");

    let backlog = report(true, &["backlog", "--messages", "4000"]);
    assert!(number(&backlog, "first_delivery_s") > 0.0 && number(&backlog, "ratio") > 0.0, "{backlog}");

    let isolation =
        report(true, &["isolation", "--messages", "2000", "--hanging", "3", "--each", "10", "--rate", "100"]);
    assert_eq!((&isolation["lost"], &isolation["hanging"]), (&0.into(), &3.into()), "{isolation}");
    assert!(
        number(&isolation, "throughput_ratio") > 0.0 && number(&isolation, "p99_ratio") > 0.0,
        "{isolation}"
    );
}

#[test]
fn growth_compares_an_empty_store_with_a_grown_one() {
    let _alone = alone();
    let report = report(true, &["growth", "--messages", "2000", "--finished", "20000"]);
    assert_eq!((&report["lost"], &report["duplicates"]), (&0.into(), &0.into()), "{report}");
    for name in ["empty", "grown", "open transaction", "partitions dropped"] {
        assert!(number(&report["ratio"], name) > 0.0, "{name} in {report}");
    }
    let [before, after] = [0, 1].map(|i| report["partitions"][i].as_i64().unwrap());
    assert!(0 < after && after <= before, "{report}");
}

/// Databases, topics and groups of benchmarks that are on the services.
fn left_by_benchmarks() -> BTreeSet<String> {
    let store = setting("DATABASE_URL").unwrap();
    let mut psql = Command::new("psql");
    let databases = psql.arg(&store).args(["-Atc", "select datname from pg_database"]).output().unwrap();
    let databases = String::from_utf8(databases.stdout).unwrap();
    assert!(databases.contains("template1"), "{databases}");
    let mut config = rdkafka::ClientConfig::new();
    let client: BaseConsumer =
        config.set("bootstrap.servers", setting("KAFKA_BROKERS").unwrap()).create().unwrap();
    let wait = Duration::from_secs(20);
    let (metadata, list) =
        (client.fetch_metadata(None, wait).unwrap(), client.fetch_group_list(None, wait).unwrap());
    let ours = |name: &&str| name.starts_with("ams_bench");
    let told = |what: &'static str| move |name: &str| format!("{what} {name}");
    let databases = databases.lines().filter(ours).map(told("database"));
    let topics = metadata.topics().iter().map(|topic| topic.name()).filter(ours).map(told("topic"));
    let groups = list.groups().iter().map(|group| group.name()).filter(ours).map(told("group"));
    databases.chain(topics).chain(groups).collect()
}

#[test]
fn nothing_stays_behind_on_the_services() {
    let _alone = alone();
    // One that was killed leaves what it had made.
    let before = left_by_benchmarks();
    report(true, &["backlog", "--messages", "1000"]);
    assert_eq!(left_by_benchmarks(), before);
}

#[test]
fn a_benchmark_that_is_stopped_leaves_no_database_and_no_topic() {
    let _alone = alone();
    let before = left_by_benchmarks();
    let folder = tempfile::tempdir().unwrap();
    let mut command = Command::new(env!("CARGO_BIN_EXE_ams"));
    command.current_dir(folder.path()).args(["bench", "latency", "--seconds", "600", "--rate", "100"]);
    let mut bench = command.stderr(Stdio::piped()).spawn().unwrap();
    let mut said = BufReader::new(bench.stderr.take().unwrap()).lines().map(Result::unwrap);
    assert!(said.any(|line| line.contains("100 messages a second")), "its services work");
    assert!(left_by_benchmarks().len() > before.len());
    assert!(Command::new("kill").arg(bench.id().to_string()).status().unwrap().success());
    let said: Vec<String> = said.collect();
    assert_eq!(bench.wait().unwrap().code(), Some(1), "{said:?}");
    assert!(said.iter().any(|line| line.contains("the benchmark was stopped")), "{said:?}");
    // A group goes once the broker has missed its killed members.
    let left = left_by_benchmarks().difference(&before).cloned().collect::<Vec<_>>();
    assert!(left.iter().all(|name| name.starts_with("group ")), "{left:?}");
    assert!(std::fs::read_dir(folder.path().join("ams-data")).unwrap().next().is_none());
}
