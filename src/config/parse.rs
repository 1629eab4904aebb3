//! How the text of a setting is understood; else what is wrong with it and how to mend it, as the end of a
//! sentence that begins with the setting and its value.

use std::net::{IpAddr, Ipv6Addr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use super::StoreConfig;
use crate::delivery;

/// The levels of the log; `off` writes nothing.
const LEVELS: [&str; 6] = ["error", "warn", "info", "debug", "trace", "off"];
/// The modules of this program, which a filter of the log may name: a misspelt one would be silent.
const MODULES: [&str; 29] = [
    "api",
    "app",
    "bench",
    "breaker",
    "cache",
    "cli",
    "clock",
    "config",
    "consumer",
    "dead_letter",
    "delivery",
    "header_rules",
    "intake",
    "janitor",
    "keys",
    "lane",
    "message",
    "producer",
    "publish",
    "queue",
    "rate",
    "redact",
    "retry",
    "service",
    "shortage",
    "store",
    "telemetry",
    "testclient",
    "ticket",
];

pub(super) type Parsed<T> = Result<T, String>;

/// Whether the setting of this name can have this value, also where that has no effect: a typo is told at once,
/// not when the setting is needed one day.
pub(super) fn check(name: &str, value: &str) -> Parsed<()> {
    match name {
        "DATABASE_URL" => store(value).map(drop),
        "DB_HOST" | "REDIS_HOST" | "HOST" => host(value).map(drop),
        "DB_PORT" | "REDIS_PORT" | "PORT" | "METRICS_PORT" => port(value).map(drop),
        "DB_SSLMODE" => sslmode(value).map(drop),
        "KAFKA_BROKERS" => brokers(value).map(drop),
        "KAFKA_SECURITY_PROTOCOL" => security_protocol(value).map(drop),
        "KAFKA_SASL_MECHANISM" => sasl_mechanism(value).map(drop),
        "REDIS_URL" => redis_url(value).map(drop),
        "REDIS_DB" | "BATCH_COUNT" => count(value).map(drop),
        "KAFKA_TOPIC" | "KAFKA_TOPIC_RETRY" => topic(value).map(drop),
        "RETRY_COUNT" => tries(value).map(drop),
        "RETRY_INTERVAL" | "RETRY_MAX_INTERVAL" | "INTERVAL" | "RETENTION" | "SHUTDOWN_TIMEOUT" => {
            duration(value).map(drop)
        }
        "REQUEST_URL" | "AMS_URL" => url(value).map(drop),
        "REQUEST_CA_FILE" => file(value).map(drop),
        "AMS_HOSTS" => names(value).map(drop),
        "AMS_INSECURE" => switch(value).map(drop),
        "ERROR_RATE" => share(value).map(drop),
        "LOG_LEVEL" => log_level(value).map(drop),
        "LOG_FORMAT" => log_format(value).map(drop),
        // A password may be any text, and NO_COLOR has no value.
        "DB_PASSWORD" | "KAFKA_SASL_PASSWORD" | "NO_COLOR" => Ok(()),
        _ => text(value).map(drop),
    }
}

pub(super) fn text(text: &str) -> Parsed<String> {
    if text.trim().is_empty() { Err("is empty; write a name".into()) } else { Ok(text.to_owned()) }
}

/// Whether a text can be a host's name: also of one that only this network knows.
fn is_name(text: &str) -> bool {
    let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
    !text.is_empty() && text.chars().all(legal)
}

/// A host's name or address; an IPv6 address without brackets.
pub(super) fn host(text: &str) -> Parsed<String> {
    let bare = text.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(text);
    if is_name(text) || bare.parse::<Ipv6Addr>().is_ok() {
        return Ok(bare.to_owned());
    }
    Err("is no host; write a name or an address, without scheme, user, port and path".into())
}

/// Names or addresses by which this API is called, separated by commas, in lower case.
pub(super) fn names(text: &str) -> Parsed<Vec<String>> {
    let name = |name: &str| {
        let name = host(name.trim().trim_end_matches('.'))?.to_ascii_lowercase();
        // As the guard compares addresses: in one way of writing.
        Ok(name.parse::<IpAddr>().map_or(name, |address| address.to_canonical().to_string()))
    };
    let names: Parsed<Vec<String>> = text.split(',').map(name).collect();
    names.map_err(|_| {
        "is no list of host names; write for example ams.example.org,ams, without schemes, ports and wildcards"
            .into()
    })
}

/// `1` or `0`.
pub(super) fn switch(text: &str) -> Parsed<bool> {
    match text {
        "1" | "true" => Ok(true),
        "0" | "false" => Ok(false),
        _ => Err("is neither 1 nor 0; write one of them".into()),
    }
}

/// `500ms`, `3s`, `2m`, `1h`, or a bare number as seconds.
pub fn duration(text: &str) -> Parsed<Duration> {
    if let Ok(seconds) = text.parse::<f64>() {
        return Duration::try_from_secs_f64(seconds)
            .map_err(|_| "is no duration; write for example 3s".into());
    }
    humantime::parse_duration(text)
        .map_err(|_| "is no duration; write for example 500ms, 3s, 2m, 1h, or a number of seconds".into())
}

pub(super) fn port(text: &str) -> Parsed<u16> {
    text.parse().map_err(|_| "is no port; write a number from 0 to 65535".into())
}

pub(super) fn count(text: &str) -> Parsed<u32> {
    text.parse().map_err(|_| "is no whole number of zero or more; write one".into())
}

pub(super) fn tries(text: &str) -> Parsed<i32> {
    match text.parse() {
        Ok(tries @ 1..=1000) => Ok(tries),
        _ => Err("is no number of tries; write one from 1 to 1000".into()),
    }
}

pub(super) fn share(text: &str) -> Parsed<f64> {
    match text.parse() {
        Ok(share) if (0.0..=1.0).contains(&share) => Ok(share),
        _ => Err("is no share; write a number from 0 to 1, such as 0.3".into()),
    }
}

pub(super) fn topic(text: &str) -> Parsed<String> {
    let legal = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '_' | '-');
    if text.is_empty() || text.len() > 249 || !text.chars().all(legal) || matches!(text, "." | "..") {
        return Err("is no topic name; write up to 249 letters, digits, dots, dashes and underscores".into());
    }
    Ok(text.to_owned())
}

