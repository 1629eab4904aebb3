//! The README and every page of `docs/`, done as they say, in their order, by somebody who has only the page.
//!
//! A page runs in one shell, in a folder that looks like a checkout with the program built. Its blocks:
//!
//! - `sh`: run, command by command. `sql`: run by psql when `DATABASE_URL` is set, else by sqlite3.
//! - ``Save this as `NAME`:`` and a block of any language: written to that file.
//! - `text`: the last lines that the block before it prints, `…` standing for anything. A reader who sees
//!   something else asks again, so the last command is run until it prints that.
//! - `json`: shown only, but must be JSON. Without a language: a picture.
//!
//! Anything else fails the test. What can't be run here stands in [`NOT_RUN`], with its reason.

mod page;
mod shell;

use crate::harness::*;
use page::{Page, Step};
use shell::Shell;

/// Commands that are not run, by their beginning, and why.
const NOT_RUN: &[(&str, &str)] = &[
    ("cargo build --release --locked", "the program under test stands for it"),
    ("make demo", "tests/system/embedded.rs runs the demo"),
    ("make test", "it is what is running"),
    (
        "docker ",
        "there is no Docker engine where the tests run; tests/system/quickstart.rs runs its services",
    ),
    ("sudo apt-get install ", "dev/packages has done it for the tests"),
];

fn is_run(command: &str) -> bool {
    !NOT_RUN.iter().any(|(beginning, _)| command.starts_with(beginning))
}

/// Does what a page says; what was not as it says, with the line.
async fn follow(page: &Page) -> Result<(), String> {
    let mut shell = Shell::start().await;
    for (line, step) in &page.steps {
        let done = match step {
            Step::Save { file, text } => shell.save(file, text),
            Step::Run { commands, prints } => {
                let commands: Vec<_> = commands.iter().filter(|command| is_run(command)).cloned().collect();
                shell.run(&commands, prints.as_deref()).await
            }
        };
        done.map_err(|why| format!("{}:{line}: {why}", page.path))?;
    }
    shell.end().await.map_err(|why| format!("{}: at the end: {why}", page.path))
}

/// `AMS_TEST_PAGE` names a page, or a folder of them.
#[test]
fn every_page_goes_as_it_says() {
    let _alone = alone();
    setting("DATABASE_URL").expect("DATABASE_URL is set by `make test`");
    let wanted = setting("AMS_TEST_PAGE");
    let pages =
        page::all().into_iter().filter(|page| wanted.as_ref().is_none_or(|path| page.path.starts_with(path)));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
    let (mut followed, mut failed) = (0, Vec::new());
    for page in pages {
        let watch = ams::clock::Clock::system().stopwatch();
        failed.extend(runtime.block_on(follow(&page)).err());
        println!("{} took {:?}", page.path, watch.elapsed());
        followed += 1;
    }
    assert!(followed > 0, "there is no page {wanted:?}");
    assert!(failed.is_empty(), "{}", failed.join("\n\n"));
}

#[test]
fn an_ellipsis_stands_for_anything() {
    for (shown, printed, same) in [
        ("", "", true),
        ("1|sent|", "1|sent|\n", true),
        ("1|…|x", "1|sent|x", true),
        ("…\nb", "a\na\nb", true),
        ("a\n…", "a\nb  \n", true),
        ("b", "a\nb\n", true),
        ("b", "ab", false),
        ("a", "a\nb", false),
        ("a\nb", "a\nc", false),
        ("a…a", "a", false),
        ("…sent", "sent twice", false),
        (" id\n----", "INSERT 0 1\n id \n----\n", true),
    ] {
        assert_eq!(shell::prints(shown, printed), same, "{shown:?} {printed:?}");
    }
}
