//! One bit for each position of a batch.

use crate::store::BATCH_MAX;

const BYTES: usize = BATCH_MAX / 8;

/// Positions of a batch. Masks of all batches have the same length, so that any two can be combined; positions
/// beyond a batch's last delivery are never set.
#[derive(Clone, PartialEq, Eq)]
pub struct Mask([u8; BYTES]);

impl Mask {
    /// No position.
    pub const EMPTY: Mask = Mask([0; BYTES]);

    /// The first `count` positions.
    pub fn first(count: usize) -> Mask {
        (0..count.min(BATCH_MAX)).collect()
    }

    /// Adds a position; one that no batch has is ignored.
    pub fn set(&mut self, position: usize) {
        if let Some(byte) = self.0.get_mut(position / 8) {
            *byte |= bit(position);
        }
    }

    /// Takes a position out.
    pub fn clear(&mut self, position: usize) {
        if let Some(byte) = self.0.get_mut(position / 8) {
            *byte &= !bit(position);
        }
    }

    /// Whether a position is in it.
    pub fn has(&self, position: usize) -> bool {
        self.0.get(position / 8).is_some_and(|byte| byte & bit(position) != 0)
    }

    /// How many positions are in it.
    pub fn count(&self) -> usize {
        self.0.iter().map(|byte| byte.count_ones() as usize).sum()
    }

    /// Whether no position is in it.
    pub fn is_empty(&self) -> bool {
        self.0.iter().all(|byte| *byte == 0)
    }

    /// The positions that are in both.
    pub fn and(&self, other: &Mask) -> Mask {
        let mut both = self.clone();
        both.0.iter_mut().zip(other.0).for_each(|(byte, other)| *byte &= other);
        both
    }

    /// The positions that are not in `other`.
    pub fn without(&self, other: &Mask) -> Mask {
        let mut rest = self.clone();
        rest.0.iter_mut().zip(other.0).for_each(|(byte, other)| *byte &= !other);
        rest
    }

    /// The positions, in order.
    pub fn positions(&self) -> impl Iterator<Item = usize> + '_ {
        (0..BATCH_MAX).filter(|position| self.has(*position))
    }

    /// As the stores keep it: the first position is the first byte's highest bit.
    pub(super) fn as_bytes(&self) -> &[u8] {
        &self.0
    }

    /// What a store has kept. `None`: it has another length.
    pub(super) fn from_bytes(bytes: &[u8]) -> Option<Mask> {
        Some(Mask(bytes.try_into().ok()?))
    }
}

fn bit(position: usize) -> u8 {
    0x80 >> (position % 8)
}

impl FromIterator<usize> for Mask {
    fn from_iter<T: IntoIterator<Item = usize>>(positions: T) -> Mask {
        let mut mask = Mask::EMPTY;
        positions.into_iter().for_each(|position| mask.set(position));
        mask
    }
}

impl std::fmt::Debug for Mask {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.positions()).finish()
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use proptest::prelude::*;

    use super::*;

    fn positions() -> impl Strategy<Value = BTreeSet<usize>> {
        prop::collection::btree_set(0..BATCH_MAX, 0..40)
    }

    proptest! {
        #[test]
        fn a_mask_is_a_set_of_positions(a in positions(), b in positions(), at in 0..BATCH_MAX) {
            let (left, right): (Mask, Mask) = (a.iter().copied().collect(), b.iter().copied().collect());
            let read = |mask: &Mask| mask.positions().collect::<BTreeSet<_>>();
            prop_assert_eq!(read(&left.and(&right)), &a & &b);
            prop_assert_eq!(read(&left.without(&right)), &a - &b);
            prop_assert_eq!((left.count(), left.is_empty(), left.has(at)), (a.len(), a.is_empty(), a.contains(&at)));
            prop_assert_eq!(Mask::from_bytes(left.as_bytes()), Some(left.clone()));
            let mut cleared = left;
            cleared.clear(at);
            prop_assert_eq!(read(&cleared), &a - &BTreeSet::from([at]));
        }
    }

    #[test]
    fn positions_that_no_batch_has_are_ignored() {
        let mut mask = Mask::first(BATCH_MAX + 7);
        mask.set(BATCH_MAX);
        mask.clear(BATCH_MAX);
        assert_eq!((mask.count(), mask.has(BATCH_MAX)), (BATCH_MAX, false));
        assert_eq!(Mask::first(3).as_bytes()[0], 0b1110_0000);
        assert_eq!(Mask::from_bytes(&[1, 2, 3]), None);
    }
}
