//! Who may be tried now: how many messages each endpoint has here, waiting and in flight. Pure.
//!
//! Two bounds keep a bad endpoint from hurting others (P5). *Admission*: an endpoint may hold at most
//! as much of the window as is still free, so one that hangs ends up with half, two with a third
//! each, and there is always as much left for somebody else. (The rule is the dynamic threshold
//! of shared-memory switches: Choudhury and Hahne, 1998.) And no more than it gets through soon: one
//! that has fallen silent is given what it can have in flight, and nothing to wait here. What is not
//! admitted waits for admission as long as its endpoint gets on, which is cheap and short; once it does
//! not, its delivery is held, so that nobody waits behind it. *Attempts in flight*: few while answers come
//! at once, because more connections only cost, and more as latency grows, up to the endpoint's setting.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use crate::clock::Instant;

/// Attempts in flight with which a receiver that answers at once is kept fully busy (24 to 64 were
/// best in the design's measurement; 512 cost a third more CPU per message).
const IN_FLIGHT_MIN: u32 = 64;

/// The latency at which [`IN_FLIGHT_MIN`] is no longer enough; above it the number grows in proportion.
const LATENCY_AT_MIN: Duration = Duration::from_millis(10);

/// How fast the mean latency follows longer and shorter answers. A machine that is busy for a moment
/// makes every answer late, and more connections would make it busier: hence up slowly, down at once.
const RISE: Duration = Duration::from_secs(1);
const FALL: Duration = Duration::from_millis(100);

/// How many messages may wait here for an endpoint beyond those in flight.
const WAITING_MAX: usize = 4_096;

/// An endpoint that ends no attempt for this long is silent, sooner when it has never ended one here; and one
/// whose last message here would have to wait for longer than [`WAIT_MAX`] is full. Others must not wait behind
/// either.
const SILENCE_MAX: Duration = Duration::from_millis(100);
const FIRST_SILENCE_MAX: Duration = Duration::from_millis(50);
const WAIT_MAX: Duration = Duration::from_millis(500);

/// How long an endpoint opens no further connections after this process was short of one: doubled each time, so that
/// a shortage costs little, and bounded, so that work goes on soon after it.
const PAUSE_FIRST: Duration = Duration::from_millis(50);
const PAUSE_MAX: Duration = Duration::from_secs(2);

/// The loads of all endpoints in this process's lane.
#[derive(Debug)]
pub struct Limits {
    window: usize,
    total: usize,
    loads: HashMap<Arc<str>, Load>,
}

#[derive(Debug)]
struct Load {
    /// Waiting and in flight.
    admitted: usize,
    in_flight: u32,
    /// Attempts that may be in flight, below the endpoint's setting. Each that ends adds one at most: a
    /// thousand connections at once overflow a receiver's queue of new ones, and then each waits a second.
    slots: u32,
    /// Moving mean of the time an attempt takes, in seconds.
    latency_s: f64,
    /// When an attempt last ended here, or the first of those in flight began.
    last_progress: Instant,
    /// Since an attempt could not begin because this process was short of a connection, and until one ends.
    short: Option<Pause>,
}

/// While it lasts an endpoint has no more attempts in flight than those that have their connections; then one
/// more may try.
#[derive(Clone, Copy, Debug)]
struct Pause {
    until: Instant,
    length: Duration,
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
    pub fn available(&self, endpoint: &str, in_flight_max: u32, now: Instant) -> usize {
        let unknown = Load::new();
        let load = self.loads.get(endpoint).unwrap_or(&unknown);
        // Each admission takes one from what is free and adds one to what it has: hence half of the rest.
        let threshold = self.free().saturating_sub(load.admitted).div_ceil(2);
        load.bound(in_flight_max, now).saturating_sub(load.admitted).min(threshold)
    }

    /// Admits one message of `endpoint`, or says what to do with it.
    pub fn admit(&mut self, endpoint: &str, in_flight_max: u32, now: Instant) -> Admission {
        if self.available(endpoint, in_flight_max, now) > 0 {
            self.total += 1;
            let load = self.load(endpoint);
            let ahead = load.admitted.saturating_sub(load.in_flight as usize);
            load.admitted += 1;
            return Admission::Admitted { ahead };
        }
        match self.loads.get(endpoint) {
            Some(load) if load.is_slow(in_flight_max, now) => Admission::Hold,
            _ => Admission::Wait,
        }
    }

    /// Whether messages of `endpoint` come faster than it gets through them.
    pub fn is_slow(&self, endpoint: &str, in_flight_max: u32, now: Instant) -> bool {
        self.loads.get(endpoint).is_some_and(|load| load.is_slow(in_flight_max, now))
    }

