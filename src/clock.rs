//! The only place that asks the time.
//!
//! Every room is given a [`Clock`]; a test gives a manual one and moves it by hand, and the
//! simulation gives one that goes by tokio's virtual time. `clippy.toml` forbids asking elsewhere.
//!
//! What processes write down and compare with what others wrote down has to be one time. So the clock of a process
//! follows that of its store ([`Clock::follow`]) where the store has one: hosts need not agree, and nobody who sets a
//! host's clock moves what is under way.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, Ordering};
use std::time::Duration;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// A moment: microseconds since the Unix epoch. Written as RFC 3339 in UTC everywhere outside.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Timestamp(i64);

impl Timestamp {
    /// 1970-01-01T00:00:00Z.
    pub const EPOCH: Timestamp = Timestamp(0);

    /// 0001-01-01T00:00:00Z: RFC 3339 can't write an earlier one that every program reads alike.
    pub const MIN: Timestamp = Timestamp(-62_135_596_800_000_000);

    /// 9999-12-31T23:59:59.999999Z, the usual "never": the last one that RFC 3339 can write.
    pub const MAX: Timestamp = Timestamp(253_402_300_799_999_999);

    /// The moment `micros` microseconds after the Unix epoch, held between [`Timestamp::MIN`] and
    /// [`Timestamp::MAX`].
    pub fn from_micros(micros: i64) -> Timestamp {
        Timestamp(micros).clamp(Timestamp::MIN, Timestamp::MAX)
    }

    /// Microseconds since the Unix epoch.
    pub fn as_micros(self) -> i64 {
        self.0
    }

    /// Whole seconds since the Unix epoch, as `webhook-timestamp` wants them.
    pub fn as_seconds(self) -> i64 {
        self.0.div_euclid(1_000_000)
    }

    /// The moment that an RFC 3339 text names.
    ///
    /// # Errors
    /// A sentence that says what is wrong with the text.
    pub fn parse(text: &str) -> Result<Timestamp, String> {
        let micros = match text.parse::<jiff::Timestamp>() {
            Ok(time) => time.as_microsecond(),
            Err(error) => {
                civil_micros(text).ok_or_else(|| format!("`{text}` is not an RFC 3339 time: {error}"))?
            }
        };
        let time = Timestamp(micros);
        match (Timestamp::MIN..=Timestamp::MAX).contains(&time) {
            true => Ok(time),
            false => Err(format!("`{text}` does not lie between the years 1 and 9999")),
        }
    }

    /// This moment and `wait` later.
    pub fn after(self, wait: Duration) -> Timestamp {
        let wait = i64::try_from(wait.as_micros()).unwrap_or(i64::MAX);
        Timestamp::from_micros(self.0.saturating_add(wait))
    }

    /// This moment and `wait` earlier.
    pub fn before(self, wait: Duration) -> Timestamp {
        let wait = i64::try_from(wait.as_micros()).unwrap_or(i64::MAX);
        Timestamp::from_micros(self.0.saturating_sub(wait))
    }

    /// How long after `earlier` this is; zero when it is not.
    pub fn since(self, earlier: Timestamp) -> Duration {
        Duration::from_micros(u64::try_from(self.0.saturating_sub(earlier.0)).unwrap_or(0))
    }
}

/// The Unix epoch as jiff's civil time, whose range covers the whole of year 9999; that of its timestamps ends a
/// day earlier, so that every one of them can be written in every time zone.
const CIVIL_EPOCH: jiff::civil::DateTime = jiff::civil::DateTime::constant(1970, 1, 1, 0, 0, 0, 0);

/// Microseconds since the Unix epoch of an RFC 3339 text that jiff's timestamps can't hold.
fn civil_micros(text: &str) -> Option<i64> {
    let pieces = jiff::fmt::temporal::Pieces::parse(text).ok()?;
    let civil = pieces.date().to_datetime(pieces.time()?);
    let offset = jiff::SignedDuration::from_secs(pieces.to_numeric_offset()?.seconds().into());
    i64::try_from((civil.duration_since(CIVIL_EPOCH) - offset).as_micros()).ok()
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if let Ok(time) = jiff::Timestamp::from_microsecond(self.0) {
            return time.fmt(f);
        }
        let since_epoch = jiff::SignedDuration::from_micros(self.0);
        write!(f, "{}Z", CIVIL_EPOCH.saturating_add(since_epoch))
    }
}

