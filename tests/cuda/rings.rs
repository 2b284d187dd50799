//! Saves whose copies are all enqueued at once, to a ring of buffers: no thread waits for a pool that is too small, whatever holds up the
//! driver, and nothing hangs.

use std::process::Command;
use std::sync::Arc;
use std::time::{Duration, Instant};

use pccheck::engine::Store;
use pccheck::error::ErrorKind;
use pccheck::medium::sim::{AttemptKind, SimMedium, SimModel};
use pccheck::save::{DeviceOptions, Faults, Save, SaveOptions, Snapshot};
use pccheck::store::{format_medium, FormatOptions};

use super::bed::{
    assert_idle, medium, on, open, store, stream_wait, until, State, CHUNK, MIXED, PROMPT, TWO_GPUS, WAIT,
};
use super::standin::{Standin, Stream};

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

/// What a program can do to the driver: its launch queues are full behind the wait, it allocates, it captures.
#[test]
fn a_driver_that_is_held_up_holds_up_nothing() {
    const CALLS: &[&str] = &[
        "cuCtxPushCurrent_v2",
        "cuEventQuery",
        "cuEventCreate",
        "cuEventDestroy_v2",
        "cuStreamQuery",
        "cuMemcpyDtoHAsync_v2",
        "cuMemcpyBatchAsync",
        WAITS,
        "cuStreamWriteValue32_v2",
    ];
    let standin = Standin::take();
    let (stream, other) = (standin.stream(0), standin.stream(0));
    let (store, mut state) = warmed(&standin, stream);
    for step in 2..6 {
        state.fill(|_| stream, step, 0);
        standin.synchronize(0, stream);
        let save = begin_held(&state, &store, step, other, stream);
        CALLS.iter().for_each(|call| standin.stall(call, true));
        standin.hold_stream(other, false);
        let copied = save.wait_copied(WAIT);
        CALLS.iter().for_each(|call| standin.stall(call, false));
        copied.expect("copied");
        standin.synchronize(0, stream);
        save.wait_durable(WAIT).expect("durable");
        assert!(state.is_saved(&store, step));
    }
    assert_idle(&store);
}

/// A plain training loop launches more behind the wait than the driver queues. A launch then waits for room with the driver's lock, and
/// there is room when the copies have ended.
#[test]
fn launch_queues_that_are_full_hold_up_nothing() {
    let standin = Standin::take();
    let (stream, other) = (standin.stream(0), standin.stream(0));
    let (store, mut state) = warmed(&standin, stream);
    let mut work = State::new(&standin, &[(100, Some(0)); 10]);
    for step in 2..5 {
        state.fill(|_| stream, step, 0);
        standin.synchronize(0, stream);
        let jams = standin.jams();
        let save = begin_held(&state, &store, step, other, stream);
        standin.queue_limit(64);
        std::thread::scope(|scope| {
            scope.spawn(|| (0..50).for_each(|times| work.fill(|_| stream, times, 0)));
            until("the queue is full", || standin.jams() > jams);
            standin.hold_stream(other, false);
        });
        standin.queue_limit(0);
        save.wait_durable(WAIT).expect("durable");
        assert!(state.is_saved(&store, step));
    }
    standin.synchronize(0, stream);
    assert_idle(&store);
}

/// The engine itself enqueues no more than there is room for, and the rest as copies end: the program's calls are not held up.
#[test]
fn a_state_of_more_copies_than_the_driver_queues_leaves_room() {
    let standin = Standin::take();
    let (stream, other) = (standin.stream(0), standin.stream(0));
    let sim = Arc::new(SimMedium::new(80 << 20, SimModel::Ssd { torn: false }));
    format_medium(&*sim, &FormatOptions::new(3, 20 << 20)).expect("format");
    let store = open(&sim, CHUNK, FEW, Faults::default());
    let mut state = State::new(&standin, &[(3_000, Some(0)); 3_000]);
    warm(&store, &mut state, stream);
    standin.allocations_wait(false);
    state.fill(|_| stream, 2, 0);
    standin.synchronize(0, stream);
    standin.queue_limit(500);
    standin.hold_stream(other, true);
    let copies = standin.calls("cuStreamWriteValue32_v2");
    let save = state.begin(&store, 2, queued(other, PROMPT)).expect("begin");
    until("copies are enqueued", || standin.calls("cuStreamWriteValue32_v2") > copies + 50);
    std::thread::sleep(Duration::from_millis(50));
    let jams = standin.jams();
    // SAFETY: the stream lives.
    let waited = unsafe { save.stream_wait_copied(stream.0, Some(Duration::from_millis(20))) };
    standin.hold_stream(other, false);
    assert_eq!(jams, 0);
    assert_eq!(waited.expect_err("not all are enqueued").kind(), ErrorKind::TimedOut);
    stream_wait(&save, stream).expect("wait");
    state.fill(|_| stream, 3, 0);
    standin.queue_limit(0);
    save.wait_durable(WAIT).expect("durable");
    assert!(state.is_saved(&store, 2));
    standin.synchronize(0, stream);
    // One that ends while it is being enqueued.
    standin.hold_stream(other, true);
    let save = state.begin(&store, 3, queued(other, PROMPT)).expect("begin");
    std::thread::sleep(Duration::from_millis(20));
    save.cancel();
    standin.hold_stream(other, false);
    assert_eq!(save.wait_durable(WAIT).unwrap_err().kind(), ErrorKind::Cancelled);
    drop(save);
    assert_idle(&store);
}

