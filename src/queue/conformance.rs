//! The queue's conformance suite.
