//! The thread that reads the source: lines become batches of messages with their keys.

use serde_json::Value;
use tokio::sync::mpsc;

use super::Source;
use super::key::Keys;
use super::lines::{Format, Line, Lines};

/// Lines of a batch, and about how many bytes: the API takes 64 MiB, and escapes make bytes more.
const BATCH: usize = 1_000;
const BATCH_BYTES: u64 = 8 << 20;

/// A line that can't be sent.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Bad {
    pub(super) line: u64,
    pub(super) reason: String,
}

/// Messages with the numbers of their lines.
pub(super) type Numbered = Vec<(u64, Value)>;

/// Lines that are sent together.
#[derive(Debug, Default)]
pub(super) struct Batch {
    /// The last line before it, and its own last.
    pub(super) after: u64,
    pub(super) to: u64,
    /// Bytes of the source up to its end, and a digest of them.
    pub(super) bytes: u64,
    pub(super) content: String,
    pub(super) good: Numbered,
    pub(super) bad: Vec<Bad>,
}

/// What the reading thread gives.
pub(super) enum Given {
    Batch(Batch),
    End,
    /// What an earlier run has read is no longer there as it was.
    Changed,
    Failed(String),
}

/// What an earlier run has left to do.
#[derive(Clone, Debug, Default)]
pub(super) struct Passed {
    /// Lines up to this one are not sent again, only read: keys count equal messages from the beginning.
    pub(super) from: u64,
    /// The last line that is settled, and a digest of all up to its end.
    pub(super) settled: u64,
    pub(super) content: String,
}

/// Reads the source to its end, or until nobody takes what it reads.
pub(super) fn read_all(source: &Source, format: Format, passed: &Passed, give: &mpsc::Sender<Given>) {
    let opened = source.read().map_err(|error| error.to_string());
    let last = match opened.and_then(|input| Lines::open(format, input)) {
        Ok(lines) => read_batches(lines, &source.name, passed, give),
        Err(why) => Given::Failed(why),
    };
    // Who has gone wants to know nothing.
    let _ = give.blocking_send(last);
}

/// Gives batches up to the end, or up to the line from which on nothing can be read; what is said last.
fn read_batches<R: std::io::BufRead>(
    mut lines: Lines<R>,
    name: &str,
    passed: &Passed,
    give: &mpsc::Sender<Given>,
) -> Given {
    let mut keys = Keys::new(name);
    let mut batch = Batch { after: passed.from, to: passed.from, ..Batch::default() };
    let mut start = lines.bytes();
    // The source up to the line before: a broken record behind it may be taken in part.
    let mut taken = lines.taken();
    // Whether the source is the one that the earlier run has read is known once that is read again.
    let mut known = passed.settled == 0;
    let last = loop {
        let Line { number, message } = match lines.next() {
            Ok(Some(line)) => line,
            Ok(None) => break Given::End,
            Err(why) => break Given::Failed(why),
        };
        let message = message.map(|message| keys.give(message));
        taken = lines.taken();
        if !known && number >= passed.settled {
            known = number == passed.settled && taken.clone().digest() == passed.content;
            if !known {
                return Given::Changed;
            }
        }
        if number <= passed.from {
            start = lines.bytes();
            continue;
        }
        (batch.to, batch.bytes) = (number, lines.bytes());
        match message {
            Ok(message) => batch.good.push((number, message)),
            Err(reason) => batch.bad.push(Bad { line: number, reason }),
        }
        let full = batch.good.len() + batch.bad.len() >= BATCH || batch.bytes - start >= BATCH_BYTES;
        // What is settled already is counted already: it shares no batch with what is not.
        if full || number == passed.settled {
            start = batch.bytes;
            batch.content = taken.clone().digest();
            let next = Batch { after: number, to: number, ..Batch::default() };
            if give.blocking_send(Given::Batch(std::mem::replace(&mut batch, next))).is_err() {
                return Given::End;
            }
        }
    };
    if !known {
        return Given::Changed;
    }
    if batch.to > batch.after {
        batch.content = taken.digest();
        // Who has gone wants nothing more.
        let _ = give.blocking_send(Given::Batch(batch));
    }
    last
}

#[cfg(test)]
mod tests;
