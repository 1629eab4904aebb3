//! The only place that asks the time.
//!
//! Every room is given a [`Clock`]; a test gives a manual one and moves it by hand, and the
//! simulation gives one that follows tokio's virtual time. `clippy.toml` forbids asking elsewhere.

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

    /// The moment `micros` microseconds after the Unix epoch, held within the years that RFC 3339 can write.
    pub fn from_micros(micros: i64) -> Timestamp {
        const MAX: i64 = 253_402_207_200_000_000; // jiff's last moment, in December of 9999
        Timestamp(micros.clamp(-62_135_596_800_000_000, MAX))
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
        let parsed: jiff::Timestamp =
            text.parse().map_err(|error| format!("`{text}` is not an RFC 3339 time: {error}"))?;
        Ok(Timestamp::from_micros(parsed.as_microsecond()))
    }

    /// This moment and `wait` later.
    pub fn after(self, wait: Duration) -> Timestamp {
        let wait = i64::try_from(wait.as_micros()).unwrap_or(i64::MAX);
        Timestamp::from_micros(self.0.saturating_add(wait))
    }

    /// How long after `earlier` this is; zero when it is not.
    pub fn since(self, earlier: Timestamp) -> Duration {
        Duration::from_micros(u64::try_from(self.0.saturating_sub(earlier.0)).unwrap_or(0))
    }
}

impl fmt::Display for Timestamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match jiff::Timestamp::from_microsecond(self.0) {
            Ok(time) => time.fmt(f),
            Err(_) => write!(f, "{}us", self.0),
        }
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

/// Tells the time, and how long things took.
#[derive(Clone, Debug)]
pub struct Clock(Source);

#[derive(Clone, Debug)]
enum Source {
    System,
    Manual(Arc<AtomicI64>),
    Virtual { start: Timestamp, zero: tokio::time::Instant },
}

impl Clock {
    /// The machine's clock.
    pub fn system() -> Clock {
        Clock(Source::System)
    }

    /// A clock that stands at `start` until [`Clock::advance`] moves it.
    pub fn manual(start: Timestamp) -> Clock {
        Clock(Source::Manual(Arc::new(AtomicI64::new(start.0))))
    }

    /// A clock that stands at `start` now and follows the tokio runtime's time, which a paused
    /// runtime moves without waiting. For the simulation.
    #[expect(clippy::disallowed_methods, reason = "this is the clock")]
    pub fn virtual_from(start: Timestamp) -> Clock {
        Clock(Source::Virtual { start, zero: tokio::time::Instant::now() })
    }

    /// The time.
    #[expect(clippy::disallowed_methods, reason = "this is the clock")]
    pub fn now(&self) -> Timestamp {
        match &self.0 {
            Source::System => {
                let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
                Timestamp::from_micros(since.map_or(0, |d| i64::try_from(d.as_micros()).unwrap_or(i64::MAX)))
            }
            Source::Manual(micros) => Timestamp::from_micros(micros.load(Ordering::SeqCst)),
            Source::Virtual { start, zero } => start.after(zero.elapsed()),
        }
    }

    /// A reading for measuring how long something takes: never goes back when somebody sets the clock.
    #[expect(clippy::disallowed_methods, reason = "this is the clock")]
    pub fn stopwatch(&self) -> Stopwatch {
        match &self.0 {
            Source::System => Stopwatch(Start::Instant(std::time::Instant::now())),
            _ => Stopwatch(Start::Clock(self.clone(), self.now())),
        }
    }

    /// Moves a manual clock on by `by`.
    ///
    /// # Panics
    /// When the clock is not a manual one: only a test can call this, and it has made a mistake.
    pub fn advance(&self, by: Duration) {
        let Source::Manual(micros) = &self.0 else { panic!("only a manual clock can be advanced") };
        micros.fetch_add(i64::try_from(by.as_micros()).unwrap_or(i64::MAX), Ordering::SeqCst);
    }
}

/// Measures from the moment [`Clock::stopwatch`] made it.
#[derive(Clone, Debug)]
pub struct Stopwatch(Start);

#[derive(Clone, Debug)]
enum Start {
    Instant(std::time::Instant),
    Clock(Clock, Timestamp),
}

impl Stopwatch {
    /// How long ago this was made.
    pub fn elapsed(&self) -> Duration {
        match &self.0 {
            Start::Instant(start) => start.elapsed(),
            Start::Clock(clock, start) => clock.now().since(*start),
        }
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
}
