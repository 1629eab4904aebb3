//! What really happened, as nobody in the simulated system can know it: every try, what the receiver made of it, whether
//! it came to the store, and what people did with the message.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use ams::clock::Timestamp;
use ams::lane::Lane;
use ams::message::{Class, MessageId, Verdict};
use ams::store::{Endpoint, Record};
use ams::ticket::{BatchId, Ticket};

/// One try.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Try {
    /// The number of the process that made it.
    pub process: u64,
    pub batch: BatchId,
    /// The attempt's number.
    pub attempt: i32,
    pub began: Timestamp,
    /// What the receiver did: whether it accepted, and what the sender heard of it. `None`: it is not over.
    pub answer: Option<(bool, Class)>,
    /// Whether the store accepted its verdict; `None`: it has not heard of it.
    pub recorded: Option<bool>,
}

/// Who begins a try, and of what.
pub struct Beginning<'a> {
    /// The number of the process.
    pub process: u64,
    pub lane: &'a Lane,
    pub ticket: &'a Ticket,
    pub endpoint: &'a Endpoint,
    pub now: Timestamp,
}

impl Try {
    /// Whether the receiver has the message and the store knows it.
    pub fn is_known(&self) -> bool {
        self.recorded.is_some() && self.answer == Some((true, Class::Accepted))
    }

    /// Whether the receiver has the message.
    pub fn is_accepted(&self) -> bool {
        self.answer.is_some_and(|(accepted, _)| accepted)
    }
}

/// A cancel that stands.
#[derive(Clone, Copy, Debug)]
pub struct Cancel {
    /// Tries that had begun before.
    pub tries: usize,
}

/// The story of one message.
#[derive(Clone, Debug, Default)]
pub struct Story {
    pub tries: Vec<Try>,
    pub cancel: Option<Cancel>,
    /// Attempts that it had had when it was last redriven.
    pub attempts_before: i32,
    pub redriven: bool,
    /// Its expiry had passed when it was last redriven, and counts no more.
    pub outlives_expiry: bool,
    /// Cancels while it was processing: after a redrive, the try of then and another may both succeed.
    pub overlaps: usize,
    /// Dead letters that a lane has taken.
    pub letters: u64,
}

impl Story {
    /// Successes that may be on record: one, and another for each cancel of a try under way that a redrive followed.
    pub fn successes_max(&self) -> usize {
        if self.redriven { 1 + self.overlaps } else { 1 }
    }
}

/// The stories of all messages, and what else the checks have to know.
#[derive(Debug, Default)]
pub struct History {
    stories: BTreeMap<MessageId, Story>,
    /// Processes that ended without a word.
    pub crashed: BTreeSet<u64>,
    /// Tries under way, by process, lane and endpoint.
    in_flight: BTreeMap<(u64, String, String), u32>,
    /// Since when producers have been paused.
    pub paused_since: Option<Timestamp>,
    /// By how much the clock that all go by has been set, all steps together: so far may a time that was written before
    /// lie beside one that is read later.
    pub steps: Duration,
    /// Two tries of one message were recorded in one call, and one was refused: nobody says which.
    pub ambiguous: bool,
    /// Promises that were seen to be broken.
    pub broken: Vec<String>,
}

impl History {
    pub fn of(&mut self, id: MessageId) -> &mut Story {
        self.stories.entry(id).or_default()
    }

    pub fn stories(&self) -> &BTreeMap<MessageId, Story> {
        &self.stories
    }

    /// Notes that a try begins, and checks that it may.
    pub fn begins(&mut self, beginning: &Beginning<'_>) {
        let Beginning { process, lane, ticket, endpoint, now } = *beginning;
        let mut why = Vec::new();
        let in_flight =
            self.in_flight.entry((process, lane.topic.clone(), endpoint.name.clone())).or_default();
        *in_flight += 1;
        if *in_flight > endpoint.in_flight_max {
            why.push("its endpoint has as many in flight as it may");
        }
        let story = self.of(ticket.id);
        if story.tries.iter().any(|before| before.batch == ticket.batch) {
            why.push("a try of the same batch has begun before");
        }
        if story.tries.iter().filter(|before| before.is_known()).count() >= story.successes_max() {
            why.push("the store knows that it is sent");
        }
        if let Some(cancel) = story.cancel {
            // What was processing at a cancel may still be tried: also when it was redriven since, and is cancelled again.
            let since = story.tries.len() - cancel.tries;
            if since >= story.overlaps {
                why.push("it is cancelled");
            }
        }
        let (batch, attempt) = (ticket.batch, ticket.attempt);
        story.tries.push(Try { process, batch, attempt, began: now, answer: None, recorded: None });
        let why = why.into_iter().map(|why| format!("{ticket:?} is tried at {now} although {why}"));
        self.broken.extend(why);
    }

    /// Notes what the receiver did.
    pub fn answered(&mut self, beginning: &Beginning<'_>, accepted: bool, class: Class) {
        let Beginning { process, lane, ticket, endpoint, .. } = *beginning;
        let in_flight = self.in_flight.entry((process, lane.topic.clone(), endpoint.name.clone()));
        in_flight.and_modify(|in_flight| *in_flight -= 1);
        let mut tries = self.of(ticket.id).tries.iter_mut();
        let this = tries.find(|this| this.batch == ticket.batch).unwrap();
        this.answer = Some((accepted, class));
    }

    /// Notes what the store has written.
    pub fn recorded(&mut self, records: &[Record], refused: &[MessageId]) {
        for record in records.iter().filter(|record| record.outcome.is_some()) {
            // A success is never refused; another try of its message may be.
            let accepted = record.verdict == Verdict::Sent || !refused.contains(&record.ticket.id);
            self.ambiguous |=
                !accepted && records.iter().filter(|one| one.ticket.id == record.ticket.id).count() > 1;
            let mut tries = self.of(record.ticket.id).tries.iter_mut();
            match tries.find(|this| this.batch == record.ticket.batch) {
                // A write that is repeated is refused, because it has happened.
                Some(this) => this.recorded = this.recorded.or(Some(accepted)),
                None => {
                    self.broken.push(format!("a try on record was never made: {:?}", record.ticket));
                }
            }
        }
    }
}
