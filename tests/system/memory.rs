//! Memory is bounded in bytes, not in messages.

use std::time::Duration;

use ams::testclient::TestClientOptions;

use crate::harness::*;

/// What a process may use at most, in MB.
const MOST: f64 = 500.0;
const MESSAGES: i64 = 3_000;

/// Messages of 1 MiB, the largest that there may be, beside a receiver that takes its time.
#[tokio::test]
async fn messages_of_a_mebibyte_beside_a_slow_receiver_fill_no_memory() {
    let options = TestClientOptions { latency: Duration::from_secs(2), ..TestClientOptions::default() };
    let receiver = Receiver::start(options).await;
    let stack = Stack::new("mebibytes", &receiver).await;
    let insert = "insert into messages (recipient, content) \
                  select '+90', repeat(i::text || ' ', 1048576 / (length(i::text) + 1)) from generate_series(1, $1::bigint) i";
    stack.sql().await.execute(insert, &[&MESSAGES]).await.unwrap();
    let services = ["producer", "consumer", "retry-consumer"].map(|verb| stack.start(verb, &[]));
    until("some have arrived", Duration::from_secs(60), async || receiver.accepted().len() >= 400).await;
    for service in &services {
        let peak = service.memory_mb("VmHWM");
        println!("{} beside {MESSAGES} messages of 1 MiB: {peak:.0} MB", service.verb);
        assert!(peak < MOST, "{}: {peak} MB", service.verb);
    }
    assert_eq!(receiver.duplicates(), 0);
}
