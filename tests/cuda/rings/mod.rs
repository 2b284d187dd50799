//! Saves whose copies are all enqueued at once, to a ring of buffers: no thread waits for a pool that is too small, whatever holds up the
//! driver, and nothing hangs.

mod ends;
mod limits;
mod random;

use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pccheck::engine::Store;
use pccheck::error::ErrorKind;
use pccheck::medium::sim::{AttemptKind, SimMedium, SimModel};
use pccheck::save::{DeviceOptions, Faults, Save, SaveOptions, Snapshot};
use pccheck::store::{format_medium, FormatOptions};

use crate::bed::{
    assert_idle, medium, on, open, store, stream_wait, until, State, CHUNK, MIXED, PROMPT, TWO_GPUS, WAIT,
};
use crate::standin::{Standin, Stream};

/// Of a pool that takes the state in many portions.
const FEW: u64 = 8;
/// Per copy, of which a state takes a dozen.
const SLOW_US: u64 = 30_000;

const WAITS: &str = "cuStreamWaitValue32_v2";

pub fn queued(stream: Stream, timeout: Duration) -> SaveOptions {
    let options = on(stream, Snapshot::Staging);
    SaveOptions { device: DeviceOptions { flag_waits: true, timeout, ..options.device }, ..options }
}

/// All that is allocated once is there; what is allocated from now on waits for all streams.
pub fn warm(store: &Store, state: &mut State, stream: Stream) {
    state.fill(|_| stream, 1, 0);
    let save = state.begin(store, 1, queued(stream, PROMPT)).expect("begin");
    stream_wait(&save, stream).expect("wait");
    save.wait_durable(WAIT).expect("durable");
    state.standin.allocations_wait(true);
}

/// A store whose pool is too small, and a state that it has saved once.
fn warmed(standin: &Standin, stream: Stream) -> (Store, State<'_>) {
    let store = store(FEW, Faults::default());
    let mut state = State::new(standin, MIXED);
    warm(&store, &mut state, stream);
    (store, state)
}

/// A save whose copies wait for a stream that is held, and which another stream waits for.
fn begin_held(state: &State, store: &Store, step: u64, held: Stream, waits: Stream) -> Save {
    state.standin.hold_stream(held, true);
    let save = state.begin(store, step, queued(held, PROMPT)).expect("begin");
    // With fewer buffers than chunks this would wait for the copies, were they not enqueued.
    stream_wait(&save, waits).expect("wait");
    assert!(!save.progress().copied);
    save
}

#[test]
fn the_stream_waits_for_a_pool_that_is_too_small_and_the_thread_does_not() {
    let standin = Standin::take();
    let (stream, other) = (standin.stream(0), standin.stream(0));
    for buffers in 4..20 {
        let store = store(buffers, Faults::default());
        let mut state = State::new(&standin, MIXED);
        warm(&store, &mut state, stream);
        let waits = standin.calls(WAITS);
        for step in 2..5 {
            state.fill(|_| stream, step, 0);
            standin.synchronize(0, stream);
            let save = begin_held(&state, &store, step, other, stream);
            state.fill(|_| stream, step + 10, 0);
            standin.hold_stream(other, false);
            save.wait_durable(WAIT).expect("durable");
            assert!(state.is_saved(&store, step), "{buffers} buffers");
            standin.synchronize(0, stream);
            assert_eq!(state.now(), state.expected(step + 10));
        }
        assert!(standin.calls(WAITS) > waits, "{buffers} buffers are not enough for the state");
        assert_idle(&store);
        standin.allocations_wait(false);
    }
}

/// A pool that is too small for a ring, and one that needs none.
#[test]
fn other_pools_do_without_waiting_for_buffers() {
    let standin = Standin::take();
    let stream = standin.stream(0);
    for buffers in [3, 64] {
        let store = store(buffers, Faults::default());
        let mut state = State::new(&standin, MIXED);
        for step in 1..5 {
            state.fill(|_| stream, step, 0);
            let save = state.begin(&store, step, queued(stream, PROMPT)).expect("begin");
            stream_wait(&save, stream).expect("wait");
            state.fill(|_| stream, 10, 0);
            save.wait_durable(WAIT).expect("durable");
            assert!(state.is_saved(&store, step), "{buffers} buffers");
        }
        assert_eq!(standin.calls(WAITS), 0, "{buffers} buffers");
        assert_idle(&store);
    }
    standin.synchronize(0, stream);
}

