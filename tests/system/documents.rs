//! The README's commands, run as they stand there, in its order.

use std::os::unix::fs::symlink;
use std::process::{Command, Stdio};

use crate::harness::*;

/// The lines of all shell blocks of a section.
fn commands(section: &str) -> Vec<String> {
    let readme = std::fs::read_to_string("README.md").unwrap();
    let start = readme.find(&format!("\n## {section}\n")).unwrap_or_else(|| panic!("no section {section}"));
    let section = &readme[start + 1..];
    let section = section.find("\n## ").map_or(section, |end| &section[..end]);
    let blocks = section.split("```sh\n").skip(1).map(|rest| rest.split("```").next().unwrap());
    let joined = blocks.collect::<String>().replace("\\\n", " ");
    joined.lines().map(str::to_owned).collect()
}

/// Runs the lines in one shell, in a folder that looks like a checkout with the program built. A reader takes a
/// moment between starting a service and using it; here that service is asked until it answers.
fn run(lines: &[String], environment: &[(&str, &str)]) -> String {
    let checkout = std::env::current_dir().unwrap();
    let folder = tempfile::tempdir().unwrap();
    std::fs::create_dir_all(folder.path().join("target/release")).unwrap();
    symlink(env!("CARGO_BIN_EXE_ams"), folder.path().join("target/release/ams")).unwrap();
    for name in ["dev", "migrations"] {
        symlink(checkout.join(name), folder.path().join(name)).unwrap();
    }
    let answers = "curl -fsS -o /dev/null --retry 60 --retry-delay 1 --retry-all-errors http://127.0.0.1";
    let mut script = String::from("set -eu\ntrap 'kill $(jobs -p); wait' EXIT\n");
    for line in lines {
        script += line;
        script += "\n";
        match line.split_whitespace().nth(1).filter(|_| line.contains(" &")) {
            Some("testclient") => script += &format!("{answers}:3000/ -d '{{}}'\n"),
            Some("up" | "api") => script += &format!("{answers}:8080/readyz\n"),
            _ => {}
        }
    }
    let mut command = Command::new("bash");
    command.args(["-c", &script]).current_dir(folder.path()).stdin(Stdio::null());
    for (name, value) in environment {
        match value.is_empty() {
            true => command.env_remove(name),
            false => command.env(name, value),
        };
    }
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(output.status.success(), "{script}\n{text}\n{}", String::from_utf8_lossy(&output.stderr));
    text
}

/// Asks again until the last line's answer contains `wanted`.
fn repeat_last_until(lines: &mut Vec<String>, wanted: &str) {
    let last = lines.pop().unwrap();
    lines.push(format!(
        "timeout 60 bash -c 'until eval \"$1\" | tee answer | grep -q \"{wanted}\"; do :; done' - {last:?}"
    ));
    lines.push("cat answer".to_owned());
}

#[test]
fn a_first_send_goes_as_the_readme_says() {
    let _alone = alone();
    let mut lines = commands("A first send");
    assert_eq!(lines.remove(0), "cargo build --release --locked", "the program under test stands for it");
    repeat_last_until(&mut lines, r#"\"status\":\"sent\""#);
    let embedded = [("DATABASE_URL", ""), ("KAFKA_BROKERS", ""), ("REDIS_URL", "")];
    let text = run(&lines, &embedded);
    assert!(text.contains("1|") && text.contains("\"id\":2"), "{text}");
}

#[test]
fn the_real_stack_goes_as_the_readme_says() {
    let _alone = alone();
    setting("DATABASE_URL").expect("DATABASE_URL is set by `make test`");
    let mut lines = commands("On PostgreSQL, Kafka and Redis");
    repeat_last_until(&mut lines, "^ *10 | sent");
    let text = run(&lines, &[]);
    assert!(text.contains("sent"), "{text}");
}
