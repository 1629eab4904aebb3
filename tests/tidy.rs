//! Rules of the house, as tests. Each names the file and line that breaks it.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

/// Rooms in the order in which they may use each other: a room may import those of earlier ranks,
/// and nothing of its own rank but itself.
const RANKS: &[&[&str]] = &[
    &["clock", "header_rules", "redact"],
    &["rate"],
    &["lane", "message", "shortage"],
    &["retry", "ticket"],
    &["breaker"],
    &["telemetry"],
    &["store"],
    &["queue"],
    &["cache"],
    &["delivery"],
    &["service", "keys"],
    &["dead_letter", "publish"],
    &["intake", "producer"],
    &["consumer"],
    &["janitor"],
    &["api", "testclient"],
    &["config"],
    &["app"],
    &["bench"],
    &["cli"],
];

/// Drivers, and the one place that may name each.
const DRIVERS: &[(&str, &[&str])] = &[
    ("tokio_postgres", &["src/store/postgres"]),
    ("deadpool_postgres", &["src/store/postgres"]),
    ("rusqlite", &["src/store/sqlite"]),
    ("refinery", &["src/store/postgres", "src/store/sqlite"]),
    ("rdkafka", &["src/queue/kafka"]),
    ("redis::", &["src/cache/redis"]),
    ("quick_cache", &["src/cache/memory"]),
    ("axum", &["src/api", "src/testclient"]),
    ("clap", &["src/cli"]),
    ("hickory_resolver", &["src/delivery/names"]),
    ("prometheus_client", &["src/telemetry"]),
    ("std::env::var", &["src/config"]),
];

