//! What every service needs to know of endpoints, their breakers, and lanes, read from the store each second.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwap;
use tokio_util::sync::CancellationToken;

use super::{LEASE, Service, Step};
use crate::breaker::Breaker;
use crate::delivery::fault_of;
use crate::lane::{Lane, LaneGroup, dead_letter_of};
use crate::retry::Policy;
use crate::store::{Endpoint, Result, Store, StoreError};

const REFRESH: Duration = Duration::from_secs(1);

/// Endpoints, breakers and lanes as they stood at the last refresh.
pub struct Directory {
    store: Arc<dyn Store>,
    // Read for every message, replaced once a second: readers must never wait.
    snapshot: ArcSwap<Snapshot>,
}

/// One reading of the directory.
#[derive(Debug, Default)]
pub struct Snapshot {
    pub endpoints: HashMap<String, Arc<Endpoint>>,
    /// Whether some have a rate.
    pub rated: bool,
    /// Their breakers that are not closed.
    pub breakers: HashMap<String, Breaker>,
    pub lanes: Vec<Lane>,
    /// The consumer groups of all lanes.
    pub groups: Vec<LaneGroup>,
    /// Endpoints whose settings can't be used, and why: their messages are held until somebody mends them.
    pub faults: BTreeMap<String, String>,
}

impl Snapshot {
    /// The endpoint of that name, when it exists, is enabled, and has settings that can be used.
    pub fn enabled_endpoint(&self, name: &str) -> Option<&Arc<Endpoint>> {
        let open = self.endpoints.get(name).filter(|endpoint| endpoint.enabled);
        open.filter(|_| self.faults.is_empty() || !self.faults.contains_key(name))
    }

    /// Whether attempts at that endpoint are bounded by a rate.
    pub fn is_rated(&self, name: &str) -> bool {
        self.rated && self.endpoints.get(name).is_some_and(|endpoint| endpoint.rate.is_some())
    }

    /// The consumer groups whose positions tell how far `lane` has been read: the living ones, or those that fell
    /// silent last. Before any was heard of, the one that registered the lane.
    pub fn groups_of<'a>(&'a self, lane: &'a Lane) -> Vec<&'a str> {
        let living = LaneGroup::living(&self.groups, &lane.topic, LEASE);
        if living.is_empty() { vec![&lane.group] } else { living }
    }

    /// What decides after a try at `endpoint` on `lane`: the lane as it was registered last, so that all of its consumers
    /// decide alike.
    pub fn policy<'a>(&'a self, lane: &'a Lane, endpoint: &'a Endpoint) -> Policy<'a> {
        let lane = self.lanes.iter().find(|registered| registered.topic == lane.topic).unwrap_or(lane);
        Policy {
            lane,
            next: self.lanes.iter().find(|other| other.topic == lane.next),
            dead_letter: dead_letter_of(&lane.next, &self.lanes),
            final_statuses: &endpoint.final_statuses,
        }
    }
}

impl Directory {
    /// An empty directory; [`Directory::refresh`] fills it.
    pub fn new(store: Arc<dyn Store>) -> Directory {
        Directory { store, snapshot: ArcSwap::default() }
    }

    /// What is known now.
    pub fn snapshot(&self) -> Arc<Snapshot> {
        self.snapshot.load_full()
    }

    /// Reads endpoints, breakers and lanes anew.
    ///
    /// # Errors
    /// Those of the store; what was known stays.
    pub async fn refresh(&self) -> Result<()> {
        let endpoints = self.store.endpoints().await?;
        let breakers = self.store.breakers().await?.into_iter().collect();
        let (lanes, groups) = (self.store.lanes().await?, self.store.lane_groups().await?);
        let before = self.snapshot();
        let faults = faults(&endpoints, &before);
        for (name, fault) in faults.iter().filter(|(name, fault)| before.faults.get(*name) != Some(*fault)) {
            tracing::error!("messages of endpoint {name} are held, because {fault}; mend its settings");
        }
        let rated = endpoints.iter().any(|endpoint| endpoint.rate.is_some());
        let endpoints = endpoints.into_iter().map(|e| (e.name.clone(), Arc::new(e))).collect();
        self.snapshot.store(Arc::new(Snapshot { endpoints, rated, breakers, lanes, groups, faults }));
        Ok(())
    }

