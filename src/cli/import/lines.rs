//! Reads messages: one a line of JSON, or one a record of CSV. What one line gets wrong is its own affair.

use std::io::{self, BufRead, Read};

use serde::Deserialize;
use serde_json::{Map, Value};

use super::hashed::{Hashed, Taken};
use super::records::{Record, Records};
use crate::api::SendMessage;

/// Bytes of a line or record: more than the largest message can take, written in the longest way.
const LINE_MAX: usize = 8 << 20;

/// The columns that a CSV file may have: the fields of a message.
const FIELDS: [&str; 11] = [
    "recipient",
    "content",
    "endpoint",
    "content_type",
    "headers",
    "ordering_key",
    "priority",
    "send_at",
    "expires_at",
    "idempotency_key",
    "tags",
];

/// How messages are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    /// A JSON object on each line.
    JsonLines,
    /// Records under a header.
    Csv,
}

impl Format {
    /// What a file's name says.
    pub(super) fn of_name(name: &str) -> Option<Format> {
        let ending = name.rsplit_once('.')?.1.to_ascii_lowercase();
        Format::of_word(&ending)
    }

    /// The format that a word names.
    pub(super) fn of_word(word: &str) -> Option<Format> {
        match word {
            "jsonl" | "ndjson" | "json" => Some(Format::JsonLines),
            "csv" => Some(Format::Csv),
            _ => None,
        }
    }
}

/// A message with the number of the line on which it begins, or what is wrong with it.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Line {
    pub(super) number: u64,
    pub(super) message: Result<Map<String, Value>, String>,
}

/// The lines of a source, those that are blank left out.
pub(super) struct Lines<R> {
    input: Hashed<R>,
    form: Form,
}

/// What reading in a format needs.
enum Form {
    JsonLines { number: u64, buffer: Vec<u8> },
    Csv { records: Records, header: Vec<String>, record: Record },
}

impl<R: BufRead> Lines<R> {
    /// Lines in this format. Reads the header, where there is one.
    ///
    /// # Errors
    /// A sentence on the header, or on why nothing can be read.
    pub(super) fn open(format: Format, input: R) -> Result<Lines<R>, String> {
        let mut input = Hashed::new(input);
        if format == Format::JsonLines {
            return Ok(Lines { input, form: Form::JsonLines { number: 0, buffer: Vec::new() } });
        }
        let (mut records, mut record) = (Records::new(LINE_MAX), Record::default());
        records.read(&mut input, &mut record)?;
        let header = header(&record)?;
        Ok(Lines { input, form: Form::Csv { records, header, record } })
    }

    /// Bytes of the source that the lines so far have taken.
    pub(super) fn bytes(&self) -> u64 {
        self.input.size()
    }

    /// Those bytes, ready to be digested.
    pub(super) fn taken(&self) -> Taken {
        self.input.taken()
    }

    /// The next line.
    ///
    /// # Errors
    /// A sentence on the line from which on nothing can be read.
    pub(super) fn next(&mut self) -> Result<Option<Line>, String> {
        match &mut self.form {
            Form::JsonLines { number, buffer } => loop {
                let read = read_line(&mut self.input, buffer);
                let (taken, whole) = read.map_err(|error| format!("after line {number}: {error}"))?;
                *number += 1;
                if taken == 0 {
                    return Ok(None);
                }
                let text = buffer.strip_prefix(b"\xef\xbb\xbf").filter(|_| *number == 1).unwrap_or(buffer);
                if text.trim_ascii().is_empty() {
                    continue;
                }
                let message = match whole {
                    true => message_of_json(text),
                    false => Err(format!("is longer than {} MiB", LINE_MAX >> 20)),
                };
                return Ok(Some(Line { number: *number, message }));
            },
            Form::Csv { records, header, record } => {
                if !records.read(&mut self.input, record)? {
                    return Ok(None);
                }
                Ok(Some(Line { number: record.line, message: message_of_csv(header, record) }))
            }
        }
    }
}

/// Reads to the end of the line, and keeps it when it is not too long: how many bytes it took, and whether
/// it is kept whole.
fn read_line(input: &mut impl BufRead, line: &mut Vec<u8>) -> io::Result<(u64, bool)> {
    line.clear();
    let most = LINE_MAX as u64 + 1;
    let mut taken = input.by_ref().take(most).read_until(b'\n', line)? as u64;
    let whole = taken < most || line.ends_with(b"\n");
    if !whole {
        taken += input.skip_until(b'\n')? as u64;
    }
    Ok((taken, whole))
}

