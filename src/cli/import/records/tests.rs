//! What is a record, what is none, and that nothing is read beyond broken quotes.

use std::io::BufReader;

use proptest::prelude::*;

use super::*;

type Read = Vec<(u64, Vec<String>)>;

/// All records with their lines, up to what is wrong. The source gives `at_once` bytes at a time.
fn read(text: &[u8], at_once: usize) -> (Read, Option<String>) {
    let mut input = BufReader::with_capacity(at_once, text);
    let (mut records, mut record, mut all) = (Records::new(1 << 20), Record::default(), Vec::new());
    loop {
        match records.read(&mut input, &mut record) {
            Ok(true) => {
                let fields: Vec<_> =
                    record.fields().map(|field| String::from_utf8(field.to_vec()).unwrap()).collect();
                assert_eq!(fields.len(), record.len());
                all.push((record.line, fields));
            }
            Ok(false) => return (all, None),
            Err(why) => return (all, Some(why)),
        }
    }
}

#[test]
fn records_and_their_lines_are_told() {
    for (text, expected) in [
        ("", vec![]),
        ("\n\r\n\r", vec![]),
        ("a,b\nc,d", vec![(1, vec!["a", "b"]), (2, vec!["c", "d"])]),
        ("a,b\r\n\r\n\nc\r", vec![(1, vec!["a", "b"]), (4, vec!["c"])]),
        ("\r\ra\r\"b\r\nc\"\rd", vec![(3, vec!["a"]), (4, vec!["b\r\nc"]), (6, vec!["d"])]),
        ("\"a\"\"b\",\"\",\n\"\"\"\"", vec![(1, vec!["a\"b", "", ""]), (2, vec!["\""])]),
        (",\n \n\"\"\n", vec![(1, vec!["", ""]), (2, vec![" "]), (3, vec![""])]),
        ("\u{feff}\"a\",b\n\u{feff}c", vec![(1, vec!["a", "b"]), (2, vec!["\u{feff}c"])]),
        ("\"1\n2\",\"3\n4\"\nb", vec![(1, vec!["1\n2", "3\n4"]), (4, vec!["b"])]),
    ] {
        for at_once in [1, 2, 3, 1_000] {
            let (records, wrong) = read(text.as_bytes(), at_once);
            let expected: Read = expected
                .iter()
                .map(|(line, fields)| (*line, fields.iter().map(|field| (*field).to_owned()).collect()))
                .collect();
            assert_eq!((records, wrong), (expected, None), "{text:?}");
        }
    }
}

#[test]
fn broken_quotes_are_named_by_their_line_and_end_the_reading() {
    for (text, records, begins) in [
        ("a\nb,\"c\nd", 1, "line 2: the quote that opens there is never closed"),
        ("\"a\r\nb\",\"c", 0, "line 2: the quote that opens there is never closed"),
        (
            "a\n\"b\nc\nd,\"e\"\n",
            1,
            "line 2: after the field that is quoted from there on, more text follows in line 4",
        ),
        ("\"a\"b\nc\n", 0, "line 1: after the field"),
        ("\"a\" ,b\nc\n", 0, "line 1: after the field"),
        ("a,b\"c\nd\n", 0, "line 1: a quote stands in a field"),
        ("a\n \"b\"\n", 1, "line 2: a quote stands in a field"),
    ] {
        let (read, wrong) = read(text.as_bytes(), 4);
        let wrong = wrong.unwrap_or_else(|| panic!("{text:?} was read: {read:?}"));
        assert_eq!(read.len(), records, "{text:?}");
        assert!(wrong.starts_with(begins) && wrong.contains("nothing from that record on"), "{wrong}");
    }
}

#[test]
fn a_record_has_a_bound() {
    for (begin, why) in [
        ("a\n\"", "line 2: the quote that opens there is not closed within 1 MiB"),
        ("a\nb", "line 2: the record is longer than 1 MiB"),
    ] {
        let text = format!("{begin}{}", "x".repeat(2 << 20));
        let (records, wrong) = read(text.as_bytes(), 1 << 16);
        assert_eq!(records.len(), 1);
        assert!(wrong.unwrap().starts_with(why));
    }
}

proptest! {
    /// What is written as RFC 4180 has it is read as it was.
    #[test]
    fn what_is_written_is_read(
        rows in prop::collection::vec(prop::collection::vec("[a,\"\r\n ]{0,6}", 1..4), 0..6),
        at_once in 1_usize..9,
    ) {
        let quoted = |field: &String| format!("\"{}\"", field.replace('"', "\"\""));
        let text: String = rows.iter().map(|row| row.iter().map(quoted).collect::<Vec<_>>().join(",") + "\n").collect();
        let (records, wrong) = read(text.as_bytes(), at_once);
        prop_assert_eq!(wrong, None);
        prop_assert_eq!(records.into_iter().map(|record| record.1).collect::<Vec<_>>(), rows);
    }

    /// Quotes too many never join records.
    #[test]
    fn misplaced_quotes_join_no_records(
        rows in prop::collection::vec("[a-c]{1,4}", 1..8),
        place in any::<prop::sample::Index>(),
        quotes in "\"{1,3}",
    ) {
        let whole: String = rows.iter().map(|row| format!("\"{row}\",x\n")).collect();
        let mut broken = whole.clone();
        broken.insert_str(place.index(whole.len()), &quotes);
        for (line, fields) in read(broken.as_bytes(), 5).0 {
            prop_assert!(fields.iter().all(|field| !field.contains('\n')), "line {}: {:?}", line, fields);
        }
    }
}
