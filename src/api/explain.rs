//! What a message waits for, in words.

use std::sync::Arc;

use super::ApiState;
use crate::clock::Timestamp;
use crate::message::{Held, Message, Status};
use crate::rate::Rate;
use crate::service::{Context, Snapshot};
use crate::store::operate::Control;

/// What has to be known besides a message to say what it waits for.
#[derive(Clone, Debug, Default)]
pub(super) struct Surroundings {
    now: Timestamp,
    /// `None`: the store did not say.
    control: Option<Control>,
    directory: Arc<Snapshot>,
    /// When the next attempt at the message's endpoint may begin, if that has a rate.
    next_reserved: Option<Timestamp>,
    queue: Queue,
}

/// How the message's lane is.
#[derive(Clone, Debug, Default)]
enum Queue {
    #[default]
    Unasked,
    Away(String),
    /// Tickets that its consumers have not taken up.
    Behind(i64),
}

impl Surroundings {
    /// What can be known for many messages at once.
    pub(super) async fn of_many(context: &Context) -> Surroundings {
        let now = context.clock.now();
        let control = context.store.control(now).await.ok();
        let directory = context.directory.snapshot();
        Surroundings { now, control, directory, ..Surroundings::default() }
    }

    /// Everything about one message.
    pub(super) async fn of_one(state: &ApiState, message: &Message) -> Surroundings {
        let context = &state.context;
        let directory = context.directory.snapshot();
        let lane = match message.lane.as_str() {
            "" => directory.lanes.iter().find(|lane| lane.fresh),
            topic => directory.lanes.iter().find(|lane| lane.topic == topic),
        };
        let queue = match lane.filter(|_| message.status == Status::Queued) {
            None => Queue::Unasked,
            Some(lane) => match tokio::time::timeout(super::status::ANSWER, context.depth(lane)).await {
                Ok(Ok(depth)) => Queue::Behind(depth.iter().map(|d| d.end - d.position).sum()),
                Ok(Err(error)) => Queue::Away(error.to_string()),
                Err(_) => Queue::Away("it does not answer".to_owned()),
            },
        };
        let next_reserved = match message.held {
            Some(Held::EndpointRate) => context.store.next_reserved(&message.endpoint).await.ok().flatten(),
            _ => None,
        };
        Surroundings { queue, next_reserved, ..Surroundings::of_many(context).await }
    }
}

/// Why a message stands where it stands, and until when.
pub(super) fn why(message: &Message, around: &Surroundings) -> Option<String> {
    if let Some(held) = message.held {
        return Some(explain_held(held, &message.endpoint, around));
    }
    let due = message.due_at.or(message.send_at).filter(|at| *at > around.now);
    match message.status {
        Status::Pending => Some(match due {
            Some(at) => format!("due at {at}"),
            None => format!("due now: {}", explain_producer(message, around)),
        }),
        Status::Queued => Some(match (due, &around.queue) {
            (Some(at), _) => format!("due at {at}; its ticket is on its lane ahead of that"),
            (None, Queue::Unasked) => "its ticket waits on its lane for a consumer".to_owned(),
            (None, Queue::Away(error)) => format!("its ticket is on a lane, and the broker is away: {error}"),
            (None, Queue::Behind(tickets)) => {
                format!("its ticket waits on its lane for a consumer, behind at most {tickets} others")
            }
        }),
        Status::Processing => Some("a consumer is delivering it".to_owned()),
        Status::Retrying => {
            let due = match due {
                Some(at) => format!("due at {at}"),
                None => format!("due now: {}", explain_producer(message, around)),
            };
            Some(match &message.reason {
                Some(reason) => format!("{due}; last: {reason}"),
                None => due,
            })
        }
        Status::Dead => message.reason.clone(),
        Status::Expired => message.expires_at.map(|at| format!("not sent before {at}")),
        Status::Sent | Status::Cancelled => None,
        Status::Unknown => {
            Some("a newer version of AMS gave it a status that this one does not know".to_owned())
        }
    }
}

