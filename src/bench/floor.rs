//! The floor: what the parts themselves cost for the same job, by code that shares nothing with the engine.
//!
//! Each stage that a message can't do without runs alone, on tables of its own: minimal statements in large groups,
//! bare librdkafka, Redis by pipeline, a hand-written HTTP client with signed requests against the receiver that the
//! system delivers to. It keeps no promise: nothing is guarded, leased, retried or repaired.

pub(super) mod http;
mod kafka;
mod postgres;
mod redis;
mod sqlite;

use std::collections::BTreeMap;
use std::net::SocketAddr;

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use ring::hmac;

use super::cpu::{Usage, Watched};
use super::receiver::Receiver;
use super::testbed::Testbed;
use crate::app::Result;

/// Messages in one group, as the system has them in a claim.
const GROUP: usize = 2_000;
/// Connections of the client. With 16 to 128 a message costs the same (measured with a prototype).
const CONNECTIONS: usize = 32;
/// What a receiver answers, and is stored and cached.
const ANSWER: &str = r#"{"message":"Accepted","messageId":"00000000-0000-4000-8000-000000000000"}"#;
const PROVIDER_ID: &str = "00000000-0000-4000-8000-000000000000";
const RECIPIENT: &str = "+905551111111";
const CREATED_AT: &str = "2026-01-01T00:00:00.000000Z";

/// What the stages cost.
#[derive(Clone, Debug, Default)]
pub(super) struct Floor {
    /// CPU µs a message by stage, over all processes.
    pub(super) stages: BTreeMap<String, f64>,
    /// CPU µs a message by process, over all stages. `client` is the floor itself.
    pub(super) processes: BTreeMap<String, f64>,
}

impl Floor {
    /// CPU µs a message, in all.
    pub(super) fn us(&self) -> f64 {
        self.processes.values().sum()
    }
}

/// What is measured, and where.
#[derive(Clone, Copy)]
struct Job<'a> {
    testbed: &'a Testbed,
    /// What each message says.
    content: &'a str,
    /// How many messages.
    count: usize,
}

/// Counts the CPU time of the stages.
struct Meter<'a> {
    /// The processes that work for the floor, as they are now: PostgreSQL has one for each connection.
    watched: &'a dyn Fn() -> Vec<Watched>,
    count: f64,
    floor: Floor,
}

impl Meter<'_> {
    fn start(&self) -> Usage {
        Usage::of(&(self.watched)())
    }

    /// Books what was used since `before` under a stage.
    fn stop(&mut self, stage: &str, before: &Usage) {
        for (process, us) in self.start().cpu_us_since(before) {
            *self.floor.processes.entry(process).or_default() += us / self.count;
            *self.floor.stages.entry(stage.to_owned()).or_default() += us / self.count;
        }
    }
}

/// Measures all stages once with `count` messages.
///
/// # Errors
/// When a part can't be reached or refuses.
pub(super) async fn measure(
    testbed: &Testbed,
    receiver: &Receiver,
    count: usize,
    payload: usize,
) -> Result<Floor> {
    let content = "x".repeat(payload);
    let own = [("receiver", receiver.pid()), ("client", std::process::id())];
    let watched = || {
        let own = own.map(|(name, pid)| Watched { name: name.to_owned(), pid });
        testbed.parts().into_iter().chain(own).collect()
    };
    let mut meter = Meter { watched: &watched, count: count as f64, floor: Floor::default() };
    let job = Job { testbed, content: &content, count };
    if testbed.is_full() {
        postgres::measure(job, &mut meter).await?;
        kafka::measure(job, &mut meter).await?;
        redis::measure(job, &mut meter).await?;
    } else {
        sqlite::measure(job, &mut meter).await?;
    }
    post(receiver.address(), job, &mut meter).await?;
    Ok(meter.floor)
}

/// Delivers all messages with signed requests.
async fn post(
    receiver: SocketAddr,
    Job { content, count, .. }: Job<'_>,
    meter: &mut Meter<'_>,
) -> Result<()> {
    let content = content.to_owned();
    let key = hmac::Key::new(hmac::HMAC_SHA256, b"a secret of 24 bytes ...");
    let before = meter.start();
    let client = http::Client { address: receiver, connections: CONNECTIONS, count };
    client.run(move |i, request| write_signed(request, receiver, &key, i, &body(i, &content))).await?;
    meter.stop("post and receive", &before);
    Ok(())
}

/// The body of a message, as the receiver reads it.
fn body(i: usize, content: &str) -> String {
    format!(r#"{{"id":{i},"recipient":"{RECIPIENT}","content":"{content}","created_at":"{CREATED_AT}"}}"#)
}

/// Writes a signed request, by the Standard Webhooks specification.
fn write_signed(request: &mut Vec<u8>, to: SocketAddr, key: &hmac::Key, i: usize, body: &str) {
    let mut context = hmac::Context::with_key(key);
    context.update(format!("msg_{i}.1767225600.").as_bytes());
    context.update(body.as_bytes());
    let signature = STANDARD.encode(context.sign());
    let head = format!(
        "POST / HTTP/1.1\r\nhost: {to}\r\ncontent-type: application/json\r\nwebhook-id: msg_{i}\r\n\
         webhook-timestamp: 1767225600\r\nwebhook-signature: v1,{signature}\r\ncontent-length: {}\r\n\r\n",
        body.len()
    );
    request.extend_from_slice(head.as_bytes());
    request.extend_from_slice(body.as_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn stages_and_processes_add_up_to_the_same() {
        let mut meter = Meter {
            watched: &|| vec![Watched { name: "client".into(), pid: std::process::id() }],
            count: 10.0,
            floor: Floor::default(),
        };
        for stage in ["claim", "record", "claim"] {
            let before = meter.start();
            let mut sum = 0_u64;
            while meter.start().cpu_us_since(&before)["client"] < 10_000.0 {
                sum = (0..100_000_u64).fold(sum, |a, b| a.wrapping_mul(31).wrapping_add(b));
            }
            assert_ne!(sum, 1);
            meter.stop(stage, &before);
        }
        let stages: f64 = meter.floor.stages.values().sum();
        assert!((stages - meter.floor.us()).abs() < 0.001 && stages >= 3_000.0, "{:?}", meter.floor);
        assert!(meter.floor.stages["claim"] > meter.floor.stages["record"]);
    }

    #[test]
    fn a_request_is_signed_over_its_id_time_and_body() {
        let key = hmac::Key::new(hmac::HMAC_SHA256, b"secret");
        let to = SocketAddr::from(([127, 0, 0, 1], 80));
        let mut request = Vec::new();
        write_signed(&mut request, to, &key, 7, "Hi");
        let text = String::from_utf8(request).unwrap();
        let signature = STANDARD.encode(hmac::sign(&key, b"msg_7.1767225600.Hi"));
        assert!(text.contains(&format!("webhook-signature: v1,{signature}\r\n")), "{text}");
        assert!(text.ends_with("content-length: 2\r\n\r\nHi"), "{text}");
    }
}
