//! The histories: ways to use a store that between them reach every step of the protocol.

use std::time::Duration;

use pccheck::medium::sim::{AttemptKind, HoldId};
use pccheck::medium::Barrier;
use pccheck::ErrorKind;

use crate::explore::Script;
use crate::world::{durable, ended, Life, Setup, CHUNK_BYTES, WAIT};

/// A named history and the region it wants.
pub struct History {
    pub name: &'static str,
    pub setup: Setup,
    pub script: Script,
}

const fn history(name: &'static str, setup: Setup, script: Script) -> History {
    History { name, setup, script }
}

/// Every slot is claimed at least twice in each of these.
pub const WRAPPING: [History; 7] = [
    history("1 save, keep 1", Setup::tight(1, 1), wrap),
    history("1 save, keep 2", Setup::tight(1, 2), wrap),
    history("2 saves, keep 1", Setup::tight(2, 1), wrap),
    history("2 saves, keep 2", Setup::tight(2, 2), wrap),
    history("3 saves, keep 1", Setup::tight(3, 1), wrap),
    history("3 saves, keep 2", Setup::tight(3, 2), wrap),
    history("2 saves, dense", Setup { dense: true, ..Setup::tight(2, 1) }, wrap),
];

/// Everything that a caller can do besides saving.
pub const USES: [History; 9] = [
    history("pins", Setup::tight(2, 1).slots(5), pins),
    history("hold and marks", Setup { hold: true, ..Setup::tight(2, 1).slots(6) }, held),
    history("discards", Setup::tight(2, 2).slots(5), discards),
    history("cancelled saves", Setup::tight(2, 1), cancelled),
    history("failed saves", Setup::tight(2, 1).slots(6), failed),
    history("raw streams", Setup { raw: true, staging_chunks: 4, ..Setup::tight(2, 1) }, wrap),
    history("close in mid-save", Setup::tight(2, 1), closed_in_mid_save),
    history("pinned saves", Setup::tight(2, 1).slots(5), pinned_saves),
    history("confirmed saves", Setup { raw: true, ..Setup::tight(3, 2) }, confirmed_saves),
];

/// Orders of events that a scheduler only hits by luck, forced with gates.
pub const FORCED: [History; 4] = [
    history("2 commits before 1", Setup::tight(2, 1), second_before_first),
    history("3, 2, 1", Setup::tight(3, 2), backwards),
    history("last chunk first", Setup::tight(1, 1), last_chunk_first),
    history("a commit held back", Setup::tight(2, 1), commit_held_back),
];

/// Saves that find much of what they save in its place, with all that may happen to such a place between two saves.
pub const STEADY: [History; 5] = [
    history("steady, 1 save", steady(Setup::tight(1, 1)), wrap_steadily),
    history("steady, 2 saves, keep 2", steady(Setup::tight(2, 2)), wrap_steadily),
    history(
        "steady streams",
        Setup { raw: true, staging_chunks: 4, ..steady(Setup::tight(2, 1)) },
        wrap_steadily,
    ),
    history("steady, failed saves", steady(Setup::tight(2, 1).slots(6)), failed),
    history("steady, cancelled saves", steady(Setup::tight(1, 1)), cancelled_steadily),
];

const fn steady(setup: Setup) -> Setup {
    Setup { steady: true, ..setup }
}

/// Ends with a medium that goes on failing: what the last calls wrote is visible, and no flush reaches it.
pub const FAILING: [History; 2] = [
    history("commit fails", Setup::tight(1, 1), commit_fails),
    history("control block fails", Setup::tight(1, 1).slots(4), control_fails),
];

/// Striped: chunks and units are a block, so that header, data and chunk table of one save lie on different members,
/// and the records of different slots, too; or units are two blocks, which chunk tables straddle.
pub const STRIPED: [History; 7] = [
    history("2 members, 1 save", Setup::tight(1, 1).over(2, 4096), wrap),
    history("2 members, 2 saves", Setup::tight(2, 1).over(2, 4096), wrap),
    history("3 members, 2 saves", Setup::tight(2, 2).over(3, 8192), wrap),
    history("2 members, pins", USES[0].setup.over(2, 4096), pins),
    history("2 members, failed saves", USES[4].setup.over(2, 4096), failed),
    history("3 members, raw streams", USES[5].setup.over(3, 4096), wrap),
    history("2 members, steady", STEADY[1].setup.over(2, 4096), wrap_steadily),
];

