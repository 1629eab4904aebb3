//! What the doctor makes of settings, stores, clocks, endpoints, keys and work, by tables.

use super::*;
use crate::config::Role;
use crate::message::Status;
use crate::service::LEASE;
use crate::store::{Count, Instance, InstanceId};

fn raw(pairs: &[(&str, &str)]) -> Raw {
    let given = |name: &str| pairs.iter().find(|(n, _)| *n == name).map(|(_, value)| (*value).into());
    Raw::combine(&[].into(), given, None).unwrap()
}

fn config(pairs: &[(&str, &str)]) -> Config {
    Config::new(&raw(pairs), Role::Tool).unwrap()
}

/// Every finding is of this state, and one of them says each of these words.
fn assert_found(findings: &[Finding], state: State, words: &[&str]) {
    assert!(findings.iter().all(|finding| finding.state == state), "{state:?}: {findings:?}");
    for word in words {
        assert!(findings.iter().any(|finding| finding.says.contains(word)), "{word}: {findings:?}");
    }
    assert!(!findings.is_empty());
}

#[test]
fn settings_that_do_nothing_are_told() {
    for (pairs, state, words) in [
        (&[][..], State::Ok, &["by default"][..]),
        (&[("DB_HOST", "db"), ("PORT", "1")], State::Ok, &["DB_HOST (environment), PORT (environment)"]),
        (&[("DB_HOST", "db"), ("DATABASE_URL", "sqlite://x")], State::Warning, &["DB_HOST has no effect"]),
        (&[("DB_NAME", "x"), ("DB_USER", "y")], State::Warning, &["DB_USER, DB_NAME have no effect without"]),
        (&[("REDIS_URL", "redis://x"), ("REDIS_HOST", "y")], State::Warning, &["REDIS_HOST has no effect"]),
        (&[("REDIS_PORT", "1")], State::Warning, &["without REDIS_HOST"]),
        (&[("KAFKA_SASL_USERNAME", "x")], State::Warning, &["without KAFKA_BROKERS"]),
        (&[("AMS_INSECURE", "1"), ("HOST", "0.0.0.0")], State::Warning, &["0.0.0.0", "ams keys create"]),
        (&[("AMS_INSECURE", "1"), ("HOST", "::1")], State::Ok, &["AMS_INSECURE"]),
    ] {
        assert_found(&settings(&raw(pairs), &config(pairs)), state, words);
    }
}

#[test]
fn a_database_that_can_lose_messages_is_a_fault() {
    let sound = [
        ("fsync", "on"),
        ("full_page_writes", "on"),
        ("synchronous_commit", "on"),
        ("transaction_read_only", "off"),
        ("max_connections", "100"),
        ("superuser_reserved_connections", "3"),
    ];
    let with = |name: &str, value: &str, connections: u64| {
        let pairs = sound.iter().filter(|(n, _)| *n != name).copied().chain([(name, value)]);
        let settings = pairs.map(|(n, v)| (n.to_owned(), v.to_owned())).collect();
        About { version: "15.4".to_owned(), settings, connections, ..About::default() }
    };
    for (name, value, connections, state, words) in [
        ("fsync", "on", 20, State::Ok, "db:5432/ams: PostgreSQL 15.4, migrated"),
        ("fsync", "off", 20, State::Fault, "postgresql.conf"),
        ("full_page_writes", "off", 20, State::Fault, "full_page_writes"),
        ("synchronous_commit", "off", 20, State::Fault, "set it to on"),
        ("synchronous_commit", "local", 20, State::Ok, "migrated"),
        ("transaction_read_only", "on", 20, State::Fault, "primary"),
        ("max_connections", "30", 20, State::Warning, "only 7 of its 30"),
        ("max_connections", "30", 200, State::Warning, "only 0 of its 30"),
        ("journal_mode", "delete", 0, State::Warning, "local disk"),
        ("journal_mode", "wal", 0, State::Ok, "SQLite"),
    ] {
        assert_found(&store("db:5432/ams", &[], &with(name, value, connections)), state, &[words]);
    }
    let missing = ["V1__a".to_owned(), "V2__b".to_owned()];
    assert_found(
        &store("x", &missing, &with("fsync", "on", 1)),
        State::Fault,
        &["V1__a, V2__b", "ams migrate"],
    );
}