pub(super) fn brokers(text: &str) -> Parsed<String> {
    let good = |broker: &str| {
        broker.trim().rsplit_once(':').is_some_and(|(name, port)| {
            let known = is_name(name) || (name.starts_with('[') && host(name).is_ok());
            known && port.parse::<u16>().is_ok()
        })
    };
    if text.split(',').all(good) {
        Ok(text.to_owned())
    } else {
        Err("is no list of brokers; write host:port,host:port, without schemes and users".into())
    }
}

/// How the brokers are spoken to, as librdkafka writes it.
pub(super) fn security_protocol(text: &str) -> Parsed<String> {
    let protocol = text.to_ascii_lowercase();
    match protocol.as_str() {
        "plaintext" | "ssl" | "sasl_plaintext" | "sasl_ssl" => Ok(protocol),
        _ => Err("is no security protocol; write plaintext, ssl, sasl_plaintext or sasl_ssl".into()),
    }
}

/// How we show the brokers who we are, as librdkafka writes it.
pub(super) fn sasl_mechanism(text: &str) -> Parsed<String> {
    let mechanism = text.to_ascii_uppercase();
    match mechanism.as_str() {
        "PLAIN" | "SCRAM-SHA-256" | "SCRAM-SHA-512" => Ok(mechanism),
        _ => Err("is no SASL mechanism; write PLAIN, SCRAM-SHA-256 or SCRAM-SHA-512".into()),
    }
}

