//! `ams migrate`: brings the store to this version.

use std::process::ExitCode;

use clap::{Arg, ArgAction, ArgMatches, Command};

use super::print;
use crate::app::{self, AppError};
use crate::config::Config;

pub(super) fn command() -> Command {
    let check = Arg::new("check").long("check").help("apply nothing; exit 1 if any is missing");
    Command::new("migrate").about("apply the store's migrations").arg(check.action(ArgAction::SetTrue))
}

pub(super) async fn run(config: &Config, matches: &ArgMatches) -> app::Result<ExitCode> {
    let store = app::open_store(&config.store)?;
    let sentence = |error: crate::store::StoreError| AppError(error.to_string());
    if matches.get_flag("check") {
        let missing = store.missing_migrations().await.map_err(sentence)?;
        print(&missing.iter().map(|name| format!("missing: {name}\n")).collect::<String>())?;
        return Ok(if missing.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE });
    }
    let applied = store.migrate().await.map_err(sentence)?;
    print(&applied.iter().map(|name| format!("applied: {name}\n")).collect::<String>())?;
    if applied.is_empty() {
        let newer = store.schema_version().await.map_err(sentence)?.newer;
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
