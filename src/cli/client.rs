//! The API, as the operators' verbs call it: JSON out, JSON or one plain sentence back.

use std::fmt::Write as _;
use std::time::Duration;

use bytes::Bytes;
use hyper::header::{AUTHORIZATION, HeaderMap, HeaderValue, RETRY_AFTER};
use hyper::{Method, StatusCode};
use serde::Deserialize;
use serde_json::Value;

use crate::app::{self, AppError};
use crate::clock::Clock;
use crate::config::Config;
use crate::delivery::{CallError, Caller, Reply};
use crate::redact;

/// How long a call may take: longer than the API's own work at a redrive of many.
const WITHIN: Duration = Duration::from_secs(30);

/// Calls the API of `AMS_URL` with the key of `AMS_KEY`, on kept connections; several calls at once if wanted.
pub(super) struct Client {
    caller: Caller,
    url: String,
    key: Option<HeaderValue>,
}

/// Why a call came to nothing.
#[derive(Debug, thiserror::Error)]
#[error("{sentence}")]
pub(super) struct Failure {
    /// The answer's status; `None`: there was no answer.
    pub(super) status: Option<u16>,
    /// The problem's stable code; empty when there is none.
    pub(super) code: String,
    /// Each fault by field, and in a batch by index.
    pub(super) errors: Vec<Fault>,
    /// The wait that the API asks for.
    pub(super) retry_after: Option<Duration>,
    /// What is wrong and how to mend it.
    pub(super) sentence: String,
}

/// A fault that the API found.
#[derive(Clone, Debug, Default, PartialEq, Deserialize)]
#[serde(default)]
pub(super) struct Fault {
    pub(super) index: Option<usize>,
    pub(super) field: String,
    pub(super) detail: String,
}

/// What of a problem document is read.
#[derive(Deserialize)]
struct Problem {
    code: String,
    #[serde(default)]
    detail: String,
    #[serde(default)]
    errors: Vec<Fault>,
}

impl Failure {
    /// Whether the same call may succeed a little later.
    pub(super) fn passes(&self) -> bool {
        self.status.is_none_or(|status| matches!(status, 408 | 429 | 500..))
    }
}

impl From<Failure> for AppError {
    fn from(failure: Failure) -> AppError {
        AppError(failure.sentence)
    }
}

impl Client {
    /// A client by these settings; nothing is called yet.
    ///
    /// # Errors
    /// When `AMS_URL`, `AMS_KEY` or `REQUEST_CA_FILE` can't be used.
    pub(super) fn new(config: &Config) -> app::Result<Client> {
        let shown = redact::url(&config.client.url);
        let wrong = |error| AppError(format!("AMS_URL is `{shown}`: {error}"));
        let caller = Caller::new(&config.client.url, config.request.ca_file.as_deref(), &Clock::system());
        let bearer = |key: &String| {
            let value = HeaderValue::try_from(format!("Bearer {key}"));
            value.map_err(|_| AppError("AMS_KEY can't be sent as a header; copy the key anew".to_owned()))
        };
        let key = config.client.key.as_ref().map(bearer).transpose()?;
        Ok(Client { caller: caller.map_err(wrong)?, url: shown.trim_end_matches('/').to_owned(), key })
    }

    /// Where the API is, for people.
    pub(super) fn url(&self) -> &str {
        &self.url
    }

    pub(super) async fn get(&self, path: &str) -> Result<Value, Failure> {
        self.call(Method::GET, path, None).await
    }

    /// The JSON of an answer of any status: `/readyz` says with a 503 what is away.
    ///
    /// # Errors
    /// [`Failure`]: no answer, or no JSON.
    pub(super) async fn get_any(&self, path: &str) -> Result<Value, Failure> {
        let reply = self.reply(Method::GET, path, None).await?;
        serde_json::from_slice(&reply.body).map_err(|_| stranger(&self.url, reply.status))
    }

    pub(super) async fn post(&self, path: &str, body: &Value) -> Result<Value, Failure> {
        self.call(Method::POST, path, Some(body)).await
    }

