//! Streams that wait for a flag in memory: no thread waits for a pool that is too small, and nothing hangs.

use std::collections::VecDeque;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

use pccheck::engine::Store;
use pccheck::error::ErrorKind;
use pccheck::save::{DeviceOptions, Faults, Save, SaveOptions, Snapshot};

use super::bed::{on, store, stream_wait, until, State, MIXED, PROMPT, TWO_GPUS, WAIT};
use super::standin::{Standin, Stream};

/// Of a pool that takes the state in many portions.
const FEW: u64 = 8;
/// Per copy, of which a state takes a dozen.
const SLOW_US: u64 = 300_000;

pub fn flagged(stream: Stream, timeout: Duration) -> SaveOptions {
    let options = on(stream, Snapshot::Staging);
    SaveOptions { device: DeviceOptions { flag_waits: true, timeout, ..options.device }, ..options }
}

/// All that is allocated once is there; what is allocated from now on waits for all streams.
pub fn warm(store: &Store, state: &mut State, stream: Stream) {
    state.fill(|_| stream, 1, 0);
    let save = state.begin(store, 1, flagged(stream, PROMPT)).expect("begin");
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
fn begin_held(
    state: &State,
    store: &Store,
    step: u64,
    held: Stream,
    waits: Stream,
    timeout: Duration,
) -> Save {
    state.standin.hold_stream(held, true);
    let save = state.begin(store, step, flagged(held, timeout)).expect("begin");
    // Without a flag this would wait for the copies.
    stream_wait(&save, waits).expect("wait");
    assert!(!save.progress().copied);
    save
}

#[test]
fn the_stream_waits_for_a_pool_that_is_too_small_and_the_thread_does_not() {
    let standin = Standin::take();
    let (stream, other) = (standin.stream(0), standin.stream(0));
    let (store, mut state) = warmed(&standin, stream);
    for step in 2..5 {
        state.fill(|_| stream, step, 0);
        standin.synchronize(0, stream);
        let save = begin_held(&state, &store, step, other, stream, PROMPT);
        state.fill(|_| stream, step + 10, 0);
        std::thread::sleep(Duration::from_millis(20));
        standin.hold_stream(other, false);
        save.wait_durable(WAIT).expect("durable");
        assert!(state.is_saved(&store, step));
        standin.synchronize(0, stream);
        assert_eq!(state.now(), state.expected(step + 10));
    }
}

#[test]
fn a_flag_that_is_raised_early_is_caught() {
    let standin = Standin::take();
    let (stream, other) = (standin.stream(0), standin.stream(0));
    let mut faults = Faults::default();
    faults.stream_waits_for_nothing = true;
    let store = store(FEW, faults);
    let mut state = State::new(&standin, MIXED);
    warm(&store, &mut state, stream);
    state.fill(|_| stream, 2, 0);
    standin.synchronize(0, stream);
    let save = begin_held(&state, &store, 2, other, stream, PROMPT);
    state.fill(|_| stream, 3, 0);
    standin.synchronize(0, stream);
    standin.hold_stream(other, false);
    save.wait_durable(WAIT).expect("durable");
    assert!(!state.is_saved(&store, 2));
}

/// A default stream is one of each GPU.
#[test]
fn the_default_streams_of_all_gpus_wait() {
    let standin = Standin::take();
    let store = store(FEW, Faults::default());
    let mut state = State::new(&standin, TWO_GPUS);
    warm(&store, &mut state, Stream(0));
    state.fill(|_| Stream(0), 2, 0);
    (0..2).for_each(|device| standin.synchronize(device, Stream(0)));
    standin.delay_us(SLOW_US);
    let waits = standin.calls("cuStreamWaitValue32_v2");
    let save = state.begin(&store, 2, flagged(Stream(0), PROMPT)).expect("begin");
    stream_wait(&save, Stream(0)).expect("wait");
    assert_eq!(standin.calls("cuStreamWaitValue32_v2") - waits, 2);
    state.fill(|_| Stream(0), 3, 0);
    save.wait_durable(WAIT).expect("durable");
    assert!(state.is_saved(&store, 2));
    (0..2).for_each(|device| standin.synchronize(device, Stream(0)));
    assert_eq!(state.now(), state.expected(3));
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
        let (store, mut state) = warmed(&standin, stream);
        let save = begin_held(&state, &store, 2, other, stream, PROMPT);
        state.fill(|_| stream, 3, 0);
        let (mut save, mut store) = (Some(save), Some(store));
        std::thread::scope(|scope| {
            scope.spawn(|| {
                std::thread::sleep(Duration::from_millis(20));
                if !matches!(end, End::Cancelled) {
                    standin.hold_stream(other, false);
                }
            });
            match end {
                End::Cancelled => save.as_ref().expect("save").cancel(),
                End::Dropped => drop(save.take()),
                End::Failed => {
                    // Whichever it copies by.
                    standin.fail("cuMemcpyBatchAsync", 1, 700, false);
                    standin.fail("cuMemcpyDtoHAsync_v2", 1, 700, false);
                }
                End::Closed => drop(store.take()),
            }
            standin.synchronize(0, stream);
            standin.hold_stream(other, false);
        });
        if let Some(save) = &save {
            let expected = match end {
                End::Failed => ErrorKind::Device,
                _ => ErrorKind::Cancelled,
            };
            assert_eq!(save.wait_durable(WAIT).unwrap_err().kind(), expected, "{end:?}");
        }
        drop(save);
        drop(store);
        standin.synchronize(0, other);
    }
}

