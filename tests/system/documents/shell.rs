//! The shell of somebody who follows a page.

use std::os::unix::fs::symlink;
use std::process::Stdio;
use std::time::Duration;

use ams::clock::Clock;
use ams::config::SETTINGS;
use tokio::io::{AsyncBufReadExt, AsyncReadExt, AsyncWriteExt, BufReader, Lines};
use tokio::net::TcpStream;
use tokio::process::{Child, ChildStdin, ChildStdout, Command};

use crate::harness::*;

/// How long a command may take, and an answer or what is to be printed be waited for.
const LIMIT: Duration = Duration::from_secs(90);

/// What is started in the background and then used at once: a word of the command, its port, and what it answers
/// when it is there.
const ANSWERING: &[(&str, u16, &str)] = &[
    ("testclient", 3000, "HTTP/"),
    ("receiver.py", 3000, "HTTP/"),
    ("up", 8080, " 200 "),
    ("api", 8080, " 200 "),
];

/// A shell in a folder of its own, with a database of its own.
pub struct Shell {
    bash: Child,
    commands: ChildStdin,
    said: Lines<BufReader<ChildStdout>>,
    folder: tempfile::TempDir,
    database: String,
    count: usize,
}

impl Shell {
    pub async fn start() -> Shell {
        let checkout = std::env::current_dir().unwrap();
        let folder = tempfile::tempdir().unwrap();
        let program = setting("AMS_TEST_BINARY").unwrap_or_else(|| env!("CARGO_BIN_EXE_ams").to_owned());
        for name in ["target/release", ".printed"] {
            std::fs::create_dir_all(folder.path().join(name)).unwrap();
        }
        symlink(program, folder.path().join("target/release/ams")).unwrap();
        for name in ["deploy", "dev", "docs", "migrations"] {
            symlink(checkout.join(name), folder.path().join(name)).unwrap();
        }
        let database = format!("documents_{:08x}", fastrand::u32(..));
        let mut command = Command::new("bash");
        for name in SETTINGS.iter().map(|setting| setting.name) {
            command.env_remove(name);
        }
        command.env("AMS_PG_DATABASE", &database).env("PSQLRC", "/dev/null").env("LC_ALL", "C.UTF-8");
        command.current_dir(folder.path()).process_group(0).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut bash = command.spawn().unwrap();
        let commands = bash.stdin.take().unwrap();
        let said = BufReader::new(bash.stdout.take().unwrap()).lines();
        Shell { bash, commands, said, folder, database, count: 0 }
    }

    pub fn save(&mut self, file: &str, text: &str) -> Result<(), String> {
        std::fs::write(self.folder.path().join(file), text).map_err(|error| format!("{file}: {error}"))
    }

    /// Runs commands; the last again until all together print what is shown, if anything is.
    pub async fn run(&mut self, commands: &[String], shown: Option<&str>) -> Result<(), String> {
        let Some((last, first)) = commands.split_last() else { return Ok(()) };
        let mut before = String::new();
        for command in first {
            before += &self.succeed(command).await?;
        }
        let Some(shown) = shown else { return self.succeed(last).await.map(drop) };
        let watch = Clock::system().stopwatch();
        let mut tick = tokio::time::interval(Duration::from_millis(200));
        loop {
            tick.tick().await;
            let printed = before.clone() + &self.command(last).await?.1;
            if prints(shown, &printed) {
                return Ok(());
            }
            self.count -= 1;
            if watch.elapsed() > LIMIT {
                return Err(format!("{last}prints\n{printed}\nand not\n{shown}\n{}", self.all_printed()));
            }
        }
    }

    async fn succeed(&mut self, command: &str) -> Result<String, String> {
        let (status, printed) = self.command(command).await?;
        // What a page stops has ended by that signal, and `wait` says so.
        let stopped = status == "143" && command.starts_with("kill ");
        if status != "0" && !stopped {
            return Err(format!("{command}exit {status}: {printed}\n{}", self.all_printed()));
        }
        for (word, port, answer) in ANSWERING {
            let code = command.split(" #").next().unwrap_or_default().trim_end();
            if code.ends_with('&') && code.split([' ', '/']).any(|found| found == *word) {
                answers(*port, answer)
                    .await
                    .map_err(|why| format!("{command}{why}\n{}", self.all_printed()))?;
            }
        }
        Ok(printed)
    }

