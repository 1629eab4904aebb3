//! Every setting, declared once: name, default, help, and what of it may be shown.

use std::collections::BTreeMap;

use super::Role;
use crate::redact::{self, HIDDEN};

/// A setting's declaration.
#[derive(Debug)]
pub struct Setting {
    /// Its name in the environment; as a flag in lower case with dashes, in `ams.toml` in lower case.
    pub name: &'static str,
    pub default: Option<&'static str>,
    /// Another default in some roles.
    roles: &'static [(Role, &'static str)],
    /// What it means, in a sentence.
    pub help: &'static str,
    /// Never shown.
    pub secret: bool,
}

impl Setting {
    /// The default in a role.
    pub fn default_for(&self, role: Role) -> Option<&'static str> {
        self.roles.iter().find(|(other, _)| *other == role).map(|(_, value)| *value).or(self.default)
    }

    /// The flag that sets it.
    pub fn flag(&self) -> String {
        self.name.to_ascii_lowercase().replace('_', "-")
    }

    /// A value as it may be shown: secrets, and what may be a password in a URL or address, are hidden.
    pub fn shown(&self, value: &str) -> String {
        if self.secret {
            HIDDEN.to_owned()
        } else if self.is_url() {
            redact::url(value)
        } else if self.name.ends_with("HOST") || matches!(self.name, "KAFKA_BROKERS" | "AMS_HOSTS") {
            redact::addresses(value)
        } else {
            value.to_owned()
        }
    }

    /// A value that was refused, as it may be shown: in a URL that is none a password may stand anywhere.
    pub fn shown_refused(&self, value: &str) -> String {
        if self.is_url() { redact::scheme(value) } else { self.shown(value) }
    }

    fn is_url(&self) -> bool {
        self.name.ends_with("_URL")
    }
}

const fn setting(name: &'static str, default: Option<&'static str>, help: &'static str) -> Setting {
    Setting { name, default, roles: &[], help, secret: false }
}

const fn secret(name: &'static str, help: &'static str) -> Setting {
    Setting { name, default: None, roles: &[], help, secret: true }
}

