//! What the operators' verbs share: the API, the screen, and the flags that go with both.

use std::process::ExitCode;
use std::time::Duration;

use clap::{Arg, ArgMatches, Command};
use serde::de::DeserializeOwned;
use serde_json::Value;
use tokio_util::sync::CancellationToken;

use super::client::Client;
use super::screen::Screen;
use super::{json_arg, setting_arg};
use crate::app::{self, AppError};
use crate::clock::Clock;
use crate::config::{Config, SETTINGS};

/// The settings that these verbs go by.
const OWN_SETTINGS: &[&str] = &["AMS_URL", "AMS_KEY", "REQUEST_CA_FILE", "NO_COLOR"];

/// What an operator's verb works with.
pub(super) struct Operator {
    pub(super) client: Client,
    pub(super) screen: Screen,
    pub(super) clock: Clock,
    /// Somebody has pressed Ctrl-C.
    pub(super) stop: CancellationToken,
}

impl Operator {
    /// Takes up the settings and the flags of a verb made by [`verb`].
    ///
    /// # Errors
    /// As [`Client::new`].
    pub(super) fn new(
        config: &Config,
        matches: &ArgMatches,
        stop: CancellationToken,
    ) -> app::Result<Operator> {
        let screen = Screen::new(config.log.colour, lowest(matches).get_flag("json"));
        Ok(Operator { client: Client::new(config)?, screen, clock: Clock::system(), stop })
    }

    /// Waits, or until somebody presses Ctrl-C.
    pub(super) async fn pause(&self, time: Duration) {
        tokio::select! {
            () = self.stop.cancelled() => {}
            () = tokio::time::sleep(time) => {}
        }
    }
}

/// An operator's verb: with `--json` and the settings that it needs, also after its own verbs.
pub(super) fn verb(name: &'static str, about: &'static str) -> Command {
    let own = SETTINGS.iter().filter(|setting| OWN_SETTINGS.contains(&setting.name));
    Command::new(name)
        .about(about)
        .arg(json_arg().global(true))
        .args(own.map(|setting| setting_arg(setting).global(true)))
}

/// What was given to the lowest verb.
fn lowest(matches: &ArgMatches) -> &ArgMatches {
    matches.subcommand().map_or(matches, |(_, matches)| lowest(matches))
}

/// The verb below a verb, and what was given to it.
pub(super) fn below(matches: &ArgMatches) -> (&str, &ArgMatches) {
    matches.subcommand().unwrap_or(("", matches))
}

/// A flag that takes a text.
pub(super) fn option(name: &'static str, value: &'static str, help: &'static str) -> Arg {
    Arg::new(name).long(name).value_name(value).help(help)
}

/// The text of a flag or argument.
pub(super) fn text<'a>(matches: &'a ArgMatches, name: &str) -> Option<&'a str> {
    matches.get_one::<String>(name).map(String::as_str)
}

/// Tells what is wrong with how a verb was called.
pub(super) fn wrong_use(sentence: &str) -> ExitCode {
    eprintln!("ams: {sentence}");
    ExitCode::from(2)
}

/// What of an answer is needed.
///
/// # Errors
/// When the API answers in another shape: it is of another age.
pub(super) fn read<T: DeserializeOwned>(answer: &Value) -> app::Result<T> {
    T::deserialize(answer).map_err(|error| {
        let ours = env!("CARGO_PKG_VERSION");
        AppError(format!(
            "the API's answer is not understood: {error}; it may be of another version than this program, {ours}"
        ))
    })
}