    /// Keeps the directory fresh until `stop`.
    pub async fn run(&self, stop: &CancellationToken) {
        super::run(&mut &*self, stop, &tokio::sync::Notify::new()).await;
    }
}

/// What is wrong with endpoints. Those that have not changed since are not read again.
fn faults(endpoints: &[Endpoint], before: &Snapshot) -> BTreeMap<String, String> {
    let fault = |endpoint: &Endpoint| match before.endpoints.get(&endpoint.name) {
        Some(known) if **known == *endpoint => before.faults.get(&endpoint.name).cloned(),
        _ => fault_of(endpoint),
    };
    endpoints.iter().filter_map(|endpoint| Some((endpoint.name.clone(), fault(endpoint)?))).collect()
}

impl Service for &Directory {
    const NAME: &'static str = "directory";
    type Error = StoreError;

    async fn step(&mut self) -> Result<Step> {
        self.refresh().await.map(|()| Step::Idle(REFRESH))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::Timestamp;
    use crate::lane::tests::lane;

    #[tokio::test]
    async fn an_endpoint_with_broken_settings_takes_nothing_until_it_is_mended() {
        let store: Arc<dyn Store> = Arc::new(crate::store::sqlite::SqliteStore::in_memory().unwrap());
        let directory = Directory::new(Arc::clone(&store));
        let sound = Endpoint::new("sound", "http://localhost:3000/a");
        let secret =
            Endpoint { secret: Some("x".to_owned()), ..Endpoint::new("secret", "http://localhost/") };
        let url = Endpoint::new("url", "localhost:3000");
        for endpoint in [&sound, &secret, &url] {
            store.put_endpoint(endpoint).await.unwrap();
        }
        for _ in 0..2 {
            directory.refresh().await.unwrap();
            let known = directory.snapshot();
            let open = ["sound", "secret", "url"].map(|name| known.enabled_endpoint(name).is_some());
            assert_eq!(open, [true, false, false], "{:?}", known.faults);
            assert!(known.faults["secret"].contains("secret"), "{:?}", known.faults);
        }
        store.put_endpoint(&Endpoint { secret: None, ..secret }).await.unwrap();
        directory.refresh().await.unwrap();
        assert!(directory.snapshot().enabled_endpoint("secret").is_some());
    }

    #[test]
    fn all_consumers_of_a_lane_decide_by_its_newest_settings() {
        let (own, newest) = (lane("messages", "a-dlq", true, 1), lane("messages", "b-dlq", true, 7));
        let endpoint = Endpoint::new("default", "http://localhost:3000");
        let unregistered = Snapshot::default();
        assert_eq!(unregistered.policy(&own, &endpoint).lane.tries, 1);
        let known = Snapshot { lanes: vec![newest], ..Snapshot::default() };
        let policy = known.policy(&own, &endpoint);
        assert_eq!((policy.lane.tries, policy.dead_letter), (7, "b-dlq"));
    }

    #[test]
    fn a_lane_has_the_groups_that_were_heard_of_else_the_one_that_registered_it() {
        let messages = lane("messages", "messages-dlq", true, 1);
        let mut known = Snapshot { lanes: vec![messages.clone()], ..Snapshot::default() };
        assert_eq!(known.groups_of(&messages), [messages.group.as_str()]);
        let seen_at = Timestamp::EPOCH;
        known.groups.push(LaneGroup { topic: "messages".into(), group: "theirs".into(), seen_at });
        assert_eq!(known.groups_of(&messages), ["theirs"]);
    }
}