fn files(folder: &str, ending: &str) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![PathBuf::from(folder)];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(&folder).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                folders.push(path);
            } else if path.to_string_lossy().ends_with(ending) {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

fn sources() -> Vec<(String, String)> {
    let paths = files("src", ".rs").into_iter().chain(files("tests", ".rs"));
    paths.map(|path| (path.to_string_lossy().into_owned(), std::fs::read_to_string(&path).unwrap())).collect()
}

/// A source without its test modules, which stand at the end of a file.
fn program(text: &str) -> &str {
    let end = ["#[cfg(test)]\nmod ", "#[cfg(test)]\npub(crate) mod tests"];
    end.iter().filter_map(|mark| text.find(mark)).min().map_or(text, |at| &text[..at])
}

fn is_test_file(path: &str) -> bool {
    path.starts_with("tests/")
        || path.ends_with("/tests.rs")
        || path.ends_with("/real.rs")
        || path.contains("conformance")
        || path.contains("/tests/")
}

fn assert_none(rule: &str, broken: &[String]) {
    assert!(broken.is_empty(), "{rule}:\n  {}", broken.join("\n  "));
}

#[test]
fn imports_point_one_way() {
    let rank: BTreeMap<&str, usize> =
        RANKS.iter().enumerate().flat_map(|(i, rooms)| rooms.iter().map(move |room| (*room, i))).collect();
    let mut broken = Vec::new();
    for (path, text) in sources() {
        let Some(inside) = path.strip_prefix("src/") else {
            continue;
        };
        let room = inside.split(['/', '.']).next().unwrap();
        if matches!(room, "lib" | "main") {
            continue;
        }
        let own =
            *rank.get(room).unwrap_or_else(|| panic!("{path}: the room {room} has no rank; give it one"));
        for (number, line) in program(&text).lines().enumerate() {
            for part in line.split("crate::").skip(1) {
                let other: String = part.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
                let Some(its) = rank.get(other.as_str()) else {
                    continue;
                };
                if other != room && *its >= own && !line.trim_start().starts_with("//") {
                    broken.push(format!("{path}:{}: {room} uses {other}", number + 1));
                }
            }
        }
    }
    assert_none("a room may use only rooms of an earlier rank", &broken);
}

#[test]
fn drivers_stay_in_their_file() {
    let mut broken = Vec::new();
    // The benchmark writes and measures beside the engine, so it has connections of its own.
    let is_program = |path: &str| !is_test_file(path) && !path.starts_with("src/bench/");
    for (path, text) in sources().into_iter().filter(|(path, _)| is_program(path)) {
        for (number, line) in program(&text).lines().enumerate() {
            if line.trim_start().starts_with("//") {
                continue;
            }
            for (driver, homes) in DRIVERS {
                let names = line.contains(&format!("use {driver}")) || line.contains(&format!(" {driver}::"));
                let own_module = line.contains("crate::cache::redis") || line.contains("mod redis");
                if names && !own_module && !homes.iter().any(|home| path.starts_with(home)) {
                    broken.push(format!("{path}:{}: {driver}", number + 1));
                }
            }
        }
    }
    assert_none("a driver is named only in its own file", &broken);
}

#[test]
fn the_floor_shares_no_code_with_the_engine() {
    let allowed =
        ["crate::app::{AppError, Result}", "crate::app::Result", "crate::bench", "crate::clock::Clock"];
    let mut broken = Vec::new();
    for (path, text) in sources().into_iter().filter(|(path, _)| path.starts_with("src/bench/floor")) {
        let uses = program(&text).lines().filter(|line| line.contains("crate::"));
        let shared = uses.filter(|line| !allowed.iter().any(|allowed| line.contains(allowed)));
        broken.extend(shared.map(|line| format!("{path}: {line}")));
    }
    assert_none("the floor uses errors, the clock and the benchmark's own parts only", &broken);
}

#[test]
fn every_module_says_what_it_is_for() {
    let silent: Vec<_> = sources()
        .into_iter()
        .filter(|(path, text)| path.starts_with("src/") && !text.trim_start().starts_with("//!"))
        .map(|(path, _)| path)
        .collect();
    assert_none("a module opens with //!", &silent);
}

#[test]
fn functions_fit_a_screen_and_files_a_sitting() {
    let mut broken = Vec::new();
    for (path, text) in sources() {
        let lines: Vec<_> = text.lines().collect();
        if lines.len() > 600 {
            broken.push(format!("{path}: {} lines; at most 600", lines.len()));
        }
        let mut open: Option<(usize, String)> = None;
        for (number, line) in lines.iter().enumerate() {
            let indent = &line[..line.len() - line.trim_start().len()];
            let words: Vec<_> = line.split_whitespace().collect();
            let is_function = words.iter().take(5).any(|word| *word == "fn")
                && words.iter().take_while(|word| **word != "fn").all(|word| {
                    matches!(*word, "pub" | "async" | "const" | "unsafe" | "extern")
                        || word.starts_with("pub(")
                });
            if is_function && !line.trim_end().ends_with(';') && !line.trim_end().ends_with('}') {
                open = Some((number, indent.to_owned()));
            } else if let Some((start, indent)) = &open
                && *line == format!("{indent}}}")
            {
                if number - start >= 70 {
                    broken.push(format!(
                        "{path}:{}: a function of {} lines; at most 70",
                        start + 1,
                        number - start + 1
                    ));
                }
                open = None;
            }
        }
    }
    assert_none("functions have at most 70 lines and files at most 600", &broken);
}

#[test]
fn nothing_in_the_program_can_panic_unexplained_or_is_unfinished() {
    let mut broken = Vec::new();
    for (path, text) in sources() {
        for (number, line) in
            if is_test_file(&path) { text.as_str() } else { program(&text) }.lines().enumerate()
        {
            let unfinished = [
                concat!("todo", "!("),
                concat!("unimplemented", "!("),
                concat!("#[", "ignore"),
                concat!("#[", "allow("),
            ];
            let panics =
                !is_test_file(&path) && line.contains(".unwrap()") && !line.trim_start().starts_with("//");
            let sleeps = is_test_file(&path)
                && (line.contains(concat!("time::", "sleep("))
                    || line.contains(concat!("thread::", "sleep(")));
            if unfinished.iter().any(|mark| line.contains(mark)) || panics || sleeps {
                broken.push(format!("{path}:{}: {}", number + 1, line.trim()));
            }
        }
    }
    assert_none("no unwrap outside tests, nothing unfinished or ignored, no sleeping tests", &broken);
}

/// A driver's `get` panics on a value that the type can't hold, and one row then stops everything.
#[test]
fn no_value_of_a_row_is_read_by_a_call_that_panics() {
    let mut broken = Vec::new();
    let of_store = |path: &str| path.starts_with("src/store/postgres") && !is_test_file(path);
    for (path, text) in sources().into_iter().filter(|(path, _)| of_store(path)) {
        for (number, line) in program(&text).lines().enumerate() {
            if [".get(", ".get::<"].iter().any(|call| line.contains(&format!("row{call}")))
                || line.contains("await?.get(")
                || line.contains("await?.get::<")
            {
                broken.push(format!("{path}:{}: {}", number + 1, line.trim()));
            }
        }
    }
    assert_none("values of a row are read by try_get", &broken);
}

#[test]
fn migrations_come_in_pairs() {
    let names = |folder: &str| -> BTreeSet<String> {
        files(folder, ".sql")
            .iter()
            .map(|path| path.file_name().unwrap().to_string_lossy().into_owned())
            .collect()
    };
    let (postgres, sqlite) = (names("migrations/postgres"), names("migrations/sqlite"));
    assert!(!postgres.is_empty());
    assert_eq!(postgres, sqlite);
}

#[test]
fn every_setting_and_metric_is_documented() {
    let settings: Vec<_> = ams::config::SETTINGS.iter().map(|setting| setting.name).collect();
    let metrics: Vec<_> = ams::telemetry::METRICS.iter().map(|metric| metric.name).collect();
    for (page, mut missing) in [("README.md", settings), ("docs/operations.md", metrics)] {
        let text = std::fs::read_to_string(page).unwrap();
        missing.retain(|name| !text.contains(&format!("`{name}`")));
        assert!(missing.is_empty(), "{page} does not name {missing:?}");
    }
}

#[test]
fn every_alert_has_a_runbook_and_every_query_names_metrics_that_exist() {
    let read = |path: &str| std::fs::read_to_string(path).unwrap();
    let (rules, tests) = (read("deploy/prometheus/alerts.yml"), read("deploy/prometheus/alerts_test.yml"));
    let page = read("docs/operations.md");
    let alerts: Vec<_> = rules.lines().filter_map(|line| line.trim().strip_prefix("- alert: ")).collect();
    let sections: Vec<_> = page.lines().filter_map(|line| line.strip_prefix("### ")).collect();
    assert_eq!(alerts, sections, "each alert has its section in docs/operations.md, in the same order");
    for alert in alerts {
        let link = format!("runbook_url: docs/operations.md#{}", alert.to_lowercase());
        assert_eq!(rules.matches(&link).count(), 1, "{alert} links to its section");
        let silent = tests.contains(&format!("alertname: {alert}, exp_alerts: []"));
        assert!(silent && tests.contains(&format!("alertname: {alert}\n")), "{alert} is tested both ways");
    }
    for (path, text) in [("alerts.yml", &rules), ("alerts_test.yml", &tests), ("operations.md", &page)] {
        let names = text.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        for name in names.filter(|name| name.starts_with("ams_")) {
            let known = ams::telemetry::METRICS.iter().any(|metric| {
                let rest = name.strip_prefix(metric.name);
                let part = matches!(rest, Some("_bucket" | "_sum" | "_count"));
                rest == Some("") || part && metric.kind == ams::telemetry::Kind::Histogram
            });
            assert!(known, "{path} names {name}, which is no metric");
        }
    }
}

#[test]
fn every_file_named_in_the_documents_exists() {
    for document in ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "docs/operations.md"] {
        let text = std::fs::read_to_string(document).unwrap();
        for part in text.split('`').skip(1).step_by(2) {
            let is_path = part.contains('/')
                && !part.contains([' ', ':', '{', '*', '$', '<', '…'])
                && ["src/", "tests/", "docs/", "migrations/", "deploy/", "dev/"]
                    .iter()
                    .any(|start| part.starts_with(start));
            assert!(!is_path || Path::new(part).exists(), "{document} names {part}, which does not exist");
        }
    }
}