/// The thread that copies may be held up in the driver: another one sees to the deadline.
#[test]
fn at_the_deadline_the_stream_goes_on() {
    for stalls in [false, true] {
        the_stream_goes_on_at_the_deadline(stalls);
    }
}

fn the_stream_goes_on_at_the_deadline(stalls: bool) {
    let standin = Standin::take();
    let (stream, other) = (standin.stream(0), standin.stream(0));
    let (store, state) = warmed(&standin, stream);
    let began = Instant::now();
    let save = begin_held(&state, &store, 2, other, stream, Duration::from_millis(300));
    standin.stall("cuEventQuery", stalls);
    standin.synchronize(0, stream);
    assert!(began.elapsed() >= Duration::from_millis(300));
    standin.stall("cuEventQuery", false);
    standin.hold_stream(other, false);
    assert_eq!(save.wait_durable(WAIT).unwrap_err().kind(), ErrorKind::TimedOut);
    let next = state.begin(&store, 3, flagged(stream, PROMPT)).expect("begin");
    next.wait_durable(WAIT).expect("durable");
}

/// What waits for a whole GPU would wait for the stream, and that for the engine.
#[test]
fn nothing_is_allocated_while_a_stream_waits() {
    let standin = Standin::take();
    let (stream, other) = (standin.stream(0), standin.stream(0));
    let (store, unprepared) = (store(FEW, Faults::default()), store(FEW, Faults::default()));
    let mut state = State::new(&standin, MIXED);
    warm(&store, &mut state, stream);
    let plain = state.begin(&unprepared, 1, on(stream, Snapshot::Staging)).expect("begin");
    plain.wait_durable(WAIT).expect("durable");
    let save = begin_held(&state, &store, 2, other, stream, PROMPT);
    let calls = || ["cuMemAlloc_v2", "cuMemFree_v2", "cuMemHostRegister_v2"].map(|call| standin.calls(call));
    let before = calls();
    let spare = state.begin(&store, 3, on(other, Snapshot::Spare)).expect("begin");
    let first = state.begin(&unprepared, 3, flagged(other, PROMPT)).expect("begin");
    std::thread::sleep(Duration::from_millis(50));
    let meanwhile = calls();
    // Before anything is said of it: what allocates would wait for this.
    standin.hold_stream(other, false);
    assert_eq!(meanwhile, before);
    for save in [save, spare, first] {
        save.wait_durable(WAIT).expect("durable");
    }
    assert!(calls()[0] > before[0]);
    standin.synchronize(0, stream);
}

#[test]
fn flags_are_used_again() {
    let standin = Standin::take();
    let (stream, other) = (standin.stream(0), standin.stream(0));
    let (store, state) = warmed(&standin, stream);
    // There are 128.
    for step in 2..200 {
        let save = begin_held(&state, &store, step, other, stream, PROMPT);
        standin.hold_stream(other, false);
        standin.synchronize(0, stream);
        assert!(save.progress().copied);
        save.wait_durable(WAIT).expect("durable");
    }
}

