//! The load of one endpoint, and its window: how many attempts it may have in flight. Pure.
//!
//! The window grows by one for each answer, hence twofold in a round trip, up to what the latency calls for and to
//! the endpoint's setting. A timeout, a reset, a 429 or a 503 halves it, once for all attempts that were in flight together.
//! (The rule by which TCP finds its rate: RFC 5681, section 3.1.) A refused connection changes nothing: it takes no time.
//!
//! An endpoint that times out with a single attempt in flight is not overloaded but down. Its window grows again, so that
//! its messages come to their attempts in a time that their number does not set; with its first answer it begins anew.

use std::time::Duration;

use crate::clock::Instant;
use crate::message::{Class, Outcome};

/// Attempts in flight at an endpoint that has not answered yet: one that hangs costs a connection for each (150 us of
/// processor time, measured), and one that answers is at 64 after six round trips.
pub(super) const FIRST: u32 = 1;

/// Attempts in flight with which a receiver that answers at once is kept fully busy (24 to 64 were
/// best in the design's measurement; 512 cost a third more CPU per message).
const IN_FLIGHT_MIN: u32 = 64;

/// The latency at which [`IN_FLIGHT_MIN`] is no longer enough; above it the number grows in proportion.
const LATENCY_AT_MIN: Duration = Duration::from_millis(10);

/// How fast the mean latency follows longer and shorter answers. A machine that is busy for a moment
/// makes every answer late, and more connections would make it busier: hence up slowly, down at once.
const RISE: Duration = Duration::from_secs(1);
const FALL: Duration = Duration::from_millis(100);

/// How many messages may wait here for an endpoint beyond those in flight, and for one that has not answered yet: that
/// keeps it busy for 20 ms, in which it can answer.
const WAITING_MAX: usize = 4_096;
const WAITING_FIRST: usize = 1_024;

/// An endpoint that ends no attempt for this long is silent, later when its answers take long, and sooner when it has
/// never answered here; and one whose last message here would have to wait for longer than [`WAIT_MAX`] is full.
/// Others must not wait behind either.
const SILENCE: Duration = Duration::from_millis(100);
const SILENCE_MAX: Duration = Duration::from_secs(10);
const FIRST_SILENCE: Duration = Duration::from_millis(50);
/// So many times the mean latency is no silence.
const LATENCIES: f64 = 3.0;
const WAIT_MAX: Duration = Duration::from_secs(1);

/// A connection that is refused after so long was waited for: that is a timeout.
const REFUSED_LATE_US: i32 = 1_000_000;

/// How long an endpoint opens no further connections after this process was short of one: doubled each time, so that
/// a shortage costs little, and bounded, so that work goes on soon after it.
pub(super) const PAUSE_FIRST: Duration = Duration::from_millis(50);
pub(super) const PAUSE_MAX: Duration = Duration::from_secs(2);

/// What the end of an attempt says of its endpoint.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Feedback {
    /// It answers.
    Answered,
    /// It asks for less, or breaks off.
    Congested,
    /// It did not answer in time.
    TimedOut,
    /// Nothing: the attempt reached nobody, or was not made.
    Nothing,
}

impl Feedback {
    /// The feedback of an attempt; `None` was not made.
    pub fn of(outcome: Option<&Outcome>) -> Feedback {
        let Some(outcome) = outcome else { return Feedback::Nothing };
        match outcome.class {
            Class::Rejected if matches!(outcome.status, Some(429 | 503)) => Feedback::Congested,
            Class::Accepted | Class::Rejected | Class::BadAnswer => Feedback::Answered,
            Class::Reset => Feedback::Congested,
            Class::Timeout => Feedback::TimedOut,
            Class::Refused if outcome.times.connect_us >= REFUSED_LATE_US => Feedback::TimedOut,
            Class::Refused | Class::Invalid | Class::Unknown => Feedback::Nothing,
        }
    }
}

/// How an endpoint has done lately.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Health {
    /// It has not answered here yet, and has not been silent for long.
    New,
    Healthy,
    /// Its last attempt timed out, or those in flight have been silent for too long.
    Failing,
}