fn explain_held(held: Held, endpoint: &str, around: &Surroundings) -> String {
    let directory = &around.directory;
    match held {
        Held::EndpointBusy => match directory.breakers.get(endpoint) {
            Some(breaker) => format!("held: {}", breaker.explain(endpoint)),
            None => format!("held: endpoint {endpoint} is busy; it goes on as soon as there is room"),
        },
        Held::EndpointRate => match directory.endpoints.get(endpoint).and_then(|endpoint| endpoint.rate) {
            Some(Rate { count, interval }) => {
                let next = around.next_reserved.filter(|at| *at > around.now);
                let next = next.map(|at| format!("; the next begins at {at}")).unwrap_or_default();
                format!(
                    "held: endpoint {endpoint} takes at most {count} attempts in {interval:?}, each in its turn{next}"
                )
            }
            None => format!("held: endpoint {endpoint} had a rate; it goes on within a second or two"),
        },
        Held::EndpointDisabled if !directory.endpoints.contains_key(endpoint) => {
            format!("held: there is no endpoint {endpoint}; it goes on once one is created")
        }
        Held::EndpointDisabled => match directory.faults.get(endpoint) {
            Some(fault) => format!("held: {fault}; it goes on once the endpoint's settings are mended"),
            None => format!("held: endpoint {endpoint} is disabled; it goes on once it is enabled"),
        },
        Held::Unknown => {
            "held for a reason that this version of AMS does not know; a newer one will free it".to_owned()
        }
    }
}