/// Striped, and ending with a medium that goes on failing.
pub const STRIPED_FAILING: [History; 2] = [
    history("2 members, commit fails", FAILING[0].setup.over(2, 4096), commit_fails),
    history("2 members, control block fails", FAILING[1].setup.over(2, 4096), control_fails),
];

fn wrap(life: &Life) {
    life.watch_from_here();
    let slots = life.store.region().layout().slot_count;
    let rounds = (2 * slots).div_ceil(life.store.region().options().max_in_flight) + 1;
    let used = life.rounds(rounds);
    for slot in 0..slots {
        let claims = used.iter().filter(|&&used| used == slot).count();
        assert!(claims >= 2, "slot {slot} was claimed {claims} times in {used:?}");
    }
}

fn wrap_steadily(life: &Life) {
    wrap(life);
    life.rounds(12);
    assert!(life.store.stats().unchanged_bytes > 0, "nothing was ever found in its place");
}

/// Cancelled with everything written but one chunk, and with everything copied and nothing written.
fn cancelled_steadily(life: &Life) {
    life.watch_from_here();
    life.rounds(4);
    for _ in 0..5 {
        let (save, hold) = begin_with_chunk_held(life, 1);
        let written = || save.progress().written_bytes + CHUNK_BYTES >= save.progress().total_bytes;
        while !written() {
            std::thread::yield_now();
        }
        save.cancel();
        life.sim.release(hold);
        assert!(ended(&save).is_err());
        life.rounds(2);
        let hold = hold_write(life, Barrier::WritingMark);
        let save = life.begin();
        wait_held(life, hold);
        save.wait_copied(WAIT).expect("copied");
        save.cancel();
        life.sim.release(hold);
        assert!(ended(&save).is_err());
        life.rounds(3);
    }
    assert!(life.store.stats().unchanged_bytes > 0, "nothing was ever found in its place");
}

fn pins(life: &Life) {
    life.watch_from_here();
    let first = life.save().generation;
    life.pin(first).expect("pin");
    life.rounds(2);
    let second = life.newest();
    life.pin(second).expect("pin");
    life.rounds(3);
    life.unpin(first);
    life.rounds(3);
    life.unpin(second);
    life.rounds(2);
}

fn held(life: &Life) {
    life.watch_from_here();
    let first = life.save().generation;
    life.rounds(1);
    let third = life.newest();
    life.mark_global(third);
    assert!(life.store.checkpoints().expect("list").iter().all(|c| c.record.generation >= third));
    assert!(third > first);
    life.rounds(1);
    // A step that another rank lost is given up here as well.
    life.abandon(life.newest());
    life.rounds(1);
    life.mark_global(life.newest());
    life.rounds(2);
    life.mark_global(life.newest());
    life.rounds(2);
}

fn discards(life: &Life) {
    life.watch_from_here();
    life.rounds(2);
    let kept = life.newest() - 1;
    assert_eq!(life.discard_newer(kept).expect("discard"), 1);
    life.rounds(2);
    // With a pin on what is discarded: the discard wins.
    life.pin(life.newest()).expect("pin");
    life.discard_newer(life.newest() - 1).expect("discard");
    life.rounds(3);
    life.discard_newer(0).expect("discard");
    life.rounds(2);
}

/// Holds the next durable write that carries `barrier`.
fn hold_write(life: &Life, barrier: Barrier) -> HoldId {
    life.sim
        .hold(move |attempt| attempt.kind == AttemptKind::WriteDurable && attempt.barrier == Some(barrier))
}

fn wait_held(life: &Life, hold: HoldId) {
    assert!(life.sim.wait_held(hold, 1, WAIT.expect("a time")), "the gate never caught anything");
}

