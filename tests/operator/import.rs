//! `ams import` against a real API: whose messages are sent, and how often.

use std::collections::BTreeSet;

use super::{Said, System};

impl System {
    fn write(&self, file: &str, text: &str) {
        std::fs::write(self.folder.path().join(file), text).unwrap();
    }

    /// Everything that was ever sent: recipient and content.
    fn messages(&self) -> BTreeSet<(String, String)> {
        let listed = self.say(&["messages", "list", "--limit", "100", "--json"]).json();
        let text = |message: &serde_json::Value, name: &str| message[name].as_str().unwrap().to_owned();
        let messages = listed["data"].as_array().unwrap().iter();
        messages.map(|message| (text(message, "recipient"), text(message, "content"))).collect()
    }

    /// How often the recipient was sent something.
    fn sent_to(&self, recipient: &str) -> usize {
        let listed = self.say(&["messages", "list", "--recipient", recipient, "--json"]).json();
        listed["data"].as_array().unwrap().len()
    }
}

fn counts(said: &Said) -> [u64; 3] {
    let json = said.json();
    ["sent", "already_there", "bad"].map(|name| json[name].as_u64().unwrap())
}

#[test]
fn a_record_with_broken_quotes_stops_the_import_before_it() {
    let system = System::start();
    // The records after the header, the line that is named, and which records are sent.
    let cases = [
        // Never closed: the rest of the file would be the text of one message.
        ("+A1,\"a\n+A2,b\n+A3,c\n", 2, ""),
        ("+A1,a\n+A2,\"b\n+A3,c\n", 3, "+A1"),
        ("+A1,a\n+A2,\"two\nlines\"\n+A3,\"c", 5, "+A1 +A2"),
        // Closed by the quote that opens a later field.
        ("+A1,a\n+A2,\"b\n+A3,c\n+A4,\"d\"\n+A5,e\n", 3, "+A1"),
        ("+A1,\"a\r\n+A2,\"b\"\r\n", 2, ""),
        // Text after the quote that closes; a quote inside a field that does not begin with one.
        ("+A1,\"a\"b\n+A2,c\n", 2, ""),
        ("+A1,\"a\" \n+A2,c\n", 2, ""),
        ("+A1,a\n+A2,5\" pipe\n+A3,c\n", 3, "+A1"),
        ("+A1,a\n+A2, \"b\"\n+A3,c\n", 3, "+A1"),
    ];
    for (place, (records, line, sent)) in cases.into_iter().enumerate() {
        let mark = format!("+{place}-");
        let (file, records) = (format!("broken-{place}.csv"), records.replace("+A", &mark));
        system.write(&file, &format!("recipient,content\n{records}"));
        let said = system.say(&["import", &file]);
        assert_eq!(said.code, 1, "{records:?}: {}{}", said.out, said.err);
        assert!(said.err.contains(&format!("{file}: line {line}: ")), "{records:?}: {}", said.err);
        let expected: BTreeSet<String> =
            sent.split_whitespace().map(|one| one.replace("+A", &mark)).collect();
        let messages = system.messages();
        let ours = messages.iter().filter(|(recipient, _)| recipient.starts_with(&mark));
        let ours: BTreeSet<String> = ours.map(|(recipient, _)| recipient.clone()).collect();
        assert_eq!(ours, expected, "{records:?}: {}{}", said.out, said.err);
    }
    // A quoted text of several lines, closed as it should be, stays one message.
    system.write("whole.csv", "content,recipient\n\"a\n+902,b\n\"\"c\"\"\",+901\n");
    assert_eq!(system.say(&["import", "whole.csv"]).code, 0);
    assert!(system.messages().contains(&("+901".to_owned(), "a\n+902,b\n\"c\"".to_owned())));
}