/// All settings, in the order of the README's table.
pub const SETTINGS: &[Setting] = &[
    setting("DATABASE_URL", Some("sqlite://ams-data/ams.db"), "the store: postgres://… or sqlite://PATH"),
    setting("DB_HOST", None, "the store's host, when DATABASE_URL is not set"),
    setting("DB_PORT", Some("5432"), "the store's port"),
    setting("DB_USER", Some("postgres"), "the store's user"),
    secret("DB_PASSWORD", "the store's password"),
    setting("DB_NAME", Some("automatic_message_system"), "the store's database"),
    setting("DB_SSLMODE", Some("prefer"), "TLS to the store: disable, prefer, require or verify-full"),
    setting("KAFKA_BROKERS", None, "the queue: host:port,host:port; unset: in this process"),
    setting("KAFKA_SECURITY_PROTOCOL", None, "plaintext, ssl, sasl_plaintext or sasl_ssl"),
    setting("KAFKA_SASL_MECHANISM", None, "PLAIN, SCRAM-SHA-256 or SCRAM-SHA-512"),
    setting("KAFKA_SASL_USERNAME", None, "the broker's user"),
    secret("KAFKA_SASL_PASSWORD", "the broker's password"),
    setting("KAFKA_SSL_CA", None, "file with the authorities that sign the brokers' certificates"),
    setting("KAFKA_SSL_CERTIFICATE", None, "file with this client's certificate"),
    setting("KAFKA_SSL_KEY", None, "file with this client's key"),
    setting("REDIS_URL", None, "the cache: redis://… or rediss://…; unset: in this process"),
    setting("REDIS_HOST", None, "the cache's host, when REDIS_URL is not set"),
    setting("REDIS_PORT", Some("6379"), "the cache's port"),
    setting("REDIS_DB", Some("0"), "the cache's database number"),
    setting(
        "KAFKA_GROUP_ID",
        Some("message-consumer"),
        "consumer group; a retry consumer's has its topic's name added",
    ),
    Setting {
        roles: &[(Role::RetryConsumer, "messages-retry")],
        ..setting("KAFKA_TOPIC", Some("messages"), "the lane a consumer reads, or the producer's fresh lane")
    },
    Setting {
        roles: &[(Role::RetryConsumer, "messages-dlq")],
        ..setting(
            "KAFKA_TOPIC_RETRY",
            Some("messages-retry"),
            "the lane after it; a name ending in -dlq is the end",
        )
    },
    Setting {
        roles: &[(Role::RetryConsumer, "3"), (Role::Up, "3")],
        ..setting("RETRY_COUNT", Some("1"), "tries in this lane; in `up` and `demo`, in the retry lane")
    },
    setting(
        "RETRY_INTERVAL",
        Some("3s"),
        "wait before the k-th try of a retry lane: this × 2^(k-1), and up to a tenth more",
    ),
    setting("RETRY_MAX_INTERVAL", Some("1h"), "the longest such wait"),
    setting("INTERVAL", None, "pacing: at most BATCH_COUNT first tries per INTERVAL, over all producers"),
    setting("BATCH_COUNT", None, "see INTERVAL; both unset: as fast as the endpoints take them"),
    setting("REQUEST_URL", Some("http://localhost:3000"), "URL of the endpoint named `default`"),
    setting("REQUEST_CA_FILE", None, "further authorities that sign endpoints' certificates (PEM)"),
    setting("HOST", Some("127.0.0.1"), "address to listen on; one that others reach asks callers for keys"),
    Setting {
        roles: &[(Role::TestClient, "3000")],
        ..setting("PORT", Some("8080"), "port of the API; of the test client 3000")
    },
    setting(
        "METRICS_PORT",
        None,
        "port for /livez, /readyz and /metrics of services other than the API; unset: none",
    ),
    setting("AMS_HOSTS", None, "further names by which the API may be called, such as ams.example.org,ams"),
    setting("AMS_INSECURE", None, "1: ask nobody for a key, although others can reach the API"),
    setting("AMS_URL", Some("http://127.0.0.1:8080"), "the API that operators' verbs talk to"),
    secret("AMS_KEY", "the key that operators' verbs show to the API"),
    setting("ERROR_RATE", Some("0"), "test client: share of requests it fails, 0 to 1"),
    setting("RETENTION", Some("30d"), "how long final messages are kept; 0: for ever"),
    setting("SHUTDOWN_TIMEOUT", Some("30s"), "how long a stop waits for attempts in flight"),
    setting(
        "LOG_LEVEL",
        Some("info"),
        "error, warn, info, debug or trace; or a filter such as info,ams::consumer=debug; libraries only warn",
    ),
    setting("LOG_FORMAT", Some("text"), "text or json"),
    setting("LOG_FILE", None, "append the log to this file; unset: standard error"),
    setting("NO_COLOR", None, "any value: no colours"),
];

/// Settings that go to the Kafka client as they are.
pub(super) const KAFKA_CLIENT: &[(&str, &str)] = &[
    ("KAFKA_SECURITY_PROTOCOL", "security.protocol"),
    ("KAFKA_SASL_MECHANISM", "sasl.mechanisms"),
    ("KAFKA_SASL_USERNAME", "sasl.username"),
    ("KAFKA_SASL_PASSWORD", "sasl.password"),
    ("KAFKA_SSL_CA", "ssl.ca.location"),
    ("KAFKA_SSL_CERTIFICATE", "ssl.certificate.location"),
    ("KAFKA_SSL_KEY", "ssl.key.location"),
];

/// The settings, by their names here, that make a Kafka client as `client` has it.
pub fn kafka_client_settings(client: &BTreeMap<String, String>) -> Vec<(&'static str, String)> {
    let value = |(name, key): &(&'static str, &str)| Some((*name, client.get(*key)?.clone()));
    KAFKA_CLIENT.iter().filter_map(value).collect()
}
