//! Prevents: a process that trusts what its killed predecessor left in volatile caches, and loses it with the power.

use std::collections::BTreeMap;
use std::sync::Arc;

use pccheck::medium::sim::{Note, SimMedium, SimModel, SimSchedule, Trace};
use pccheck::medium::Barrier;

use crate::explore::{kill_then_lose_power, record, report, scale, Counts, Effort, MODELS};
use crate::histories::{History, FAILING, FORCED, STEADY, USES, WRAPPING};
use crate::power::reordered;
use crate::world::{format_on, label, Setup};

pub fn kill_all(test: &str, histories: &[History], schedule: SimSchedule, follow: (u64, Effort)) {
    let mut counts = BTreeMap::new();
    for History { name, setup, script } in histories {
        for model in MODELS {
            let trace = record(setup, model, schedule, *script);
            let found = kill_then_lose_power(setup, &trace, follow, &[])
                .unwrap_or_else(|finding| panic!("{name}, {model:?}, {schedule:?}: {finding}"));
            counts.insert(format!("{name}, {model:?}"), found);
        }
    }
    report(test, &counts);
}

#[test]
fn killed_reopened_saved_then_power_lost() {
    kill_all("kills", &WRAPPING, SimSchedule::Inline, (12 / scale().min(12), Effort::small()));
    kill_all(
        "kills of reordered saves",
        &WRAPPING[2..4],
        reordered(5),
        (12 / scale().min(12), Effort::small()),
    );
}

#[test]
fn kills_amid_pins_marks_discards_failures_and_streams() {
    kill_all("kills amid uses", &USES, SimSchedule::Inline, (12 / scale().min(12), Effort::small()));
    kill_all("kills amid forced orders", &FORCED, SimSchedule::Inline, (6 / scale().min(6), Effort::small()));
}

/// The next life believes what the chunk tables of the last one say.
#[test]
fn kills_of_saves_that_find_chunks_in_their_places() {
    kill_all(
        "kills, unchanged chunks",
        &STEADY,
        SimSchedule::Inline,
        (12 / scale().min(12), Effort::small()),
    );
}

#[test]
fn killed_after_flushes_that_failed() {
    kill_all("kills after failed flushes", &FAILING, SimSchedule::Inline, (1, Effort::thorough()));
}

/// Formatting, killed everywhere; every kill is followed up.
pub fn kill_the_formatter(setup: &Setup, model: SimModel, removed: &[Barrier]) -> Result<Counts, String> {
    let sim = Arc::new(SimMedium::new(setup.sim_bytes(), model));
    sim.note(Note::Other { label: label::WATCH, value: 0 });
    format_on(&sim, setup);
    kill_then_lose_power(setup, &sim.trace(), (1, Effort::thorough()), removed)
}

#[test]
fn a_region_whose_formatter_was_killed_is_none_or_sound() {
    for model in MODELS {
        let counts = kill_the_formatter(&Setup::tight(1, 1), model, &[])
            .unwrap_or_else(|finding| panic!("{model:?}: {finding}"));
        assert!(counts.second_lives > 3, "{model:?}: {counts}");
    }
}

/// The end of a history on a failing medium, with the next life lacking `removed`.
pub fn kill_on_failing_medium(
    history: &History,
    model: SimModel,
    removed: &[Barrier],
) -> Result<Counts, String> {
    let trace: Trace = record(&history.setup, model, SimSchedule::Inline, history.script);
    kill_then_lose_power(&history.setup, &trace, (1, Effort::thorough()), removed)
}