/// The driver refuses one of the calls: the thread waits instead.
#[test]
fn where_the_stream_cannot_wait_the_thread_does() {
    for call in ["cuStreamWaitValue32_v2", "cuMemHostGetDevicePointer_v2"] {
        let standin = Standin::take();
        let stream = standin.stream(0);
        let (store, mut state) = warmed(&standin, stream);
        standin.delay_us(SLOW_US);
        state.fill(|_| stream, 2, 0);
        let save = state.begin(&store, 2, flagged(stream, PROMPT)).expect("begin");
        let made = standin.calls(call);
        standin.fail(call, 1, 801, false);
        stream_wait(&save, stream).expect("wait");
        assert!(standin.calls(call) > made, "{call}");
        state.fill(|_| stream, 3, 0);
        save.wait_durable(WAIT).expect("durable");
        assert!(state.is_saved(&store, 2), "{call}");
        standin.synchronize(0, stream);
    }
}

/// The next save is begun on the stream that waits for the one before: its copies wait for that stream, and must not stand in the way of
/// those that the stream waits for.
#[test]
fn saves_follow_each_other_on_the_stream_that_waits() {
    let standin = Standin::take();
    let stream = standin.stream(0);
    let (store, mut state) = warmed(&standin, stream);
    standin.delay_us(SLOW_US / 30);
    let saves: Vec<Save> = (2..6)
        .map(|step| {
            state.fill(|_| stream, step, 0);
            let options = match step % 2 {
                0 => flagged(stream, PROMPT),
                _ => on(stream, Snapshot::Staging),
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
    assert!(state.is_saved(&store, 5));
    standin.synchronize(0, stream);
}

/// Handles of saves outlive their store.
#[test]
fn a_stream_that_is_to_wait_after_the_store_was_closed_does_not_wait_for_ever() {
    let standin = Standin::take();
    let (stream, other) = (standin.stream(0), standin.stream(0));
    let (store, state) = warmed(&standin, stream);
    let save = begin_held(&state, &store, 2, other, stream, PROMPT);
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
fn a_store_with_flags_is_closed_although_a_gpu_hangs() {
    let standin = Standin::take();
    let (stream, other) = (standin.stream(0), standin.stream(0));
    let (store, state) = warmed(&standin, stream);
    let save = begin_held(&state, &store, 2, other, stream, WAIT.expect("a limit"));
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

/// A thread that comes between: it was told that its stream may wait, and by then nobody is left who would end that.
#[test]
fn a_stream_that_comes_to_wait_when_the_store_has_closed_goes_on() {
    // The call between being told and having the stream wait.
    const BETWEEN: &str = "cuThreadExchangeStreamCaptureMode";
    let standin = Standin::take();
    let (stream, other) = (standin.stream(0), standin.stream(0));
    let (store, state) = warmed(&standin, stream);
    standin.hold_stream(other, true);
    let save = Arc::new(state.begin(&store, 2, flagged(other, PROMPT)).expect("begin"));
    let before = standin.calls(BETWEEN);
    standin.stall(BETWEEN, true);
    let late = save.clone();
    let waiting = std::thread::spawn(move || drop(stream_wait(&late, stream)));
    until("the thread was told", || standin.calls(BETWEEN) > before);
    let closing = std::thread::spawn(|| drop(store));
    std::thread::sleep(Duration::from_millis(20));
    standin.hold_stream(other, false);
    // The pump leaves by the same call, once all saves have ended; the thread that raises flags has nothing to wait for then.
    until("the pump ends", || standin.calls(BETWEEN) > before + 1);
    std::thread::sleep(Duration::from_millis(100));
    standin.stall(BETWEEN, false);
    // Not joined: they would never end, nor the test.
    until("both threads have ended", || waiting.is_finished() && closing.is_finished());
    until("the stream goes on", || standin.is_idle(0, stream));
}

/// The driver may hold up the copies because of the stream that waits for them, or of what the program enqueued behind that.
#[test]
fn copies_that_the_driver_holds_up_cost_their_save_and_not_the_deadline() {
    let standin = Standin::take();
    let (stream, other) = (standin.stream(0), standin.stream(0));
    let (store, state) = warmed(&standin, stream);
    let save = begin_held(&state, &store, 2, other, stream, PROMPT);
    let began = Instant::now();
    standin.stall("cuEventQuery", true);
    standin.synchronize(0, stream);
    let took = began.elapsed();
    standin.stall("cuEventQuery", false);
    standin.hold_stream(other, false);
    assert!(took < PROMPT / 2, "{took:?}");
    let error = save.wait_durable(WAIT).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Device);
    assert!(error.to_string().contains("held up"), "{error}");
    // A GPU that takes its time is none.
    let save = begin_held(&state, &store, 3, other, stream, PROMPT);
    std::thread::sleep(Duration::from_secs(7));
    standin.hold_stream(other, false);
    save.wait_durable(WAIT).expect("durable");
    standin.synchronize(0, stream);
}

/// Each save is begun before the last one is copied, so that some stream waits at any time.
#[test]
fn a_save_that_allocates_gets_its_turn() {
    let standin = Standin::take();
    let (stream, other) = (standin.stream(0), standin.stream(0));
    let (busy, state) = warmed(&standin, stream);
    let plain = store(FEW, Faults::default());
    let small = State::new(&standin, &[(80_000, Some(0))]);
    standin.delay_us(3_000);
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        scope.spawn(|| {
            let mut open = VecDeque::new();
            for step in 2.. {
                let save = state.begin(&busy, step, flagged(stream, PROMPT)).expect("begin");
                stream_wait(&save, stream).expect("wait");
                open.push_back(save);
                if open.len() > 4 {
                    open.pop_front().expect("one").wait_durable(WAIT).expect("durable");
                }
                // Relaxed: it only has to be seen some time.
                if stop.load(Ordering::Relaxed) {
                    return;
                }
            }
        });
        std::thread::sleep(Duration::from_millis(200));
        let save = small.begin(&plain, 1, on(other, Snapshot::Spare)).expect("begin");
        let saved = save.wait_durable(Some(PROMPT / 2));
        stop.store(true, Ordering::Relaxed);
        saved.expect("durable");
    });
    standin.synchronize(0, stream);
}

/// Where streams share a queue of the GPU, copies could come behind the wait for them.
#[test]
fn where_streams_share_one_queue_the_thread_waits() {
    const CONNECTIONS: &str = "CUDA_DEVICE_MAX_CONNECTIONS";
    if std::env::var_os(CONNECTIONS).is_none() {
        let mut again = Command::new(std::env::current_exe().expect("this test"));
        again.args(["--exact", "flags::where_streams_share_one_queue_the_thread_waits"]);
        let again = again.env(CONNECTIONS, "1").output().expect("run");
        let said = String::from_utf8_lossy(&again.stdout);
        assert!(again.status.success() && said.contains("1 passed"), "{said}");
        return;
    }
    let standin = Standin::take();
    let stream = standin.stream(0);
    let (store, mut state) = warmed(&standin, stream);
    standin.delay_us(SLOW_US / 30);
    state.fill(|_| stream, 2, 0);
    let save = state.begin(&store, 2, flagged(stream, PROMPT)).expect("begin");
    stream_wait(&save, stream).expect("wait");
    state.fill(|_| stream, 3, 0);
    save.wait_durable(WAIT).expect("durable");
    assert!(state.is_saved(&store, 2));
    assert_eq!(standin.calls("cuStreamWaitValue32_v2"), 0);
    standin.synchronize(0, stream);
}

/// What that thread had would be given back while it dies, which waits for the stream.
#[test]
fn the_stream_goes_on_where_the_thread_that_copies_dies() {
    let standin = Standin::take();
    let (stream, other) = (standin.stream(0), standin.stream(0));
    let mut faults = Faults::default();
    faults.die_at_arrival = true;
    let store = store(FEW, faults);
    let state = State::new(&standin, MIXED);
    for options in [flagged(stream, PROMPT), on(stream, Snapshot::Spare)] {
        state.begin(&store, 1, options).and_then(|save| save.wait_durable(WAIT)).expect("durable");
    }
    standin.allocations_wait(true);
    let save = begin_held(&state, &store, 2, other, stream, PROMPT);
    let began = Instant::now();
    standin.hold_stream(other, false);
    standin.synchronize(0, stream);
    assert!(began.elapsed() < PROMPT / 2, "{:?}", began.elapsed());
    assert_eq!(save.wait_durable(WAIT).unwrap_err().kind(), ErrorKind::Internal);
}
