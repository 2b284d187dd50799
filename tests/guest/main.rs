//! Prevents: persistent memory that only seems to be supported. Debian's kernel runs in QEMU with memory that it takes for
//! persistent, ext4 or XFS is mounted there with `dax=always`, and the engine's own tests run on it with MAP_SYNC; then the
//! machine is killed in mid-save, over and over, and every time it starts again the engine must find what it had called durable.
//!
//! `scripts/guest` prepares the guest and runs this. A killed QEMU keeps every store that the guest made: what is shown is that the
//! code works on DAX and recovers there; that no flush is missing is shown by the crash enumeration.

#[path = "../sigkill/child.rs"]
mod child;
#[path = "../common/mod.rs"]
mod common;
#[path = "../sigkill/content.rs"]
mod content;
mod machine;
#[path = "../sigkill/reports.rs"]
mod reports;

use std::env;
use std::path::Path;
use std::time::Duration;

use child::{Orders, Way};
use content::Random;
use machine::Machine;
use pccheck::engine::{format_region, Store};
use pccheck::store::{FormatOptions, OpenOptions};
use reports::{Known, Reports};

const REGION: &str = "/mnt/region";
const SLOTS: u32 = 6;
/// An emulated processor is slow: long enough for several saves.
const LONGEST_LIFE_MS: u64 = 1500;
const KILL_OPENING_EVERY: usize = 3;
const LONGEST_OPENING_MS: u64 = 150;
const STEPS_PER_LIFE: u64 = 1_000_000;
/// What `scripts/guest` puts into the guest.
const PROGRAMS: [&str; 4] = ["concurrency", "engine", "pccheck", "unchanged"];

/// The body of the guest's process: tells what it finds in the region, then saves until the machine is killed.
#[test]
fn guest_process() {
    let Some(orders) = Orders::from_env() else { return };
    let reports = Reports::open();
    reports.say("opening");
    if let Err(what) = tell_found(&orders, &reports) {
        return reports.say(&format!("error {what}"));
    }
    child::run_if_child();
}

fn tell_found(orders: &Orders, reports: &Reports) -> Result<(), String> {
    if !orders.region.exists() {
        let format = FormatOptions::new(SLOTS, content::PAYLOAD_BYTES);
        format_region(&orders.region, &format).map_err(|error| error.to_string())?;
    }
    let options = OpenOptions { read_only: true, ..orders.way.options(orders.in_flight, orders.keep) };
    let store = Store::open(&orders.region, &options).map_err(|error| error.to_string())?;
    for (generation, step) in content::check_all(&store)? {
        reports.say(&format!("found {generation} {step}"));
    }
    Ok(())
}

fn orders(nth: usize, lie: bool) -> Orders {
    Orders {
        region: REGION.into(),
        way: Way::Dax,
        in_flight: 1 + nth as u32 % 3,
        keep: 1 + nth as u32 % 2,
        first_step: (nth as u64 + 1) * STEPS_PER_LIFE,
        lie,
    }
}

/// Lives of one machine; what a life reported is held against what the next one finds.
fn live(file_system: &str, kills: usize, seed: u64, lie: bool) -> Result<(usize, usize), String> {
    let machine = Machine::new(file_system);
    let mut random = Random(seed);
    let mut known = Known::default();
    let (mut durable, mut found) = (0, 0);
    let mut before: Option<(reports::Said, u32)> = None;
    for nth in 0..=kills {
        let orders = orders(nth, lie);
        // Not the last: it is what tells of the one before.
        let in_opening = nth % KILL_OPENING_EVERY == KILL_OPENING_EVERY - 1 && nth < kills;
        let (after, life_ms) = match in_opening {
            true => ("opening", random.below(LONGEST_OPENING_MS)),
            false => ("ready", random.below(LONGEST_LIFE_MS)),
        };
        let said = machine.run_and_kill(&orders.to_env(), after, Duration::from_millis(life_ms))?;
        let whole = !said.path.is_empty();
        if !whole {
            // It was killed while it looked: the next one tells.
            continue;
        }
        known.check_listed(&said.found)?;
        if let Some((before, keep)) = &before {
            known.check_durable(&said.found, *keep, before)?;
        }
        known.learn(&said)?;
        durable += said.durable.len();
        found += said.found.len();
        before = Some((said, orders.keep));
    }
    Ok((durable, found))
}

#[test]
fn killed_machines_lose_nothing_durable() {
    if env::var_os(machine::ENV_GUEST).is_none() {
        panic!("scripts/guest prepares the guest and runs this");
    }
    let kills: usize = env::var("PCC_GUEST_KILLS").map_or(3, |text| text.parse().expect("a number"));
    let seed: u64 = env::var("PCC_GUEST_SEED").map_or(1, |text| text.parse().expect("a number"));
    for file_system in ["ext4", "xfs"] {
        let (durable, found) = live(file_system, kills, seed, false)
            .unwrap_or_else(|what| panic!("{file_system}, seed {seed}: {what}"));
        println!("{file_system}: {kills} kills, {durable} saves reported durable, {found} checkpoints found, none lost");
        assert!(durable > kills, "{file_system}: the kills came too early to test anything");
    }
}

/// The check itself can fail.
#[test]
fn a_guest_that_lies_about_durability_is_caught() {
    let what = live("ext4", 4, 7, true).expect_err("a lie went unnoticed");
    assert!(what.contains("was reported durable"), "caught for the wrong reason: {what}");
}

/// The engine's own tests inside, on both file systems.
#[test]
fn the_engines_tests_pass_on_dax() {
    for file_system in ["ext4", "xfs"] {
        let machine = Machine::new(file_system);
        let ran = machine.run_tests(Path::new(REGION).parent().expect("a folder"));
        println!("{file_system}: passed {ran:?}");
        let programs: Vec<&str> = ran.iter().map(|(program, _)| program.as_str()).collect();
        assert_eq!(programs, PROGRAMS, "{file_system}");
        assert!(ran.iter().all(|&(_, passed)| passed > 0), "{file_system}: a program ran no test");
    }
}
