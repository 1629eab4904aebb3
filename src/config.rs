//! Settings: raw texts from flags, environment, `ams.toml` and defaults, then a validated [`Config`].
//!
//! The only reader of the environment. Reading does nothing but read; whatever is wrong is told in one
//! sentence that names the setting, its value and the mend.

mod parse;
mod settings;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Duration;

use crate::lane::Lane;
use crate::rate::Rate;

pub use parse::duration;
pub use settings::{SETTINGS, Setting, kafka_client_settings};

/// A setting that can't be used.
#[derive(Clone, Debug, PartialEq, thiserror::Error)]
#[error("{0}")]
pub struct ConfigError(String);

/// The result of reading settings.
pub type Result<T> = std::result::Result<T, ConfigError>;

/// What the settings are for: some defaults depend on it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    Api,
    Producer,
    Consumer,
    RetryConsumer,
    /// Everything in one process: `up` and `demo`.
    Up,
    TestClient,
    /// Operators' verbs.
    Tool,
}

/// Where a value came from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Source {
    Flag,
    Environment,
    File,
    Default,
}

impl Source {
    /// The source in a word, for `ams config`.
    pub fn as_str(self) -> &'static str {
        match self {
            Source::Flag => "flag",
            Source::Environment => "environment",
            Source::File => "ams.toml",
            Source::Default => "default",
        }
    }
}

/// Raw settings: texts with their sources, not yet understood.
#[derive(Clone, Debug, Default)]
pub struct Raw {
    values: BTreeMap<&'static str, (String, Source)>,
}

impl Raw {
    /// Reads flags, the process's environment and `ams.toml` in the current folder, if there is one.
    ///
    /// # Errors
    /// When `ams.toml` can't be read or names a setting that does not exist.
    #[expect(clippy::disallowed_methods, reason = "this is the one reader of the environment")]
    pub fn read(flags: &BTreeMap<&'static str, String>) -> Result<Raw> {
        let file = match std::fs::read_to_string("ams.toml") {
            Ok(text) => Some(text),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
            Err(error) => {
                return Err(ConfigError(format!("ams.toml can't be read: {error}; mend or remove it")));
            }
        };
        Raw::combine(flags, |name| std::env::var_os(name), file.as_deref())
    }

    /// Combines the sources, the first of which wins.
    ///
    /// # Errors
    /// As [`Raw::read`]; and when a value is not UTF-8.
    pub fn combine(
        flags: &BTreeMap<&'static str, String>,
        environment: impl Fn(&str) -> Option<std::ffi::OsString>,
        file: Option<&str>,
    ) -> Result<Raw> {
        let mut raw = Raw::default();
        for (name, value) in parse_file(file.unwrap_or_default())? {
            raw.values.insert(name, (value, Source::File));
        }
        for setting in SETTINGS {
            // An empty variable counts as unset: that is how compose files and units write "nothing".
            if let Some(value) = environment(setting.name).filter(|value| !value.is_empty()) {
                // Without the value, which may be a password.
                let value = value.into_string().map_err(|_| {
                    ConfigError(format!("{} is not UTF-8; set it to plain text", setting.name))
                })?;
                raw.values.insert(setting.name, (value, Source::Environment));
            }
        }
        for (name, value) in flags {
            raw.values.insert(name, (value.clone(), Source::Flag));
        }
        Ok(raw)
    }

    /// A setting's text, if any source other than the default has one.
    pub fn get(&self, name: &str) -> Option<&str> {
        self.values.get(name).map(|(value, _)| value.as_str())
    }

    /// Each setting with its value (secrets hidden) and source, for `ams config`.
    pub fn explain(&self, role: Role) -> Vec<(&'static Setting, String, Source)> {
        SETTINGS
            .iter()
            .map(|setting| match self.values.get(setting.name) {
                Some((value, source)) => (setting, setting.shown(value), *source),
                None => (setting, setting.default_for(role).unwrap_or("").to_owned(), Source::Default),
            })
            .collect()
    }

    fn value(&self, name: &'static str, role: Role) -> Option<&str> {
        let setting = SETTINGS.iter().find(|setting| setting.name == name);
        self.get(name).or_else(|| setting.and_then(|setting| setting.default_for(role)))
    }

