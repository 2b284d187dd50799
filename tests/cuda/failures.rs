//! A driver that fails, and a GPU that hangs: the save is lost, and nothing else.

use std::time::{Duration, Instant};

use pccheck::save::{DeviceOptions, Faults, SaveOptions, Snapshot};
use pccheck::ErrorKind;

use super::bed::{assert_idle, on, store, stream_wait, until, State, MIXED, PROMPT, TWO_GPUS, WAIT};
use super::rings::queued;
use super::standin::{Standin, LEGACY};

/// Every call that a save makes, but for those that give something back.
const CALLS: &[&str] = &[
    "cuDevicePrimaryCtxRetain",
    "cuThreadExchangeStreamCaptureMode",
    "cuStreamCreateWithPriority",
    "cuStreamWaitEvent",
    "cuStreamWaitValue32_v2",
    "cuStreamWriteValue32_v2",
    "cuStreamIsCapturing",
    "cuStreamGetCtx",
    "cuEventCreate",
    "cuEventRecord",
    "cuEventQuery",
    "cuMemAlloc_v2",
    "cuMemGetInfo_v2",
    "cuMemHostRegister_v2",
    "cuMemHostGetDevicePointer_v2",
    "cuMemcpyDtoHAsync_v2",
    "cuMemcpyDtoDAsync_v2",
    "cuMemcpyBatchAsync",
    "cuPointerGetAttributes",
    // The last one: without its context nothing can be given back, and later leaks would not be told from these.
    "cuCtxPushCurrent_v2",
];

/// Each call in turn fails once, the first time, the second or a later one; and from some time on.
#[test]
fn a_call_that_fails_costs_its_save_and_nothing_else() {
    const INVALID: i32 = 1;
    let standin = Standin::take();
    let (mut failed, mut waits) = (0, 0);
    for call in CALLS {
        for (nth, sticky) in [(1, false), (2, false), (5, false), (17, false), (1, true), (4, true)] {
            for (snapshot, in_ring) in
                [(Snapshot::Staging, false), (Snapshot::Spare, false), (Snapshot::Staging, true)]
            {
                let stream = standin.stream(0);
                let options = match in_ring {
                    true => queued(stream, PROMPT),
                    false => on(stream, snapshot),
                };
                let store = store(6, Faults::default());
                let mut state = State::new(&standin, MIXED);
                state.fill(|_| stream, 1, 0);
                standin.fail(call, nth, INVALID, sticky);
                let what = format!(
                    "{call} failing from call {nth}, sticky: {sticky}, {snapshot:?}, ring: {in_ring}"
                );
                match state.begin(&store, 1, options) {
                    Err(error) => {
                        // Of that one it is an answer.
                        let named = error.to_string().contains("(1)") || *call == "cuPointerGetAttributes";
                        assert!(named, "{what}: {error}");
                    }
                    Ok(save) => {
                        let waited = stream_wait(&save, stream);
                        let copied = save.wait_copied(WAIT);
                        let durable = save.wait_durable(WAIT);
                        let told = |error: &pccheck::Error| {
                            assert!(error.kind() == ErrorKind::Device, "{what}: {error}")
                        };
                        waited.as_ref().err().map(told);
                        durable.as_ref().err().map(told);
                        assert!(copied.is_ok() || durable.is_err(), "{what}");
                        failed += u32::from(durable.is_err());
                        waits += standin.calls("cuStreamWaitValue32_v2");
                        if durable.is_ok() {
                            standin.reset();
                            assert!(state.is_saved(&store, 1), "{what}");
                        }
                    }
                }
                standin.reset();
                assert_idle(&store);
                // The trainer goes on, and the next save is like any other.
                state.fill(|_| stream, 2, 0);
                let save = state.begin(&store, 2, options).unwrap_or_else(|e| panic!("{what}: {e}"));
                save.wait_durable(WAIT).unwrap_or_else(|e| panic!("after {what}: {e}"));
                assert!(state.is_saved(&store, 2), "after {what}");
                drop(save);
                assert_idle(&store);
                drop((store, state));
                standin.destroy(stream);
                match *call {
                    "cuCtxPushCurrent_v2" => {}
                    _ => standin.assert_clean(&what),
                }
            }
        }
    }
    assert!(failed > 30, "only {failed} saves failed: are these the calls that are made?");
    assert!(waits > 300, "copies waited for buffers {waits} times only");
}