/// Whether a save through a ring holds what it should, with an update right behind it and copies that are late.
fn saved_right(plant: impl Fn(&mut Faults)) -> bool {
    let standin = Standin::take();
    let (stream, other) = (standin.stream(0), standin.stream(0));
    let (mut faults, sim) = (Faults::default(), medium());
    plant(&mut faults);
    let store = open(&sim, CHUNK, FEW, faults);
    let mut state = State::new(&standin, MIXED);
    state.fill(|_| stream, 1, 0);
    standin.synchronize(0, stream);
    // What is written is read out of the buffers late.
    let hold = sim.hold(|attempt| attempt.kind == AttemptKind::StartCopy);
    let save = begin_held(&state, &store, 1, other, stream);
    state.fill(|_| stream, 2, 0);
    std::thread::sleep(Duration::from_millis(50));
    standin.hold_stream(other, false);
    std::thread::sleep(Duration::from_millis(50));
    sim.release(hold);
    save.wait_durable(WAIT).expect("durable");
    let right = state.is_saved(&store, 1);
    standin.synchronize(0, stream);
    right
}

#[test]
fn faults_in_the_order_of_things_are_caught() {
    assert!(saved_right(|_| {}));
    assert!(!saved_right(|faults| faults.stream_waits_for_nothing = true));
    assert!(!saved_right(|faults| faults.land_early = true));
    assert!(!saved_right(|faults| faults.free_places_early = true));
}

/// A default stream is one of each GPU.
#[test]
fn the_default_streams_of_all_gpus_wait() {
    let standin = Standin::take();
    let store = store(FEW, Faults::default());
    let mut state = State::new(&standin, TWO_GPUS);
    warm(&store, &mut state, Stream(0));
    for step in 2..6 {
        state.fill(|_| Stream(0), step, 0);
        (0..2).for_each(|device| standin.synchronize(device, Stream(0)));
        standin.delay_us(SLOW_US);
        let save = state.begin(&store, step, queued(Stream(0), PROMPT)).expect("begin");
        stream_wait(&save, Stream(0)).expect("wait");
        assert!(!save.progress().copied);
        state.fill(|_| Stream(0), step + 1, 0);
        save.wait_durable(WAIT).expect("durable");
        assert!(state.is_saved(&store, step));
        (0..2).for_each(|device| standin.synchronize(device, Stream(0)));
        assert_eq!(state.now(), state.expected(step + 1));
        standin.delay_us(0);
    }
}

#[test]
fn others_save_while_a_stream_is_far_from_its_copies() {
    let standin = Standin::take();
    let (stream, other) = (standin.stream(0), standin.stream(0));
    let (store, state) = warmed(&standin, stream);
    let held = begin_held(&state, &store, 2, other, stream);
    let mut host = State::new(&standin, &[(50_000, None)]);
    host.fill(|_| stream, 3, 0);
    let save = host.begin(&store, 3, SaveOptions { wait: WAIT, ..SaveOptions::DEFAULT }).expect("begin");
    save.wait_durable(WAIT).expect("durable beside it");
    assert!(host.is_saved(&store, 3));
    standin.hold_stream(other, false);
    held.wait_durable(WAIT).expect("durable");
    standin.synchronize(0, stream);
}

/// A save that is begun while another one has the buffers gathers its own as they come back.
#[test]
fn saves_follow_each_other_on_the_stream_that_waits() {
    let standin = Standin::take();
    let stream = standin.stream(0);
    let (store, mut state) = warmed(&standin, stream);
    standin.delay_us(SLOW_US / 10);
    let saves: Vec<Save> = (2..8)
        .map(|step| {
            state.fill(|_| stream, step, 0);
            let options = match step % 3 {
                0 => on(stream, Snapshot::Staging),
                1 => on(stream, Snapshot::Spare),
                _ => queued(stream, PROMPT),
            };
            let save = state.begin(&store, step, options).expect("begin");
            stream_wait(&save, stream).expect("wait");
            save
        })
        .collect();
    let began = Instant::now();
    for (save, step) in saves.iter().zip(2..) {
        save.wait_durable(WAIT).unwrap_or_else(|error| panic!("step {step}: {error}"));
    }
    assert!(began.elapsed() < PROMPT / 2, "{:?}", began.elapsed());
    assert!(state.is_saved(&store, 7));
    standin.synchronize(0, stream);
    assert_idle(&store);
}