    fn parsed<T>(
        &self,
        name: &'static str,
        role: Role,
        parse: impl Fn(&str) -> std::result::Result<T, String>,
    ) -> Result<Option<T>> {
        let Some(value) = self.value(name, role) else {
            return Ok(None);
        };
        parse(value).map(Some).map_err(|mend| refused(name, value, &mend))
    }

    fn required<T>(
        &self,
        name: &'static str,
        role: Role,
        parse: impl Fn(&str) -> std::result::Result<T, String>,
    ) -> Result<T> {
        self.parsed(name, role, parse)?.ok_or_else(|| ConfigError(format!("{name} is not set; set it")))
    }
}

/// Says that a setting's value can't be used, as much of it as may be shown.
fn refused(name: &str, value: &str, mend: &str) -> ConfigError {
    let setting = SETTINGS.iter().find(|setting| setting.name == name);
    let shown = setting.map_or_else(String::new, |setting| setting.shown_refused(value));
    ConfigError(format!("{name} is `{shown}`, which {mend}"))
}

fn parse_file(text: &str) -> Result<Vec<(&'static str, String)>> {
    let table: toml::Table = text.parse().map_err(|error: toml::de::Error| {
        // Without the line itself and what the parser says of it: it may be one with a password.
        let before = error.span().and_then(|span| text.get(..span.start)).unwrap_or_default();
        let line = before.matches('\n').count() + 1;
        ConfigError(format!(
            "ams.toml is not TOML in line {line}; mend it: a text stands in quotes, as in name = \"value\""
        ))
    })?;
    let mut values = Vec::new();
    for (key, value) in table {
        let Some(setting) = SETTINGS.iter().find(|setting| setting.name.eq_ignore_ascii_case(&key)) else {
            return Err(ConfigError(format!(
                "ams.toml names `{key}`, which is no setting; `ams config` lists them"
            )));
        };
        let value = match value {
            toml::Value::String(text) => text,
            toml::Value::Integer(number) => number.to_string(),
            toml::Value::Float(number) => number.to_string(),
            other => {
                let kind = other.type_str();
                return Err(ConfigError(format!(
                    "ams.toml sets `{key}` to a {kind}; write a text or a number"
                )));
            }
        };
        values.push((setting.name, value));
    }
    Ok(values)
}

/// Where messages live.
#[derive(Clone, Debug, PartialEq)]
pub enum StoreConfig {
    Sqlite(PathBuf),
    /// A connection URL.
    Postgres(String),
}

/// What carries tickets.
#[derive(Clone, Debug, PartialEq)]
pub enum QueueConfig {
    Embedded,
    Kafka { brokers: String, client: BTreeMap<String, String> },
}

/// What keeps answers.
#[derive(Clone, Debug, PartialEq)]
pub enum CacheConfig {
    Memory,
    Redis(String),
}

/// The default endpoint.
#[derive(Clone, Debug, PartialEq)]
pub struct RequestConfig {
    pub url: String,
    /// Whether somebody set `REQUEST_URL`: then it replaces what stands in the store.
    pub is_set: bool,
    /// Authorities to trust besides the usual ones.
    pub ca_file: Option<PathBuf>,
}

/// Where the API listens, and who may call it.
#[derive(Clone, Debug, PartialEq)]
pub struct ListenConfig {
    pub host: String,
    pub port: u16,
    /// Further names by which the API may be called.
    pub names: Vec<String>,
    /// No keys are asked for, wherever the API listens.
    pub insecure: bool,
}

/// The API that operators' verbs talk to, and the key that they show.
#[derive(Clone, Debug, PartialEq)]
pub struct ClientConfig {
    pub url: String,
    pub key: Option<String>,
}

/// How the log is written.
#[derive(Clone, Debug, PartialEq)]
pub struct LogConfig {
    pub level: String,
    pub json: bool,
    pub file: Option<PathBuf>,
    /// Colours are wanted, if the output is a terminal.
    pub colour: bool,
}

