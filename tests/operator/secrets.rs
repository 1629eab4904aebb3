//! Passwords in settings, as an operator mistypes them: no verb says them, and what can't work stops the start.

use super::{Said, System, ams};

const PASSWORD: &str = "planted0password";

fn run(arguments: &[&str], settings: &[(&str, &str)]) -> Said {
    let folder = tempfile::tempdir().unwrap();
    let mut command = ams(folder.path());
    command.args(arguments).envs(settings.iter().copied());
    Said::of(command.output().unwrap())
}

#[test]
fn no_verb_says_a_password() {
    for (name, value) in [
        ("DATABASE_URL", "postgres://u:PW@127.0.0.1:1/db"),
        ("DATABASE_URL", "postgres://u:pa/PW@127.0.0.1/db"),
        ("DATABASE_URL", "postgres://u:12/PW@127.0.0.1:1/db"),
        ("DATABASE_URL", "postgres://u:pa?PW@127.0.0.1:1/db"),
        ("DATABASE_URL", "postgres://127.0.0.1:1/db?password=PW"),
        ("DATABASE_URL", "postgres://127.0.0.1:1/db?pasword=PW&PW"),
        ("DATABASE_URL", "postgres://127.0.0.1:1/db?PW=1"),
        ("DATABASE_URL", "postgres://127.0.0.1:PW/db"),
        ("DATABASE_URL", "postgre://u:pa/PW@127.0.0.1/db"),
        ("DATABASE_URL", "u:PW@127.0.0.1/db"),
        ("DATABASE_URL", "host=127.0.0.1 password=PW"),
        ("REDIS_URL", "redis://:pa/PW@127.0.0.1:1/0"),
        ("REDIS_URL", "redis://u:12/PW@127.0.0.1:1/0"),
        ("KAFKA_BROKERS", "u:PW@127.0.0.1:1"),
        ("REQUEST_URL", "http://u:PW@127.0.0.1:1/"),
        ("AMS_URL", "http://u:PW@127.0.0.1:1/"),
        ("AMS_URL", "http://127.0.0.1:1/?token=PW"),
        ("AMS_URL", "u:PW@127.0.0.1:1"),
    ] {
        let value = value.replace("PW", PASSWORD);
        for verb in
            [&["config"][..], &["config", "--json"], &["doctor"], &["migrate", "--check"], &["status"]]
        {
            let said = run(verb, &[(name, &value), ("LOG_LEVEL", "trace")]);
            let all = said.out.clone() + &said.err;
            assert!(!all.contains(PASSWORD), "{verb:?} {name}={value}:\n{all}");
            assert!(!all.trim().is_empty(), "{verb:?} {name}={value} says nothing");
        }
    }
}

#[test]
fn what_can_not_work_stops_the_start_with_one_sentence() {
    for (name, value, mend) in [
        ("REQUEST_URL", "http://user:planted@host/", "write it without"),
        ("REQUEST_URL", "http://planted@host/", "write it without"),
        ("AMS_URL", "http://user:planted@host/", "write it without"),
        ("LOG_LEVEL", "warning", "error, warn, info, debug or trace"),
        ("LOG_LEVEL", "info,ams::consumer=dbug", "error, warn, info, debug or trace"),
        ("KAFKA_SECURITY_PROTOCOL", "smoke", "sasl_ssl"),
        ("DB_SSLMODE", "requre", "verify-full"),
    ] {
        let flag = format!("--{}", name.to_ascii_lowercase().replace('_', "-"));
        for said in [run(&["up"], &[(name, value)]), run(&["up", &flag, value], &[])] {
            assert_eq!((said.code, said.out.as_str()), (1, ""), "{name}={value}: {}", said.err);
            assert!(
                said.err.starts_with(&format!("ams: {name} is `")) && said.err.contains(mend),
                "{}",
                said.err
            );
            assert!(said.err.lines().count() == 1 && !said.err.contains("planted"), "{}", said.err);
        }
    }
}

#[test]
fn a_password_in_the_table_of_endpoints_stays_there() {
    let system = System::start();
    let file = system.folder.path().join("ams-data/ams.db");
    let store = rusqlite::Connection::open(file).unwrap();
    store.busy_timeout(super::PATIENCE).unwrap();
    // As an older version, which checked nothing, or a hand with more rights would have it.
    store.execute_batch("pragma ignore_check_constraints = on; drop trigger endpoints_inserted").unwrap();
    let insert = "insert into endpoints (name, url) values ('old', 'http://user:planted@127.0.0.1:9/hook')";
    store.execute(insert, []).unwrap();
    drop(store);
    let sent = system
        .until("the endpoint is known", &["send", "+90", "a", "--endpoint", "old"], |said| said.code == 0);
    assert!(!sent.out.contains("planted"));
    system.until("it is held", &["messages", "show", "1", "--json"], |said| {
        said.json()["why"].as_str().is_some_and(|why| why.starts_with("held: the URL carries a user name"))
    });
    let mut said = String::new();
    for verb in [
        &["messages", "show", "1"][..],
        &["messages", "show", "1", "--json"],
        &["messages", "list", "--json"],
        &["endpoints", "list"],
        &["endpoints", "list", "--json"],
        &["endpoints", "disable", "old"],
        &["endpoints", "enable", "old", "--json"],
        &["doctor"],
    ] {
        let one = system.say(verb);
        said += &format!("{verb:?}\n{}{}", one.out, one.err);
    }
    assert!(!said.contains("planted"), "{said}");
    assert!(
        said.contains("http://(hidden)@127.0.0.1:9/hook") && said.contains("user name or password"),
        "{said}"
    );
}
