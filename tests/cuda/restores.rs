//! Restoring into the memory of GPUs.

use std::thread::{scope, sleep};
use std::time::Duration;

use pccheck::engine::{Select, Store};
use pccheck::load::{Checkpoint, PartAt};
use pccheck::medium::{Barrier, Medium};
use pccheck::save::{Faults, Snapshot};
use pccheck::{ErrorKind, Result};

use super::bed::{assert_idle, medium, on, open, store, until, Shape, State, CHUNK, MIXED, TWO_GPUS, WAIT};
use super::standin::{Standin, LEGACY};

/// Many more chunks than the stores below have buffers.
const LONG: &Shape = &[(400_000, Some(0)), (30_000, None), (50_000, Some(0))];
const LONG_ON_TWO: &Shape = &[(200_000, Some(0)), (30_000, None), (250_000, Some(1)), (9_001, Some(0))];

const ILLEGAL_ADDRESS: i32 = 700;

fn parts(checkpoint: &Checkpoint, state: &State<'_>) -> Vec<PartAt> {
    let part = |tensor: pccheck::engine::TensorAt<'_>| PartAt {
        offset: checkpoint.tensor(tensor.name).expect("tensor").offset,
        ptr: tensor.ptr.cast_mut(),
        bytes: tensor.bytes as usize,
        device: tensor.device,
    };
    state.tensors().into_iter().map(part).collect()
}

pub fn read(store: &Store, state: &State<'_>) -> Result<()> {
    let opened = store.open_checkpoint(Select::Newest, false).expect("open");
    let parts = parts(&opened.checkpoint, state);
    // SAFETY: the state's own memory, on which nothing is at work.
    unsafe { opened.checkpoint.read_at(&parts) }
}

#[test]
fn what_was_saved_comes_back_into_gpus_and_host_memory() {
    let standin = Standin::take();
    for shape in [MIXED, TWO_GPUS] {
        for buffers in [3, 40] {
            let streams = [standin.stream(0), standin.stream(1)];
            let store = store(buffers, Faults::default());
            let mut state = State::new(&standin, shape);
            state.fill(|device| streams[device as usize], 1, 0);
            streams
                .iter()
                .enumerate()
                .for_each(|(device, stream)| standin.synchronize(device as u32, *stream));
            let save = state.begin(&store, 1, on(streams[0], Snapshot::Staging)).expect("begin");
            save.wait_durable(WAIT).expect("durable");
            state.fill(|device| streams[device as usize], 9, 0);
            streams
                .iter()
                .enumerate()
                .for_each(|(device, stream)| standin.synchronize(device as u32, *stream));
            standin.delay_us(100);
            read(&store, &state).expect("read");
            standin.delay_us(0);
            assert!(state.now() == state.expected(1));
            drop(save);
            assert_idle(&store);
            streams.iter().for_each(|stream| standin.destroy(*stream));
        }
    }
}

#[test]
fn a_call_that_fails_is_reported_and_the_next_read_succeeds() {
    const INVALID: i32 = 1;
    let standin = Standin::take();
    let stream = standin.stream(0);
    let store = store(6, Faults::default());
    let mut state = State::new(&standin, MIXED);
    state.fill(|_| stream, 1, 0);
    state.begin(&store, 1, on(stream, Snapshot::Staging)).and_then(|s| s.wait_durable(WAIT)).expect("save");
    let calls = [
        "cuCtxPushCurrent_v2",
        "cuStreamCreateWithPriority",
        "cuEventCreate",
        "cuMemcpyHtoDAsync_v2",
        "cuMemcpyBatchAsync",
        "cuEventRecord",
        "cuEventQuery",
        "cuPointerGetAttributes",
    ];
    let mut failed = 0;
    for call in calls {
        for nth in [1, 2, 4] {
            standin.fail(call, nth, INVALID, false);
            let result = read(&store, &state);
            standin.reset();
            if let Err(error) = &result {
                assert!(
                    matches!(error.kind(), ErrorKind::Device | ErrorKind::InvalidArgument),
                    "{call}: {error}"
                );
                failed += 1;
            }
            read(&store, &state).expect("the next read");
            assert!(state.now() == state.expected(1), "after {call}");
        }
    }
    assert!(failed > 10, "only {failed} reads failed: are these the calls that are made?");
}

