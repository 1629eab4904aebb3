//! Names of files, their bad lines, and what an import says at its end.

use super::*;
use std::io::Write;

#[test]
fn a_files_name_is_the_imports_name_in_whatever_folder_it_is() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("list.csv");
    std::fs::write(&path, "a\nb\n").unwrap();
    let open = |name| Source::open(path.to_str().unwrap(), name).unwrap().unwrap();
    assert_eq!((open(None).name.as_str(), open(None).size), ("list.csv", Some(4)));
    assert_eq!(open(Some("spring")).name, "spring");
}

#[test]
fn what_is_appended_meanwhile_is_not_read() {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(b"one\n").unwrap();
    let source = Source::open(file.path().to_str().unwrap(), None).unwrap().unwrap();
    file.write_all(b"two\n").unwrap();
    let mut text = String::new();
    source.read().unwrap().read_to_string(&mut text).unwrap();
    assert_eq!(text, "one\n");
}

#[test]
fn a_pipe_needs_a_name_and_a_folder_is_no_source() {
    assert!(Source::open("-", None).unwrap().is_none());
    let source = Source::open("-", Some("list")).unwrap().unwrap();
    assert_eq!((source.name.as_str(), source.size), ("list", None));
    for path in ["/nowhere/list.csv", "/tmp"] {
        let error = Source::open(path, None).map(|_| ()).unwrap_err();
        assert!(error.0.contains(path) && error.0.contains("name another"), "{error}");
    }
}

#[test]
fn the_summary_adds_up_and_tells_of_what_was_there() {
    let second = Duration::from_secs(2);
    let counts = Counts { sent: 1_500, already_there: 499, bad: 1 };
    let text = summary("list.csv", true, counts, 0, second, 1_000.4);
    let there = "already there: an earlier import of the name list.csv sent them; to send them again use another --name";
    assert_eq!(
        text,
        format!("2,000 lines: 1,500 sent, 499 already there, 1 bad\n{there}\n2.0 s, 1,000 lines a second\n")
    );
    let text = summary("list.csv", false, counts, 1_200, second, 400.0);
    assert!(text.starts_with("stopped; ") && text.contains("1,200 of them by an earlier run"), "{text}");
    let text = summary("list.csv", true, Counts { already_there: 0, ..counts }, 0, second, 400.0);
    assert!(!text.contains("--name"), "{text}");
}
