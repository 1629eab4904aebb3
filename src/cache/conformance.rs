//! The cache's conformance suite.