#[test]
fn destinations_that_are_not_where_they_are_said_to_be_are_refused() {
    let standin = Standin::take();
    let stream = standin.stream(0);
    let store = store(6, Faults::default());
    let mut state = State::new(&standin, MIXED);
    state.fill(|_| stream, 1, 0);
    state.begin(&store, 1, on(stream, Snapshot::Staging)).and_then(|s| s.wait_durable(WAIT)).expect("save");
    let opened = store.open_checkpoint(Select::Newest, false).expect("open");
    for wrong in [Some(1), Some(9)] {
        let mut parts = parts(&opened.checkpoint, &state);
        parts[0].device = wrong;
        // SAFETY: it is refused; nothing is written.
        let error = unsafe { opened.checkpoint.read_at(&parts) }.expect_err("refused");
        assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{error}");
    }
}

/// Has the state of step 1 saved, and then other bytes in its place.
fn save_and_overwrite(store: &Store, state: &mut State<'_>) {
    state.fill(|_| LEGACY, 1, 0);
    let save = state.begin(store, 1, on(LEGACY, Snapshot::Staging)).expect("begin");
    save.wait_durable(WAIT).expect("durable");
    overwrite(state);
}

fn overwrite(state: &mut State<'_>) {
    state.fill(|_| LEGACY, 9, 0);
    [0, 1].into_iter().for_each(|device| state.standin.synchronize(device, LEGACY));
}

/// No copy is left that a read which has returned might have enqueued.
fn assert_still(standin: &Standin, what: &str) {
    let copies = standin.copies();
    sleep(Duration::from_millis(40));
    assert_eq!(standin.copies(), copies, "{what}: copies ended after the read");
}

#[test]
fn buffers_are_read_into_again_only_once_their_uploads_are_done() {
    let standin = Standin::take();
    for shape in [LONG, LONG_ON_TWO] {
        // Chunks of the save, and of the pool that they are read through: then each is uploaded in three parts.
        for (saved_in, read_in) in [(CHUNK, CHUNK), (3 * CHUNK, CHUNK)] {
            for buffers in [3, 9, 16] {
                let what = format!("chunks of {saved_in} in {buffers} buffers of {read_in}");
                let sim = medium();
                let mut state = State::new(&standin, shape);
                save_and_overwrite(&open(&sim, saved_in, 8, Faults::default()), &mut state);
                let store = open(&sim, read_in, buffers, Faults::default());
                standin.delay_us(1000);
                read(&store, &state).unwrap_or_else(|error| panic!("{what}: {error}"));
                assert!(state.now() == state.expected(1), "{what}");
                standin.delay_us(0);
                assert_idle(&store);
            }
        }
    }
}

#[test]
fn a_thread_goes_on_while_uploads_are_on_their_way_but_not_for_ever() {
    let standin = Standin::take();
    // Two threads, each with three uploads and the one that it waits for; with few buffers each waits for every one, if
    // there is a buffer left for it.
    for (buffers, enqueued) in [(16, 8..=8), (3, 1..=2)] {
        let store = store(buffers, Faults::default());
        let mut state = State::new(&standin, &[(400_000, Some(0))]);
        save_and_overwrite(&store, &mut state);
        let before = standin.calls("cuMemcpyHtoDAsync_v2");
        standin.hold(true);
        scope(|threads| {
            let reading = threads.spawn(|| read(&store, &state));
            let uploads = || standin.calls("cuMemcpyHtoDAsync_v2") - before;
            until("uploads are enqueued", || uploads() >= *enqueued.start());
            sleep(Duration::from_millis(30));
            let found = uploads();
            let returned = reading.is_finished();
            standin.hold(false);
            reading.join().expect("no panic").expect("read");
            assert!(enqueued.contains(&found) && !returned, "{found} with {buffers} buffers");
        });
        assert!(state.now() == state.expected(1));
        assert_idle(&store);
    }
}

