//! The request to an endpoint, as the contract describes it.

use std::fmt;

use bytes::Bytes;
use http_body_util::Full;
use hyper::header::{CONTENT_TYPE, HOST, HeaderMap, HeaderName, HeaderValue, USER_AGENT};
use hyper::{Method, Request};
use serde::Serialize;
use serde::de::{Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;
use uuid::Uuid;

use super::signature::Key;
use super::target::Target;
use crate::clock::Timestamp;
use crate::header_rules::{HEADERS_BYTES_MAX, HEADERS_MAX, is_reserved};
use crate::message::MessageId;
use crate::ticket::Ticket;

const WEBHOOK_ID: HeaderName = HeaderName::from_static("webhook-id");
const WEBHOOK_TIMESTAMP: HeaderName = HeaderName::from_static("webhook-timestamp");
const WEBHOOK_SIGNATURE: HeaderName = HeaderName::from_static("webhook-signature");
const IDEMPOTENCY_KEY: HeaderName = HeaderName::from_static("idempotency-key");
const AMS_ATTEMPT: HeaderName = HeaderName::from_static("ams-attempt");

#[derive(Serialize)]
struct Envelope<'a> {
    id: MessageId,
    recipient: &'a str,
    content: &'a str,
    created_at: Timestamp,
}

/// Writes the requests of one installation.
#[derive(Debug)]
pub(super) struct Writer {
    /// What every `webhook-id` of this installation begins with.
    prefix: String,
}

impl Writer {
    pub(super) fn new(installation: Uuid) -> Writer {
        let mut hex = installation.simple().to_string();
        hex.truncate(12);
        Writer { prefix: format!("msg_{hex}_") }
    }

    /// The request for one try of `ticket`, made at `now`.
    ///
    /// # Errors
    /// One sentence on why the message can't be sent as it is.
    pub(super) fn write(
        &self,
        ticket: &Ticket,
        target: &Target,
        key: Option<&Key>,
        now: Timestamp,
    ) -> Result<Request<Full<Bytes>>, String> {
        let impossible = |_| "a value can't be written as a header".to_owned();
        let id = HeaderValue::try_from(format!("{}{}", self.prefix, ticket.id)).map_err(impossible)?;
        let timestamp = HeaderValue::from(now.as_seconds());
        let body = body(ticket)?;
        let mut headers = HeaderMap::with_capacity(16);
        headers.insert(HOST, target.host.clone());
        headers.insert(
            USER_AGENT,
            const { HeaderValue::from_static(concat!("ams/", env!("CARGO_PKG_VERSION"))) },
        );
        headers.insert(CONTENT_TYPE, content_type(ticket)?);
        if let Some(key) = key {
            headers.insert(WEBHOOK_SIGNATURE, key.sign(id.as_bytes(), timestamp.as_bytes(), &body));
        }
        headers.insert(WEBHOOK_ID, id.clone());
        headers.insert(IDEMPOTENCY_KEY, id);
        headers.insert(WEBHOOK_TIMESTAMP, timestamp);
        headers.insert(AMS_ATTEMPT, HeaderValue::from(ticket.attempt));
        if let Some(extra) = &ticket.headers {
            add(&mut headers, extra)?;
        }
        let mut request = Request::new(Full::new(body));
        *request.method_mut() = Method::POST;
        *request.uri_mut() = target.path.clone();
        *request.headers_mut() = headers;
        Ok(request)
    }
}

fn body(ticket: &Ticket) -> Result<Bytes, String> {
    if ticket.content_type.is_some() {
        return Ok(Bytes::copy_from_slice(ticket.content.as_bytes()));
    }
    // Room for the names, the id, the time and a few escapes.
    let mut body = Vec::with_capacity(ticket.content.len() + ticket.recipient.len() + 128);
    let envelope = Envelope {
        id: ticket.id,
        recipient: &ticket.recipient,
        content: &ticket.content,
        created_at: ticket.created_at,
    };
    serde_json::to_writer(&mut body, &envelope)
        .map_err(|error| format!("the message can't be written as JSON: {error}"))?;
    Ok(body.into())
}

fn content_type(ticket: &Ticket) -> Result<HeaderValue, String> {
    match &ticket.content_type {
        None => Ok(HeaderValue::from_static("application/json")),
        Some(text) => HeaderValue::try_from(text)
            .map_err(|_| "its content type can't be written as a header".to_owned()),
    }
}

/// Adds a message's own headers.
fn add(headers: &mut HeaderMap, extra: &RawValue) -> Result<(), String> {
    let Extra(pairs) = serde_json::from_str(extra.get())
        .map_err(|_| "its headers are not a JSON object of strings".to_owned())?;
    if pairs.len() > HEADERS_MAX {
        return Err(format!("it has more than {HEADERS_MAX} headers"));
    }
    if pairs.iter().map(|(name, value)| name.len() + value.len()).sum::<usize>() > HEADERS_BYTES_MAX {
        return Err(format!("its headers are larger than {HEADERS_BYTES_MAX} bytes"));
    }
    for (name, value) in pairs {
        let key = HeaderName::try_from(&name)
            .map_err(|_| format!("`{}` is no header name", name.escape_debug()))?;
        let lower = key.as_str();
        if is_reserved(lower) {
            return Err(format!("the header `{lower}` can't be set by a message"));
        }
        let value = HeaderValue::try_from(value)
            .map_err(|_| format!("the value of the header `{lower}` can't be written as one"))?;
        headers.insert(key, value);
    }
    Ok(())
}