/// What counts towards a bound that endpoints share.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct Counts {
    /// Waiting and in flight.
    pub(super) admitted: usize,
    pub(super) in_flight: usize,
    /// In flight at endpoints that are new.
    pub(super) new_in_flight: usize,
    /// Admitted of endpoints that are failing.
    pub(super) failing: usize,
}

impl Counts {
    pub(super) fn add(&mut self, other: Counts) {
        self.admitted += other.admitted;
        self.in_flight += other.in_flight;
        self.new_in_flight += other.new_in_flight;
        self.failing += other.failing;
    }

    pub(super) fn remove(&mut self, other: Counts) {
        self.admitted -= other.admitted;
        self.in_flight -= other.in_flight;
        self.new_in_flight -= other.new_in_flight;
        self.failing -= other.failing;
    }
}

#[derive(Debug)]
pub(super) struct Load {
    /// Waiting and in flight.
    pub(super) admitted: usize,
    pub(super) in_flight: u32,
    pub(super) health: Health,
    /// Attempts that may be in flight, below the endpoint's setting. Each that ends adds one at most: a
    /// thousand connections at once overflow a receiver's queue of new ones, and then each waits a second.
    slots: u32,
    /// When they were last halved.
    cut_at: Option<Instant>,
    /// Whether one attempt alone timed out, and none was answered since.
    is_down: bool,
    /// Moving mean of the time that an answer takes, in seconds.
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

impl Load {
    pub(super) fn new() -> Load {
        Load {
            admitted: 0,
            in_flight: 0,
            health: Health::New,
            slots: FIRST,
            cut_at: None,
            is_down: false,
            latency_s: 0.0,
            last_progress: Instant::START,
            short: None,
        }
    }

    pub(super) fn counts(&self) -> Counts {
        let in_flight = self.in_flight as usize;
        Counts {
            admitted: self.admitted,
            in_flight,
            new_in_flight: if self.health == Health::New { in_flight } else { 0 },
            failing: if self.health == Health::Failing { self.admitted } else { 0 },
        }
    }

    /// Notes that an attempt ended after `took`.
    pub(super) fn progress(&mut self, took: Duration, feedback: Feedback, now: Instant) {
        let pauses = self.short.is_some_and(|pause| now < pause.until);
        match feedback {
            Feedback::Answered => {
                self.follow(took, now);
                if std::mem::take(&mut self.is_down) {
                    self.slots = FIRST - 1;
                }
                self.slots = in_flight_target(self.latency_s).min(self.slots + u32::from(!pauses));
                self.health = Health::Healthy;
            }
            Feedback::Congested => {
                self.cut(took, now);
                self.health = Health::Healthy;
            }
            Feedback::TimedOut => {
                let alone = self.slots == 1 && self.is_first_since_cut(took, now);
                self.is_down |= self.health == Health::Failing && alone;
                if self.is_down {
                    self.slots += 1;
                } else {
                    self.cut(took, now);
                }
                self.health = Health::Failing;
            }
            Feedback::Nothing => {}
        }
        self.short = self.short.filter(|_| pauses);
        self.last_progress = now;
        self.in_flight = self.in_flight.saturating_sub(1);
    }

    /// Moves the mean latency towards an answer's.
    fn follow(&mut self, took: Duration, now: Instant) {
        let (took, since) = (took.as_secs_f64(), now.since(self.last_progress));
        if self.latency_s == 0.0 {
            self.latency_s = took;
            return;
        }
        let pace = if took > self.latency_s { RISE } else { FALL };
        let weight = -(-since.as_secs_f64() / pace.as_secs_f64()).exp_m1();
        self.latency_s += (took - self.latency_s) * weight;
    }

    /// Whether the slots were not halved since an attempt began that took so long.
    fn is_first_since_cut(&self, took: Duration, now: Instant) -> bool {
        self.cut_at.is_none_or(|at| now.since(at) >= took)
    }

    /// Halves the slots, unless that was done since the attempt began.
    fn cut(&mut self, took: Duration, now: Instant) {
        if self.is_first_since_cut(took, now) {
            self.slots = (self.slots.min(self.in_flight) / 2).max(1);
            self.cut_at = Some(now);
        }
    }