    /// Starts an attempt at `endpoint` if one more may be in flight.
    pub fn start(&mut self, endpoint: &str, in_flight_max: u32, now: Instant) -> bool {
        let load = self.load(endpoint);
        if load.in_flight == 0 && load.short.is_none() {
            load.last_progress = now;
        }
        let may = load.in_flight < load.startable(in_flight_max, now);
        load.in_flight += u32::from(may);
        may
    }

    /// Notes that an attempt at `endpoint` ended after `took`; its message leaves the window.
    pub fn finish(&mut self, endpoint: &str, took: Duration, now: Instant) {
        self.load(endpoint).progress(took, now);
        self.leave(endpoint);
    }

    /// Notes that an attempt did not begin, because this process was short of what a connection needs: its message
    /// waits here again, and for a while nothing is started that would need one more connection.
    pub fn put_off(&mut self, endpoint: &str, now: Instant) {
        let Some(load) = self.loads.get_mut(endpoint) else { return };
        load.in_flight = load.in_flight.saturating_sub(1);
        load.slots = load.in_flight;
        load.short = Some(match load.short {
            // One of those that were started together.
            Some(pause) if now < pause.until => pause,
            last => {
                let length = last.map_or(PAUSE_FIRST, |last| (last.length * 2).min(PAUSE_MAX));
                Pause { until: now.after(length), length }
            }
        });
    }

    /// Whether attempts at `endpoint` have been put off and none has ended since the pause.
    pub fn is_short(&self, endpoint: &str) -> bool {
        self.loads.get(endpoint).is_some_and(|load| load.short.is_some())
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
            self.loads.insert(endpoint.into(), Load::new());
        }
        self.loads.get_mut(endpoint).expect("it was inserted above if it was missing")
    }
}

impl Load {
    fn new() -> Load {
        Load {
            admitted: 0,
            in_flight: 0,
            slots: IN_FLIGHT_MIN,
            latency_s: 0.0,
            last_progress: Instant::START,
            short: None,
        }
    }

    fn progress(&mut self, took: Duration, now: Instant) {
        let (took, since) = (took.as_secs_f64(), now.since(self.last_progress));
        let pace = if took > self.latency_s { RISE } else { FALL };
        let weight = -(-since.as_secs_f64() / pace.as_secs_f64()).exp_m1();
        self.latency_s += (took - self.latency_s) * weight;
        let pauses = self.short.is_some_and(|pause| now < pause.until);
        self.slots = in_flight_target(self.latency_s).min(self.slots + u32::from(!pauses));
        self.short = self.short.filter(|_| pauses);
        self.last_progress = now;
        self.in_flight = self.in_flight.saturating_sub(1);
    }

    fn slots(&self, in_flight_max: u32) -> u32 {
        self.slots.min(in_flight_max).max(1)
    }

    /// How many attempts may be in flight when another is to start.
    fn startable(&self, in_flight_max: u32, now: Instant) -> u32 {
        match self.short {
            None => self.slots(in_flight_max),
            Some(pause) => (self.slots + u32::from(now >= pause.until)).min(in_flight_max.max(1)),
        }
    }

    /// How many of its messages may be here: those in flight, and as many as follow them soon.
    fn bound(&self, in_flight_max: u32, now: Instant) -> usize {
        let slots = self.slots(in_flight_max);
        let waiting = if self.is_silent(now) { 0 } else { self.soon(slots) };
        slots as usize + waiting
    }

    /// How many messages get their turn within [`WAIT_MAX`]: by Little's law the slots times the time, by
    /// the latency.
    fn soon(&self, slots: u32) -> usize {
        // One that has never answered divides by nothing, and the cast stops at the largest number.
        let soon = (f64::from(slots) * WAIT_MAX.as_secs_f64() / self.latency_s).ceil() as usize;
        soon.min(WAITING_MAX)
    }

    fn is_silent(&self, now: Instant) -> bool {
        let most = if self.latency_s > 0.0 { SILENCE_MAX } else { FIRST_SILENCE_MAX };
        (self.in_flight > 0 || self.short.is_some()) && now.since(self.last_progress) > most
    }

    fn is_slow(&self, in_flight_max: u32, now: Instant) -> bool {
        let slots = self.slots(in_flight_max);
        self.is_silent(now)
            || self.soon(slots) < WAITING_MAX && self.admitted >= self.bound(in_flight_max, now)
    }
}

