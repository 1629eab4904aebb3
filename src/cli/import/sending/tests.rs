//! What becomes of the lines of a batch that was answered, refused or lost.

use super::*;
use crate::cli::client::Fault;

fn failure(status: Option<u16>, errors: &[(usize, &str)]) -> Failure {
    let fault = |(index, field): &(usize, &str)| Fault {
        index: Some(*index),
        field: (*field).to_owned(),
        detail: "is wrong".to_owned(),
    };
    let errors = errors.iter().map(fault).collect();
    Failure { status, code: String::new(), errors, retry_after: None, sentence: "no".to_owned() }
}

fn lines(numbers: &[u64]) -> Numbered {
    numbers.iter().map(|number| (*number, json!({"recipient": number.to_string()}))).collect()
}

#[test]
fn the_lines_to_blame_are_taken_out_and_the_rest_is_sent() {
    let blamed = [(1, "content"), (2, "content"), (2, "tags")];
    let both = "content is wrong; tags is wrong";
    for (status, errors, numbers, bad, rest) in [
        (422, &blamed[..], vec![5, 6, 9, 10], vec![(6, "content is wrong"), (9, both)], vec![vec![5, 10]]),
        (422, &blamed[..1], vec![4, 5], vec![(5, "content is wrong")], vec![vec![4]]),
        // Nobody says which: halves find it.
        (422, &[], vec![5, 6, 7], vec![], vec![vec![6, 7], vec![5]]),
        (400, &[(99, "content")], vec![5, 6], vec![], vec![vec![6], vec![5]]),
        (413, &[], vec![5], vec![(5, "no")], vec![]),
    ] {
        let (found, pieces) = sort_out(failure(Some(status), errors), lines(&numbers)).unwrap();
        let found: Vec<_> = found.iter().map(|bad| (bad.line, bad.reason.as_str())).collect();
        let numbers = |piece: &Numbered| piece.iter().map(|line| line.0).collect::<Vec<u64>>();
        let pieces: Vec<_> = pieces.iter().map(numbers).collect();
        assert_eq!((found, pieces), (bad, rest), "{status} {errors:?}");
    }
    for status in [None, Some(401), Some(403), Some(404), Some(405), Some(503)] {
        assert!(sort_out(failure(status, &[]), lines(&[1, 2])).is_err(), "{status:?}");
    }
}

#[test]
fn what_was_there_is_counted_apart() {
    let mut settled = Settled::default();
    settled.note(&[4, 5], Taken { ids: vec![40, 50], existing: 1 });
    settled.note(&[1, 2], Taken { ids: vec![10, 20], existing: 2 });
    assert_eq!((settled.sent, settled.already_there, settled.first), (1, 3, Some((1, 10))));
}

#[test]
fn bad_lines_go_to_the_file_and_a_later_run_adds_to_it() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("bad.jsonl");
    let tell = |goes_on: bool, line: u64, forgets: bool| {
        let mut report = Report::open(path.to_str(), goes_on, 0, false).unwrap();
        if forgets {
            report.forget();
        }
        report.tell(&Bad { line, reason: "is \"wrong\"".to_owned() }).unwrap();
        report.flush().unwrap();
        let text = std::fs::read_to_string(&path).unwrap();
        text.lines().map(|line| serde_json::from_str(line).unwrap()).collect::<Vec<Value>>()
    };
    let bad = |line: u64| json!({"line": line, "reason": "is \"wrong\""});
    assert_eq!(tell(false, 1, false), [bad(1)]);
    assert_eq!(tell(true, 2, false), [bad(1), bad(2)]);
    assert_eq!(tell(true, 3, true), [bad(3)]);
    assert_eq!(tell(false, 4, false), [bad(4)]);
    assert!(
        Report::open(Some("/nowhere/bad"), false, 0, false).is_err_and(|error| error.0.contains("/nowhere"))
    );
}
