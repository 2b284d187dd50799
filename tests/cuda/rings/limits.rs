//! What the driver, the pool and the state allow.

use super::*;

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
    let mut state = State::new(&standin, &[(1_000, Some(0)); 9_000]);
    warm(&store, &mut state, stream);
    standin.allocations_wait(false);
    state.fill(|_| stream, 2, 0);
    standin.synchronize(0, stream);
    standin.queue_limit(1_000);
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

/// Buffers that somebody keeps: a raw save that is half-way.
#[test]
fn where_too_few_buffers_become_free_the_thread_waits() {
    for buffers in [4, 8] {
        let standin = Standin::take();
        let stream = standin.stream(0);
        let store = store(buffers, Faults::default());
        let mut state = State::new(&standin, MIXED);
        state.fill(|_| stream, 2, 0);
        let raw = store.begin_raw(1, 400_000, &[], SaveOptions::DEFAULT).expect("raw");
        for at in 0..buffers {
            raw.write_at(at * CHUNK * 2, &[7; 100]).expect("write");
        }
        let began = Instant::now();
        let save = state.begin(&store, 2, queued(stream, PROMPT)).expect("begin");
        stream_wait(&save, stream).expect("wait");
        state.fill(|_| stream, 3, 0);
        save.wait_durable(WAIT).expect("durable beside a raw save");
        assert!(began.elapsed() < PROMPT / 2);
        assert!(state.is_saved(&store, 2));
        standin.synchronize(0, stream);
        drop(raw);
    }
}

/// Where buffers come back slowly a save does not make do with the first few.
#[test]
fn a_ring_is_not_small_because_others_are_being_written() {
    let standin = Standin::take();
    let stream = standin.stream(0);
    let sim = medium();
    let store = open(&sim, CHUNK, 40, Faults::default());
    // With the header and the table 40 writes.
    let host = State::new(&standin, &[(38 * CHUNK as usize, None)]);
    let mut state = State::new(&standin, MIXED);
    state.fill(|_| stream, 2, 0);
    let first = sim.hold(|attempt| attempt.kind == AttemptKind::StartCopy && attempt.nth < 13);
    let rest = sim.hold(|attempt| attempt.kind == AttemptKind::StartCopy && attempt.nth < 40);
    let own = sim.hold(|attempt| attempt.kind == AttemptKind::StartCopy);
    let before = host.begin(&store, 1, SaveOptions { wait: WAIT, ..SaveOptions::DEFAULT }).expect("begin");
    until("all of it is being written", || before.progress().copied);
    let save = state.begin(&store, 2, queued(stream, PROMPT)).expect("begin");
    sim.release(first);
    std::thread::sleep(Duration::from_millis(50));
    sim.release(rest);
    before.wait_durable(WAIT).expect("durable");
    let many = sim.wait_held(own, 9, PROMPT);
    sim.release(own);
    save.wait_durable(WAIT).expect("durable");
    assert!(many, "few chunks are written at once");
    assert!(state.is_saved(&store, 2));
}

/// What stands in host memory between tensors of a GPU is kept aside; too much of it is not.
#[test]
fn where_much_host_memory_stands_between_the_thread_waits() {
    const MIB: usize = 1 << 20;
    let standin = Standin::take();
    let stream = standin.stream(0);
    for (count, queues) in [(14, true), (17, false)] {
        let sim = Arc::new(SimMedium::new(160 << 20, SimModel::Ssd { torn: false }));
        format_medium(&*sim, &FormatOptions::new(3, 40 << 20)).expect("format");
        let store = open(&sim, MIB as u64, FEW, Faults::default());
        let shape: Vec<_> = (0..2 * count).map(|at| [(MIB, None), (9_000, Some(0))][at % 2]).collect();
        let mut state = State::new(&standin, &shape);
        state.fill(|_| stream, 1, 0);
        let before = standin.calls(WAITS);
        let save = state.begin(&store, 1, queued(stream, PROMPT)).expect("begin");
        stream_wait(&save, stream).expect("wait");
        save.wait_durable(WAIT).expect("durable");
        assert_eq!(standin.calls(WAITS) > before, queues, "{count} MiB");
        assert!(state.is_saved(&store, 1));
    }
}

/// A driver before CUDA 11.7 has no words, and one queue for all streams would have the program's work wait for copiers.
#[test]
fn where_copies_cannot_wait_for_buffers_the_thread_does() {
    const CONNECTIONS: &str = "CUDA_DEVICE_MAX_CONNECTIONS";
    const LACKING: &str = crate::standin::LACKING;
    if std::env::var_os(CONNECTIONS).is_none() && std::env::var_os(LACKING).is_none() {
        for setting in [CONNECTIONS, LACKING] {
            let mut again = Command::new(std::env::current_exe().expect("this test"));
            again.args(["--exact", "rings::limits::where_copies_cannot_wait_for_buffers_the_thread_does"]);
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
