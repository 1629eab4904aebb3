//! The rate of an endpoint holds over all consumers, whatever dies.

use std::time::Duration;

use crate::harness::*;
use ams::testclient::TestClientOptions;

#[tokio::test]
async fn a_rate_is_exact_over_three_consumers_that_are_killed() {
    let receiver = Receiver::start(TestClientOptions::default()).await;
    let stack = Stack::new("rates", &receiver).await;
    let mut producer = stack.start("producer", &[]);
    let mut consumers = [(); 3].map(|()| stack.start("consumer", &[]));
    stack.insert(1).await;
    until("it runs", Duration::from_secs(20), async || receiver.arrivals() == 1).await;
    stack
        .sql()
        .await
        .batch_execute("update endpoints set rate_count = 100, rate_interval_ms = 1000")
        .await
        .unwrap();
    // What every process knows of endpoints it has read within a second.
    let_run(Duration::from_secs(2)).await;
    stack.insert(3_000).await;
    until("some came", Duration::from_secs(20), async || receiver.arrivals() > 500).await;
    for consumer in consumers.iter_mut().take(2) {
        std::mem::replace(consumer, stack.start("consumer", &[])).kill();
        let came = receiver.arrivals();
        until("more came", Duration::from_secs(30), async || receiver.arrivals() > came + 500).await;
        std::mem::replace(&mut producer, stack.start("producer", &[])).kill();
        let came = receiver.arrivals();
        until("more came", Duration::from_secs(30), async || receiver.arrivals() > came + 400).await;
    }
    let held = "select count(*) from message_status where why like 'held: endpoint default has a rate; its attempts are made in their turn; the next begins at 2%'";
    let held: i64 = stack.sql().await.query_one(held, &[]).await.unwrap().get(0);
    assert!(held > 100, "{held} wait for their turn");
    stack.all_final(3_001, Duration::from_secs(120)).await;

    let mut came: Vec<_> = receiver.seen().into_iter().skip(1).map(|(_, at)| at).collect();
    came.sort();
    let most = (0..came.len()).map(|first| {
        came[first..].iter().take_while(|at| at.since(came[first]) < Duration::from_secs(1)).count()
    });
    let most = most.max().unwrap();
    // While all live and none joins: in the best stretch of four seconds, because a rebalance costs reserved times.
    let stretch = came.windows(400).map(|calm| calm[399].since(calm[0])).min().unwrap();
    let rate = 399.0 / stretch.as_secs_f64();
    let whole = (came.len() - 1) as f64 / came[came.len() - 1].since(came[0]).as_secs_f64();
    println!(
        "{rate:.1}/s while all live, {whole:.1}/s with all deaths, and at most {most} in any second, of {} attempts",
        came.len()
    );
    assert!((95.0..=105.0).contains(&rate), "{rate:.1}/s");
    assert!(most <= 105, "{most} in a second");
}