/// Working settings: valid by their types.
#[derive(Clone, Debug)]
pub struct Config {
    pub role: Role,
    pub store: StoreConfig,
    pub queue: QueueConfig,
    pub cache: CacheConfig,
    /// The lane that the consumer of this role reads.
    pub lane: Lane,
    /// In [`Role::Up`], the lane after it.
    pub retry_lane: Lane,
    pub pacing: Option<Rate>,
    pub request: RequestConfig,
    pub listen: ListenConfig,
    pub metrics_port: Option<u16>,
    pub client: ClientConfig,
    pub error_rate: f64,
    /// How long final messages are kept; `None`: for ever.
    pub retention: Option<Duration>,
    pub shutdown_timeout: Duration,
    pub log: LogConfig,
}

impl Config {
    /// Understands raw settings for a role.
    ///
    /// # Errors
    /// The first setting that is wrong, in one sentence.
    pub fn new(raw: &Raw, role: Role) -> Result<Config> {
        for (name, (value, _)) in &raw.values {
            parse::check(name, value).map_err(|mend| refused(name, value, &mend))?;
        }
        Ok(Config {
            role,
            store: store(raw, role)?,
            queue: queue(raw, role)?,
            cache: cache(raw, role)?,
            lane: lane(raw, role)?,
            retry_lane: retry_lane(raw, role)?,
            pacing: pacing(raw, role)?,
            request: RequestConfig {
                url: raw.required("REQUEST_URL", role, parse::url)?,
                is_set: raw.get("REQUEST_URL").is_some(),
                ca_file: raw.parsed("REQUEST_CA_FILE", role, parse::file)?,
            },
            listen: ListenConfig {
                host: raw.required("HOST", role, parse::host)?,
                port: raw.required("PORT", role, parse::port)?,
                names: raw.parsed("AMS_HOSTS", role, parse::names)?.unwrap_or_default(),
                insecure: raw.parsed("AMS_INSECURE", role, parse::switch)?.unwrap_or(false),
            },
            metrics_port: raw.parsed("METRICS_PORT", role, parse::port)?,
            client: ClientConfig {
                url: raw.required("AMS_URL", role, parse::url)?,
                key: raw.parsed("AMS_KEY", role, parse::text)?,
            },
            error_rate: raw.required("ERROR_RATE", role, parse::share)?,
            retention: Some(raw.required("RETENTION", role, parse::duration)?).filter(|kept| !kept.is_zero()),
            shutdown_timeout: raw.required("SHUTDOWN_TIMEOUT", role, parse::duration)?,
            log: LogConfig {
                level: raw.required("LOG_LEVEL", role, parse::log_level)?,
                json: raw.required("LOG_FORMAT", role, parse::log_format)?,
                file: raw.parsed("LOG_FILE", role, |text| Ok(PathBuf::from(text)))?,
                colour: raw.get("NO_COLOR").is_none(),
            },
        })
    }
}

fn store(raw: &Raw, role: Role) -> Result<StoreConfig> {
    let from_parts = raw.get("DB_HOST").is_some() && raw.get("DATABASE_URL").is_none();
    if !from_parts {
        return raw.required("DATABASE_URL", role, parse::store);
    }
    let part = |name| raw.required(name, role, parse::text);
    let mut url = url::Url::parse("postgres://localhost").expect("a constant that is a URL");
    let wrong = |name: &str| ConfigError(format!("{name} can't be part of a connection URL; mend it"));
    url.set_host(Some(&in_url(&raw.required("DB_HOST", role, parse::host)?)))
        .map_err(|_| wrong("DB_HOST"))?;
    url.set_port(Some(raw.required("DB_PORT", role, parse::port)?)).map_err(|()| wrong("DB_PORT"))?;
    url.set_username(&part("DB_USER")?).map_err(|()| wrong("DB_USER"))?;
    url.set_password(raw.get("DB_PASSWORD")).map_err(|()| wrong("DB_PASSWORD"))?;
    url.set_path(&part("DB_NAME")?);
    url.query_pairs_mut().append_pair("sslmode", &raw.required("DB_SSLMODE", role, parse::sslmode)?);
    Ok(StoreConfig::Postgres(url.into()))
}

