//! What is saved is the state as of the stream's work before, whatever comes after it.

use std::time::{Duration, Instant};

use pccheck::save::{Faults, SaveOptions, Snapshot};
use pccheck::ErrorKind;

use super::bed::{assert_idle, on, store, stream_wait, until, Shape, State, MIXED, TWO_GPUS, WAIT};
use super::restores::read;
use super::standin::{Standin, LEGACY};

const MODES: [Snapshot; 3] = [Snapshot::Staging, Snapshot::Auto, Snapshot::Spare];

/// Steps that make the state late, save it, and overwrite it at once, each on the stream alone.
fn steps(shape: &Shape, buffers: u64, snapshot: Snapshot) {
    let standin = Standin::take();
    let streams = [standin.stream(0), standin.stream(1)];
    // The second GPU's work is joined to the first one's stream, as the contract asks.
    let store = store(buffers, Faults::default());
    let mut state = State::new(&standin, shape);
    let several = shape.iter().any(|&(_, device)| device == Some(1));
    state.fill(|device| streams[device as usize], 1, 2000);
    for step in 1..=4 {
        if several {
            standin.synchronize(1, streams[1]);
        }
        let save = state.begin(&store, step, on(streams[0], snapshot)).expect("begin");
        for stream in &streams {
            stream_wait(&save, *stream).expect("wait on the stream");
        }
        state.fill(|device| streams[device as usize], step + 1, 500);
        save.wait_durable(WAIT).expect("durable");
        assert!(state.is_saved(&store, step), "step {step} of {shape:?}, {snapshot:?}, {buffers} buffers");
    }
    assert_idle(&store);
    standin.synchronize(0, streams[0]);
    standin.synchronize(1, streams[1]);
    drop((store, state));
    streams.iter().for_each(|stream| standin.destroy(*stream));
    standin.assert_clean("saves");
}

#[test]
fn a_state_is_saved_as_the_stream_left_it_through_a_pool_smaller_than_it() {
    MODES.into_iter().for_each(|snapshot| steps(MIXED, 4, snapshot));
}

#[test]
fn a_state_is_saved_as_the_stream_left_it_through_a_pool_that_holds_it() {
    MODES.into_iter().for_each(|snapshot| steps(MIXED, 64, snapshot));
}

#[test]
fn a_state_on_two_gpus_is_one_checkpoint() {
    MODES.into_iter().for_each(|snapshot| steps(TWO_GPUS, 6, snapshot));
}

#[test]
fn a_state_smaller_than_a_chunk_is_saved() {
    MODES.into_iter().for_each(|snapshot| steps(&[(5, Some(0))], 4, snapshot));
}

#[test]
fn begin_waits_neither_for_the_stream_nor_for_copies() {
    let standin = Standin::take();
    let stream = standin.stream(0);
    let store = store(64, Faults::default());
    let mut state = State::new(&standin, MIXED);
    state.fill(|_| stream, 1, 0);
    standin.synchronize(0, stream);
    for snapshot in MODES {
        standin.hold_stream(stream, true);
        state.fill(|_| stream, 2, 0);
        let save = state.begin(&store, 2, on(stream, snapshot)).expect("begin");
        stream_wait(&save, stream).expect("all copies find room, so that only the stream waits");
        let waited = save.wait_copied(Some(Duration::from_millis(20)));
        assert_eq!(waited.expect_err("the stream is held").kind(), ErrorKind::TimedOut);
        standin.hold_stream(stream, false);
        save.wait_durable(WAIT).expect("durable");
        assert!(state.is_saved(&store, 2));
    }
}

#[test]
fn the_legacy_default_stream_is_waited_for() {
    let standin = Standin::take();
    let store = store(6, Faults::default());
    let mut state = State::new(&standin, TWO_GPUS);
    state.fill(|_| LEGACY, 1, 3000);
    let save = state.begin(&store, 1, SaveOptions { wait: WAIT, ..SaveOptions::DEFAULT }).expect("begin");
    stream_wait(&save, LEGACY).expect("wait on both GPUs' default streams");
    state.fill(|_| LEGACY, 2, 0);
    save.wait_durable(WAIT).expect("durable");
    assert!(state.is_saved(&store, 1));
    standin.synchronize(0, LEGACY);
    standin.synchronize(1, LEGACY);
}

#[test]
fn unchanged_chunks_of_a_gpu_are_not_written_again() {
    let standin = Standin::take();
    let stream = standin.stream(0);
    let store = store(32, Faults::default());
    let mut state = State::new(&standin, MIXED);
    state.fill(|_| stream, 7, 0);
    for step in 0..6 {
        let save = state.begin(&store, step, on(stream, Snapshot::Staging)).expect("begin");
        save.wait_durable(WAIT).expect("durable");
    }
    let stats = store.stats();
    assert!(
        stats.unchanged_bytes > stats.durable_bytes / 3,
        "{} of {}",
        stats.unchanged_bytes,
        stats.durable_bytes
    );
}

