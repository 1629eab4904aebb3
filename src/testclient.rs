//! The simulated external message service.