/// An allocation waits for all streams, the engine's included, and those for the copiers.
#[test]
fn what_waits_for_the_whole_gpu_holds_up_nothing() {
    let standin = Standin::take();
    let (stream, other) = (standin.stream(0), standin.stream(0));
    let (store, state) = warmed(&standin, stream);
    let save = begin_held(&state, &store, 2, other, stream);
    // It allocates, as another save does first.
    let spare = state.begin(&store, 3, on(other, Snapshot::Spare)).expect("begin");
    std::thread::scope(|scope| {
        scope.spawn(|| standin.free(0, standin.allocate(0, 100)));
        std::thread::sleep(Duration::from_millis(50));
        standin.hold_stream(other, false);
        save.wait_durable(WAIT).expect("durable");
        spare.wait_durable(WAIT).expect("durable");
    });
    standin.synchronize(0, stream);
    assert_idle(&store);
}

/// However a save ends, the stream that waits for it goes on.
#[test]
fn the_stream_goes_on_however_the_save_ends() {
    #[derive(Debug, Clone, Copy)]
    enum End {
        Cancelled,
        Dropped,
        Failed,
        Closed,
    }
    for end in [End::Cancelled, End::Dropped, End::Failed, End::Closed] {
        let standin = Standin::take();
        let (stream, other) = (standin.stream(0), standin.stream(0));
        let sim = medium();
        let store = open(&sim, CHUNK, FEW, Faults::default());
        let mut state = State::new(&standin, MIXED);
        warm(&store, &mut state, stream);
        state.fill(|_| stream, 2, 0);
        standin.synchronize(0, stream);
        let save = begin_held(&state, &store, 2, other, stream);
        state.fill(|_| stream, 3, 0);
        let (mut save, mut store) = (Some(save), Some(store));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(Duration::from_millis(20));
                standin.hold_stream(other, false);
            });
            match end {
                End::Cancelled => save.as_ref().expect("save").cancel(),
                End::Dropped => drop(save.take()),
                End::Failed => sim.fail(|attempt| (attempt.kind == AttemptKind::StartCopy).then_some(5)),
                End::Closed => drop(store.take()),
            }
            standin.synchronize(0, stream);
        });
        if let Some(save) = &save {
            let expected = match end {
                End::Failed => ErrorKind::Io,
                _ => ErrorKind::Cancelled,
            };
            assert_eq!(save.wait_durable(WAIT).unwrap_err().kind(), expected, "{end:?}");
        }
        drop(save);
        if let Some(store) = &store {
            sim.fail(|_| None);
            assert_idle(store);
            let save = state.begin(store, 3, queued(stream, PROMPT)).expect("begin");
            save.wait_durable(WAIT).expect("durable");
            assert!(state.is_saved(store, 3), "{end:?}");
        }
        drop(store);
        standin.synchronize(0, other);
    }
}

