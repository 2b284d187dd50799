//! Each fault that is planted in the order of things is seen by the tests of saves: they can fail.

use pccheck::save::{Faults, Snapshot};

use super::bed::{on, store, stream_wait, State, MIXED, WAIT};
use super::standin::Standin;

/// Whether a save holds what it should, with the work before it late, the copies slow, and an update right behind it.
fn saved_right(faults: Faults, snapshot: Snapshot) -> bool {
    let standin = Standin::take();
    let stream = standin.stream(0);
    let store = store(64, faults);
    let mut state = State::new(&standin, MIXED);
    state.fill(|_| stream, 1, 0);
    standin.synchronize(0, stream);
    standin.delay_us(2000);
    state.fill(|_| stream, 2, 3000);
    let save = state.begin(&store, 2, on(stream, snapshot)).expect("begin");
    stream_wait(&save, stream).expect("wait on the stream");
    state.fill(|_| stream, 3, 0);
    save.wait_durable(WAIT).expect("durable");
    let right = state.is_saved(&store, 2);
    standin.synchronize(0, stream);
    standin.delay_us(0);
    right
}

#[test]
fn without_a_fault_all_is_right() {
    for snapshot in [Snapshot::Staging, Snapshot::Spare] {
        assert!(saved_right(Faults::default(), snapshot));
    }
}

#[test]
fn copies_that_do_not_wait_for_the_callers_stream_are_caught() {
    for snapshot in [Snapshot::Staging, Snapshot::Spare] {
        assert!(!saved_right(faults(|faults| faults.copy_before_the_event = true), snapshot), "{snapshot:?}");
    }
}

#[test]
fn chunks_that_are_taken_before_they_have_arrived_are_caught() {
    assert!(!saved_right(faults(|faults| faults.land_early = true), Snapshot::Staging));
}

#[test]
fn a_stream_that_does_not_wait_for_the_copies_is_caught() {
    for snapshot in [Snapshot::Staging, Snapshot::Spare] {
        assert!(
            !saved_right(faults(|faults| faults.stream_waits_for_nothing = true), snapshot),
            "{snapshot:?}"
        );
    }
}

fn faults(plant: impl Fn(&mut Faults)) -> Faults {
    let mut faults = Faults::default();
    plant(&mut faults);
    faults
}
