//! Random sequences of calls, by several instances, with stale and repeated ones among them. After
//! each call every message must have gone a legal way; in the end every message must get through.

use std::collections::{BTreeMap, HashSet};
use std::sync::Arc;
use std::time::Duration;

use proptest::prelude::*;
use proptest::strategy::ValueTree;
use proptest::test_runner::{Config, TestRunner};

use super::{Bench, FRESH, LEASE, RETRY, pair, pairs, recovery, text};
use crate::message::{Epoch, Held, Message, MessageId, NewMessage, Status, Verdict};
use crate::store::{BatchId, Begin, Claim, Claimed, Due, InstanceId, LeaseId, Record, Store};

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
    Record { which: usize, verdict: u8, finish: bool },
    RecordAgain { which: usize },
    Hold { which: usize },
    Unhold { busy: bool, limit: usize },
    Requeue { which: usize },
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
        8 => (number(), 0..4_u8, any::<bool>()).prop_map(|(which, verdict, finish)| Call::Record { which, verdict, finish }),
        1 => number().prop_map(|which| Call::RecordAgain { which }),
        2 => number().prop_map(|which| Call::Hold { which }),
        2 => (any::<bool>(), 1..4_usize).prop_map(|(busy, limit)| Call::Unhold { busy, limit }),
        4 => number().prop_map(|which| Call::Requeue { which }),
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
    tickets: Vec<(MessageId, Epoch)>,
    begun: Vec<((MessageId, Epoch), i32, LeaseId)>,
    /// Begun once is begun for good: no ticket may be begun twice.
    ever_begun: HashSet<(MessageId, Epoch)>,
    last_begin: Option<LastBegin>,
    records: Vec<Record>,
    batches: Vec<(BatchId, Vec<(MessageId, Epoch)>)>,
    /// The only messages that the last call may have changed, in the epoch they had; `None`: any.
    changeable: Option<Vec<(MessageId, Epoch)>>,
    leases: i64,
}

