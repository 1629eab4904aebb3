//! The import at work: a thread reads, some batches are under way at once, and what became of them is
//! noted in the order of their lines.

use std::cell::RefCell;
use std::fs::File;
use std::io::{IsTerminal, Write};
use std::path::Path;
use std::rc::Rc;
use std::sync::Arc;
use std::time::Duration;

use futures_util::StreamExt;
use futures_util::stream::FuturesOrdered;
use serde_json::{Value, json};
use tokio::sync::mpsc;

use super::super::client::Failure;
use super::super::operator::{self, Operator};
use super::super::screen::plain;
use super::Source;
use super::lines::Format;
use super::progress::{Counts, Progress, ProgressFile, shown};
use super::reading::{Bad, Batch, Given, Numbered, Passed, read_all};
use crate::app::{self, AppError};
use crate::clock::Stopwatch;
use crate::service::Backoff;

/// Batches under way at once. Their transactions follow one another; the next must only be there in time.
const UNDER_WAY: usize = 4;
/// How long the API may be away before the import gives up.
const PATIENCE: Duration = Duration::from_secs(600);
/// How often progress is noted.
const NOTED: Duration = Duration::from_millis(500);
/// How often who watches is told.
const TOLD: Duration = Duration::from_millis(200);
/// Bad lines that are told on standard error.
const BAD_TOLD: u64 = 100;
/// Characters of a reason that are told.
const REASON_MAX: usize = 500;

/// How a run ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum End {
    Done,
    /// Somebody has stopped it.
    Stopped,
    /// From some line on the source can't be read: why. What stands before it is sent.
    Broken(String),
    /// The progress of an earlier run says nothing of this one: why.
    Anew(&'static str),
}

const OTHER_STORE: &str = "the progress is of an import into another store";
const CHANGED: &str = "what an earlier run has read of the source has changed since";

/// What became of a batch.
#[derive(Debug, Default)]
struct Settled {
    after: u64,
    to: u64,
    bytes: u64,
    content: String,
    sent: u64,
    already_there: u64,
    bad: Vec<Bad>,
    /// Its first stored line, and the id of that message.
    first: Option<(u64, i64)>,
}

/// An import.
pub(super) struct Sending<'a> {
    operator: &'a Operator,
    post: Rc<Post<'a>>,
    source: Arc<Source>,
    format: Format,
    file: ProgressFile,
    progress: Progress,
    /// Lines that an earlier run has settled.
    earlier: u64,
    /// What the earlier run's last batch must answer.
    probe: Option<(u64, i64)>,
    report: Report,
    bytes: u64,
    begun: Option<f64>,
    watch: Stopwatch,
    noted: Duration,
    terminal: bool,
}

