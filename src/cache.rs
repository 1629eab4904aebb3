//! A hint, never the truth: the receiver's last answer for each message, for whoever asks soon.
//!
//! A cache may forget anything at any time, and while it is away nothing else slows down or fails.

#[cfg(test)]
pub(crate) mod conformance;
pub mod memory;
pub mod redis;

use std::time::Duration;

use async_trait::async_trait;
use serde::{Deserialize, Serialize};

use crate::clock::Timestamp;
use crate::message::MessageId;

/// How long a cached answer lives.
pub const TIME_TO_LIVE: Duration = Duration::from_secs(24 * 3600);

/// The cache did not do what was asked. There is nothing a caller can do but go on without.
#[derive(Clone, Debug, thiserror::Error)]
#[error("the cache is unavailable: {0}")]
pub struct CacheError(pub String);

/// The result of a cache call.
pub type Result<T> = std::result::Result<T, CacheError>;

/// A receiver's answer, as `ams:response:{id}` keeps it.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Response {
    pub message: Option<String>,
    pub message_id: Option<String>,
    /// The answer's status code.
    pub status: u16,
    pub timestamp: Timestamp,
}

/// The cache. Every call ends within about a second, whatever the other side does.
#[async_trait]
pub trait Cache: Send + Sync + 'static {
    /// `redis` or `memory`.
    fn kind(&self) -> &'static str;

    /// Keeps these answers, each for [`TIME_TO_LIVE`], in one round trip.
    async fn put(&self, responses: &[(MessageId, Response)]) -> Result<()>;

    /// The answer for a message, if it is still known.
    async fn get(&self, id: MessageId) -> Result<Option<Response>>;

    /// Whether it answers.
    async fn ping(&self) -> Result<()>;
}