/// An error that the GPU reports only later, as of an illegal address in somebody's kernel.
#[test]
fn a_gpu_that_fails_in_the_middle_costs_its_saves() {
    const ILLEGAL_ADDRESS: i32 = 700;
    let standin = Standin::take();
    for snapshot in [Snapshot::Staging, Snapshot::Spare] {
        for nth in [1, 2, 6] {
            let stream = standin.stream(0);
            let store = store(6, Faults::default());
            let mut state = State::new(&standin, MIXED);
            state.fill(|_| stream, 1, 0);
            standin.synchronize(0, stream);
            standin.delay_us(200);
            standin.fail_work(nth, ILLEGAL_ADDRESS);
            let save = state.begin(&store, 1, on(stream, snapshot)).expect("begin");
            let error = save.wait_durable(WAIT).expect_err("the GPU has failed");
            assert_eq!(error.kind(), ErrorKind::Device, "{error}");
            assert!(error.to_string().contains("700"), "{error}");
            save.wait_copied(WAIT).expect_err("it was not copied");
            drop(save);
            assert_idle(&store);
            // What is in host memory is saved all the same.
            let host = State::new(&standin, &[(50_000, None)]);
            let save =
                host.begin(&store, 2, SaveOptions { wait: WAIT, ..SaveOptions::DEFAULT }).expect("begin");
            save.wait_durable(WAIT).expect("durable");
            drop(save);
            standin.reset();
        }
    }
}

fn hasty(stream: usize, snapshot: Snapshot) -> SaveOptions {
    let device =
        DeviceOptions { stream, snapshot, timeout: Duration::from_millis(300), ..DeviceOptions::DEFAULT };
    SaveOptions { wait: WAIT, device, ..SaveOptions::DEFAULT }
}

#[test]
fn a_stream_that_never_ends_fails_the_save_at_its_deadline() {
    let standin = Standin::take();
    for snapshot in [Snapshot::Staging, Snapshot::Spare] {
        for buffers in [4, 64] {
            let stream = standin.stream(0);
            let store = store(buffers, Faults::default());
            let mut state = State::new(&standin, MIXED);
            state.fill(|_| stream, 1, 0);
            standin.synchronize(0, stream);
            standin.hold_stream(stream, true);
            state.fill(|_| stream, 2, 0);
            let began = Instant::now();
            let save = state.begin(&store, 2, hasty(stream.0, snapshot)).expect("begin");
            let error = save.wait_durable(WAIT).expect_err("it hangs");
            assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");
            assert!(began.elapsed() < Duration::from_secs(5));
            save.wait_copied(WAIT).expect_err("it was never copied");
            stream_wait(&save, stream).expect_err("it was never copied");
            drop(save);
            assert_eq!(store.stats().in_flight, 0);
            if buffers == 64 {
                // Buffers that the GPU may still write to are not used for anything else, others are.
                let host = State::new(&standin, &[(50_000, None)]);
                let save =
                    host.begin(&store, 3, SaveOptions { wait: WAIT, ..SaveOptions::DEFAULT }).expect("begin");
                save.wait_durable(WAIT).expect("durable");
            }
            standin.hold_stream(stream, false);
            // What hung has ended: the buffers are there again.
            assert_idle(&store);
            let save = state.begin(&store, 4, on(stream, snapshot)).expect("begin");
            save.wait_durable(WAIT).expect("durable");
        }
    }
}

#[test]
fn others_save_and_read_while_a_stream_is_far_from_its_copies() {
    let standin = Standin::take();
    let stream = standin.stream(0);
    let store = store(4, Faults::default());
    let mut state = State::new(&standin, MIXED);
    state.fill(|_| stream, 1, 0);
    standin.synchronize(0, stream);
    standin.hold_stream(stream, true);
    state.fill(|_| stream, 2, 0);
    let held = state.begin(&store, 2, on(stream, Snapshot::Staging)).expect("begin");
    let mut host = State::new(&standin, &[(50_000, None)]);
    host.fill(|_| LEGACY, 3, 0);
    let save = host.begin(&store, 3, SaveOptions { wait: WAIT, ..SaveOptions::DEFAULT }).expect("begin");
    save.wait_durable(WAIT).expect("durable beside it");
    assert!(host.is_saved(&store, 3));
    held.wait_copied(Some(Duration::ZERO)).expect_err("it is held");
    standin.hold_stream(stream, false);
    held.wait_durable(WAIT).expect("durable");
}

