//! What is done to a region that lives on a recorded disk.

use std::thread;
use std::time::Duration;

use pccheck::medium::Barrier;

use super::broken::Protocol;
use super::child::Way;
use super::common::WAIT;
use super::content::Random;
use super::life::{Life, Living, Shape};
use super::volume::Format;

/// One slot is for a pin.
pub const ROOMY: Shape = Shape { slots: 6, in_flight: 3, keep: 2 };
const TIGHT: Shape = Shape { slots: 3, in_flight: 2, keep: 1 };

/// Every so many saves one is cancelled as soon as it is copied.
const CANCEL_EVERY: u64 = 7;
/// Every so many saves the pin moves.
const PIN_EVERY: u64 = 6;
/// Long enough for a slot that is free.
const NO_SLOT_WAIT: Option<Duration> = Some(Duration::from_millis(100));

/// In which a save that is written comes to the committer.
const QUEUED_IN: Duration = Duration::from_millis(20);

/// Which life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum History {
    /// Formatted, opened, saved into (several at once, pinned, cancelled), opened again, grown.
    Whole,
    /// Short, and begins with what a killed formatter left visible.
    KilledFormatter,
    /// While a commit record waits, a save fails, and another wants a slot: only that of the newest durable checkpoint is left.
    CommitHeldBack,
    /// The write of a commit record fails and nothing tells of it on the disk; then the region is opened again. Whatever maps it
    /// sees the record.
    CommitFails,
    /// A save becomes complete while the payload of another is being flushed.
    CompleteInAFlush,
}

/// Lives `history`, of so many saves where that is open.
pub fn live(history: History, format: Format, way: Way, protocol: Protocol, saves: u64, seed: u64) -> Life {
    match history {
        History::Whole => {
            let mut living = Living::new(format, way, ROOMY, protocol);
            whole(&mut living, saves, &mut Random(seed));
            living.end()
        }
        History::KilledFormatter => {
            let mut living = Living::after_a_killed_formatter(format, way, ROOMY, protocol);
            for step in 0..4 {
                living.begin(step);
                living.wait();
            }
            living.end()
        }
        History::CommitHeldBack | History::CommitFails | History::CompleteInAFlush => {
            let mut living = Living::new(format, way, TIGHT, protocol);
            living.reopen_with_gate();
            for step in 0..4 {
                living.begin(step);
                living.wait();
            }
            match history {
                History::CommitHeldBack => commit_held_back(&mut living),
                History::CommitFails => commit_fails(&mut living),
                _ => complete_in_a_flush(&mut living),
            }
            living.end()
        }
    }
}

fn whole(living: &mut Living, saves: u64, random: &mut Random) {
    for step in 0..saves {
        if step == saves / 3 {
            living.reopen();
        }
        // A device cannot grow.
        if step == saves * 2 / 3 && living.format() != Format::Bare {
            living.grow();
        }
        let moves_pin = step % PIN_EVERY == PIN_EVERY - 2;
        if moves_pin {
            living.wait();
            living.unpin();
        }
        // With what it is pinned by turns: its save, or later.
        match step / PIN_EVERY % 2 {
            0 if moves_pin => {
                living.pin();
                living.begin(step);
            }
            _ if moves_pin => living.begin_pinned(step),
            _ if step % CANCEL_EVERY == CANCEL_EVERY - 1 => living.begin_and_cancel(step),
            _ => drop(living.begin(step)),
        }
        // Sometimes several are in flight, sometimes one.
        if random.below(3) == 0 {
            living.wait();
        }
    }
}

fn commit_held_back(living: &mut Living) {
    let gate = living.gate.clone();
    gate.hold(Barrier::Commit);
    living.begin_what_may_fail(4, WAIT).expect("begin a save");
    gate.wait_held();
    gate.fail_next_mark();
    if let Some(failing) = living.begin_what_may_fail(5, WAIT) {
        assert!(failing.wait_durable(WAIT).is_err(), "its writing mark failed");
    }
    let marks = gate.marks();
    // A sound store has no slot to give.
    if living.begin_what_may_fail(6, NO_SLOT_WAIT).is_some() {
        gate.wait_for_marks(marks + 1);
    }
    gate.release();
    living.wait();
}

fn commit_fails(living: &mut Living) {
    let gate = living.gate.clone();
    gate.hold(Barrier::Commit);
    let failing = living.begin_what_may_fail(4, WAIT).expect("begin a save");
    gate.wait_held();
    living.fail_next_write();
    // Else its slot would be seen to be quarantined.
    gate.refuse_controls(true);
    gate.release();
    assert!(failing.wait_durable(WAIT).is_err(), "its commit record could not be written");
    gate.refuse_controls(false);
    living.reopen();
    for step in 5..9 {
        living.begin(step);
        living.wait();
    }
}

fn complete_in_a_flush(living: &mut Living) {
    let gate = living.gate.clone();
    for step in [4, 6, 8] {
        gate.hold(Barrier::Payload);
        living.begin(step);
        gate.wait_held();
        let late = living.begin(step + 1);
        while late.progress().written_bytes < late.progress().total_bytes {
            thread::yield_now();
        }
        thread::sleep(QUEUED_IN);
        gate.release();
        living.wait();
    }
}
