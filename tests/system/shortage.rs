//! A process that is short of file descriptors: its receivers are healthy, so no message may pay for it.

use std::process::{Child, Command, Stdio};
use std::time::Duration;

use crate::harness::*;
use ams::testclient::TestClientOptions;

/// `ams up` on embedded parts, with few file descriptors.
struct Up {
    child: Child,
    base: String,
    folder: tempfile::TempDir,
}

impl Up {
    /// Starts one whose limit of open files is `files`; it can't raise it.
    async fn start(files: u32, receiver: &Receiver) -> Up {
        let folder = tempfile::tempdir().unwrap();
        let port = free_port().await;
        let mut command = Command::new("sh");
        command
            .arg("-c")
            .arg(format!("ulimit -n {files} && exec \"$0\" up --port {port}"))
            .arg(program())
            .current_dir(folder.path())
            .env("REQUEST_URL", &receiver.url)
            .stdin(Stdio::null());
        without_services(&mut command);
        let up = Up { child: command.spawn().unwrap(), base: format!("http://127.0.0.1:{port}"), folder };
        until("the API answers", Duration::from_secs(30), async || up.get("/readyz").is_some()).await;
        up
    }

    /// The answer to a GET; `None` when there is none within 5 s.
    fn get(&self, path: &str) -> Option<String> {
        let url = format!("{}{path}", self.base);
        let output = Command::new("curl").args(["-s", "-m", "5", &url]).output().unwrap();
        output.status.success().then(|| String::from_utf8(output.stdout).unwrap())
    }

    fn json(&self, path: &str) -> serde_json::Value {
        let text = self.get(path).unwrap_or_else(|| panic!("{path} was not answered within 5 s"));
        serde_json::from_str(&text).unwrap_or_else(|error| panic!("{path}: {error}: {text}"))
    }

    /// What a statement of one column and one row says.
    fn sql(&self, statement: &str) -> String {
        let file = self.folder.path().join("ams-data/ams.db");
        tool("sqlite3", &["-cmd", ".timeout 5000", &file.to_string_lossy(), statement]).trim().to_owned()
    }

    fn insert(&self, count: u32) {
        self.sql(&format!(
            "insert into messages (recipient, content) with recursive i(n) as \
             (select 1 union all select n + 1 from i where n < {count}) select '+' || n, 'Hello' from i"
        ));
    }

    /// Sockets of the process that the other side has closed and it has not.
    fn close_wait(&self) -> usize {
        let own = |entry: std::fs::DirEntry| {
            let target = std::fs::read_link(entry.path()).ok()?;
            Some(target.to_str()?.strip_prefix("socket:[")?.trim_end_matches(']').to_owned())
        };
        let folder = std::fs::read_dir(format!("/proc/{}/fd", self.child.id())).unwrap();
        let own: std::collections::BTreeSet<_> = folder.filter_map(|entry| own(entry.unwrap())).collect();
        let table = std::fs::read_to_string(format!("/proc/{}/net/tcp", self.child.id())).unwrap();
        let closing = table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>());
        closing.filter(|words| words.get(3) == Some(&"08") && own.contains(words[9])).count()
    }
}

impl Drop for Up {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[tokio::test]
async fn a_process_short_of_descriptors_delivers_everything_and_says_what_it_is_short_of() {
    let _alone = tokio::task::spawn_blocking(alone).await.unwrap();
    let slow = TestClientOptions { latency: Duration::from_millis(500), ..TestClientOptions::default() };
    let receiver = Receiver::start(slow).await;
    let up = Up::start(128, &receiver).await;
    up.insert(600);
    let mut shown = false;
    until("all have arrived", Duration::from_secs(60), async || {
        let ready = up.json("/readyz");
        assert_eq!(ready["ready"], true, "it takes and keeps messages meanwhile: {ready}");
        shown |= ready["shortages"][0]["of"] == "descriptors";
        receiver.accepted().len() == 600
    })
    .await;
    assert!(shown, "the shortage is shown while it lasts");
    until("all are recorded", Duration::from_secs(10), async || {
        up.sql("select count(*) from deliveries where status = 'sent'") == "600"
    })
    .await;
    assert_eq!((receiver.arrivals(), receiver.duplicates()), (600, 0), "one attempt for each");
    let metrics = up.get("/metrics").unwrap();
    let value = |name: &str| {
        let line = metrics.lines().find(|line| line.starts_with(name));
        line.and_then(|line| line.split(' ').nth(1)).map_or(0.0, |value| value.parse().unwrap())
    };
    assert_eq!(value("ams_attempts_total{lane=\"messages\",class=\"refused\"}"), 0.0, "{metrics}");
    assert!(value("ams_put_off_total{of=\"descriptors\"}") > 0.0, "{metrics}");
    until("the shortage is over", Duration::from_secs(15), async || {
        up.json("/readyz")["shortages"] == serde_json::json!([])
    })
    .await;
}

#[tokio::test]
async fn clients_of_the_api_take_no_descriptors_of_the_deliveries() {
    let _alone = tokio::task::spawn_blocking(alone).await.unwrap();
    let receiver = Receiver::start(TestClientOptions::default()).await;
    let up = Up::start(128, &receiver).await;
    // With what it has open at rest more than it may have, and fewer than wait to be accepted at most (128).
    // None of them says a word.
    let address = up.base.trim_start_matches("http://");
    let connect = (0..120).map(|_| tokio::net::TcpStream::connect(address));
    let clients = futures_util::future::try_join_all(connect).await.unwrap();
    up.insert(600);
    until("all are recorded", Duration::from_secs(30), async || {
        up.sql("select count(*) from deliveries where status = 'sent'") == "600"
    })
    .await;
    assert_eq!(up.sql("select count(*) from attempts where class <> 'accepted'"), "0");
    drop(clients);
    until("the API answers again", Duration::from_secs(10), async || up.get("/readyz").is_some()).await;
}

#[tokio::test]
async fn connections_that_receivers_have_closed_are_closed_while_nothing_is_sent() {
    let _alone = tokio::task::spawn_blocking(alone).await.unwrap();
    let slow = TestClientOptions { latency: Duration::from_millis(500), ..TestClientOptions::default() };
    let receiver = Receiver::start(slow).await;
    let up = Up::start(1_024, &receiver).await;
    up.insert(800);
    until("all are recorded", Duration::from_secs(60), async || {
        up.sql("select count(*) from deliveries where status = 'sent'") == "800"
    })
    .await;
    // It ends, and with it the other side of every connection.
    drop(receiver);
    until("some are closed by the other side", Duration::from_secs(5), async || up.close_wait() > 0).await;
    until("none is left", Duration::from_secs(10), async || up.close_wait() == 0).await;
}
