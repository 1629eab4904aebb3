//! Enters: messages are validated and stored by group commit.
//!
//! Single posts of many clients share a transaction: while one commit is on its way, what arrives
//! gathers, and goes out together with the next. A batch call stays whole. An answer is given only after
//! the commit.

mod rules;

use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{Notify, mpsc, oneshot};

use crate::clock::Clock;
use crate::message::NewMessage;
use crate::store::{Inserted, Store, StoreError};
use crate::telemetry::Metrics;

pub use rules::{BATCH_MAX, Fault, check};

/// Submissions that may wait for their commit; more are turned away.
const WAITING: usize = 4_096;
/// Messages that share a transaction, unless a single batch is larger.
const TOGETHER: usize = 1_000;

/// Why a submission was not stored.
#[derive(Clone, Debug, thiserror::Error)]
pub enum IntakeError {
    /// Too much is waiting already; come back in a moment.
    #[error("too many messages are waiting to be stored")]
    Busy,
    #[error(transparent)]
    Store(#[from] StoreError),
}

type Answer = oneshot::Sender<Result<Vec<Inserted>, IntakeError>>;

struct Submission {
    messages: Vec<NewMessage>,
    answer: Answer,
}

/// The way in. Cheap to clone; all clones share one task that commits.
#[derive(Clone)]
pub struct Intake {
    submissions: mpsc::Sender<Submission>,
}

impl Intake {
    /// An intake into `store`; `wake` is told of each commit.
    pub fn new(store: Arc<dyn Store>, clock: Clock, metrics: Arc<Metrics>, wake: Arc<Notify>) -> Intake {
        let (submissions, waiting) = mpsc::channel(WAITING);
        tokio::spawn(commit_all(Committer { store, clock, metrics, wake }, waiting));
        Intake { submissions }
    }

    /// Stores these messages in one transaction, all or none, and answers once they are committed.
    ///
    /// # Errors
    /// [`IntakeError::Busy`] when too much is waiting; else what the store says.
    pub async fn submit(&self, messages: Vec<NewMessage>) -> Result<Vec<Inserted>, IntakeError> {
        let (answer, answered) = oneshot::channel();
        self.submissions.try_send(Submission { messages, answer }).map_err(|_| IntakeError::Busy)?;
        let stopped = || IntakeError::Store(StoreError::Unavailable("the program is stopping".to_owned()));
        answered.await.unwrap_or_else(|_| Err(stopped()))
    }
}

struct Committer {
    store: Arc<dyn Store>,
    clock: Clock,
    metrics: Arc<Metrics>,
    wake: Arc<Notify>,
}

async fn commit_all(committer: Committer, mut waiting: mpsc::Receiver<Submission>) {
    while let Some(first) = waiting.recv().await {
        let mut count = first.messages.len();
        let mut together = vec![first];
        while count < TOGETHER {
            let Ok(next) = waiting.try_recv() else { break };
            count += next.messages.len();
            together.push(next);
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

    async fn insert(&self, messages: &[NewMessage]) -> Result<Vec<Inserted>, StoreError> {
        let watch = self.clock.stopwatch();
        let inserted =
            tokio::time::timeout(Duration::from_secs(30), self.store.insert(messages, self.clock.now()));
        let inserted = inserted
            .await
            .unwrap_or_else(|_| Err(StoreError::Unavailable("no answer within 30 s".to_owned())));
        self.metrics.part_up("store", !matches!(inserted, Err(StoreError::Unavailable(_))));
        let inserted = inserted?;
        self.metrics.batch("insert", messages.len(), watch.elapsed());
        self.wake.notify_one();
        Ok(inserted)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::store::sqlite::SqliteStore;

    fn intake() -> (Intake, Arc<SqliteStore>) {
        let store = Arc::new(SqliteStore::in_memory().unwrap());
        (Intake::new(store.clone(), Clock::system(), Arc::default(), Arc::default()), store)
    }

    fn message(text: &str) -> NewMessage {
        NewMessage { recipient: "+90".into(), content: text.into(), ..NewMessage::default() }
    }

    #[tokio::test]
    async fn many_clients_share_transactions_and_get_their_own_ids() {
        let (intake, _) = intake();
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
