//! The verbs that look after a system, run as an operator runs them: keys, doctor, import.

use std::fmt::Write as _;
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use crate::harness::*;
use ams::testclient::TestClientOptions;
use serde_json::{Value, json};

/// An `ams` in a folder of its own, on the embedded parts unless `store` says otherwise.
struct Here {
    folder: tempfile::TempDir,
    store: Option<String>,
    port: u16,
}

/// An API, ended when it is dropped.
struct Api(Child);

impl Drop for Api {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

impl Here {
    fn new(store: Option<String>) -> Here {
        // Below the ephemeral range, so that no client takes the port first.
        Here { folder: tempfile::tempdir().unwrap(), store, port: fastrand::u16(20_000..28_000) }
    }

    fn ams(&self, arguments: &[&str]) -> Command {
        let mut command = embedded(self.folder.path());
        command.args(arguments).envs(self.store.as_ref().map(|url| ("DATABASE_URL", url)));
        command.env("PORT", self.port.to_string()).env("AMS_URL", format!("http://127.0.0.1:{}", self.port));
        command
    }

    fn run(&self, arguments: &[&str]) -> Output {
        self.ams(arguments).output().unwrap()
    }

    /// The answer of a verb with `--json`, and how it ended.
    fn json(&self, arguments: &[&str]) -> (Value, Option<i32>) {
        let output = self.ams(arguments).arg("--json").output().unwrap();
        let text = String::from_utf8_lossy(&output.stdout);
        let answer = serde_json::from_str(&text);
        let answer = answer.unwrap_or_else(|_| panic!("{text}\n{}", String::from_utf8_lossy(&output.stderr)));
        (answer, output.status.code())
    }

    async fn api(&self, more: &[&str]) -> Api {
        assert!(self.run(&["migrate"]).status.success());
        let mut command = self.ams(&["api"]);
        command.args(more).stdout(Stdio::null()).stderr(Stdio::null());
        let api = Api(command.spawn().unwrap());
        until("the API answers", Duration::from_secs(30), async || {
            tokio::net::TcpStream::connect(("127.0.0.1", self.port)).await.is_ok()
        })
        .await;
        api
    }

    fn path(&self, name: &str) -> String {
        self.folder.path().join(name).to_str().unwrap().to_owned()
    }
}

/// What the doctor says of one part: the worst of it, and its words.
fn said<'a>(answer: &'a Value, about: &str) -> Vec<(&'a str, &'a str)> {
    let findings = answer["findings"].as_array().unwrap().iter().filter(|finding| finding["about"] == about);
    findings.map(|finding| (finding["state"].as_str().unwrap(), finding["says"].as_str().unwrap())).collect()
}

#[tokio::test]
async fn a_key_opens_the_api_until_it_is_revoked() {
    let _alone = tokio::task::spawn_blocking(alone).await.unwrap();
    let here = Here::new(None);
    let early = here.run(&["keys", "create", "shop"]);
    assert_eq!(early.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&early.stderr).contains("ams migrate"), "{early:?}");
    let _api = here.api(&["--host", "0.0.0.0"]).await;
    let refused = here.run(&["messages", "list"]);
    assert!(String::from_utf8_lossy(&refused.stderr).contains("AMS_KEY"), "{refused:?}");
    let (made, code) = here.json(&["keys", "create", "shop", "--expires", "90d"]);
    assert_eq!(
        (code, &made["scopes"], &made["state"]),
        (Some(0), &json!(["write", "read"]), &json!("valid"))
    );
    let key = made["key"].as_str().unwrap();
    let list = || here.ams(&["messages", "list"]).env("AMS_KEY", key).output().unwrap();
    until("the key is known", Duration::from_secs(5), async || list().status.success()).await;
    let (listed, _) = here.json(&["keys", "list"]);
    assert_eq!((&listed["data"][0]["id"], &listed["data"][0]["key"]), (&made["id"], &Value::Null));
    assert_eq!(here.json(&["keys", "revoke", key]).1, Some(0), "the whole key names it too");
    assert_eq!(here.run(&["keys", "revoke", key]).status.code(), Some(1));
    until("the key is worthless", Duration::from_secs(5), async || !list().status.success()).await;
    assert_eq!(here.run(&["keys", "create", " "]).status.code(), Some(2));
}

