//! Which offset of a partition may be committed: everything before it is done with.

use std::collections::BTreeSet;

/// The contiguous low watermark of one assignment of one partition. Records are done in any order;
/// the committed position is the first offset that is not done.
#[derive(Debug, Default)]
pub struct Watermark {
    /// Offsets given out and not done.
    out: BTreeSet<i64>,
    /// One past the highest offset given out; `None` before the first.
    next: Option<i64>,
}

impl Watermark {
    /// Notes that the record at `offset` was given out. Offsets come in rising order; they may have
    /// gaps, because a broker keeps some for itself.
    pub fn take(&mut self, offset: i64) {
        self.out.insert(offset);
        self.next = Some(self.next.map_or(offset + 1, |next| next.max(offset + 1)));
    }

    /// Notes that the record at `offset` is done with. Saying so twice, or of an unknown one, does nothing.
    pub fn done(&mut self, offset: i64) {
        self.out.remove(&offset);
    }

    /// The offset that may be committed; `None` before the first record.
    pub fn position(&self) -> Option<i64> {
        self.out.first().copied().or(self.next)
    }

    /// How many records are out.
    pub fn out(&self) -> usize {
        self.out.len()
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_gap_holds_the_position_back() {
        let mut watermark = Watermark::default();
        assert_eq!(watermark.position(), None);
        for offset in [5, 6, 9] {
            watermark.take(offset);
        }
        watermark.done(6);
        assert_eq!(watermark.position(), Some(5));
        watermark.done(5);
        assert_eq!(watermark.position(), Some(9));
        watermark.done(9);
        assert_eq!((watermark.position(), watermark.out()), (Some(10), 0));
    }

    proptest! {
        #[test]
        fn never_passes_an_unfinished_record(order in Just((0..40_i64).collect::<Vec<_>>()).prop_shuffle(), n in 0..40_usize) {
            let mut watermark = Watermark::default();
            (0..40).for_each(|offset| watermark.take(offset));
            order[..n].iter().for_each(|offset| watermark.done(*offset));
            let first_open = order[n..].iter().min().copied().unwrap_or(40);
            prop_assert_eq!(watermark.position(), Some(first_open));
        }
    }
}
