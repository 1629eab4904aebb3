//! The report as people and machines read it.

use super::*;

#[test]
fn a_report_has_a_line_for_each_finding_and_an_end() {
    let findings = [ok("store", "fine"), warning("clock", "late\n\u{1b}[2J"), fault("API", "away")];
    let text = report(Paint::default(), &findings);
    let lines: Vec<_> = text.lines().collect();
    assert_eq!(
        lines,
        [
            "ok       store       fine",
            "warning  clock       late\\n\\u{1b}[2J",
            "fault    API         away",
            "1 fault, 1 warning",
        ]
    );
    let json = as_json(&findings);
    assert_eq!((&json["state"], &json["findings"][1]["about"]), (&json!("fault"), &json!("clock")));
    assert!(report(Paint::default(), &findings[..1]).ends_with("all is well\n"));
    assert_eq!(as_json(&findings[..1])["state"], "ok");
}

#[test]
fn the_place_of_a_store_is_looked_at_and_left_as_it_was() {
    let folder = tempfile::tempdir().unwrap();
    let state = |path: &Path| file(path).map(|finding| (finding.state, finding.says));
    let entries = || std::fs::read_dir(folder.path()).unwrap().count();
    let path = folder.path().join("some/where/ams.db");
    let (found, says) = state(&path).unwrap();
    assert!(found == State::Warning && says.contains("ams migrate"), "{says}");
    assert_eq!(entries(), 0);
    let path = folder.path().join("ams.db");
    std::fs::write(&path, "").unwrap();
    assert_eq!(state(&path), None);
    assert_eq!(entries(), 1);
    // A file where a folder should be.
    let (found, says) = state(&path.join("ams.db")).unwrap();
    assert!(found == State::Fault && says.contains("can't be written"), "{says}");
    let (found, _) = state(Path::new("/proc/nowhere/ams.db")).unwrap();
    assert_eq!(found, State::Fault);
    let (found, _) = state(folder.path()).unwrap();
    assert_eq!(found, State::Fault, "a folder is no store");
}

#[tokio::test(start_paused = true)]
async fn a_part_that_hangs_is_left_after_its_time() {
    let silent = std::future::pending::<Result<(), String>>();
    assert_eq!(in_time(silent).await, Err("no answer within 6s".to_owned()));
    assert_eq!(in_time(async { Err::<(), _>("away") }).await, Err("away".to_owned()));
}
