//! A bad endpoint hurts only itself.

use std::time::Duration;

use crate::harness::*;
use ams::testclient::TestClientOptions;

async fn endpoint(stack: &Stack, name: &str, url: &str, timeout_ms: i32, in_flight_max: i32, enabled: bool) {
    let statement =
        "insert into endpoints (name, url, timeout_ms, in_flight_max, enabled) values ($1, $2, $3, $4, $5)";
    let sql = stack.sql().await;
    sql.execute(statement, &[&name, &url, &timeout_ms, &in_flight_max, &enabled]).await.unwrap();
}

async fn insert(stack: &Stack, endpoints: &[&str], count: i64) {
    let statement = "insert into messages (endpoint, recipient, content) \
                     select ($2::text[])[1 + i % array_length($2::text[], 1)], '+' || i, 'Hello' \
                     from generate_series(1, $1::bigint) i";
    stack.sql().await.execute(statement, &[&count, &endpoints]).await.unwrap();
}

/// Messages a second at a receiver, from its first to its last arrival.
fn rate(receiver: &Receiver) -> f64 {
    let seen = receiver.seen();
    let (first, last) = (seen.first().unwrap().1, seen.last().unwrap().1);
    seen.len() as f64 / last.since(first).as_secs_f64()
}

#[tokio::test]
async fn a_hanging_endpoint_leaves_the_healthy_one_its_throughput() {
    let half: i64 = setting("AMS_TEST_HANG_MESSAGES").map_or(2_000, |text| text.parse().unwrap());
    let healthy_count = 10_000;
    let hanging = Receiver::start(TestClientOptions { hang: 1.0, ..TestClientOptions::default() }).await;

    let alone = Receiver::start(TestClientOptions::default()).await;
    let stack = Stack::new("alone", &alone).await;
    let services =
        [stack.start("producer", &[]), stack.start("consumer", &[]), stack.start("retry-consumer", &[])];
    stack.insert(1).await;
    until("it runs", Duration::from_secs(20), async || alone.arrivals() == 1).await;
    stack.insert(healthy_count).await;
    stack.all_final(healthy_count + 1, Duration::from_secs(60)).await;
    let rate_alone = rate_after_first(&alone);
    drop((services, stack));

    let healthy = Receiver::start(TestClientOptions::default()).await;
    let stack = Stack::new("hang", &healthy).await;
    endpoint(&stack, "hanging", &hanging.url, 5_000, 1_024, true).await;
    let retry = [("RETRY_INTERVAL", "500ms"), ("RETRY_COUNT", "1")];
    let _services =
        [stack.start("producer", &[]), stack.start("consumer", &[]), stack.start("retry-consumer", &retry)];
    stack.insert(1).await;
    until("it runs", Duration::from_secs(20), async || healthy.arrivals() == 1).await;
    insert(&stack, &["hanging", "default"], 2 * half).await;
    insert(&stack, &["default"], healthy_count - half).await;
    let wanted = usize::try_from(healthy_count).unwrap() + 1;
    until("the healthy ones have arrived", Duration::from_secs(60), async || healthy.arrivals() >= wanted)
        .await;
    let rate_beside = rate_after_first(&healthy);
    println!(
        "healthy alone {rate_alone:.0}/s, beside a hanging endpoint {rate_beside:.0}/s: {:.2}",
        rate_beside / rate_alone
    );
    // With no bound on what hangs it was less than a hundredth.
    let least = if release() { 0.8 } else { 0.4 };
    assert!(rate_beside >= least * rate_alone, "{rate_beside:.0}/s of {rate_alone:.0}/s");

    // What has not used its tries up is held once the endpoint has failed for long, and goes once somebody mends it.
    let open = "select count(*) from breakers";
    let sql = stack.sql().await;
    until("its breaker opens", Duration::from_secs(60), async || {
        sql.query_one(open, &[]).await.unwrap().get::<_, i64>(0) == 1
    })
    .await;
    sql.execute("update endpoints set url = $1 where name = 'hanging'", &[&healthy.url]).await.unwrap();
    stack.all_final(healthy_count + half + 1, Duration::from_secs(300)).await;
    let wrong = "select count(*) from message_status where endpoint = 'hanging' \
                 and not (status = 'dead' and attempts = 2 or status = 'sent' and attempts between 1 and 2)";
    let wrong: i64 = sql.query_one(wrong, &[]).await.unwrap().get(0);
    assert_eq!(wrong, 0, "messages with other than their exact tries");
    let hung = "select sum(attempts) filter (where status = 'dead') + sum(attempts - 1) filter (where status = 'sent') \
                from message_status where endpoint = 'hanging'";
    let hung: i64 = sql.query_one(hung, &[]).await.unwrap().get(0);
    assert_eq!(hung, hanging.arrivals() as i64, "each try that hung is counted, and no other");
}

/// As [`rate`], without the one message that showed that everything runs.
fn rate_after_first(receiver: &Receiver) -> f64 {
    let seen = receiver.seen();
    let (first, last) = (seen[1].1, seen.last().unwrap().1);
    (seen.len() - 1) as f64 / last.since(first).as_secs_f64()
}

#[tokio::test]
async fn a_disabled_endpoint_slows_nobody_and_costs_no_write_while_it_waits() {
    const HELD: i64 = 200_000;
    let (open, closed) = (
        Receiver::start(TestClientOptions::default()).await,
        Receiver::start(TestClientOptions::default()).await,
    );
    let stack = Stack::new("disabled", &open).await;
    endpoint(&stack, "closed", &closed.url, 5_000, 64, false).await;
    let _services = [stack.start("producer", &[]), stack.start("consumer", &[])];
    insert(&stack, &["closed"], HELD).await;
    let sql = stack.sql().await;
    let held = "select count(*) from waiting where held is not null";
    until("all are held", Duration::from_secs(60), async || {
        sql.query_one(held, &[]).await.unwrap().get::<_, i64>(0) == HELD
    })
    .await;

    let written = "select sum(n_tup_ins + n_tup_upd + n_tup_del) from pg_stat_user_tables \
                   where relname in ('waiting', 'batches', 'leases') or relname like 'deliveries%'";
    let count =
        async || sql.query_one(&format!("select ({written})::bigint"), &[]).await.unwrap().get::<_, i64>(0);
    // A connection that rests tells what it has written after ten seconds: PGSTAT_IDLE_INTERVAL of PostgreSQL 15.
    const TOLD: Duration = Duration::from_secs(12);
    until("each was written once", TOLD, async || count().await >= HELD).await;
    let_run(Duration::from_secs(2) + TOLD).await;
    assert_eq!(count().await, HELD, "one write a message, and none while it waits");

    stack.insert(10_000).await;
    until("the others arrive", Duration::from_secs(20), async || open.arrivals() == 10_000).await;
    println!("{:.0}/s beside {HELD} held rows", rate(&open));
    assert_eq!(closed.arrivals(), 0);
    sql.execute("update endpoints set enabled = true where name = 'closed'", &[]).await.unwrap();
    until("the held ones flow once it is open", Duration::from_secs(20), async || closed.arrivals() > 5_000)
        .await;
}
