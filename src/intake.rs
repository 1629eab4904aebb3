//! Enters: messages are validated and stored by group commit.
//!
//! Single posts of many clients share a transaction: while one commit is on its way, what arrives
//! gathers, and goes out together with the next. A batch call stays whole; one whose messages have
//! idempotency keys has a transaction of its own, because a conflict must keep all of it out and nobody
//! else. An answer is given only after the commit.

mod rules;

use std::sync::Arc;
use std::time::Duration;

use serde_json::Value;
use tokio::sync::{Notify, OwnedSemaphorePermit, Semaphore, mpsc, oneshot};

use crate::clock::Clock;
use crate::message::NewMessage;
use crate::store::{AllOrNone, Inserted, Store, StoreError};
use crate::telemetry::Metrics;

pub use rules::{BATCH_MAX, Fault, check};

/// Submissions that may wait for their commit; more are turned away.
const WAITING: usize = 4_096;
/// KiB that submissions may hold while they wait; a few of the largest batches, many thousand usual posts.
const WAITING_KIB: u32 = 256 * 1_024;
/// What a message weighs beside its texts, in bytes.
const OVERHEAD: usize = 512;
/// Messages that share a transaction, unless a single batch is larger.
const TOGETHER: usize = 1_000;

/// Why a submission was not stored.
#[derive(Clone, Debug, thiserror::Error)]
pub enum IntakeError {
    /// Too much is waiting already; come back in a moment.
    #[error("too many messages are waiting to be stored")]
    Busy,
    /// None is stored: the messages at these places have idempotency keys of other messages. Only
    /// for more than one message; a single one is answered with [`Inserted::Conflict`].
    #[error("idempotency keys were used for other messages")]
    Conflicts(Vec<usize>),
    #[error(transparent)]
    Store(#[from] StoreError),
}

type Answer = oneshot::Sender<Result<Vec<Inserted>, IntakeError>>;

struct Submission {
    messages: Vec<NewMessage>,
    answer: Answer,
    // Gives the capacity back once it is answered.
    _permit: OwnedSemaphorePermit,
}

impl Submission {
    /// Whether a conflict of one message must keep the others out.
    fn is_alone(&self) -> bool {
        self.messages.len() > 1 && self.messages.iter().any(|message| message.idempotency_key.is_some())
    }
}

/// The way in. Cheap to clone; all clones share one task that commits.
#[derive(Clone)]
pub struct Intake {
    submissions: mpsc::Sender<Submission>,
    capacity: Arc<Semaphore>,
    capacity_kib: u32,
    wake: Arc<Notify>,
}

impl Intake {
    /// An intake into `store`; `wake` is told of each commit.
    pub fn new(store: Arc<dyn Store>, clock: Clock, metrics: Arc<Metrics>, wake: Arc<Notify>) -> Intake {
        Intake::with_capacity(Committer { store, clock, metrics, wake }, WAITING_KIB)
    }

    fn with_capacity(committer: Committer, capacity_kib: u32) -> Intake {
        let (submissions, waiting) = mpsc::channel(WAITING);
        let wake = Arc::clone(&committer.wake);
        tokio::spawn(commit_all(committer, waiting));
        Intake { submissions, capacity: Arc::new(Semaphore::new(capacity_kib as usize)), capacity_kib, wake }
    }

    /// Cuts the producer's idle wait short: rows have become due by another way.
    pub fn wake(&self) {
        self.wake.notify_one();
    }

