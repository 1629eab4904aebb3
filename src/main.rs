//! AMS binary.
fn main() {}
