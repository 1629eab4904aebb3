//! Signs requests as Standard Webhooks describes it: HMAC-SHA256 over `id.timestamp.body`.

use base64::Engine as _;
use base64::engine::DecodePaddingMode;
use base64::engine::general_purpose::{GeneralPurpose, GeneralPurposeConfig, STANDARD};
use hyper::header::HeaderValue;
use ring::hmac;

const PREFIX: &str = "whsec_";

/// People copy secrets with and without the padding; both say the same.
const LENIENT: GeneralPurpose = GeneralPurpose::new(
    &base64::alphabet::STANDARD,
    GeneralPurposeConfig::new().with_decode_padding_mode(DecodePaddingMode::Indifferent),
);

/// An endpoint's secret, ready to sign with.
pub(super) struct Key(hmac::Key);

impl Key {
    /// Reads a secret: `whsec_` and base64.
    ///
    /// # Errors
    /// A few words on what is wrong with it, without the secret.
    pub(super) fn parse(secret: &str) -> Result<Key, String> {
        let Some(encoded) = secret.strip_prefix(PREFIX) else {
            return Err(format!("does not begin with `{PREFIX}`"));
        };
        match LENIENT.decode(encoded) {
            Ok(bytes) if !bytes.is_empty() => Ok(Key(hmac::Key::new(hmac::HMAC_SHA256, &bytes))),
            Ok(_) => Err("is empty".to_owned()),
            Err(_) => Err(format!("is not base64 after `{PREFIX}`")),
        }
    }

    /// The value of `webhook-signature`.
    pub(super) fn sign(&self, id: &[u8], timestamp: &[u8], body: &[u8]) -> HeaderValue {
        let mut context = hmac::Context::with_key(&self.0);
        for part in [id, b".", timestamp, b".", body] {
            context.update(part);
        }
        let mut value = String::with_capacity(3 + 44);
        value.push_str("v1,");
        STANDARD.encode_string(context.sign(), &mut value);
        // Base64 is made of characters that a header may carry.
        HeaderValue::try_from(value).unwrap_or_else(|_| HeaderValue::from_static("v1,"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signs_the_standards_own_example() {
        let key = Key::parse("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw").unwrap();
        let signature = key.sign(b"msg_p5jXN8AQM9LWM0D4loKWxJek", b"1614265330", br#"{"test": 2432232314}"#);
        assert_eq!(signature, "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=");
    }

    #[test]
    fn padding_may_be_missing() {
        let body = b"{}";
        let [padded, bare] = ["whsec_c2VjcmV0cw==", "whsec_c2VjcmV0cw"]
            .map(|secret| Key::parse(secret).unwrap().sign(b"msg_1", b"1", body));
        assert_eq!(padded, bare);
    }

    #[test]
    fn bad_secrets_are_explained_without_being_told() {
        for (secret, why) in [("hunter2", "whsec_"), ("whsec_", "empty"), ("whsec_hunter2!", "base64")] {
            let error = Key::parse(secret).map(|_| ()).unwrap_err();
            assert!(error.contains(why), "{error}");
            assert!(!error.contains("hunter2"), "{error}");
        }
    }
}
