//! `ams bench`: what this machine delivers.

use std::process::ExitCode;
use std::time::Duration;

use clap::{Arg, ArgMatches, Command};
use tokio_util::sync::CancellationToken;

use super::{json_arg, print};
use crate::app::{self, AppError};
use crate::bench::{self, BenchOptions, Scenario};
use crate::config::Config;

pub(super) fn command() -> Command {
    let number = |name: &'static str, default: &'static str, help: &'static str| {
        let parser = clap::value_parser!(u32).range(1..=100_000_000);
        Arg::new(name).long(name).value_name("N").help(help).default_value(default).value_parser(parser)
    };
    let scenarios = Scenario::ALL.map(|(name, _)| name);
    Command::new("bench")
        .about("messages a second on this machine, against a floor measured in the same run")
        .arg(
            Arg::new("scenario")
                .value_name("SCENARIO")
                .help("what to measure")
                .default_value(scenarios[0])
                .value_parser(scenarios),
        )
        .arg(number("messages", "200000", "messages in a backlog"))
        .arg(number("payload", "300", "bytes of each one's content"))
        .arg(number("rounds", "3", "how often everything is measured"))
        .arg(number("rate", "1000", "messages a second where a steady rate is wanted"))
        .arg(number("seconds", "5", "how long such a phase lasts"))
        .arg(number("finished", "5000000", "growth: messages that are finished before"))
        .arg(number("hanging", "1", "isolation: endpoints that hang"))
        .arg(number("each", "1000", "isolation: messages of each of those"))
        .arg(json_arg())
}

/// The benchmark's own servers, each a process of its own.
pub(super) fn server_commands() -> [Command; 2] {
    let server = |name| Command::new(name).hide(true).arg(Arg::new("port").long("port").required(true));
    [server("bench-receiver"), server("bench-sink")]
}

pub(super) async fn run_server(verb: &str, matches: &ArgMatches) -> app::Result<ExitCode> {
    let port = matches.get_one::<String>("port").and_then(|port| port.parse().ok()).unwrap_or(0);
    let stop = app::stop_on_signals()?;
    match verb {
        "bench-sink" => bench::serve_sink(port, stop).await?,
        _ => bench::serve_receiver(port, stop).await?,
    }
    Ok(ExitCode::SUCCESS)
}

pub(super) async fn run(
    config: Config,
    matches: &ArgMatches,
    stop: &CancellationToken,
) -> app::Result<ExitCode> {
    let number = |name| matches.get_one::<u32>(name).copied().unwrap_or(1) as usize;
    let named = matches.get_one::<String>("scenario").map(String::as_str);
    let scenario = Scenario::ALL.into_iter().find(|(name, _)| Some(*name) == named);
    let options = BenchOptions {
        messages: number("messages"),
        payload_bytes: number("payload"),
        rounds: number("rounds"),
        rate: number("rate"),
        steady: Duration::from_secs(number("seconds") as u64),
        finished: number("finished"),
        hanging: number("hanging"),
        each: number("each"),
    };
    let report =
        bench::run(config, scenario.map_or(Scenario::default(), |(_, one)| one), &options, stop).await?;
    if !matches.get_flag("json") {
        print(&report.text())?;
        return Ok(ExitCode::SUCCESS);
    }
    let json = serde_json::to_string_pretty(&report);
    let json = json.map_err(|error| AppError(format!("the report can't be written: {error}")))?;
    print(&format!("{json}\n"))?;
    Ok(ExitCode::SUCCESS)
}
