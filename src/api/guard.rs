//! Who may call: keys with scopes, and from where.
//!
//! A program of a web page in the operator's browser can reach a port of the loopback; it gives itself
//! away by its `Origin`, or, when it has bent its own name to our address (DNS rebinding), by the `Host`.

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::extract::{Request, State};
use axum::http::header::{AUTHORIZATION, HOST, ORIGIN};
use axum::http::{HeaderMap, Method};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use ring::digest::{SHA256, digest};
use subtle::ConstantTimeEq;

use super::problem::{Code, Problem};
use crate::clock::{Clock, Timestamp};
use crate::keys::{KEY_PREFIX, id_of};
use crate::store::operate::ApiKey;
use crate::store::{Store, StoreError};

/// How long keys are believed: a revocation is heard at the latest then.
const BELIEVED: Duration = Duration::from_millis(500);
/// How often the last use of keys is written down.
const USED: Duration = Duration::from_secs(30);

/// What decides whether a request may pass.
#[derive(Clone)]
pub struct Guard {
    store: Arc<dyn Store>,
    clock: Clock,
    access: Arc<Access>,
    known: Arc<tokio::sync::Mutex<Known>>,
    used: Arc<Mutex<Used>>,
}

/// Who may come in.
#[derive(Clone, Debug, Default)]
pub struct Access {
    /// Whether a key is needed. One that is sent is checked in any case.
    pub keyed: bool,
    /// Whether others than this machine reach us: then we may be called by any address.
    pub reached: bool,
    /// Further names and addresses by which we may be called, in lower case; IPv6 addresses without brackets.
    pub hosts: Vec<String>,
}

#[derive(Default)]
struct Known {
    keys: Vec<ApiKey>,
    read_at: Option<Timestamp>,
}

#[derive(Default)]
struct Used {
    ids: BTreeSet<String>,
    written_at: Timestamp,
}

impl Guard {
    /// A guard that lets in whom `access` allows.
    pub fn new(store: Arc<dyn Store>, clock: Clock, access: Access) -> Guard {
        let used = Used { ids: BTreeSet::new(), written_at: clock.now() };
        Guard {
            store,
            clock,
            access: Arc::new(access),
            known: Arc::default(),
            used: Arc::new(Mutex::new(used)),
        }
    }

    async fn check(&self, method: &Method, path: &str, headers: &HeaderMap) -> Result<(), Problem> {
        self.check_sender(headers)?;
        let Some(scope) = scope(method, path) else { return Ok(()) };
        let Some(key) = headers.get(AUTHORIZATION) else {
            return if self.access.keyed {
                Err(unknown("send `Authorization: Bearer` and a key"))
            } else {
                Ok(())
            };
        };
        let key = key.to_str().ok().and_then(|text| text.strip_prefix("Bearer ")).map(str::trim);
        let key = key.ok_or_else(|| unknown("the header must be `Authorization: Bearer` and a key"))?;
        self.check_key(key, scope).await
    }

    fn check_sender(&self, headers: &HeaderMap) -> Result<(), Problem> {
        let host = headers.get(HOST).and_then(|host| host.to_str().ok()).unwrap_or_default();
        let checked = !self.access.keyed || !self.access.hosts.is_empty();
        if checked && !self.access.names(without_port(host)) {
            let detail = format!("`{}` is no name of this API; set AMS_HOSTS if it is", host.escape_debug());
            return Err(Problem::new(Code::HostNotAllowed, &detail));
        }
        let Some(origin) = headers.get(ORIGIN) else { return Ok(()) };
        let origin = origin.to_str().unwrap_or_default();
        let authority = origin.strip_prefix("http://").or_else(|| origin.strip_prefix("https://"));
        if authority.is_none_or(|authority| !authority.eq_ignore_ascii_case(host)) {
            let detail = "pages of other sites may not call this API";
            return Err(Problem::new(Code::OriginNotAllowed, detail));
        }
        Ok(())
    }

    async fn check_key(&self, key: &str, scope: &'static str) -> Result<(), Problem> {
        let keys = self.keys().await?;
        let hash = digest(&SHA256, key.as_bytes());
        let found = id_of(key).and_then(|id| keys.iter().find(|known| known.id == id));
        let found = found.filter(|known| bool::from(known.hash.ct_eq(hash.as_ref())));
        let known = found.ok_or_else(|| unknown("there is no such key"))?;
        let now = self.clock.now();
        if known.revoked_at.is_some() {
            return Err(unknown("this key is revoked"));
        }
        if known.expires_at.is_some_and(|at| at <= now) {
            return Err(unknown("this key has expired"));
        }
        if !known.scopes.iter().any(|has| has == scope) {
            let detail = format!("this key has not the scope `{scope}`, which this call needs");
            return Err(Problem::new(Code::ScopeMissing, &detail));
        }
        self.note_use(&known.id, now);
        Ok(())
    }