    /// Stores these messages in one transaction, all or none, and answers once they are committed.
    ///
    /// # Errors
    /// [`IntakeError::Busy`] when too much is waiting, [`IntakeError::Conflicts`] when an idempotency key
    /// keeps a batch out; else what the store says.
    pub async fn submit(&self, messages: Vec<NewMessage>) -> Result<Vec<Inserted>, IntakeError> {
        let (answer, answered) = oneshot::channel();
        // Never more than all the capacity, so that a large batch can enter when nothing else waits.
        let permit =
            Arc::clone(&self.capacity).try_acquire_many_owned(weight_kib(&messages).min(self.capacity_kib));
        let _permit = permit.map_err(|_| IntakeError::Busy)?;
        let submission = Submission { messages, answer, _permit };
        self.submissions.try_send(submission).map_err(|_| IntakeError::Busy)?;
        let stopped = || IntakeError::Store(StoreError::Unavailable("the program is stopping".to_owned()));
        answered.await.unwrap_or_else(|_| Err(stopped()))
    }
}

/// About how much memory these messages hold.
fn weight_kib(messages: &[NewMessage]) -> u32 {
    let weight = |message: &NewMessage| {
        let json = [&message.headers, &message.tags].into_iter().flatten().map(json_weight).sum::<usize>();
        message.content.len() + message.recipient.len() + json + OVERHEAD
    };
    let bytes: usize = messages.iter().map(weight).sum();
    u32::try_from(bytes.div_ceil(1_024)).unwrap_or(u32::MAX)
}

/// About how much memory a JSON value holds: each part of it has its own place, and a name or text its bytes beside.
fn json_weight(value: &Value) -> usize {
    size_of::<Value>()
        + match value {
            Value::Null | Value::Bool(_) | Value::Number(_) => 0,
            Value::String(text) => text.len(),
            Value::Array(list) => list.iter().map(json_weight).sum(),
            Value::Object(map) => {
                map.iter().map(|(name, value)| size_of::<String>() + name.len() + json_weight(value)).sum()
            }
        }
}

struct Committer {
    store: Arc<dyn Store>,
    clock: Clock,
    metrics: Arc<Metrics>,
    wake: Arc<Notify>,
}

async fn commit_all(committer: Committer, mut waiting: mpsc::Receiver<Submission>) {
    let mut next = None;
    while let Some(first) = match next.take() {
        Some(first) => Some(first),
        None => waiting.recv().await,
    } {
        if first.is_alone() {
            committer.commit_alone(first).await;
            continue;
        }
        let mut count = first.messages.len();
        let mut together = vec![first];
        while count < TOGETHER && next.is_none() {
            let Ok(submission) = waiting.try_recv() else { break };
            count += submission.messages.len();
            if count > TOGETHER || submission.is_alone() {
                // It begins the next transaction.
                next = Some(submission);
            } else {
                together.push(submission);
            }
        }
        committer.commit(together).await;
    }
}

impl Committer {
    async fn commit(&self, submissions: Vec<Submission>) {
        let all: Vec<NewMessage> = submissions.iter().flat_map(|s| s.messages.iter().cloned()).collect();
        match self.insert(&all).await {
            Ok(mut inserted) => {
                for submission in submissions {
                    let rest = inserted.split_off(submission.messages.len().min(inserted.len()));
                    // A client that has gone has its messages stored all the same.
                    let _ = submission.answer.send(Ok(inserted));
                    inserted = rest;
                }
            }
            Err(StoreError::Refused(_)) if submissions.len() > 1 => {
                // One of them is to blame; the others must not suffer for it.
                for submission in submissions {
                    let stored = self.insert(&submission.messages).await;
                    let _ = submission.answer.send(stored.map_err(IntakeError::from));
                }
            }
            Err(error) => {
                for submission in submissions {
                    let _ = submission.answer.send(Err(error.clone().into()));
                }
            }
        }
    }

    async fn commit_alone(&self, submission: Submission) {
        let now = self.clock.now();
        let whole = self.call(submission.messages.len(), self.store.insert_whole(&submission.messages, now));
        let answer = match whole.await {
            Ok(AllOrNone::Stored(inserted)) => Ok(inserted),
            Ok(AllOrNone::Conflicts(places)) => Err(IntakeError::Conflicts(places)),
            Err(error) => Err(error.into()),
        };
        let _ = submission.answer.send(answer);
    }

    async fn insert(&self, messages: &[NewMessage]) -> Result<Vec<Inserted>, StoreError> {
        self.call(messages.len(), self.store.insert(messages, self.clock.now())).await
    }

