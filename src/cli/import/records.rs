//! Records of CSV, strictly as RFC 4180 has them.
//!
//! A parser that guesses what a misplaced quote means makes one record of many: somebody gets the texts
//! that were meant for others. Where such a record ends can't be known either, so nothing after it is read.

use std::io::BufRead;

/// What is said of every record with broken quotes: how to mend it.
const MEND: &str = "nothing from that record on was sent; close each quoted field, write a quote in it twice, \
                    and run it again";
const BOM: [u8; 3] = *b"\xef\xbb\xbf";

/// A record: its fields, one after the other, without their quotes.
#[derive(Debug, Default)]
pub(super) struct Record {
    /// The line on which it begins.
    pub(super) line: u64,
    bytes: Vec<u8>,
    ends: Vec<usize>,
}

impl Record {
    /// How many fields it has.
    pub(super) fn len(&self) -> usize {
        self.ends.len()
    }

    pub(super) fn fields(&self) -> impl Iterator<Item = &[u8]> {
        let begins = std::iter::once(0).chain(self.ends.iter().copied());
        begins.zip(&self.ends).map(|(begin, end)| self.bytes.get(begin..*end).unwrap_or_default())
    }

    fn end_field(&mut self) {
        self.ends.push(self.bytes.len());
    }
}

/// Where in a record the next byte stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Place {
    /// Nothing of the record was there yet.
    Before,
    /// At the beginning of a field.
    Field,
    /// In a field without quotes.
    Plain,
    /// Between the quotes that open and close a field.
    Quoted,
    /// After a quote in a quoted field: it closes the field, unless a second one follows.
    Closed,
}

/// Reads one record after the other.
#[derive(Debug)]
pub(super) struct Records {
    /// Bytes of a record: a quote that is never closed would take everything.
    max: usize,
    /// The line of the next byte.
    line: u64,
    after_cr: bool,
    /// Bytes of the byte order mark that may still come.
    mark: &'static [u8],
}

impl Records {
    /// Reads records of at most `max` bytes.
    pub(super) fn new(max: usize) -> Records {
        Records { max, line: 1, after_cr: false, mark: &BOM }
    }

    /// The next record that is not blank; `false`: there is none.
    ///
    /// # Errors
    /// One sentence that names the line: the source can't be read, a record is too long, or its quotes are not
    /// those of RFC 4180. Nothing can be read after that.
    pub(super) fn read(&mut self, input: &mut impl BufRead, record: &mut Record) -> Result<bool, String> {
        record.bytes.clear();
        record.ends.clear();
        let (mut place, mut opened) = (Place::Before, self.line);
        loop {
            let line = self.line;
            let buffer = input.fill_buf().map_err(|error| format!("line {line}: {error}"))?;
            if buffer.is_empty() {
                return self.end(place, opened, record);
            }
            let (mut taken, mut ended) = (0, false);
            for byte in buffer {
                taken += 1;
                if self.is_mark(*byte) {
                    continue;
                }
                let next = self.step(place, *byte, &mut opened, record)?;
                self.pass(*byte);
                ended = next == Place::Before && place != Place::Before;
                place = next;
                if ended {
                    break;
                }
            }
            input.consume(taken);
            if ended {
                return Ok(true);
            }
            if record.bytes.len() > self.max {
                return Err(self.too_long(place, opened, record));
            }
        }
    }

    /// Takes a byte: where the next one stands, [`Place::Before`] when the record has ended.
    fn step(&self, place: Place, byte: u8, opened: &mut u64, record: &mut Record) -> Result<Place, String> {
        if place == Place::Before {
            record.line = self.line;
        }
        Ok(match (place, byte) {
            (Place::Before, b'\n' | b'\r') => Place::Before,
            (Place::Before | Place::Field, b'"') => {
                *opened = self.line;
                Place::Quoted
            }
            (Place::Quoted, b'"') => Place::Closed,
            (Place::Closed, b'"') => {
                record.bytes.push(byte);
                Place::Quoted
            }
            (Place::Plain, b'"') => {
                let line = self.line;
                return Err(format!(
                    "line {line}: a quote stands in a field that does not begin with one; {MEND}"
                ));
            }
            (Place::Quoted, _) => {
                record.bytes.push(byte);
                Place::Quoted
            }
            (_, b',') => {
                record.end_field();
                Place::Field
            }
            (_, b'\n' | b'\r') => {
                record.end_field();
                Place::Before
            }
            (Place::Closed, _) => {
                let line = self.line;
                return Err(format!(
                    "line {opened}: after the field that is quoted from there on, more text follows in line {line}; {MEND}"
                ));
            }
            (Place::Before | Place::Field | Place::Plain, _) => {
                record.bytes.push(byte);
                Place::Plain
            }
        })
    }

    /// The source has ended.
    fn end(&self, place: Place, opened: u64, record: &mut Record) -> Result<bool, String> {
        match place {
            Place::Before => Ok(false),
            Place::Quoted => {
                Err(format!("line {opened}: the quote that opens there is never closed; {MEND}"))
            }
            Place::Field | Place::Plain | Place::Closed => {
                record.end_field();
                Ok(true)
            }
        }
    }

    fn too_long(&self, place: Place, opened: u64, record: &Record) -> String {
        let size = self.max >> 20;
        if place == Place::Quoted {
            format!("line {opened}: the quote that opens there is not closed within {size} MiB; {MEND}")
        } else {
            format!("line {}: the record is longer than {size} MiB; shorten it and run it again", record.line)
        }
    }

    /// Whether this is the next byte of a mark at the beginning.
    fn is_mark(&mut self, byte: u8) -> bool {
        match self.mark {
            [first, rest @ ..] if *first == byte => {
                self.mark = rest;
                true
            }
            _ => {
                self.mark = &[];
                false
            }
        }
    }

    fn pass(&mut self, byte: u8) {
        if byte == b'\r' || (byte == b'\n' && !self.after_cr) {
            self.line += 1;
        }
        self.after_cr = byte == b'\r';
    }
}

#[cfg(test)]
mod tests;
