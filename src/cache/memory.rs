//! The cache in this process.
