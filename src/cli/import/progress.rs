//! How far an import has come: for a later run of it, and for whoever watches.

use std::fs;
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::{Deserialize, Serialize};

use super::super::screen::grouped;
use crate::app::{self, AppError};

/// What is known of all lines up to one.
#[derive(Clone, Debug, Default, PartialEq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Progress {
    /// The import's name: another's progress means nothing.
    pub(super) name: String,
    /// Where it sends to.
    pub(super) api: String,
    /// All lines up to this one are stored or bad.
    pub(super) settled: u64,
    /// A digest of the source up to the end of that line: when it has changed since, its lines are others.
    pub(super) content: String,
    /// Where the last batch began of which anything is stored: a later run sends it again.
    pub(super) from: u64,
    /// A line of that batch, and the id of its message: another store would give it another.
    pub(super) probe: Option<(u64, i64)>,
    pub(super) counts: Counts,
}

/// What became of lines.
#[derive(Clone, Copy, Debug, Default, PartialEq, Serialize, Deserialize)]
pub(super) struct Counts {
    pub(super) sent: u64,
    pub(super) already_there: u64,
    pub(super) bad: u64,
}

impl Counts {
    pub(super) fn lines(self) -> u64 {
        self.sent + self.already_there + self.bad
    }
}

/// The file that keeps it. An import goes on without, when it can't be written.
pub(super) struct ProgressFile {
    path: Option<PathBuf>,
}

impl ProgressFile {
    pub(super) fn new(path: Option<PathBuf>) -> ProgressFile {
        ProgressFile { path }
    }

    /// What an earlier run of this import has left; else the beginning.
    ///
    /// # Errors
    /// When the file is there and is none of ours.
    pub(super) fn read(&self, name: &str, api: &str) -> app::Result<Progress> {
        let fresh = Progress { name: name.to_owned(), api: api.to_owned(), ..Progress::default() };
        let Some(path) = &self.path else { return Ok(fresh) };
        let wrong = |why: String| {
            let path = path.display();
            AppError(format!(
                "{path} is no progress of an import: {why}; remove it, or name another with --progress"
            ))
        };
        let text = match fs::read(path) {
            Ok(text) => text,
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(fresh),
            Err(error) => return Err(wrong(error.to_string())),
        };
        let left: Progress = serde_json::from_slice(&text).map_err(|error| wrong(error.to_string()))?;
        Ok(if (&left.name, &left.api) == (&fresh.name, &fresh.api) { left } else { fresh })
    }

    /// Keeps it, whole or not at all. The first failure is told and is the last try.
    pub(super) fn write(&mut self, progress: &Progress) {
        let Some(path) = &self.path else { return };
        let next = beside(path, ".new");
        let json = serde_json::to_vec(progress).unwrap_or_default();
        let written = fs::File::create(&next).and_then(|mut file| file.write_all(&json));
        if let Err(error) = written.and_then(|()| fs::rename(&next, path)) {
            tracing::warn!(
                "{} can't be written: {error}; a later run begins at the first line",
                path.display()
            );
            self.path = None;
        }
    }

    /// Forgets it: nothing is left to do.
    pub(super) fn remove(&self) {
        if let Some(path) = &self.path
            && let Err(error) = fs::remove_file(path)
            && error.kind() != ErrorKind::NotFound
        {
            tracing::warn!("{} can't be removed: {error}; remove it by hand", path.display());
        }
    }
}

/// The file of that name and this ending.
pub(super) fn beside(path: &Path, ending: &str) -> PathBuf {
    let mut name = path.as_os_str().to_owned();
    name.push(ending);
    PathBuf::from(name)
}

/// What a person sees while it runs. `share` is how much of the source is done, `None` when its size is
/// not known; `begun` how much was done before.
pub(super) fn shown(lines: u64, rate: f64, share: Option<f64>, begun: f64, elapsed: Duration) -> String {
    let rate = format!("{} lines, {}/s", grouped(lines), grouped(whole(rate)));
    let Some(share) = share.map(|share| share.clamp(0.0, 1.0)) else { return rate };
    let percent = format!("{:.0} %", share * 100.0);
    let done = share - begun;
    if done <= 0.0 {
        return format!("{percent}, {rate}");
    }
    let left = Duration::try_from_secs_f64(elapsed.as_secs_f64() / done * (1.0 - share));
    format!("{percent}, {rate}, {} left", left.map_or("long".to_owned(), clock))
}

/// A rate or count without its fraction.
#[expect(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "it is bounded just before")]
pub(super) fn whole(number: f64) -> u64 {
    number.clamp(0.0, 1e15) as u64
}

/// A time that is left, in minutes and seconds.
fn clock(time: Duration) -> String {
    let seconds = time.as_secs();
    match seconds {
        0..60 => format!("{seconds} s"),
        60..3_600 => format!("{}:{:02} min", seconds / 60, seconds % 60),
        _ => format!("{}:{:02} h", seconds / 3_600, seconds / 60 % 60),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn progress_is_kept_for_the_same_import_into_the_same_api() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("list.csv.ams-import");
        let mut file = ProgressFile::new(Some(path.clone()));
        let fresh = file.read("list", "http://a").unwrap();
        assert_eq!((fresh.settled, fresh.from, fresh.probe), (0, 0, None));
        let counts = Counts { sent: 1_990, already_there: 7, bad: 3 };
        let left = Progress {
            settled: 2_000,
            content: "5e".to_owned(),
            from: 1_000,
            probe: Some((1_001, 77)),
            counts,
            ..fresh.clone()
        };
        file.write(&left);
        assert_eq!(file.read("list", "http://a").unwrap(), left);
        assert_eq!(file.read("other", "http://a").unwrap().settled, 0);
        assert_eq!(file.read("list", "http://b").unwrap().settled, 0);
        assert_eq!(counts.lines(), 2_000);
        file.remove();
        file.remove();
        assert_eq!(file.read("list", "http://a").unwrap(), fresh);
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0, "nothing stays behind");
        fs::write(&path, "{}").unwrap();
        let error = file.read("list", "http://a").unwrap_err();
        assert!(error.0.contains("ams-import") && error.0.contains("--progress"), "{error}");
    }

    #[test]
    fn an_import_goes_on_without_its_progress() {
        let mut file = ProgressFile::new(Some(PathBuf::from("/nowhere/at/all")));
        file.write(&Progress::default());
        assert!(file.path.is_none());
        file.remove();
    }

    #[test]
    fn who_watches_sees_rate_and_time_left() {
        let seconds = Duration::from_secs;
        for (lines, rate, share, begun, elapsed, text) in [
            (1_000, 500.4, None, 0.0, seconds(2), "1,000 lines, 500/s"),
            (1_000, 500.0, Some(0.1), 0.0, seconds(2), "10 %, 1,000 lines, 500/s, 18 s left"),
            (1_000, 10.0, Some(0.5), 0.5, seconds(2), "50 %, 1,000 lines, 10/s"),
            (9, 10.0, Some(0.75), 0.5, seconds(100), "75 %, 9 lines, 10/s, 1:40 min left"),
            (9, 0.0, Some(0.001), 0.0, seconds(60), "0 %, 9 lines, 0/s, 16:39 h left"),
            (9, 1.0, Some(1.2), 0.0, seconds(60), "100 %, 9 lines, 1/s, 0 s left"),
        ] {
            assert_eq!(shown(lines, rate, share, begun, elapsed), text);
        }
    }
}