impl<'a> Sending<'a> {
    /// An import that goes on where an earlier run of it ended.
    ///
    /// # Errors
    /// When the progress of another program's or the file for bad lines is in the way.
    pub(super) fn new(
        operator: &'a Operator,
        source: Source,
        format: Format,
        file: ProgressFile,
        errors: Option<&str>,
    ) -> app::Result<Sending<'a>> {
        let progress = file.read(&source.name, operator.client.url())?;
        let terminal = std::io::stderr().is_terminal();
        let trouble = Trouble { backoff: Backoff::new("import"), since: None, answered: false };
        Ok(Sending {
            post: Rc::new(Post { operator, trouble: RefCell::new(trouble) }),
            report: Report::open(errors, progress.settled > 0, progress.counts.bad, terminal)?,
            earlier: progress.counts.lines(),
            probe: progress.probe,
            watch: operator.clock.stopwatch(),
            source: Arc::new(source),
            bytes: 0,
            begun: None,
            noted: Duration::ZERO,
            operator,
            format,
            file,
            progress,
            terminal,
        })
    }

    pub(super) fn name(&self) -> &str {
        &self.progress.name
    }

    pub(super) fn counts(&self) -> Counts {
        self.progress.counts
    }

    /// Lines that an earlier run has settled.
    pub(super) fn earlier(&self) -> u64 {
        self.earlier
    }

    /// Forgets what an earlier run has done, because of this.
    ///
    /// # Errors
    /// When the source can't be read again.
    pub(super) fn begin_anew(&mut self, why: &str) -> app::Result<&mut Sending<'a>> {
        if self.source.size.is_none() {
            return Err(AppError(format!("{why}; remove the progress file and begin again")));
        }
        eprintln!("{why}: beginning at the first line");
        let Progress { name, api, .. } = std::mem::take(&mut self.progress);
        self.progress = Progress { name, api, ..Progress::default() };
        (self.earlier, self.probe, self.begun) = (0, None, None);
        self.report.forget();
        Ok(self)
    }

    /// Sends everything, and leaves behind what a later run needs if it could not.
    ///
    /// # Errors
    /// When the API refuses to go on.
    pub(super) async fn run(&mut self) -> app::Result<End> {
        let end = self.send_all().await;
        self.report.clear();
        self.report.flush()?;
        match end {
            Ok(End::Done) => self.file.remove(),
            Ok(End::Stopped | End::Broken(_)) | Err(_) if self.progress.settled > 0 => {
                self.file.write(&self.progress);
            }
            Ok(_) | Err(_) => {}
        }
        end
    }

    async fn send_all(&mut self) -> app::Result<End> {
        let (give, mut given) = mpsc::channel(UNDER_WAY);
        let (source, format) = (Arc::clone(&self.source), self.format);
        let Progress { from, settled, content, .. } = self.progress.clone();
        let passed = Passed { from, settled, content };
        let reading = std::thread::Builder::new().name("import-reader".to_owned());
        let started = reading.spawn(move || read_all(&source, format, &passed, &give));
        started.map_err(|error| AppError(format!("the system gives us no thread: {error}")))?;
        let stop = self.operator.stop.clone();
        let mut under_way = FuturesOrdered::new();
        let mut tick = tokio::time::interval(TOLD);
        let mut ended = None;
        while ended.is_none() || !under_way.is_empty() {
            // The first batch of a later run tells whether its progress is worth anything.
            let most = if self.probe.is_some() { 1 } else { UNDER_WAY };
            tokio::select! {
                () = stop.cancelled() => return Ok(End::Stopped),
                next = given.recv(), if ended.is_none() && under_way.len() < most => match next {
                    Some(Given::Batch(batch)) => {
                        let post = Rc::clone(&self.post);
                        under_way.push_back(async move { post.send(batch).await });
                    }
                    Some(Given::End) => ended = Some(End::Done),
                    Some(Given::Changed) => return Ok(End::Anew(CHANGED)),
                    Some(Given::Failed(why)) => ended = Some(self.broken(&why)),
                    None => ended = Some(self.broken("the reading thread has failed")),
                },
                Some(settled) = under_way.next() => {
                    if !self.settle(settled?)? {
                        return Ok(End::Anew(OTHER_STORE));
                    }
                }
                _ = tick.tick() => self.tell(),
            }
        }
        Ok(ended.unwrap_or(End::Done))
    }

    fn broken(&self, why: &str) -> End {
        let from = self.source.path.as_deref().unwrap_or(Path::new("standard input"));
        End::Broken(format!("{}: {why}", from.display()))
    }

    /// Notes what became of a batch; `false`: the store is not the one that the progress speaks of.
    fn settle(&mut self, settled: Settled) -> app::Result<bool> {
        if self.probe.take().is_some_and(|probe| settled.first != Some(probe)) {
            return Ok(false);
        }
        let progress = &mut self.progress;
        self.bytes = settled.bytes;
        // What an earlier run has settled is counted and told already.
        if settled.to > progress.settled {
            (progress.settled, progress.content) = (settled.to, settled.content);
            progress.counts.sent += settled.sent;
            progress.counts.already_there += settled.already_there;
            progress.counts.bad += settled.bad.len() as u64;
            for bad in &settled.bad {
                self.report.tell(bad)?;
            }
        }
        if settled.first.is_some() {
            (progress.from, progress.probe) = (settled.after, settled.first);
        }
        let now = self.watch.elapsed();
        if now.saturating_sub(self.noted) >= NOTED {
            self.noted = now;
            self.report.flush()?;
            self.file.write(&self.progress);
        }
        Ok(true)
    }

    /// Shows a person how far it is.
    #[expect(clippy::cast_precision_loss, reason = "a share for people")]
    fn tell(&mut self) {
        if !self.terminal || self.bytes == 0 {
            return;
        }
        let share = self.source.size.map(|size| self.bytes as f64 / size.max(1) as f64);
        let begun = *self.begun.get_or_insert(if self.earlier == 0 { 0.0 } else { share.unwrap_or(0.0) });
        let lines = self.progress.counts.lines();
        let elapsed = self.watch.elapsed();
        let rate = (lines - self.earlier) as f64 / elapsed.as_secs_f64().max(0.001);
        eprint!("\r{}\x1b[K", shown(lines, rate, share, begun, elapsed));
    }
}

