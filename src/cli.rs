//! The verbs. Each reads its settings, starts the log, and runs one thing to its end.

use std::collections::BTreeMap;
use std::io::{ErrorKind, IsTerminal, Write};
use std::process::ExitCode;

use clap::{Arg, ArgAction, ArgMatches, Command};
use tokio_util::sync::CancellationToken;

use crate::app::{self, App, AppError};
use crate::bench::{self, BenchOptions, Latency, Report};
use crate::config::{Config, Raw, Role, SETTINGS, Setting, Source};
use crate::telemetry;
use crate::testclient::{self, TestClientOptions};

/// Parses the command line and runs the verb. Exit code 0: done; 1: failed; 2: wrong use.
pub fn main() -> ExitCode {
    let matches = command().get_matches();
    let Some((verb, matches)) = matches.subcommand() else { return ExitCode::from(2) };
    let runtime = match tokio::runtime::Builder::new_current_thread().enable_all().build() {
        Ok(runtime) => runtime,
        Err(error) => return failed(&AppError(format!("the system gives us no event loop: {error}"))),
    };
    let done = runtime.block_on(run(verb, matches));
    // Calls to a part that hangs must not keep a process that is done.
    runtime.shutdown_background();
    match done {
        Ok(code) => code,
        Err(error) => failed(&error),
    }
}

fn failed(error: &AppError) -> ExitCode {
    eprintln!("ams: {error}");
    ExitCode::FAILURE
}

/// The whole command line, from which help and completions are made too.
pub fn command() -> Command {
    let verb = |name: &'static str, about: &'static str| Command::new(name).about(about).args(setting_args());
    let flag = |name: &'static str, help: &'static str| {
        Arg::new(name).long(name).help(help).action(ArgAction::SetTrue)
    };
    Command::new("ams")
        .version(env!("CARGO_PKG_VERSION"))
        .about("The automatic message system: an INSERT is a send.")
        .subcommand_required(true)
        .arg_required_else_help(true)
        .subcommand(
            verb("demo", "the whole system in this process, with a receiver and ten sample messages")
                .arg(flag("exit-when-done", "end with a summary once every message is final")),
        )
        .subcommand(verb("up", "API, producer, consumers and janitor in one process"))
        .subcommand(verb("api", "the HTTP API"))
        .subcommand(verb("producer", "the producer, with the janitor beside it"))
        .subcommand(verb("consumer", "a consumer of the fresh lane"))
        .subcommand(verb("retry-consumer", "a consumer of a retry lane"))
        .subcommand(testclient_command(verb("testclient", "a simulated external message service")))
        .subcommand(
            verb("migrate", "apply the store's migrations")
                .arg(flag("check", "apply nothing; exit 1 if any is missing")),
        )
        .subcommand(bench_command(verb(
            "bench",
            "messages a second on this machine, against a measured limit",
        )))
        .subcommand(
            Command::new("bench-receiver").hide(true).arg(Arg::new("port").long("port").required(true)),
        )
        .subcommand(
            verb("config", "each setting with its value and where it came from").arg(flag("json", "as JSON")),
        )
}

fn setting_args() -> Vec<Arg> {
    SETTINGS
        .iter()
        .map(|setting| {
            Arg::new(setting.name)
                .long(setting.flag())
                .value_name("VALUE")
                .help(setting.help)
                .help_heading("Settings")
        })
        .collect()
}

fn testclient_command(verb: Command) -> Command {
    let option = |name: &'static str, value: &'static str, help: &'static str| {
        Arg::new(name).long(name).value_name(value).help(help)
    };
    verb.arg(option("status", "CODE", "answer failures with this status instead of 500"))
        .arg(option("latency", "DURATION", "wait this long before each answer"))
        .arg(option("hang", "SHARE", "share of requests that never get an answer"))
        .arg(option("retry-after", "DURATION", "ask for this wait with each failure"))
        .arg(Arg::new("quiet").long("quiet").action(ArgAction::SetTrue).help("log no requests"))
}

fn bench_command(verb: Command) -> Command {
    let number = |name: &'static str, default: &'static str, help: &'static str| {
        let parser = clap::value_parser!(u32).range(1..=10_000_000);
        Arg::new(name).long(name).value_name("N").help(help).default_value(default).value_parser(parser)
    };
    verb.arg(number("messages", "100000", "messages in the backlog"))
        .arg(number("payload", "300", "bytes of each one's content"))
        .arg(number("rate", "1000", "messages a second in the latency phase"))
        .arg(number("seconds", "5", "how long that phase lasts"))
        .arg(Arg::new("json").long("json").action(ArgAction::SetTrue).help("as JSON"))
}