impl Serialize for Timestamp {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de> Deserialize<'de> for Timestamp {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Timestamp, D::Error> {
        let text = std::borrow::Cow::<'de, str>::deserialize(deserializer)?;
        Timestamp::parse(&text).map_err(serde::de::Error::custom)
    }
}

/// A moment of this process, for intervals inside it: nobody can set the clock that it is read from. Two processes
/// can't compare theirs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
pub struct Instant(Duration);

impl Instant {
    /// Before everything that this process has read.
    pub const START: Instant = Instant(Duration::ZERO);

    /// This moment and `wait` later.
    pub fn after(self, wait: Duration) -> Instant {
        Instant(self.0.saturating_add(wait))
    }

    /// How long after `earlier` this is; zero when it is not.
    pub fn since(self, earlier: Instant) -> Duration {
        self.0.saturating_sub(earlier.0)
    }
}

/// The present, read once for a whole step.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Now {
    /// What is written down, and compared with what others wrote down.
    pub time: Timestamp,
    /// What intervals inside this process are measured by.
    pub instant: Instant,
}

/// Tells the time, and how long things took. Its clones are one clock.
#[derive(Clone, Debug)]
pub struct Clock {
    source: Source,
    /// The store's time when this process's instants began, in microseconds; [`NOT_FOLLOWED`]: the source's time is told.
    followed: Arc<AtomicI64>,
}

/// No time that a store can have: [`Timestamp::MIN`] is later.
const NOT_FOLLOWED: i64 = i64::MIN;

#[derive(Clone, Debug)]
enum Source {
    System,
    Manual(Arc<Hands>),
    /// Goes by tokio's time; `set` says how far somebody has set the wall clock, in microseconds.
    Virtual {
        start: Timestamp,
        zero: tokio::time::Instant,
        set: Arc<AtomicI64>,
    },
}

/// A manual clock's, in microseconds.
#[derive(Debug)]
struct Hands {
    wall: AtomicI64,
    passed: AtomicI64,
}

/// Where the instants of the machine's clock begin, the same for all clocks of a process.
#[expect(clippy::disallowed_methods, reason = "this is the clock")]
static START: std::sync::LazyLock<std::time::Instant> = std::sync::LazyLock::new(std::time::Instant::now);

impl Clock {
    /// The machine's clock.
    pub fn system() -> Clock {
        Clock::of(Source::System)
    }

    fn of(source: Source) -> Clock {
        Clock { source, followed: Arc::new(NOT_FOLLOWED.into()) }
    }

    /// A clock that stands at `start` until [`Clock::advance`] moves it.
    pub fn manual(start: Timestamp) -> Clock {
        Clock::of(Source::Manual(Arc::new(Hands { wall: start.0.into(), passed: 0.into() })))
    }

    /// A clock that stands at `start` now and goes by the tokio runtime's time, which a paused
    /// runtime moves without waiting. For the simulation.
    #[expect(clippy::disallowed_methods, reason = "this is the clock")]
    pub fn virtual_from(start: Timestamp) -> Clock {
        Clock::of(Source::Virtual { start, zero: tokio::time::Instant::now(), set: Arc::default() })
    }

    /// The time: the store's, once [`Clock::follow`] has heard it.
    pub fn now(&self) -> Timestamp {
        match self.followed.load(Ordering::Relaxed) {
            NOT_FOLLOWED => self.wall(),
            zero => Timestamp(zero).after(self.instant().0),
        }
    }

    /// Tells the store's time from now on: it was `told` at some moment between `asked` and the present one. Between two
    /// calls this process's instants measure what passes. The time is changed by no more than it must be for
    /// `told` to be possible, so that a slow answer does not make it less exact.
    ///
    /// Returns by how many microseconds it was changed.
    pub fn follow(&self, told: Timestamp, asked: Instant) -> i64 {
        let answered = self.instant();
        let zero = match self.followed.load(Ordering::Relaxed) {
            NOT_FOLLOWED => self.own_zero(),
            zero => zero,
        };
        let (earliest, latest) = (Timestamp(zero).after(asked.0), Timestamp(zero).after(answered.0));
        let change = told.0.saturating_sub(told.clamp(earliest, latest.max(earliest)).0);
        self.followed.store(zero.saturating_add(change), Ordering::Relaxed);
        change
    }