/// The way to the API.
struct Post<'a> {
    operator: &'a Operator,
    trouble: RefCell<Trouble>,
}

/// Calls that come to nothing, over all batches under way.
struct Trouble {
    backoff: Backoff,
    since: Option<Stopwatch>,
    /// Whether the API has ever answered.
    answered: bool,
}

impl Post<'_> {
    /// Sends a batch until each line of it is stored or known to be bad.
    async fn send(&self, batch: Batch) -> app::Result<Settled> {
        let Batch { after, to, bytes, content, good, bad } = batch;
        let mut settled = Settled { after, to, bytes, content, bad, ..Settled::default() };
        let mut pieces = vec![good];
        while let Some(piece) = pieces.pop() {
            if piece.is_empty() {
                continue;
            }
            let (numbers, messages): (Vec<u64>, Vec<Value>) = piece.into_iter().unzip();
            let mut body = json!({ "messages": messages });
            match self.post(&body).await {
                Ok(answer) => settled.note(&numbers, operator::read(&answer)?),
                Err(failure) => {
                    let Value::Array(messages) = body["messages"].take() else { continue };
                    let (mut bad, rest) = sort_out(failure, numbers.into_iter().zip(messages).collect())?;
                    settled.bad.append(&mut bad);
                    pieces.extend(rest);
                }
            }
        }
        settled.bad.sort_by_key(|bad| bad.line);
        Ok(settled)
    }

    /// One call, again and again while the API is away or busy.
    async fn post(&self, body: &Value) -> Result<Value, Failure> {
        loop {
            let failure = match self.operator.client.post("/v1/messages/batch", body).await {
                Ok(answer) => {
                    self.answered();
                    return Ok(answer);
                }
                Err(failure) => failure,
            };
            if !failure.passes() {
                self.answered();
                return Err(failure);
            }
            match self.wait(&failure) {
                Some(wait) => tokio::time::sleep(wait).await,
                None => return Err(failure),
            }
        }
    }

    fn answered(&self) {
        let mut trouble = self.trouble.borrow_mut();
        trouble.backoff.succeeded();
        (trouble.since, trouble.answered) = (None, true);
    }

    /// How long to wait after a failure that may pass; `None` when it has lasted too long, or nobody has
    /// been there from the start.
    fn wait(&self, failure: &Failure) -> Option<Duration> {
        let mut trouble = self.trouble.borrow_mut();
        if failure.status.is_none() && !trouble.answered {
            return None;
        }
        let lasted = trouble.since.get_or_insert_with(|| self.operator.clock.stopwatch()).elapsed();
        if std::io::stderr().is_terminal() {
            // What is told next begins on the line of progress.
            eprint!("\r\x1b[K");
        }
        let wait = trouble.backoff.failed(failure).max(failure.retry_after.unwrap_or_default());
        (lasted < PATIENCE).then_some(wait)
    }
}

/// What the API says of a batch that it took.
#[derive(Debug, serde::Deserialize)]
struct Taken {
    ids: Vec<i64>,
    /// An older API does not tell.
    #[serde(default)]
    existing: u64,
}

