//! Claimed and queued.
