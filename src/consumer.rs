//! Begun, delivered, recorded.
