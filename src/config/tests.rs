//! Settings from flags, environment and file: which one wins, and what is said of a wrong one.

mod hiding;

use std::ffi::OsString;

use super::*;

fn raw(values: &[(&str, &str)]) -> Raw {
    let environment = |name: &str| values.iter().find(|v| v.0 == name).map(|v| OsString::from(v.1));
    Raw::combine(&BTreeMap::new(), environment, None).unwrap()
}

fn config(role: Role, values: &[(&str, &str)]) -> Config {
    Config::new(&raw(values), role).unwrap()
}

fn refusal(role: Role, values: &[(&str, &str)]) -> String {
    Config::new(&raw(values), role).unwrap_err().to_string()
}

#[test]
fn with_nothing_set_everything_is_embedded() {
    let config = config(Role::Up, &[]);
    assert_eq!(config.store, StoreConfig::Sqlite("ams-data/ams.db".into()));
    assert_eq!((config.queue, config.cache), (QueueConfig::Embedded, CacheConfig::Memory));
    assert_eq!((config.listen.host.as_str(), config.listen.port, config.pacing), ("127.0.0.1", 8080, None));
    assert_eq!((config.lane.tries, config.retry_lane.tries), (1, 3));
    assert_eq!(
        (config.lane.next.as_str(), config.retry_lane.topic.as_str()),
        ("messages-retry", "messages-retry")
    );
    assert_eq!(config.retry_lane.next, "messages-dlq");
}

#[test]
fn the_original_compose_files_settings_are_understood() {
    let retry = config(
        Role::RetryConsumer,
        &[
            ("KAFKA_TOPIC", "messages-retry"),
            ("KAFKA_TOPIC_RETRY", "messages-dlq"),
            ("RETRY_INTERVAL", "3"),
            ("RETRY_COUNT", "3"),
            ("DB_HOST", "postgres"),
            ("DB_PASSWORD", "p@ss/word"),
            ("DB_SSLMODE", "disable"),
            ("REDIS_HOST", "redis"),
            ("KAFKA_BROKERS", "kafka:9092"),
        ],
    );
    assert_eq!(retry.lane.interval, Duration::from_secs(3));
    assert_eq!((retry.lane.tries, retry.lane.fresh), (3, false));
    assert_eq!(retry.lane.group, "message-consumer-messages-retry");
    let url = "postgres://postgres:p%40ss%2Fword@postgres:5432/automatic_message_system?sslmode=disable";
    assert_eq!(retry.store, StoreConfig::Postgres(url.into()));
    assert_eq!(retry.cache, CacheConfig::Redis("redis://redis:6379/0".into()));
}

#[test]
fn the_two_lanes_of_one_process_and_of_two_are_the_same() {
    let up = config(Role::Up, &[]);
    assert_eq!(up.retry_lane, config(Role::RetryConsumer, &[]).lane);
    assert_eq!(up.lane, config(Role::Consumer, &[]).lane);
}

#[test]
fn flags_win_over_environment_over_file_over_defaults() {
    let flags = BTreeMap::from([("HOST", "flag".to_owned())]);
    let environment = |name: &str| matches!(name, "HOST" | "DB_USER").then(|| OsString::from("environment"));
    let file = "host = 'file'\ndb_user = 'file'\nDB_NAME = 'file'\nport = 81";
    let raw = Raw::combine(&flags, environment, Some(file)).unwrap();
    let explained = raw.explain(Role::Api);
    let of = |name| {
        let (_, value, source) = explained.iter().find(|(setting, ..)| setting.name == name).unwrap();
        (value.as_str(), *source)
    };
    assert_eq!(of("HOST"), ("flag", Source::Flag));
    assert_eq!(of("DB_USER"), ("environment", Source::Environment));
    assert_eq!(of("DB_NAME"), ("file", Source::File));
    assert_eq!(of("PORT"), ("81", Source::File));
    assert_eq!(of("LOG_LEVEL"), ("info", Source::Default));
}