fn queue(raw: &Raw, role: Role) -> Result<QueueConfig> {
    let Some(brokers) = raw.parsed("KAFKA_BROKERS", role, parse::brokers)? else {
        return Ok(QueueConfig::Embedded);
    };
    let mut client = BTreeMap::new();
    for (name, key) in settings::KAFKA_CLIENT {
        let value = match *name {
            "KAFKA_SECURITY_PROTOCOL" => raw.parsed(name, role, parse::security_protocol)?,
            "KAFKA_SASL_MECHANISM" => raw.parsed(name, role, parse::sasl_mechanism)?,
            name => raw.get(name).map(str::to_owned),
        };
        client.extend(value.map(|value| ((*key).to_owned(), value)));
    }
    Ok(QueueConfig::Kafka { brokers, client })
}

fn cache(raw: &Raw, role: Role) -> Result<CacheConfig> {
    if let Some(url) = raw.parsed("REDIS_URL", role, parse::redis_url)? {
        return Ok(CacheConfig::Redis(url));
    }
    let Some(host) = raw.parsed("REDIS_HOST", role, parse::host)? else {
        return Ok(CacheConfig::Memory);
    };
    let port = raw.required("REDIS_PORT", role, parse::port)?;
    let db = raw.required("REDIS_DB", role, parse::count)?;
    Ok(CacheConfig::Redis(format!("redis://{}:{port}/{db}", in_url(&host))))
}

/// A host as a URL has it: an IPv6 address in brackets.
fn in_url(host: &str) -> String {
    if host.contains(':') { format!("[{host}]") } else { host.to_owned() }
}

fn lane(raw: &Raw, role: Role) -> Result<Lane> {
    let topic = raw.required("KAFKA_TOPIC", role, parse::topic)?;
    let base = raw.required("KAFKA_GROUP_ID", role, parse::text)?;
    let fresh = role != Role::RetryConsumer;
    // In one process RETRY_COUNT speaks of the retry lane: the fresh one then makes one try.
    let tries = if role == Role::Up { 1 } else { raw.required("RETRY_COUNT", role, parse::tries)? };
    let lane = Lane {
        group: if fresh { base } else { format!("{base}-{topic}") },
        next: raw.required("KAFKA_TOPIC_RETRY", role, parse::topic)?,
        topic,
        fresh,
        tries,
        interval: raw.required("RETRY_INTERVAL", role, parse::duration)?,
        interval_max: raw.required("RETRY_MAX_INTERVAL", role, parse::duration)?,
    };
    if Lane::is_terminal(&lane.topic) {
        let topic = &lane.topic;
        return Err(ConfigError(format!(
            "KAFKA_TOPIC is `{topic}`, a dead-letter lane, which nobody consumes; name another"
        )));
    }
    if lane.topic == lane.next {
        let topic = &lane.topic;
        return Err(ConfigError(format!(
            "KAFKA_TOPIC and KAFKA_TOPIC_RETRY are both `{topic}`; they must differ"
        )));
    }
    Ok(lane)
}

fn retry_lane(raw: &Raw, role: Role) -> Result<Lane> {
    let first = lane(raw, role)?;
    let base = raw.required("KAFKA_GROUP_ID", role, parse::text)?;
    Ok(Lane {
        group: format!("{base}-{}", first.next),
        next: format!("{}-dlq", first.topic),
        topic: first.next,
        fresh: false,
        tries: raw.required("RETRY_COUNT", Role::RetryConsumer, parse::tries)?,
        ..first
    })
}

fn pacing(raw: &Raw, role: Role) -> Result<Option<Rate>> {
    let interval = raw.parsed("INTERVAL", role, parse::duration)?;
    let count = raw.parsed("BATCH_COUNT", role, parse::count)?;
    match (interval, count) {
        (None, None) => Ok(None),
        (Some(interval), Some(count)) if interval > Duration::ZERO && count > 0 => {
            Ok(Some(Rate { count: count as usize, interval }))
        }
        (Some(_), Some(_)) => Err(ConfigError(
            "INTERVAL and BATCH_COUNT must both be above zero; unset both for no pacing".into(),
        )),
        (Some(_), None) => {
            Err(ConfigError("INTERVAL is set and BATCH_COUNT is not; set both, or neither".into()))
        }
        (None, Some(_)) => {
            Err(ConfigError("BATCH_COUNT is set and INTERVAL is not; set both, or neither".into()))
        }
    }
}

#[cfg(test)]
mod tests;
