//! What must hold when a world has settled.

use std::collections::BTreeSet;
use std::time::Duration;

use ams::cache::Cache;
use ams::message::{Attempt, Class, Message, Status};
use ams::store::Operations;

use crate::history::{History, Story, Try};
use crate::world::World;

/// Tries of a message: one, and three more.
const TRIES: i32 = 4;

/// Checks everything.
pub async fn all(world: &World) -> Result<(), String> {
    let messages = world.messages().await;
    let left = world.left();
    let mut attempts = Vec::new();
    let mut cached = Vec::new();
    for message in &messages {
        attempts.push(world.store.attempts(message.id).await.unwrap());
        cached.push(world.cache.now().get(message.id).await.unwrap().is_some());
    }
    let history = world.history.lock().unwrap();
    if let Some(broken) = history.broken.first() {
        return Err(format!("{} promises are broken: {broken}", history.broken.len()));
    }
    if messages.len() != history.stories().len() {
        return Err(format!("{} of {} messages are left", messages.len(), history.stories().len()));
    }
    if !left.is_empty() {
        return Err(format!("the nodes have stopped, and {left:?} hold something"));
    }
    for (at, message) in messages.iter().enumerate() {
        let story = &history.stories()[&message.id];
        let result = end(world, history.steps, message, story, &attempts[at])
            .and_then(|()| duplicates(world, &history.crashed, story))
            .and_then(|()| records(story, &attempts[at]));
        result.map_err(|why| format!("message {}: {why}; {message:?} {story:?}", message.id))?;
        if cached[at] && message.status != Status::Sent {
            return Err(format!("message {} is {}, and its answer is cached", message.id, message.status));
        }
        world.faults.count("answers in the cache", u64::from(cached[at]));
    }
    statistics(world, &history)
}

/// Whether a message may have ended as it has.
fn end(
    world: &World,
    steps: Duration,
    message: &Message,
    story: &Story,
    attempts: &[Attempt],
) -> Result<(), String> {
    match message.status {
        Status::Sent => {
            world.faults.count("sent", 1);
            if !story.tries.iter().any(Try::is_known) {
                return Err("it is sent, and nobody said so".to_owned());
            }
        }
        Status::Dead => {
            world.faults.count("dead", 1);
            dead(world, message, story, attempts)?;
        }
        Status::Expired => {
            world.faults.count("expired", 1);
            let Some(at) = message.expires_at else {
                return Err("it has expired, and had no expiry".to_owned());
            };
            if message.finished_at.is_none_or(|ended| ended.after(steps) < at) {
                return Err("it has expired before its time".to_owned());
            }
            if story.outlives_expiry {
                return Err("it has expired although it was redriven after its expiry".to_owned());
            }
        }
        Status::Cancelled => {
            world.faults.count("cancelled", 1);
            if story.cancel.is_none() {
                return Err("it is cancelled, and nobody did that".to_owned());
            }
        }
        status => return Err(format!("it ended {status}")),
    }
    let ends_sent = message.status == Status::Sent;
    if !ends_sent && story.tries.iter().any(Try::is_known) {
        return Err("a success is on record, and it is not sent".to_owned());
    }
    Ok(())
}

/// A dead message has had all of its tries since it was last redriven, or was refused for good; and its letter is out
/// or still to go.
fn dead(world: &World, message: &Message, story: &Story, attempts: &[Attempt]) -> Result<(), String> {
    let mut numbers: Vec<i32> = attempts.iter().map(|attempt| attempt.attempt).collect();
    numbers.retain(|number| *number > story.attempts_before);
    numbers.sort_unstable();
    if story.overlaps > 0 {
        // The try that was under way when it was cancelled had a number that was given again.
        numbers.dedup();
    }
    let refused = attempts.iter().any(|one| one.attempt == message.attempts && one.status == Some(410));
    let all: Vec<i32> = (story.attempts_before + 1..=message.attempts).collect();
    let made = message.attempts - story.attempts_before;
    if numbers != all || made > TRIES || made < TRIES && !refused {
        return Err(format!("it is dead after the attempts {numbers:?}"));
    }
    let database = world.database.lock().unwrap();
    let waits = "select exists (select 1 from dead_letters where message_id = ?1)";
    let waits: bool = database.query_row(waits, [message.id.0], |row| row.get(0)).unwrap();
    if !waits && story.letters == 0 {
        return Err("its dead letter is lost".to_owned());
    }
    Ok(())
}

/// Every second acceptance is explained: its answer was lost, its process crashed before the store knew of it, or
/// somebody redrove the message while a try was under way. A clean stop explains none.
fn duplicates(world: &World, crashed: &BTreeSet<u64>, story: &Story) -> Result<(), String> {
    let accepted = story.tries.iter().filter(|this| this.is_accepted()).count();
    world.faults.count("duplicates", accepted.saturating_sub(1) as u64);
    let known = story.tries.iter().filter(|this| this.is_known()).count();
    if known > story.successes_max() {
        return Err(format!("{known} successes are on record"));
    }
    let mut hidden = BTreeSet::new();
    for this in story.tries.iter().filter(|this| this.recorded.is_none()) {
        if !hidden.insert(this.process) && story.overlaps == 0 {
            return Err(format!("the crash of process {} hides several tries", this.process));
        }
        if !crashed.contains(&this.process) {
            return Err(format!("{this:?} is not on record, and its process did not crash"));
        }
        world.faults.count("hidden acceptances", u64::from(this.is_accepted()));
    }
    Ok(())
}

/// Every try that the store was told of is on record once, and no other.
fn records(story: &Story, attempts: &[Attempt]) -> Result<(), String> {
    let mut told: Vec<(i32, Class)> = Vec::new();
    for this in story.tries.iter().filter(|this| this.recorded.is_some()) {
        let Some((_, class)) = this.answer else { return Err(format!("{this:?} has no answer")) };
        told.push((this.attempt, class));
    }
    let mut on_record: Vec<_> = attempts.iter().map(|attempt| (attempt.attempt, attempt.class)).collect();
    let key = |(attempt, class): &(i32, Class)| (*attempt, class.as_str());
    told.sort_by_key(key);
    on_record.sort_by_key(key);
    if told != on_record {
        return Err(format!("on record are {on_record:?}, and made were {told:?}"));
    }
    Ok(())
}

/// The statistics count each try whose verdict was accepted, once.
fn statistics(world: &World, history: &History) -> Result<(), String> {
    let tries = || history.stories().values().flat_map(|story| &story.tries);
    let accepted = tries().filter(|this| this.recorded == Some(true));
    let (sent, failed): (Vec<_>, Vec<_>) =
        accepted.partition(|this| this.answer.is_some_and(|(_, class)| class == Class::Accepted));
    let database = world.database.lock().unwrap();
    let sums = "select coalesce(sum(sent), 0), coalesce(sum(failed), 0) from stats";
    let sums: (i64, i64) = database.query_row(sums, [], |row| Ok((row.get(0)?, row.get(1)?))).unwrap();
    if sums != (sent.len() as i64, failed.len() as i64) && !history.ambiguous {
        return Err(format!("the statistics say {sums:?}; it were {} and {}", sent.len(), failed.len()));
    }
    Ok(())
}
