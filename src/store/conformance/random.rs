//! Random sequences of calls, by several instances, with stale and repeated ones among them. After
//! each call every message must have gone a legal way; in the end every message must get through.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::{Config, TestRunner};

use super::{BegunDelivery, Bench, LEASE, RETRY, deliveries, text, unhold, wanted};
use crate::message::{Held, Message, MessageId, NewMessage, Status, Verdict};
use crate::store::operate::Change;
use crate::store::{
    BatchId, Begin, Claimed, Due, Endpoint, InstanceId, Record, Store, Suspect, Urgency, Wanted,
};
use crate::ticket::Ticket;

/// Sequences tried, and calls in each. They share one store, as a database a case would be slow.
const CASES: usize = 60;
const CALLS: usize = 60;

/// One call; the numbers pick among what there is, by remainder.
#[derive(Clone, Debug)]
enum Call {
    Insert { scheduled: bool, expiring: bool, closed: bool },
    Claim { kind: u8, limit: usize, by: usize },
    Begin { which: usize, count: usize, by: usize },
    BeginAgain,
    Record { which: usize, verdict: u8 },
    RecordAgain { which: usize },
    Hold { which: usize },
    Unhold { busy: bool, limit: usize },
    Reissue { which: usize },
    Change { which: usize, cancel: bool },
    Expire,
    Pass { seconds: u64 },
    Renew { by: usize },
    Recover,
    Retire { by: usize },
}

fn call() -> impl Strategy<Value = Call> {
    let number = any::<usize>;
    prop_oneof![
        4 => any::<(bool, bool, bool)>().prop_map(|(scheduled, expiring, closed)| Call::Insert { scheduled, expiring, closed }),
        6 => (0..6_u8, 1..6_usize, number()).prop_map(|(kind, limit, by)| Call::Claim { kind, limit, by }),
        6 => (number(), 1..6_usize, number()).prop_map(|(which, count, by)| Call::Begin { which, count, by }),
        1 => Just(Call::BeginAgain),
        8 => (number(), 0..5_u8).prop_map(|(which, verdict)| Call::Record { which, verdict }),
        1 => number().prop_map(|which| Call::RecordAgain { which }),
        2 => number().prop_map(|which| Call::Hold { which }),
        2 => (any::<bool>(), 1..4_usize).prop_map(|(busy, limit)| Call::Unhold { busy, limit }),
        4 => number().prop_map(|which| Call::Reissue { which }),
        2 => (number(), any::<bool>()).prop_map(|(which, cancel)| Call::Change { which, cancel }),
        1 => Just(Call::Expire),
        2 => (1..9_u64).prop_map(|seconds| Call::Pass { seconds }),
        2 => number().prop_map(|by| Call::Renew { by }),
        2 => Just(Call::Recover),
        1 => number().prop_map(|by| Call::Retire { by }),
    ]
}

/// The world as the test believes it to be.
struct World {
    bench: Bench,
    instances: Vec<InstanceId>,
    /// Every message as it was last read.
    seen: BTreeMap<MessageId, Message>,
    /// Every ticket ever given: all but the newest of a message are stale.
    tickets: Vec<Ticket>,
    begun: Vec<BegunDelivery>,
    /// Begun once is begun for good: no ticket may be begun twice.
    ever_begun: HashSet<(BatchId, u16)>,
    last_begin: Option<LastBegin>,
    records: Vec<Record>,
    /// The only messages that the last call may have changed; `None`: any.
    changeable: Option<Vec<MessageId>>,
}

/// A begin call that can be made again, and what it took.
struct LastBegin {
    wanted: Vec<Wanted>,
    tickets: Vec<Ticket>,
    owner: InstanceId,
    begun: HashSet<MessageId>,
}

type Check = Result<(), String>;

fn check(holds: bool, sentence: impl FnOnce() -> String) -> Check {
    if holds { Ok(()) } else { Err(sentence()) }
}

pub(crate) async fn random_calls_never_lose_a_message(store: Arc<dyn Store>) {
    let mut world = World {
        bench: Bench::new(store).await,
        instances: Vec::new(),
        seen: BTreeMap::new(),
        tickets: Vec::new(),
        begun: Vec::new(),
        ever_begun: HashSet::new(),
        last_begin: None,
        records: Vec::new(),
        changeable: None,
    };
    let mut runner = TestRunner::new(Config::default());
    let sequences = prop::collection::vec(call(), 1..CALLS);
    for _ in 0..CASES {
        let mut tree = sequences.new_tree(&mut runner).unwrap();
        let Err(first) = world.run(&tree.current()).await else {
            continue;
        };
        let (mut calls, mut failure) = (tree.current(), first);
        let mut simpler = tree.simplify();
        while simpler {
            simpler = match world.run(&tree.current()).await {
                Ok(()) => tree.complicate(),
                Err(error) => {
                    (calls, failure) = (tree.current(), error);
                    tree.simplify()
                }
            };
        }
        panic!("{failure}\nafter {calls:#?}");
    }
}

