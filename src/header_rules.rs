//! Which request headers a message may set. The API refuses by these rules, and a delivery obeys them.

/// Headers of a message at most. Apache httpd takes 100 in a request (`LimitRequestFields`), and a delivery adds its own.
pub const HEADERS_MAX: usize = 64;

/// Bytes of a message's headers at most, names and values together. Node.js takes 16 KiB in a request
/// (`--max-http-header-size`); more would be refused by most receivers.
pub const HEADERS_BYTES_MAX: usize = 16 << 10;

/// Headers that we set ourselves, and those that decide how a request is framed (RFC 9110, section 7.6.1; RFC 9112,
/// section 6).
const RESERVED: &[&str] = &[
    "connection",
    "content-length",
    "content-type",
    "expect",
    "host",
    "idempotency-key",
    "keep-alive",
    "te",
    "trailer",
    "transfer-encoding",
    "upgrade",
    "user-agent",
];

/// Beginnings of names that are ours, of Standard Webhooks, or meant for proxies.
const RESERVED_PREFIXES: &[&str] = &["ams-", "proxy-", "webhook-"];

/// Whether a message may not set the header of this name, which is in lower case.
pub fn is_reserved(name: &str) -> bool {
    RESERVED.contains(&name) || RESERVED_PREFIXES.iter().any(|prefix| name.starts_with(prefix))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_frames_a_request_and_what_is_ours_is_reserved() {
        for name in ["host", "content-length", "webhook-id", "ams-attempt", "proxy-authorization"] {
            assert!(is_reserved(name), "{name}");
        }
        for name in ["authorization", "x-webhook-id", "accept", "ams", "proxy"] {
            assert!(!is_reserved(name), "{name}");
        }
    }
}
