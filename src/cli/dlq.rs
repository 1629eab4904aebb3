//! `ams dlq`: dead messages, why they are dead, and a second life for them.

use std::process::ExitCode;

use clap::{Arg, ArgMatches, Command};
use serde::Deserialize;

use super::filter::{change_many, filter, filter_args, ids_arg, many_args};
use super::messages::{Page, change_each};
use super::operator::{Operator, below, read, verb};
use super::screen::{Paint, Tone, grouped, plain, table};
use super::timeline;
use crate::app::{self, AppError};

pub(super) fn command() -> Command {
    let id = Arg::new("id").value_name("ID").required(true).value_parser(clap::value_parser!(i64));
    verb("dlq", "dead messages: list by reason, show, redrive")
        .subcommand_required(true)
        .arg_required_else_help(true)
        .subcommand(Command::new("list").about("why messages are dead, the most frequent reason first"))
        .subcommand(Command::new("show").about("one message, with its timeline").arg(id.help("its number")))
        .subcommand(
            Command::new("redrive")
                .about("send dead ones again: by number, or by filter")
                .arg(ids_arg())
                .args(filter_args())
                .args(many_args()),
        )
}

pub(super) async fn run(operator: &Operator, matches: &ArgMatches) -> app::Result<ExitCode> {
    let (verb, matches) = below(matches);
    match verb {
        "list" => {
            let answer = operator.client.get("/v1/dead-reasons").await?;
            let reasons: Page<Reason> = read(&answer)?;
            operator.screen.show(&answer, || list(&reasons.data, operator.screen.paint))?;
            Ok(ExitCode::SUCCESS)
        }
        "show" => timeline::show(operator, *matches.get_one::<i64>("id").unwrap_or(&0)).await,
        _ => redrive(operator, matches).await,
    }
}

async fn redrive(operator: &Operator, matches: &ArgMatches) -> app::Result<ExitCode> {
    let mut filter = filter(matches, operator.clock.now())?;
    let ids: Vec<i64> = matches.get_many::<i64>("id").unwrap_or_default().copied().collect();
    if ids.is_empty() {
        filter.insert("status".to_owned(), "dead".into());
        return change_many(operator, "redrive", filter, matches).await;
    }
    if !filter.is_empty() || matches.get_flag("all") || matches.get_flag("dry-run") {
        return Err(AppError("give numbers or a filter, not both".to_owned()));
    }
    change_each(operator, "redrive", &ids).await
}

#[derive(Debug, Deserialize)]
struct Reason {
    reason: String,
    count: u64,
    newest_id: i64,
}

fn list(reasons: &[Reason], paint: Paint) -> String {
    if reasons.is_empty() {
        return "No message is dead.\n".to_owned();
    }
    let row = |reason: &Reason| {
        vec![grouped(reason.count), reason.newest_id.to_string(), plain(&reason.reason, 120)]
    };
    let rows: Vec<_> = reasons.iter().map(row).collect();
    let mut text = table(paint, &[">DEAD", ">NEWEST", "REASON"], &rows, |_, _| None);
    let first = &reasons[0];
    let hint = format!(
        "\n`ams dlq show {}` tells the newest one's story; `ams dlq redrive --reason {} --dry-run` counts those that\n\
         would be sent again, and without --dry-run they are.\n",
        first.newest_id,
        quoted(&first.reason)
    );
    text += &paint.tone(Tone::Faint, &hint);
    text
}

/// A text as a shell takes it for one word.
fn quoted(text: &str) -> String {
    format!("'{}'", text.replace('\'', r"'\''"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn reasons_stand_in_a_table_with_the_next_step() {
        let reason = |reason: &str, count, newest_id| Reason { reason: reason.to_owned(), count, newest_id };
        let text = list(&[reason("status 500", 1_234, 99), reason("it's\x1b[31m", 1, 7)], Paint::default());
        assert_eq!(
            text,
            " DEAD  NEWEST  REASON\n1,234      99  status 500\n    1       7  it's\\u{1b}[31m\n\n\
             `ams dlq show 99` tells the newest one's story; `ams dlq redrive --reason 'status 500' --dry-run` counts \
             those that\nwould be sent again, and without --dry-run they are.\n"
        );
        assert_eq!(list(&[], Paint::default()), "No message is dead.\n");
        assert_eq!(quoted("it's"), r"'it'\''s'");
    }
}