fn message_of_json(line: &[u8]) -> Result<Map<String, Value>, String> {
    // The line is the only one: where in it says the column.
    let describe = |error: serde_json::Error| error.to_string().replace("line 1 column", "column");
    let value: Value =
        serde_json::from_slice(line).map_err(|error| format!("is no JSON: {}", describe(error)))?;
    // The API would refuse the whole batch for the shape of one.
    SendMessage::deserialize(&value).map_err(|error| format!("is no message: {}", describe(error)))?;
    match value {
        Value::Object(message) => Ok(message),
        _ => Err("is no message: it must be a JSON object".to_owned()),
    }
}

/// The names in a header, all of which must be fields.
fn header(record: &Record) -> Result<Vec<String>, String> {
    let names = record.fields().map(|name| String::from_utf8_lossy(name).trim().to_owned());
    let names: Vec<String> = names.collect();
    let fields = FIELDS.join(", ");
    for (place, name) in names.iter().enumerate() {
        if !FIELDS.contains(&name.as_str()) {
            let name = name.escape_debug();
            return Err(format!(
                "the header names `{name}`, which is no field of a message; there are {fields}"
            ));
        }
        if names[..place].contains(name) {
            return Err(format!("the header names `{name}` twice; name each column once"));
        }
    }
    match ["recipient", "content"].iter().find(|needed| !names.iter().any(|name| name == *needed)) {
        Some(lacking) => Err(format!("the header lacks `{lacking}`; the first line must name the columns")),
        None => Ok(names),
    }
}

