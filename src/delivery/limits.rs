//! Who may be tried now: how many messages each endpoint has here, waiting and in flight. Pure.
//!
//! Three bounds keep a bad endpoint from hurting others (P5).
//!
//! *Admission*: an endpoint may hold at most as much of the consumer's window as is still free, so that there is always as
//! much left for somebody else. (The rule is the dynamic threshold of shared-memory switches: Choudhury and Hahne, 1998.)
//! And no more than it gets through soon. What is not admitted waits for admission as long as its endpoint gets on, which
//! is cheap and short; once it does not, its delivery is held, so that nobody waits behind it.
//!
//! *Attempts in flight*: each endpoint has a window of its own, see `load`.
//!
//! *Health*: endpoints that have not answered lately share small parts of the consumer's window, however many they are: one
//! for those that are new, which find out within 150 ms, and one for those that fail, which take their whole deadline.

mod load;

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

pub use load::Feedback;

use crate::clock::Instant;
use load::{Counts, FIRST, Health, Load};

/// The part of the consumer's window that attempts at new endpoints may have, and the part of failing ones: an eighth.
const SMALL_PART: usize = 8;
/// What failing endpoints have of the window, at most, when new ones that hang come on top: then new ones wait.
const LARGE_PART: usize = 2;
/// Of what is left of its small part, a failing endpoint may take one in so many.
const COMPETITORS: usize = 8;

/// The loads of all endpoints in this process's lane.
#[derive(Debug)]
pub struct Limits {
    window: usize,
    /// Over all endpoints.
    counts: Counts,
    loads: HashMap<Arc<str>, Load>,
}

/// What is to become of a message that asks for admission.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Admission {
    /// It is in, and counted. Of its endpoint `ahead` messages wait here before it.
    Admitted { ahead: usize },
    /// There will be room in a moment.
    Wait,
    /// Its endpoint is slow: its delivery is to be held.
    Hold,
}

impl Limits {
    /// Limits for at most `window` messages at once.
    pub fn new(window: usize) -> Limits {
        Limits { window, counts: Counts::default(), loads: HashMap::new() }
    }

    /// How many messages are admitted, over all endpoints.
    pub fn total(&self) -> usize {
        self.counts.admitted
    }

    /// How many messages are admitted of endpoints that do not fail: those that keep this process busy.
    pub fn busy(&self) -> usize {
        self.counts.admitted - self.counts.failing
    }

    /// Attempts in flight, over all endpoints.
    pub fn in_flight(&self) -> usize {
        self.counts.in_flight
    }

    /// How many more may be admitted, over all endpoints.
    pub fn free(&self) -> usize {
        self.window.saturating_sub(self.counts.admitted)
    }

    /// How many more messages of endpoints that fail may be admitted, over all of them.
    pub fn free_for_failing(&self) -> usize {
        self.small_part().saturating_sub(self.counts.failing)
    }

    /// Attempts that may be in flight at `endpoint`.
    pub fn slots(&self, endpoint: &str, in_flight_max: u32) -> usize {
        self.loads.get(endpoint).map_or(FIRST, |load| load.slots(in_flight_max)) as usize
    }

    /// Whether messages of `endpoint` are here, waiting or in flight.
    pub fn is_here(&self, endpoint: &str) -> bool {
        self.loads.get(endpoint).is_some_and(|load| load.admitted > 0)
    }

    /// Whether `endpoint` fails: its last attempt timed out, or it has been silent for too long.
    pub fn is_failing(&self, endpoint: &str) -> bool {
        self.loads.get(endpoint).is_some_and(|load| load.health == Health::Failing)
    }

    /// How many more messages of `endpoint` would be admitted now.
    pub fn available(&self, endpoint: &str, in_flight_max: u32, now: Instant) -> usize {
        let unknown = Load::new();
        let load = self.loads.get(endpoint).unwrap_or(&unknown);
        // Each admission takes one from what is free and adds one to what it has: hence half of the rest.
        let threshold = self.free().saturating_sub(load.admitted).div_ceil(2);
        let share = match load.health {
            Health::Healthy => threshold,
            Health::New if self.is_crowded() => 0,
            Health::New => threshold,
            Health::Failing => self.free_for_failing().div_ceil(COMPETITORS),
        };
        load.bound(in_flight_max, now).saturating_sub(load.admitted).min(threshold).min(share)
    }

