//! However a save ends, nothing waits for it for ever, and nothing of it is believed that is not so.

use super::*;

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

/// Nothing that is cancelled waits for storage, nor does a stream that waits for its copies.
#[test]
fn a_save_that_is_cancelled_does_not_wait_for_storage() {
    let standin = Standin::take();
    let stream = standin.stream(0);
    let sim = medium();
    let store = open(&sim, CHUNK, FEW, Faults::default());
    let mut state = State::new(&standin, MIXED);
    warm(&store, &mut state, stream);
    state.fill(|_| stream, 2, 0);
    let hold = sim.hold(|attempt| attempt.kind == AttemptKind::StartCopy);
    let save = state.begin(&store, 2, queued(stream, PROMPT)).expect("begin");
    stream_wait(&save, stream).expect("wait");
    until("some are being written", || sim.wait_held(hold, 3, Duration::ZERO));
    let began = Instant::now();
    drop(save);
    standin.synchronize(0, stream);
    assert!(began.elapsed() < PROMPT / 2, "{:?}", began.elapsed());
    // Copies have gone over what is being written.
    state.fill(|_| stream, 3, 0);
    standin.synchronize(0, stream);
    sim.release(hold);
    assert_idle(&store);
    for step in [2, 3] {
        state.fill(|_| stream, step, 0);
        let save = state.begin(&store, step, queued(stream, PROMPT)).expect("begin");
        save.wait_durable(WAIT).expect("durable");
        assert!(state.is_saved(&store, step));
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

/// What has arrived may be written for as long as it takes.
#[test]
fn the_deadline_is_for_copies_and_not_for_storage() {
    let standin = Standin::take();
    let stream = standin.stream(0);
    let sim = medium();
    let store = open(&sim, CHUNK, FEW, Faults::default());
    let mut state = State::new(&standin, &[(3 * CHUNK as usize, Some(0))]);
    state.fill(|_| stream, 1, 0);
    let hold = sim.hold(|attempt| attempt.kind == AttemptKind::StartCopy);
    let save = state.begin(&store, 1, queued(stream, Duration::from_millis(200))).expect("begin");
    save.wait_copied(WAIT).expect("copied");
    std::thread::sleep(Duration::from_millis(300));
    sim.release(hold);
    save.wait_durable(WAIT).expect("durable");
    assert!(state.is_saved(&store, 1));
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

/// What the other one still copies must find its buffers, and its streams what they wait for.
#[test]
fn a_gpu_that_fails_leaves_another_alone() {
    let standin = Standin::take();
    let streams = [standin.stream(0), standin.stream(1)];
    let fails = standin.stream(0);
    let store = store(FEW, Faults::default());
    let mut state = State::new(&standin, TWO_GPUS);
    let one = State::new(&standin, &[(9_000, Some(1))]);
    state.fill(|device| streams[device as usize], 1, 0);
    (0..2).for_each(|device| standin.synchronize(device, streams[device as usize]));
    standin.hold_stream(fails, true);
    // The other one goes on copying for longer than the first is given up.
    standin.delay_us(400_000);
    let save = state.begin(&store, 1, queued(fails, PROMPT)).expect("begin");
    streams.iter().for_each(|&stream| stream_wait(&save, stream).expect("wait"));
    standin.fail_device(0, 700);
    standin.hold_stream(fails, false);
    assert_eq!(save.wait_durable(WAIT).unwrap_err().kind(), ErrorKind::Device);
    drop(save);
    assert_idle(&store);
    // Copies that still came would go over what these have in the same buffers.
    let mut host = State::new(&standin, &[(200_000, None)]);
    let mut step = 1;
    while step < 4 || !standin.is_idle(1, streams[1]) {
        step += 1;
        host.fill(|_| streams[0], step, 0);
        let save =
            host.begin(&store, step, SaveOptions { wait: WAIT, ..SaveOptions::DEFAULT }).expect("begin");
        save.wait_durable(WAIT).expect("durable");
        assert!(host.is_saved(&store, step));
    }
    standin.delay_us(0);
    let next = one.begin(&store, step + 1, on(Stream(0), Snapshot::Staging)).expect("begin");
    next.wait_durable(WAIT).expect("durable");
    drop(store);
    standin.reset();
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
