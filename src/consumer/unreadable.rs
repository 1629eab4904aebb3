//! Records that are no tickets: they go to the dead-letter lane as they are, with the reason in a header.
//!
//! This goes on beside everything else, because it may take long or fail for good: the dead-letter lane may be
//! gone, closed to us, or made with a smaller limit. Publishing is tried for a bounded time, what is too large is
//! cut, and what still does not go is given up, said in the log and counted. The record itself then stays on
//! its lane until the broker drops it.

use std::time::Duration;

use bytes::Bytes;

use super::call::{Call, under_way};
use crate::lane::dead_letter_of;
use crate::queue::{LaneRecord, QueueError, RECORD_CUT, Receipt, Taken};
use crate::service::{Backoff, Context};
use crate::telemetry::Metrics;

/// Unreadable records kept in memory, at most: then no more is taken from the lane until some have gone.
const RECORDS_MAX: usize = 1_000;
/// Their bytes, at most; what was taken at once may come on top.
const BYTES_MAX: usize = 32 << 20;
/// How long one group of records is tried. A broker that is away gives the lane nothing to read either, so this
/// matters when only the dead-letter lane can't be written.
const PATIENCE: Duration = Duration::from_secs(20);

/// What became of an unreadable record, as the metrics say it.
const PUBLISHED: &str = "published";
const CUT: &str = "cut";
const GIVEN_UP: &str = "given_up";

/// A record that is no ticket, and why.
#[derive(Debug)]
struct Unreadable {
    taken: Taken,
    reason: String,
}

/// The unreadable records of one consumer: those that wait, and those on their way.
pub(super) struct UnreadableRecords {
    lane: String,
    waiting: Vec<Unreadable>,
    /// Records and bytes of the group on its way.
    going: (usize, usize),
    publishing: Option<Call<Vec<Receipt>>>,
}

impl UnreadableRecords {
    pub(super) fn new(lane: &str, metrics: &Metrics) -> UnreadableRecords {
        for end in [PUBLISHED, CUT, GIVEN_UP] {
            metrics.unreadable(lane, end, 0);
        }
        UnreadableRecords { lane: lane.to_owned(), waiting: Vec::new(), going: (0, 0), publishing: None }
    }

    /// Whether memory is left for more.
    pub(super) fn has_capacity(&self) -> bool {
        self.waiting.len() + self.going.0 < RECORDS_MAX && bytes(&self.waiting) + self.going.1 < BYTES_MAX
    }

    pub(super) fn add(&mut self, taken: Taken, reason: String) {
        self.waiting.push(Unreadable { taken, reason });
    }

    /// Publishes what waits, unless a call is under way.
    pub(super) fn publish(&mut self, context: &Context) {
        if self.publishing.is_none() && !self.waiting.is_empty() {
            let records = std::mem::take(&mut self.waiting);
            self.going = (records.len(), bytes(&records));
            self.publishing = Some(Box::pin(publish(context.clone(), self.lane.clone(), records)));
        }
    }

    /// The receipts of the next group that is done with, published or given up.
    pub(super) async fn done(&mut self) -> Vec<Receipt> {
        let receipts = under_way(&mut self.publishing).await;
        self.publishing = None;
        self.going = (0, 0);
        receipts
    }
}

fn bytes(records: &[Unreadable]) -> usize {
    records.iter().map(|record| record.taken.key.len() + record.taken.value.len()).sum()
}

/// Publishes a group, however far that is possible, and returns its receipts: all of it is done with then.
async fn publish(context: Context, lane: String, group: Vec<Unreadable>) -> Vec<Receipt> {
    let directory = context.directory.snapshot();
    let to = dead_letter_of(&lane, &directory.lanes);
    let records: Vec<_> = group.iter().map(|record| record.whole()).collect();
    // The reason may quote the record, so it stays out of the log.
    tracing::warn!(
        lane,
        "{} unreadable records on {lane} go to {to}; their header `reason` says why",
        records.len()
    );
    let cut = group.iter().filter(|record| record.taken.is_cut()).count();
    match tokio::time::timeout(PATIENCE, send(&context, to, &records)).await {
        Ok(Ok(())) => {
            context.metrics.unreadable(&lane, PUBLISHED, records.len() - cut);
            context.metrics.unreadable(&lane, CUT, cut);
        }
        // One record may be to blame: each is tried alone, so that it takes no other with it.
        Ok(Err(_)) => {
            for record in &group {
                alone(&context, &lane, to, record).await;
            }
        }
        Err(_) => {
            for record in &group {
                give_up(&context, &lane, to, record, &format!("not published within {PATIENCE:?}"));
            }
        }
    }
    group.iter().map(|record| record.taken.receipt).collect()
}

/// Publishes one record whole, else cut, else gives it up.
async fn alone(context: &Context, lane: &str, to: &str, record: &Unreadable) {
    let (whole, cut) = (record.whole(), record.cut());
    let sent = async {
        let is_cut = whole.value.len() == cut.value.len() && record.taken.is_cut();
        match send(context, to, &[whole]).await {
            Err(QueueError::TooLarge(_)) => send(context, to, &[cut]).await.map(|()| CUT),
            sent => sent.map(|()| if is_cut { CUT } else { PUBLISHED }),
        }
    };
    match tokio::time::timeout(PATIENCE, sent).await {
        Ok(Ok(end)) => context.metrics.unreadable(lane, end, 1),
        Ok(Err(error)) => give_up(context, lane, to, record, &error.to_string()),
        Err(_) => give_up(context, lane, to, record, &format!("not published within {PATIENCE:?}")),
    }
}

/// Publishes, and tries again for as long as only the broker is away.
async fn send(context: &Context, to: &str, records: &[LaneRecord]) -> Result<(), QueueError> {
    let mut backoff = Backoff::new("dead-letter lane");
    loop {
        let published = async {
            context.queue.ensure(&[to.to_owned()]).await?;
            context.queue.publish(to, records.to_vec()).await
        };
        match published.await {
            Ok(_) => {
                backoff.succeeded();
                return Ok(());
            }
            Err(error @ QueueError::Unavailable(_)) => tokio::time::sleep(backoff.failed(&error)).await,
            Err(error) => return Err(error),
        }
    }
}

fn give_up(context: &Context, lane: &str, to: &str, record: &Unreadable, why: &str) {
    context.metrics.unreadable(lane, GIVEN_UP, 1);
    let Receipt { partition, offset, .. } = record.taken.receipt;
    tracing::error!(
        lane,
        partition,
        offset,
        "an unreadable record could not be put on {to} ({why}); it stays on {lane} in partition {partition} at \
         offset {offset} until the broker drops it; mend {to} if you want such records there"
    );
}

impl Unreadable {
    /// The record with as much of its value as came.
    fn whole(&self) -> LaneRecord {
        let mut headers = vec![("reason", self.reason.clone())];
        if self.taken.is_cut() {
            headers.push(("size", self.taken.size.to_string()));
        }
        LaneRecord { key: self.taken.key.clone(), value: self.taken.value.clone(), headers }
    }

    /// The record as it fits every lane: the start of its key and value, and the value's true size in a header.
    fn cut(&self) -> LaneRecord {
        LaneRecord {
            key: start(&self.taken.key),
            value: start(&self.taken.value),
            headers: vec![("reason", self.reason.clone()), ("size", self.taken.size.to_string())],
        }
    }
}

fn start(bytes: &Bytes) -> Bytes {
    bytes.slice(..bytes.len().min(RECORD_CUT))
}
