//! Spare memory of a snapshot that failed: its copies may run all the same, and must not reach what is saved next.

use std::time::Instant;

use pccheck::save::{Faults, Snapshot};
use pccheck::ErrorKind;

use super::bed::{on, store, stream_wait, State, MIXED, WAIT};
use super::standin::Standin;

/// A snapshot of which the driver refuses the nth call of a kind from its begin on, and the next one, which is quicker.
fn the_next_snapshot_is_right(call: &str, nth: u64) {
    let what = format!("call {nth} of {call}");
    let standin = Standin::take();
    let stream = standin.stream(0);
    let store = store(16, Faults::default());
    // Too few for one call for all of them.
    let mut slow = State::new(&standin, &[(30_000, Some(0)); 3]);
    let mut quick = State::new(&standin, &[(80_000, Some(0))]);
    slow.fill(|_| stream, 1, 0);
    quick.fill(|_| stream, 2, 0);
    standin.synchronize(0, stream);
    standin.delay_us(100_000);
    standin.fail(call, nth, 1, false);
    let lost = slow.begin(&store, 1, on(stream, Snapshot::Spare)).expect("begin");
    assert_eq!(lost.wait_durable(WAIT).expect_err("refused").kind(), ErrorKind::Device, "{what}");
    let save = quick.begin(&store, 2, on(stream, Snapshot::Spare)).expect("begin");
    stream_wait(&save, stream).expect("wait");
    save.wait_durable(WAIT).expect("durable");
    assert!(quick.is_saved(&store, 2), "{what}");
}

#[test]
fn a_snapshot_that_fails_does_not_write_into_the_next_one() {
    the_next_snapshot_is_right("cuMemcpyDtoDAsync_v2", 3);
    // The first is that of the caller's stream; then comes that behind the copies.
    the_next_snapshot_is_right("cuEventRecord", 2);
    // Two streams of the engine are ordered after the caller's, and then after the copies.
    for nth in 1..=4 {
        the_next_snapshot_is_right("cuStreamWaitEvent", nth);
    }
}

#[test]
fn a_stream_waits_for_nothing_where_all_tensors_on_gpus_are_empty() {
    let standin = Standin::take();
    let stream = standin.stream(0);
    for snapshot in [Snapshot::Staging, Snapshot::Spare] {
        for parts in [&[(0, Some(0)), (50_000, None)], &[(0, Some(1)), (50_000, Some(0))]] {
            let store = store(16, Faults::default());
            let mut state = State::new(&standin, parts);
            state.fill(|_| stream, 1, 0);
            let save = state.begin(&store, 1, on(stream, snapshot)).expect("begin");
            stream_wait(&save, stream).expect("wait");
            save.wait_durable(WAIT).expect("durable");
            assert!(state.is_saved(&store, 1));
        }
    }
}

/// The state has left the caller's memory with the snapshot, however long it takes to be fetched from there.
#[test]
fn a_save_tells_when_its_snapshot_was_taken() {
    let standin = Standin::take();
    let stream = standin.stream(0);
    let store = store(4, Faults::default());
    let mut state = State::new(&standin, MIXED);
    state.fill(|_| stream, 1, 0);
    standin.synchronize(0, stream);
    standin.delay_us(20_000);
    let began = Instant::now();
    let save = state.begin(&store, 1, on(stream, Snapshot::Spare)).expect("begin");
    save.wait_copied(WAIT).expect("copied");
    let copied = began.elapsed();
    let durable = save.wait_durable(WAIT).expect("durable");
    assert!(durable.copied_after <= copied, "{:?} after {copied:?}", durable.copied_after);
}

/// Each GPU takes its own time.
#[test]
fn a_snapshot_is_copied_when_all_gpus_have_taken_theirs() {
    for (slow, quick) in [(Some(0), Some(1)), (Some(1), Some(0))] {
        let standin = Standin::take();
        let streams = [standin.stream(0), standin.stream(1)];
        let store = store(64, Faults::default());
        // So few that each is delayed.
        let shape = [(30_000, slow), (9_000, slow), (10_000, slow), (20_000, quick)];
        let mut state = State::new(&standin, &shape);
        state.fill(|device| streams[device as usize], 1, 0);
        streams.iter().zip(0..).for_each(|(&stream, device)| standin.synchronize(device, stream));
        standin.delay_us(30_000);
        let save = state.begin(&store, 1, on(streams[0], Snapshot::Spare)).expect("begin");
        save.wait_copied(WAIT).expect("copied");
        standin.delay_us(0);
        state.fill(|device| streams[device as usize], 2, 0);
        save.wait_durable(WAIT).expect("durable");
        assert!(state.is_saved(&store, 1), "{slow:?} takes longer");
        streams.iter().zip(0..).for_each(|(&stream, device)| standin.synchronize(device, stream));
    }
}