    /// Bounds and measures a call of the store that inserts `rows` messages.
    async fn call<T>(
        &self,
        rows: usize,
        call: impl Future<Output = Result<T, StoreError>>,
    ) -> Result<T, StoreError> {
        let watch = self.clock.stopwatch();
        let inserted = tokio::time::timeout(Duration::from_secs(30), call)
            .await
            .unwrap_or_else(|_| Err(StoreError::Unavailable("no answer within 30 s".to_owned())));
        let inserted = inserted?;
        self.metrics.batch("insert", rows, watch.elapsed());
        self.wake.notify_one();
        Ok(inserted)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::sqlite::SqliteStore;

    fn intake() -> (Intake, Arc<Metrics>) {
        let store = Arc::new(SqliteStore::in_memory().unwrap());
        let metrics = Arc::<Metrics>::default();
        (Intake::new(store, Clock::system(), Arc::clone(&metrics), Arc::default()), metrics)
    }

    /// How many transactions have inserted.
    fn transactions(metrics: &Metrics) -> u64 {
        let text = metrics.encode();
        let line = text.lines().find(|line| line.starts_with("ams_batch_rows_count{stage=\"insert\"}"));
        line.and_then(|line| line.rsplit(' ').next()).map_or(0, |count| count.parse().unwrap())
    }

    fn message(text: &str) -> NewMessage {
        NewMessage { recipient: "+90".into(), content: text.into(), ..NewMessage::default() }
    }

    #[test]
    fn headers_and_tags_weigh_what_they_hold_in_memory() {
        let tags = |count: usize| {
            let tags: Vec<_> = (0..count).map(|number| number.to_string()).collect();
            NewMessage { tags: Some(tags.into()), ..message("Hi") }
        };
        assert_eq!(weight_kib(&[message("Hi")]), 1);
        // 16 KiB of tags as text, of which each is a value and a text of its own.
        let least = 3_000 * size_of::<Value>() / 1_024;
        assert!(weight_kib(&[tags(3_000)]) as usize > least);
        let headers = serde_json::json!({ "x-a": "b".repeat(10_000) });
        assert!(weight_kib(&[NewMessage { headers: Some(headers), ..message("Hi") }]) > 9);
    }

    #[tokio::test]
    async fn many_clients_share_transactions_and_get_their_own_ids() {
        let (intake, metrics) = intake();
        let calls = (0..256).map(|i| {
            let intake = intake.clone();
            async move { intake.submit(vec![message(&i.to_string())]).await.unwrap().remove(0) }
        });
        let inserted = futures_util::future::join_all(calls).await;
        let ids: std::collections::BTreeSet<_> = inserted
            .into_iter()
            .map(|inserted| match inserted {
                Inserted::New { id, .. } => id,
                other => panic!("{other:?}"),
            })
            .collect();
        assert_eq!(ids.len(), 256);
        let transactions = transactions(&metrics);
        assert!((1..=8).contains(&transactions), "{transactions} transactions for 256 posts");
    }

    #[tokio::test]
    async fn no_transaction_is_larger_than_it_may_be() {
        let (intake, metrics) = intake();
        let calls = (0..4).map(|_| intake.submit(vec![message("part"); 600]));
        for inserted in futures_util::future::join_all(calls).await {
            assert_eq!(inserted.unwrap().len(), 600);
        }
        assert_eq!(transactions(&metrics), 4);
    }

    #[tokio::test]
    async fn a_conflict_keeps_its_batch_out_and_nobody_elses() {
        let (intake, _) = intake();
        let keyed = NewMessage { idempotency_key: Some("once".into()), ..message("Hello") };
        let other = NewMessage { content: "Other".into(), ..keyed.clone() };
        let first = intake.submit(vec![keyed.clone()]).await.unwrap();
        let [Inserted::New { id: first, .. }] = first[..] else { panic!("{first:?}") };
        let (single, batch, again) = tokio::join!(
            intake.submit(vec![message("single")]),
            intake.submit(vec![message("kept out"), other, message("kept out")]),
            intake.submit(vec![keyed, message("new")]),
        );
        assert!(matches!(batch, Err(IntakeError::Conflicts(ref places)) if places[..] == [1]), "{batch:?}");
        let single = single.unwrap();
        let [Inserted::New { id: single, .. }] = single[..] else { panic!("{single:?}") };
        let again = again.unwrap();
        let [Inserted::Existing(existing), Inserted::New { id: new, .. }] = again[..] else {
            panic!("{again:?}")
        };
        assert_eq!(existing, first);
        assert_eq!(new.0, single.0 + 1, "the batch that was kept out must not be stored");
    }

    #[tokio::test]
    async fn what_waits_has_a_bound_in_bytes() {
        let store = Arc::new(SqliteStore::in_memory().unwrap());
        let committer =
            Committer { store, clock: Clock::system(), metrics: Arc::default(), wake: Arc::default() };
        let intake = Intake::with_capacity(committer, 256);
        let large = || vec![message(&"x".repeat(1 << 10)); 40];
        let calls = (0..6).map(|_| intake.submit(large()));
        let answers = futures_util::future::join_all(calls).await;
        let busy = answers.iter().filter(|answer| matches!(answer, Err(IntakeError::Busy))).count();
        let stored = answers.iter().filter(|answer| answer.is_ok()).count();
        assert_eq!((stored, busy), (4, 2));
        // The capacity is free again.
        assert!(intake.submit(large()).await.is_ok());
        // What is larger than all of it may still enter alone.
        assert!(intake.submit(vec![message(&"x".repeat(300 << 10))]).await.is_ok());
    }

    #[tokio::test]
    async fn a_bad_row_fails_alone() {
        let (intake, _) = intake();
        let good = intake.submit(vec![message("good")]);
        let bad = intake.submit(vec![NewMessage { recipient: String::new(), ..message("bad") }]);
        let (good, bad) = tokio::join!(good, bad);
        assert!(matches!(good.unwrap()[..], [Inserted::New { .. }]));
        assert!(matches!(bad, Err(IntakeError::Store(StoreError::Refused(_)))), "{bad:?}");
    }

    #[tokio::test]
    async fn a_hundred_equal_keys_at_once_make_one_message() {
        let (intake, _) = intake();
        let keyed = NewMessage { idempotency_key: Some("once".into()), ..message("Hello") };
        let calls = (0..100).map(|_| intake.submit(vec![keyed.clone()]));
        let inserted = futures_util::future::join_all(calls).await;
        let new = inserted.iter().flatten().flatten().filter(|i| matches!(i, Inserted::New { .. })).count();
        let same = inserted.iter().flatten().flatten().filter(|i| matches!(i, Inserted::Existing(_))).count();
        assert_eq!((new, same), (1, 99));
        let other = intake.submit(vec![NewMessage { content: "Other".into(), ..keyed }]).await.unwrap();
        assert!(matches!(other[..], [Inserted::Conflict(_)]));
    }
}