#[test]
fn bad_settings_are_named_with_value_and_mend() {
    for (name, value, mend) in [
        ("RETRY_INTERVAL", "soon", "500ms, 3s, 2m, 1h"),
        ("RETRY_INTERVAL", "-3", "3s"),
        ("RETRY_COUNT", "0", "from 1 to 1000"),
        ("PORT", "99999", "0 to 65535"),
        ("REQUEST_URL", "ftp://x", "http://localhost:3000"),
        ("DATABASE_URL", "mysql://x", "postgres://"),
        ("KAFKA_BROKERS", "kafka", "host:port"),
        ("KAFKA_TOPIC", "bad topic", "letters"),
        ("ERROR_RATE", "2", "0 to 1"),
        ("LOG_FORMAT", "xml", "text or json"),
        ("LOG_LEVEL", "info=loud", "error, warn"),
        ("REDIS_URL", "localhost", "redis://"),
        ("REQUEST_CA_FILE", "/nowhere", "file"),
        ("AMS_HOSTS", "ams:8080", "host names"),
        ("AMS_INSECURE", "maybe", "1 nor 0"),
        ("AMS_URL", "here", "http://"),
    ] {
        let refusal = refusal(Role::Up, &[(name, value)]);
        // Of a URL that is refused only the scheme is told.
        let told = value.split("://").next().filter(|_| !matches!(value, "here" | "localhost"));
        assert!(refusal.contains(name) && refusal.contains(mend), "{refusal}");
        assert!(told.is_none_or(|told| refusal.contains(told)), "{refusal}");
    }
    assert!(refusal(Role::Producer, &[("INTERVAL", "1s")]).contains("BATCH_COUNT"));
    assert!(refusal(Role::Consumer, &[("KAFKA_TOPIC", "x-dlq")]).contains("dead-letter"));
    assert!(refusal(Role::Consumer, &[("KAFKA_TOPIC", "messages-retry")]).contains("differ"));
}

/// A bad value for each setting that has one; `None`: every text is one that works.
fn bad_values(name: &str) -> Option<&'static [&'static str]> {
    Some(match name {
        "DATABASE_URL" => &["mysql://x", "sqlite://", "db"],
        "DB_HOST" | "REDIS_HOST" | "HOST" => &["http://x", "a b", "x:80/", "u:p@h", " "],
        "DB_PORT" | "REDIS_PORT" | "PORT" | "METRICS_PORT" => &["x", "-1", "65536", "80 "],
        "DB_USER" | "DB_NAME" | "KAFKA_SASL_USERNAME" | "KAFKA_GROUP_ID" | "AMS_KEY" => &[" "],
        "KAFKA_SSL_CA" | "KAFKA_SSL_CERTIFICATE" | "KAFKA_SSL_KEY" | "LOG_FILE" => &[" "],
        "DB_SSLMODE" => &["requre", "REQUIRE", "verify-ca"],
        "KAFKA_BROKERS" => {
            &["kafka", "kafka:x", "ssl://kafka:9092", "u:p@kafka:9092", "kafka:9092,", ":9092"]
        }
        "KAFKA_SECURITY_PROTOCOL" => &["sasl", "tls", "sasl-ssl"],
        "KAFKA_SASL_MECHANISM" => &["PLAINN", "SCRAM", "SCRAM-SHA256"],
        "REDIS_URL" => &["localhost", "http://x", "redis://u:12/34@h/0"],
        "REDIS_DB" | "BATCH_COUNT" => &["-1", "x"],
        "KAFKA_TOPIC" | "KAFKA_TOPIC_RETRY" => &["a b", "..", "a/b"],
        "RETRY_COUNT" => &["0", "1001", "x"],
        "RETRY_INTERVAL" | "RETRY_MAX_INTERVAL" | "INTERVAL" | "RETENTION" | "SHUTDOWN_TIMEOUT" => {
            &["soon", "-3", "3 apples", "NaN"]
        }
        "REQUEST_URL" | "AMS_URL" => {
            &["here", "ftp://x", "http://u:p@h/", "http://u@h/", "http://h:0/", "http://"]
        }
        "REQUEST_CA_FILE" => &["/nowhere"],
        "AMS_HOSTS" => &["http://x", "ams:8080", "a,,b", "*", "*.example.org", "a b", "x/"],
        "AMS_INSECURE" => &["maybe", "yes", "TRUE"],
        "ERROR_RATE" => &["2", "-0.1", "NaN", "x"],
        "LOG_LEVEL" => &[
            "warning",
            "inof",
            "info,ams::consumer=dbug",
            "=debug",
            "info,",
            ",info",
            "info,,warn",
            "info=loud",
            "ams::consumer",
            "info,ams::consumr=debug",
            "info,asm consumer=debug",
            "info,debug",
            "info,ams=",
            "3",
            " ",
        ],
        "LOG_FORMAT" => &["xml", "JSON"],
        "DB_PASSWORD" | "KAFKA_SASL_PASSWORD" | "NO_COLOR" => return None,
        other => panic!("{other} is new; give it a bad value"),
    })
}

