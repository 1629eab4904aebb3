//! A seeded simulation of the whole embedded system: the real services on the embedded store, queue
//! and cache, in virtual time, with faults and crashes at any store call or delivery.
//!
//! Nothing waits: the runtime's clock is paused and jumps to the next timer. Everything that is left to
//! chance comes from the seed, so a failing one replays:
//!
//! ```sh
//! AMS_SIMULATION_SEED=1234 cargo test --test simulation
//! AMS_SIMULATION_SEEDS=10000 cargo test --release --test simulation
//! ```

mod faults;
mod world;

use world::World;

fn setting(name: &str) -> Option<u64> {
    #[expect(clippy::disallowed_methods, reason = "a test's own settings")]
    let text = std::env::var(name).ok()?;
    Some(text.parse().unwrap_or_else(|_| panic!("{name} is `{text}`, which is no number")))
}

fn run(seed: u64) -> Result<world::Report, String> {
    let run = std::panic::catch_unwind(|| World::new(seed).run());
    run.unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        Err(text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned())).unwrap_or_default())
    })
}

#[test]
fn nothing_is_lost_and_duplicates_only_follow_crashes() {
    if let Some(seed) = setting("AMS_SIMULATION_SEED") {
        // A replay tells what happened.
        tracing_subscriber::fmt().with_max_level(tracing::Level::DEBUG).with_writer(std::io::stderr).init();
        let report = run(seed).unwrap_or_else(|broken| panic!("seed {seed}: {broken}"));
        println!("seed {seed}: {report:?}");
        return;
    }
    let seeds = setting("AMS_SIMULATION_SEEDS").unwrap_or(500);
    let mut sum = world::Report::default();
    for seed in 0..seeds {
        match run(seed) {
            Ok(report) => sum.add(&report),
            Err(broken) => panic!(
                "seed {seed}: {broken}\nreplay: AMS_SIMULATION_SEED={seed} cargo test --test simulation"
            ),
        }
    }
    println!("{seeds} seeds: {sum:?}");
    assert!(
        seeds < 100 || (sum.crashes > 0 && sum.faults > 0 && sum.dead > 0),
        "the faults did not happen: {sum:?}"
    );
}

#[test]
fn a_seed_replays() {
    let (one, other) = (run(7).unwrap(), run(7).unwrap());
    assert_eq!(one, other);
}