    /// The exit status of a command and what it printed.
    async fn command(&mut self, command: &str) -> Result<(String, String), String> {
        self.count += 1;
        let file = self.folder.path().join(format!(".printed/{:03}", self.count));
        let script = format!("{{\n{command}}} </dev/null >{} 2>&1; echo \"$?\"\n", file.display());
        self.commands.write_all(script.as_bytes()).await.map_err(|error| format!("{command}{error}"))?;
        let status = tokio::time::timeout(LIMIT, self.said.next_line()).await;
        let printed = String::from_utf8_lossy(&std::fs::read(&file).unwrap_or_default()).into_owned();
        match status {
            Ok(Ok(Some(status))) => Ok((status, printed)),
            Ok(_) => Err(format!("{command}ended the shell: {printed}")),
            Err(_) => Err(format!("{command}has not ended after {LIMIT:?}: {printed}")),
        }
    }

    /// The end of what each command printed, services included.
    fn all_printed(&self) -> String {
        let mut all = String::new();
        for number in 1..=self.count {
            let file = self.folder.path().join(format!(".printed/{number:03}"));
            let printed = String::from_utf8_lossy(&std::fs::read(file).unwrap_or_default()).into_owned();
            let lines: Vec<_> = printed.lines().collect();
            all += &format!("{number}: {}\n", lines[lines.len().saturating_sub(12)..].join("\n   "));
        }
        all
    }

    /// Stops what the page has started, as a reader would, and drops the database.
    pub async fn end(mut self) -> Result<(), String> {
        self.command("jobs -p | xargs -r kill; wait\n").await?;
        let (_, url) = self.command("dev/services env postgres\n").await?;
        if let Some((url, _)) =
            url.trim().split_once('=').map(|(_, url)| url).and_then(|url| url.rsplit_once('/'))
        {
            let drop = format!("drop database if exists {} with (force)", self.database);
            sql_on(&format!("{url}/postgres"))
                .await
                .batch_execute(&drop)
                .await
                .map_err(|error| error.to_string())?;
        }
        Ok(())
    }
}

impl Drop for Shell {
    /// Whatever is left after a failure.
    fn drop(&mut self) {
        if let Some(pid) = self.bash.id() {
            let group = format!("-{pid}");
            let _ = std::process::Command::new("kill").args(["-KILL", "--", &group]).status();
        }
    }
}

/// Asks a port until the answer contains `wanted`.
async fn answers(port: u16, wanted: &str) -> Result<(), String> {
    let watch = Clock::system().stopwatch();
    let mut tick = tokio::time::interval(Duration::from_millis(50));
    while !ask(port).await.is_ok_and(|answer| answer.contains(wanted)) {
        if watch.elapsed() > LIMIT {
            return Err(format!("nothing answers on port {port} after {LIMIT:?}"));
        }
        tick.tick().await;
    }
    Ok(())
}

async fn ask(port: u16) -> std::io::Result<String> {
    let mut connection = TcpStream::connect(("127.0.0.1", port)).await?;
    connection.write_all(b"GET /readyz HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n").await?;
    let mut answer = [0; 64];
    let length = connection.read(&mut answer).await?;
    Ok(String::from_utf8_lossy(&answer[..length]).into_owned())
}

/// Whether a page shows what was printed, or the last lines of it; `…` stands for anything.
pub fn prints(shown: &str, printed: &str) -> bool {
    let tidy = |text: &str| text.lines().map(str::trim_end).collect::<Vec<_>>().join("\n");
    let (shown, printed) =
        (format!("…\n{}", tidy(shown.trim_matches('\n'))), format!("\n{}", tidy(printed.trim_end())));
    let mut parts = shown.split('…');
    let Some(mut rest) = parts.next().and_then(|start| printed.strip_prefix(start)) else { return false };
    let mut parts: Vec<_> = parts.collect();
    let Some(end) = parts.pop() else { return rest.is_empty() };
    for part in parts {
        let Some(at) = rest.find(part) else { return false };
        rest = &rest[at + part.len()..];
    }
    rest.ends_with(end)
}