#[test]
fn clocks_may_differ_by_less_than_receivers_of_signatures_allow() {
    let ms = Duration::from_millis;
    for (ahead_us, unsure, state, says) in [
        (400, ms(1), State::Ok, "0.4 ms ahead of"),
        (-499_000, ms(0), State::Ok, "499 ms behind"),
        (-1_300_000, ms(1), State::Warning, "1.3 s behind this machine's"),
        // A slow answer proves nothing.
        (5_200_000, ms(5_100), State::Ok, "5.2 s ahead"),
        (5_200_000, ms(10), State::Warning, "NTP"),
        (151_000_000, ms(10), State::Fault, "refuse signed messages"),
        (-86_400_000_000, ms(10), State::Fault, "1 d behind"),
    ] {
        assert_found(&[clock(ahead_us, unsure)], state, &[says]);
    }
}

#[test]
fn files_lanes_and_the_api_are_judged() {
    for (most, state, says) in [
        (u64::MAX, State::Ok, "65,536"),
        (65_536, State::Ok, "65,536"),
        (65_535, State::Warning, "LimitNOFILE"),
        (1_023, State::Fault, "not enough"),
    ] {
        assert_found(&[files(most)], state, &[says]);
    }
    let depth = |position, end| Depth { partition: 0, position, end };
    for (depths, state, says) in [
        (Ok(&[depth(3, 5), depth(0, 1)][..]), State::Ok, "2 partitions, 3 records not taken up"),
        (Ok(&[depth(5, 5)]), State::Ok, "1 partition, 0 records"),
        (Ok(&[]), State::Warning, "messages is not there yet"),
        (Err("no answer within 6s"), State::Fault, "no answer"),
    ] {
        assert_found(&[lane("messages", depths)], state, &[says]);
    }
    let ours = env!("CARGO_PKG_VERSION");
    for (chosen, answer, state, says) in [
        (false, Ok(ours), State::Ok, "http://x answers"),
        (true, Ok("0.0.1"), State::Warning, "0.0.1"),
        (false, Err(("", "no API answers")), State::Warning, "no API answers"),
        (true, Err(("", "no API answers")), State::Fault, "no API answers"),
        (false, Err(("key_missing", "set AMS_KEY")), State::Fault, "AMS_KEY"),
        (true, Err(("scope_missing", "")), State::Ok, "may not read"),
    ] {
        assert_found(&[api("http://x", chosen, answer)], state, &[says]);
    }
}

#[test]
fn an_endpoint_is_told_without_what_may_be_secret() {
    let one = Endpoint::new("sms", "https://sms.example:444/hook/s3cret?token=s3cret");
    let refused = || Some(Err("connection refused".to_owned()));
    for (held, reached, state, says) in [
        (false, Some(Ok(())), State::Ok, "sms: https://sms.example:444 answers"),
        (true, refused(), State::Fault, "connection refused"),
        (false, None, State::Ok, "sms is disabled"),
        (true, None, State::Warning, "messages wait for it"),
    ] {
        let finding = endpoint(&one, held, reached);
        assert!(!finding.says.contains("s3cret"), "{finding:?}");
        assert_found(&[finding], state, &[says]);
    }
}