/// The threads hold all buffers among them while their uploads are late: were one to wait for another buffer, none would
/// ever come.
#[test]
fn several_reads_at_once_share_a_small_pool() {
    let standin = Standin::take();
    let store = store(8, Faults::default());
    let mut states: Vec<State<'_>> = (0..4).map(|_| State::new(&standin, LONG_ON_TWO)).collect();
    save_and_overwrite(&store, &mut states[0]);
    states.iter_mut().for_each(overwrite);
    standin.delay_us(300);
    scope(|threads| {
        let reads: Vec<_> = states.iter().map(|state| threads.spawn(|| read(&store, state))).collect();
        until("all have been read", || reads.iter().all(|read| read.is_finished()));
        reads.into_iter().for_each(|read| read.join().expect("no panic").expect("read"));
    });
    assert!(states.iter().all(|state| state.now() == state.expected(1)));
    assert_idle(&store);
}

/// Also of the last pieces of work, when nothing more is enqueued that could meet the error.
#[test]
fn an_upload_that_fails_late_fails_the_read() {
    let standin = Standin::take();
    let store = store(16, Faults::default());
    let mut state = State::new(&standin, LONG);
    save_and_overwrite(&store, &mut state);
    standin.reset();
    read(&store, &state).expect("read");
    let calls = ["cuMemcpyHtoDAsync_v2", "cuMemcpyBatchAsync", "cuEventRecord"];
    let all: u64 = calls.into_iter().map(|call| standin.calls(call)).sum();
    assert!(all > 100, "{all} pieces of work only");
    for nth in [1, all / 2, all - 3, all - 1, all] {
        overwrite(&mut state);
        standin.delay_us(2000);
        standin.fail_work(nth, ILLEGAL_ADDRESS);
        let error = read(&store, &state).expect_err("the GPU has failed");
        assert_eq!(error.kind(), ErrorKind::Device, "{nth} of {all}: {error}");
        assert!(error.to_string().contains("700"), "{nth} of {all}: {error}");
        assert_idle(&store);
        standin.reset();
        read(&store, &state).expect("the next read");
        assert!(state.now() == state.expected(1), "after {nth} of {all}");
    }
}

#[test]
fn a_read_that_fails_returns_only_when_its_uploads_are_done() {
    const INVALID: i32 = 1;
    // One thread, with nothing else to wait for.
    const ONE_CHUNK: &Shape = &[(3000, Some(0))];
    let standin = Standin::take();
    for (shape, call, nth) in [
        (LONG_ON_TWO, "cuMemcpyHtoDAsync_v2", 6),
        (LONG_ON_TWO, "cuEventRecord", 7),
        (ONE_CHUNK, "cuEventRecord", 1),
        // One look that fails says nothing of the copies.
        (LONG_ON_TWO, "cuEventQuery", 9),
        (ONE_CHUNK, "cuEventQuery", 1),
    ] {
        let store = store(16, Faults::default());
        let mut state = State::new(&standin, shape);
        save_and_overwrite(&store, &mut state);
        standin.delay_us(5000);
        standin.fail(call, nth, INVALID, false);
        let error = read(&store, &state).expect_err(call);
        assert_eq!(error.kind(), ErrorKind::Device, "{call}: {error}");
        assert_still(&standin, call);
        standin.reset();
        assert_idle(&store);
    }
}

#[test]
fn a_damaged_chunk_fails_the_read_while_uploads_are_on_their_way() {
    let standin = Standin::take();
    let sim = medium();
    let store = open(&sim, CHUNK, 16, Faults::default());
    let mut state = State::new(&standin, LONG_ON_TWO);
    save_and_overwrite(&store, &mut state);
    let record = store.checkpoints().expect("list")[0].record.clone();
    let place = store.region().layout().slot_offset(record.slot) + 10 * CHUNK;
    let mut block = [0; 4096];
    sim.read(place, &mut block).expect("read");
    block[77] ^= 4;
    sim.write_durable(place, &block, Barrier::Payload).expect("damage");
    standin.delay_us(5000);
    let error = read(&store, &state).expect_err("damaged");
    assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
    assert_still(&standin, "damage");
    assert_idle(&store);
}