/// Also one that has no effect beside the others: who sets it means something.
#[test]
fn no_typo_in_any_setting_is_taken_in_silence() {
    for setting in SETTINGS {
        for value in bad_values(setting.name).unwrap_or_default() {
            for role in [Role::Up, Role::Tool, Role::TestClient] {
                let refused = Config::new(&raw(&[(setting.name, value)]), role).map(|_| ());
                let refusal = refused.map_err(|error| error.to_string()).err();
                let refusal = refusal.unwrap_or_else(|| panic!("{}={value} is taken", setting.name));
                let begins = format!("{} is `", setting.name);
                assert!(refusal.starts_with(&begins) && refusal.contains(';'), "{value}: {refusal}");
            }
        }
    }
}

#[test]
fn what_a_setting_means_is_understood_however_it_is_written() {
    for (name, value) in [
        ("LOG_LEVEL", "INFO"),
        ("LOG_LEVEL", "off"),
        ("LOG_LEVEL", "warn, ams::consumer=DEBUG ,hyper=off,kafka=trace,ams=info"),
        ("LOG_LEVEL", "ams::consumer::dispatcher=trace"),
        ("AMS_HOSTS", "ams.example.org., api ,10.0.0.5,[fd00::1]"),
        ("KAFKA_BROKERS", "kafka:9092, [::1]:9093"),
        ("DB_HOST", "db-1.example_org"),
        ("REDIS_HOST", "::1"),
        ("HOST", "::"),
        ("REQUEST_URL", "http://h/@user?a=b@c"),
    ] {
        config(Role::Up, &[(name, value)]);
    }
    let hosts = config(Role::Up, &[("AMS_HOSTS", "Ams.Example.org., api ,[fd00::1]")]).listen.names;
    assert_eq!(hosts, ["ams.example.org", "api", "fd00::1"]);
    let kafka = [
        ("KAFKA_BROKERS", "kafka:1"),
        ("KAFKA_SECURITY_PROTOCOL", "SASL_SSL"),
        ("KAFKA_SASL_MECHANISM", "plain"),
    ];
    let QueueConfig::Kafka { client, .. } = config(Role::Up, &kafka).queue else { panic!() };
    assert_eq!(
        (client["security.protocol"].as_str(), client["sasl.mechanisms"].as_str()),
        ("sasl_ssl", "PLAIN")
    );
    let cache = config(Role::Up, &[("REDIS_HOST", "::1")]).cache;
    assert_eq!(cache, CacheConfig::Redis("redis://[::1]:6379/0".into()));
}

#[test]
fn the_log_may_be_filtered_by_every_room() {
    let modules = include_str!("../lib.rs").lines().filter_map(|line| line.strip_prefix("pub mod "));
    for module in modules.map(|module| module.trim_end_matches(';')) {
        config(Role::Up, &[("LOG_LEVEL", &format!("info,ams::{module}=debug"))]);
    }
}

#[test]
fn an_unknown_setting_in_the_file_is_refused() {
    let refused = |file| Raw::combine(&BTreeMap::new(), |_| None, Some(file)).unwrap_err().to_string();
    assert!(refused("kafka_brokrs = 'x:1'").contains("kafka_brokrs"));
    assert!(refused("port = [1]").contains("port"));
    assert!(refused("port = ").contains("not TOML"));
}

#[test]
fn secrets_are_never_shown() {
    let raw =
        raw(&[("DB_PASSWORD", "tiger"), ("DATABASE_URL", "postgres://scott:tiger@db/x"), ("PORT", "tiger")]);
    for (setting, shown, _) in raw.explain(Role::Api).iter().filter(|(setting, ..)| setting.name != "PORT") {
        assert!(!shown.contains("tiger"), "{} shows {shown}", setting.name);
    }
}

#[test]
fn durations_are_understood() {
    for (text, ms) in
        [("500ms", 500), ("3s", 3_000), ("2m", 120_000), ("1h", 3_600_000), ("3", 3_000), ("0.5", 500)]
    {
        assert_eq!(duration(text), Ok(Duration::from_millis(ms)), "{text}");
    }
}
