//! The store on SQLite, embedded.
