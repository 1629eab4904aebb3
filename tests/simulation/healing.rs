//! Once nothing goes wrong any more, work goes on soon: no message stays where it is without a reason.

use std::collections::BTreeMap;
use std::time::Duration;

use ams::clock::Timestamp;
use ams::message::{Message, MessageId, Status};

use crate::world::World;

/// Work goes on within this time, whatever has died.
const HEALED: Duration = Duration::from_secs(30);

/// How long messages have been where they are, once the world is calm.
#[derive(Default)]
pub struct Stays(BTreeMap<MessageId, (Place, Timestamp)>);

/// Where a message is: its status, its attempts, and when the next is due.
type Place = (Status, i32, Option<Timestamp>);

impl Stays {
    /// Looks where all are. None may stay anywhere for longer than it takes to heal, unless it waits for its time, or
    /// for a receiver that is slow.
    pub fn look(&mut self, world: &World, messages: &[Message]) -> Result<(), String> {
        let now = world.clock.now();
        let time = world.time();
        let waiting = world.waiting();
        let open: Vec<_> = messages
            .iter()
            .filter(|message| !message.status.is_final() && message.endpoint != "slow")
            .filter(|message| waiting.get(&message.id).is_none_or(|due_at| *due_at <= time))
            .collect();
        self.0.retain(|id, _| open.iter().any(|message| message.id == *id));
        for message in open.into_iter().filter(|_| !world.faults.are_on()) {
            let place = (message.status, message.attempts, message.due_at);
            let stay = self.0.entry(message.id).or_insert((place, now));
            if stay.0 != place {
                *stay = (place, now);
            }
            let since = now.since(stay.1);
            world.faults.report.lock().unwrap().most("most seconds in one place", since.as_secs());
            if since > HEALED {
                return Err(format!("{message:?} has not moved for {since:?}; {}", world.state()));
            }
        }
        Ok(())
    }
}
