//! Who is there: processes and their leases, the one active producer, endpoints and lanes.

use std::time::Duration;

use async_trait::async_trait;

use super::Result;
use super::operate::Deletion;
use crate::breaker::Breaker;
use crate::clock::Timestamp;
use crate::lane::{Lane, LaneGroup};
use crate::rate::Rate;

/// A running process's number in the `instances` table; never used again for another.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct InstanceId(pub i64);

/// One process of AMS, as others see it. It lives as long as it renews its lease.
#[derive(Clone, Debug, PartialEq)]
pub struct Instance {
    pub id: InstanceId,
    /// `producer`, `consumer`, `retry-consumer`, `api` or `up`.
    pub service: String,
    pub host: String,
    pub version: String,
    pub started_at: Timestamp,
    pub seen_at: Timestamp,
    /// Until when its claims and begun messages are its own.
    pub lease_until: Timestamp,
}

/// An HTTP destination with its policy.
#[derive(Clone, Debug, PartialEq)]
pub struct Endpoint {
    pub name: String,
    pub url: String,
    /// One deadline over connect, head and body.
    pub timeout: Duration,
    /// Attempts in flight at once, in each consumer process; at least 1.
    pub in_flight_max: u32,
    /// Attempts at it, over all consumers together; `None`: as many as it takes.
    pub rate: Option<Rate>,
    /// Statuses after which a message is dead at once.
    pub final_statuses: Vec<u16>,
    pub enabled: bool,
    /// Standard Webhooks secret (`whsec_` and base64); `None`: unsigned.
    pub secret: Option<String>,
}

impl Endpoint {
    /// An endpoint with the defaults of the `endpoints` table.
    pub fn new(name: &str, url: &str) -> Endpoint {
        Endpoint {
            name: name.to_owned(),
            url: url.to_owned(),
            timeout: Duration::from_secs(15),
            in_flight_max: 1024,
            rate: None,
            final_statuses: vec![410],
            enabled: true,
            secret: None,
        }
    }
}

/// An instance's wish to be the one active producer.
#[derive(Clone, Copy, Debug)]
pub struct Bid {
    pub instance: InstanceId,
    pub now: Timestamp,
    /// Until when it leads without saying so again.
    pub until: Timestamp,
    /// No further first tries before this time; `None` leaves what stands in the store.
    pub paced_until: Option<Timestamp>,
    /// Its own setting for first tries over all producers together, for people to see.
    pub pacing: Option<Rate>,
}

impl Bid {
    /// No living leader's term ends later than this, as long as the clocks of all hosts agree to four terms. A later
    /// end was written by a clock that was wrong, and would keep everybody from leading until then.
    pub(super) fn latest_until(&self) -> Timestamp {
        self.now.after(self.until.since(self.now).saturating_mul(5))
    }
}

/// What the one active producer has to know of its predecessor.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Leadership {
    /// Since when somebody has led without a break of 1 s or more between two terms: so long every
    /// instance could have renewed its lease.
    pub steady_since: Timestamp,
    /// The pacing window that stands in the store ends then: pacing holds over all producers together.
    pub paced_until: Option<Timestamp>,
    /// Somebody has paused all producers: nothing may be claimed.
    pub paused: bool,
}

/// Processes, the leader among the producers, endpoints and lanes.
#[async_trait]
pub trait Registry: Send + Sync {
    /// What the store's clock says; `None`: it has none of its own, and all that use it are on one machine.
    async fn time(&self) -> Result<Option<Timestamp>>;

    /// Registers a process, whose lease lasts until `lease_until`.
    async fn enroll(
        &self,
        service: &str,
        host: &str,
        now: Timestamp,
        lease_until: Timestamp,
    ) -> Result<InstanceId>;

    /// Renews an instance's lease. `false`: it had run out and was taken away; enroll anew, and drop
    /// every begun message that has not been tried.
    async fn renew(&self, instance: InstanceId, now: Timestamp, lease_until: Timestamp) -> Result<bool>;

    /// Says which endpoints this instance can't try as fast as their messages come, in place of what it
    /// said before.
    async fn report_saturated(&self, instance: InstanceId, endpoints: &[String]) -> Result<()>;

    /// The endpoints that some instance has said to be busy.
    async fn saturated(&self) -> Result<Vec<String>>;

    /// Ends an instance in good order: its lease, leadership and row go.
    async fn retire(&self, instance: InstanceId) -> Result<()>;

    /// Tries to become, or remain, the one active producer. `None`: another is.
    async fn lead(&self, bid: &Bid) -> Result<Option<Leadership>>;

    /// All endpoints.
    async fn endpoints(&self) -> Result<Vec<Endpoint>>;

    /// Creates or replaces an endpoint. A change closes its breaker: somebody has mended something.
    async fn put_endpoint(&self, endpoint: &Endpoint) -> Result<()>;

    /// Deletes an endpoint, unless a message names it.
    async fn delete_endpoint(&self, name: &str) -> Result<Deletion>;

    /// The breakers that are not closed, with their endpoints' names; the oldest first.
    async fn breakers(&self) -> Result<Vec<(String, Breaker)>>;

    /// Opens breakers, and closes those without a value. One that was opened more often, or as often and for longer,
    /// stays as it is: several consumers find out the same. One that somebody has closed meanwhile is not opened again by a
    /// failure that belongs to the time before, and none for the first time while other consumers see successes: see
    /// [`Breaker::unless_sent_since`]. Says which of the changes were made.
    async fn set_breakers(&self, changes: &[(String, Option<Breaker>)]) -> Result<Vec<bool>>;

    /// Takes the right to probe these endpoints, each with one attempt until its time. Which of them it was given for: those
    /// whose breaker is half-open, and that nobody else probes.
    async fn probe(&self, endpoints: &[(String, Timestamp)], now: Timestamp) -> Result<Vec<String>>;

    /// All registered lanes.
    async fn lanes(&self) -> Result<Vec<Lane>>;

    /// Registers a lane; the newest wins. Returns what stood there before, if it was different.
    async fn put_lane(&self, lane: &Lane, now: Timestamp) -> Result<Option<Lane>>;

    /// The consumer groups of all lanes, also those that were not heard of lately.
    async fn lane_groups(&self) -> Result<Vec<LaneGroup>>;

    /// Notes that a group reads a lane. Groups of that lane that were silent for an hour before go.
    async fn put_lane_group(&self, group: &LaneGroup) -> Result<()>;
}
