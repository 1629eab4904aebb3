//! What the thread gives: batches up to the end or up to what is broken, and keys that count from the first line.

use super::*;

fn source(text: &str) -> (tempfile::TempDir, Source) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("list.csv");
    std::fs::write(&path, text).unwrap();
    let source = Source::open(path.to_str().unwrap(), None).unwrap().unwrap();
    (folder, source)
}

/// The batches, and in a word how it ended.
fn read(text: &str, passed: &Passed) -> (Vec<Batch>, String) {
    let (_folder, source) = source(text);
    let (give, mut given) = mpsc::channel(16);
    read_all(&source, Format::Csv, passed, &give);
    let mut batches = Vec::new();
    loop {
        match given.try_recv().unwrap() {
            Given::Batch(batch) => batches.push(batch),
            Given::End => return (batches, "end".to_owned()),
            Given::Changed => return (batches, "changed".to_owned()),
            Given::Failed(why) => return (batches, why),
        }
    }
}

fn keys(batches: &[Batch]) -> Vec<String> {
    let good = batches.iter().flat_map(|batch| &batch.good);
    good.map(|(line, message)| format!("{line} {}", message["idempotency_key"].as_str().unwrap())).collect()
}

/// Every line three times, in more than two batches, with a bad one.
fn list() -> Vec<String> {
    let mut lines = vec!["recipient,content".to_owned()];
    lines.extend((0..2_400).map(|line| format!("+90,{}", line / 3)));
    lines[7] = "+90".to_owned();
    lines
}

#[test]
fn a_run_that_goes_on_gives_the_same_keys_from_its_place_on() {
    let text = list().join("\n");
    let (all, end) = read(&text, &Passed::default());
    assert_eq!((end.as_str(), all.len()), ("end", 3));
    let bounds: Vec<_> = all.iter().map(|batch| (batch.after, batch.to, batch.bad.len())).collect();
    assert_eq!(bounds, [(0, 1_001, 1), (1_001, 2_001, 0), (2_001, 2_401, 0)]);
    let passed = Passed { from: 1_001, settled: all[1].to, content: all[1].content.clone() };
    let (rest, end) = read(&text, &passed);
    assert_eq!((end.as_str(), rest.len()), ("end", 2));
    assert_eq!(keys(&rest), keys(&all[1..]));
    // Line 1,002 says what the line before it says, which is only passed.
    assert!(keys(&rest)[0].starts_with("1002 import:list.csv:") && keys(&rest)[0].ends_with(":2"));
    let unique: std::collections::BTreeSet<_> = keys(&all).into_iter().collect();
    assert_eq!(unique.len(), 2_399);
}

#[test]
fn what_has_changed_before_the_place_is_noticed_and_what_comes_after_it_is_not() {
    let lines = list();
    let all = read(&lines.join("\n"), &Passed::default()).0;
    let passed = Passed { from: 1_001, settled: all[1].to, content: all[1].content.clone() };
    let change = |line: usize, text: &str| {
        let mut lines = lines.clone();
        lines[line] = text.to_owned();
        read(&lines.join("\n"), &passed).1
    };
    for (line, text, end) in [
        (7, "+90,mended", "changed"),
        (1_999, "+90,other", "changed"),
        (2_000, "+90,\"two\nlines\"", "changed"),
        (1_500, "+90,\"open", "changed"),
        (2_001, "+90,other", "end"),
        (2_400, "+90,\"two\nlines\"", "end"),
    ] {
        assert_eq!(change(line, text), end, "{line}: {text}");
    }
    assert_eq!(read(&lines[..1_500].join("\n"), &passed).1, "changed");
}

#[test]
fn what_stands_before_broken_quotes_is_given() {
    let mut lines = list();
    lines[1_500] = format!("+90,\"{}", "x".repeat(3 << 20));
    let (batches, end) = read(&lines.join("\n"), &Passed::default());
    assert!(end.starts_with("line 1501: "), "{end}");
    let bounds: Vec<_> = batches.iter().map(|batch| (batch.after, batch.to)).collect();
    assert_eq!(bounds, [(0, 1_001), (1_001, 1_500)]);
    // Once the record is mended a run goes on from there.
    lines[1_500] = "+90,mended".to_owned();
    let last = &batches[1];
    let passed = Passed { from: last.after, settled: last.to, content: last.content.clone() };
    let (batches, end) = read(&lines.join("\n"), &passed);
    let bounds: Vec<_> = batches.iter().map(|batch| (batch.after, batch.to)).collect();
    assert_eq!((end.as_str(), bounds), ("end", vec![(1_001, 1_500), (1_500, 2_401)]));
}