/// How many attempts should be in flight at a mean latency: by Little's law the same rate needs as many
/// more connections as answers take longer.
fn in_flight_target(latency_s: f64) -> u32 {
    let factor = latency_s / LATENCY_AT_MIN.as_secs_f64();
    (f64::from(IN_FLIGHT_MIN) * factor.max(1.0)) as u32
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

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
        assert!(limits.start("a", 64, NOW) && limits.start("a", 64, NOW));
        assert_eq!(limits.admit("a", 64, NOW), Admission::Admitted { ahead: 8 }, "two are in flight");
        assert_eq!(limits.admit("b", 64, NOW), Admission::Admitted { ahead: 0 });
    }

    fn fill(limits: &mut Limits, endpoint: &str, max: u32) -> usize {
        (0..).take_while(|_| is_in(limits.admit(endpoint, max, NOW))).count()
    }

    #[test]
    fn one_hanging_endpoint_leaves_half_of_the_window_and_two_a_third() {
        let mut limits = Limits::new(6_000);
        assert_eq!(fill(&mut limits, "hangs", 10_000), 3_000);
        assert_eq!(fill(&mut limits, "hangs too", 10_000), 1_500);
        assert_eq!(limits.available("healthy", 10_000, NOW), 750);
    }

    #[test]
    fn an_endpoint_never_waits_here_in_more_than_its_own_bound() {
        let mut limits = Limits::new(100_000);
        assert_eq!(fill(&mut limits, "a", 1), 1 + WAITING_MAX);
    }

    #[test]
    fn a_silent_endpoint_is_given_only_what_it_can_have_in_flight() {
        let mut limits = Limits::new(8_000);
        let late = NOW.after(Duration::from_millis(60));
        assert!(is_in(limits.admit("a", 64, NOW)));
        assert!(limits.start("a", 64, NOW));
        assert_eq!(limits.available("a", 64, NOW), 3_999, "half of the window, while it may yet answer");
        assert_eq!(limits.available("a", 64, late), 63, "the other connections, once it is silent");
        assert_eq!(limits.available("b", 64, late), 3_999 + 1, "which is nothing to another");
        let other = NOW.after(Duration::from_millis(70));
        limits.finish("a", Duration::from_millis(70), other);
        assert!(limits.available("a", 64, other) > 2_000, "it has answered");
        assert!(limits.start("a", 64, other));
        let late = other.after(Duration::from_millis(90));
        assert!(!limits.is_slow("a", 64, late), "one that has answered is believed for longer");
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
        limits.finish("a", Duration::from_millis(60), late);
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
            limits.finish("a", Duration::from_millis(90), now);
            limits.start("a", 1, now);
            fill(&mut limits, "a", 1);
        }
        assert_eq!(limits.admit("a", 1, now), Admission::Hold, "50 messages at 90 ms each");
    }

    #[test]
    fn attempts_in_flight_follow_latency() {
        for (latency_s, expected) in [(0.0, 64), (0.001, 64), (0.02, 128), (0.1, 640), (5.0, 32_000)] {
            assert_eq!(in_flight_target(latency_s), expected, "{latency_s} s");
        }
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
        assert_eq!(start_all(&mut limits, 200, NOW), 64);
        let mut now = NOW;
        for (ended, started) in [(64, 128), (128, 200), (200, 200)] {
            now = now.after(Duration::from_secs(5));
            for _ in 0..ended {
                limits.finish("slow", Duration::from_secs(5), now);
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
                limits.finish("slow", Duration::from_millis(took), now);
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
        fill(&mut limits, "slow", 200);
        let total = limits.total();
        assert_eq!(start_all(&mut limits, 200, NOW), 64);
        // 24 connections can be had.
        (0..40).for_each(|_| limits.put_off("slow", NOW));
        assert_eq!((limits.in_flight(), limits.total()), (24, total), "the others wait here");
        assert_eq!(start_all(&mut limits, 200, NOW), 0);
        let soon = NOW.after(PAUSE_FIRST / 2);
        limits.finish("slow", PAUSE_FIRST / 2, soon);
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
            (0..ended).for_each(|_| limits.finish("slow", Duration::from_millis(5), now));
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
        limits.finish("a", Duration::from_millis(1), now);
        assert_eq!((limits.total(), is_in(limits.admit("a", 64, now))), (held - 1, true));
    }

    #[test]
    fn a_setting_of_none_is_one() {
        assert!(Limits::new(10).start("a", 0, NOW));
    }

    proptest! {
        #[test]
        fn counts_stay_true(moves in prop::collection::vec((0..5_u8, 0..3_u8), 0..300)) {
            let mut limits = Limits::new(50);
            let mut waiting = [0_usize; 3];
            let mut flying = [0_usize; 3];
            for (what, which) in moves {
                let (name, i) = (format!("e{which}"), usize::from(which));
                match what {
                    0 => waiting[i] += usize::from(is_in(limits.admit(&name, 5, NOW))),
                    1 if waiting[i] > 0 && limits.start(&name, 5, NOW) => { waiting[i] -= 1; flying[i] += 1; }
                    2 if flying[i] > 0 => { limits.finish(&name, Duration::from_millis(1), NOW); flying[i] -= 1; }
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