#[tokio::test]
async fn the_doctor_finds_what_is_broken() {
    let _alone = tokio::task::spawn_blocking(alone).await.unwrap();
    let receiver = Receiver::start(TestClientOptions::default()).await;
    let here = Here::new(None);
    let (answer, _) = here.json(&["doctor", "--request-url", &receiver.url]);
    assert!(matches!(said(&answer, "store")[..], [("warning", says)] if says.contains("ams up")), "{answer}");
    assert!(!Path::new(&here.path("ams-data")).exists(), "it only looks");
    assert!(matches!(said(&answer, "endpoint")[..], [("ok", _)]), "{answer}");
    assert!(matches!(said(&answer, "API")[..], [("fault", says)] if says.contains("AMS_URL")), "{answer}");

    let up = here.ams(&["up", "--request-url", &receiver.url]).stderr(Stdio::null()).spawn().unwrap();
    let up = Api(up);
    until("all is well but limits", Duration::from_secs(30), async || {
        let (answer, code) = here.json(&["doctor"]);
        code == Some(0) && matches!(said(&answer, "work")[..], [("ok", _)])
    })
    .await;
    drop(up);
    drop(receiver);
    let send = "insert into messages (recipient, content) values ('+90', 'Hello')";
    tool("sqlite3", &["-cmd", ".timeout 5000", &here.path("ams-data/ams.db"), send]);
    let outcome = async || {
        let (answer, code) = here.json(&["doctor"]);
        assert_eq!(code, Some(1));
        let says = |about| said(&answer, about).first().is_some_and(|(state, _)| *state == "fault");
        says("work") && says("endpoint") && says("API")
    };
    // Until its lease has run out, a killed process may still live.
    until("nobody works, answers or receives", Duration::from_secs(30), outcome).await;

    for (flags, about) in [
        (["--database-url", "mysql://x"], "settings"),
        (["--database-url", "postgres://postgres@127.0.0.1:1/x"], "store"),
        (["--kafka-brokers", "127.0.0.1:1"], "broker"),
    ] {
        let (answer, code) = here.json(&[&["doctor"][..], &flags].concat());
        assert_eq!(code, Some(1));
        assert!(matches!(said(&answer, about)[..], [("fault", says)] if says.contains(';')), "{answer}");
    }
}

/// Kills an import in its middle, runs it again and once more; `count` tells rows and distinct keys.
async fn import_killed_and_resumed(here: &Here, count: impl AsyncFn() -> String) {
    // Several times what is sent before progress is first noted, so that there is a middle to be killed in.
    const LINES: usize = 100_000;
    let _api = here.api(&[]).await;
    let mut text = String::new();
    for line in 1..=LINES {
        let content = if line == 777 { json!(5) } else { json!(format!("Hello {line}")) };
        let recipient = if line == 19_000 { String::new() } else { format!("+90{line}") };
        writeln!(text, "{}", json!({"recipient": recipient, "content": content})).unwrap();
    }
    std::fs::write(here.path("list.jsonl"), text).unwrap();
    let mut first = here.ams(&["import", "list.jsonl", "--errors", "bad.jsonl"]).spawn().unwrap();
    let progress = here.path("list.jsonl.ams-import");
    until("it has come some way", Duration::from_secs(60), async || Path::new(&progress).exists()).await;
    first.kill().unwrap();
    first.wait().unwrap();
    let left: Value = serde_json::from_slice(&std::fs::read(&progress).unwrap()).unwrap();
    let settled = left["settled"].as_u64().unwrap();
    assert!(settled > 0 && settled < LINES as u64, "it was killed in its middle: {left}");

    let (answer, code) = here.json(&["import", "list.jsonl", "--errors", "bad.jsonl"]);
    assert_eq!((code, &answer["bad"], &answer["lines"]), (Some(1), &json!(2), &json!(LINES)), "{answer}");
    assert_eq!(answer["by_an_earlier_run"], settled, "{answer}");
    let numbers = |name: &str| answer[name].as_u64().unwrap();
    assert_eq!(numbers("sent") + numbers("already_there"), 99_998, "{answer}");
    assert_eq!(count().await, "99998|99998");
    let bad = std::fs::read_to_string(here.path("bad.jsonl")).unwrap();
    let bad: Vec<Value> = bad.lines().map(|line| serde_json::from_str(line).unwrap()).collect();
    assert_eq!(bad.iter().map(|bad| &bad["line"]).collect::<Vec<_>>(), [&json!(777), &json!(19_000)]);
    assert!(!Path::new(&progress).exists());

    let (answer, _) = here.json(&["import", "list.jsonl"]);
    assert_eq!((&answer["sent"], &answer["already_there"]), (&json!(0), &json!(99_998)), "{answer}");
    // The progress of an import into another store says nothing about this one.
    let text = std::fs::read(here.path("list.jsonl")).unwrap();
    let digest = ring::digest::digest(&ring::digest::SHA256, &text);
    let content: String = digest.as_ref()[..16].iter().map(|byte| format!("{byte:02x}")).collect();
    let stranger = json!({"name": left["name"], "api": left["api"], "settled": LINES, "content": content,
        "from": 99_000, "probe": [99_001, 1], "counts": {"sent": LINES, "already_there": 0, "bad": 0}});
    std::fs::write(&progress, stranger.to_string()).unwrap();
    let (answer, _) = here.json(&["import", "list.jsonl"]);
    assert_eq!(
        (&answer["already_there"], &answer["by_an_earlier_run"]),
        (&json!(99_998), &json!(0)),
        "{answer}"
    );
    assert_eq!(count().await, "99998|99998");
}

