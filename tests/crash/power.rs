//! Prevents: power loss at any barrier of any history breaking a promise.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use pccheck::medium::sim::{for_each_crash_image, EnumerateOptions, Note, SimMedium, SimModel, SimSchedule};
use pccheck::medium::Barrier;
use pccheck::recovery::read_region;
use pccheck::save::Faults;

use crate::explore::{lose_power, record, report, seed, Effort, MODELS};
use crate::histories::{History, FORCED, STEADY, USES, WRAPPING};
use crate::judge::{judge, Promises};
use crate::world::{final_image, format_on, formatted, Life, Setup};

/// Generations that the engine leases at once; the test fails where that is not so.
const LEASE_GENERATIONS: u64 = 1024;

pub fn reordered(salt: u64) -> SimSchedule {
    SimSchedule::Reordered { seed: seed() * 100 + salt, max_delay: Duration::from_micros(300) }
}

pub fn explore_all(test: &str, histories: &[History], schedules: &[SimSchedule]) {
    let mut counts = BTreeMap::new();
    for History { name, setup, script } in histories {
        for model in MODELS {
            for (at, schedule) in schedules.iter().enumerate() {
                let trace = record(setup, model, *schedule, *script);
                let found = lose_power(setup, &trace, &Effort::usual())
                    .unwrap_or_else(|finding| panic!("{name}, {model:?}, {schedule:?}: {finding}"));
                counts.insert(format!("{name}, {model:?}, schedule {at}"), found);
            }
        }
    }
    report(test, &counts);
}

#[test]
fn saves_that_wrap_around_all_slots() {
    explore_all("wrap-around", &WRAPPING, &[SimSchedule::Inline]);
}

#[test]
fn saves_that_complete_in_any_order() {
    explore_all("any order", &WRAPPING[2..6], &[reordered(1), reordered(2)]);
}

#[test]
fn saves_of_what_is_there_already() {
    explore_all("unchanged chunks", &STEADY, &[SimSchedule::Inline]);
    explore_all("unchanged chunks in any order", &STEADY[1..2], &[reordered(5)]);
}

#[test]
fn pins_marks_discards_failures_and_streams() {
    explore_all("uses", &USES, &[SimSchedule::Inline, reordered(3)]);
}

#[test]
fn forced_orders_of_commit() {
    explore_all("forced", &FORCED, &[SimSchedule::Inline, reordered(4)]);
}

#[test]
fn a_lease_that_runs_out_in_mid_run() {
    let setup = Setup::tight(2, 1);
    let mut counts = BTreeMap::new();
    for model in MODELS {
        let sim = formatted(&setup, model);
        let life = Life::open(&sim, &setup, Faults::default()).expect("open");
        // Half of a lease is left: the next saves extend it.
        while life.store.stats().newest_generation < LEASE_GENERATIONS / 2 - 3 {
            life.save();
        }
        let before = sim.barrier_counts()[&Barrier::Control];
        life.watch_from_here();
        life.rounds(6);
        assert!(sim.barrier_counts()[&Barrier::Control] > before, "no lease was taken");
        drop(life);
        let effort = Effort { images_per_point: 0, samples_per_point: 2, live_on_every: u64::MAX };
        let found = lose_power(&setup, &sim.trace(), &effort)
            .unwrap_or_else(|finding| panic!("{model:?}: {finding}"));
        counts.insert(format!("{model:?}"), found);
    }
    report("lease", &counts);
}

#[test]
fn formatting_leaves_a_region_or_none() {
    let setup = Setup::tight(1, 1);
    for model in MODELS {
        let sim = Arc::new(SimMedium::new(setup.sim_bytes(), model));
        format_on(&sim, &setup);
        sim.note(Note::Acknowledged { generation: 0 });
        let (mut regions, mut none) = (0, 0);
        for_each_crash_image(&sim.trace(), &EnumerateOptions::default(), |_, image| {
            let read = |offset: u64, dst: &mut [u8]| {
                image.read(offset, dst);
                Ok(())
            };
            match read_region(read, image.len_bytes()) {
                Ok(table) if table.newest_first.is_empty() && table.control.is_some() => regions += 1,
                Ok(table) => return Err(format!("half a region: {:?}", table.notes)),
                Err(_) if image.notes().is_empty() => none += 1,
                Err(e) => return Err(format!("formatted, and then: {e}")),
            }
            Ok(())
        })
        .unwrap_or_else(|finding| panic!("{model:?}: {finding}"));
        assert!(regions > 1 && none > 1, "{model:?}: {regions} regions, {none} without");
    }
}

#[test]
fn a_force_format_never_mixes_old_and_new() {
    let setup = Setup::tight(1, 1);
    for model in MODELS {
        let sim = formatted(&setup, model);
        let life = Life::open(&sim, &setup, Faults::default()).expect("open");
        let old = life.store.region().superblock().uuid;
        life.rounds(3);
        let issued = Promises::of(final_image(&sim).notes()).issued;
        drop(life);
        let sim = Arc::new(final_image(&sim).to_medium());
        format_on(&sim, &setup);
        let options = EnumerateOptions { images_per_point: 1 << 8, ..EnumerateOptions::default() };
        for_each_crash_image(&sim.trace(), &options, |_, image| {
            let read = |offset: u64, dst: &mut [u8]| {
                image.read(offset, dst);
                Ok(())
            };
            let Ok(table) = read_region(read, image.len_bytes()) else { return Ok(()) };
            let records = table.newest_first.len();
            match table.superblock.uuid == old {
                // The old superblocks go first, one after the other; until both are gone all of it is there.
                true if records == 2 && table.next_generation > issued => Ok(()),
                false if records == 0 => Ok(()),
                mixed => Err(format!("old region: {mixed}, with {records} checkpoints")),
            }
        })
        .unwrap_or_else(|finding| panic!("{model:?}: {finding}"));
    }
}

/// The one thing that the protocol asks of a disk beyond the fault model: see "Preconditions" in the argument.
#[test]
fn only_adoption_needs_sectors_that_survive_being_rewritten_unchanged() {
    let setup = Setup::tight(1, 1);
    let sim = formatted(&setup, SimModel::Ssd { torn: true });
    let life = Life::open(&sim, &setup, Faults::default()).expect("open");
    life.rounds(3);
    drop(life);
    let sim = Arc::new(final_image(&sim).to_medium());
    let life = Life::open(&sim, &setup, Faults::default()).expect("open again");
    life.rounds(5);
    drop(life);
    let options = EnumerateOptions { tear_unchanged: true, ..Effort::usual().options(seed()) };
    let (mut at_adoption, mut elsewhere) = (0, 0);
    for_each_crash_image(&sim.trace(), &options, |point, image| {
        let seen = judge(&setup, image.notes(), |offset, dst| {
            image.read(offset, dst);
            Ok(())
        });
        match (seen, point.before.contains("(Adopt")) {
            (Err(_), true) => at_adoption += 1,
            (Err(finding), false) => return Err(finding),
            (Ok(_), _) => elsewhere += 1,
        }
        Ok(())
    })
    .unwrap_or_else(|finding| panic!("{finding}"));
    assert!(elsewhere > 1000, "{elsewhere} images were sound");
    assert!(at_adoption > 0, "the precondition is not needed any more: say so in the argument");
}