/// Where the store is, by its URL.
pub(super) fn store(url: &str) -> Parsed<StoreConfig> {
    match url.split_once("://") {
        Some(("sqlite", "")) => Err("names no file; write for example sqlite://ams-data/ams.db".into()),
        Some(("sqlite", path)) => Ok(StoreConfig::Sqlite(Path::new(path).to_owned())),
        Some(("postgres" | "postgresql", _)) => Ok(StoreConfig::Postgres(url.to_owned())),
        _ => Err("starts with neither postgres:// nor sqlite://; write for example \
                  postgres://user:password@host:5432/automatic_message_system"
            .into()),
    }
}

/// Where HTTP requests go. They take no user and password along.
pub(super) fn url(text: &str) -> Parsed<String> {
    let url = url::Url::parse(text).ok();
    let Some(url) = url.filter(|url| matches!(url.scheme(), "http" | "https") && url.has_host()) else {
        return Err("is no HTTP URL; write for example http://localhost:3000".into());
    };
    if !url.username().is_empty() || url.password().is_some() {
        return Err("has a user name or a password, which no request takes along; write it without".into());
    }
    delivery::check_url(text)
        .map_err(|why| format!("can't be used: {why}; write for example http://localhost:3000"))?;
    Ok(text.to_owned())
}

pub(super) fn redis_url(text: &str) -> Parsed<String> {
    let good = |url: &url::Url| {
        let database = url.path().trim_start_matches('/');
        let number = database.is_empty() || database.parse::<u32>().is_ok();
        matches!(url.scheme(), "redis" | "rediss") && url.has_host() && number
    };
    match url::Url::parse(text) {
        Ok(url) if good(&url) => Ok(text.to_owned()),
        _ => Err("is no Redis URL; write for example redis://:password@127.0.0.1:6379/0, and / ? # @ of a \
                  password as %2F %3F %23 %40"
            .into()),
    }
}

pub(super) fn file(text: &str) -> Parsed<PathBuf> {
    let path = PathBuf::from(text);
    if path.is_file() { Ok(path) } else { Err("is not a file that can be read; name one".into()) }
}

pub(super) fn sslmode(text: &str) -> Parsed<String> {
    match text {
        "disable" | "prefer" | "require" | "verify-full" => Ok(text.to_owned()),
        _ => Err("is no TLS mode; write disable, prefer, require or verify-full".into()),
    }
}

/// A level, and levels of single parts of the program, separated by commas.
pub(super) fn log_level(text: &str) -> Parsed<String> {
    let items: Vec<&str> = text.split(',').map(str::trim).collect();
    let is_level = |word: &str| LEVELS.iter().any(|level| level.eq_ignore_ascii_case(word));
    let good = |item: &&str| match item.split_once('=') {
        Some((target, level)) => is_target(target) && is_level(level),
        None => is_level(item),
    };
    let bare = items.iter().filter(|item| !item.contains('=')).count();
    if bare <= 1 && items.iter().all(good) {
        return Ok(items.join(","));
    }
    Err("is no log level; write error, warn, info, debug or trace, or a filter such as info,ams::consumer=debug"
        .into())
}

/// Whether something of this name may write to the log: a module of this program, or a library.
fn is_target(text: &str) -> bool {
    let mut parts = text.split("::");
    let legal = |part: &str| {
        let letter = |c: char| c.is_ascii_alphanumeric() || matches!(c, '_' | '-');
        !part.is_empty() && part.chars().all(letter)
    };
    let known = parts.next() != Some("ams") || parts.next().is_none_or(|module| MODULES.contains(&module));
    known && text.split("::").all(legal)
}

/// Whether the log is JSON.
pub(super) fn log_format(text: &str) -> Parsed<bool> {
    match text {
        "text" => Ok(false),
        "json" => Ok(true),
        _ => Err("is no log format; write text or json".into()),
    }
}
