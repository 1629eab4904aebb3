//! A source that tells how much of it was taken, and a digest of that.

use std::io::{self, BufRead, Read};

use ring::digest::{Context, Digest, SHA256};

/// Counts and digests the bytes that are taken from a source, not those that only its buffer has.
pub(super) struct Hashed<R> {
    input: R,
    bytes: u64,
    context: Context,
}

impl<R: BufRead> Hashed<R> {
    pub(super) fn new(input: R) -> Hashed<R> {
        Hashed { input, bytes: 0, context: Context::new(&SHA256) }
    }

    /// How many bytes were taken.
    pub(super) fn size(&self) -> u64 {
        self.bytes
    }

    /// What was taken, ready to be digested: cheap enough for every line.
    pub(super) fn taken(&self) -> Taken {
        Taken(self.context.clone())
    }
}

impl<R: BufRead> Read for Hashed<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let read = self.fill_buf()?.read(buffer)?;
        self.consume(read);
        Ok(read)
    }
}

impl<R: BufRead> BufRead for Hashed<R> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        self.input.fill_buf()
    }

    fn consume(&mut self, amount: usize) {
        // What is consumed is in the buffer: nothing is read, and nothing can fail.
        if amount > 0
            && let Ok(buffer) = self.input.fill_buf()
        {
            self.context.update(&buffer[..amount.min(buffer.len())]);
        }
        self.bytes += amount as u64;
        self.input.consume(amount);
    }
}

/// A source up to some place.
#[derive(Clone)]
pub(super) struct Taken(Context);

impl Taken {
    pub(super) fn digest(self) -> String {
        hex(&self.0.finish())
    }
}

/// The first half of a digest in hexadecimal digits: 128 bits tell contents apart as well.
pub(super) fn hex(digest: &Digest) -> String {
    digest.as_ref().iter().take(16).map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_taken_is_counted_and_digested_and_what_is_only_buffered_is_not() {
        let mut source = Hashed::new(&b"a\nb\nrest"[..]);
        let mut line = Vec::new();
        source.read_until(b'\n', &mut line).unwrap();
        source.by_ref().take(2).read_to_end(&mut line).unwrap();
        assert_eq!((line.as_slice(), source.size()), (&b"a\nb\n"[..], 4));
        // The first half of `printf 'a\nb\n' | sha256sum`.
        assert_eq!(source.taken().digest(), "911169ddaaf146aff539f58c26c489af");
        assert_eq!(source.taken().digest(), "911169ddaaf146aff539f58c26c489af", "asking changes nothing");
    }
}