impl Settled {
    fn note(&mut self, numbers: &[u64], taken: Taken) {
        let count = numbers.len() as u64;
        let existing = taken.existing.min(count);
        self.already_there += existing;
        self.sent += count - existing;
        let first = numbers.first().copied().zip(taken.ids.first().copied());
        self.first = [self.first, first].into_iter().flatten().min();
    }
}

/// Lines of a refused batch: those that are to blame, and what to send again without them.
///
/// # Errors
/// When no line is to blame.
fn sort_out(failure: Failure, lines: Numbered) -> app::Result<(Vec<Bad>, Vec<Numbered>)> {
    // Not the lines, but the way there: no key, another API, nobody at home.
    if failure.passes() || matches!(failure.status, Some(401 | 403 | 404 | 405)) {
        return Err(failure.into());
    }
    let mut reasons = vec![String::new(); lines.len()];
    for fault in &failure.errors {
        if let Some(reason) = fault.index.and_then(|index| reasons.get_mut(index)) {
            let gap = if reason.is_empty() { "" } else { "; " };
            *reason += &format!("{gap}{} {}", fault.field, fault.detail);
        }
    }
    if reasons.iter().all(String::is_empty) {
        if let [(line, _)] = lines[..] {
            return Ok((vec![Bad { line, reason: failure.sentence }], Vec::new()));
        }
        let mut first = lines;
        let second = first.split_off(first.len() / 2);
        return Ok((Vec::new(), vec![second, first]));
    }
    let (mut bad, mut rest) = (Vec::new(), Vec::new());
    for ((line, message), reason) in lines.into_iter().zip(reasons) {
        if reason.is_empty() {
            rest.push((line, message));
        } else {
            bad.push(Bad { line, reason });
        }
    }
    Ok((bad, vec![rest]))
}

/// Tells bad lines.
struct Report {
    errors: Option<std::io::BufWriter<File>>,
    told: u64,
    terminal: bool,
}

impl Report {
    /// Bad lines go to standard error, and to that file; a run that goes on adds to it.
    fn open(errors: Option<&str>, goes_on: bool, told: u64, terminal: bool) -> app::Result<Report> {
        let open = |path: &str| {
            let mut options = File::options();
            options.create(true).write(true).append(goes_on).truncate(!goes_on);
            let wrong = |error| AppError(format!("{path} can't be written: {error}; name another file"));
            options.open(path).map(std::io::BufWriter::new).map_err(wrong)
        };
        Ok(Report { errors: errors.map(open).transpose()?, told, terminal })
    }

    fn tell(&mut self, bad: &Bad) -> app::Result<()> {
        self.told += 1;
        if self.told <= BAD_TOLD {
            self.clear();
            eprintln!("line {}: {}", bad.line, plain(&bad.reason, REASON_MAX));
        } else if self.told == BAD_TOLD + 1 {
            self.clear();
            eprintln!("further bad lines are only counted here; --errors FILE has all");
        }
        match &mut self.errors {
            Some(file) => {
                let line = json!({ "line": bad.line, "reason": bad.reason });
                writeln!(file, "{line}").map_err(|error| Report::wrong(&error))
            }
            None => Ok(()),
        }
    }

    fn flush(&mut self) -> app::Result<()> {
        let flushed = self.errors.as_mut().map_or(Ok(()), Write::flush);
        flushed.map_err(|error| Report::wrong(&error))
    }

    fn wrong(error: &std::io::Error) -> AppError {
        AppError(format!("the file of --errors can't be written: {error}; mend that and run it again"))
    }

    /// Begins with nothing told.
    fn forget(&mut self) {
        self.told = 0;
        if let Some(file) = &mut self.errors
            && let Err(error) = file.get_ref().set_len(0)
        {
            tracing::warn!("the file of --errors keeps lines of another import: {error}");
        }
    }

    /// Takes the line of progress away.
    fn clear(&self) {
        if self.terminal {
            eprint!("\r\x1b[K");
        }
    }
}

#[cfg(test)]
mod tests;