    /// Makes one call; `null` when the answer is empty.
    ///
    /// # Errors
    /// [`Failure`]: no answer, or one that is no success.
    pub(super) async fn call(
        &self,
        method: Method,
        path: &str,
        body: Option<&Value>,
    ) -> Result<Value, Failure> {
        understood(&self.url, path, &self.reply(method, path, body).await?)
    }

    async fn reply(&self, method: Method, path: &str, body: Option<&Value>) -> Result<Reply, Failure> {
        let mut headers = HeaderMap::new();
        if let Some(key) = &self.key {
            headers.insert(AUTHORIZATION, key.clone());
        }
        let body = body.map_or_else(Bytes::new, |body| Bytes::from(body.to_string()));
        let called = self.caller.call(method, path, headers, body, WITHIN).await;
        called.map_err(|error| unanswered(&self.url, &error))
    }
}

fn unanswered(url: &str, error: &CallError) -> Failure {
    let sentence = match error {
        CallError::Refused(why) => {
            format!("no API answers at {url} ({why}); start one with `ams up`, or set AMS_URL")
        }
        CallError::Broken(why) => {
            format!("the API at {url} broke off: {why}; see `ams status` and its log, and try again")
        }
    };
    Failure { status: None, code: String::new(), errors: Vec::new(), retry_after: None, sentence }
}

/// Somebody else answers there.
fn stranger(url: &str, status: StatusCode) -> Failure {
    Failure {
        status: Some(status.as_u16()),
        code: String::new(),
        errors: Vec::new(),
        retry_after: None,
        sentence: format!("what answers at {url} is no AMS API (status {status}); set AMS_URL to one"),
    }
}

/// The JSON of a success, or what the API says is wrong.
fn understood(url: &str, path: &str, reply: &Reply) -> Result<Value, Failure> {
    let Reply { status, headers, body } = reply;
    if status.is_success() && body.is_empty() {
        return Ok(Value::Null);
    }
    if status.is_success() {
        return serde_json::from_slice(body).map_err(|_| stranger(url, *status));
    }
    let Ok(problem) = serde_json::from_slice::<Problem>(body) else { return Err(stranger(url, *status)) };
    let seconds = headers.get(RETRY_AFTER).and_then(|value| value.to_str().ok()?.parse().ok());
    Err(Failure {
        status: Some(status.as_u16()),
        sentence: sentence(*status, path, &problem),
        code: problem.code,
        errors: problem.errors,
        retry_after: seconds.map(Duration::from_secs),
    })
}

/// What is wrong, field by field, and what to do next in the words of this command line.
fn sentence(status: StatusCode, path: &str, problem: &Problem) -> String {
    let mut text = String::new();
    for Fault { index, field, detail } in &problem.errors {
        let gap = if text.is_empty() { "" } else { "; " };
        let at = index.map(|index| format!("message {index}: ")).unwrap_or_default();
        // A text takes whatever is written to it.
        let _ = write!(text, "{gap}{at}{field} {detail}");
    }
    if text.is_empty() {
        text.clone_from(&problem.detail);
    }
    let story;
    let next = match problem.code.as_str() {
        "not_found" if path.starts_with("/v1/messages/") => "`ams messages list` shows what there is",
        "not_found" if path.starts_with("/v1/endpoints/") => "`ams endpoints list` shows what there is",
        "not_found" | "method_not_allowed" => {
            "the API is older than this program, or AMS_URL has a wrong path"
        }
        "key_missing" => "set AMS_KEY to a key, which `ams keys create` makes",
        "scope_missing" => "set AMS_KEY to another key, which `ams keys create` makes",
        "wrong_status" => {
            story = format!("`ams messages show {}` tells its story", path.split('/').nth(3).unwrap_or("ID"));
            &story
        }
        "busy" => "try again in a moment",
        "unavailable" => "try again in a moment; `ams status` says what is away",
        "internal" => "the API's log says more",
        _ if status.is_server_error() => "try again in a moment; the API's log says more",
        _ => return text,
    };
    format!("{text}; {next}")
}

/// A path segment of any text.
pub(super) fn segment(text: &str) -> String {
    let mut path = String::with_capacity(text.len());
    for byte in text.bytes() {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'_' | b'.' | b'~') {
            path.push(char::from(byte));
        } else {
            // A text takes whatever is written to it.
            let _ = write!(path, "%{byte:02X}");
        }
    }
    path
}