/// A JSON object of strings.
struct Extra(Vec<(String, String)>);

impl<'de> serde::Deserialize<'de> for Extra {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Extra, D::Error> {
        struct Pairs;
        impl<'de> Visitor<'de> for Pairs {
            type Value = Extra;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of strings")
            }

            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Extra, A::Error> {
                let mut pairs = Vec::new();
                while let Some(pair) = map.next_entry()? {
                    pairs.push(pair);
                }
                Ok(Extra(pairs))
            }
        }
        deserializer.deserialize_map(Pairs)
    }
}

#[cfg(test)]
mod tests {
    use http_body_util::BodyExt;

    use super::*;
    use crate::delivery::tests::ticket;

    fn write(ticket: &Ticket) -> Result<Request<Full<Bytes>>, String> {
        let installation = Uuid::parse_str("0123456789abcdef0123456789abcdef").unwrap();
        let target = Target::parse("http://localhost:3000/hook?a=b").unwrap();
        let now = Timestamp::parse("2026-11-23T10:00:00.9Z").unwrap();
        Writer::new(installation).write(ticket, &target, None, now)
    }

    fn with_headers(json: &str) -> Ticket {
        Ticket { headers: Some(RawValue::from_string(json.to_owned()).unwrap()), ..ticket(7) }
    }

    async fn body_of(request: Request<Full<Bytes>>) -> String {
        let bytes = request.into_body().collect().await.unwrap().to_bytes();
        String::from_utf8(bytes.to_vec()).unwrap()
    }

    #[tokio::test]
    async fn the_request_is_the_contracts() {
        let request = write(&ticket(7)).unwrap();
        assert_eq!(request.method(), "POST");
        assert_eq!(request.uri(), "/hook?a=b");
        for (name, value) in [
            ("host", "localhost:3000"),
            ("content-type", "application/json"),
            ("webhook-id", "msg_0123456789ab_7"),
            ("idempotency-key", "msg_0123456789ab_7"),
            ("webhook-timestamp", "1795428000"),
            ("ams-attempt", "2"),
            ("user-agent", concat!("ams/", env!("CARGO_PKG_VERSION"))),
        ] {
            assert_eq!(request.headers()[name], value, "{name}");
        }
        assert_eq!(request.headers().len(), 7);
        assert_eq!(
            body_of(request).await,
            r#"{"id":7,"recipient":"+905551111111","content":"Hi \"there\"","created_at":"2026-11-23T09:59:59Z"}"#
        );
    }

    #[tokio::test]
    async fn content_with_a_type_of_its_own_is_the_body() {
        let plain = Ticket { content_type: Some("text/plain; charset=utf-8".into()), ..ticket(7) };
        let request = write(&plain).unwrap();
        assert_eq!(request.headers()[CONTENT_TYPE], "text/plain; charset=utf-8");
        assert_eq!(body_of(request).await, "Hi \"there\"");
    }

    #[test]
    fn a_message_may_bring_headers() {
        let request = write(&with_headers(r#"{"X-Tenant":"a","traceparent":"00-1"}"#)).unwrap();
        assert_eq!(request.headers()["x-tenant"], "a");
        assert_eq!(request.headers()["traceparent"], "00-1");
    }

    #[test]
    fn headers_that_can_not_be_are_refused_by_name() {
        for (json, why) in [
            (r#"{"Webhook-Id":"x"}"#, "webhook-id"),
            (r#"{"webhook-anything":"x"}"#, "webhook-anything"),
            (r#"{"Content-Length":"3"}"#, "content-length"),
            (r#"{"content-type":"x"}"#, "content-type"),
            (r#"{"Host":"x"}"#, "host"),
            (r#"{"transfer-encoding":"chunked"}"#, "transfer-encoding"),
            (r#"{"connection":"close"}"#, "connection"),
            (r#"{"idempotency-key":"x"}"#, "idempotency-key"),
            (r#"{"ams-attempt":"9"}"#, "ams-attempt"),
            (r#"{"user-agent":"x"}"#, "user-agent"),
            (r#"{"x y":"z"}"#, "x y"),
            (r#"{"":"z"}"#, "no header name"),
            (r#"{"x":"a\r\nb: c"}"#, "`x`"),
            (r#"{"x":1}"#, "object of strings"),
            (r#"["x"]"#, "object of strings"),
        ] {
            let error = write(&with_headers(json)).unwrap_err();
            assert!(error.contains(why), "{json}: {error}");
        }
        let bad_type = Ticket { content_type: Some("text/plain\r\nx: y".into()), ..ticket(7) };
        assert!(write(&bad_type).unwrap_err().contains("content type"));
    }

    #[test]
    fn a_messages_headers_are_bounded() {
        let many: Vec<_> = (0..=HEADERS_MAX).map(|i| format!(r#""x-{i}":"""#)).collect();
        let large = format!(r#"{{"x":"{}"}}"#, "y".repeat(HEADERS_BYTES_MAX));
        for json in [format!("{{{}}}", many.join(",")), large] {
            let error = write(&with_headers(&json)).unwrap_err();
            assert!(error.contains("than"), "{error}");
        }
    }
}