/// Begins a save and holds one of its chunks back, whatever slot it gets.
fn begin_with_chunk_held(life: &Life, chunk: u64) -> (std::sync::Arc<pccheck::save::Save>, HoldId) {
    let mark = hold_write(life, Barrier::WritingMark);
    let save = life.begin();
    wait_held(life, mark);
    let held = life.chunk_range(life.slot_of(save.generation()), chunk);
    let hold = life
        .sim
        .hold(move |attempt| attempt.kind == AttemptKind::StartCopy && held.contains(&attempt.offset));
    life.sim.release(mark);
    // Else the slot might change hands first, and the gate catch another save's chunk.
    wait_held(life, hold);
    (save, hold)
}

fn cancelled(life: &Life) {
    life.watch_from_here();
    life.rounds(2);
    for _ in 0..2 {
        // Before its mark is written,
        let hold = hold_write(life, Barrier::WritingMark);
        let (first, second) = (life.begin(), life.begin());
        wait_held(life, hold);
        second.cancel();
        life.sim.release(hold);
        assert!(ended(&second).is_err());
        durable(&first);
        // with a chunk under way,
        let (third, hold) = begin_with_chunk_held(life, 1);
        third.cancel();
        life.save();
        life.sim.release(hold);
        assert!(ended(&third).is_err());
        // and too late.
        let fourth = life.begin();
        let _ = ended(&fourth);
        fourth.cancel();
        life.rounds(1);
    }
}

/// Fails the next call that `picks`, once.
fn fail_once(life: &Life, kind: AttemptKind, barrier: Option<Barrier>) {
    let mut left = 1;
    life.sim.fail(move |attempt| {
        let hit = left > 0 && attempt.kind == kind && attempt.barrier == barrier;
        left -= i32::from(hit);
        hit.then_some(libc::EIO)
    });
}

fn failed(life: &Life) {
    life.watch_from_here();
    life.rounds(2);
    let faults = [
        (AttemptKind::StartCopy, None),
        (AttemptKind::WriteDurable, Some(Barrier::WritingMark)),
        (AttemptKind::Persist, Some(Barrier::Payload)),
        (AttemptKind::WriteDurable, Some(Barrier::Commit)),
    ];
    for (kind, barrier) in faults {
        fail_once(life, kind, barrier);
        let saves = [life.begin_within(WAIT), life.begin_within(WAIT)];
        let outcomes = saves.map(|save| save.and_then(|save| ended(&save)));
        life.sim.stop_failing();
        assert!(outcomes.iter().any(Result::is_err), "the failure of {kind:?} {barrier:?} reached nobody");
        life.store.drain(WAIT).expect("drain");
        life.rounds(1);
        life.store.repair(None).expect("repair");
    }
    // A control block that cannot be written: the old one stays in force.
    fail_once(life, AttemptKind::WriteDurable, Some(Barrier::Control));
    assert!(life.pin(life.newest()).is_err());
    life.sim.stop_failing();
    life.rounds(2);
    life.pin(life.newest()).expect("pin");
    life.rounds(2);
}

fn closed_in_mid_save(life: &Life) {
    life.watch_from_here();
    life.rounds(3);
    // Dropped with the store: cancelled or durable, never half.
    let _saves = [life.begin(), life.begin()];
    std::thread::sleep(Duration::from_micros(200));
}

fn pinned_saves(life: &Life) {
    life.watch_from_here();
    life.rounds(1);
    let begin = || life.begin_pinned().expect("room for a pin");
    let first = durable(&begin());
    // Beside a save that is not pinned, and overtaken by it.
    let (mark, second) = (hold_write(life, Barrier::WritingMark), begin());
    wait_held(life, mark);
    let newer = life.begin();
    life.sim.release(mark);
    assert_eq!(durable(&second).superseded_by, None, "pinned");
    durable(&newer);
    let full = life.begin_pinned().err().expect("two pins are all that there is room for");
    assert_eq!(full.kind(), ErrorKind::NoSlot);
    life.rounds(2);
    life.unpin(first.generation);
    life.rounds(1);
    // It ends before its pin is written, when it is, and when its record is: what stays on the medium binds no slot.
    let hold = hold_write(life, Barrier::WritingMark);
    let cancelled = begin();
    wait_held(life, hold);
    cancelled.cancel();
    life.sim.release(hold);
    assert!(ended(&cancelled).is_err());
    for barrier in [Barrier::Control, Barrier::Commit] {
        fail_once(life, AttemptKind::WriteDurable, Some(barrier));
        assert!(ended(&begin()).is_err(), "the failure of {barrier:?} reached nobody");
        life.sim.stop_failing();
        life.rounds(1);
        life.store.repair(None).expect("repair");
    }
    let last = durable(&begin());
    life.rounds(2);
    life.unpin(second.generation());
    life.rounds(1);
    life.discard_newer(last.generation).expect("discard");
    life.rounds(1);
}

