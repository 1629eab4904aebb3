//! `ams import`: sends the messages of a file or of standard input, each once, however often it is begun.
//!
//! Every line gets an idempotency key from the import's name and what the line says, so a line that is sent
//! again is the same message, also when others were mended. A progress file lets a run that follows a killed
//! one begin near where that ended.

mod hashed;
mod key;
mod lines;
mod progress;
mod reading;
mod records;
mod sending;

use std::fs::File;
use std::io::{BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use clap::{Arg, ArgMatches, Command};
use serde_json::json;

use self::lines::Format;
use self::progress::{Counts, ProgressFile, beside, whole};
use self::sending::{End, Sending};
use super::operator::{Operator, option, text, verb, wrong_use};
use super::screen::{grouped, many, plain, time};
use crate::app::{self, AppError};

/// Characters of an import's name: with a digest and a number it must fit into an idempotency key, which has
/// 255 at most.
const NAME_MAX: usize = 200;
/// Bytes that are read at a time.
const BUFFER: usize = 1 << 20;

pub(super) fn command() -> Command {
    let file = Arg::new("file").value_name("FILE").required(true);
    let format = option("format", "FORMAT", "jsonl or csv, when the file's name does not end so");
    let name = option(
        "name",
        "NAME",
        "lines that an import of this name has sent are not sent again; left out: the file's name",
    );
    verb(
        "import",
        "send the messages of a file, each line once, also when it is killed, mended and run again",
    )
    .arg(file.help("JSON lines or CSV with a header; `-` is standard input"))
    .arg(format.value_parser(["jsonl", "csv"]))
    .arg(name)
    .arg(option("progress", "FILE", "where it notes how far it is; left out: FILE.ams-import"))
    .arg(option("errors", "FILE", "write each bad line's number and reason there, as JSON lines"))
}

pub(super) async fn run(operator: &Operator, matches: &ArgMatches) -> app::Result<ExitCode> {
    let file = text(matches, "file").unwrap_or_default();
    let Some(format) = text(matches, "format").map_or_else(|| Format::of_name(file), Format::of_word) else {
        return Ok(wrong_use("the name says no format; add --format jsonl or --format csv"));
    };
    let Some(source) = Source::open(file, text(matches, "name"))? else {
        let why = "what comes by a pipe can't be read twice, so its keys need a name; add --name, \
                   and the same one when it is run again";
        return Ok(wrong_use(why));
    };
    if source.name.is_empty() || source.name.chars().count() > NAME_MAX {
        let why = format!("--name, or without it the file's name, must have from 1 to {NAME_MAX} characters");
        return Ok(wrong_use(&why));
    }
    let beside_file = source.size.is_some().then(|| beside(Path::new(file), ".ams-import"));
    let progress = ProgressFile::new(text(matches, "progress").map(PathBuf::from).or(beside_file));
    let mut sending = Sending::new(operator, source, format, progress, text(matches, "errors"))?;
    let watch = operator.clock.stopwatch();
    let mut end = sending.run().await?;
    if let End::Anew(why) = end {
        end = sending.begin_anew(why)?.run().await?;
    }
    let (counts, earlier) = (sending.counts(), sending.earlier());
    let seconds = watch.elapsed().as_secs_f64();
    let rate = (counts.lines() - earlier) as f64 / seconds.max(0.001);
    let done = end == End::Done;
    let answer = json!({
        "name": sending.name(), "done": done, "lines": counts.lines(), "sent": counts.sent,
        "already_there": counts.already_there, "bad": counts.bad, "by_an_earlier_run": earlier,
        "seconds": (seconds * 1000.0).round() / 1000.0, "lines_per_s": whole(rate),
    });
    let said = || summary(sending.name(), done, counts, earlier, watch.elapsed(), rate);
    // Of a source without a single readable line there is only to say what is wrong with it.
    if !matches!(end, End::Broken(_)) || counts.lines() > 0 {
        operator.screen.show(&answer, said)?;
    }
    match end {
        End::Broken(why) => Err(AppError(why)),
        End::Done if counts.bad == 0 => Ok(ExitCode::SUCCESS),
        _ => Ok(ExitCode::FAILURE),
    }
}

fn summary(name: &str, done: bool, counts: Counts, earlier: u64, took: Duration, rate: f64) -> String {
    let Counts { sent, already_there, bad } = counts;
    let mut text =
        if done { String::new() } else { "stopped; the same command goes on from here\n".to_owned() };
    text += &format!(
        "{}: {} sent, {} already there, {} bad\n",
        many(counts.lines(), "line"),
        grouped(sent),
        grouped(already_there),
        grouped(bad)
    );
    if already_there > 0 {
        text += &format!(
            "already there: an earlier import of the name {} sent them; to send them again use another --name\n",
            plain(name, NAME_MAX)
        );
    }
    if earlier > 0 {
        text += &format!("{} of them by an earlier run\n", grouped(earlier));
    }
    text + &format!("{}, {} lines a second\n", time(took), grouped(whole(rate)))
}

/// Where the lines come from.
struct Source {
    /// What idempotency keys begin with.
    name: String,
    path: Option<PathBuf>,
    /// Bytes, when it is a file. What is appended meanwhile belongs to another import.
    size: Option<u64>,
}

impl Source {
    /// Looks at a file, or at standard input; `None` when that needs a name and has none.
    fn open(path: &str, name: Option<&str>) -> app::Result<Option<Source>> {
        let wrong =
            |error: std::io::Error| AppError(format!("{path} can't be read: {error}; name another file"));
        let name = name.map(str::to_owned);
        if path == "-" {
            return Ok(name.map(|name| Source { name, path: None, size: None }));
        }
        let whole = File::open(path).and_then(|file| file.metadata()).map_err(wrong)?;
        let path = PathBuf::from(path);
        if whole.is_dir() {
            return Err(wrong(std::io::ErrorKind::IsADirectory.into()));
        }
        if !whole.is_file() {
            return Ok(name.map(|name| Source { name, path: Some(path), size: None }));
        }
        let own = || path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        Ok(Some(Source { name: name.unwrap_or_else(own), path: Some(path), size: Some(whole.len()) }))
    }

    /// Its bytes from the beginning, in a thread's hands.
    fn read(&self) -> std::io::Result<BufReader<Box<dyn Read + Send>>> {
        let input: Box<dyn Read + Send> = match (&self.path, self.size) {
            (None, _) => Box::new(std::io::stdin()),
            (Some(path), None) => Box::new(File::open(path)?),
            (Some(path), Some(size)) => Box::new(File::open(path)?.take(size)),
        };
        Ok(BufReader::with_capacity(BUFFER, input))
    }
}

#[cfg(test)]
mod tests;
