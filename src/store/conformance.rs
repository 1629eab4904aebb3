//! The store's conformance suite.
