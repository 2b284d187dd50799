//! Each fault that is planted in the order of things is seen by the tests of saves: they can fail.

use std::time::Duration;

use pccheck::save::{Faults, Snapshot};

use super::bed::{on, store, stream_wait, State, MIXED, WAIT};
use super::standin::Standin;

/// What is late.
#[derive(Clone, Copy)]
enum Late {
    /// The work before the save: until the copies are done, or would be if they did not wait for it.
    Work,
    /// All of the GPU, until the save is durable or would be.
    Gpu,
    /// Each copy, by more than anything else takes.
    Copies,
}

/// Whether a save holds what it should, with an update right behind it.
fn saved_right(faults: Faults, snapshot: Snapshot, late: Late) -> bool {
    const SOON: Option<Duration> = Some(Duration::from_millis(500));
    let standin = Standin::take();
    let stream = standin.stream(0);
    let store = store(64, faults);
    let mut state = State::new(&standin, MIXED);
    state.fill(|_| stream, 1, 0);
    standin.synchronize(0, stream);
    match late {
        Late::Work => standin.hold_stream(stream, true),
        Late::Gpu => standin.hold(true),
        Late::Copies => standin.delay_us(200_000),
    }
    state.fill(|_| stream, 2, 0);
    let save = state.begin(&store, 2, on(stream, snapshot)).expect("begin");
    stream_wait(&save, stream).expect("wait on the stream");
    state.fill(|_| stream, 3, 0);
    match late {
        Late::Work => drop(save.wait_copied(SOON)),
        Late::Gpu => drop(save.wait_durable(SOON)),
        Late::Copies => {}
    }
    standin.hold_stream(stream, false);
    standin.hold(false);
    save.wait_durable(WAIT).expect("durable");
    let right = state.is_saved(&store, 2);
    standin.synchronize(0, stream);
    right
}

#[test]
fn without_a_fault_all_is_right() {
    for snapshot in [Snapshot::Staging, Snapshot::Spare] {
        for late in [Late::Work, Late::Gpu, Late::Copies] {
            assert!(saved_right(Faults::default(), snapshot, late));
        }
    }
}

#[test]
fn copies_that_do_not_wait_for_the_callers_stream_are_caught() {
    for snapshot in [Snapshot::Staging, Snapshot::Spare] {
        let faulty = faults(|faults| faults.copy_before_the_event = true);
        assert!(!saved_right(faulty, snapshot, Late::Work), "{snapshot:?}");
    }
}

#[test]
fn chunks_that_are_taken_before_they_have_arrived_are_caught() {
    let faulty = faults(|faults| faults.land_early = true);
    assert!(!saved_right(faulty, Snapshot::Staging, Late::Gpu));
}

#[test]
fn a_stream_that_does_not_wait_for_the_copies_is_caught() {
    for snapshot in [Snapshot::Staging, Snapshot::Spare] {
        let faulty = faults(|faults| faults.stream_waits_for_nothing = true);
        assert!(!saved_right(faulty, snapshot, Late::Copies), "{snapshot:?}");
    }
}

fn faults(plant: impl Fn(&mut Faults)) -> Faults {
    let mut faults = Faults::default();
    plant(&mut faults);
    faults
}