async fn run(verb: &str, matches: &ArgMatches) -> app::Result<ExitCode> {
    let role = match verb {
        "api" => Role::Api,
        "producer" => Role::Producer,
        "consumer" => Role::Consumer,
        "retry-consumer" => Role::RetryConsumer,
        "up" | "demo" => Role::Up,
        "testclient" => Role::TestClient,
        _ => Role::Tool,
    };
    if verb == "bench-receiver" {
        let port = matches.get_one::<String>("port").and_then(|port| port.parse().ok()).unwrap_or(0);
        bench::serve_receiver(port, app::stop_on_signals()?).await?;
        return Ok(ExitCode::SUCCESS);
    }
    let flags: BTreeMap<&'static str, String> = SETTINGS
        .iter()
        .filter_map(|s| matches.get_one::<String>(s.name).map(|value| (s.name, value.clone())))
        .collect();
    let raw = Raw::read(&flags).map_err(|error| AppError(error.to_string()))?;
    if verb == "config" {
        print(&config_text(&raw, role, matches.get_flag("json")))?;
        return Ok(ExitCode::SUCCESS);
    }
    let config = Config::new(&raw, role).map_err(|error| AppError(error.to_string()))?;
    start_log(&config, verb, &raw)?;
    let stop = app::stop_on_signals()?;
    match verb {
        "migrate" => return migrate(&config, matches.get_flag("check")).await,
        "testclient" => testclient(&config, matches, stop).await?,
        "demo" => return app::demo::run(config, &raw, matches.get_flag("exit-when-done"), stop).await,
        "bench" => measure(config, matches).await?,
        _ => App::open(config)?.run(&stop).await?,
    }
    Ok(ExitCode::SUCCESS)
}

fn start_log(config: &Config, verb: &str, raw: &Raw) -> app::Result<()> {
    // The demo's timeline, and a tool's own output, are what a person wants to see there.
    let quiet = matches!(verb, "demo" | "bench" | "migrate") && raw.get("LOG_LEVEL").is_none();
    let level = if quiet { "warn" } else { &config.log.level };
    let colour = config.log.colour && std::io::stderr().is_terminal();
    telemetry::start_log(level, config.log.json, colour, config.log.file.as_deref()).map_err(AppError)
}

/// Writes to standard output. A reader that has seen enough, such as `head`, is no failure.
fn print(text: &str) -> app::Result<()> {
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(error) if error.kind() != ErrorKind::BrokenPipe => {
            Err(AppError(format!("the output can't be written: {error}")))
        }
        _ => Ok(()),
    }
}

fn config_text(raw: &Raw, role: Role, json: bool) -> String {
    let explained = raw.explain(role);
    if json {
        let object: serde_json::Map<_, _> = explained
            .iter()
            .map(|(setting, value, source)| {
                (setting.name.to_owned(), serde_json::json!({ "value": value, "source": source.as_str() }))
            })
            .collect();
        return format!("{:#}\n", serde_json::Value::Object(object));
    }
    let line = |(setting, value, source): &(&Setting, String, Source)| {
        format!("{:<24} {:<44} {:<12} {}\n", setting.name, value, source.as_str(), setting.help)
    };
    explained.iter().map(line).collect()
}

async fn measure(config: Config, matches: &ArgMatches) -> app::Result<()> {
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
        return print(&format!("{json}\n"));
    }
    print(&report_text(&report))
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

async fn migrate(config: &Config, check: bool) -> app::Result<ExitCode> {
    let store = app::open_store(&config.store)?;
    let sentence = |error: crate::store::StoreError| AppError(error.to_string());
    if check {
        let missing = store.missing_migrations().await.map_err(sentence)?;
        print(&missing.iter().map(|name| format!("missing: {name}\n")).collect::<String>())?;
        return Ok(if missing.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE });
    }
    let applied = store.migrate().await.map_err(sentence)?;
    print(&applied.iter().map(|name| format!("applied: {name}\n")).collect::<String>())?;
    if applied.is_empty() {
        let newer = store.standing().await.map_err(sentence)?.newer;
        print(&match newer.is_empty() {
            true => "nothing to apply: the store is up to date\n".to_owned(),
            false => format!(
                "nothing to apply: the store is newer than this program: it has {}\n",
                newer.join(", ")
            ),
        })?;
    }
    Ok(ExitCode::SUCCESS)
}

async fn testclient(config: &Config, matches: &ArgMatches, stop: CancellationToken) -> app::Result<()> {
    let options = TestClientOptions { error_rate: config.error_rate, ..testclient_options(matches)? };
    let listener = app::listen(&config.host, config.port, "PORT").await?;
    print(&format!("the test client answers at http://{}\n", app::address(&listener)?))?;
    testclient::run(listener, options, stop).await;
    Ok(())
}

fn testclient_options(matches: &ArgMatches) -> app::Result<TestClientOptions> {
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