/// A begin call that can be made again, and what it took.
struct LastBegin {
    lease: LeaseId,
    tickets: Vec<(MessageId, Epoch)>,
    owner: InstanceId,
    ids: Vec<MessageId>,
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
        batches: Vec::new(),
        changeable: None,
        leases: 0,
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
        self.instances.clear();
        for _ in 0..3 {
            self.instances.push(self.bench.enroll().await);
        }
        self.seen.clear();
        self.tickets.clear();
        self.begun.clear();
        self.ever_begun.clear();
        self.records.clear();
        self.batches.clear();
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
            Call::Record { which, verdict, finish } => self.record(which, verdict, finish).await?,
            Call::RecordAgain { which } => {
                if let Some(record) = pick(&self.records, which) {
                    self.write(record, &[]).await?;
                }
            }
            Call::Hold { which } => {
                if let Some(ticket) = pick(&self.tickets, which) {
                    store.hold(&[ticket], Held::EndpointBusy, now).await.unwrap();
                    self.changeable = Some(vec![ticket]);
                }
            }
            Call::Unhold { busy, limit } => {
                let (endpoint, held) = match busy {
                    true => ("default", Held::EndpointBusy),
                    false => ("closed", Held::EndpointClosed),
                };
                let freed = store.unhold(endpoint, held, limit, now).await.unwrap();
                check(freed <= limit as u64, || format!("unhold freed {freed}"))?;
            }
            Call::Requeue { which } => {
                if let Some((batch, tickets)) = pick(&self.batches, which) {
                    store.requeue(&[batch], now).await.unwrap();
                    self.changeable = Some(tickets);
                }
            }
            Call::Pass { seconds } => self.bench.pass(seconds),
            Call::Renew { by } => {
                let by = by % self.instances.len();
                if !store.renew(self.instances[by], now, now.after(LEASE)).await.unwrap() {
                    self.instances[by] = self.bench.enroll().await;
                }
            }
            Call::Recover => drop(store.recover(&recovery(now, &[])).await.unwrap()),
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
        let middle = self.seen.keys().nth(self.seen.len() / 2).copied().unwrap_or(MessageId(0));
        let due = match kind {
            0 => Due::after(MessageId(0)),
            1 => Due::up_to(middle),
            2..=3 => Due::Timed { lane: "", by: self.bench.in_seconds(u64::from(kind - 2) * 3) },
            _ => Due::Timed { lane: RETRY, by: self.bench.in_seconds(u64::from(kind - 4) * 3) },
        };
        let claimed = self.bench.claim_by(self.instances[by % self.instances.len()], due, limit).await;
        self.took(&claimed, limit)
    }

    fn took(&mut self, claimed: &Claimed, limit: usize) -> Check {
        check(claimed.seen <= limit && claimed.tickets.len() <= claimed.seen, || format!("{claimed:?}"))?;
        check(claimed.batch.is_some() != claimed.tickets.is_empty(), || format!("{claimed:?}"))?;
        for ticket in &claimed.tickets {
            let before = self.seen.get(&ticket.id).map(|m| (m.epoch, m.attempts, m.held));
            let expected = Some((ticket.epoch - 1, ticket.attempt - 1, None));
            check(before == expected, || format!("{ticket:?} was claimed of {before:?}"))?;
            self.tickets.push(pair(ticket));
        }
        self.batches.extend(claimed.batch.map(|batch| (batch, pairs(claimed))));
        Ok(())
    }

    async fn begin(&mut self, which: usize, count: usize, by: usize) -> Check {
        let from = which % self.tickets.len().max(1);
        let tickets: Vec<_> = self.tickets.iter().copied().skip(from).take(count).collect();
        self.leases += 1;
        let lease = LeaseId(self.leases);
        let owner = self.instances[by % self.instances.len()];
        let mut ids = Vec::new();
        for message in self.bench.begin_by(owner, lease.0, &tickets).await {
            let before = &self.seen[&message.id];
            let ticket = (message.id, before.epoch);
            check(before.status == Status::Queued, || format!("{before:?} was begun"))?;
            check(tickets.contains(&ticket), || format!("{before:?} was begun by {tickets:?}"))?;
            check(self.ever_begun.insert(ticket), || format!("{ticket:?} was begun twice"))?;
            self.begun.push((ticket, message.attempts + 1, lease));
            ids.push(message.id);
        }
        self.last_begin = Some(LastBegin { lease, tickets, owner, ids });
        Ok(())
    }

    async fn begin_again(&mut self) -> Check {
        let Some(LastBegin { lease, tickets, owner, ids }) = self.last_begin.take() else {
            return Ok(());
        };
        if ids.is_empty() {
            return Ok(());
        }
        let begin = Begin { lease, repeated: true, tickets: &tickets, owner, now: self.bench.now() };
        for message in self.bench.store.begin(&begin).await.unwrap().messages {
            check(ids.contains(&message.id), || format!("{message:?} was begun by the repeated call"))?;
        }
        Ok(())
    }

    async fn record(&mut self, which: usize, verdict: u8, finish: bool) -> Check {
        let Some((ticket, attempt, lease)) = pick(&self.begun, which) else {
            return Ok(());
        };
        let record = match verdict {
            0 => self.bench.sent(ticket, attempt),
            1 => self.bench.failed(ticket, attempt),
            2 => self.bench.dead(ticket, attempt),
            _ => self.bench.released(ticket),
        };
        let last = self.begun.iter().filter(|begun| begun.2 == lease).count() == 1;
        let finished = if finish && last { vec![lease] } else { Vec::new() };
        self.begun.retain(|begun| begun.0 != ticket);
        self.records.push(record.clone());
        self.write(record, &finished).await
    }

    /// Records one try: a success always counts, anything else only for the message under way in its epoch.
    async fn write(&mut self, record: Record, finished: &[LeaseId]) -> Check {
        let before = &self.seen[&record.id];
        let counts = match record.verdict {
            Verdict::Sent => before.status != Status::Sent,
            _ => (before.status, before.epoch) == (Status::Processing, record.epoch),
        };
        let refused = self.bench.record_finished(std::slice::from_ref(&record), finished).await.unwrap();
        let stale = record.verdict != Verdict::Sent && !counts;
        check(refused.is_empty() != stale, || format!("{refused:?} were refused: {record:?} of {before:?}"))?;
        let after = self.bench.message(record.id).await;
        check((after != *before) == counts, || format!("{record:?} made {after:?} of {before:?}"))?;
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
            check(after.epoch >= before.epoch, || format!("{id} went back to epoch {}", after.epoch))?;
            check(after.attempts >= before.attempts, || format!("{id} forgot a try"))?;
            let finished = after.finished_at.is_some();
            check(finished == after.status.is_final(), || format!("{after:?} is half finished"))?;
            let waits = matches!(after.status, Status::Pending | Status::Retrying);
            check(waits || after.held.is_none(), || format!("{after:?} is held"))?;
            let timed = after.status != Status::Retrying || after.due_at.is_some();
            check(timed, || format!("{after:?} waits for ever"))?;
            let given_back = before.status == Status::Queued && after.status == Status::Retrying;
            let kept = !given_back || after.due_at >= before.due_at;
            check(kept, || format!("{after:?} is due before its time, {before:?}"))?;
            let may_change = changeable.as_ref().is_none_or(|these| these.contains(&(*id, before.epoch)));
            check(may_change || after == *before, || format!("{before:?} is now {after:?}"))?;
            let same = (&after.recipient, &after.content) == (&before.recipient, &before.content);
            check(same, || format!("{after:?} was {before:?}"))?;
            *before = after;
        }
        Ok(())
    }

    /// Everybody dies, and one instance finishes what is left.
    async fn drain(&mut self) -> Check {
        let last = self.seen.keys().next_back().copied().unwrap_or(MessageId(0));
        for round in 0.. {
            self.bench.pass(60);
            let (store, now) = (Arc::clone(&self.bench.store), self.bench.now());
            store.recover(&recovery(now, &[])).await.unwrap();
            let owner = self.bench.enroll().await;
            for batch in store.batches(now, 1_000).await.unwrap() {
                store.requeue(&[batch.id], now).await.unwrap();
            }
            for (endpoint, held) in store.held().await.unwrap() {
                store.unhold(&endpoint, held, 1_000, now).await.unwrap();
            }
            self.inspect().await?;
            let open = &["default".to_owned(), "closed".to_owned()];
            let timed = |lane| Due::Timed { lane, by: now };
            for due in [Due::up_to(last), timed(""), timed(RETRY)] {
                let claim =
                    Claim { due, limit: 1_000, lane: FRESH, open, busy: &[], pass_busy: false, owner, now };
                let claimed = store.claim(&claim).await.unwrap();
                self.took(&claimed, 1_000)?;
                self.inspect().await?;
                self.leases += 1;
                let begun = self.bench.begin_by(owner, self.leases, &pairs(&claimed)).await;
                let records: Vec<_> = begun
                    .iter()
                    .map(|message| {
                        self.bench.sent((message.id, self.seen[&message.id].epoch), message.attempts + 1)
                    })
                    .collect();
                self.inspect().await?;
                let refused = self.bench.record_finished(&records, &[LeaseId(self.leases)]).await.unwrap();
                check(refused.is_empty(), || format!("{refused:?} were refused"))?;
                self.inspect().await?;
            }
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