    /// Notes that an attempt begins.
    pub(super) fn begin(&mut self, now: Instant) {
        if self.in_flight == 0 && self.short.is_none() {
            self.last_progress = now;
        }
        self.in_flight += 1;
    }

    /// Notes that an attempt did not begin, because this process was short of a connection.
    pub(super) fn put_off(&mut self, now: Instant) {
        self.in_flight = self.in_flight.saturating_sub(1);
        self.slots = self.in_flight;
        self.short = Some(match self.short {
            // One of those that were started together.
            Some(pause) if now < pause.until => pause,
            last => {
                let length = last.map_or(PAUSE_FIRST, |last| (last.length * 2).min(PAUSE_MAX));
                Pause { until: now.after(length), length }
            }
        });
    }

    pub(super) fn is_short(&self) -> bool {
        self.short.is_some()
    }

    /// Attempts that may be in flight.
    pub(super) fn slots(&self, in_flight_max: u32) -> u32 {
        self.slots.min(in_flight_max).max(1)
    }

    /// As [`Load::slots`], when another is to start.
    pub(super) fn startable(&self, in_flight_max: u32, now: Instant) -> u32 {
        match self.short {
            None => self.slots(in_flight_max),
            Some(pause) => (self.slots + u32::from(now >= pause.until)).min(in_flight_max.max(1)),
        }
    }

    /// How many of its messages may be here: those in flight, and as many as follow them soon.
    pub(super) fn bound(&self, in_flight_max: u32, now: Instant) -> usize {
        let slots = self.slots(in_flight_max);
        let waiting = match self.health {
            Health::Failing => 0,
            _ if self.is_silent(now) => 0,
            Health::New => self.soon(slots).min(WAITING_FIRST),
            Health::Healthy => self.soon(slots),
        };
        slots as usize + waiting
    }

    /// How many messages get their turn within [`WAIT_MAX`]: by Little's law the slots times the time, by
    /// the latency.
    fn soon(&self, slots: u32) -> usize {
        // One that has never answered divides by nothing, and the cast stops at the largest number.
        let soon = (f64::from(slots) * WAIT_MAX.as_secs_f64() / self.latency_s).ceil() as usize;
        soon.min(WAITING_MAX)
    }

    pub(super) fn is_silent(&self, now: Instant) -> bool {
        let most = match self.health {
            Health::New => FIRST_SILENCE,
            _ => Duration::from_secs_f64(self.latency_s * LATENCIES).clamp(SILENCE, SILENCE_MAX),
        };
        (self.in_flight > 0 || self.short.is_some()) && now.since(self.last_progress) > most
    }

