//! Who may be tried now: how many messages each endpoint has here, waiting and in flight. Pure.
//!
//! Two bounds keep a bad endpoint from hurting others (P5). *Admission*: an endpoint may hold at most
//! as much of the window as is still free, so one that hangs ends up with half, two with a third
//! each, and there is always as much left for somebody else. (The rule is the dynamic threshold
//! of shared-memory switches: Choudhury and Hahne, 1998.) *Attempts in flight*: few while answers come
//! at once, because more connections only cost, and more as latency grows, up to the endpoint's setting.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

/// Attempts in flight with which a receiver that answers at once is kept fully busy (24 to 64 were
/// best in the design's measurement; 512 cost a third more CPU per message).
const IN_FLIGHT_MIN: u32 = 64;

/// The latency at which [`IN_FLIGHT_MIN`] is no longer enough; above it the number grows in proportion.
const LATENCY_AT_MIN: Duration = Duration::from_millis(4);

/// How many messages may wait here for an endpoint beyond those in flight.
const WAITING_MAX: usize = 1024;

/// The loads of all endpoints in this process's lane.
#[derive(Debug)]
pub struct Limits {
    window: usize,
    total: usize,
    loads: HashMap<Arc<str>, Load>,
}

#[derive(Debug, Default)]
struct Load {
    /// Waiting and in flight.
    admitted: usize,
    in_flight: u32,
    /// Moving mean of the time an attempt takes, in seconds.
    latency_s: f64,
}

impl Limits {
    /// Limits for at most `window` messages at once.
    pub fn new(window: usize) -> Limits {
        Limits { window, total: 0, loads: HashMap::new() }
    }

    /// How many messages are admitted, over all endpoints.
    pub fn total(&self) -> usize {
        self.total
    }

    /// How many more may be admitted, over all endpoints.
    pub fn free(&self) -> usize {
        self.window.saturating_sub(self.total)
    }

    /// How many more messages of `endpoint` would be admitted now.
    pub fn room(&self, endpoint: &str, in_flight_max: u32) -> usize {
        let admitted = self.loads.get(endpoint).map_or(0, |load| load.admitted);
        // Each admission takes one from what is free and adds one to what it has: hence half of the rest.
        let threshold = self.free().saturating_sub(admitted).div_ceil(2);
        let own = (in_flight_max as usize + WAITING_MAX).saturating_sub(admitted);
        own.min(threshold)
    }

    /// Admits one message of `endpoint` if there is room.
    pub fn admit(&mut self, endpoint: &str, in_flight_max: u32) -> bool {
        if self.room(endpoint, in_flight_max) == 0 {
            return false;
        }
        self.load(endpoint).admitted += 1;
        self.total += 1;
        true
    }

    /// Starts an attempt at `endpoint` if one more may be in flight.
    pub fn start(&mut self, endpoint: &str, in_flight_max: u32) -> bool {
        let load = self.load(endpoint);
        let may = load.in_flight < in_flight_target(load.latency_s, in_flight_max);
        load.in_flight += u32::from(may);
        may
    }

    /// Notes that an attempt at `endpoint` ended after `took`; its message leaves the window.
    pub fn finish(&mut self, endpoint: &str, took: Duration) {
        let load = self.load(endpoint);
        load.in_flight = load.in_flight.saturating_sub(1);
        load.latency_s += (took.as_secs_f64() - load.latency_s) * 0.05;
        self.leave(endpoint);
    }

    /// Notes that an admitted message leaves the window without having been tried.
    pub fn leave(&mut self, endpoint: &str) {
        if let Some(load) = self.loads.get_mut(endpoint) {
            load.admitted = load.admitted.saturating_sub(1);
            self.total = self.total.saturating_sub(1);
        }
    }

    /// Attempts in flight, over all endpoints.
    pub fn in_flight(&self) -> usize {
        self.loads.values().map(|load| load.in_flight as usize).sum()
    }

