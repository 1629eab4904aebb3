//! What a running system tells: metrics that Prometheus takes, alerts that fire, and a log that keeps secrets.

use std::io::Write;
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use ams::testclient::TestClientOptions;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use crate::harness::*;

/// A process of a test, ended with it.
struct Ended(Child);

impl Drop for Ended {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// A port that was free a moment ago, out of the ephemeral range.
fn free_port() -> u16 {
    loop {
        let port = fastrand::u16(20_000..28_000);
        if std::net::TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

fn get(url: &str) -> String {
    tool("curl", &["-fsS", "--retry", "40", "--retry-delay", "1", "--retry-all-errors", url])
}

/// `ams up` on embedded parts.
fn up(folder: &Path, port: u16, environment: &[(&str, &str)], log: &Path) -> Ended {
    let mut command = embedded(folder);
    command.args(["up", "--port", &port.to_string()]);
    let log = std::fs::File::options().append(true).create(true).open(log).unwrap();
    command.envs(environment.iter().copied()).stdout(log.try_clone().unwrap()).stderr(log);
    Ended(command.spawn().unwrap())
}

/// What `promtool check metrics` finds wrong with the metrics at `url`.
fn complaints(url: &str) -> String {
    let mut check = Command::new("promtool");
    check.args(["check", "metrics"]).stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut check =
        check.spawn().unwrap_or_else(|error| panic!("promtool: {error}; run `dev/packages services`"));
    check.stdin.take().unwrap().write_all(get(url).as_bytes()).unwrap();
    let output = check.wait_with_output().unwrap();
    let said = [output.stdout, output.stderr].concat();
    let code = if output.status.success() { String::new() } else { output.status.to_string() };
    format!("{}{code}", String::from_utf8_lossy(&said))
}

#[test]
fn the_rules_and_their_tests_pass() {
    let readme = std::fs::read_to_string("deploy/prometheus/README.md").unwrap();
    let lines: Vec<_> = readme.split("```sh\n").skip(1).flat_map(|block| block.split("```").next()).collect();
    let script = lines.concat();
    assert!(
        script.contains("check rules") && script.contains("test rules") && script.contains("check config")
    );
    tool("bash", &["-euc", &script]);
}

#[tokio::test]
async fn promtool_takes_the_metrics_of_every_service() {
    let receiver = Receiver::start(TestClientOptions::default()).await;
    let stack = Stack::new("observed", &receiver).await;
    let ports = [free_port(), free_port(), free_port()];
    let [api, producer, consumer] = ports.map(|port| format!("http://127.0.0.1:{port}/metrics"));
    let port = ports.map(|port| port.to_string());
    let _api = stack.start("api", &[("PORT", &port[0])]);
    let _producer = stack.start("producer", &[("METRICS_PORT", &port[1])]);
    let _consumer = stack.start("consumer", &[("METRICS_PORT", &port[2])]);
    stack.insert(20).await;
    stack.all_final(20, Duration::from_secs(30)).await;
    for url in [&api, &producer, &consumer] {
        assert_eq!(complaints(url), "", "{url}");
    }
    let fresh = format!("lane=\"{}-fresh\"", stack.name);
    let has = |url: &str, line: &str| get(url).lines().any(|found| found.starts_with(line));
    let sent = format!("ams_verdicts_total{{{fresh},verdict=\"sent\"}} 20");
    until("20 are counted", Duration::from_secs(10), async || has(&consumer, &sent)).await;
    assert!(has(&consumer, &format!("ams_queue_wait_seconds_count{{{fresh}}} 20")));
    assert!(has(&consumer, "ams_part_up{part=\"store\"} 1"));
    assert!(has(&producer, "ams_is_active_producer{} 1"), "{}", get(&producer));
    let lag = format!("ams_lane_lag{{{fresh},partition=\"0\"}} 0");
    for url in [&api, &producer] {
        until("an emptied lane is told of", Duration::from_secs(20), async || has(url, &lag)).await;
        assert!(has(url, "ams_active_producers{} 1") && has(url, "ams_producers_paused{} 0"), "{}", get(url));
        assert!(has(url, "ams_backlog_messages{status=\"pending\"} 0"), "{}", get(url));
    }
    assert!(
        !has(&consumer, "ams_oldest_due_age_seconds"),
        "consumers ask the store for nothing of the whole"
    );
}

#[tokio::test]
async fn a_real_prometheus_scrapes_it_and_an_alert_fires() {
    let _alone = tokio::task::spawn_blocking(alone).await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let (port, own) = (free_port(), free_port());
    let _up = up(folder.path(), port, &[("LOG_LEVEL", "warn")], &folder.path().join("log"));
    get(&format!("http://127.0.0.1:{port}/readyz"));
    let rules = std::fs::read_to_string("deploy/prometheus/alerts.yml").unwrap();
    let rules: Vec<_> = rules
        .lines()
        .map(|line| if line.trim().starts_with("for: ") { "        for: 1s" } else { line })
        .collect();
    std::fs::write(folder.path().join("alerts.yml"), rules.join("\n")).unwrap();
    let config = format!(
        "global: {{ scrape_interval: 1s, evaluation_interval: 1s }}\nrule_files: [alerts.yml]\n\
         scrape_configs: [{{ job_name: ams-up, static_configs: [{{ targets: ['127.0.0.1:{port}'] }}] }}]\n"
    );
    std::fs::write(folder.path().join("prometheus.yml"), config).unwrap();
    let mut prometheus = Command::new("prometheus");
    let listen = format!("--web.listen-address=127.0.0.1:{own}");
    prometheus.args(["--config.file=prometheus.yml", "--storage.tsdb.path=data", &listen]);
    let log = std::fs::File::create(folder.path().join("prometheus.log")).unwrap();
    prometheus.current_dir(folder.path()).stdin(Stdio::null()).stderr(log);
    let _prometheus = Ended(prometheus.spawn().unwrap());

    let query = format!("http://127.0.0.1:{own}/api/v1/query?query=");
    let holds = |what: &str| get(&format!("{query}{what}")).contains("\"value\":[");
    until("it is scraped", Duration::from_secs(20), async || holds("up==1")).await;
    assert!(holds("ams_build_info") && holds("ams_active_producers==1"));
    assert!(!holds("ALERTS"), "nothing is wrong yet");
    let pause = format!("http://127.0.0.1:{port}/v1/producer/pause");
    tool("curl", &["-fsS", "-X", "POST", &pause]);
    let alerts = format!("http://127.0.0.1:{own}/api/v1/alerts");
    until("the alert fires", Duration::from_secs(30), async || {
        let alerts: serde_json::Value = serde_json::from_str(&get(&alerts)).unwrap();
        alerts["data"]["alerts"]
            .as_array()
            .unwrap()
            .iter()
            .any(|alert| alert["labels"]["alertname"] == "AmsProducerPaused" && alert["state"] == "firing")
    })
    .await;
}

/// Answers every request with the planted text: the first of each three fails.
async fn receiver_that_tells() -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    tokio::spawn(async move {
        let mut count = 0;
        while let Ok((mut stream, _)) = listener.accept().await {
            count += 1;
            let status = if count % 3 == 1 { "500 No" } else { "200 OK" };
            let body = r#"{"message":"planted-answer","messageId":"planted-answer-id"}"#;
            let answer = format!(
                "HTTP/1.1 {status}\r\ncontent-length: {}\r\nconnection: close\r\n\r\n{body}",
                body.len()
            );
            let mut request = vec![0; 4_096];
            let _ = stream.read(&mut request).await;
            let _ = stream.write_all(answer.as_bytes()).await;
        }
    });
    port
}

fn post(url: &str, body: &str) -> String {
    let json = "content-type: application/json";
    tool("curl", &["-sS", "-X", "POST", "-H", json, "-d", body, url])
}

#[tokio::test]
async fn no_planted_secret_is_in_the_log_of_a_whole_run_at_its_loudest() {
    let _alone = tokio::task::spawn_blocking(alone).await.unwrap();
    let to = receiver_that_tells().await;
    let secret = "whsec_cGxhbnRlZC1zZWNyZXQtcGxhbnRlZC1zZWNyZXQ=";
    for format in ["text", "json"] {
        let folder = tempfile::tempdir().unwrap();
        let (log, port) = (folder.path().join("log"), free_port());
        let base = format!("http://127.0.0.1:{port}");
        // The second start has another address for `default`, which is told.
        for token in ["planted-token-1", "planted-token-2"] {
            let url = format!("http://127.0.0.1:{to}/planted-path?token={token}");
            let loud = [
                ("LOG_LEVEL", "trace"),
                ("LOG_FORMAT", format),
                ("REQUEST_URL", &url),
                ("RETRY_INTERVAL", "50ms"),
            ];
            let running = up(folder.path(), port, &loud, &log);
            get(&format!("{base}/readyz"));
            let signed = format!(r#"{{"name":"signed-{token}","url":"{url}","secret":"{secret}"}}"#);
            assert!(post(&format!("{base}/v1/endpoints"), &signed).contains("signed"));
            let message = r#""recipient":"planted-recipient","content":"planted-content","headers":{"x-pass":"planted-header"}"#;
            let messages = format!("{base}/v1/messages");
            for endpoint in ["default", &format!("signed-{token}"), "default"] {
                let stored = post(&messages, &format!(r#"{{{message},"endpoint":"{endpoint}"}}"#));
                assert!(stored.contains("\"id\""), "{stored}");
            }
            // What is refused, too.
            post(&messages, r#"{"recipient":["planted-wrong"],"content":"planted-content"}"#);
            let key = "authorization: Bearer ams_abcdefgh_planted-key";
            tool("curl", &["-sS", "-H", key, &format!("{base}/v1/messages")]);
            until("all are sent", Duration::from_secs(20), async || {
                let status = get(&format!("{base}/v1/status"));
                let status: serde_json::Value = serde_json::from_str(&status).unwrap();
                let count = |name: &str| status["counts"][name]["count"].as_u64().unwrap();
                let waiting = ["pending", "queued", "processing", "retrying"].map(count).iter().sum::<u64>();
                count("sent") >= 3 && waiting == 0
            })
            .await;
            drop(running);
        }
        let text = std::fs::read_to_string(&log).unwrap();
        assert!(text.contains("the endpoint default now points to http://127.0.0.1"), "{text}");
        assert_eq!(text.lines().find(|line| line.contains("planted") || line.contains("cGxhbnRlZ")), None);
        if format == "json" {
            let lines: Vec<serde_json::Value> =
                text.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
            assert!(
                lines.iter().any(|line| line["fields"]["instance"].is_number()),
                "ids are fields: {text}"
            );
        }
    }
}

/// The drivers of the real parts print what they send, were they let.
#[tokio::test]
async fn nor_is_it_on_the_real_parts() {
    let receiver =
        Receiver::start(TestClientOptions { error_rate: 0.5, ..TestClientOptions::default() }).await;
    let stack = Stack::new("quiet", &receiver).await;
    let _up = stack.start("up", &[("LOG_LEVEL", "trace"), ("RETRY_INTERVAL", "50ms")]);
    stack.insert(50).await;
    stack.all_final(50, Duration::from_secs(40)).await;
    let text = std::fs::read_to_string(&stack.log).unwrap();
    assert!(text.contains("is the active producer"), "{text}");
    assert_eq!(text.lines().find(|line| line.contains("Hello ") || line.contains("Accepted")), None);
}

#[tokio::test]
async fn passwords_of_parts_that_are_away_or_misnamed_are_not_told() {
    let store = tempfile::tempdir().unwrap();
    let store = format!("sqlite://{}/ams.db", store.path().display());
    let away = [
        ("DATABASE_URL", "postgres://ams:planted-password@127.0.0.1:1/ams"),
        ("REDIS_URL", "redis://:planted-password@127.0.0.1:1/0"),
        ("KAFKA_BROKERS", "127.0.0.1:1"),
        ("KAFKA_SECURITY_PROTOCOL", "sasl_plaintext"),
        ("KAFKA_SASL_MECHANISM", "PLAIN"),
        ("KAFKA_SASL_USERNAME", "ams"),
        ("KAFKA_SASL_PASSWORD", "planted-password"),
        ("AMS_KEY", "planted-password"),
    ];
    for (other, says, ends) in [
        (&[][..], "the store is unavailable", false),
        // The store is there, so that the others are asked.
        (&[("DATABASE_URL", store.as_str())], "consumer of", false),
        (&[("DATABASE_URL", "mysql://ams:planted-password@host/db")], "DATABASE_URL", true),
        (&[("DATABASE_URL", "postgres://ams:planted-password?x@host/db")], "the store is unavailable", false),
        (&[("REDIS_URL", "http://:planted-password@host")], "REDIS_URL", true),
        (&[("REQUEST_URL", "ftp://ams:planted-password@host/")], "REQUEST_URL", true),
    ] {
        let folder = tempfile::tempdir().unwrap();
        let log = folder.path().join("log");
        let environment: Vec<_> =
            [("LOG_LEVEL", "trace")].iter().chain(&away).chain(other).copied().collect();
        let mut running = up(folder.path(), 0, &environment, &log);
        let told = || std::fs::read_to_string(&log).unwrap();
        until(&format!("{other:?}: says {says}"), Duration::from_secs(60), async || {
            told().contains(says) && (!ends || running.0.try_wait().unwrap().is_some())
        })
        .await;
        drop(running);
        assert_eq!(told().lines().find(|line| line.contains("planted")), None, "{other:?}");
    }
}
