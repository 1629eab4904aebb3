//! The operators' verbs, as a person types them, against a real API on the embedded store.

mod import;
mod secrets;

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

use ams::clock::Clock;
use serde_json::Value;

/// Longer than anything here takes on a busy machine.
const PATIENCE: Duration = Duration::from_secs(60);

fn ams(folder: &Path) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_ams"));
    command.current_dir(folder).stdin(Stdio::null());
    for name in ["DATABASE_URL", "KAFKA_BROKERS", "REDIS_URL", "AMS_URL", "AMS_KEY"] {
        command.env_remove(name);
    }
    command
}

/// A port below the ephemeral range, so that no client takes it first.
fn free_port() -> u16 {
    loop {
        let port = fastrand::u16(20_000..28_000);
        if std::net::TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

/// What a verb said, and its exit code.
struct Said {
    code: i32,
    out: String,
    err: String,
}

impl Said {
    fn of(output: Output) -> Said {
        let text = |bytes| String::from_utf8(bytes).unwrap();
        Said { code: output.status.code().unwrap(), out: text(output.stdout), err: text(output.stderr) }
    }

    fn json(&self) -> Value {
        serde_json::from_str(&self.out).unwrap_or_else(|error| panic!("{error}: {}{}", self.out, self.err))
    }
}

/// `ams up` with a receiver that refuses everything at `bad` and takes everything at `default`.
struct System {
    folder: tempfile::TempDir,
    url: String,
    processes: Vec<Child>,
}

impl System {
    fn start() -> System {
        let folder = tempfile::tempdir().unwrap();
        let (receiver, port) = (free_port(), free_port());
        let quiet =
            |mut command: Command| command.stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        let mut testclient = ams(folder.path());
        testclient.args(["testclient", "--port", &receiver.to_string(), "--quiet"]);
        let mut up = ams(folder.path());
        up.args(["up", "--port", &port.to_string(), "--retry-interval", "10ms", "--retry-count", "2"]);
        up.env("REQUEST_URL", format!("http://127.0.0.1:{receiver}"));
        let processes = vec![quiet(testclient), quiet(up)];
        let system = System { folder, url: format!("http://127.0.0.1:{port}"), processes };
        system.until("the API answers", &["status"], |said| said.code == 0);
        let bad = format!("http://127.0.0.1:{}", free_port());
        assert_eq!(system.say(&["endpoints", "create", "bad", &bad, "--timeout", "5s"]).code, 0);
        system
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let mut command = ams(self.folder.path());
        command.args(arguments).env("AMS_URL", &self.url);
        command
    }

    fn say(&self, arguments: &[&str]) -> Said {
        Said::of(self.command(arguments).output().unwrap())
    }

    /// Asks again and again until the answer is as it should be.
    fn until(&self, what: &str, arguments: &[&str], good: impl Fn(&Said) -> bool) -> Said {
        let watch = Clock::system().stopwatch();
        loop {
            let said = self.say(arguments);
            if good(&said) {
                return said;
            }
            assert!(watch.elapsed() < PATIENCE, "not yet: {what}: {}{}", said.out, said.err);
        }
    }
}

impl Drop for System {
    fn drop(&mut self) {
        for process in &mut self.processes {
            process.kill().unwrap();
            process.wait().unwrap();
        }
    }
}

#[test]
fn a_message_is_sent_waited_for_and_shown() {
    let system = System::start();
    let said = system.say(&["messages", "list"]);
    assert!(said.out.starts_with("No messages yet; `ams send"), "{}", said.out);
    let sent = system.say(&["send", "+90", "Hello", "--wait", "--tag", "a=b", "--idempotency-key", "k"]);
    assert_eq!(sent.code, 0, "{}", sent.err);
    assert!(sent.out.starts_with("message 1 is sent after 1 try, "), "{}", sent.out);
    assert!(
        system
            .say(&["send", "+90", "Hello", "--tag", "a=b", "--idempotency-key", "k"])
            .out
            .contains("message 1 is sent")
    );
    let shown = system.say(&["messages", "show", "1"]);
    assert!(
        shown.out.contains("try 1 on messages: status 200 in ")
            && shown.out.contains("tags      {\"a\":\"b\"}"),
        "{}",
        shown.out
    );
    let json = system.say(&["messages", "show", "1", "--json"]).json();
    assert_eq!((&json["status"], &json["timeline"][0]["status"]), (&"sent".into(), &200.into()));
    let listed =
        system.say(&["messages", "list", "--status", "sent", "--created-after", "1h", "--json"]).json();
    assert_eq!((listed["data"].as_array().unwrap().len(), &listed["data"][0]["id"]), (1, &1.into()));
    assert!(!sent.out.contains('\x1b') && !shown.out.contains('\x1b'), "no colours but on a terminal");
    let later = system.say(&["send", "+90", "later", "--send-at", "2h"]);
    assert!(
        later.out.contains("message 2 is pending, due in 1 h 59 min; `ams messages show 2`"),
        "{}",
        later.out
    );
    let late = system.say(&["send", "+90", "later", "--send-at", "2h", "--wait=10ms"]);
    assert_eq!(late.code, 1);
    assert!(late.err.contains("not final yet; `ams messages show 3`"), "{}", late.err);
    assert_eq!(system.say(&["messages", "cancel", "2"]).out, "message 2 is cancelled\n");
    let counted = system.say(&["messages", "cancel", "--status", "pending", "--dry-run", "--json"]).json();
    assert_eq!(counted["matched"], 1);
    assert_eq!(
        system.say(&["messages", "cancel", "--status", "pending", "--all"]).out,
        "1 message cancelled.\n"
    );
}

#[test]
fn dead_messages_are_grouped_shown_and_redriven() {
    let system = System::start();
    let dead = system.say(&["send", "+91", "Hello", "--endpoint", "bad", "--wait"]);
    assert_eq!(dead.code, 1);
    assert!(dead.out.contains("message 1 is dead after 3 tries, "), "{}", dead.out);
    let listed = system.say(&["dlq", "list"]);
    assert!(
        listed.out.contains("connection refused") && listed.out.contains("`ams dlq show 1`"),
        "{}",
        listed.out
    );
    let reason =
        system.say(&["dlq", "list", "--json"]).json()["data"][0]["reason"].as_str().unwrap().to_owned();
    assert!(system.say(&["dlq", "show", "1"]).out.contains("`ams messages redrive 1` sends it again"));
    assert_eq!(system.say(&["endpoints", "disable", "bad"]).code, 0);
    let dry = system.say(&["dlq", "redrive", "--reason", &reason, "--dry-run"]);
    assert_eq!(dry.out, "1 message would be pending again; without --dry-run they are.\n");
    assert_eq!(system.say(&["dlq", "redrive", "--reason", &reason]).out, "1 message pending again.\n");
    let held = system.until("it is held", &["messages", "list"], |said| {
        said.out.contains("held: endpoint bad is disabled")
    });
    assert_eq!(held.code, 0);
    let refused = system.say(&["dlq", "redrive"]);
    assert_eq!(refused.code, 1);
    assert!(refused.err.contains("--all"), "{}", refused.err);
    let twice = system.say(&["dlq", "redrive", "1", "999"]);
    assert_eq!(twice.code, 1);
    assert!(
        twice.err.contains("`ams messages show 1`") && twice.err.contains("there is no message 999"),
        "{}",
        twice.err
    );
    let used = system.say(&["endpoints", "delete", "bad"]);
    assert!(used.code == 1 && used.err.contains("disable it instead"), "{}", used.err);
}

#[test]
fn status_tail_and_the_producers_tell_what_happens() {
    let system = System::start();
    let mut tail = system.command(&["tail", "--json", "--last", "0", "--recipient", "+92"]);
    let mut tail = tail.stdout(Stdio::piped()).spawn().unwrap();
    let mut lines = BufReader::new(tail.stdout.take().unwrap()).lines();
    // The tail may have begun before or after any one of these.
    let told = std::thread::scope(|scope| {
        let told = scope.spawn(move || lines.next().unwrap().unwrap());
        let watch = Clock::system().stopwatch();
        while !told.is_finished() {
            if watch.elapsed() > PATIENCE {
                // Its output ends, and with it the wait for a line.
                tail.kill().unwrap();
            }
            assert_eq!(system.say(&["send", "+92", "Hello", "--wait"]).code, 0);
        }
        told.join().unwrap()
    });
    tail.kill().unwrap();
    tail.wait().unwrap();
    let told: Value = serde_json::from_str(&told).unwrap();
    assert_eq!((&told["status"], &told["recipient"]), (&"sent".into(), &"+92".into()));

    let well = system.say(&["status"]);
    assert!(well.out.contains("all is well") && well.out.contains("services  up "), "{}", well.out);
    assert!(system.say(&["producer", "pause"]).out.contains("`ams producer resume`"));
    let paused = system.say(&["status"]);
    assert!(
        paused.out.contains("1 trouble below") && paused.out.contains("! the producers are paused"),
        "{}",
        paused.out
    );
    assert_eq!(system.say(&["producer", "resume", "--json"]).json()["state"], "running");
    let status = system.say(&["status", "--json"]).json();
    assert_eq!(status["parts"]["store"]["kind"], "sqlite");
}

#[test]
fn endpoints_are_made_changed_and_removed() {
    let system = System::start();
    let made = [
        "endpoints",
        "create",
        "sms",
        "http://127.0.0.1:9/x",
        "--timeout",
        "2s",
        "--final-statuses",
        "410,422",
    ];
    let made = system.say(&made);
    assert!(
        made.out.contains("timeout   2s over") && made.out.contains("410, 422"),
        "{}{}",
        made.out,
        made.err
    );
    let changed = system
        .say(&["endpoints", "change", "sms", "--in-flight-max", "7", "--final-statuses", "none", "--json"])
        .json();
    assert_eq!(
        (&changed["in_flight_max"], &changed["final_statuses"]),
        (&7.into(), &Value::Array(Vec::new()))
    );
    assert_eq!(system.say(&["endpoints", "disable", "sms", "--json"]).json()["enabled"], false);
    assert!(system.say(&["endpoints", "list"]).out.contains("sms      disabled"));
    assert_eq!(system.say(&["endpoints", "enable", "sms", "--json"]).json()["enabled"], true);
    let wrong = system.say(&["endpoints", "change", "sms", "--secret", "x", "--timeout", "0s"]);
    assert_eq!(wrong.code, 1);
    assert_eq!(wrong.err, "ams: timeout_ms must be from 1 to 600000; secret does not begin with `whsec_`\n");
    assert_eq!(system.say(&["endpoints", "delete", "sms"]).out, "The endpoint sms is gone.\n");
    let gone = system.say(&["endpoints", "show", "sms"]);
    assert_eq!(
        (gone.code, gone.err.as_str()),
        (1, "ams: there is no endpoint sms; `ams endpoints list` shows what there is\n")
    );
}

#[test]
fn what_fails_leaves_nobody_without_a_next_step() {
    let system = System::start();
    let missing = system.say(&["messages", "show", "999"]);
    assert_eq!((missing.code, missing.out.as_str()), (1, ""));
    assert_eq!(missing.err, "ams: there is no message 999; `ams messages list` shows what there is\n");
    let invalid = system.say(&["send", "", "Hello"]);
    assert_eq!(
        (invalid.code, invalid.err.as_str()),
        (1, "ams: recipient must have from 1 to 1024 characters\n")
    );
    let unknown =
        system.command(&["status"]).env("AMS_KEY", "ams_nobody_has_this").output().map(Said::of).unwrap();
    assert_eq!(unknown.code, 1);
    assert!(
        unknown.err.contains("no such key") && unknown.err.contains("`ams keys create`"),
        "{}",
        unknown.err
    );
    for arguments in
        [["messages", "list", "--status=nope"].as_slice(), &["messages"], &["send", "+90"], &["nothing"]]
    {
        assert_eq!(system.say(arguments).code, 2, "{arguments:?}");
    }
    let nobody = format!("http://127.0.0.1:{}", free_port());
    for arguments in [["status"].as_slice(), &["tail"], &["dlq", "list"], &["send", "+90", "Hello"]] {
        let refused = system.command(arguments).env("AMS_URL", &nobody).output().map(Said::of).unwrap();
        let sentence = format!(
            "ams: no API answers at {nobody} (connection refused); start one with `ams up`, or set AMS_URL\n"
        );
        assert_eq!((refused.code, refused.err), (1, sentence), "{arguments:?}");
    }
}

#[test]
fn completions_name_every_verb() {
    let folder = tempfile::tempdir().unwrap();
    for shell in ["bash", "zsh", "fish"] {
        let said = Said::of(ams(folder.path()).args(["completions", shell]).output().unwrap());
        assert_eq!(said.code, 0, "{}", said.err);
        for verb in ["send", "messages", "dlq", "endpoints", "status", "tail"] {
            assert!(said.out.contains(verb), "{shell}: {verb}");
        }
    }
}
