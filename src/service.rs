//! The loop of every service, written once.
