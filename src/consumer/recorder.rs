//! Writes what tries came to: one write at a time, with everything that ended meanwhile in the next.
//!
//! A result is never thrown away and a message never sent again because a write failed: the write is
//! repeated until the store has it. Answers go to the cache and dead letters to their lane afterwards.

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use crate::cache::Response;
use crate::clock::Timestamp;
use crate::dead_letter;
use crate::message::{MessageId, Outcome, Verdict};
use crate::service::{Backoff, Context};
use crate::store::{DeadLetter, Record, Records, StoreError};
use crate::telemetry::LaneMetrics;

/// Records written in one call, at most.
const BATCH: usize = 2_000;
/// With at least this many results at once there is load, and waiting a moment makes fewer, larger writes.
const LOADED: usize = 64;
/// So many are worth a write at once.
const FULL: usize = BATCH * 3 / 4;
const LINGER: Duration = Duration::from_millis(25);

/// Results that were written.
pub(super) struct Written {
    pub(super) records: usize,
    /// Bytes of their tickets.
    pub(super) bytes: usize,
}

/// Writes until the other side is done, or `give_up` is cancelled; tells `written` how many were. What is not written
/// then is left in its leases, for the janitor.
pub(super) async fn run(
    context: Context,
    lane: LaneMetrics,
    mut judged: mpsc::UnboundedReceiver<Record>,
    written: mpsc::UnboundedSender<Written>,
    give_up: &CancellationToken,
) {
    // A cache that is slow must not hold anything up: what does not fit is not cached.
    let (answers, kept) = mpsc::channel(16);
    let cache = tokio::spawn(keep_answers(context.clone(), kept));
    let mut batch = Vec::with_capacity(BATCH);
    while judged.recv_many(&mut batch, BATCH).await > 0 {
        if (LOADED..FULL).contains(&batch.len()) {
            tokio::time::sleep(LINGER).await;
            while batch.len() < BATCH {
                let Ok(more) = judged.try_recv() else { break };
                batch.push(more);
            }
        }
        let bytes = batch.iter().map(|record| record.ticket.bytes()).sum();
        let done = Written { records: batch.len(), bytes };
        let write = write(&context, &lane, &mut batch, &answers);
        if give_up.run_until_cancelled(write).await.is_none() {
            break;
        }
        // The dispatcher has gone when a stop ran out of patience.
        let _ = written.send(done);
    }
    drop(answers);
    if cache.await.is_err() {
        tracing::error!("the task that keeps answers in the cache has failed");
    }
}

/// Writes all records of a batch, however often it takes.
async fn write(
    context: &Context,
    lane: &LaneMetrics,
    records: &mut Vec<Record>,
    answers: &mpsc::Sender<Vec<(MessageId, Response)>>,
) {
    let watch = context.clock.stopwatch();
    let refused = write_records(context, records).await;
    context.metrics.batch("record", records.len(), watch.elapsed());
    context.metrics.stale("record", refused.len());
    let refused: HashSet<MessageId> = refused.into_iter().collect();

    let mut responses = Vec::new();
    let mut letters = Vec::new();
    for record in records.drain(..) {
        // A success is never refused; another try of its message may be, in the same write.
        if record.verdict != Verdict::Sent && refused.contains(&record.ticket.id) {
            continue;
        }
        let (ticket, judged_at) = (record.ticket, record.judged_at);
        lane.judged(&record.verdict);
        let Some(outcome) = record.outcome else { continue };
        match record.verdict {
            Verdict::Sent => {
                lane.delivered_after(judged_at.since(ticket.created_at));
                responses.push((ticket.id, response(&outcome, judged_at)));
            }
            Verdict::Dead { reason, lane } => letters.push(DeadLetter {
                attempts: ticket.attempt,
                last_status: outcome.status,
                last_error: outcome.error.clone(),
                dead_at: judged_at,
                ticket: Arc::unwrap_or_clone(ticket),
                lane,
                reason,
            }),
            Verdict::Retry { .. } | Verdict::Expired | Verdict::Release { .. } => {}
        }
    }
    if !responses.is_empty() && answers.try_send(responses).is_err() {
        tracing::debug!("the cache is behind; some answers are not kept there");
    }
    if !letters.is_empty() {
        tokio::spawn(dead_letter::publish(context.clone(), letters));
    }
}

/// Writes records until the store has them. When the store refuses the values of a batch, its
/// halves are written apart, and a single refused record loses its texts rather than its verdict.
async fn write_records(context: &Context, records: &mut [Record]) -> Vec<MessageId> {
    let mut backoff = Backoff::new("recorder");
    let mut refusals = 0;
    loop {
        let call = Records { records, now: context.clock.now() };
        match context.store.record(&call).await {
            Ok(refused) => {
                backoff.succeeded();
                return refused;
            }
            Err(StoreError::Refused(why)) if records.len() > 1 => {
                tracing::debug!(
                    "a batch of {} records was refused ({why}); its halves go apart",
                    records.len()
                );
                let (first, second) = records.split_at_mut(records.len() / 2);
                let mut refused = Box::pin(write_records(context, first)).await;
                refused.extend(Box::pin(write_records(context, second)).await);
                return refused;
            }
            Err(error) => {
                if let (StoreError::Refused(why), Some(record)) = (&error, records.first_mut()) {
                    let id = record.ticket.id;
                    tracing::error!(id = id.0, "the store refuses what message {id} came to: {why}");
                    refusals += 1;
                    if !strip(record, refusals) {
                        tracing::error!(
                            id = id.0,
                            "what message {id} came to is given up; it stays in its lease until this process ends, and is sent again then"
                        );
                        return vec![id];
                    }
                }
                tokio::time::sleep(backoff.failed(&error)).await;
            }
        }
    }
}

/// Takes out of a record what its verdict does not need: first what came from the receiver, then the attempt itself, then
/// the words of the verdict. `false`: there is nothing more to take out.
fn strip(record: &mut Record, refusals: u32) -> bool {
    match (refusals, record.outcome.as_mut().map(Arc::make_mut), &mut record.verdict) {
        (1, Some(outcome), _) => {
            outcome.answer = String::new();
            outcome.provider_message_id = None;
            outcome.error = Some("the answer could not be stored".to_owned());
        }
        (1 | 2, ..) => record.outcome = None,
        (3, _, Verdict::Dead { reason, .. }) => *reason = "its reason could not be stored".to_owned(),
        (3, ..) => {}
        _ => return false,
    }
    true
}

fn response(outcome: &Outcome, at: Timestamp) -> Response {
    Response {
        message: outcome.provider_message.clone(),
        message_id: outcome.provider_message_id.clone(),
        status: outcome.status.unwrap_or_default(),
        timestamp: at,
    }
}

async fn keep_answers(context: Context, mut answers: mpsc::Receiver<Vec<(MessageId, Response)>>) {
    let mut down = false;
    while let Some(responses) = answers.recv().await {
        let watch = context.clock.stopwatch();
        let kept = context.cache.put(&responses).await;
        context.metrics.batch("cache", responses.len(), watch.elapsed());
        if let (Err(error), false) = (&kept, down) {
            tracing::warn!("answers are not cached for now: {error}");
        }
        down = kept.is_err();
    }
}