impl World {
    /// One sequence, from a store without unfinished messages to a store without unfinished messages.
    async fn run(&mut self, calls: &[Call]) -> Check {
        self.bench.pass(3_600);
        self.bench.recover().await;
        self.bench.open("closed").await;
        let shut = Endpoint { enabled: false, ..Endpoint::new("closed", "http://localhost:3000") };
        self.bench.store.put_endpoint(&shut).await.unwrap();
        self.instances.clear();
        for _ in 0..3 {
            self.instances.push(self.bench.enroll().await);
        }
        self.seen.clear();
        self.tickets.clear();
        self.begun.clear();
        self.ever_begun.clear();
        self.records.clear();
        self.last_begin = None;
        for call in calls {
            self.make(call).await?;
            self.inspect().await.map_err(|error| format!("{error}, by {call:?}"))?;
        }
        self.drain().await
    }

    async fn make(&mut self, call: &Call) -> Check {
        let now = self.bench.now();
        let store = Arc::clone(&self.bench.store);
        match *call {
            Call::Insert { scheduled, expiring, closed } => self.insert(scheduled, expiring, closed).await,
            Call::Claim { kind, limit, by } => self.claim(kind, limit, by).await?,
            Call::Begin { which, count, by } => self.begin(which, count, by).await?,
            Call::BeginAgain => self.begin_again().await?,
            Call::Record { which, verdict } => self.record(which, verdict).await?,
            Call::RecordAgain { which } => {
                if let Some(record) = pick(&self.records, which) {
                    self.write(record).await?;
                }
            }
            Call::Hold { which } => {
                if let Some(ticket) = pick(&self.tickets, which) {
                    self.changeable = Some(vec![ticket.id]);
                    store.hold("messages", &[ticket], Held::EndpointBusy, now).await.unwrap();
                }
            }
            Call::Unhold { busy, limit } => {
                let (endpoint, held) = match busy {
                    true => ("default", Held::EndpointBusy),
                    false => ("closed", Held::EndpointDisabled),
                };
                let freed = unhold(&*store, endpoint, held, limit, now).await;
                check(freed <= limit as u64, || format!("unhold freed {freed}"))?;
            }
            Call::Reissue { which } => {
                if let Some(ticket) = pick(&self.tickets, which) {
                    self.reissue(Suspect::Batch(ticket.batch)).await?;
                    self.changeable = Some(Vec::new());
                }
            }
            Call::Change { which, cancel } => self.change(which, cancel).await?,
            Call::Expire => drop(store.expire(now, 3).await.unwrap()),
            Call::Pass { seconds } => self.bench.pass(seconds),
            Call::Renew { by } => {
                let by = by % self.instances.len();
                if !store.renew(self.instances[by], now, now.after(LEASE)).await.unwrap() {
                    self.instances[by] = self.bench.enroll().await;
                }
            }
            Call::Recover => self.recover().await?,
            Call::Retire { by } => {
                let by = by % self.instances.len();
                store.retire(self.instances[by]).await.unwrap();
                self.instances[by] = self.bench.enroll().await;
            }
        }
        Ok(())
    }

    async fn insert(&mut self, scheduled: bool, expiring: bool, closed: bool) {
        let message = NewMessage {
            endpoint: closed.then(|| "closed".to_owned()),
            send_at: scheduled.then(|| self.bench.in_seconds(4)),
            expires_at: expiring.then(|| self.bench.in_seconds(12)),
            ..text("x")
        };
        for id in self.bench.insert(&[message, text("y")]).await {
            self.seen.insert(id, self.bench.message(id).await);
        }
    }

    async fn claim(&mut self, kind: u8, limit: usize, by: usize) -> Check {
        let due = match kind {
            0..=1 => Due::New(Urgency::Normal),
            2..=3 => Due::Timed { lane: "", by: self.bench.in_seconds(u64::from(kind - 2) * 3) },
            _ => Due::Timed { lane: RETRY, by: self.bench.in_seconds(u64::from(kind - 4) * 3) },
        };
        let claimed = self.bench.claim_by(self.instances[by % self.instances.len()], due, limit).await;
        self.took(&claimed, limit)
    }