/// A service of the compose file that runs `ams`, as far as it can be wrong without Docker saying so.
#[test]
fn the_compose_file_speaks_of_verbs_settings_and_files_that_exist() {
    let text = std::fs::read_to_string("deploy/docker-compose.yml").unwrap();
    let services = &text[text.find("\n  migrate:\n").unwrap()..text.find("\nvolumes:\n").unwrap()];
    let parts = &text[text.find("x-parts:").unwrap()..text.find("x-after:").unwrap()];
    let settings: BTreeSet<&str> = ams::config::SETTINGS.iter().map(|setting| setting.name).collect();
    let mut verbs = BTreeSet::new();
    for line in parts.lines().chain(services.lines()).map(str::trim) {
        let (name, value) = line.split_once(':').unwrap_or_default();
        if !name.is_empty() && name.chars().all(|c| c.is_ascii_uppercase() || c == '_') {
            assert!(settings.contains(name), "deploy/docker-compose.yml sets {name}, which is no setting");
            // What the environment may set has the same name there, and a default.
            let asked = value.trim().trim_matches('"').strip_prefix("${").unwrap_or(name);
            assert!(asked.starts_with(name), "deploy/docker-compose.yml fills {name} from {value}");
        }
        if name == "command" {
            verbs.insert(value.trim().trim_matches(['[', ']']).to_owned());
        }
    }
    let wanted = ["api", "consumer", "migrate", "producer", "retry-consumer", "testclient"];
    assert_eq!(verbs, wanted.map(str::to_owned).into());
    for verb in verbs {
        let help =
            std::process::Command::new(env!("CARGO_BIN_EXE_ams")).args([&verb, "--help"]).output().unwrap();
        assert!(help.status.success(), "ams {verb} is no verb");
    }
    let image = std::fs::read_to_string("deploy/Dockerfile").unwrap();
    for copied in image.lines().filter(|line| line.starts_with("COPY") && !line.contains("--from")) {
        let from = copied.split_whitespace().filter(|word| !word.starts_with("--")).nth(1).unwrap();
        assert!(Path::new(from).exists(), "deploy/Dockerfile copies {from}, which does not exist");
    }
    assert!(std::fs::read_to_string("compose.yaml").unwrap().contains("- deploy/docker-compose.yml"));
}