/// The driver refuses a copy that passes the end of an allocation, though the next one begins there.
#[test]
fn tensors_whose_memory_touches_are_not_copied_as_one() {
    let standin = Standin::take();
    let stream = standin.stream(0);
    let store = store(32, Faults::default());
    let mut state = State::new(&standin, &[(4096, Some(0)); 20]);
    assert!(state.touches(), "the stand-in leaves room between allocations: this shows nothing");
    for snapshot in MODES {
        state.fill(|_| stream, 1, 0);
        let save = state.begin(&store, 1, on(stream, snapshot)).expect("begin");
        save.wait_durable(WAIT).expect("durable");
        assert!(state.is_saved(&store, 1));
        state.fill(|_| stream, 2, 0);
        standin.synchronize(0, stream);
        read(&store, &state).expect("read");
        assert!(state.now() == state.expected(1));
    }
}

#[test]
fn the_caller_waits_where_its_stream_cannot() {
    let standin = Standin::take();
    let stream = standin.stream(0);
    let store = store(64, Faults::default());
    let mut state = State::new(&standin, MIXED);
    for captures in [true, false] {
        state.fill(|_| stream, 1, 0);
        standin.synchronize(0, stream);
        standin.delay_us(20_000);
        let save = state.begin(&store, 1, on(stream, Snapshot::Staging)).expect("begin");
        // The engine's own two streams wait for this one first.
        until("the copies are ordered", || standin.calls("cuStreamWaitEvent") >= 2);
        match captures {
            true => standin.capture(stream, true),
            false => standin.fail("cuStreamWaitEvent", 1, 1, true),
        }
        let waited = stream_wait(&save, stream);
        let copied = save.progress().copied;
        standin.reset();
        waited.expect("the save is well");
        assert!(copied, "nobody waits for the copies");
        state.fill(|_| stream, 2, 0);
        save.wait_durable(WAIT).expect("durable");
        assert!(state.is_saved(&store, 1));
    }
}

#[test]
fn a_timeout_beyond_all_clocks_is_none() {
    let standin = Standin::take();
    let stream = standin.stream(0);
    let store = store(8, Faults::default());
    let mut state = State::new(&standin, MIXED);
    state.fill(|_| stream, 1, 0);
    let mut options = on(stream, Snapshot::Staging);
    options.device.timeout = Duration::MAX;
    let save = state.begin(&store, 1, options).expect("begin");
    save.wait_durable(WAIT).expect("durable");
    assert!(state.is_saved(&store, 1));
}

#[test]
fn small_tensors_are_copied_in_few_calls() {
    let standin = Standin::take();
    let stream = standin.stream(0);
    let store = store(32, Faults::default());
    let shape = vec![(64, Some(0)); 500];
    let mut state = State::new(&standin, &shape);
    state.fill(|_| stream, 1, 0);
    let save = state.begin(&store, 1, on(stream, Snapshot::Staging)).expect("begin");
    save.wait_durable(WAIT).expect("durable");
    assert!(state.is_saved(&store, 1));
    assert!(standin.copies() >= 500, "each tensor has memory of its own");
    let calls = standin.calls("cuMemcpyDtoHAsync_v2") + standin.calls("cuMemcpyBatchAsync");
    assert!(calls <= 8, "{calls} calls of the driver for 500 small tensors");
}

#[test]
fn a_capturing_stream_is_refused_and_a_capture_elsewhere_is_left_alone() {
    let standin = Standin::take();
    let (stream, other) = (standin.stream(0), standin.stream(0));
    let store = store(8, Faults::default());
    let mut state = State::new(&standin, MIXED);
    state.fill(|_| stream, 1, 0);
    standin.synchronize(0, stream);
    standin.capture(stream, true);
    let error = state.begin(&store, 1, on(stream, Snapshot::Staging)).err().expect("refused");
    assert_eq!(error.kind(), ErrorKind::InvalidState, "{error}");
    standin.capture(stream, false);
    // Once all that is allocated once is there, a save makes no call that ends another thread's capture.
    let save = state.begin(&store, 1, on(stream, Snapshot::Staging)).expect("begin");
    save.wait_durable(WAIT).expect("durable");
    standin.delay_us(300);
    let save = state.begin(&store, 2, on(stream, Snapshot::Staging)).expect("begin");
    standin.capture(other, true);
    save.wait_copied(WAIT).expect("copied");
    save.wait_durable(WAIT).expect("durable");
    assert!(!standin.capture_invalidated(), "the engine ended a capture of the program");
    standin.capture(other, false);
    assert_eq!(
        store.open_checkpoint(pccheck::engine::Select::Newest, true).expect("open").checkpoint.record().step,
        2
    );
}

#[test]
fn a_save_that_is_cancelled_leaves_the_memory_when_its_copies_end() {
    let standin = Standin::take();
    let stream = standin.stream(0);
    let store = store(8, Faults::default());
    let mut state = State::new(&standin, MIXED);
    state.fill(|_| stream, 1, 0);
    standin.synchronize(0, stream);
    standin.delay_us(1000);
    for snapshot in MODES {
        let save = state.begin(&store, 1, on(stream, snapshot)).expect("begin");
        std::thread::sleep(Duration::from_millis(3));
        save.cancel();
        let began = Instant::now();
        let copied = save.wait_copied(WAIT);
        assert!(copied.is_ok() || copied.is_err_and(|error| error.kind() == ErrorKind::Cancelled));
        assert!(began.elapsed() < Duration::from_secs(5));
        drop(save);
        assert_idle(&store);
    }
    standin.delay_us(0);
    let save = state.begin(&store, 3, on(stream, Snapshot::Staging)).expect("begin");
    save.wait_durable(WAIT).expect("durable");
}
