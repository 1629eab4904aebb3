//! When claims pass by the new rows of busy endpoints. Pure.
//!
//! To hold a row costs the store about half of what sending one does. So while there is more to claim than time,
//! rows of busy endpoints are left where they are, and held a few at a time. Only so many are left, because
//! each look behind the cursor reads them.

/// Rows that may be left behind the cursor, and numbers after it that one claim looks at: to read so many takes
/// about 5 ms.
pub(super) const LEFT_MAX: i64 = 10_000;

/// What the claims of new rows have come to lately.
#[derive(Debug, Default)]
pub(super) struct Passing {
    /// Whether the last claim took all that it was allowed to.
    pressed: bool,
    /// Rows left behind the cursor, at most.
    left: usize,
}

impl Passing {
    /// Whether the next claim is to leave the rows of busy endpoints.
    pub(super) fn passes(&self) -> bool {
        self.pressed && self.left < LEFT_MAX as usize
    }

    /// Whether rows may have been left behind the cursor.
    pub(super) fn has_left(&self) -> bool {
        self.left > 0
    }

    /// Notes a claim after the cursor: whether it took all that it was allowed to, and how many rows, at most,
    /// the cursor has gone past that it did not take.
    pub(super) fn claimed(&mut self, full: bool, left: usize) {
        self.pressed = full;
        self.left = self.left.saturating_add(left);
    }

    /// Notes that a look behind the cursor has held some of those that were left, and found no more; or so many
    /// of them, and there may be more.
    pub(super) fn held(&mut self, rows: Option<usize>) {
        self.left = rows.map_or(0, |rows| self.left.saturating_sub(rows).max(1));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_are_left_while_there_is_more_to_claim() {
        let mut passing = Passing::default();
        assert!(!passing.passes(), "at rest they are held at once");
        passing.claimed(true, 0);
        assert!(passing.passes() && !passing.has_left());
        passing.claimed(true, 700);
        assert!(passing.passes() && passing.has_left());
        passing.claimed(false, 100);
        assert!(!passing.passes() && passing.has_left(), "the others are taken");
    }

    #[test]
    fn what_was_left_is_forgotten_once_no_more_is_found() {
        let mut passing = Passing::default();
        passing.claimed(true, 800);
        passing.held(Some(500));
        assert!(passing.has_left());
        passing.held(Some(500));
        assert!(passing.has_left(), "rows that committed late came on top");
        passing.held(None);
        assert!(!passing.has_left());
    }

    #[test]
    fn no_more_than_the_bound_are_left() {
        let mut passing = Passing::default();
        passing.claimed(true, LEFT_MAX as usize - 1);
        assert!(passing.passes());
        passing.claimed(true, 1);
        assert!(!passing.passes());
        passing.held(Some(500));
        assert!(passing.passes());
        passing.claimed(true, usize::MAX);
        assert!(!passing.passes());
    }
}
