//! The idempotency keys of an import: by what a line says, not by where it stands.

use std::collections::{BTreeMap, HashMap};
use std::fmt::Write as _;

use ring::digest::{SHA256, digest};
use serde_json::{Map, Value};

use super::hashed::hex;

/// Gives each message its key: the import's name, a digest of the message, and which of several equal messages
/// it is. So a file that is mended, sorted or written anew sends only what is new in it.
pub(super) struct Keys {
    name: String,
    /// How often messages of a digest were there; of the digest its first 64 bits, so that this costs 20 to 40
    /// bytes a line. Should two messages share those, their keys still differ.
    seen: HashMap<u64, u32>,
}

impl Keys {
    pub(super) fn new(name: &str) -> Keys {
        Keys { name: name.to_owned(), seen: HashMap::new() }
    }

    /// The message with its key, unless it has one of its own. To be asked for every message of the source in
    /// order, also for those that are not sent again.
    pub(super) fn give(&mut self, mut message: Map<String, Value>) -> Value {
        message.retain(|_, value| !value.is_null());
        if !message.contains_key("idempotency_key") {
            let mut text = String::new();
            canonical(message.iter(), &mut text);
            let digest = digest(&SHA256, text.as_bytes());
            let first = digest.as_ref().iter().take(8).fold(0, |all, byte| all << 8 | u64::from(*byte));
            let count = self.seen.entry(first).or_default();
            *count = count.saturating_add(1);
            let key = format!("import:{}:{}:{count}", self.name, hex(&digest));
            message.insert("idempotency_key".to_owned(), Value::from(key));
        }
        Value::Object(message)
    }
}

/// Writes an object in one way, in whatever order its fields came.
fn canonical<'a>(fields: impl Iterator<Item = (&'a String, &'a Value)>, text: &mut String) {
    text.push('{');
    for (name, value) in fields.collect::<BTreeMap<_, _>>() {
        // A text takes whatever is written to it.
        let _ = write!(text, "{}:", Value::from(name.as_str()));
        canonical_value(value, text);
        text.push(',');
    }
    text.push('}');
}

fn canonical_value(value: &Value, text: &mut String) {
    match value {
        Value::Object(fields) => canonical(fields.iter(), text),
        Value::Array(values) => {
            text.push('[');
            for value in values {
                canonical_value(value, text);
                text.push(',');
            }
            text.push(']');
        }
        // A text takes whatever is written to it.
        other => drop(write!(text, "{other}")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn key(keys: &mut Keys, text: &str) -> String {
        let Ok(Value::Object(message)) = serde_json::from_str(text) else { panic!("{text}") };
        keys.give(message)["idempotency_key"].as_str().unwrap().to_owned()
    }

    #[test]
    fn equal_messages_are_numbered_however_they_are_written() {
        let mut keys = Keys::new("list");
        let first =
            key(&mut keys, r#"{"recipient": "+90", "content": "a", "tags": {"x": [1, {"b": 2, "a": 1}]}}"#);
        let (start, digest) = (&first[..12], first[12..].split(':').next().unwrap());
        assert_eq!((start, digest.len(), first.ends_with(":1")), ("import:list:", 32, true), "{first}");
        for (written, expected) in [
            (r#"{"tags":{"x":[1,{"a":1,"b":2}]},"content":"\u0061","recipient":"+90"}"#, 2),
            (
                r#"{"content":"a","recipient":"+90","tags":{"x":[1,{"b":2,"a":1}]},"send_at":null,"idempotency_key":null}"#,
                3,
            ),
        ] {
            assert_eq!(key(&mut keys, written), format!("import:list:{digest}:{expected}"));
        }
        for other in [
            r#"{"recipient":"+90","content":"a"}"#,
            r#"{"recipient":"+90","content":"a","tags":{"x":[{"b":2,"a":1},1]}}"#,
            r#"{"recipient":"a","content":"+90","tags":{"x":[1,{"b":2,"a":1}]}}"#,
        ] {
            let other = key(&mut keys, other);
            assert!(!other.contains(digest) && other.ends_with(":1"), "{other}");
        }
        assert!(
            key(&mut Keys::new("other"), r#"{"recipient":"+90","content":"a"}"#).starts_with("import:other:")
        );
    }

    #[test]
    fn a_key_of_its_own_stays_and_the_longest_fits() {
        let mut keys = Keys::new(&"ä".repeat(super::super::NAME_MAX));
        assert_eq!(key(&mut keys, r#"{"idempotency_key":"mine"}"#), "mine");
        let long = key(&mut keys, "{}").trim_end_matches('1').to_owned() + &u32::MAX.to_string();
        assert!(long.chars().count() <= 255, "{long}");
    }
}
