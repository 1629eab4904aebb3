//! The log: text for people, JSON for machines, ids as fields.
//!
//! Never in it, at any level: contents, headers of messages, receivers' answers, secrets, keys and passwords.
//! Libraries don't know that rule (a database driver prints the values that it sends), so of theirs only
//! warnings are let through.

use std::io::IsTerminal;
use std::path::Path;
use std::sync::Mutex;

use tracing::{Level, Metadata};
use tracing_subscriber::filter::{FilterExt, LevelFilter, Targets, filter_fn};
use tracing_subscriber::fmt::writer::BoxMakeWriter;
use tracing_subscriber::layer::{Layer, SubscriberExt};
use tracing_subscriber::registry::LookupSpan;
use tracing_subscriber::util::SubscriberInitExt;

/// Starts the log, to standard error or a file. `level` is a level, or a filter such as
/// `info,ams::consumer=debug`.
///
/// # Errors
/// When the level can't be understood or the file can't be opened.
pub fn start_log(level: &str, json: bool, colour: bool, file: Option<&Path>) -> Result<(), String> {
    let filter: Targets = level
        .parse()
        .map_err(|_| format!("LOG_LEVEL is `{level}`, which is no log level; write info or debug"))?;
    let file = file
        .map(|path| {
            let opened = std::fs::File::options().create(true).append(true).open(path);
            opened.map_err(|error| {
                format!("LOG_FILE {} can't be opened: {error}; name another", path.display())
            })
        })
        .transpose()?;
    let colour = colour && file.is_none() && std::io::stderr().is_terminal();
    let writer = match file {
        Some(file) => BoxMakeWriter::new(Mutex::new(file)),
        None => BoxMakeWriter::new(std::io::stderr),
    };
    let lines = lines(filter, json, colour, writer);
    let started = tracing_subscriber::registry().with(lines).try_init();
    started.map_err(|error| format!("the log can't be started: {error}"))
}

/// Writes what passes the filter.
fn lines<S>(
    filter: Targets,
    json: bool,
    colour: bool,
    writer: BoxMakeWriter,
) -> Box<dyn Layer<S> + Send + Sync>
where
    S: tracing::Subscriber + for<'a> LookupSpan<'a>,
{
    let layer = tracing_subscriber::fmt::layer().with_writer(writer).with_ansi(colour);
    // It lets through no more than the levels do. Without being told so, every event of every library, and there
    // are some for each statement, would come as far as this filter.
    let filter = filter.and(filter_fn(is_ours).with_max_level_hint(LevelFilter::TRACE));
    if json { layer.json().with_filter(filter).boxed() } else { layer.with_filter(filter).boxed() }
}

/// Whether an event is written by this program, or a library has something to warn of.
fn is_ours(event: &Metadata<'_>) -> bool {
    let target = event.target();
    *event.level() <= Level::WARN || target == "kafka" || target == "ams" || target.starts_with("ams::")
}

#[cfg(test)]
mod tests {
    use std::io::Write;
    use std::sync::Arc;

    use super::*;

    #[derive(Clone, Default)]
    struct Lines(Arc<Mutex<Vec<u8>>>);

    impl Write for Lines {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0.lock().unwrap().write(bytes)
        }

        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }

    #[test]
    fn a_bad_level_or_file_is_told_in_a_sentence() {
        assert!(start_log("info=loud", false, false, None).unwrap_err().contains("info=loud"));
        let nowhere = Path::new("/nowhere/ams.log");
        assert!(start_log("info", false, false, Some(nowhere)).unwrap_err().contains("/nowhere/ams.log"));
    }

    #[test]
    fn what_is_below_every_level_is_not_even_looked_at() {
        let filter = "info,ams::consumer=debug".parse().unwrap();
        let lines = lines(filter, false, false, BoxMakeWriter::new(Lines::default));
        let log = tracing_subscriber::registry().with(lines);
        assert_eq!(tracing::Subscriber::max_level_hint(&log), Some(LevelFilter::DEBUG));
    }

    #[test]
    fn of_libraries_only_warnings_are_written_and_ids_are_fields() {
        for json in [false, true] {
            let written = Lines::default();
            let to = written.clone();
            let writer = BoxMakeWriter::new(move || to.clone());
            let filter = "trace,tokio_postgres=trace,ams::consumer=info".parse().unwrap();
            let log = tracing_subscriber::registry().with(lines(filter, json, false, writer));
            tracing::subscriber::with_default(log, || {
                tracing::debug!(target: "tokio_postgres::query", "executing with parameters: [\"planted\"]");
                tracing::warn!(target: "hyper", "a warning");
                tracing::debug!(target: "ams::consumer::dispatcher", "below its level");
                tracing::trace!(target: "ams::producer", id = 7, "a trace");
                tracing::debug!(target: "amsterdam", "planted");
            });
            let text = String::from_utf8(written.0.lock().unwrap().clone()).unwrap();
            assert_eq!(text.lines().count(), 2, "{text}");
            assert!(text.contains("a warning") && !text.contains("planted"), "{text}");
            assert!(text.contains(if json { "\"id\":7" } else { "id=7" }), "{text}");
        }
    }
}
