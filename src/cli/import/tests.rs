//! Names of files, their bad lines, and what an import says at its end.

use super::*;
use std::io::Write;

#[test]
fn the_same_content_has_the_same_name() {
    let file = |text: &str| {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        file.write_all(text.as_bytes()).unwrap();
        file
    };
    let (one, same, other) = (file("a\nb\n"), file("a\nb\n"), file("a\nb"));
    let name =
        |file: &tempfile::NamedTempFile| Source::open(file.path().to_str().unwrap(), None).unwrap().unwrap();
    assert_eq!(name(&one).name, name(&same).name);
    assert_ne!(name(&one).name, name(&other).name);
    // The first half of `printf 'a\nb\n' | sha256sum`.
    assert_eq!(name(&one).name, "911169ddaaf146aff539f58c26c489af");
    assert_eq!((name(&one).size, name(&other).size), (Some(4), Some(3)));
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
fn the_summary_adds_up() {
    let second = std::time::Duration::from_secs(2);
    let counts = Counts { sent: 1_500, already_there: 499, bad: 1 };
    let text = summary(true, counts, 0, second, 1_000.4);
    assert_eq!(text, "2,000 lines: 1,500 sent, 499 already there, 1 bad\n2.0 s, 1,000 lines a second\n");
    let text = summary(false, counts, 1_200, second, 400.0);
    assert!(text.starts_with("stopped; ") && text.contains("1,200 of them by an earlier run"), "{text}");
}