/// Copies into memory that is not page-locked are done when the call returns: in it nobody could keep to a deadline.
#[test]
fn without_page_locked_memory_deadlines_hold_all_the_same() {
    let standin = Standin::take();
    for snapshot in [Snapshot::Staging, Snapshot::Spare] {
        let stream = standin.stream(0);
        let store = store(8, Faults::default());
        let mut state = State::new(&standin, MIXED);
        standin.fail("cuMemHostRegister_v2", 1, 1, true);
        state.fill(|_| stream, 1, 0);
        let save = state.begin(&store, 1, on(stream, snapshot)).expect("begin");
        save.wait_durable(WAIT).expect("durable");
        assert!(state.is_saved(&store, 1));
        standin.hold_stream(stream, true);
        state.fill(|_| stream, 2, 0);
        let save = state.begin(&store, 2, hasty(stream.0, snapshot)).expect("begin");
        assert_eq!(save.wait_durable(WAIT).expect_err("it hangs").kind(), ErrorKind::TimedOut);
        let began = Instant::now();
        drop((save, store));
        assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
        standin.hold_stream(stream, false);
        standin.synchronize(0, stream);
        standin.reset();
    }
}

#[test]
fn nobody_waits_for_the_stream_of_a_save_that_never_began_to_copy() {
    let standin = Standin::take();
    let stream = standin.stream(0);
    for _ in 0..50 {
        let store = store(4, Faults::default());
        let state = State::new(&standin, MIXED);
        let save = state.begin(&store, 1, on(stream, Snapshot::Staging)).expect("begin");
        drop(store);
        match stream_wait(&save, stream) {
            Ok(()) => {}
            Err(error) => assert_eq!(error.kind(), ErrorKind::Cancelled, "{error}"),
        }
    }
}

#[test]
fn a_store_is_closed_although_a_gpu_hangs() {
    let standin = Standin::take();
    let stream = standin.stream(0);
    let store = store(8, Faults::default());
    let mut state = State::new(&standin, MIXED);
    state.fill(|_| stream, 1, 0);
    standin.synchronize(0, stream);
    standin.hold(true);
    let save = state.begin(&store, 1, on(stream, Snapshot::Staging)).expect("begin");
    until("copies are enqueued", || {
        standin.calls("cuMemcpyDtoHAsync_v2") + standin.calls("cuMemcpyBatchAsync") > 0
    });
    let began = Instant::now();
    drop(store);
    assert!(began.elapsed() < Duration::from_secs(20), "{:?}", began.elapsed());
    let error = save.wait_durable(WAIT).expect_err("closed");
    assert!(matches!(error.kind(), ErrorKind::Cancelled | ErrorKind::Device), "{error}");
    // What the GPU still writes to is not unmapped: the copies end harmlessly.
    standin.hold(false);
    drop(save);
    standin.synchronize(0, stream);
    until("the copies have ended", || standin.copies() > 0);
}

#[test]
fn memory_that_is_not_where_it_is_said_to_be_is_refused() {
    let standin = Standin::take();
    let store = store(8, Faults::default());
    let state = State::new(&standin, TWO_GPUS);
    for (address, device) in [(None, 0), (Some(0), 1), (Some(1), 0)] {
        let mut tensors = state.tensors();
        let place = match address {
            None => tensors.iter().position(|tensor| tensor.device.is_none()),
            Some(on) => tensors.iter().position(|tensor| tensor.device == Some(on)),
        };
        tensors[place.expect("one")].device = Some(device);
        // SAFETY: it is refused; nothing is read.
        let error = unsafe { store.begin_save(1, &tensors, &[], WAIT) }.err().expect("refused");
        assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{error}");
    }
    let mut tensors = state.tensors();
    tensors[0].device = Some(7);
    // SAFETY: as above.
    let error = unsafe { store.begin_save(1, &tensors, &[], WAIT) }.err().expect("refused");
    assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{error}");
    assert!(error.to_string().contains("no GPU 7"), "{error}");
    // A stream of the other GPU cannot say when this one's state is ready.
    let one = State::new(&standin, MIXED);
    let foreign = standin.stream(1);
    let error = one.begin(&store, 1, on(foreign, Snapshot::Staging)).err().expect("refused");
    assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{error}");
    standin.synchronize(0, LEGACY);
    assert_idle(&store);
}

#[test]
fn spare_memory_that_there_is_not_fails_the_save_or_is_done_without() {
    const OUT_OF_MEMORY: i32 = 2;
    let standin = Standin::take();
    let stream = standin.stream(0);
    let store = store(8, Faults::default());
    let mut state = State::new(&standin, MIXED);
    state.fill(|_| stream, 1, 0);
    standin.fail("cuMemAlloc_v2", 1, OUT_OF_MEMORY, true);
    let save = state.begin(&store, 1, on(stream, Snapshot::Spare)).expect("begin");
    assert_eq!(save.wait_durable(WAIT).expect_err("no memory").kind(), ErrorKind::OutOfMemory);
    let save = state.begin(&store, 2, on(stream, Snapshot::Auto)).expect("begin");
    save.wait_durable(WAIT).expect("without spare memory");
    standin.reset();
    drop(save);
    assert_idle(&store);
}