    fn took(&mut self, claimed: &Claimed, limit: usize) -> Check {
        check(claimed.seen <= limit && claimed.tickets.len() <= claimed.seen, || format!("{claimed:?}"))?;
        for ticket in &claimed.tickets {
            let before = self.seen.get(&ticket.id).map(|m| (m.attempts, m.held, m.status));
            let waits = matches!(before, Some((attempts, None, Status::Pending | Status::Retrying)) if attempts + 1 == ticket.attempt);
            check(waits, || format!("{ticket:?} was claimed of {before:?}"))?;
            self.tickets.push(ticket.clone());
        }
        Ok(())
    }

    /// Issues something again: its tickets are new, and their deliveries queued.
    async fn reissue(&mut self, suspect: Suspect) -> Check {
        let Some(reissued) = self.bench.reissue(suspect).await else { return Ok(()) };
        check(!reissued.tickets.is_empty(), || format!("nothing was issued again of {suspect:?}"))?;
        for ticket in reissued.tickets {
            // A sequence that failed before may have left something behind.
            let Some(before) = self.seen.get(&ticket.id) else { continue };
            let open = matches!(before.status, Status::Queued | Status::Processing);
            check(open && before.attempts + 1 == ticket.attempt, || {
                format!("{ticket:?} was issued of {before:?}")
            })?;
            self.tickets.push(ticket);
        }
        Ok(())
    }

    async fn recover(&mut self) -> Check {
        let recovered = self.bench.recover().await;
        for lease in recovered.leases {
            self.reissue(Suspect::Lease(lease)).await?;
        }
        Ok(())
    }

    async fn change(&mut self, which: usize, cancel: bool) -> Check {
        let change = if cancel { Change::Cancel } else { Change::Redrive };
        let Some((id, before)) = self.seen.iter().nth(which % self.seen.len().max(1)) else { return Ok(()) };
        let changed = self.bench.store.change(change, &[*id], self.bench.now()).await.unwrap();
        let allowed = change.allows(before.status);
        check(changed.len() == usize::from(allowed), || format!("{changed:?} by {change:?} of {before:?}"))?;
        self.changeable = Some(vec![*id]);
        Ok(())
    }

    async fn begin(&mut self, which: usize, count: usize, by: usize) -> Check {
        let from = which % self.tickets.len().max(1);
        let tickets: Vec<_> = self.tickets.iter().skip(from).take(count).cloned().collect();
        let owner = self.instances[by % self.instances.len()];
        self.begin_by(tickets, owner).await.map(drop)
    }

    async fn begin_by(
        &mut self,
        tickets: Vec<Ticket>,
        owner: InstanceId,
    ) -> Result<Vec<BegunDelivery>, String> {
        let wanted = wanted(&tickets);
        let begin = Begin { wanted: &wanted, repeated: false, owner };
        let deliveries = deliveries(&tickets, &self.bench.store.begin(&begin).await.unwrap());
        for delivery in &deliveries {
            let before = &self.seen[&delivery.id()];
            check(before.status == Status::Queued, || format!("{before:?} was begun"))?;
            let place = (delivery.ticket.batch, delivery.ticket.position);
            check(self.ever_begun.insert(place), || format!("{place:?} was begun twice"))?;
            self.begun.push(delivery.clone());
        }
        let begun = deliveries.iter().map(BegunDelivery::id).collect();
        self.last_begin = Some(LastBegin { wanted, tickets, owner, begun });
        Ok(deliveries)
    }

    async fn begin_again(&mut self) -> Check {
        let Some(LastBegin { wanted, tickets, owner, begun }) = self.last_begin.take() else {
            return Ok(());
        };
        if begun.is_empty() {
            return Ok(());
        }
        let begin = Begin { wanted: &wanted, repeated: true, owner };
        for delivery in deliveries(&tickets, &self.bench.store.begin(&begin).await.unwrap()) {
            // All that it began may have ended meanwhile: then it is a first call.
            let known = begun.contains(&delivery.id())
                || self.ever_begun.insert((delivery.ticket.batch, delivery.ticket.position));
            check(known, || format!("{delivery:?} was begun by the repeated call"))?;
            self.begun.push(delivery);
        }
        Ok(())
    }

    async fn record(&mut self, which: usize, verdict: u8) -> Check {
        let Some(delivery) = pick(&self.begun, which) else {
            return Ok(());
        };
        let record = match verdict {
            0 => self.bench.sent(&delivery),
            1 => self.bench.failed(&delivery),
            2 => self.bench.dead(&delivery),
            3 => super::record(&delivery, None, Verdict::Expired),
            _ => self.bench.released(&delivery),
        };
        self.begun.retain(|begun| begun.lease != delivery.lease || begun.id() != delivery.id());
        self.records.push(record.clone());
        self.write(record).await
    }

