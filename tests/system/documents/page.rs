//! Reads a page: what its blocks ask a reader to do.

use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

/// A page, step by step, each with its line.
pub struct Page {
    pub path: String,
    pub steps: Vec<(usize, Step)>,
}

/// What a block asks for.
pub enum Step {
    Save { file: String, text: String },
    Run { commands: Vec<String>, prints: Option<String> },
}

/// The README and all pages below `docs/` that have anything to do.
pub fn all() -> Vec<Page> {
    let mut paths = vec![PathBuf::from("README.md")];
    let mut folders = vec![PathBuf::from("docs")];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let path = entry.unwrap().path();
            match path.extension() {
                _ if path.is_dir() => folders.push(path),
                Some(ending) if ending == "md" => paths.push(path),
                _ => {}
            }
        }
    }
    paths.sort();
    paths.iter().map(|path| read(path)).filter(|page| !page.steps.is_empty()).collect()
}

fn read(path: &Path) -> Page {
    let text = std::fs::read_to_string(path).unwrap();
    let path = path.to_string_lossy().into_owned();
    let mut steps = Vec::new();
    let (mut before, mut lines) = ("", text.lines().enumerate());
    while let Some((number, line)) = lines.next() {
        let Some(language) = line.trim_start().strip_prefix("```") else {
            before = if line.trim().is_empty() { before } else { line };
            continue;
        };
        let block: Vec<&str> =
            lines.by_ref().map(|(_, line)| line).take_while(|line| *line != "```").collect();
        let block = format!("{}\n", block.join("\n"));
        let at = format!("{path}:{}", number + 1);
        assert!(!line.starts_with(' '), "{at}: a block in a list is not run; put it at the margin");
        let file = before.split_once("Save this as `").and_then(|(_, rest)| rest.split_once("`:"));
        match (language, file) {
            ("" | "mermaid", _) => {}
            ("json", None) => {
                serde_json::from_str::<serde_json::Value>(&block)
                    .unwrap_or_else(|error| panic!("{at}: {error}"));
            }
            ("text", None) => match steps.last_mut() {
                Some((_, Step::Run { prints: prints @ None, .. })) => *prints = Some(block),
                _ => panic!("{at}: a block of `text` shows what the block before it prints; there is none"),
            },
            (_, Some((file, _))) => {
                steps.push((number + 1, Step::Save { file: file.to_owned(), text: block }))
            }
            ("sh", None) => steps.push((number + 1, Step::Run { commands: commands(&block), prints: None })),
            ("sql", None) => {
                steps.push((number + 1, Step::Run { commands: vec![by_sql(&block)], prints: None }));
            }
            (other, None) => panic!("{at}: nobody knows how to run a block of `{other}`"),
        }
        before = "";
    }
    Page { path, steps }
}

/// Splits a block into its commands: a line goes with the next until the shell finds it whole.
fn commands(block: &str) -> Vec<String> {
    let mut commands = Vec::new();
    let mut open = String::new();
    for line in block.lines().filter(|line| !line.trim().is_empty()) {
        open += line;
        open += "\n";
        let parsed = Command::new("bash").args(["-n", "-c", &open]).stdin(Stdio::null()).output().unwrap();
        if parsed.status.success() && parsed.stderr.is_empty() && !line.ends_with('\\') {
            commands.push(std::mem::take(&mut open));
        }
    }
    assert!(open.is_empty(), "this command has no end: {open}");
    commands
}

fn by_sql(block: &str) -> String {
    format!(
        "cat >.statements.sql <<'STATEMENTS'\n{block}STATEMENTS\n\
         if [[ -n ${{DATABASE_URL:-}} ]]; then psql -v ON_ERROR_STOP=1 \"$DATABASE_URL\" -f .statements.sql\n\
         else sqlite3 -bail -cmd '.timeout 5000' ams-data/ams.db <.statements.sql; fi\n"
    )
}