    /// How far the time is ahead of this process's instants, in microseconds: it changes only when somebody sets the clock.
    /// `None`: the time is a store's.
    pub fn own_offset(&self) -> Option<i64> {
        let is_own = self.followed.load(Ordering::Relaxed) == NOT_FOLLOWED;
        is_own.then(|| self.own_zero())
    }

    /// What the source's wall clock told, or would have told, when this process's instants began.
    fn own_zero(&self) -> i64 {
        self.wall().before(self.instant().0).0
    }

    /// What the source's wall clock tells.
    #[expect(clippy::disallowed_methods, reason = "this is the clock")]
    fn wall(&self) -> Timestamp {
        match &self.source {
            Source::System => {
                let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
                Timestamp::from_micros(since.map_or(0, |d| i64::try_from(d.as_micros()).unwrap_or(i64::MAX)))
            }
            Source::Manual(hands) => Timestamp::from_micros(hands.wall.load(Ordering::SeqCst)),
            Source::Virtual { start, zero, set } => {
                let now = start.after(zero.elapsed());
                Timestamp::from_micros(now.0.saturating_add(set.load(Ordering::SeqCst)))
            }
        }
    }

    /// The present moment of this process.
    pub fn instant(&self) -> Instant {
        match &self.source {
            Source::System => Instant(START.elapsed()),
            Source::Manual(hands) => {
                Instant(Duration::from_micros(hands.passed.load(Ordering::SeqCst).unsigned_abs()))
            }
            Source::Virtual { zero, .. } => Instant(zero.elapsed()),
        }
    }

    /// The time and the moment.
    pub fn reading(&self) -> Now {
        Now { time: self.now(), instant: self.instant() }
    }

    /// A reading for measuring how long something takes: never goes back when somebody sets the clock.
    pub fn stopwatch(&self) -> Stopwatch {
        Stopwatch { clock: self.clone(), start: self.instant() }
    }

    /// Moves a manual clock on by `by`.
    ///
    /// # Panics
    /// When the clock is not a manual one: only a test can call this, and it has made a mistake.
    pub fn advance(&self, by: Duration) {
        let Source::Manual(hands) = &self.source else { panic!("only a manual clock can be advanced") };
        let by = i64::try_from(by.as_micros()).unwrap_or(i64::MAX);
        hands.wall.fetch_add(by, Ordering::SeqCst);
        hands.passed.fetch_add(by, Ordering::SeqCst);
    }

    /// Sets a test's wall clock by so many microseconds, as an administrator or a time server does. No time passes.
    ///
    /// # Panics
    /// When the clock is the machine's: only a test can call this, and it has made a mistake.
    pub fn set_wall(&self, by_micros: i64) {
        let wall = match &self.source {
            Source::System => panic!("the machine's clock can't be set"),
            Source::Manual(hands) => &hands.wall,
            Source::Virtual { set, .. } => set,
        };
        wall.fetch_add(by_micros, Ordering::SeqCst);
    }
}

/// Measures from the moment [`Clock::stopwatch`] made it.
#[derive(Clone, Debug)]
pub struct Stopwatch {
    clock: Clock,
    start: Instant,
}

