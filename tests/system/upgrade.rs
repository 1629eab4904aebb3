//! Two versions side by side: a store that a newer program has migrated, and services that go on with it.

use std::process::{Command, Stdio};
use std::time::Duration;

use crate::harness::*;
use ams::testclient::TestClientOptions;

/// What the next version's migration may do while this one is at work: add, and change nothing.
const LATER: &str = "alter table messages add column colour text not null default 'plain'; \
    alter table attempts add column size integer; alter table instances add column room text; \
    alter table endpoints add column rate integer not null default 7; \
    create table colours (name text primary key); \
    insert into refinery_schema_history (version, name, applied_on, checksum) \
    select max(version) + 1, 'later', '', '1' from refinery_schema_history";

/// What a migration does that programs before it can't work with.
const NEEDED: &str =
    "update installation set needs_migration = (select max(version) from refinery_schema_history)";

fn said(command: &mut Command) -> (bool, String) {
    let output = command.stdout(Stdio::piped()).stderr(Stdio::piped()).output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    (output.status.success(), text.into_owned())
}

#[tokio::test]
async fn services_go_on_and_restart_on_a_store_that_a_newer_program_has_migrated() {
    let receiver =
        Receiver::start(TestClientOptions { error_rate: 0.2, ..TestClientOptions::default() }).await;
    let stack = Stack::new("upgrade", &receiver).await;
    let retry: &[(&str, &str)] = &[("RETRY_INTERVAL", "100ms"), ("RETRY_COUNT", "20")];
    let running =
        [stack.start("producer", &[]), stack.start("consumer", &[]), stack.start("retry-consumer", retry)];
    stack.insert(2_000).await;
    until("some have arrived", Duration::from_secs(30), async || receiver.arrivals() > 200).await;
    stack.sql().await.batch_execute(LATER).await.unwrap();
    stack.insert(2_000).await;
    until("more have arrived", Duration::from_secs(30), async || receiver.accepted().len() > 2_000).await;
    for service in running {
        assert!(service.stop().await.success());
    }

    let (done, text) = said(&mut stack.command("migrate", &[]));
    assert!(done && text.contains("newer than this program: it has V") && text.contains("__later"), "{text}");
    let _again =
        [stack.start("producer", &[]), stack.start("consumer", &[]), stack.start("retry-consumer", retry)];
    stack.insert(1_000).await;
    let ended = stack.all_final(5_000, Duration::from_secs(60)).await;
    assert_eq!((ended.get("sent"), receiver.accepted().len()), (Some(&5_000), 5_000), "{ended:?}");
    assert_eq!(receiver.duplicates(), 0);

    stack.sql().await.batch_execute(NEEDED).await.unwrap();
    for verb in ["migrate", "consumer"] {
        let (done, text) = said(&mut stack.command(verb, &[]));
        assert!(
            !done && text.contains("needs a program that knows V") && text.contains("; use a newer program"),
            "{text}"
        );
    }
}

#[tokio::test]
async fn the_embedded_store_goes_on_after_a_newer_program() {
    let receiver = Receiver::start(TestClientOptions::default()).await;
    let folder = tempfile::tempdir().unwrap();
    let ams = |verb: &str| {
        let mut command = embedded(folder.path());
        command.arg(verb).env("REQUEST_URL", &receiver.url).env("PORT", "0");
        command
    };
    assert!(said(&mut ams("migrate")).0);
    let file = folder.path().join("ams-data/ams.db");
    let file = file.to_str().unwrap();
    tool("sqlite3", &["-bail", file, LATER]);
    tool(
        "sqlite3",
        &["-bail", file, "insert into messages (recipient, content) values ('+90', 'a'), ('+90', 'b')"],
    );
    let mut up = ams("up").spawn().unwrap();
    until("both have arrived", Duration::from_secs(30), async || receiver.accepted().len() == 2).await;
    up.kill().unwrap();
    up.wait().unwrap();

    tool("sqlite3", &["-bail", file, NEEDED]);
    let (done, text) = said(&mut ams("up"));
    assert!(
        !done && text.contains("needs a program that knows V") && text.contains("; use a newer program"),
        "{text}"
    );
}
