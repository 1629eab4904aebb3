//! What a write of records changes in leases and batches. Pure, and the same for every backend.

use std::collections::{BTreeMap, BTreeSet, HashSet};

use super::{BatchId, EndpointId, LeaseId, Mask, Record};
use crate::message::{MessageId, Verdict};

/// A lease or batch: its root, and the positions that are left in it.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Left {
    pub(super) root: BatchId,
    pub(super) positions: Mask,
}

/// What stands in the store, locked by the writer.
#[derive(Clone, Debug, Default)]
pub(super) struct Places {
    /// All leases and batches of the records' roots.
    pub(super) leases: BTreeMap<LeaseId, Left>,
    pub(super) batches: BTreeMap<BatchId, Left>,
    /// The records' deliveries that have ended: nothing but a success changes them any more.
    pub(super) ended: HashSet<(MessageId, EndpointId)>,
}

/// What is to be written.
#[derive(Clone, Debug)]
pub(super) struct Settled {
    /// For each record, whether its verdict counts.
    pub(super) accepted: Vec<bool>,
    /// What is left in the leases and batches that have changed.
    pub(super) leases: BTreeMap<LeaseId, Mask>,
    pub(super) batches: BTreeMap<BatchId, Mask>,
}

/// Settles records. A success counts wherever its delivery stands by now, and takes it out of there; anything else
/// counts only while the delivery stands in the record's own lease.
pub(super) fn settle(records: &[Record], mut places: Places) -> Settled {
    let mut accepted = vec![false; records.len()];
    let (mut leases, mut batches) = (BTreeSet::new(), BTreeSet::new());
    let (sent, others): (Vec<_>, Vec<_>) =
        records.iter().enumerate().partition(|(_, record)| record.verdict == Verdict::Sent);
    for (at, record) in sent {
        let position = usize::from(record.ticket.position);
        accepted[at] = true;
        places.ended.insert((record.ticket.id, record.ticket.endpoint_id));
        let of_root = |left: &&mut Left| left.root == record.root && left.positions.has(position);
        // Nearly always it stands in its own lease, and then nowhere else.
        if let Some(left) = places.leases.get_mut(&record.lease).filter(of_root) {
            left.positions.clear(position);
            leases.insert(record.lease);
            continue;
        }
        for (id, left) in places.leases.iter_mut().filter(|(_, left)| of_root(left)) {
            left.positions.clear(position);
            leases.insert(*id);
        }
        for (id, left) in places.batches.iter_mut().filter(|(_, left)| of_root(left)) {
            left.positions.clear(position);
            batches.insert(*id);
        }
    }
    for (at, record) in others {
        let position = usize::from(record.ticket.position);
        let Some(left) = places.leases.get_mut(&record.lease) else { continue };
        if left.positions.has(position) {
            left.positions.clear(position);
            leases.insert(record.lease);
            accepted[at] = !places.ended.contains(&(record.ticket.id, record.ticket.endpoint_id));
        }
    }
    let of_lease = |id| Some((id, places.leases.remove(&id)?.positions));
    let leases = leases.into_iter().filter_map(of_lease).collect();
    let of_batch = |id| Some((id, places.batches.remove(&id)?.positions));
    let batches = batches.into_iter().filter_map(of_batch).collect();
    Settled { accepted, leases, batches }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Timestamp;
    use crate::ticket::Ticket;
    use crate::ticket::tests::ticket;

    const ROOT: BatchId = BatchId(10);
    const OURS: LeaseId = LeaseId(1);
    const THEIRS: LeaseId = LeaseId(2);

    fn record(position: u16, verdict: Verdict) -> Record {
        let ticket = Ticket { position, batch: ROOT, ..ticket(i64::from(position) + 100) };
        Record {
            ticket: ticket.into(),
            lane: "messages".into(),
            lease: OURS,
            root: ROOT,
            outcome: None,
            verdict,
            judged_at: Timestamp::EPOCH,
        }
    }

    fn left(positions: &[usize]) -> Left {
        Left { root: ROOT, positions: positions.iter().copied().collect() }
    }

    fn positions(settled: &BTreeMap<LeaseId, Mask>, lease: LeaseId) -> Option<Vec<usize>> {
        settled.get(&lease).map(|mask| mask.positions().collect())
    }

    #[test]
    fn what_stands_in_its_lease_leaves_it() {
        let places = Places { leases: [(OURS, left(&[0, 1, 2]))].into(), ..Places::default() };
        let settled = settle(&[record(0, Verdict::Sent), record(2, Verdict::Release { held: None })], places);
        assert_eq!(settled.accepted, [true, true]);
        assert_eq!(positions(&settled.leases, OURS), Some(vec![1]));
        assert!(settled.batches.is_empty());
    }

    #[test]
    fn a_late_success_takes_its_delivery_out_of_wherever_it_stands() {
        let places = Places {
            leases: [(THEIRS, left(&[0, 1]))].into(),
            batches: [(BatchId(11), left(&[2])), (BatchId(12), Left { root: BatchId(12), ..left(&[0, 2]) })]
                .into(),
            ..Places::default()
        };
        let settled = settle(&[record(0, Verdict::Sent), record(2, Verdict::Sent)], places);
        assert_eq!(settled.accepted, [true, true]);
        assert_eq!(positions(&settled.leases, THEIRS), Some(vec![1]));
        let batches: Vec<_> = settled.batches.iter().map(|(id, mask)| (id.0, mask.count())).collect();
        assert_eq!(batches, [(11, 0)], "a batch of another root has other deliveries at these positions");
    }

    #[test]
    fn a_failure_counts_once_and_only_in_its_own_lease() {
        let stale = Places { leases: [(THEIRS, left(&[0]))].into(), ..Places::default() };
        assert_eq!(settle(&[record(0, Verdict::Release { held: None })], stale).accepted, [false]);
        let places = Places { leases: [(OURS, left(&[0]))].into(), ..Places::default() };
        let twice = [record(0, Verdict::Release { held: None }), record(0, Verdict::Release { held: None })];
        assert_eq!(settle(&twice, places.clone()).accepted, [true, false]);
        let beside = [record(0, Verdict::Release { held: None }), record(0, Verdict::Sent)];
        assert_eq!(settle(&beside, places).accepted, [false, true]);
    }

    #[test]
    fn a_failure_of_a_delivery_that_has_ended_only_leaves_the_lease() {
        let ended = [(MessageId(100), EndpointId(1))].into();
        let places = Places { leases: [(OURS, left(&[0, 1]))].into(), ended, ..Places::default() };
        let settled = settle(&[record(0, Verdict::Release { held: None })], places);
        assert_eq!((settled.accepted, positions(&settled.leases, OURS)), (vec![false], Some(vec![1])));
    }
}