    /// Admits one message of `endpoint`, or says what to do with it.
    pub fn admit(&mut self, endpoint: &str, in_flight_max: u32, now: Instant) -> Admission {
        if self.available(endpoint, in_flight_max, now) > 0 {
            let ahead = self.change(endpoint, |load| {
                load.admitted += 1;
                (load.admitted - 1).saturating_sub(load.in_flight as usize)
            });
            return Admission::Admitted { ahead };
        }
        match self.loads.get(endpoint) {
            Some(load) if load.is_slow(in_flight_max, now) => Admission::Hold,
            Some(load) if load.health != Health::New => Admission::Wait,
            _ if self.is_crowded() => Admission::Hold,
            _ => Admission::Wait,
        }
    }

    /// Whether messages of `endpoint` come faster than it gets through them.
    pub fn is_slow(&self, endpoint: &str, in_flight_max: u32, now: Instant) -> bool {
        self.loads.get(endpoint).is_some_and(|load| load.is_slow(in_flight_max, now))
    }

    /// Starts an attempt at `endpoint` if one more may be in flight.
    pub fn start(&mut self, endpoint: &str, in_flight_max: u32, now: Instant) -> bool {
        let is_free = self.free_for_new() > 0;
        self.change(endpoint, |load| {
            let may = load.in_flight < load.startable(in_flight_max, now)
                && (load.health != Health::New || is_free);
            if may {
                load.begin(now);
            }
            may
        })
    }

    /// How many more attempts at new endpoints may begin, over all of them.
    pub fn free_for_new(&self) -> usize {
        self.small_part().saturating_sub(self.counts.new_in_flight)
    }

    /// Whether `endpoint` is new, and can't begin its first attempt before another new one ends its own.
    pub fn is_starved(&self, endpoint: &str) -> bool {
        let waits = |load: &Load| load.health == Health::New && load.in_flight == 0 && !load.is_short();
        self.free_for_new() == 0 && self.loads.get(endpoint).is_some_and(waits)
    }

    /// Notes that an attempt at `endpoint` ended after `took`; its message leaves the window.
    pub fn finish(&mut self, endpoint: &str, took: Duration, feedback: Feedback, now: Instant) {
        self.change(endpoint, |load| {
            load.progress(took, feedback, now);
            load.admitted = load.admitted.saturating_sub(1);
        });
    }

    /// Notes that an attempt did not begin, because this process was short of what a connection needs: its message
    /// waits here again, and for a while nothing is started that would need one more connection.
    pub fn put_off(&mut self, endpoint: &str, now: Instant) {
        self.change(endpoint, |load| load.put_off(now));
    }

    /// Whether attempts at `endpoint` have been put off and none has ended since the pause.
    pub fn is_short(&self, endpoint: &str) -> bool {
        self.loads.get(endpoint).is_some_and(Load::is_short)
    }

    /// Notes that an admitted message leaves the window without having been tried.
    pub fn leave(&mut self, endpoint: &str) {
        self.change(endpoint, |load| load.admitted = load.admitted.saturating_sub(1));
    }

    /// Endpoints whose attempts in flight have been silent for too long since the last call: they fail from now on, and
    /// what waits for them here would wait for long.
    pub fn fallen_silent(&mut self, now: Instant) -> Vec<Arc<str>> {
        let mut silent = Vec::new();
        for (endpoint, load) in &mut self.loads {
            if load.in_flight > 0 && load.health != Health::Failing && load.is_silent(now) {
                self.counts.remove(load.counts());
                load.health = Health::Failing;
                self.counts.add(load.counts());
                silent.push(Arc::clone(endpoint));
            }
        }
        // A run replays from its seed.
        silent.sort_unstable();
        silent
    }

    /// Forgets endpoints that have nothing here, so that a million names do not stay in memory.
    pub fn forget_idle(&mut self) {
        if self.loads.len() > 10_000 {
            self.loads.retain(|_, load| load.admitted > 0);
        }
    }

    fn small_part(&self) -> usize {
        self.window.div_ceil(SMALL_PART).max(1)
    }

    /// Whether so much of the window waits for endpoints that fail that new ones, which may do the same, must wait.
    fn is_crowded(&self) -> bool {
        self.counts.failing >= self.window.div_ceil(LARGE_PART)
    }