impl Stopwatch {
    /// How long ago this was made.
    pub fn elapsed(&self) -> Duration {
        self.clock.instant().since(self.start)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_read_and_write_as_rfc_3339() {
        let time = Timestamp::parse("2026-11-23T10:00:00.25+01:00").unwrap();
        assert_eq!(time.to_string(), "2026-11-23T09:00:00.25Z");
        assert_eq!(serde_json::from_str::<Timestamp>("\"2026-11-23T09:00:00.25Z\"").unwrap(), time);
        assert!(Timestamp::parse("tomorrow").unwrap_err().contains("tomorrow"));
        for text in [
            "0001-01-01T00:00:00Z",
            "9999-12-30T22:00:00.000001Z",
            "9999-12-31T23:59:59Z",
            "9999-12-31T23:59:59.999999Z",
        ] {
            assert_eq!(Timestamp::parse(text).unwrap().to_string(), text);
        }
        let east = Timestamp::parse("9999-12-31T23:59:59+01:00").unwrap();
        assert_eq!(east.to_string(), "9999-12-31T22:59:59Z");
        for text in ["9999-12-31T23:59:59-01:00", "0001-01-01T00:00:00+01:00", "-000001-01-01T00:00:00Z"] {
            assert!(Timestamp::parse(text).unwrap_err().contains("years 1 and 9999"), "{text}");
        }
        for text in ["9999-12-31T23:59:59", "9999-12-32T00:00:00Z", "10000-01-01T00:00:00Z", "9999-12-31"] {
            assert!(Timestamp::parse(text).unwrap_err().contains("is not an RFC 3339 time"), "{text}");
        }
        for micros in [i64::MIN, i64::MAX] {
            let edge = Timestamp::from_micros(micros);
            assert_eq!(Timestamp::parse(&edge.to_string()).unwrap(), edge);
        }
    }

    #[test]
    fn a_manual_clock_moves_only_by_hand() {
        let clock = Clock::manual(Timestamp::from_micros(5));
        let watch = clock.stopwatch();
        assert_eq!(clock.now(), Timestamp::from_micros(5));
        clock.advance(Duration::from_secs(1));
        assert_eq!(watch.elapsed(), Duration::from_secs(1));
        assert_eq!(clock.now().since(Timestamp::from_micros(5)), Duration::from_secs(1));
        assert_eq!(Timestamp::from_micros(5).since(clock.now()), Duration::ZERO);
    }

    #[test]
    fn a_clock_follows_its_store_whatever_is_done_to_its_own() {
        let (start, hour) = (Timestamp::EPOCH.after(Duration::from_secs(36_000)), Duration::from_secs(3_600));
        let (clock, second) = (Clock::manual(start), Duration::from_secs(1));
        let other = clock.clone();
        // The store is an hour ahead. It was asked a second ago.
        let asked = clock.instant();
        clock.advance(second);
        let told = start.after(hour);
        assert_eq!(clock.follow(told, asked), 3_599_000_000, "no more than it must");
        assert_eq!(other.now(), told, "clones are one clock");
        clock.set_wall(-7_200_000_000);
        clock.advance(second);
        assert_eq!(clock.now(), told.after(second), "nobody who sets the machine's clock moves it");
        // What agrees changes nothing, however long the answer took.
        let asked = clock.instant();
        clock.advance(second * 9);
        for ms in [0, 1, 9_000] {
            assert_eq!(clock.follow(told.after(second + Duration::from_millis(ms)), asked), 0, "{ms}");
        }
        // The store's clock is set back by five seconds.
        let (asked, before) = (clock.instant(), clock.now());
        assert_eq!(clock.follow(before.before(second * 5), asked), -5_000_000);
        assert_eq!(clock.now(), before.before(second * 5));
    }

    #[test]
    fn setting_the_wall_clock_lets_no_time_pass() {
        let start = Timestamp::EPOCH.after(Duration::from_secs(7_200));
        let clock = Clock::manual(start);
        let (watch, before) = (clock.stopwatch(), clock.instant());
        clock.set_wall(-3_600_000_000);
        clock.advance(Duration::from_secs(2));
        let Now { time, instant } = clock.reading();
        assert_eq!(start.since(time), Duration::from_secs(3_598));
        assert_eq!(
            (watch.elapsed(), instant.since(before)),
            (Duration::from_secs(2), Duration::from_secs(2))
        );
        assert_eq!(before.since(instant), Duration::ZERO);
    }

    #[test]
    fn an_offset_tells_that_somebody_has_set_the_clock() {
        let clock = Clock::manual(Timestamp::EPOCH.after(Duration::from_secs(7_200)));
        let before = clock.own_offset().unwrap();
        clock.advance(Duration::from_secs(2));
        assert_eq!(clock.own_offset(), Some(before));
        clock.set_wall(-15_000_000);
        assert_eq!(clock.own_offset(), Some(before - 15_000_000));
        clock.follow(clock.now(), clock.instant());
        assert_eq!(clock.own_offset(), None);
    }
}
