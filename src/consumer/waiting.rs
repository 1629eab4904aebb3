//! Begun deliveries that wait for a slot: a queue for each endpoint, in the order in which they were begun. And those that
//! wait for a reserved time.

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::sync::Arc;

use super::begin::BegunDelivery;
use super::early::Early;
use crate::store::Endpoint;

#[derive(Debug, Default)]
pub(super) struct Waiting {
    queues: BTreeMap<String, VecDeque<BegunDelivery>>,
    /// Those of endpoints with a rate: they wait for the times that are reserved for them.
    pub(super) reserved: Early<BegunDelivery>,
    /// Deliveries that have come to wait so far: the turn of the last.
    turns: u64,
    /// Endpoints of deliveries that wait again, because this process was short of a connection.
    put_off: BTreeSet<String>,
    /// Endpoints of which nothing is in flight, because other new ones have all the places for such.
    starved: VecDeque<Arc<Endpoint>>,
}

impl Waiting {
    /// Puts a delivery behind all others of its endpoint, or where it waits for its time.
    pub(super) fn add(&mut self, mut begun: BegunDelivery) {
        if let Some(at) = begun.reserved_at {
            return self.reserved.keep(begun, at);
        }
        self.turns += 1;
        begun.turn = self.turns;
        if let Some(queue) = self.queues.get_mut(&begun.endpoint.name) {
            queue.push_back(begun);
        } else {
            self.queues.insert(begun.endpoint.name.clone(), VecDeque::from([begun]));
        }
    }

    /// Starts deliveries of an endpoint in their turn, as long as there are slots. Whether some are left.
    pub(super) fn start(
        &mut self,
        endpoint: &str,
        mut has_slot: impl FnMut() -> bool,
        start: impl Fn(BegunDelivery),
    ) -> bool {
        let Some(queue) = self.queues.get_mut(endpoint) else { return false };
        while !queue.is_empty() && has_slot() {
            let Some(begun) = queue.pop_front() else { break };
            start(begun);
        }
        if !queue.is_empty() {
            return true;
        }
        self.queues.remove(endpoint);
        false
    }

    /// Those endpoints for which deliveries wait and to which this applies.
    pub(super) fn endpoints(&self, applies: impl Fn(&str) -> bool) -> Vec<Arc<Endpoint>> {
        let queues = self.queues.iter().filter(|(name, _)| applies(name));
        queues.filter_map(|(_, queue)| queue.front().map(|begun| Arc::clone(&begun.endpoint))).collect()
    }

    /// Takes out all that waits for an endpoint.
    pub(super) fn take(&mut self, endpoint: &str) -> VecDeque<BegunDelivery> {
        self.queues.remove(endpoint).unwrap_or_default()
    }

    /// Notes that an endpoint waits for a place among the new ones.
    pub(super) fn starve(&mut self, endpoint: &Arc<Endpoint>) {
        self.starved.push_back(Arc::clone(endpoint));
    }

    /// So many of the endpoints that wait for such a place, in the order in which they came.
    pub(super) fn take_starved(&mut self, count: usize) -> Vec<Arc<Endpoint>> {
        let count = count.min(self.starved.len());
        self.starved.drain(..count).collect()
    }

    /// Puts a delivery back in its turn: it has not been tried.
    pub(super) fn put_back(&mut self, begun: BegunDelivery) {
        self.put_off(&begun.endpoint.name);
        let queue = self.queues.entry(begun.endpoint.name.clone()).or_default();
        queue.insert(queue.partition_point(|other| other.turn < begun.turn), begun);
    }

    /// Notes that what waits for this endpoint is put off.
    pub(super) fn put_off(&mut self, endpoint: &str) {
        if !self.put_off.contains(endpoint) {
            self.put_off.insert(endpoint.to_owned());
        }
    }

    /// The endpoints for which deliveries were put off; they are so no longer.
    pub(super) fn take_put_off(&mut self) -> Vec<Arc<Endpoint>> {
        let names = std::mem::take(&mut self.put_off);
        let first = |name: &String| self.queues.get(name).and_then(VecDeque::front);
        names.iter().filter_map(first).map(|begun| Arc::clone(&begun.endpoint)).collect()
    }

    /// Everything that waits, endpoint by endpoint.
    pub(super) fn into_all(self) -> impl Iterator<Item = BegunDelivery> {
        self.queues.into_values().flatten().chain(self.reserved.into_all())
    }
}

#[cfg(test)]
mod tests {
    use std::cell::RefCell;

    use super::*;
    use crate::clock::Timestamp;
    use crate::store::{InstanceId, LeaseId};
    use crate::ticket::tests::ticket;
    use crate::ticket::{BatchId, Ticket};

    fn begun(endpoint: &str, id: i64) -> BegunDelivery {
        BegunDelivery {
            ticket: Ticket { endpoint: endpoint.to_owned(), ..ticket(id) }.into(),
            endpoint: Arc::new(Endpoint::new(endpoint, "http://127.0.0.1:9/")),
            instance: InstanceId(1),
            lease: LeaseId(1),
            root: BatchId(1),
            ready_at: Timestamp::EPOCH,
            reserved_at: None,
            turn: 0,
        }
    }

    /// Starts so many deliveries of an endpoint.
    fn start(waiting: &mut Waiting, endpoint: &str, slots: usize) -> Vec<BegunDelivery> {
        let (mut left, started) = (slots, RefCell::default());
        let has_slot = || left.checked_sub(1).inspect(|less| left = *less).is_some();
        waiting.start(endpoint, has_slot, |begun| RefCell::<Vec<_>>::borrow_mut(&started).push(begun));
        started.into_inner()
    }

    fn ids(all: impl IntoIterator<Item = BegunDelivery>) -> Vec<i64> {
        all.into_iter().map(|begun| begun.ticket.id.0).collect()
    }

    #[test]
    fn each_endpoint_has_its_queue() {
        let mut waiting = Waiting::default();
        for (endpoint, id) in [("a", 1), ("b", 2), ("a", 3), ("a", 4)] {
            waiting.add(begun(endpoint, id));
        }
        assert_eq!(ids(start(&mut waiting, "a", 2)), [1, 3]);
        assert!(start(&mut waiting, "c", 2).is_empty());
        assert_eq!(ids(waiting.into_all()), [4, 2]);
    }

    #[test]
    fn what_is_put_back_comes_in_its_turn() {
        let mut waiting = Waiting::default();
        (1..=4).for_each(|id| waiting.add(begun("a", id)));
        let mut tried = start(&mut waiting, "a", 3);
        let first = tried.remove(0);
        tried.into_iter().rev().for_each(|begun| waiting.put_back(begun));
        waiting.put_back(first);
        let names =
            |endpoints: Vec<Arc<Endpoint>>| endpoints.iter().map(|e| e.name.clone()).collect::<Vec<_>>();
        assert_eq!(names(waiting.take_put_off()), ["a"]);
        assert!(waiting.take_put_off().is_empty(), "they are put off once");
        assert_eq!(ids(start(&mut waiting, "a", 9)), [1, 2, 3, 4]);
    }
}