    /// Changes a load, and the counts with it.
    fn change<T>(&mut self, endpoint: &str, change: impl FnOnce(&mut Load) -> T) -> T {
        if !self.loads.contains_key(endpoint) {
            self.loads.insert(endpoint.into(), Load::new());
        }
        let load = self.loads.get_mut(endpoint).expect("it was inserted above if it was missing");
        self.counts.remove(load.counts());
        let changed = change(load);
        self.counts.add(load.counts());
        changed
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::load::{PAUSE_FIRST, PAUSE_MAX};
    use super::*;

    const NOW: Instant = Instant::START;

    fn is_in(admission: Admission) -> bool {
        matches!(admission, Admission::Admitted { .. })
    }

    #[test]
    fn the_admitted_are_told_how_many_wait_before_them() {
        let mut limits = Limits::new(1_000);
        for ahead in 0..10 {
            assert_eq!(limits.admit("a", 64, NOW), Admission::Admitted { ahead });
        }
        assert!(limits.start("a", 64, NOW));
        assert_eq!(limits.admit("a", 64, NOW), Admission::Admitted { ahead: 9 }, "one is in flight");
        assert_eq!(limits.admit("b", 64, NOW), Admission::Admitted { ahead: 0 });
    }

    const MS: Duration = Duration::from_millis(1);

    /// An endpoint that has answered so often that its window is wide.
    fn warm(limits: &mut Limits, endpoint: &str) {
        for _ in 0..64 {
            assert!(is_in(limits.admit(endpoint, 64, NOW)) && limits.start(endpoint, 64, NOW));
            limits.finish(endpoint, MS, Feedback::Answered, NOW);
        }
    }

    fn fill(limits: &mut Limits, endpoint: &str, max: u32) -> usize {
        (0..).take_while(|_| is_in(limits.admit(endpoint, max, NOW))).count()
    }

    #[test]
    fn one_endpoint_leaves_half_of_the_window_and_two_a_third() {
        let mut limits = Limits::new(6_000);
        for name in ["one", "two", "three"] {
            warm(&mut limits, name);
        }
        assert_eq!(fill(&mut limits, "one", 10_000), 3_000);
        assert_eq!(fill(&mut limits, "two", 10_000), 1_500);
        assert_eq!(limits.available("three", 10_000, NOW), 750);
    }

    #[test]
    fn an_endpoint_never_waits_here_in_more_than_its_own_bound() {
        let mut limits = Limits::new(100_000);
        assert_eq!(fill(&mut limits, "a", 1), 1 + 1_024, "it has not answered yet");
        warm(&mut limits, "b");
        assert_eq!(fill(&mut limits, "b", 1), 1 + 1_000, "a second's work");
        assert_eq!(fill(&mut limits, "b", 64), 64 + 4_096 - 1_001);
    }

    #[test]
    fn a_silent_endpoint_is_given_only_what_it_can_have_in_flight() {
        let mut limits = Limits::new(8_000);
        let late = NOW.after(Duration::from_millis(60));
        assert!(is_in(limits.admit("a", 64, NOW)));
        assert!(limits.start("a", 64, NOW));
        assert_eq!(limits.available("a", 64, NOW), 1_024, "while it may yet answer");
        assert_eq!(limits.available("a", 64, late), 0, "nothing waits, once it is silent");
        assert_eq!(limits.available("b", 64, late), 1 + 1_024, "which is nothing to another");
        let other = NOW.after(Duration::from_millis(70));
        limits.finish("a", Duration::from_millis(70), Feedback::Answered, other);
        assert_eq!(limits.available("a", 64, other), 2 + 29, "it has answered: a second's work");
        assert!(limits.start("a", 64, other));
        let late = other.after(Duration::from_millis(200));
        assert!(!limits.is_slow("a", 64, late), "one that takes 70 ms is believed for longer");
        assert!(limits.is_slow("a", 64, late.after(Duration::from_millis(20))));
    }

    #[test]
    fn only_what_a_slow_endpoint_has_too_much_of_is_held() {
        let mut limits = Limits::new(100);
        assert_eq!(fill(&mut limits, "a", 64), 50);
        assert!(limits.start("a", 64, NOW));
        let soon = NOW.after(Duration::from_millis(40));
        assert_eq!(limits.admit("a", 64, soon), Admission::Wait, "it may yet answer");
        let late = NOW.after(Duration::from_millis(60));
        assert_eq!(limits.admit("a", 64, late), Admission::Hold, "it has fallen silent");
        limits.finish("a", MS, Feedback::Answered, late);
        fill(&mut limits, "a", 64);
        assert_eq!(limits.admit("a", 64, late), Admission::Wait, "it gets on again");
    }

    #[test]
    fn an_endpoint_that_answers_too_slowly_for_its_queue_is_slow() {
        let mut limits = Limits::new(100);
        fill(&mut limits, "a", 1);
        assert!(limits.start("a", 1, NOW));
        let mut now = NOW;
        for _ in 0..100 {
            now = now.after(Duration::from_millis(90));
            limits.finish("a", Duration::from_millis(90), Feedback::Answered, now);
            limits.start("a", 1, now);
            fill(&mut limits, "a", 1);
        }
        assert_eq!(limits.admit("a", 1, now), Admission::Hold, "50 messages at 90 ms each");
    }

    fn start_all(limits: &mut Limits, max: u32, now: Instant) -> usize {
        start_all_of(limits, "slow", max, now)
    }

    fn start_all_of(limits: &mut Limits, endpoint: &str, max: u32, now: Instant) -> usize {
        (0..).take_while(|_| limits.start(endpoint, max, now)).count()
    }

    #[test]
    fn slow_answers_open_more_slots_one_by_one_up_to_the_setting() {
        let mut limits = Limits::new(8_000);
        assert_eq!(start_all(&mut limits, 200, NOW), 1);
        let mut now = NOW;
        for (ended, started) in [(1, 2), (2, 4), (4, 8), (8, 16), (16, 32), (32, 64), (64, 128), (128, 200)] {
            now = now.after(Duration::from_secs(5));
            for _ in 0..ended {
                limits.finish("slow", Duration::from_secs(5), Feedback::Answered, now);
            }
            assert_eq!(start_all(&mut limits, 200, now), started);
        }
    }

    #[test]
    fn a_busy_moment_opens_no_connections() {
        let mut limits = Limits::new(8_000);
        let mut now = NOW;
        let mut ended = |limits: &mut Limits, count: u64, took: u64| {
            for _ in 0..count {
                start_all(limits, 1_024, now);
                now = now.after(Duration::from_micros(100));
                limits.finish("slow", Duration::from_millis(took), Feedback::Answered, now);
            }
            start_all(limits, 1_024, now);
            limits.in_flight()
        };
        assert_eq!(ended(&mut limits, 1_000, 1), 64);
        assert!(ended(&mut limits, 1_000, 60) < 100, "100 ms of answers that take 60");
        assert!(ended(&mut limits, 50_000, 60) > 370, "5 s of them");
        assert!(ended(&mut limits, 5_000, 1) < 370, "and it comes down at once");
    }

    #[test]
    fn a_shortage_leaves_the_attempts_that_have_their_connections() {
        let mut limits = Limits::new(8_000);
        warm(&mut limits, "slow");
        fill(&mut limits, "slow", 200);
        let total = limits.total();
        assert_eq!(start_all(&mut limits, 200, NOW), 64);
        // 24 connections can be had.
        (0..40).for_each(|_| limits.put_off("slow", NOW));
        assert_eq!((limits.in_flight(), limits.total()), (24, total), "the others wait here");
        assert_eq!(start_all(&mut limits, 200, NOW), 0);
        let soon = NOW.after(PAUSE_FIRST / 2);
        limits.finish("slow", PAUSE_FIRST / 2, Feedback::Answered, soon);
        assert_eq!(start_all(&mut limits, 200, soon), 1, "on the connection that got free");
        let mut now = NOW.after(PAUSE_FIRST);
        for length in [100, 200, 400, 800, 1_600, 2_000, 2_000] {
            assert_eq!(start_all(&mut limits, 200, now), 1, "one more tries, after each pause");
            limits.put_off("slow", now);
            let almost = now.after(Duration::from_millis(length - 1));
            assert_eq!(start_all(&mut limits, 200, almost), 0, "{length} ms");
            now = now.after(Duration::from_millis(length));
        }
        // The shortage is over: the one more has its connection.
        assert_eq!((start_all(&mut limits, 200, now), limits.in_flight()), (1, 25));
        for (ended, in_flight) in [(25, 49), (49, 64), (64, 64)] {
            now = now.after(Duration::from_millis(5));
            (0..ended).for_each(|_| limits.finish("slow", Duration::from_millis(5), Feedback::Answered, now));
            assert!(!limits.is_short("slow"));
            start_all(&mut limits, 200, now);
            assert_eq!(limits.in_flight(), in_flight);
        }
    }

    #[test]
    fn an_endpoint_without_any_connection_is_silent_until_one_attempt_ends() {
        let mut limits = Limits::new(100);
        let held = fill(&mut limits, "a", 64);
        assert!(limits.start("a", 64, NOW));
        limits.put_off("a", NOW);
        let mut now = NOW;
        for _ in 0..3 {
            now = now.after(PAUSE_MAX);
            assert_eq!(start_all_of(&mut limits, "a", 64, now), 1, "one tries");
            limits.put_off("a", now);
            assert_eq!(limits.admit("a", 64, now), Admission::Hold, "nobody waits behind it");
        }
        now = now.after(PAUSE_MAX);
        assert!(limits.start("a", 64, now));
        limits.finish("a", Duration::from_millis(1), Feedback::Answered, now);
        assert_eq!((limits.total(), is_in(limits.admit("a", 64, now))), (held - 1, true));
    }

    /// New endpoints that hang, with two messages each.
    fn hang(limits: &mut Limits, names: std::ops::Range<usize>, now: Instant) {
        for name in names.map(|i| format!("hangs {i}")) {
            (0..2).take_while(|_| is_in(limits.admit(&name, 64, now))).count();
            start_all_of(limits, &name, 64, now);
        }
    }

    #[test]
    fn endpoints_that_hang_share_a_small_part_however_many_they_are() {
        let mut limits = Limits::new(8_000);
        warm(&mut limits, "healthy");
        let mut now = NOW;
        for wave in 0..4 {
            assert!(!limits.is_crowded());
            hang(&mut limits, wave * 1_000..wave * 1_000 + 1_000, now);
            assert_eq!((limits.counts.new_in_flight, limits.free_for_new()), (1_000, 0), "an eighth");
            assert_eq!(limits.counts.failing, wave * 1_000);
            now = now.after(Duration::from_millis(51));
            // What waits for them is given back.
            for name in limits.fallen_silent(now) {
                while limits.loads[&name].admitted > limits.loads[&name].in_flight as usize {
                    limits.leave(&name);
                }
            }
            assert_eq!((limits.counts.new_in_flight, limits.busy()), (0, 0));
            assert!(limits.available("healthy", 64, now) >= 1_900, "wave {wave}");
        }
        assert_eq!(
            limits.admit("hangs 1", 64, now),
            Admission::Hold,
            "failing ones have more than their part"
        );
        assert!(limits.is_crowded());
        assert_eq!(limits.admit("new", 64, now), Admission::Hold, "and new ones might do the same");
        assert_eq!(limits.available("new", 64, now), 0);
        // Their deadlines are over, one after the other.
        let late = now.after(Duration::from_secs(10));
        for i in 0..4_000 {
            let name = format!("hangs {i}");
            while limits.loads[name.as_str()].in_flight > 0 {
                limits.finish(&name, Duration::from_secs(10), Feedback::TimedOut, late);
            }
        }
        assert_eq!((limits.total(), limits.free_for_failing()), (0, 1_000));
        assert!(is_in(limits.admit("new", 64, late)));
        assert_eq!(limits.available("hangs 1", 64, late), 2, "its window grows until it answers");
    }

    #[test]
    fn a_new_endpoint_begins_when_another_has_answered() {
        let mut limits = Limits::new(24);
        let names = ["a", "b", "c", "d"];
        let started = names.map(|name| {
            assert!(is_in(limits.admit(name, 64, NOW)) && is_in(limits.admit(name, 64, NOW)));
            start_all_of(&mut limits, name, 64, NOW)
        });
        assert_eq!((started, limits.free_for_new()), ([1, 1, 1, 0], 0));
        assert_eq!(names.map(|name| limits.is_starved(name)), [false, false, false, true]);
        limits.finish("a", MS, Feedback::Answered, NOW);
        assert!(!limits.is_starved("d"), "what answers is new no longer");
        assert_eq!(start_all_of(&mut limits, "d", 64, NOW), 1);
    }

    #[test]
    fn a_setting_of_none_is_one() {
        assert!(Limits::new(10).start("a", 0, NOW));
    }

    proptest! {
        #[test]
        fn counts_stay_true(moves in prop::collection::vec((0..8_u8, 0..3_u8), 0..300)) {
            let mut limits = Limits::new(50);
            let mut waiting = [0_usize; 3];
            let mut flying = [0_usize; 3];
            for (what, which) in moves {
                let (name, i) = (format!("e{which}"), usize::from(which));
                match what {
                    0 => waiting[i] += usize::from(is_in(limits.admit(&name, 5, NOW))),
                    1 if waiting[i] > 0 && limits.start(&name, 5, NOW) => { waiting[i] -= 1; flying[i] += 1; }
                    2 | 5 | 6 | 7 if flying[i] > 0 => {
                        let feedback = match what {
                            2 => Feedback::Answered,
                            5 => Feedback::Congested,
                            6 => Feedback::TimedOut,
                            _ => Feedback::Nothing,
                        };
                        limits.finish(&name, MS, feedback, NOW);
                        flying[i] -= 1;
                    }
                    4 if flying[i] > 0 => { limits.put_off(&name, NOW); flying[i] -= 1; waiting[i] += 1; }
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
