//! The verbs: the tree of the command line, and which module runs what.

mod bench;
mod client;
mod completions;
mod dlq;
mod doctor;
mod endpoints;
mod filter;
mod import;
mod keys;
mod messages;
mod migrate;
mod operator;
mod screen;
mod send;
mod services;
mod settings;
mod status;
mod tail;
mod testclient;
mod timeline;

use std::collections::BTreeMap;
use std::io::{ErrorKind, IsTerminal, Write};
use std::process::ExitCode;

use clap::{Arg, ArgAction, ArgMatches, Command};

use self::operator::Operator;
use crate::app::{self, AppError};
use crate::config::{Config, Raw, SETTINGS, Setting};
use crate::telemetry;

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
    let with_settings = |verb: Command| verb.args(SETTINGS.iter().map(setting_arg));
    let own = [testclient::command(), migrate::command(), bench::command(), settings::command()];
    Command::new("ams")
        .version(env!("CARGO_PKG_VERSION"))
        .about("The automatic message system: an INSERT is a send.")
        .subcommand_required(true)
        .arg_required_else_help(true)
        .subcommands(services::commands().map(with_settings))
        .subcommands(own.map(with_settings))
        .subcommands(bench::server_commands())
        .subcommand(send::command())
        .subcommand(messages::command())
        .subcommand(dlq::command())
        .subcommand(endpoints::command())
        .subcommand(status::command())
        .subcommand(tail::command())
        .subcommands([keys::command(), doctor::command(), import::command()])
        .subcommand(completions::command())
}

/// The flag of a setting.
fn setting_arg(setting: &Setting) -> Arg {
    let arg = Arg::new(setting.name).long(setting.flag()).help(setting.help).help_heading("Settings");
    match setting.name {
        // As the other programs have it: without a value.
        "NO_COLOR" => arg
            .num_args(0..=1)
            .require_equals(true)
            .default_missing_value("1")
            .value_name("1")
            .help("no colours"),
        _ => arg.value_name("VALUE"),
    }
}

/// The flag for programs.
fn json_arg() -> Arg {
    Arg::new("json").long("json").action(ArgAction::SetTrue).help("as JSON")
}

async fn run(verb: &str, matches: &ArgMatches) -> app::Result<ExitCode> {
    match verb {
        "bench-receiver" | "bench-sink" => return bench::run_server(verb, matches).await,
        "completions" => return completions::run(matches),
        _ => {}
    }
    let raw = Raw::read(&flags(matches)).map_err(|error| AppError(error.to_string()));
    if verb == "doctor" {
        return doctor::run(raw, matches).await;
    }
    let raw = raw?;
    if verb == "config" {
        return settings::run(&raw, matches);
    }
    let config = Config::new(&raw, services::role(verb)).map_err(|error| AppError(error.to_string()))?;
    start_log(&config, verb, &raw)?;
    let stop = app::stop_on_signals()?;
    let operator = || Operator::new(&config, matches, stop.clone());
    match verb {
        "migrate" => migrate::run(&config, matches).await,
        "testclient" => testclient::run(&config, matches, stop).await,
        "bench" => bench::run(config, matches, &stop).await,
        "send" => send::run(&operator()?, matches).await,
        "tail" => tail::run(&operator()?, matches).await,
        "dlq" => dlq::run(&operator()?, matches).await,
        "messages" => messages::run(&operator()?, matches).await,
        "endpoints" => endpoints::run(&operator()?, matches).await,
        "keys" => keys::run(&config, matches).await,
        "import" => import::run(&operator()?, matches).await,
        "status" => status::run(&operator()?, matches).await,
        "producer" if matches.subcommand().is_some() => status::control(&operator()?, matches).await,
        "demo" => services::demo(config, &raw, matches, stop).await,
        _ => services::run(config, stop).await,
    }
}

/// The settings that were given as flags, to the verb or to one below it.
fn flags(matches: &ArgMatches) -> BTreeMap<&'static str, String> {
    let given = |setting: &Setting| matches.try_get_one::<String>(setting.name).ok().flatten().cloned();
    let below = matches.subcommand().map(|(_, matches)| flags(matches));
    let own = SETTINGS.iter().filter_map(|setting| Some((setting.name, given(setting)?)));
    own.chain(below.into_iter().flatten()).collect()
}

fn start_log(config: &Config, verb: &str, raw: &Raw) -> app::Result<()> {
    // The demo's timeline, and a tool's own output, are what a person wants to see there.
    let serves = matches!(verb, "up" | "api" | "producer" | "consumer" | "retry-consumer" | "testclient");
    let quiet = !serves && raw.get("LOG_LEVEL").is_none();
    let level = if quiet { "warn" } else { &config.log.level };
    let colour = config.log.colour && std::io::stderr().is_terminal();
    telemetry::start_log(level, config.log.json, colour, config.log.file.as_deref()).map_err(AppError)
}

/// Writes to standard output. A reader that has seen enough, such as `head`, is no failure.
fn print(text: &str) -> app::Result<()> {
    write(text).map(drop)
}

/// Writes to standard output; whether anybody still reads it.
fn write(text: &str) -> app::Result<bool> {
    let mut output = std::io::stdout();
    match output.write_all(text.as_bytes()).and_then(|()| output.flush()) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == ErrorKind::BrokenPipe => Ok(false),
        Err(error) => Err(AppError(format!("the output can't be written: {error}"))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_tree_holds_together() {
        command().debug_assert();
    }

    #[test]
    fn settings_are_taken_from_every_level() {
        let given = |arguments: &[&str]| {
            let matches = command().try_get_matches_from(arguments).unwrap();
            flags(matches.subcommand().unwrap().1)
        };
        let expected = BTreeMap::from([("AMS_URL", "http://x".to_owned()), ("NO_COLOR", "1".to_owned())]);
        let (url, colour) = (["--ams-url", "http://x"], "--no-color");
        assert_eq!(given(&["ams", "messages", url[0], url[1], "list", colour]), expected);
        assert_eq!(given(&["ams", "producer", "pause", url[0], url[1], colour]), expected);
        assert_eq!(given(&["ams", "config", url[0], url[1], colour]), expected);
    }

    #[test]
    fn every_verb_says_what_it_is_for() {
        fn check(command: &Command) {
            for verb in command.get_subcommands().filter(|verb| !verb.is_hide_set()) {
                assert!(verb.get_about().is_some(), "{}", verb.get_name());
                check(verb);
            }
        }
        check(&command());
    }
}