/// What the producer makes a due message wait for.
fn explain_producer(message: &Message, around: &Surroundings) -> String {
    let Some(control) = around.control else { return "it waits for the producer".to_owned() };
    if control.paused {
        return "the producers are paused, until somebody resumes them".to_owned();
    }
    if !control.active {
        return "no producer is running; start one".to_owned();
    }
    let first_try = message.status == Status::Pending;
    match (control.pacing.filter(|_| first_try), control.paced_until.filter(|at| *at > around.now)) {
        (Some(pacing), Some(until)) => format!(
            "paced: at most {} first tries in {:?}; the next begin by {} at the latest",
            pacing.count,
            pacing.interval,
            until.min(around.now.after(pacing.interval))
        ),
        _ => "it waits for the producer".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Timestamp;
    use std::time::Duration;

    use crate::breaker::Breaker;
    use crate::message::{Class, MessageId, NewMessage};
    use crate::retry::tests::outcome;
    use crate::store::Endpoint;

    /// Surroundings in which the endpoint sms exists.
    fn around() -> Surroundings {
        with_endpoint(|_| ())
    }

    fn with_endpoint(change: impl FnOnce(&mut Snapshot)) -> Surroundings {
        let endpoint = Endpoint { enabled: false, ..Endpoint::new("sms", "http://localhost:3000") };
        let endpoints = [("sms".to_owned(), Arc::new(endpoint))].into();
        let mut directory = Snapshot { endpoints, ..Snapshot::default() };
        change(&mut directory);
        Surroundings { directory: Arc::new(directory), ..Surroundings::default() }
    }

    fn message(status: Status) -> Message {
        let sent = NewMessage {
            endpoint: Some("sms".into()),
            recipient: "+90".into(),
            content: "Hello".into(),
            ..NewMessage::default()
        };
        Message { status, ..Message::pending(MessageId(1), Timestamp::EPOCH, sent) }
    }

    #[test]
    fn every_waiting_message_says_what_it_waits_for() {
        let at = Some(Timestamp::EPOCH.after(Duration::from_secs(3)));
        let reason = Some("status 500".to_owned());
        for (message, expected) in [
            (message(Status::Pending), "due now"),
            (Message { send_at: at, ..message(Status::Pending) }, "due at 1970-01-01T00:00:03Z"),
            (Message { held: Some(Held::EndpointDisabled), ..message(Status::Pending) }, "disabled"),
            (Message { held: Some(Held::EndpointBusy), ..message(Status::Retrying) }, "busy"),
            (message(Status::Unknown), "newer version"),
            (Message { held: Some(Held::Unknown), ..message(Status::Pending) }, "a newer one will free it"),
            (message(Status::Queued), "waits on its lane for a consumer"),
            (Message { due_at: at, ..message(Status::Queued) }, "due at 1970-01-01T00:00:03Z; its ticket"),
            (message(Status::Processing), "delivering"),
            (
                Message { due_at: at, reason: reason.clone(), ..message(Status::Retrying) },
                "due at 1970-01-01T00:00:03Z; last: status 500",
            ),
            (Message { reason, ..message(Status::Dead) }, "status 500"),
            (Message { expires_at: at, ..message(Status::Expired) }, "1970"),
        ] {
            let explained = why(&message, &around()).unwrap_or_default();
            assert!(explained.contains(expected), "{:?}: {explained}", message.status);
        }
        assert_eq!(why(&message(Status::Sent), &Surroundings::default()), None);
    }

    #[test]
    fn the_surroundings_say_more() {
        let control = Control { active: true, ..Control::default() };
        let with = |control| Surroundings { control: Some(control), ..Surroundings::default() };
        let pacing = Some(Rate { count: 100, interval: Duration::from_secs(1) });
        let paced_until = Some(Timestamp::EPOCH.after(Duration::from_secs(1)));
        let retrying = || Message { reason: Some("status 500".to_owned()), ..message(Status::Retrying) };
        for (message, around, expected) in [
            (message(Status::Pending), with(control), "it waits for the producer"),
            (message(Status::Pending), with(Control { paused: true, ..control }), "paused"),
            (message(Status::Pending), with(Control::default()), "no producer is running"),
            (
                message(Status::Pending),
                with(Control { pacing, paced_until, ..control }),
                "at most 100 first tries in 1s",
            ),
            (
                retrying(),
                with(Control { pacing, paced_until, ..control }),
                "due now: it waits for the producer; last",
            ),
            (retrying(), with(Control { paused: true, ..control }), "paused"),
            (
                message(Status::Queued),
                Surroundings { queue: Queue::Behind(12), ..Surroundings::default() },
                "behind at most 12",
            ),
            (
                message(Status::Queued),
                Surroundings { queue: Queue::Away("no answer".to_owned()), ..Surroundings::default() },
                "the broker is away: no answer",
            ),
            (
                Message { held: Some(Held::EndpointDisabled), ..message(Status::Pending) },
                Surroundings::default(),
                "there is no endpoint sms",
            ),
            (
                Message { held: Some(Held::EndpointDisabled), ..message(Status::Pending) },
                with_endpoint(|known| drop(known.faults.insert("sms".into(), "its URL is none".into()))),
                "held: its URL is none; it goes on once",
            ),
            (
                Message { held: Some(Held::EndpointBusy), ..message(Status::Retrying) },
                with_endpoint(|known| {
                    let failed = outcome(Class::Rejected, Some(503));
                    let breaker = Breaker::opened(None, &failed, Timestamp::EPOCH);
                    known.breakers.insert("sms".into(), breaker);
                }),
                "held: endpoint sms has failed for long (last: status 503); it is probed from 1970-01-01T00:00:05Z on",
            ),
        ] {
            let explained = why(&message, &around).unwrap_or_default();
            assert!(explained.contains(expected), "{:?}: {explained}", message.status);
        }
    }

    #[test]
    fn a_rate_is_told_with_the_time_of_the_next_attempt() {
        let held = Message { held: Some(Held::EndpointRate), ..message(Status::Pending) };
        let rated = with_endpoint(|known| {
            let endpoint = known.endpoints.get_mut("sms").and_then(Arc::get_mut).unwrap();
            endpoint.rate = Some(Rate { count: 5, interval: Duration::from_secs(1) });
        });
        let next_reserved = Some(Timestamp::EPOCH.after(Duration::from_secs(2)));
        let next = Surroundings { next_reserved, ..rated.clone() };
        let later = Surroundings { now: Timestamp::EPOCH.after(Duration::from_secs(2)), ..next.clone() };
        let told = "held: endpoint sms takes at most 5 attempts in 1s, each in its turn";
        for (around, expected) in [
            (next, &*format!("{told}; the next begins at 1970-01-01T00:00:02Z")),
            (later, told),
            (rated, told),
            (around(), "held: endpoint sms had a rate; it goes on within a second or two"),
        ] {
            assert_eq!(why(&held, &around).unwrap(), expected);
        }
    }
}