fn message_of_csv(header: &[String], record: &Record) -> Result<Map<String, Value>, String> {
    if record.len() != header.len() {
        return Err(format!("has {} fields and the header {}", record.len(), header.len()));
    }
    let mut message = Map::new();
    for (name, bytes) in header.iter().zip(record.fields()) {
        let text = std::str::from_utf8(bytes).map_err(|_| format!("{name} is not UTF-8"))?;
        let value = match name.as_str() {
            "recipient" | "content" => Value::from(text),
            // An empty cell says nothing.
            _ if text.is_empty() => continue,
            "priority" => match text.trim().parse::<i16>() {
                Ok(number) => Value::from(number),
                Err(_) => return Err(format!("priority is `{}`, which is no number", text.escape_debug())),
            },
            "headers" | "tags" => {
                serde_json::from_str(text).map_err(|why| format!("{name} is no JSON: {why}"))?
            }
            _ => Value::from(text),
        };
        message.insert(name.clone(), value);
    }
    SendMessage::deserialize(&message).map_err(|error| format!("is no message: {error}"))?;
    Ok(message)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    type Read = (u64, Result<Value, String>);

    fn read(format: Format, text: &[u8]) -> Result<Vec<Read>, String> {
        let mut lines = Lines::open(format, text)?;
        let mut all = Vec::new();
        while let Some(line) = lines.next()? {
            all.push((line.number, line.message.map(Value::Object)));
        }
        assert_eq!(lines.bytes(), text.len() as u64);
        Ok(all)
    }

    #[test]
    fn a_files_name_says_its_format() {
        for (name, format) in [
            ("a.jsonl", Some(Format::JsonLines)),
            ("a.b.NDJSON", Some(Format::JsonLines)),
            ("a.json", Some(Format::JsonLines)),
            ("x/a.csv", Some(Format::Csv)),
            ("a.txt", None),
            ("csv", None),
            ("-", None),
        ] {
            assert_eq!(Format::of_name(name), format, "{name}");
        }
    }

    #[test]
    fn lines_of_json_are_messages_or_tell_what_is_wrong() {
        let good = json!({"recipient": "+90", "content": "Hello"});
        let tagged = json!({"recipient": "+90", "content": "ä\n", "tags": {"a": 1}, "priority": 5});
        let text = format!("\u{feff}{good}\r\n\n  \n{tagged}\nnothing\n[1]\n{{\"recipient\":\"+90\"}}\n");
        let text = format!("{text}{{\"recipient\":5,\"content\":\"\"}}\n{{\"to\":\"+90\"}}\n{good}");
        let lines = read(Format::JsonLines, text.as_bytes()).unwrap();
        let numbers: Vec<u64> = lines.iter().map(|line| line.0).collect();
        assert_eq!(numbers, [1, 4, 5, 6, 7, 8, 9, 10]);
        for (place, message) in [(0, &good), (1, &tagged), (7, &good)] {
            assert_eq!(lines[place].1.as_ref(), Ok(message));
        }
        for (place, why) in [
            (2, "is no JSON: expected ident at column 2"),
            (3, "is no message"),
            (4, "missing field `content`"),
            (5, "expected a string"),
            (6, "unknown field `to`"),
        ] {
            let error = lines[place].1.as_ref().unwrap_err();
            assert!(error.contains(why), "{why}: {error}");
        }
    }

    #[test]
    fn records_of_csv_are_messages_or_tell_what_is_wrong() {
        let text = "recipient,content,priority,tags,send_at\n+90,Hello,,,\n\"+91\",\"two\nlines, \"\"quoted\"\"\",-5,\"{\"\"a\"\":1}\",\
                    2030-01-01T09:00:00Z\n\n+92,x\n+93,x,high,,\n+94,x,1,{,\n+95,x,,,tomorrow\n+96,last,,,";
        for ends in ["\n", "\r\n", "\r"] {
            let text = text.replace('\n', ends);
            let lines = read(Format::Csv, text.as_bytes()).unwrap();
            let numbers: Vec<u64> = lines.iter().map(|line| line.0).collect();
            assert_eq!(numbers, [2, 3, 6, 7, 8, 9, 10], "{ends:?}");
            assert_eq!(lines[0].1, Ok(json!({"recipient": "+90", "content": "Hello"})));
            let content = format!("two{ends}lines, \"quoted\"");
            let whole = json!({"recipient": "+91", "content": content, "priority": -5, "tags": {"a": 1},
                "send_at": "2030-01-01T09:00:00Z"});
            assert_eq!(lines[1].1, Ok(whole));
            assert_eq!(lines[6].1, Ok(json!({"recipient": "+96", "content": "last"})));
            for (place, why) in [
                (2, "has 2 fields and the header 5"),
                (3, "priority is `high`"),
                (4, "tags is no JSON"),
                (5, "tomorrow"),
            ] {
                let error = lines[place].1.as_ref().unwrap_err();
                assert!(error.contains(why), "{why}: {error}");
            }
        }
    }

    #[test]
    fn a_header_must_name_fields() {
        for (header, why) in [
            ("", "lacks `recipient`"),
            ("recipient\n", "lacks `content`"),
            ("recipient,content,phone\n", "`phone`, which is no field"),
            ("recipient,content,content\n", "`content` twice"),
            ("+90,Hello\n", "`+90`, which is no field"),
        ] {
            let error = read(Format::Csv, header.as_bytes()).unwrap_err();
            assert!(error.contains(why), "{header}: {error}");
        }
        assert_eq!(read(Format::Csv, b"\xef\xbb\xbfrecipient , content\n").unwrap(), []);
    }

    #[test]
    fn what_is_not_text_is_told() {
        let lines = read(Format::JsonLines, b"{\"recipient\":\"\xff\",\"content\":\"\"}\n").unwrap();
        assert!(lines[0].1.as_ref().unwrap_err().contains("is no JSON"));
        let lines = read(Format::Csv, b"recipient,content\n+90,\xff\n").unwrap();
        assert_eq!(lines[0].1, Err("content is not UTF-8".to_owned()));
    }

    #[test]
    fn a_line_is_bounded_and_the_next_one_goes_on() {
        let long = format!("{{\"recipient\":\"{}\"}}", "x".repeat(LINE_MAX));
        let good = json!({"recipient": "+90", "content": "Hello"});
        let lines = read(Format::JsonLines, format!("{long}\n{good}\n").as_bytes()).unwrap();
        assert_eq!(lines[0], (1, Err("is longer than 8 MiB".to_owned())));
        assert_eq!(lines[1], (2, Ok(good)));
        let open = format!("recipient,content\n+90,\"{}", "x".repeat(2 * LINE_MAX));
        let error = read(Format::Csv, open.as_bytes()).unwrap_err();
        assert!(error.starts_with("line 2: the quote that opens there is not closed"), "{error}");
    }
}
