//! A seeded simulation of the whole embedded system in virtual time: two processes with all services, on one store,
//! one queue and one cache, which outlive them.
//!
//! Processes crash, stop and start apart from each other; store, queue and cache fail; people cancel, redrive, pause
//! and close; clocks are set. After a while all of that ends, and soon every message has to be where it belongs.
//!
//! Nothing waits: the runtime's clock is paused and jumps to the next timer. Everything that is left to
//! chance comes from the seed, so a failing one replays:
//!
//! ```sh
//! AMS_SIMULATION_SEED=1234 cargo test --test simulation
//! AMS_SIMULATION_SEEDS=10000 cargo test --release --test simulation
//! ```
//!
//! `world` says what a run is, `node` how processes live and die, `faults` what fails, `events` what people and machines
//! do, `receivers` what becomes of requests. `history` notes what really happened; `check` and `healing` judge it.

mod check;
mod events;
mod faults;
mod healing;
mod history;
mod node;
mod receivers;
mod report;
mod world;

use std::cell::Cell;
use std::panic;
use std::sync::Once;

use report::Report;
use world::Run;

fn setting(name: &str) -> Option<u64> {
    #[expect(clippy::disallowed_methods, reason = "a test's own settings")]
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name} is `{text}`, which is no number")))
}

thread_local! {
    static PANICS: Cell<u32> = const { Cell::new(0) };
}

/// Counts panics: the runtime catches those of tasks, and goes on.
fn count_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let before = panic::take_hook();
        panic::set_hook(Box::new(move |panic| {
            PANICS.set(PANICS.get() + 1);
            before(panic);
        }));
    });
    PANICS.set(0);
}

fn run(seed: u64) -> Result<Run, String> {
    count_panics();
    let run = panic::catch_unwind(|| world::run(seed));
    match run {
        Ok(Ok(_)) if PANICS.get() > 0 => Err("a task has panicked".to_owned()),
        Ok(run) => run,
        Err(_) => Err("the world has panicked".to_owned()),
    }
}

#[test]
fn nothing_is_lost_and_duplicates_only_follow_crashes() {
    if let Some(seed) = setting("AMS_SIMULATION_SEED") {
        // A replay tells what happened.
        tracing_subscriber::fmt()
            .with_max_level(tracing::Level::DEBUG)
            .without_time()
            .with_writer(std::io::stderr)
            .init();
        let run = run(seed).unwrap_or_else(|broken| panic!("seed {seed}: {broken}"));
        println!("seed {seed}: {}", run.report);
        return;
    }
    let first = setting("AMS_SIMULATION_FIRST").unwrap_or(0);
    let seeds = setting("AMS_SIMULATION_SEEDS").unwrap_or(500);
    let mut sum = Report::default();
    let mut broken = Vec::new();
    for seed in first..first + seeds {
        match run(seed) {
            Ok(run) => sum.add(&run.report),
            Err(why) => broken.push(format!("seed {seed}: {why}")),
        }
    }
    println!("{seeds} seeds: {sum}");
    assert!(
        broken.is_empty(),
        "{} seeds failed; replay one with AMS_SIMULATION_SEED=… cargo test --test simulation\n{}",
        broken.len(),
        broken[..broken.len().min(20)].join("\n")
    );
    let missing = sum.missing();
    assert!(seeds < 100 || missing.is_empty(), "these did not happen: {missing:?}");
}

#[test]
fn a_seed_replays() {
    for seed in 0..setting("AMS_SIMULATION_REPLAYS").unwrap_or(10) {
        assert_eq!(run(seed), run(seed), "seed {seed}");
    }
}
