//! What happened in a run, counted.

use std::collections::BTreeMap;
use std::fmt;

/// How often what happened.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Report(BTreeMap<&'static str, u64>);

/// What has to happen in a hundred runs: else the simulation proves less than it says.
const EXPECTED: &[&str] = &[
    "sent",
    "dead",
    "cancelled",
    "expired",
    "hidden acceptances",
    "duplicates",
    "crashes",
    "clean stops",
    "faults of the store",
    "faults of the queue",
    "faults of the cache",
    "outages of the store",
    "outages of the queue",
    "outages of the cache",
    "half-published batches",
    "wipes of the queue",
    "losses of newest records",
    "rebalances",
    "wipes of the cache",
    "shortages",
    "messages cancelled",
    "messages redriven",
    "pauses",
    "closed endpoints",
    "deliveries held",
    "deliveries freed",
    "breakers opened",
    "breakers closed",
    "batches reissued",
    "leases reissued",
    "steps of the machine's clock",
    "steps of the store's clock",
    "steps of one host's clock",
    "answers in the cache",
    "dead letters published",
];

impl Report {
    pub fn count(&mut self, what: &'static str, times: u64) {
        *self.0.entry(what).or_default() += times;
    }

    /// Keeps the largest number that was seen.
    pub fn most(&mut self, what: &'static str, number: u64) {
        let most = self.0.entry(what).or_default();
        *most = (*most).max(number);
    }

    pub fn add(&mut self, other: &Report) {
        for (what, number) in &other.0 {
            if what.starts_with("most ") { self.most(what, *number) } else { self.count(what, *number) }
        }
    }

    /// What should have happened, and has not.
    pub fn missing(&self) -> Vec<&'static str> {
        EXPECTED.iter().copied().filter(|what| self.0.get(what).is_none_or(|times| *times == 0)).collect()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let counts: Vec<_> = self.0.iter().map(|(what, times)| format!("{times} {what}")).collect();
        f.write_str(&counts.join(", "))
    }
}