const COUNT: &str = "select count(*) || '|' || count(distinct idempotency_key) from messages";

#[tokio::test]
async fn an_import_killed_and_resumed_sends_each_line_once_on_the_embedded_store() {
    let _alone = tokio::task::spawn_blocking(alone).await.unwrap();
    let here = Here::new(None);
    let file = here.path("ams-data/ams.db");
    import_killed_and_resumed(&here, async || tool("sqlite3", &[&file, COUNT]).trim().to_owned()).await;
}

#[tokio::test]
async fn an_import_killed_and_resumed_sends_each_line_once_on_postgres() {
    let receiver = Receiver::start(TestClientOptions::default()).await;
    let stack = Stack::new("import", &receiver).await;
    let here = Here::new(Some(stack.database_url.clone()));
    let count = async || stack.sql().await.query_one(COUNT, &[]).await.unwrap().get(0);
    import_killed_and_resumed(&here, count).await;
}

#[tokio::test]
async fn an_import_reads_csv_from_a_pipe_and_says_what_it_can_not_do() {
    let _alone = tokio::task::spawn_blocking(alone).await.unwrap();
    let here = Here::new(None);
    std::fs::write(here.path("list.csv"), "recipient,content\n+90,Hello\n+91,\"two\nlines\"\n").unwrap();
    std::fs::write(here.path("list.txt"), "").unwrap();
    let away = here.run(&["import", "list.csv"]);
    assert_eq!(away.status.code(), Some(1));
    assert!(String::from_utf8_lossy(&away.stderr).contains("no API answers"), "{away:?}");
    let api = here.api(&[]).await;
    let piped = |arguments: &[&str]| {
        let input = std::fs::File::open(here.path("list.csv")).unwrap();
        here.ams(arguments).stdin(input).output().unwrap()
    };
    for existing in [0, 2] {
        let output = piped(&["import", "-", "--format", "csv", "--name", "spring", "--json"]);
        let answer: Value = serde_json::from_slice(&output.stdout).unwrap();
        assert_eq!((&answer["lines"], &answer["already_there"]), (&json!(2), &json!(existing)), "{answer}");
    }
    for (arguments, code, why) in [
        (&["import", "list.txt"][..], 2, "--format"),
        (&["import", "-", "--format", "csv"], 2, "--name"),
        (&["import", "none.csv"], 1, "none.csv"),
        (&["import", "list.csv", "--name", ""], 2, "--name"),
        (&["import", "list.csv", "--format", "jsonl"], 1, "line 1: is no JSON"),
        (&["import", "list.txt", "--format", "csv"], 1, "lacks `recipient`"),
    ] {
        let output = piped(arguments);
        assert_eq!(output.status.code(), Some(code), "{arguments:?}: {output:?}");
        assert!(String::from_utf8_lossy(&output.stderr).contains(why), "{arguments:?}: {output:?}");
    }
    // A file that was sent is not sent again, and an API that has gone is told.
    drop(api);
    assert_eq!(here.run(&["import", "list.csv"]).status.code(), Some(1));
}
