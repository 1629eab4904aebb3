//! Writes what tries came to: one write at a time, with everything that ended meanwhile in the next.
//!
//! A result is never thrown away and a message never sent again because a write failed: the write is
//! repeated until the store has it. Answers go to the cache and dead letters to their lane afterwards.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use tokio::sync::mpsc;
use tokio_util::sync::CancellationToken;

use super::begin::Lease;
use crate::cache::Response;
use crate::clock::Timestamp;
use crate::message::{MessageId, Outcome, Ticket, Verdict};
use crate::producer::dead_letter_record;
use crate::service::{Backoff, Parts};
use crate::store::{DeadLetter, LeaseId, Record, Records, StoreError};
use crate::telemetry::LaneMetrics;

/// Records written in one call, at most.
const BATCH: usize = 2_000;
/// With at least this many results at once there is load, and waiting a moment makes fewer, larger writes.
const LOADED: usize = 64;
const LINGER: Duration = Duration::from_millis(10);

/// A try with its verdict, on the way to the store.
pub(super) struct Judged {
    pub(super) record: Record,
    pub(super) ticket: Ticket,
    pub(super) lease: Arc<Lease>,
    pub(super) judged_at: Timestamp,
}

/// Writes until the other side is done; tells `written` how many were.
pub(super) async fn run(
    parts: Parts,
    lane: LaneMetrics,
    mut judged: mpsc::UnboundedReceiver<Judged>,
    written: mpsc::UnboundedSender<usize>,
) {
    // A cache that is slow must not hold anything up: what does not fit is not cached.
    let (answers, kept) = mpsc::channel(16);
    let cache = tokio::spawn(keep_answers(parts.clone(), kept));
    let mut batch = Vec::with_capacity(BATCH);
    while judged.recv_many(&mut batch, BATCH).await > 0 {
        if (LOADED..BATCH / 2).contains(&batch.len()) {
            tokio::time::sleep(LINGER).await;
            while batch.len() < BATCH {
                let Ok(more) = judged.try_recv() else { break };
                batch.push(more);
            }
        }
        let count = batch.len();
        write(&parts, &lane, std::mem::take(&mut batch), &answers).await;
        // The desk has gone when a stop ran out of patience.
        let _ = written.send(count);
    }
    drop(answers);
    if cache.await.is_err() {
        tracing::error!("the task that keeps answers in the cache has failed");
    }
}

/// Writes one batch, however often it takes.
async fn write(
    parts: &Parts,
    lane: &LaneMetrics,
    batch: Vec<Judged>,
    answers: &mpsc::Sender<Vec<(MessageId, Response)>>,
) {
    let watch = parts.clock.stopwatch();
    let finished = finished(&batch);
    let (records, tickets): (Vec<_>, Vec<_>) =
        batch.into_iter().map(|j| (j.record, (j.ticket, j.judged_at))).unzip();
    let refused = write_records(parts, records.clone(), &finished).await;
    parts.metrics.batch("record", records.len(), watch.elapsed());
    parts.metrics.stale("record", refused.len());

    let mut responses = Vec::new();
    let mut letters = Vec::new();
    for (record, (ticket, judged_at)) in records.into_iter().zip(tickets) {
        if refused.contains(&record.id) {
            continue;
        }
        lane.judged(&record.verdict);
        let Some(outcome) = record.outcome else { continue };
        match record.verdict {
            Verdict::Sent => {
                lane.delivered_after(judged_at.since(ticket.created_at));
                responses.push((record.id, response(&outcome, judged_at)));
            }
            Verdict::Dead { reason, lane } => letters.push(DeadLetter {
                attempts: record.attempt,
                last_status: outcome.status,
                last_error: outcome.error,
                dead_at: judged_at,
                ticket,
                lane,
                reason,
            }),
            Verdict::Retry { .. } | Verdict::Release => {}
        }
    }
    if !responses.is_empty() && answers.try_send(responses).is_err() {
        tracing::debug!("the cache is behind; some answers are not kept there");
    }
    if !letters.is_empty() {
        tokio::spawn(publish_dead_letters(parts.clone(), letters));
    }
}

