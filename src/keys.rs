//! Keys of the API: how one is made and what of it is kept.
//!
//! `ams_`, eight characters that name it, `_`, and 256 random bits. Of the whole only its SHA-256 is
//! stored, which is enough for a secret that nobody can guess.

use base64::Engine;
use base64::prelude::BASE64_URL_SAFE_NO_PAD;
use ring::digest::{SHA256, digest};
use ring::rand::{SecureRandom, SystemRandom};

use crate::clock::Timestamp;
use crate::store::operate::ApiKey;

/// What every key begins with.
pub const KEY_PREFIX: &str = "ams_";
/// What keys may allow: to send, to look, to change.
pub const SCOPES: [&str; 3] = ["write", "read", "operate"];

/// Characters after the prefix that name a key.
const ID: usize = 8;
const LETTERS: &[u8; 32] = b"abcdefghijkmnpqrstuvwxyz23456789";

/// Makes a key: what is stored, and the whole, which is shown once.
///
/// # Errors
/// When the system has no random numbers, or a scope is none of [`SCOPES`].
pub fn make(
    name: &str,
    scopes: &[String],
    now: Timestamp,
    expires_at: Option<Timestamp>,
) -> Result<(ApiKey, String), String> {
    if let Some(unknown) = scopes.iter().find(|scope| !SCOPES.contains(&scope.as_str())) {
        return Err(format!("`{unknown}` is no scope; there are {}", SCOPES.join(", ")));
    }
    let mut random = [0; ID + 32];
    SystemRandom::new().fill(&mut random).map_err(|_| "the system has no random numbers".to_owned())?;
    let letters = random[..ID].iter().map(|byte| char::from(LETTERS[usize::from(byte % 32)]));
    let id: String = KEY_PREFIX.chars().chain(letters).collect();
    let whole = format!("{id}_{}", BASE64_URL_SAFE_NO_PAD.encode(&random[ID..]));
    let key = ApiKey {
        id,
        name: name.to_owned(),
        hash: digest(&SHA256, whole.as_bytes()).as_ref().to_vec(),
        scopes: scopes.to_vec(),
        created_at: now,
        expires_at,
        last_used_at: None,
        revoked_at: None,
    };
    Ok((key, whole))
}

/// The part of a key that names it.
pub fn id_of(key: &str) -> Option<&str> {
    let end = KEY_PREFIX.len() + ID;
    (key.starts_with(KEY_PREFIX) && key.get(end..).is_some_and(|rest| rest.starts_with('_')))
        .then(|| key.get(..end))
        .flatten()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_key_names_itself_and_no_two_are_alike() {
        let scopes = ["read".to_owned()];
        let (one, whole) = make("test", &scopes, Timestamp::EPOCH, None).unwrap();
        let (other, another) = make("test", &scopes, Timestamp::EPOCH, None).unwrap();
        assert_eq!(id_of(&whole), Some(one.id.as_str()));
        assert_ne!(whole, another);
        assert_ne!(one.hash, other.hash);
        assert_eq!(one.hash, digest(&SHA256, whole.as_bytes()).as_ref());
        assert!(!format!("{one:?}").contains(&whole[one.id.len() + 1..]));
    }

    #[test]
    fn what_is_no_key_has_no_name() {
        for text in ["", "ams_", "ams_abcdefgh", "ams_abcdefghi_x", "other", "ams_äää_x", "AMS_abcdefgh_x"]
        {
            assert_eq!(id_of(text), None, "{text}");
        }
        assert_eq!(id_of("ams_abcdefgh_x"), Some("ams_abcdefgh"));
        assert!(make("test", &["admin".to_owned()], Timestamp::EPOCH, None).is_err());
    }
}
