//! What facts mean: each becomes a finding, one line that says what is wrong and how to mend it. Pure.

use std::net::IpAddr;
use std::time::Duration;

use crate::app::FILES;
use crate::clock::Timestamp;
use crate::config::{Config, Raw};
use crate::queue::Depth;
use crate::store::operate::{ApiKey, Control};
use crate::store::{About, Endpoint, Overview, Reconciliation};

use super::super::screen::{grouped, many, time};

/// How old a signed message may be for most receivers: what the libraries of Standard Webhooks allow.
const SIGNATURE_TOLERANCE: Duration = Duration::from_secs(300);

/// How bad it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum State {
    Ok,
    /// Works, and should not stay so.
    Warning,
    /// Does not work, or can lose what it should keep.
    Fault,
}

impl State {
    pub(super) fn as_str(self) -> &'static str {
        match self {
            State::Ok => "ok",
            State::Warning => "warning",
            State::Fault => "fault",
        }
    }
}

/// One line of the report.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Finding {
    pub(super) state: State,
    /// What was looked at, in a word or two.
    pub(super) about: &'static str,
    /// What is so; when it is not as it should be, with the mend.
    pub(super) says: String,
}

pub(super) fn ok(about: &'static str, says: impl Into<String>) -> Finding {
    Finding { state: State::Ok, about, says: says.into() }
}

pub(super) fn warning(about: &'static str, says: impl Into<String>) -> Finding {
    Finding { state: State::Warning, about, says: says.into() }
}

pub(super) fn fault(about: &'static str, says: impl Into<String>) -> Finding {
    Finding { state: State::Fault, about, says: says.into() }
}

