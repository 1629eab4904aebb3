//! What was taken from the lane and is neither admitted nor held yet.

use std::collections::VecDeque;
use std::sync::Arc;

use super::early::Early;
use crate::clock::{Instant, Now, Timestamp};
use crate::queue::{Receipt, Taken};
use crate::ticket::Ticket;

/// Records that are read together: a millisecond's work, so that attempts wait no longer for their turn.
const GROUP: usize = 100;

#[derive(Default)]
pub(super) struct Arrivals {
    /// Records that are not read yet.
    taken: VecDeque<Taken>,
    /// Tickets ahead of their time.
    pub(super) early: Early<Arrival>,
    /// Tickets whose endpoint will take them in a moment.
    pub(super) admission: VecDeque<Arrival>,
}

/// A ticket that was taken from the lane.
pub(super) struct Arrival {
    pub(super) ticket: Arc<Ticket>,
    /// When it was published, or due if that was later.
    pub(super) ready_at: Timestamp,
    /// When it is due, if it came ahead of that: of an endpoint with a rate the time that is reserved for it.
    pub(super) due_at: Option<Instant>,
    pub(super) receipt: Receipt,
}

impl Arrivals {
    /// Whether nothing is here but what is ahead of its time.
    pub(super) fn is_empty(&self) -> bool {
        self.taken.is_empty() && self.admission.is_empty()
    }

    /// Keeps records to be read.
    pub(super) fn take(&mut self, batch: Vec<Taken>) {
        self.taken.extend(batch);
    }

    /// Whether records are to be read now: not while tickets wait for admission.
    pub(super) fn has_unread(&self) -> bool {
        !self.taken.is_empty() && self.admission.is_empty()
    }

    /// The next records to be read.
    pub(super) fn unread(&mut self) -> Vec<Taken> {
        self.taken.drain(..self.taken.len().min(GROUP)).collect()
    }

    /// Keeps a ticket, for its admission or until its time. One of an endpoint with a rate is let in ahead of its time,
    /// because its attempt is to begin at that time, however long the store takes to begin it.
    pub(super) fn keep(&mut self, mut ticket: Ticket, taken: &Taken, rated: bool, now: Now) {
        let (receipt, ready_at) = (taken.receipt, taken.published_at);
        // No ticket is more than that ahead: if it seems so, our clock is behind the producer's.
        let due_at = ticket.due_at.take().map(|at| at.min(now.time.after(Ticket::AHEAD)));
        let ready_at = due_at.map_or(ready_at, |at| ready_at.max(at));
        let ahead = due_at.filter(|at| *at > now.time).map(|at| now.instant.after(at.since(now.time)));
        let arrival = Arrival { ticket: Arc::new(ticket), ready_at, due_at: ahead, receipt };
        match ahead {
            Some(due_at) if !rated => self.early.keep(arrival, due_at),
            _ => self.admission.push_back(arrival),
        }
    }

    /// Lets tickets whose time has come wait for their admission.
    pub(super) fn admit_due(&mut self, now: Instant) {
        self.admission.extend(std::iter::from_fn(|| self.early.take(now)));
    }
}
