//! The documents hold: pages made from the source are the committed ones, pages written by hand name everything
//! there is, and no link leads nowhere.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use ams::config::{Role, SETTINGS, Setting};

const ROLES: &[(Role, &str)] = &[
    (Role::Api, "api"),
    (Role::Producer, "producer"),
    (Role::Consumer, "consumer"),
    (Role::RetryConsumer, "retry-consumer"),
    (Role::Up, "up"),
    (Role::TestClient, "testclient"),
];

/// A page that is made from the source must be the committed one.
fn assert_committed(path: &str, now: &str) {
    if std::fs::read_to_string(path).unwrap_or_default() != now {
        let written = Path::new("target").join(Path::new(path).file_name().unwrap());
        std::fs::create_dir_all("target").unwrap();
        std::fs::write(&written, now).unwrap();
        panic!("{path} is out of date: look at the difference and copy {} over it", written.display());
    }
}

fn in_cell(text: &str) -> String {
    text.replace('|', "\\|").replace('\n', " ")
}

fn default(setting: &Setting) -> String {
    let code = |value: Option<&str>| value.map_or("none".to_owned(), |value| format!("`{value}`"));
    let mut text = code(setting.default);
    for (role, verb) in ROLES {
        let own = setting.default_for(*role);
        if own != setting.default {
            let _ = write!(text, "; in `{verb}` {}", code(own));
        }
    }
    text
}

fn settings_page() -> String {
    let mut page = "# Settings\n\n\
        This page is made from the source.\n\n\
        A setting comes from the first of these that has it: a flag, the environment, `ams.toml` in the current \
        folder, its default.\n\
        An empty variable counts as unset.\n\
        `ams config` shows each value and where it came from; secrets are hidden.\n\
        Durations are written `500ms`, `3s`, `2m`, `1h`, or as a number of seconds.\n\
        A setting that does not exist, or a value that can't be read, stops the start with a sentence that says \
        how to mend it.\n\n\
        ## An example\n\
        In the file, names are in lower case.\n\
        Save this as `ams.toml`:\n\
        ```toml\nrequest_url = \"https://example.org/hook\"\nretry_interval = \"10s\"\n```\n\
        ```sh\nRETRY_COUNT=5 ./target/release/ams config --log-level debug | \\\n  awk '$3 != \"default\" && /^(REQUEST_URL|RETRY_|LOG_LEVEL)/ { print $1, $2, $3 }' | sort\n```\n\
        ```text\nLOG_LEVEL debug flag\nREQUEST_URL https://example.org/hook ams.toml\n\
        RETRY_COUNT 5 environment\nRETRY_INTERVAL 10s ams.toml\n```\n\n\
        ## All settings\n\
        | name | flag | default | meaning |\n| --- | --- | --- | --- |\n"
        .to_owned();
    for setting in SETTINGS {
        let (flag, meaning) = (setting.flag(), in_cell(setting.help));
        let secret = if setting.secret { "; a secret" } else { "" };
        let _ =
            writeln!(page, "| `{}` | `--{flag}` | {} | {meaning}{secret} |", setting.name, default(setting));
    }
    page += "\n## Where to go next\n\
        - Which verbs take them: [command-line.md](command-line.md).\n\
        - What others may call and with which key: [api.md](api.md).\n";
    page
}

#[test]
fn the_page_on_settings_is_the_committed_one() {
    assert_committed("docs/reference/settings.md", &settings_page());
}

/// A verb and those below it, as their help says. Settings have a page of their own.
fn verb(page: &mut String, path: &str, command: &clap::Command) {
    let taken: Vec<&str> = SETTINGS
        .iter()
        .map(|setting| setting.name)
        .filter(|name| command.get_arguments().any(|arg| arg.get_id() == name))
        .collect();
    let mut shown = command.clone().bin_name(path);
    shown = shown.disable_help_flag(true).disable_help_subcommand(true).disable_version_flag(true);
    for name in &taken {
        shown = shown.mut_arg(name, |arg| arg.hide(true));
    }
    let depth = "#".repeat(path.split(' ').count().max(2));
    let _ = writeln!(page, "\n{depth} `{path}`\n```\n{}\n```", shown.render_help().to_string().trim());
    if taken.len() == SETTINGS.len() {
        page.push_str("It takes every [setting](settings.md) as a flag.\n");
    } else if !taken.is_empty() {
        let names: Vec<_> = taken.iter().map(|name| format!("`{name}`")).collect();
        let _ = writeln!(page, "It takes these [settings](settings.md) as flags: {}.", names.join(", "));
    }
    for sub in command.get_subcommands().filter(|sub| !sub.is_hide_set()) {
        verb(page, &format!("{path} {}", sub.get_name()), sub);
    }
}