/// A disk that hangs keeps the buffers that copies wait for; the driver may be held up as well.
#[test]
fn at_the_deadline_the_stream_goes_on() {
    let standin = Standin::take();
    let stream = standin.stream(0);
    for stalls in [false, true] {
        let sim: Arc<SimMedium> = medium();
        let store = open(&sim, CHUNK, FEW, Faults::default());
        let mut state = State::new(&standin, MIXED);
        warm(&store, &mut state, stream);
        let hold = sim.hold(|attempt| attempt.kind == AttemptKind::StartCopy);
        let began = Instant::now();
        let save = state.begin(&store, 2, queued(stream, Duration::from_millis(300))).expect("begin");
        stream_wait(&save, stream).expect("wait");
        standin.stall("cuEventQuery", stalls);
        standin.synchronize(0, stream);
        assert!(began.elapsed() >= Duration::from_millis(300));
        assert!(began.elapsed() < PROMPT / 2);
        standin.stall("cuEventQuery", false);
        sim.release(hold);
        assert_eq!(save.wait_durable(WAIT).unwrap_err().kind(), ErrorKind::TimedOut);
        assert_idle(&store);
        // Copies have gone over what was being written: nothing of that may be taken for the same.
        for step in 3..6 {
            let next = state.begin(&store, step, queued(stream, PROMPT)).expect("begin");
            next.wait_durable(WAIT).expect("durable");
            let opened = store.open_checkpoint(pccheck::engine::Select::Newest, true).expect("verified");
            assert_eq!(opened.checkpoint.record().step, step);
        }
        standin.allocations_wait(false);
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

/// Handles of saves outlive their store.
#[test]
fn a_stream_that_is_to_wait_after_the_store_was_closed_does_not_wait_for_ever() {
    let standin = Standin::take();
    let (stream, other) = (standin.stream(0), standin.stream(0));
    let (store, state) = warmed(&standin, stream);
    let save = begin_held(&state, &store, 2, other, stream);
    std::thread::scope(|scope| {
        let closing = scope.spawn(|| drop(store));
        // Before, in the middle of and after closing.
        for _ in 0..50 {
            match stream_wait(&save, stream) {
                Ok(()) => {}
                Err(error) => assert_eq!(error.kind(), ErrorKind::Cancelled, "{error}"),
            }
            std::thread::sleep(Duration::from_millis(1));
            standin.hold_stream(other, false);
        }
        closing.join().expect("closed");
    });
    assert_eq!(stream_wait(&save, stream).unwrap_err().kind(), ErrorKind::Cancelled);
    standin.synchronize(0, stream);
}

#[test]
fn a_store_with_a_ring_is_closed_although_a_gpu_hangs() {
    let standin = Standin::take();
    let (stream, other) = (standin.stream(0), standin.stream(0));
    let (store, state) = warmed(&standin, stream);
    let save = begin_held(&state, &store, 2, other, stream);
    standin.hold(true);
    let began = Instant::now();
    drop(store);
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
    standin.hold(false);
    standin.hold_stream(other, false);
    drop(save);
    standin.synchronize(0, stream);
    standin.synchronize(0, other);
}

/// A GPU that fails tells nothing in words any more.
#[test]
fn a_gpu_that_fails_in_the_middle_costs_its_save() {
    let standin = Standin::take();
    for nth in [1, 2, 5, 9, 14] {
        let stream = standin.stream(0);
        let (store, mut state) = warmed(&standin, stream);
        state.fill(|_| stream, 2, 0);
        standin.synchronize(0, stream);
        standin.fail_work(nth, 700);
        let save = state.begin(&store, 2, queued(stream, PROMPT)).expect("begin");
        let error = save.wait_durable(WAIT).expect_err("the GPU has failed");
        assert_eq!(error.kind(), ErrorKind::Device, "{error}");
        drop(save);
        assert_idle(&store);
        standin.reset();
    }
}

/// A driver before CUDA 11.7 has no words, and one queue for all streams would have the program's work wait for copiers.
#[test]
fn where_copies_cannot_wait_for_buffers_the_thread_does() {
    const CONNECTIONS: &str = "CUDA_DEVICE_MAX_CONNECTIONS";
    const LACKING: &str = super::standin::LACKING;
    if std::env::var_os(CONNECTIONS).is_none() && std::env::var_os(LACKING).is_none() {
        for setting in [CONNECTIONS, LACKING] {
            let mut again = Command::new(std::env::current_exe().expect("this test"));
            again.args(["--exact", "rings::where_copies_cannot_wait_for_buffers_the_thread_does"]);
            let again = again.env(setting, "1").output().expect("run");
            let said = String::from_utf8_lossy(&again.stdout);
            assert!(again.status.success() && said.contains("1 passed"), "{said}");
        }
        return;
    }
    let standin = Standin::take();
    let stream = standin.stream(0);
    let (store, mut state) = warmed(&standin, stream);
    standin.delay_us(SLOW_US);
    state.fill(|_| stream, 2, 0);
    let save = state.begin(&store, 2, queued(stream, PROMPT)).expect("begin");
    stream_wait(&save, stream).expect("wait");
    state.fill(|_| stream, 3, 0);
    save.wait_durable(WAIT).expect("durable");
    assert!(state.is_saved(&store, 2));
    if std::env::var_os(LACKING).is_none() {
        assert_eq!(standin.calls(WAITS), 0);
    }
    standin.synchronize(0, stream);
}

/// Whichever thread of the engine dies: what it had would be given back by calls that wait for the stream.
#[test]
fn the_stream_goes_on_where_a_thread_of_the_engine_dies() {
    for of_the_ring in [true, false] {
        let standin = Standin::take();
        let (stream, other) = (standin.stream(0), standin.stream(0));
        let mut faults = Faults::default();
        faults.die_at_landing = of_the_ring;
        faults.die_at_arrival = !of_the_ring;
        let store = store(FEW, faults);
        let mut state = State::new(&standin, MIXED);
        // Of two saves in flight one must be no ring's.
        let small = State::new(&standin, &[(9_000, Some(0))]);
        for options in [on(stream, Snapshot::Staging), on(stream, Snapshot::Spare)] {
            state.begin(&store, 1, options).and_then(|save| save.wait_durable(WAIT)).expect("durable");
        }
        standin.allocations_wait(true);
        state.fill(|_| stream, 2, 0);
        standin.synchronize(0, stream);
        let save = begin_held(&state, &store, 2, other, stream);
        let second =
            (!of_the_ring).then(|| small.begin(&store, 3, on(stream, Snapshot::Staging)).expect("begin"));
        let began = Instant::now();
        standin.hold_stream(other, false);
        standin.synchronize(0, stream);
        assert!(began.elapsed() < PROMPT / 2, "{:?}", began.elapsed());
        if of_the_ring {
            assert_eq!(save.wait_durable(WAIT).unwrap_err().kind(), ErrorKind::Internal);
        }
        drop((save, second));
        let closing = std::thread::spawn(|| drop(store));
        until("the store is closed", || closing.is_finished());
    }
}