#[test]
fn keys_are_missed_where_they_are_asked_for() {
    let day = Duration::from_secs(86_400);
    let now = Timestamp::from_micros(1_000);
    let key = |expires_in: Option<Duration>, used: bool, revoked: bool| ApiKey {
        expires_at: expires_in.map(|wait| now.after(wait)),
        last_used_at: used.then_some(now),
        revoked_at: revoked.then_some(now),
        ..crate::keys::make("x", &[], now, None).unwrap().0
    };
    for (host, has, state, says) in [
        ("127.0.0.1", vec![], State::Ok, "0 valid, not asked for"),
        ("0.0.0.0", vec![], State::Warning, "ams keys create NAME"),
        (
            "0.0.0.0",
            vec![key(None, true, true), key(Some(Duration::ZERO), true, false)],
            State::Warning,
            "none is",
        ),
        (
            "0.0.0.0",
            vec![key(Some(day * 8), true, false), key(Some(day), false, false)],
            State::Ok,
            "2 valid",
        ),
        ("127.0.0.1", vec![key(Some(day * 3), true, false)], State::Warning, "expires in 3 d"),
    ] {
        assert_found(&keys(&config(&[("HOST", host)]), &has, now), state, &[says]);
    }
    let open = config(&[("HOST", "0.0.0.0"), ("AMS_INSECURE", "1")]);
    assert_found(&keys(&open, &[], now), State::Ok, &["not asked for"]);
}

#[test]
fn what_waits_needs_somebody_to_work() {
    let now = Timestamp::from_micros(1_000_000_000);
    let alive = |service: &str, lives: bool| Instance {
        id: InstanceId(1),
        service: service.to_owned(),
        host: "here".to_owned(),
        version: "1".to_owned(),
        started_at: now,
        seen_at: now,
        lease_until: if lives { now.after(LEASE) } else { now },
    };
    let found = |services: &[&str], waiting: u64, due_s: u64, control: Control| {
        let mut instances: Vec<_> = services.iter().map(|service| alive(service, true)).collect();
        instances
            .extend(["up", "producer", "consumer", "retry-consumer"].map(|service| alive(service, false)));
        let count = |status, count| Count { status, count, more: count >= 10_000 };
        let counts = vec![count(Status::Sent, 7), count(Status::Retrying, waiting)];
        let due = Timestamp::from_micros(now.as_micros() - 1_000_000 * i64::try_from(due_s).unwrap());
        let overview = Overview { counts, instances, oldest_due_at: (waiting > 0).then_some(due) };
        let lanes = [("messages".to_owned(), true), ("messages-retry".to_owned(), false)];
        work(&overview, &control, &lanes, now)
    };
    let leads = Control { active: true, ..Control::default() };
    let paused = Control { paused: true, ..leads };
    let all = ["producer", "consumer", "retry-consumer"];
    for (services, waiting, due_s, control, state, words) in [
        (&[][..], 0, 0, leads, State::Warning, &["nothing runs"][..]),
        (
            &[],
            3,
            0,
            leads,
            State::Fault,
            &["3 messages wait and no producer", "lane messages;", "messages-retry"],
        ),
        (&["up"], 3, 0, leads, State::Ok, &["not final: 3 messages"]),
        (&all, 10_000, 59, leads, State::Ok, &["10,000 messages or more"]),
        (&all, 3, 300, leads, State::Warning, &["has waited 5 min"]),
        (&all, 1, 300, paused, State::Warning, &["paused and 1 message wait"]),
        (&all, 3, 0, Control::default(), State::Fault, &["no producer leads"]),
        (&all[..2], 3, 0, leads, State::Fault, &["lane messages-retry; start `ams retry-consumer`"]),
        (&all[..2], 0, 0, leads, State::Warning, &["messages-retry"]),
        (&all[1..], 3, 0, leads, State::Fault, &["no producer runs"]),
    ] {
        assert_found(&found(services, waiting, due_s, control), state, words);
    }
    let overview = Overview { instances: vec![alive("producer", true)], ..Overview::default() };
    assert_found(&work(&overview, &leads, &[], now), State::Warning, &["no consumer has run yet"]);
}
