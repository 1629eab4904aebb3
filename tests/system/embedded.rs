//! Everything in one process: the demo, and the embedded store beside a shell.

use std::process::Command;
use std::time::Duration;

use crate::harness::*;
use ams::testclient::TestClientOptions;

#[test]
fn the_demo_ends_with_its_summary() {
    let _alone = alone();
    let folder = tempfile::tempdir().unwrap();
    let output = embedded(folder.path()).args(["demo", "--exit-when-done"]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    assert!(output.status.success(), "{text}\n{}", String::from_utf8_lossy(&output.stderr));
    assert!(
        text.contains("/swagger/index.html") && text.contains("curl ") && text.contains("sqlite3 "),
        "{text}"
    );
    assert!(text.lines().last().unwrap().starts_with("10 messages: "), "{text}");
}

#[test]
fn a_reader_that_has_seen_enough_is_no_failure() {
    let folder = tempfile::tempdir().unwrap();
    for arguments in [["config"].as_slice(), &["config", "--json"], &["migrate"]] {
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let output = embedded(folder.path()).args(arguments).stdout(writer).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success() && !said.contains("panicked"), "{arguments:?}: {said}");
    }
}

#[tokio::test]
async fn a_shell_inserts_into_the_embedded_store_and_a_kill_loses_nothing() {
    let _alone = tokio::task::spawn_blocking(alone).await.unwrap();
    let folder = tempfile::tempdir().unwrap();
    let receiver = Receiver::start(TestClientOptions::default()).await;
    let start = || {
        embedded(folder.path()).args(["up", "--port", "0"]).env("REQUEST_URL", &receiver.url).spawn().unwrap()
    };
    let mut up = start();
    let file = folder.path().join("ams-data/ams.db");
    until("the store is there", Duration::from_secs(10), async || file.exists()).await;
    let shell = |sql: &str| {
        Command::new("sqlite3").args(["-cmd", ".timeout 5000"]).arg(&file).arg(sql).output().unwrap()
    };
    let insert = "insert into messages (recipient, content) values ('+90', 'Hello')";
    until("the store is migrated", Duration::from_secs(10), async || shell(insert).status.success()).await;
    until("it arrives", Duration::from_secs(5), async || receiver.arrivals() == 1).await;

    let many = "insert into messages (recipient, content) with recursive i(n) as (select 1 union all select n + 1 from i where n < 5000) select '+' || n, 'Hello' from i";
    assert!(shell(many).status.success());
    until("some have arrived", Duration::from_secs(10), async || receiver.arrivals() > 500).await;
    up.kill().unwrap();
    up.wait().unwrap();
    let mut up = start();
    until("all have arrived", Duration::from_secs(30), async || receiver.accepted().len() == 5_001).await;
    let nonsense = shell("insert into messages (recipient, content, id) values ('+90', 'Hello', 4711)");
    assert!(String::from_utf8_lossy(&nonsense.stderr).contains("id is set by AMS"), "{nonsense:?}");
    println!("killed in mid-run: lost 0, repeats {}", receiver.duplicates());
    up.kill().unwrap();
    up.wait().unwrap();
}
