//! `ams testclient`: a simulated external message service.

use std::io::IsTerminal;
use std::process::ExitCode;

use clap::{Arg, ArgAction, ArgMatches, Command};
use tokio_util::sync::CancellationToken;

use super::print;
use crate::app::{self, AppError};
use crate::config::Config;
use crate::testclient::{self, TestClientOptions};

pub(super) fn command() -> Command {
    let option = |name: &'static str, value: &'static str, help: &'static str| {
        Arg::new(name).long(name).value_name(value).help(help)
    };
    Command::new("testclient")
        .about("a simulated external message service")
        .arg(option("status", "CODE", "answer failures with this status instead of 500"))
        .arg(option("latency", "DURATION", "wait this long before each answer"))
        .arg(option("hang", "SHARE", "share of requests that never get an answer"))
        .arg(option("retry-after", "DURATION", "ask for this wait with each failure"))
        .arg(Arg::new("quiet").long("quiet").action(ArgAction::SetTrue).help("log no requests"))
}

pub(super) async fn run(
    config: &Config,
    matches: &ArgMatches,
    stop: CancellationToken,
) -> app::Result<ExitCode> {
    let options = TestClientOptions { error_rate: config.error_rate, ..options(matches)? };
    let listener = app::listen(&config.listen.host, config.listen.port, "PORT").await?;
    print(&format!("the test client answers at http://{}\n", app::address(&listener)?))?;
    testclient::run(listener, options, stop).await;
    Ok(ExitCode::SUCCESS)
}

fn options(matches: &ArgMatches) -> app::Result<TestClientOptions> {
    let text = |name: &str| matches.get_one::<String>(name).map(String::as_str);
    let wrong = |name: &str, text: &str, why: &str| AppError(format!("--{name} is `{text}`, which {why}"));
    let duration = |name: &str| match text(name) {
        None => Ok(None),
        Some(text) => crate::config::duration(text).map(Some).map_err(|why| wrong(name, text, &why)),
    };
    let mut options = TestClientOptions {
        latency: duration("latency")?.unwrap_or_default(),
        retry_after: duration("retry-after")?,
        quiet: matches.get_flag("quiet"),
        colour: std::io::stdout().is_terminal(),
        ..TestClientOptions::default()
    };
    if let Some(text) = text("status") {
        let status = text.parse().ok().filter(|status| (200..=599).contains(status));
        options.status =
            status.ok_or_else(|| wrong("status", text, "is no status; write one from 200 to 599"))?;
    }
    if let Some(text) = text("hang") {
        let share = text.parse().ok().filter(|share| (0.0..=1.0).contains(share));
        options.hang = share.ok_or_else(|| wrong("hang", text, "is no share; write a number from 0 to 1"))?;
    }
    Ok(options)
}