/// The leases whose last messages are in this batch.
fn finished(batch: &[Judged]) -> Vec<LeaseId> {
    batch
        .iter()
        .filter(|judged| judged.lease.unrecorded.fetch_sub(1, Ordering::Relaxed) == 1)
        .map(|judged| judged.lease.id)
        .collect()
}

/// Writes records until the store has them. When the store refuses the values of a batch, its
/// halves are written apart, and a single refused record loses its texts rather than its verdict.
async fn write_records(parts: &Parts, mut records: Vec<Record>, finished: &[LeaseId]) -> Vec<MessageId> {
    let mut backoff = Backoff::new("recorder");
    loop {
        let call = Records { records: &records, finished, now: parts.clock.now() };
        match parts.store.record(&call).await {
            Ok(refused) => {
                backoff.succeeded();
                return refused;
            }
            Err(StoreError::Refused(why)) if records.len() > 1 => {
                tracing::debug!(
                    "a batch of {} records was refused ({why}); its halves go apart",
                    records.len()
                );
                let second = records.split_off(records.len() / 2);
                let mut refused = Box::pin(write_records(parts, records, &[])).await;
                refused.extend(Box::pin(write_records(parts, second, finished)).await);
                return refused;
            }
            Err(error) => {
                if let (StoreError::Refused(why), Some(record)) = (&error, records.first_mut()) {
                    tracing::error!(
                        id = record.id.0,
                        "the store refuses what message {} came to: {why}",
                        record.id
                    );
                    strip(record);
                }
                tokio::time::sleep(backoff.failed(&error)).await;
            }
        }
    }
}

/// Takes out of a record what came from the receiver and is not needed to decide.
fn strip(record: &mut Record) {
    if let Some(outcome) = &mut record.outcome {
        outcome.answer = String::new();
        outcome.provider_message_id = None;
        outcome.error = Some("the answer could not be stored".to_owned());
    }
}

fn response(outcome: &Outcome, at: Timestamp) -> Response {
    Response {
        message: outcome.provider_message.clone(),
        message_id: outcome.provider_message_id.clone(),
        status: outcome.status.unwrap_or_default(),
        timestamp: at,
    }
}

async fn keep_answers(parts: Parts, mut answers: mpsc::Receiver<Vec<(MessageId, Response)>>) {
    let mut down = false;
    while let Some(responses) = answers.recv().await {
        let watch = parts.clock.stopwatch();
        let kept = parts.cache.put(&responses).await;
        parts.metrics.batch("cache", responses.len(), watch.elapsed());
        if let (Err(error), false) = (&kept, down) {
            tracing::warn!("answers are not cached for now: {error}");
        }
        down = kept.is_err();
    }
}

/// Publishes dead letters and marks them in the store. What fails here the janitor does later.
pub(crate) async fn publish_dead_letters(parts: Parts, letters: Vec<DeadLetter>) {
    let mut lanes: std::collections::BTreeMap<&str, Vec<&DeadLetter>> = std::collections::BTreeMap::new();
    for letter in &letters {
        lanes.entry(&letter.lane).or_default().push(letter);
    }
    for (lane, letters) in lanes {
        let records = letters.iter().map(|letter| dead_letter_record(letter)).collect();
        let ids: Vec<_> = letters.iter().map(|letter| letter.ticket.id).collect();
        if let Err(error) = parts.queue.publish(lane, records).await {
            tracing::warn!(lane, "{} dead letters will be published later: {error}", ids.len());
            continue;
        }
        let mark = || parts.store.dead_lettered(&ids);
        crate::service::persist("dead letters", &CancellationToken::new(), mark).await;
    }
}