#[test]
fn a_mended_file_sends_only_what_is_new_in_it() {
    let system = System::start();
    let import = |file: &str, text: &str, more: &[&str]| {
        system.write(file, text);
        system.say(&[&["import", file], more, &["--json"]].concat())
    };
    let broken = import("people.csv", "recipient,content,priority\n+81,a,\n+82,b,high\n+83,c,5\n", &[]);
    assert_eq!((broken.code, counts(&broken)), (1, [2, 0, 1]), "{}", broken.err);
    let mended = "recipient,content,priority\n+81,a,\n+82,b,1\n+83,c,5\n";
    system.write("people.csv", mended);
    let again = system.say(&["import", "people.csv"]);
    assert_eq!(again.code, 0, "{}", again.err);
    assert!(again.out.contains("3 lines: 1 sent, 2 already there, 0 bad"), "{}", again.out);
    for words in ["an earlier import of the name people.csv", "another --name"] {
        assert!(again.out.contains(words), "{}", again.out);
    }
    // Neither the folder, nor the order of lines and columns, nor the way of writing makes another message.
    std::fs::create_dir(system.folder.path().join("mended")).unwrap();
    let moved = "priority,content,recipient\r\n\r\n5,\"c\",+83\r\n,a,+81\r\n1,b,+82\r\n,d,+84\r\n";
    assert_eq!(counts(&import("mended/people.csv", moved, &[])), [1, 3, 0]);
    let lines = "{ \"content\": \"\\u0061\", \"tags\": null, \"recipient\": \"+81\" }\n\
                 {\"priority\":5,\"recipient\":\"+83\",\"content\":\"c\"}\n";
    assert_eq!(counts(&import("people.jsonl", lines, &["--name", "people.csv"])), [0, 2, 0]);
    // Equal lines of one file are as many messages; so is the same file under another name.
    let twice = "recipient,content\n+85,e\n+85,e\n";
    assert_eq!(counts(&import("twice.csv", twice, &[])), [2, 0, 0]);
    assert_eq!(counts(&import("twice.csv", &format!("{twice}+85,e\n+85,f\n"), &[])), [2, 2, 0]);
    assert_eq!(counts(&import("twice.csv", twice, &["--name", "once more"])), [2, 0, 0]);
    let sent = ["+81", "+82", "+83", "+84", "+85"].map(|recipient| system.sent_to(recipient));
    assert_eq!(sent, [1, 1, 1, 1, 6]);
    // A line's own key stays its key, whatever the import's name is.
    let own = "recipient,content,idempotency_key\n+86,g,mine\n";
    assert_eq!(counts(&import("own.csv", own, &[])), [1, 0, 0]);
    assert_eq!(counts(&import("own.csv", own, &["--name", "other"])), [0, 1, 0]);
}

#[test]
fn a_run_goes_on_where_one_ended_unless_what_it_passed_has_changed() {
    /// More than two batches, so that there is something to pass.
    const LINES: usize = 2_500;
    let system = System::start();
    let progress = system.folder.path().join("list.csv.ams-import");
    let mut lines = vec!["recipient,content".to_owned()];
    // Each stands there twice: lines that are passed over must be counted.
    lines.extend((0..LINES).map(|line| format!("+7,{}", line / 2)));
    lines[2_450] = "+7,\"open".to_owned();
    let import = |lines: &[String]| {
        system.write("list.csv", &(lines.join("\n") + "\n"));
        system.say(&["import", "list.csv", "--json"])
    };
    let broken = import(&lines);
    assert_eq!((broken.code, counts(&broken)), (1, [2_449, 0, 0]), "{}", broken.err);
    assert!(broken.err.contains("line 2451: ") && progress.exists(), "{}", broken.err);
    lines[2_450] = "+7,mended".to_owned();
    let on = import(&lines);
    assert_eq!((on.code, counts(&on)), (0, [LINES as u64, 0, 0]), "{}", on.err);
    assert_eq!((on.json()["by_an_earlier_run"].as_u64(), progress.exists()), (Some(2_449), false));
    // A line that was passed is mended too: then nothing is passed.
    lines[2_450] = "+7,\"open".to_owned();
    assert_eq!(counts(&import(&lines)), [0, 2_449, 0]);
    lines[2_450] = "+7,mended".to_owned();
    lines[5] = "+8,changed".to_owned();
    let anew = import(&lines);
    assert_eq!((anew.code, counts(&anew)), (0, [1, LINES as u64 - 1, 0]), "{}", anew.err);
    assert!(anew.err.contains("has changed") && anew.err.contains("first line"), "{}", anew.err);
    assert_eq!(system.sent_to("+8"), 1);
}
