//! `ams bench`: messages a second on this machine.

use std::process::ExitCode;

use clap::{Arg, ArgMatches, Command};

use super::{json_arg, print};
use crate::app::{self, AppError};
use crate::bench::{self, BenchOptions, Latency, Report};
use crate::config::Config;

pub(super) fn command() -> Command {
    let number = |name: &'static str, default: &'static str, help: &'static str| {
        let parser = clap::value_parser!(u32).range(1..=10_000_000);
        Arg::new(name).long(name).value_name("N").help(help).default_value(default).value_parser(parser)
    };
    Command::new("bench")
        .about("messages a second on this machine, against a measured limit")
        .arg(number("messages", "100000", "messages in the backlog"))
        .arg(number("payload", "300", "bytes of each one's content"))
        .arg(number("rate", "1000", "messages a second in the latency phase"))
        .arg(number("seconds", "5", "how long that phase lasts"))
        .arg(json_arg())
}

/// The receiver, which runs as a process of its own.
pub(super) fn receiver_command() -> Command {
    Command::new("bench-receiver").hide(true).arg(Arg::new("port").long("port").required(true))
}

pub(super) async fn run_receiver(matches: &ArgMatches) -> app::Result<ExitCode> {
    let port = matches.get_one::<String>("port").and_then(|port| port.parse().ok()).unwrap_or(0);
    bench::serve_receiver(port, app::stop_on_signals()?).await?;
    Ok(ExitCode::SUCCESS)
}

pub(super) async fn run(config: Config, matches: &ArgMatches) -> app::Result<ExitCode> {
    let number = |name| matches.get_one::<u32>(name).copied().unwrap_or(1);
    let options = BenchOptions {
        messages: number("messages") as usize,
        payload_bytes: number("payload") as usize,
        rate: number("rate") as usize,
        steady: std::time::Duration::from_secs(number("seconds").into()),
    };
    let report = bench::run(config, &options).await?;
    if matches.get_flag("json") {
        let json = serde_json::to_string_pretty(&report);
        let json = json.map_err(|error| AppError(format!("the report can't be written: {error}")))?;
        print(&format!("{json}\n"))?;
        return Ok(ExitCode::SUCCESS);
    }
    print(&report_text(&report))?;
    Ok(ExitCode::SUCCESS)
}

fn report_text(report: &Report) -> String {
    let mut lines = Vec::new();
    lines.push(format!(
        "{} stack, {} messages of {} bytes",
        report.stack, report.messages, report.payload_bytes
    ));
    lines.push(format!(
        "delivered {:.0}/s; limit {:.0}/s; ratio {:.2}",
        report.delivered_per_s, report.limit_per_s, report.ratio
    ));
    let Latency { p50, p99, max } = report.latency_ms;
    lines.push(format!(
        "commit to arrival at {}/s: p50 {p50:.1} ms, p99 {p99:.1} ms, max {max:.1} ms",
        report.rate
    ));
    let Latency { p50, p99, max } = report.rest_latency_ms;
    lines.push(format!("commit to arrival at rest: p50 {p50:.1} ms, p99 {p99:.1} ms, max {max:.1} ms"));
    lines.push(format!("lost {}, duplicates {}", report.lost, report.duplicates));
    if let Some(statements) = report.sql_statements_per_message {
        lines.push(format!("SQL statements per message: {statements:.4}"));
    }
    for (name, us) in &report.cpu_us_per_message {
        let memory = report.memory_mb.get(name).copied().unwrap_or_default();
        let idle = report.idle_cpu_percent.get(name).copied().unwrap_or_default();
        lines.push(format!(
            "  {name:<16} {us:6.1} µs CPU per message, {memory:.0} MB, {idle:.1} % of a core at rest"
        ));
    }
    for (stage, figure) in &report.stages {
        lines.push(format!("  bare {stage:<24} {figure:.1}"));
    }
    lines.iter().map(|line| format!("{line}\n")).collect()
}
