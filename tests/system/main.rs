//! The whole system through its public interfaces: real processes on real PostgreSQL, Kafka and Redis,
//! real receivers, and what goes wrong with all of them.
//!
//! Needs `DATABASE_URL`, `KAFKA_BROKERS` and `REDIS_URL` (`make test` sets them) and fails without. The
//! tests share the services and some of them kill those, so they run one at a time.

mod bench;
mod breaker;
mod broken;
mod calm;
mod clocks;
mod columns;
mod documents;
mod embedded;
mod faults;
mod harness;
mod hostile;
mod kills;
mod lanes;
mod memory;
mod neighbours;
mod observed;
mod operator;
mod proxy;
mod quickstart;
mod rates;
mod recreated;
mod restored;
mod roles;
mod shortage;
mod strangers;
mod upgrade;
