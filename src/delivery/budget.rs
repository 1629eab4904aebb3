//! How many connections the deliveries of this process may have open, idle ones included.
//!
//! The bound lies below the process's limit of open files, so that store, queue, API and log keep theirs. And one
//! receiver may use no more of it than what is left for all others: one that hangs ends up with half, two with
//! a third each, and a healthy one always finds some. (The rule by which `limits` shares out the window.)

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

/// The connections of all origins.
#[derive(Debug)]
pub(super) struct Budget {
    max: usize,
    /// Open, or being opened.
    open: AtomicUsize,
    /// Open and not in use.
    idle: AtomicUsize,
}

/// The part of the budget that one connection has, from before it is opened until after it is closed.
#[derive(Debug)]
pub(super) struct Permit {
    budget: Arc<Budget>,
    /// Counts the permits of one origin.
    of_origin: Arc<AtomicUsize>,
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.of_origin.fetch_sub(1, Ordering::Relaxed);
        self.budget.open.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Budget {
    pub(super) fn new(max: usize) -> Arc<Budget> {
        Arc::new(Budget { max: max.max(1), open: AtomicUsize::new(0), idle: AtomicUsize::new(0) })
    }

    /// Connections that may be open at once.
    pub(super) fn max(&self) -> usize {
        self.max
    }

    /// How many of them are in use or being opened.
    pub(super) fn in_use(&self) -> usize {
        self.open.load(Ordering::Relaxed).saturating_sub(self.idle())
    }

    pub(super) fn idle(&self) -> usize {
        self.idle.load(Ordering::Relaxed)
    }

    /// Whether an origin that uses `own` connections may have one more, when idle ones of others make room.
    pub(super) fn has_share(&self, own: usize) -> bool {
        own < self.max.saturating_sub(self.in_use())
    }

    /// Takes a permit, unless all are taken.
    pub(super) fn take(self: &Arc<Self>, of_origin: &Arc<AtomicUsize>) -> Option<Arc<Permit>> {
        let one_more = |open| (open < self.max).then_some(open + 1);
        self.open.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_more).ok()?;
        of_origin.fetch_add(1, Ordering::Relaxed);
        Some(Arc::new(Permit { budget: Arc::clone(self), of_origin: Arc::clone(of_origin) }))
    }

    /// Notes that a connection is idle from now on.
    pub(super) fn rests(&self) {
        self.idle.fetch_add(1, Ordering::Relaxed);
    }

    /// Notes that `count` connections are not idle any more: in use, or closed.
    pub(super) fn leave_rest(&self, count: usize) {
        self.idle.fetch_sub(count, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Takes all that one origin may use.
    fn fill(budget: &Arc<Budget>) -> Vec<Arc<Permit>> {
        let origin = Arc::default();
        let mut permits = Vec::new();
        while budget.has_share(permits.len()) {
            permits.push(budget.take(&origin).expect("what is left is more than its own"));
        }
        permits
    }

    #[test]
    fn a_receiver_leaves_as_much_as_it_uses() {
        let budget = Budget::new(48);
        let hangs = fill(&budget);
        let hangs_too = fill(&budget);
        let healthy = fill(&budget);
        assert_eq!((hangs.len(), hangs_too.len(), healthy.len()), (24, 12, 6));
        drop(hangs);
        assert_eq!((budget.in_use(), fill(&budget).len()), (18, 15));
        drop((hangs_too, healthy));
        assert_eq!(budget.in_use(), 0);
    }

    #[test]
    fn the_bound_is_never_passed() {
        let budget = Budget::new(3);
        let origin = Arc::default();
        let permits: Vec<_> = (0..5).filter_map(|_| budget.take(&origin)).collect();
        assert_eq!((permits.len(), origin.load(Ordering::Relaxed)), (3, 3));
        assert!(!budget.has_share(0));
        // Idle ones can be closed for another origin, and still have their permits until they are.
        budget.rests();
        assert!(budget.has_share(0) && budget.take(&origin).is_none());
        budget.leave_rest(1);
        drop(permits);
        assert_eq!((budget.in_use(), origin.load(Ordering::Relaxed)), (0, 0));
        assert!(Budget::new(0).take(&origin).is_some(), "a bound of none is one");
    }
}