    /// Forgets endpoints that have nothing here, so that a million names do not stay in memory.
    pub fn forget_idle(&mut self) {
        if self.loads.len() > 10_000 {
            self.loads.retain(|_, load| load.admitted > 0);
        }
    }

    fn load(&mut self, endpoint: &str) -> &mut Load {
        if !self.loads.contains_key(endpoint) {
            self.loads.insert(endpoint.into(), Load::default());
        }
        self.loads.get_mut(endpoint).expect("it was inserted above if it was missing")
    }
}

/// How many attempts may be in flight at a mean latency: by Little's law the same rate needs as
/// many more connections as answers take longer.
fn in_flight_target(latency_s: f64, in_flight_max: u32) -> u32 {
    let factor = latency_s / LATENCY_AT_MIN.as_secs_f64();
    let wanted = f64::from(IN_FLIGHT_MIN) * factor.max(1.0);
    if wanted >= f64::from(in_flight_max) { in_flight_max.max(1) } else { wanted as u32 }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn fill(limits: &mut Limits, endpoint: &str, max: u32) -> usize {
        let mut count = 0;
        while limits.admit(endpoint, max) {
            count += 1;
        }
        count
    }

    #[test]
    fn one_hanging_endpoint_leaves_half_of_the_window_and_two_a_third() {
        let mut limits = Limits::new(6_000);
        assert_eq!(fill(&mut limits, "hangs", 10_000), 3_000);
        assert_eq!(fill(&mut limits, "hangs too", 10_000), 1_500);
        assert_eq!(limits.room("healthy", 10_000), 750);
    }

    #[test]
    fn an_endpoint_never_waits_here_in_more_than_its_own_bound() {
        let mut limits = Limits::new(100_000);
        assert_eq!(fill(&mut limits, "a", 1), 1 + WAITING_MAX);
    }

    #[test]
    fn attempts_in_flight_follow_latency_up_to_the_setting() {
        for (latency_s, max, expected) in [
            (0.0, 1024, 64),
            (0.001, 1024, 64),
            (0.008, 1024, 128),
            (0.1, 10_000, 1_600),
            (5.0, 1024, 1024),
            (0.0, 1, 1),
            (0.0, 0, 1),
        ] {
            assert_eq!(in_flight_target(latency_s, max), expected, "{latency_s} s, at most {max}");
        }
    }

    #[test]
    fn slow_answers_open_more_slots() {
        let mut limits = Limits::new(8_000);
        let started = |limits: &mut Limits| (0..).take_while(|_| limits.start("slow", 1024)).count();
        assert_eq!(started(&mut limits), 64);
        for _ in 0..64 {
            limits.finish("slow", Duration::from_secs(5));
        }
        assert_eq!(started(&mut limits), 1024);
    }

    proptest! {
        #[test]
        fn counts_stay_true(moves in prop::collection::vec((0..4_u8, 0..3_u8), 0..300)) {
            let mut limits = Limits::new(50);
            let mut waiting = [0_usize; 3];
            let mut flying = [0_usize; 3];
            for (what, which) in moves {
                let (name, i) = (format!("e{which}"), usize::from(which));
                match what {
                    0 => waiting[i] += usize::from(limits.admit(&name, 5)),
                    1 if waiting[i] > 0 && limits.start(&name, 5) => { waiting[i] -= 1; flying[i] += 1; }
                    2 if flying[i] > 0 => { limits.finish(&name, Duration::from_millis(1)); flying[i] -= 1; }
                    3 if waiting[i] > 0 => { limits.leave(&name); waiting[i] -= 1; }
                    _ => {}
                }
                prop_assert!(flying[i] <= 5);
                prop_assert_eq!(limits.total(), waiting.iter().sum::<usize>() + flying.iter().sum::<usize>());
                prop_assert!(limits.total() <= 50);
            }
        }
    }
}
