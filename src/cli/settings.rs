//! `ams config`: each setting with its value and where it came from.

use std::process::ExitCode;

use clap::{ArgMatches, Command};

use super::{json_arg, print};
use crate::app;
use crate::config::{Raw, Role, Setting, Source};

pub(super) fn command() -> Command {
    Command::new("config").about("each setting with its value and where it came from").arg(json_arg())
}

pub(super) fn run(raw: &Raw, matches: &ArgMatches) -> app::Result<ExitCode> {
    print(&config_text(raw, Role::Tool, matches.get_flag("json")))?;
    Ok(ExitCode::SUCCESS)
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