    async fn keys(&self) -> Result<Vec<ApiKey>, StoreError> {
        let mut known = self.known.lock().await;
        let now = self.clock.now();
        if known.read_at.is_none_or(|at| now.since(at) >= BELIEVED || now < at) {
            known.keys = self.store.keys().await?;
            known.read_at = Some(now);
        }
        Ok(known.keys.clone())
    }

    fn note_use(&self, id: &str, now: Timestamp) {
        let mut used = self.used.lock().unwrap_or_else(PoisonError::into_inner);
        used.ids.insert(id.to_owned());
        if now.since(used.written_at) < USED {
            return;
        }
        used.written_at = now;
        let ids: Vec<String> = std::mem::take(&mut used.ids).into_iter().collect();
        let store = Arc::clone(&self.store);
        tokio::spawn(async move {
            if let Err(error) = store.keys_used(&ids, now).await {
                tracing::debug!("the last use of keys could not be written: {error}");
            }
        });
    }
}

impl Access {
    /// Whether `host`, which a request names, is one of ours.
    ///
    /// A stranger's page can call us by any name that it can have resolved to us. That is no address, and neither
    /// `localhost` nor what ends so: browsers and resolvers ask nobody for those (RFC 6761, section 6.3). Any
    /// other name, also one without a dot, is what the network around says it is.
    fn names(&self, host: &str) -> bool {
        let host = host.strip_suffix('.').unwrap_or(host).to_ascii_lowercase();
        let bare = host.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')).unwrap_or(&host);
        if let Ok(address) = bare.parse::<IpAddr>() {
            let address = address.to_canonical();
            return self.reached || address.is_loopback() || self.hosts.contains(&address.to_string());
        }
        let local = host.strip_suffix(".localhost").is_some_and(|rest| !rest.is_empty());
        host == "localhost" || local || self.hosts.contains(&host)
    }
}

/// Lets a request pass, or answers it.
pub(super) async fn guard(State(guard): State<Guard>, request: Request, next: Next) -> Response {
    match guard.check(request.method(), request.uri().path(), request.headers()).await {
        Ok(()) => next.run(request).await,
        Err(problem) => problem.into_response(),
    }
}

/// The scope that a call needs; `None`: it is open, because it tells nothing of messages.
fn scope(method: &Method, path: &str) -> Option<&'static str> {
    if !path.starts_with("/v1/") && path != "/metrics" {
        return None;
    }
    Some(match *method {
        Method::GET | Method::HEAD => "read",
        Method::POST if matches!(path, "/v1/messages" | "/v1/messages/batch") => "write",
        _ => "operate",
    })
}

fn without_port(host: &str) -> &str {
    match host.rsplit_once(':') {
        Some((name, port)) if port.chars().all(|c| c.is_ascii_digit()) && !name.ends_with(':') => name,
        _ => host,
    }
}

fn unknown(detail: &str) -> Problem {
    Problem::new(Code::KeyMissing, &format!("{detail}; a key begins with `{KEY_PREFIX}`"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_call_needs_its_scope() {
        for (method, path, needed) in [
            (Method::GET, "/livez", None),
            (Method::GET, "/swagger/index.html", None),
            (Method::GET, "/metrics", Some("read")),
            (Method::GET, "/v1/messages", Some("read")),
            (Method::POST, "/v1/messages", Some("write")),
            (Method::POST, "/v1/messages/batch", Some("write")),
            (Method::POST, "/v1/messages/redrive", Some("operate")),
            (Method::POST, "/v1/messages/7/cancel", Some("operate")),
            (Method::PATCH, "/v1/endpoints/sms", Some("operate")),
            (Method::DELETE, "/v1/endpoints/sms", Some("operate")),
        ] {
            assert_eq!(scope(&method, path), needed, "{method} {path}");
        }
    }

    #[test]
    fn one_that_others_reach_is_called_by_any_address_and_by_no_strangers_name() {
        let hosts = vec!["ams".to_owned(), "fd00::2".to_owned()];
        for reached in [false, true] {
            let access = Access { keyed: false, reached, hosts: hosts.clone() };
            for (host, ours) in [
                ("10.0.0.5", reached),
                ("[fd00::1]", reached),
                ("0.0.0.0", reached),
                ("[fd00::2]", true),
                ("[::1]", true),
                ("127.9.9.9", true),
                ("ams", true),
                ("evil", false),
                ("10.0.0.5.evil.example", false),
                ("localhost.evil", false),
                ("", false),
            ] {
                assert_eq!(access.names(host), ours, "{host} {reached}");
            }
        }
    }

    #[test]
    fn a_port_is_cut_off() {
        for (host, name) in [
            ("localhost:8080", "localhost"),
            ("localhost", "localhost"),
            ("127.0.0.1:80", "127.0.0.1"),
            ("[::1]:8080", "[::1]"),
            ("[::1]", "[::1]"),
            ("evil.example:8080", "evil.example"),
        ] {
            assert_eq!(without_port(host), name);
        }
    }
}
