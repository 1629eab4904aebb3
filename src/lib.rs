//! AMS, the automatic message system: **an `INSERT` is a send.**
//!
//! One message's story, room by room; the modules below stand in the order it walks.
//!
//! 1. It *enters*: a row in `messages`, inserted by anyone in their own transaction, or by [`intake`]
//!    for the [`api`].
//! 2. The [`producer`] claims it from the [`store`], in a batch with others, and puts a [`ticket`] on a lane of the
//!    [`queue`].
//! 3. A [`consumer`] takes the ticket, begins the message (the guarded write that makes a repeated
//!    ticket harmless), and hands it to [`delivery`].
//! 4. [`retry`] judges the outcome: sent, retry at a time, or dead. A [`breaker`] keeps an endpoint that fails for long
//!    from using its messages up.
//! 5. The consumer records the verdict and the attempt, tells the [`cache`], and is done with the ticket.
//! 6. What died on the way is issued again by the [`janitor`].
//!
//! Rooms never call each other: they meet in the store and the queue, so that each can be a process
//! of its own. Dependencies point one way, from the bottom of this list to the top; `tests/tidy.rs` checks it.

#![deny(clippy::unwrap_used)]

pub mod breaker;
pub mod clock;
pub mod header_rules;
pub mod lane;
pub mod message;
pub mod rate;
pub mod redact;
pub mod retry;
pub mod shortage;
pub mod telemetry;
pub mod ticket;

pub mod cache;
pub mod queue;
pub mod store;

pub mod delivery;
pub mod keys;
pub mod service;

pub mod dead_letter;
pub mod publish;

pub mod intake;
pub mod producer;

pub mod consumer;
pub mod janitor;

pub mod api;
pub mod testclient;

pub mod config;

pub mod app;
pub mod bench;
pub mod cli;