/// A newer program may have added a column.
#[test]
fn statements_name_their_columns() {
    let mut tables = BTreeSet::new();
    for path in files("migrations", ".sql") {
        let text = std::fs::read_to_string(path).unwrap();
        let made = text.lines().filter_map(|line| line.strip_prefix("create table "));
        tables.extend(made.map(|rest| rest.split_whitespace().next().unwrap().to_owned()));
    }
    assert!(tables.contains("messages") && tables.contains("api_keys"));
    let nameless = |line: &str| {
        let of_table = |before: &str| {
            let names = line.split(before).skip(1).filter_map(|rest| rest.split([' ', '"', ';', ')']).next());
            names.into_iter().any(|name| tables.contains(name))
        };
        let bare_insert = |table: &String| {
            let insert = format!("insert into {table} ");
            line.split(insert.as_str()).skip(1).any(|rest| !rest.starts_with(['(', '\\']))
        };
        of_table("select * from ") || line.contains("returning *") || tables.iter().any(bare_insert)
    };
    assert!(nameless("select * from messages") && nameless("insert into lanes values (1)"));
    let mut broken = Vec::new();
    for (path, text) in sources().iter().filter(|(path, _)| path.starts_with("src/store/")) {
        if is_test_file(path) {
            continue;
        }
        for (number, line) in text.lines().enumerate().filter(|(_, line)| nameless(line)) {
            broken.push(format!("{path}:{}: {}", number + 1, line.trim()));
        }
    }
    assert_none("statements name their columns", &broken);
}
