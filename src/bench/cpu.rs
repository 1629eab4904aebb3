//! CPU time and memory of processes, read from `/proc`.

use std::collections::BTreeMap;

/// Clock ticks a second in `/proc`: 100 on every Linux that this runs on (`getconf CLK_TCK`).
const TICKS: f64 = 100.0;

/// A process that is watched, under the name it is reported by.
#[derive(Clone, Debug)]
pub(super) struct Watched {
    pub(super) name: String,
    pub(super) pid: u32,
}

/// All processes whose command is `command`, under one name.
pub(super) fn named(command: &str, name: &str) -> Vec<Watched> {
    let Ok(entries) = std::fs::read_dir("/proc") else { return Vec::new() };
    entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
        .filter(|pid: &u32| {
            std::fs::read_to_string(format!("/proc/{pid}/comm")).is_ok_and(|comm| comm.trim() == command)
        })
        .map(|pid| Watched { name: name.to_owned(), pid })
        .collect()
}

/// What processes have used so far.
#[derive(Clone, Debug, Default)]
pub(super) struct Usage {
    /// By name and process: CPU time in µs, and the peak of memory in MB.
    processes: BTreeMap<(String, u32), (f64, f64)>,
}

impl Usage {
    pub(super) fn of(processes: &[Watched]) -> Usage {
        let of = |process: &Watched| {
            let used = (cpu_us(process.pid)?, peak_memory_mb(process.pid).unwrap_or(0.0));
            Some(((process.name.clone(), process.pid), used))
        };
        Usage { processes: processes.iter().filter_map(of).collect() }
    }

    /// CPU time used since `before`, by name.
    pub(super) fn cpu_us_since(&self, before: &Usage) -> BTreeMap<String, f64> {
        let mut by_name = BTreeMap::new();
        for (process, (us, _)) in &self.processes {
            // Of one that was not there before all counts; one that has gone since takes what it used with it.
            let earlier = before.processes.get(process).map_or(0.0, |used| used.0);
            *by_name.entry(process.0.clone()).or_default() += (us - earlier).max(0.0);
        }
        by_name
    }

    /// The largest peak of memory of one process, by name.
    pub(super) fn memory_mb(&self) -> BTreeMap<String, f64> {
        let mut by_name: BTreeMap<String, f64> = BTreeMap::new();
        for ((name, _), (_, mb)) in &self.processes {
            let peak = by_name.entry(name.clone()).or_default();
            *peak = peak.max(*mb);
        }
        by_name
    }
}

/// User and system time of a process, in µs.
fn cpu_us(pid: u32) -> Option<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    // The command's name, in parentheses, may itself contain blanks; utime and stime are fields 14 and 15.
    let fields: Vec<&str> = stat.rsplit_once(')')?.1.split_whitespace().collect();
    let ticks = fields.get(11)?.parse::<f64>().ok()? + fields.get(12)?.parse::<f64>().ok()?;
    Some(ticks * 1e6 / TICKS)
}

fn peak_memory_mb(pid: u32) -> Option<f64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find(|line| line.starts_with("VmHWM:"))?;
    line.split_whitespace().nth(1)?.parse::<f64>().ok().map(|kb| kb / 1024.0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_has_used_something() {
        let watched = [Watched { name: "me".into(), pid: std::process::id() }];
        let before = Usage::of(&watched);
        let mut sum = 0_u64;
        while Usage::of(&watched).cpu_us_since(&before)["me"] < 20_000.0 {
            sum = (0..100_000_u64).fold(sum, |a, b| a.wrapping_mul(31).wrapping_add(b));
        }
        assert!(Usage::of(&watched).memory_mb()["me"] > 1.0, "{sum}");
    }
    #[test]
    fn each_process_is_compared_with_itself() {
        let usage = |all: &[(&str, u32, f64)]| {
            let of = |(name, pid, us): &(&str, u32, f64)| (((*name).to_owned(), *pid), (*us, 1.0));
            Usage { processes: all.iter().map(of).collect() }
        };
        let before = usage(&[("postgres", 1, 900.0), ("postgres", 2, 50.0)]);
        let after = usage(&[("postgres", 2, 70.0), ("postgres", 3, 5.0), ("redis", 4, 1.0)]);
        let used = BTreeMap::from([("postgres".to_owned(), 25.0), ("redis".to_owned(), 1.0)]);
        assert_eq!(after.cpu_us_since(&before), used);
    }
}
