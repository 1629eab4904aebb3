//! The verbs that run AMS or a part of it until they are stopped, and the demo.

use std::process::ExitCode;

use clap::{Arg, ArgAction, ArgMatches, Command};
use tokio_util::sync::CancellationToken;

use super::operator;
use crate::app::{self, App, AppError};
use crate::config::{Config, Raw, Role};

/// Every such verb with its help.
pub(super) fn commands() -> [Command; 6] {
    let verb = |name: &'static str, about: &'static str| Command::new(name).about(about);
    let exit = Arg::new("exit-when-done").long("exit-when-done").action(ArgAction::SetTrue);
    [
        verb("demo", "the whole system in this process, with a receiver and ten sample messages")
            .arg(exit.help("end with a summary once every message is final")),
        verb("up", "API, producer, consumers and janitor in one process"),
        verb("api", "the HTTP API"),
        verb("producer", "the producer, with the janitor beside it")
            .subcommand(operator::verb("pause", "let all producers rest, over restarts too"))
            .subcommand(operator::verb("resume", "let them go on")),
        verb("consumer", "a consumer of the fresh lane"),
        verb("retry-consumer", "a consumer of a retry lane"),
    ]
}

/// What the settings are for.
pub(super) fn role(verb: &str) -> Role {
    match verb {
        "api" => Role::Api,
        "producer" => Role::Producer,
        "consumer" => Role::Consumer,
        "retry-consumer" => Role::RetryConsumer,
        "up" | "demo" => Role::Up,
        "testclient" => Role::TestClient,
        _ => Role::Tool,
    }
}

pub(super) async fn demo(
    config: Config,
    raw: &Raw,
    matches: &ArgMatches,
    stop: CancellationToken,
) -> app::Result<ExitCode> {
    app::demo::run(config, raw, matches.get_flag("exit-when-done"), stop).await
}

pub(super) async fn run(config: Config, stop: CancellationToken) -> app::Result<ExitCode> {
    let app = App::open(config)?;
    // As a task of its own: the runtime takes what wakes its first future for an event from outside, and looks
    // for more of them. At rest that is one system call in ten (strace).
    let serving = tokio::spawn(async move { app.run(&stop).await });
    serving.await.map_err(|error| AppError(format!("the services broke off: {error}")))??;
    Ok(ExitCode::SUCCESS)
}
