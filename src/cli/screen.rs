//! What people and programs see: colours only where a terminal shows them, and nothing that could bend it.

use std::io::IsTerminal;
use std::time::Duration;

use serde_json::Value;

use super::print;
use crate::app;

/// Where a verb writes.
#[derive(Clone, Copy, Debug)]
pub(super) struct Screen {
    /// Programs read it.
    pub(super) json: bool,
    pub(super) paint: Paint,
    /// A person looks at standard output.
    pub(super) terminal: bool,
}

impl Screen {
    /// Standard output; in colour when that is wanted and a terminal shows it.
    pub(super) fn new(colour: bool, json: bool) -> Screen {
        let terminal = std::io::stdout().is_terminal();
        Screen { json, paint: Paint { on: colour && terminal }, terminal }
    }

    /// Writes `text` for people; or `answer` for programs.
    ///
    /// # Errors
    /// When the output can't be written.
    pub(super) fn show(&self, answer: &Value, text: impl FnOnce() -> String) -> app::Result<()> {
        print(&if self.json { format!("{answer:#}\n") } else { text() })
    }
}

impl Screen {
    /// Writes over the line of progress, if a person looks; an empty `words` takes it away.
    pub(super) fn progress(&self, words: &str) {
        if std::io::stderr().is_terminal() {
            eprint!("\r\x1b[K{words}");
        }
    }
}

/// Colours, or none.
#[derive(Clone, Copy, Debug, Default)]
pub(super) struct Paint {
    pub(super) on: bool,
}

/// What a colour means here.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Tone {
    Good,
    Wait,
    Bad,
    Faint,
    Strong,
}

impl Paint {
    /// `text` in the colour of `tone`.
    pub(super) fn tone(self, tone: Tone, text: &str) -> String {
        let code = match tone {
            Tone::Good => "32",
            Tone::Wait => "33",
            Tone::Bad => "31",
            Tone::Faint => "2",
            Tone::Strong => "1",
        };
        if self.on && !text.is_empty() { format!("\x1b[{code}m{text}\x1b[0m") } else { text.to_owned() }
    }

    /// A message's status in its colour, at least `width` wide.
    pub(super) fn status(self, status: &str, width: usize) -> String {
        let wide = format!("{status:<width$}");
        status_tone(status).map_or(wide.clone(), |tone| self.tone(tone, &wide))
    }
}

/// The colour of a message's status.
pub(super) fn status_tone(status: &str) -> Option<Tone> {
    match status {
        "sent" => Some(Tone::Good),
        "dead" | "expired" => Some(Tone::Bad),
        "retrying" => Some(Tone::Wait),
        "cancelled" => Some(Tone::Faint),
        _ => None,
    }
}

/// Text from outside, on one line and at most `most` characters long: what would move the cursor or
/// change colours is written as an escape.
pub(super) fn plain(text: &str, most: usize) -> String {
    let mut plain = String::new();
    for (count, character) in text.chars().enumerate() {
        if count >= most {
            plain.push('…');
            break;
        }
        match character {
            c if c.is_control() || is_bending(c) => plain.extend(c.escape_default()),
            c => plain.push(c),
        }
    }
    plain
}

/// Characters that turn the direction of what follows.
fn is_bending(character: char) -> bool {
    matches!(character, '\u{200e}' | '\u{200f}' | '\u{202a}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
}

/// A time that passed, as a person says it: `0.4 ms`, `12.3 s`, `4 min`, `3 h`, `12 d`.
pub(super) fn time(time: Duration) -> String {
    let seconds = time.as_secs_f64();
    match time.as_secs() {
        0 if time < Duration::from_millis(1) => format!("{:.1} ms", seconds * 1000.0),
        0 => format!("{:.0} ms", seconds * 1000.0),
        1..60 => format!("{seconds:.1} s"),
        s @ 60..3600 => format!("{} min", s / 60),
        s @ 3600..86_400 => format!("{} h", s / 3600),
        s => format!("{} d", s / 86_400),
    }
}

/// One thing or many: `1 message`, `3 messages`.
pub(super) fn many(count: u64, thing: &str) -> String {
    format!("{} {thing}{}", grouped(count), if count == 1 { "" } else { "s" })
}

/// A number with its thousands apart.
pub(super) fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::with_capacity(digits.len() + digits.len() / 3);
    for (place, digit) in digits.chars().enumerate() {
        if place > 0 && (digits.len() - place).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

/// Columns under their heads, as wide as they need to be; a head that begins with `>` stands to the right.
/// `tone` colours a row's column after it has its width.
pub(super) fn table(
    paint: Paint,
    heads: &[&str],
    rows: &[Vec<String>],
    tone: impl Fn(usize, &str) -> Option<Tone>,
) -> String {
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column)).map(|cell| cell.chars().count());
        cells.chain([heads[column].trim_start_matches('>').chars().count()]).max().unwrap_or(0)
    };
    let widths: Vec<usize> = (0..heads.len()).map(width).collect();
    let place = |column: usize, cell: &str| {
        let width = widths[column];
        match heads[column].starts_with('>') {
            true => format!("{cell:>width$}"),
            false if column + 1 == heads.len() => cell.to_owned(),
            false => format!("{cell:<width$}"),
        }
    };
    let line = |cells: Vec<String>| format!("{}\n", cells.join("  ").trim_end());
    let head = heads.iter().enumerate().map(|(i, head)| place(i, head.trim_start_matches('>')));
    let mut text = line(head.map(|cell| paint.tone(Tone::Faint, &cell)).collect());
    for row in rows {
        let cell = |(column, cell): (usize, &String)| {
            let placed = place(column, cell);
            tone(column, cell).map_or(placed.clone(), |tone| paint.tone(tone, &placed))
        };
        text += &line(row.iter().enumerate().map(cell).collect());
    }
    text
}
