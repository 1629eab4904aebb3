//! `ams completions`: what a shell reads to complete our verbs and flags.

use std::process::ExitCode;

use clap::{Arg, ArgMatches, Command};
use clap_complete::Shell;

use super::print;
use crate::app::{self, AppError};

pub(super) fn command() -> Command {
    let shell = Arg::new("shell").value_name("SHELL").required(true).value_parser(["bash", "zsh", "fish"]);
    Command::new("completions")
        .about("completions of bash, zsh or fish")
        .arg(shell.help("whose completions to print"))
        .after_help(
            "bash: ams completions bash > ~/.local/share/bash-completion/completions/ams\n\
             zsh:  ams completions zsh > a folder of $fpath, as _ams\n\
             fish: ams completions fish > ~/.config/fish/completions/ams.fish",
        )
}

pub(super) fn run(matches: &ArgMatches) -> app::Result<ExitCode> {
    let name = matches.get_one::<String>("shell").map_or("", String::as_str);
    let shell: Shell = name.parse().map_err(AppError)?;
    let mut script = Vec::new();
    clap_complete::generate(shell, &mut super::command(), "ams", &mut script);
    print(&String::from_utf8_lossy(&script))?;
    Ok(ExitCode::SUCCESS)
}