/// A path with the query of those pairs that have a value.
pub(super) fn query<'a>(path: &str, pairs: impl IntoIterator<Item = (&'a str, Option<&'a str>)>) -> String {
    let mut query = url::form_urlencoded::Serializer::new(String::new());
    for (name, value) in pairs {
        if let Some(value) = value {
            query.append_pair(name, value);
        }
    }
    let query = query.finish();
    if query.is_empty() { path.to_owned() } else { format!("{path}?{query}") }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    const URL: &str = "http://127.0.0.1:8080";

    fn failure(status: u16, path: &str, body: &Value) -> Failure {
        let mut headers = HeaderMap::new();
        headers.insert(RETRY_AFTER, HeaderValue::from_static("2"));
        let status = StatusCode::from_u16(status).unwrap();
        understood(URL, path, &Reply { status, headers, body: body.to_string().into() }).unwrap_err()
    }

    #[test]
    fn a_problem_becomes_a_sentence_with_the_next_step() {
        let problem = |code: &str| json!({"code": code, "detail": "so it is"});
        for (status, path, code, next) in [
            (404, "/v1/messages/9", "not_found", "so it is; `ams messages list` shows what there is"),
            (404, "/v1/endpoints/x", "not_found", "so it is; `ams endpoints list` shows what there is"),
            (409, "/v1/messages/9/cancel", "wrong_status", "so it is; `ams messages show 9` tells its story"),
            (
                401,
                "/v1/status",
                "key_missing",
                "so it is; set AMS_KEY to a key, which `ams keys create` makes",
            ),
            (500, "/v1/status", "new_code", "so it is; try again in a moment; the API's log says more"),
            (422, "/v1/messages", "invalid_filter", "so it is"),
        ] {
            assert_eq!(failure(status, path, &problem(code)).sentence, next);
        }
        let busy = failure(503, "/v1/messages", &problem("busy"));
        assert_eq!((busy.passes(), busy.retry_after), (true, Some(Duration::from_secs(2))));
        assert!(!failure(404, "/v1/messages/9", &problem("not_found")).passes());
    }

    #[test]
    fn faults_are_told_by_field_and_in_a_batch_by_message() {
        let errors = json!([{"field": "recipient", "detail": "is empty"}, {"index": 7, "field": "content", "detail": "is long"}]);
        let body = json!({"code": "invalid_message", "detail": "2 of 9", "errors": errors});
        let failure = failure(422, "/v1/messages/batch", &body);
        assert_eq!(failure.sentence, "recipient is empty; message 7: content is long");
        assert_eq!((failure.code.as_str(), failure.errors[1].index), ("invalid_message", Some(7)));
    }

    #[test]
    fn strangers_and_silence_are_named_with_the_setting() {
        for body in [json!("<html>"), json!({"message": "Accepted"})] {
            let sentence = failure(405, "/v1/status", &body).sentence;
            assert!(
                sentence.contains("no AMS API (status 405") && sentence.contains("AMS_URL"),
                "{sentence}"
            );
        }
        let refused = unanswered(URL, &CallError::Refused("connection refused".to_owned()));
        assert_eq!(
            refused.sentence,
            "no API answers at http://127.0.0.1:8080 (connection refused); start one with `ams up`, or set AMS_URL"
        );
        let broken = unanswered(URL, &CallError::Broken("no answer within 30s".to_owned()));
        assert!(broken.sentence.contains("broke off: no answer within 30s; see `ams status`"), "{broken}");
        let empty = Reply { status: StatusCode::NO_CONTENT, headers: HeaderMap::new(), body: Vec::new() };
        assert_eq!(understood(URL, "/", &empty).unwrap(), Value::Null);
    }

    #[test]
    fn paths_and_queries_are_escaped() {
        assert_eq!(segment("a b/ä?"), "a%20b%2F%C3%A4%3F");
        assert_eq!(
            query("/v1/messages", [("a", None), ("recipient", Some("+90 &"))]),
            "/v1/messages?recipient=%2B90+%26"
        );
        assert_eq!(query("/v1/messages", [("a", None)]), "/v1/messages");
    }
}