/// Settings that are legal each and make no sense together.
pub(super) fn settings(raw: &Raw, config: &Config) -> Vec<Finding> {
    let about = "settings";
    let mut findings = Vec::new();
    let ignored = |names: &[&'static str]| -> Vec<&'static str> {
        names.iter().copied().filter(|name| raw.get(name).is_some()).collect()
    };
    let mut idle = |names: &[&'static str], unless: &str, mend: &str| {
        let names = ignored(names);
        if !names.is_empty() {
            let verb = if names.len() == 1 { "has" } else { "have" };
            findings.push(warning(about, format!("{} {verb} no effect {unless}; {mend}", names.join(", "))));
        }
    };
    let parts = ["DB_HOST", "DB_PORT", "DB_USER", "DB_PASSWORD", "DB_NAME", "DB_SSLMODE"];
    if raw.get("DATABASE_URL").is_some() {
        idle(&parts, "beside DATABASE_URL", "unset one or the other");
    } else if raw.get("DB_HOST").is_none() {
        idle(&parts, "without DB_HOST", "set it, or DATABASE_URL");
    }
    if raw.get("REDIS_URL").is_some() {
        idle(&["REDIS_HOST", "REDIS_PORT", "REDIS_DB"], "beside REDIS_URL", "unset one or the other");
    } else if raw.get("REDIS_HOST").is_none() {
        idle(&["REDIS_PORT", "REDIS_DB"], "without REDIS_HOST", "set it, or REDIS_URL");
    }
    if raw.get("KAFKA_BROKERS").is_none() {
        let client = ["KAFKA_SECURITY_PROTOCOL", "KAFKA_SASL_MECHANISM", "KAFKA_SASL_USERNAME"];
        idle(&client, "without KAFKA_BROKERS", "set it");
    }
    if config.listen.insecure && !is_loopback(&config.listen.host) {
        let host = &config.listen.host;
        findings.push(warning(
            about,
            format!("AMS_INSECURE lets everybody who reaches {host} send, read and change; unset it and make keys with `ams keys create`"),
        ));
    }
    if findings.is_empty() {
        let set: Vec<_> =
            raw.explain(config.role).into_iter().filter(|(s, ..)| raw.get(s.name).is_some()).collect();
        let list = set.iter().map(|(setting, _, source)| format!("{} ({})", setting.name, source.as_str()));
        let list = list.collect::<Vec<_>>().join(", ");
        findings.push(ok(about, if list.is_empty() { "all as by default".to_owned() } else { list }));
    }
    findings
}

fn is_loopback(host: &str) -> bool {
    host == "localhost" || host.parse::<IpAddr>().is_ok_and(|address| address.to_canonical().is_loopback())
}

/// A store that answers, `place` in a few words.
pub(super) fn store(place: &str, missing: &[String], database: &About) -> Vec<Finding> {
    let about = "store";
    let mut findings = Vec::new();
    if !missing.is_empty() {
        let missing = missing.join(", ");
        findings.push(fault(about, format!("lacks the migrations {missing}; run `ams migrate`")));
    }
    let setting = |name: &str| database.settings.get(name).map(String::as_str);
    for name in ["fsync", "full_page_writes"] {
        if setting(name) == Some("off") {
            findings.push(fault(
                about,
                format!("{name} is off: a crash of the server can destroy all messages; set it to on in postgresql.conf"),
            ));
        }
    }
    if setting("synchronous_commit") == Some("off") {
        let why = "a crash of the server can lose messages that were accepted; set it to on";
        findings.push(fault(about, format!("synchronous_commit is off: {why}")));
    }
    if setting("transaction_read_only") == Some("on") {
        let mend = "point DATABASE_URL to the primary server";
        findings.push(fault(about, format!("it takes no writes (a standby?); {mend}")));
    }
    if setting("journal_mode").is_some_and(|mode| mode != "wal") {
        let mend = "move the file to a local disk, where SQLite can share memory";
        findings.push(warning(about, format!("its journal is not wal: reads wait for writes; {mend}")));
    }
    let number = |name: &str| setting(name).and_then(|text| text.parse::<u64>().ok());
    if let Some(most) = number("max_connections") {
        let free = most
            .saturating_sub(number("superuser_reserved_connections").unwrap_or(0))
            .saturating_sub(database.connections);
        if free < 16 {
            findings.push(warning(
                about,
                format!(
                    "only {free} of its {most} connections are free, and each process of AMS takes up to 8; raise max_connections"
                ),
            ));
        }
    }
    if findings.is_empty() {
        let from = if setting("journal_mode").is_some() { "SQLite" } else { "PostgreSQL" };
        findings.push(ok(about, format!("{place}: {from} {}, migrated", database.version)));
    }
    findings
}

/// What the reconciliation has found.
pub(super) fn reconciliation(stands: &Reconciliation) -> Finding {
    let about = "reconciliation";
    let checked = many(stands.checked, "message");
    match (stands.repaired, stands.feeds_made_at) {
        (0, None) => ok(about, format!("{checked} checked, each has a place")),
        (0, Some(at)) => ok(
            about,
            format!("the database came from another server at {at}; {checked} checked, each has a place"),
        ),
        (repaired, Some(at)) => ok(
            about,
            format!(
                "the database came from another server at {at}; {checked} checked, {repaired} had no place and were queued"
            ),
        ),
        (repaired, None) => warning(
            about,
            format!(
                "{repaired} of {checked} had no place and were queued; please report it with the log of the producer"
            ),
        ),
    }
}

/// How far the store's clock is ahead of ours (negative: behind), give or take `unsure`. Services go by the store's, so
/// a difference alone does no harm; but one of the two is wrong.
pub(super) fn clock(ahead_us: i64, unsure: Duration) -> Finding {
    let about = "clock";
    let apart = Duration::from_micros(ahead_us.unsigned_abs());
    let way = if ahead_us < 0 { "behind" } else { "ahead of" };
    let says = format!("the store's is {} {way} this machine's (± {})", time(apart), time(unsure));
    let sure = apart.saturating_sub(unsure);
    let mend = "let both machines follow a time server (NTP)";
    if sure >= SIGNATURE_TOLERANCE / 2 {
        fault(about, format!("{says}: if the store's is wrong, receivers refuse signed messages; {mend}"))
    } else if sure >= Duration::from_millis(500) {
        warning(about, format!("{says}: services go by the store's, this machine's log does not; {mend}"))
    } else {
        ok(about, says)
    }
}

/// Files that a process may have open: now, and at most when it asks for more, as services do.
pub(super) fn files(most: u64) -> Finding {
    let about = "file limit";
    let mend = format!("allow {FILES} (`ulimit -n`, or LimitNOFILE in the unit)");
    match most {
        FILES.. => ok(about, format!("{} open files", grouped(most.min(FILES)))),
        1_024.. => {
            warning(about, format!("{} open files are few for many slow endpoints; {mend}", grouped(most)))
        }
        _ => fault(about, format!("{} open files are not enough; {mend}", grouped(most))),
    }
}

/// A lane on the broker: its partitions, or why they are not known.
pub(super) fn lane(topic: &str, depth: Result<&[Depth], &str>) -> Finding {
    let about = "lane";
    match depth {
        Err(why) => fault(about, format!("{topic}: {why}; see the broker's log")),
        Ok([]) => {
            warning(about, format!("{topic} is not there yet; the first service that needs it makes it"))
        }
        Ok(partitions) => {
            let behind: i64 = partitions.iter().map(|depth| depth.end - depth.position).sum();
            let count = many(partitions.len() as u64, "partition");
            ok(
                about,
                format!("{topic}: {count}, {} not taken up", many(behind.max(0).unsigned_abs(), "record")),
            )
        }
    }
}

/// An endpoint: whether rows wait for it, and whether it could be reached when it was tried.
pub(super) fn endpoint(
    endpoint: &Endpoint,
    waited_for: bool,
    reached: Option<Result<(), String>>,
) -> Finding {
    let about = "endpoint";
    let Endpoint { name, url, .. } = endpoint;
    match reached {
        None if waited_for => warning(
            about,
            format!(
                "{name} is disabled and messages wait for it; `ams endpoints enable {name}` lets them go"
            ),
        ),
        None => ok(about, format!("{name} is disabled")),
        Some(Ok(())) => ok(about, format!("{name}: {} answers", without_secrets(url))),
        Some(Err(why)) => fault(
            about,
            format!(
                "{name}: {} can't be reached from here: {why}; start it, or change the endpoint's URL",
                without_secrets(url)
            ),
        ),
    }
}

/// A URL without what may be secret in it: path, query, user.
fn without_secrets(url: &str) -> String {
    url::Url::parse(url).map_or_else(|_| "its URL".to_owned(), |url| url.origin().ascii_serialization())
}

/// The API at `url`; `chosen`: somebody has set where it is, so that it must be there.
pub(super) fn api(url: &str, chosen: bool, answer: Result<&str, (&str, &str)>) -> Finding {
    let about = "API";
    let ours = env!("CARGO_PKG_VERSION");
    match answer {
        Ok(version) if version == ours => ok(about, format!("{url} answers, version {version}")),
        Ok(version) => {
            let mend = "use programs of one version once an upgrade is done";
            warning(about, format!("{url} is version {version} and this program {ours}; {mend}"))
        }
        Err(("scope_missing", _)) => ok(about, format!("{url} answers; the key of AMS_KEY may not read")),
        Err(("", why)) if !chosen => warning(about, why),
        Err((_, why)) => fault(about, why),
    }
}

/// Keys, where the API asks for them.
pub(super) fn keys(config: &Config, keys: &[ApiKey], now: Timestamp) -> Vec<Finding> {
    let about = "keys";
    let valid = |key: &&ApiKey| key.revoked_at.is_none() && key.expires_at.is_none_or(|at| at > now);
    let valid: Vec<&ApiKey> = keys.iter().filter(valid).collect();
    let asked = !config.listen.insecure && !is_loopback(&config.listen.host);
    let soon = now.after(Duration::from_secs(7 * 86_400));
    let mut findings: Vec<_> = valid
        .iter()
        .filter(|key| key.last_used_at.is_some() && key.expires_at.is_some_and(|at| at <= soon))
        .map(|key| {
            let left = key.expires_at.map_or(Duration::ZERO, |at| at.since(now));
            let (id, left) = (&key.id, time(left));
            warning(
                about,
                format!("{id} is in use and expires in {left}; make another with `ams keys create`"),
            )
        })
        .collect();
    if asked && valid.is_empty() {
        let host = &config.listen.host;
        findings.push(warning(
            about,
            format!(
                "an API on {host} asks for keys, and none is valid; make one with `ams keys create NAME`"
            ),
        ));
    } else if findings.is_empty() {
        let need = if asked { "asked for" } else { "not asked for on the loopback" };
        findings.push(ok(about, format!("{} valid, {need}", grouped(valid.len() as u64))));
    }
    findings
}

/// Who is there to work, and what waits. `lanes`: for each registered lane its topic, and whether it is
/// the fresh one.
pub(super) fn work(
    overview: &Overview,
    control: &Control,
    lanes: &[(String, bool)],
    now: Timestamp,
) -> Vec<Finding> {
    let about = "work";
    let open = overview.counts.iter().filter(|count| !count.status.is_final());
    let (waiting, more) = open.fold((0, false), |(sum, more), count| (sum + count.count, more || count.more));
    let waiting = format!("{}{}", many(waiting, "message"), if more { " or more" } else { "" });
    let idle = waiting.starts_with("0 ");
    let alive = |services: [&str; 2]| {
        let living = overview.instances.iter().filter(|instance| instance.lease_until > now);
        living.filter(|instance| services.contains(&instance.service.as_str())).count()
    };
    if idle && alive(["up", "producer"]) + alive(["consumer", "retry-consumer"]) == 0 {
        return vec![warning(about, "nothing runs, and nothing waits; start `ams up`, or each service")];
    }
    let judged = |says: String| if idle { warning(about, says) } else { fault(about, says) };
    let mut findings = Vec::new();
    if alive(["up", "producer"]) == 0 {
        findings
            .push(judged(format!("{waiting} wait and no producer runs; start `ams producer` or `ams up`")));
    } else if control.paused {
        let mend = "`ams producer resume` lets them go on";
        findings.push(warning(about, format!("the producers are paused and {waiting} wait; {mend}")));
    } else if !control.active {
        let mend = "look into the producer's log; a standby takes over within 10 s";
        findings.push(judged(format!("{waiting} wait and no producer leads; {mend}")));
    }
    if lanes.is_empty() && alive(["up", "consumer"]) == 0 {
        findings.push(judged(format!(
            "{waiting} wait and no consumer has run yet; start `ams consumer` or `ams up`"
        )));
    }
    for (topic, fresh) in lanes {
        let verb = if *fresh { "consumer" } else { "retry-consumer" };
        if alive(["up", verb]) == 0 {
            let says = format!("nobody reads the lane {topic}; start `ams {verb}` or `ams up`");
            findings.push(judged(says));
        }
    }
    let waited = overview.oldest_due_at.map(|due| now.since(due));
    if findings.is_empty() && waited.is_some_and(|waited| waited >= Duration::from_secs(60)) {
        let waited = time(waited.unwrap_or_default());
        let mend = "`ams status` shows what is slow, and a message's `why` what it waits for";
        findings.push(warning(about, format!("the oldest due message has waited {waited}; {mend}")));
    }
    if findings.is_empty() {
        let readers = alive(["up", "consumer"]) + alive(["retry-consumer", ""]);
        let says = format!("a producer leads, deliverers: {readers}, not final: {waiting}");
        findings.push(ok(about, says));
    }
    findings
}

#[cfg(test)]
mod tests;