    pub(super) fn is_slow(&self, in_flight_max: u32, now: Instant) -> bool {
        let slots = self.slots(in_flight_max);
        self.health == Health::Failing
            || self.is_silent(now)
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
    use super::*;
    use crate::clock::Timestamp;
    use crate::message::Times;

    const NOW: Instant = Instant::START;

    fn ms(ms: u64) -> Duration {
        Duration::from_millis(ms)
    }

    #[test]
    fn attempts_in_flight_follow_latency() {
        for (latency_s, expected) in [(0.0, 64), (0.001, 64), (0.02, 128), (0.1, 640), (5.0, 32_000)] {
            assert_eq!(in_flight_target(latency_s), expected, "{latency_s} s");
        }
    }

    #[test]
    fn each_outcome_has_its_feedback() {
        let outcome = |class, status, connect_us| Outcome {
            class,
            status,
            times: Times { connect_us, ..Times::default() },
            ..crate::store::conformance::outcome(class, status, Timestamp::EPOCH)
        };
        use Feedback::{Answered, Congested, Nothing, TimedOut};
        for (class, status, connect_us, expected) in [
            (Class::Accepted, Some(200), 0, Answered),
            (Class::Rejected, Some(404), 0, Answered),
            (Class::Rejected, Some(500), 0, Answered),
            (Class::Rejected, Some(429), 0, Congested),
            (Class::Rejected, Some(503), 0, Congested),
            (Class::BadAnswer, None, 0, Answered),
            (Class::Reset, None, 0, Congested),
            (Class::Timeout, None, 0, TimedOut),
            (Class::Refused, None, 300, Nothing),
            (Class::Refused, None, 10_000_000, TimedOut),
            (Class::Invalid, None, 0, Nothing),
        ] {
            assert_eq!(
                Feedback::of(Some(&outcome(class, status, connect_us))),
                expected,
                "{class:?} {status:?}"
            );
        }
        assert_eq!(Feedback::of(None), Nothing);
    }

    /// Ends what is in flight and begins as much as may be.
    fn round(load: &mut Load, took: Duration, feedback: Feedback, now: Instant) -> u32 {
        while load.in_flight > 0 {
            load.progress(took, feedback, now);
        }
        while load.in_flight < load.startable(1_024, now) {
            load.begin(now);
        }
        load.in_flight
    }

    #[test]
    fn a_window_doubles_in_each_round_trip_up_to_what_its_latency_needs() {
        let (mut load, mut now) = (Load::new(), NOW);
        for width in [1, 2, 4, 8, 16, 32, 64, 64] {
            assert_eq!(round(&mut load, ms(1), Feedback::Answered, now), width);
            now = now.after(ms(1));
        }
        // Slow is not dead: 300 ms need thirty times as many.
        let (mut load, mut now) = (Load::new(), NOW);
        for width in [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1_024, 1_024] {
            assert_eq!(round(&mut load, ms(300), Feedback::Answered, now), width);
            assert!(width == 1 || !load.is_silent(now.after(ms(800))), "its answers take long");
            now = now.after(ms(300));
        }
    }

    #[test]
    fn a_window_is_halved_once_for_all_that_were_in_flight_together() {
        for (feedback, health) in
            [(Feedback::Congested, Health::Healthy), (Feedback::TimedOut, Health::Failing)]
        {
            let (mut load, mut now) = wide();
            for width in [32, 16, 8, 4, 2, 1] {
                now = now.after(ms(500));
                assert_eq!(round(&mut load, ms(500), feedback, now), width);
                assert_eq!(load.health, health);
            }
            now = now.after(ms(1));
            assert_eq!(round(&mut load, ms(1), Feedback::Answered, now), 2, "and it grows again");
            assert_eq!(load.health, Health::Healthy);
        }
    }

    #[test]
    fn an_endpoint_that_is_down_comes_to_its_attempts_and_begins_anew_when_it_answers() {
        let (mut load, mut now) = wide();
        for width in [32, 16, 8, 4, 2, 1, 2, 4, 8, 16] {
            now = now.after(ms(500));
            assert_eq!(round(&mut load, ms(500), Feedback::TimedOut, now), width);
        }
        load.progress(ms(1), Feedback::Answered, now);
        assert_eq!(load.slots(1_024), 1, "the other 15 are still in flight");
        let (mut load, mut now) = (Load::new(), NOW);
        load.begin(now);
        load.health = Health::Failing;
        for width in [2, 4, 8] {
            now = now.after(ms(500));
            assert_eq!(round(&mut load, ms(500), Feedback::TimedOut, now), width, "it never answered");
        }
    }

    /// An endpoint whose window has grown to 64.
    fn wide() -> (Load, Instant) {
        let (mut load, mut now) = (Load::new(), NOW);
        while round(&mut load, ms(1), Feedback::Answered, now) < 64 {
            now = now.after(ms(1));
        }
        (load, now)
    }

    #[test]
    fn a_refused_connection_changes_nothing() {
        let mut load = Load::new();
        for i in 0..3 {
            let now = NOW.after(ms(i));
            assert_eq!(round(&mut load, ms(0), Feedback::Nothing, now), FIRST);
            assert_eq!(load.health, Health::New);
        }
    }

    #[test]
    fn long_answers_are_no_silence() {
        for (latency, silent_after) in [(1, 101), (60, 181), (300, 901), (5_000, 10_001)] {
            let (mut load, now) = (Load::new(), NOW.after(ms(latency)));
            load.begin(NOW);
            load.progress(ms(latency), Feedback::Answered, now);
            load.begin(now);
            assert!(!load.is_silent(now.after(ms(silent_after - 1))), "{latency} ms");
            assert!(load.is_silent(now.after(ms(silent_after))), "{latency} ms");
        }
    }
}