fn confirmed_saves(life: &Life) {
    life.watch_from_here();
    life.rounds(1);
    for _ in 0..3 {
        let saves = [life.begin_unconfirmed(), life.begin_unconfirmed()];
        // While they wait, others pass.
        life.save();
        let newest = life.save().generation;
        life.confirm(&saves[1]);
        durable(&saves[1]);
        assert_eq!(life.newest(), newest);
        life.confirm(&saves[0]);
        assert_eq!(durable(&saves[0]).superseded_by, Some(newest));
        let given_up = life.begin_unconfirmed();
        life.save();
        given_up.cancel();
        assert!(ended(&given_up).is_err());
    }
    // Ends with the store.
    let _unconfirmed = [life.begin_unconfirmed(), life.begin_unconfirmed()];
    life.save();
}

fn second_before_first(life: &Life) {
    life.watch_from_here();
    life.save();
    for _ in 0..4 {
        let (first, hold) = begin_with_chunk_held(life, 1);
        let second = life.begin();
        let second = durable(&second);
        assert_eq!(life.newest(), second.generation);
        life.sim.release(hold);
        assert_eq!(durable(&first).superseded_by, Some(second.generation));
    }
}

fn backwards(life: &Life) {
    life.watch_from_here();
    life.save();
    for _ in 0..4 {
        let (first, hold_first) = begin_with_chunk_held(life, 1);
        let (second, hold_second) = begin_with_chunk_held(life, 0);
        let third = life.save().generation;
        life.sim.release(hold_second);
        assert_eq!(durable(&second).superseded_by, None, "keep is 2");
        life.sim.release(hold_first);
        assert_eq!(durable(&first).superseded_by, Some(third));
    }
}

fn last_chunk_first(life: &Life) {
    life.watch_from_here();
    life.rounds(2);
    for _ in 0..3 {
        let (save, hold) = begin_with_chunk_held(life, 0);
        // A sound store waits here; the fault commits.
        let _ = save.wait_durable(Some(Duration::from_millis(30)));
        life.sim.release(hold);
        durable(&save);
    }
}

/// While a commit is not yet durable, the only way to a third slot is a failed save: its slot is quarantined.
fn commit_held_back(life: &Life) {
    life.watch_from_here();
    life.rounds(3);
    let hold = hold_write(life, Barrier::Commit);
    let held = life.begin();
    wait_held(life, hold);
    fail_once(life, AttemptKind::WriteDurable, Some(Barrier::WritingMark));
    let failing = life.begin_within(WAIT).and_then(|save| ended(&save));
    assert!(failing.is_err());
    life.sim.stop_failing();
    let marks = || life.sim.barrier_counts()[&Barrier::WritingMark];
    let before = marks();
    // A sound store has no slot to give: the newest durable checkpoint is in the only one left.
    let third = life.begin_within(Some(Duration::from_millis(100)));
    if third.is_ok() {
        while marks() == before {
            std::thread::yield_now();
        }
    }
    life.sim.release(hold);
    let _ = ended(&held);
    let _ = third.and_then(|save| ended(&save));
}

fn fail_for_ever(life: &Life, barriers: &'static [Barrier]) {
    life.sim.fail(move |attempt| attempt.barrier.is_some_and(|b| barriers.contains(&b)).then_some(libc::EIO));
}

fn commit_fails(life: &Life) {
    life.rounds(3);
    life.watch_from_here();
    fail_for_ever(life, &[Barrier::Commit, Barrier::Control]);
    assert!(life.begin_within(WAIT).and_then(|save| ended(&save)).is_err());
}

fn control_fails(life: &Life) {
    life.rounds(2);
    life.pin(life.newest()).expect("pin");
    life.rounds(1);
    life.watch_from_here();
    fail_for_ever(life, &[Barrier::Control]);
    assert!(life.pin(life.newest()).is_err());
}
