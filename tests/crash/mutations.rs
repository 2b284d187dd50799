//! Prevents: a crash checker that would pass a broken protocol. Each barrier is removed in turn and each planted
//! fault is switched on; the checker must find it on the models named here, and on the others the thing removed
//! is redundant, which is checked as well, so that this table stays true.

use pccheck::medium::sim::{SimModel, SimSchedule};
use pccheck::medium::Barrier;
use pccheck::save::Faults;

use crate::explore::{lose_power, run, Effort, Protocol, MODELS};
use crate::histories::{History, FAILING, FORCED, STEADY, USES, WRAPPING};
use crate::kills::{kill_on_failing_medium, kill_the_formatter};
use crate::world::Setup;

const PMEM: SimModel = SimModel::Pmem;
const SSD: SimModel = SimModel::Ssd { torn: true };
const CACHE: SimModel = SimModel::PageCache;

/// Chunks that change are stored into their places on persistent memory, whatever is known of these, but where the
/// writing mark is slow: there it depends on the scheduler whether a false belief does harm.
const WRITTEN: [SimModel; 2] = [SSD, CACHE];

/// What the checker says of `history` under a broken protocol.
fn found(history: &History, model: SimModel, protocol: Protocol) -> Option<String> {
    let effort = Effort { live_on_every: u64::MAX, ..Effort::usual() };
    let sim = run(&history.setup, model, SimSchedule::Inline, history.script, protocol);
    lose_power(&history.setup, &sim.trace(), &effort).err()
}

pub fn must_be_caught(what: &str, histories: &[&History], protocol: Protocol, on: &[SimModel]) {
    for model in MODELS {
        must_be_caught_if(on.contains(&model), what, histories, protocol, model);
    }
}

fn must_be_caught_if(
    expected: bool,
    what: &str,
    histories: &[&History],
    protocol: Protocol,
    model: SimModel,
) {
    for history in histories {
        let finding = found(history, model, protocol);
        println!("{what}, {}, {model:?}: {}", history.name, finding.as_deref().unwrap_or("nothing found"));
        assert_eq!(finding.is_some(), expected, "{what}, {}, {model:?}: {finding:?}", history.name);
    }
}

pub fn without(barrier: Barrier) -> Protocol {
    Protocol { removed: Some(barrier), ..Protocol::default() }
}

fn with(plant: impl FnOnce(&mut Faults)) -> Protocol {
    let mut protocol = Protocol::default();
    plant(&mut protocol.faults);
    protocol
}

/// One save at a time, and several.
const SAVES: [&History; 2] = [&WRAPPING[0], &WRAPPING[2]];

#[test]
fn without_the_writing_mark() {
    must_be_caught("no WritingMark barrier", &SAVES, without(Barrier::WritingMark), &MODELS);
    must_be_caught("no writing mark", &SAVES, with(|faults| faults.skip_writing_mark = true), &MODELS);
}

#[test]
fn without_the_copying_threads_fence() {
    // Elsewhere a fence orders nothing on the medium: the flush of the payload covers every thread's writes.
    must_be_caught("no Chunk barrier", &SAVES, without(Barrier::Chunk), &[PMEM]);
}

#[test]
fn without_the_payload_flush() {
    // On pmem each storing thread has fenced its own chunks before the save can commit.
    must_be_caught("no Payload barrier", &SAVES, without(Barrier::Payload), &[SSD, CACHE]);
    let late = with(|faults| faults.commit_before_payload = true);
    must_be_caught("commit before the payload flush", &SAVES, late, &[SSD, CACHE]);
}

#[test]
fn without_the_commit_flush() {
    must_be_caught("no Commit barrier", &SAVES, without(Barrier::Commit), &MODELS);
}

#[test]
fn without_the_control_flush() {
    let (pins, discards) = (&USES[0], &USES[2]);
    must_be_caught("no Control barrier", &[pins, discards], without(Barrier::Control), &MODELS);
}

#[test]
fn freeing_before_the_commit_is_durable() {
    let early = with(|faults| faults.free_before_commit = true);
    must_be_caught("freed before commit", &[&FORCED[3]], early, &MODELS);
}

#[test]
fn committing_on_the_last_chunk() {
    let early = with(|faults| faults.commit_on_last_chunk = true);
    must_be_caught("commit on the last chunk", &[&FORCED[2]], early, &MODELS);
}

#[test]
fn pinning_after_the_commit() {
    let late = with(|faults| faults.pin_after_commit = true);
    must_be_caught("pinned after commit", &[&USES[7]], late, &MODELS);
}

#[test]
fn believing_in_chunks_that_were_overwritten() {
    let late = with(|faults| faults.remember_overwritten = true);
    for model in WRITTEN {
        must_be_caught_if(true, "overwritten chunks remembered", &[&STEADY[2], &STEADY[4]], late, model);
    }
}

#[test]
fn believing_in_chunks_that_no_save_has_committed() {
    let early = with(|faults| faults.know_uncommitted = true);
    for model in WRITTEN {
        must_be_caught_if(true, "uncommitted chunks known", &[&STEADY[4]], early, model);
    }
}

#[test]
fn without_the_flush_at_open() {
    for model in MODELS {
        let finding = kill_the_formatter(&Setup::tight(1, 1), model, &[Barrier::Open]).err();
        println!("no Open barrier, {model:?}: {finding:?}");
        assert!(finding.is_some(), "{model:?}: a superblock that only the cache holds was trusted");
        // Not for the records and the control block: these are written again, and that is needed anyway.
        for history in &FAILING {
            kill_on_failing_medium(history, model, &[Barrier::Open])
                .unwrap_or_else(|finding| panic!("{}, {model:?}: {finding}", history.name));
        }
    }
}

#[test]
fn without_writing_again_what_is_adopted() {
    for history in &FAILING {
        for model in MODELS {
            let finding = kill_on_failing_medium(history, model, &[Barrier::Adopt]).err();
            println!("no Adopt barrier, {}, {model:?}: {finding:?}", history.name);
            // On pmem the death of the process has made durable whatever the next one sees whole.
            assert_eq!(finding.is_some(), model != PMEM, "{}, {model:?}: {finding:?}", history.name);
        }
    }
}