    /// Records one attempt: a success always counts, anything else only for the delivery that stands in its lease.
    async fn write(&mut self, record: Record) -> Check {
        let id = record.ticket.id;
        let before = self.seen[&id].clone();
        let newest = self.tickets.iter().rfind(|ticket| ticket.id == id);
        let current = newest.is_some_and(|ticket| ticket.batch == record.ticket.batch);
        let counts = match record.verdict {
            Verdict::Sent => before.status != Status::Sent,
            _ => before.status == Status::Processing && current,
        };
        let refused = self.bench.record(std::slice::from_ref(&record)).await;
        let stale = record.verdict != Verdict::Sent && !counts;
        check(refused.is_empty() != stale, || format!("{refused:?} were refused: {record:?} of {before:?}"))?;
        let after = self.bench.message(id).await;
        check((after != before) == counts, || format!("{record:?} made {after:?} of {before:?}"))?;
        let sent = record.verdict != Verdict::Sent || after.status == Status::Sent;
        check(sent, || format!("{after:?} has been sent"))
    }

    /// Reads every message and compares it with what it was.
    async fn inspect(&mut self) -> Check {
        let changeable = self.changeable.take();
        for (id, before) in &mut self.seen {
            let after = self.bench.message(*id).await;
            let legal = after.status == before.status || before.status.may_become(after.status);
            check(legal, || format!("{id} went from {} to {}", before.status, after.status))?;
            let late = after.status == Status::Sent && before.status != Status::Sent;
            check(after.attempts >= before.attempts || late, || format!("{id} forgot an attempt"))?;
            let finished = after.finished_at.is_some();
            check(finished == after.status.is_final(), || format!("{after:?} is half finished"))?;
            let waits = matches!(after.status, Status::Pending | Status::Retrying);
            check(waits || after.held.is_none(), || format!("{after:?} is held"))?;
            let timed = after.status != Status::Retrying || after.due_at.is_some();
            check(timed, || format!("{after:?} waits for ever"))?;
            let given_back = before.status == Status::Queued && after.status == Status::Retrying;
            let kept = !given_back || after.due_at >= before.due_at;
            check(kept, || format!("{after:?} is due before its time, {before:?}"))?;
            let may_change = changeable.as_ref().is_none_or(|these| these.contains(id));
            check(may_change || after == *before, || format!("{before:?} is now {after:?}"))?;
            let same = (&after.recipient, &after.content) == (&before.recipient, &before.content);
            check(same, || format!("{after:?} was {before:?}"))?;
            *before = after;
        }
        Ok(())
    }

    /// Everybody dies, and one instance finishes what is left.
    async fn drain(&mut self) -> Check {
        self.bench.open("closed").await;
        for round in 0.. {
            self.bench.pass(60);
            let (store, now) = (Arc::clone(&self.bench.store), self.bench.now());
            self.recover().await?;
            self.inspect().await?;
            let owner = self.bench.enroll().await;
            for batch in store.batches(now, 1_000).await.unwrap() {
                self.reissue(Suspect::Batch(batch.id)).await?;
            }
            for (endpoint, held) in store.held().await.unwrap() {
                unhold(&*store, &endpoint, held, 1_000, now).await;
            }
            self.inspect().await?;
            let timed = |lane| Due::Timed { lane, by: now };
            for due in [Due::New(Urgency::Normal), timed(""), timed("messages"), timed(RETRY)] {
                let claimed = self.bench.claim_by(owner, due, 1_000).await;
                self.took(&claimed, 1_000)?;
                self.inspect().await?;
            }
            let tickets = self.tickets.clone();
            let deliveries = self.begin_by(tickets, owner).await?;
            self.inspect().await?;
            let records: Vec<_> = deliveries.iter().map(|delivery| self.bench.sent(delivery)).collect();
            let refused = self.bench.record(&records).await;
            check(refused.is_empty(), || format!("{refused:?} were refused"))?;
            self.inspect().await?;
            let left: Vec<_> = self.seen.values().filter(|message| !message.status.is_final()).collect();
            if left.is_empty() {
                break;
            }
            check(round < 3, || format!("never finished: {left:?}"))?;
        }
        self.bench.clock.advance(Duration::from_secs(1));
        Ok(())
    }
}

fn pick<T: Clone>(from: &[T], which: usize) -> Option<T> {
    from.get(which % from.len().max(1)).cloned()
}