fn command_line_page() -> String {
    let mut page = "# Command line\n\n\
        This page is made from the source; it says what `ams VERB --help` says.\n\n\
        Verbs for operators talk to the API at `AMS_URL`, with the key `AMS_KEY` if it wants one; the others run \
        on the store, queue and cache that are configured.\n\
        Exit 0: done. 1: failed, with one sentence that says what, where and how to mend it. 2: wrong use.\n\
        Results go to standard output, the log to standard error.\n"
        .to_owned();
    verb(&mut page, "ams", &ams::cli::command());
    page += "\n## Where to go next\n\
        - The settings: [settings.md](settings.md).\n\
        - The calls behind the operators' verbs: [api.md](api.md).\n";
    page
}

#[test]
fn the_page_on_the_command_line_is_the_committed_one() {
    assert_committed("docs/reference/command-line.md", &command_line_page());
}

/// The words between `start` and the next `end`, letters and underscores.
fn words<'a>(text: &'a str, start: &str, end: char) -> BTreeSet<&'a str> {
    let rest = text.split_once(start).unwrap_or_else(|| panic!("no `{start}`")).1;
    let list = rest.split(end).next().unwrap();
    list.split(|c: char| !c.is_ascii_alphabetic() && c != '_').filter(|word| !word.is_empty()).collect()
}

/// The first column of the table below a heading.
fn names<'a>(page: &'a str, heading: &str) -> BTreeSet<&'a str> {
    let section = page.split_once(&format!("\n## {heading}\n")).unwrap_or_else(|| panic!("no {heading}")).1;
    let section = section.split("\n## ").next().unwrap();
    section.lines().filter_map(|line| line.strip_prefix("| `")?.split('`').next()).collect()
}

#[test]
fn the_page_on_sql_names_every_column_of_a_writer_and_every_status() {
    let page = std::fs::read_to_string("docs/reference/sql.md").unwrap();
    let migration = |name: &str| std::fs::read_to_string(format!("migrations/postgres/{name}")).unwrap();
    assert_eq!(
        names(&page, "What a writer may set"),
        words(&migration("V3__views.sql"), "grant insert (", ')')
    );
    assert_eq!(
        names(&page, "Statuses"),
        words(&migration("V1__messages.sql"), "message_state as enum (", ')')
    );
}

/// README, and all pages.
fn pages() -> Vec<PathBuf> {
    let mut pages: Vec<_> =
        ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md"].iter().map(PathBuf::from).collect();
    let mut folders = vec![PathBuf::from("docs")];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            match path.extension() {
                _ if path.is_dir() => folders.push(path),
                Some(ending) if ending == "md" => pages.push(path),
                _ => {}
            }
        }
    }
    pages
}

/// A heading as a link names it.
fn anchor(heading: &str) -> String {
    let kept = heading.chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
    kept.collect::<String>().to_lowercase().replace(' ', "-")
}

#[test]
fn every_link_leads_somewhere() {
    let mut broken = Vec::new();
    for page in pages() {
        let text = std::fs::read_to_string(&page).unwrap();
        for link in text.split("](").skip(1).filter_map(|rest| rest.split_once(')')).map(|(link, _)| link) {
            if link.starts_with("https://") || link.starts_with("http://") {
                continue;
            }
            let (file, heading) = link.split_once('#').unwrap_or((link, ""));
            let target = if file.is_empty() { page.clone() } else { page.with_file_name(file) };
            let there = target.exists()
                && (heading.is_empty()
                    || std::fs::read_to_string(&target).unwrap_or_default().lines().any(|line| {
                        line.starts_with('#') && anchor(line.trim_start_matches(['#', ' '])) == heading
                    }));
            if !there {
                broken.push(format!("{}: {link}", page.display()));
            }
        }
    }
    assert!(broken.is_empty(), "these links lead nowhere:\n  {}", broken.join("\n  "));
}

#[test]
fn the_map_of_the_documents_names_every_page() {
    let map = std::fs::read_to_string("docs/README.md").unwrap();
    let missing: Vec<_> = pages()
        .into_iter()
        .filter_map(|page| Some(page.strip_prefix("docs").ok()?.to_string_lossy().into_owned()))
        .filter(|page| {
            page != "README.md" && !page.starts_with("adr/") && !map.contains(&format!("({page})"))
        })
        .collect();
    assert!(missing.is_empty(), "docs/README.md does not name {missing:?}");
}
