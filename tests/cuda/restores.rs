//! Restoring into the memory of GPUs.

use pccheck::engine::{Select, Store};
use pccheck::load::{Checkpoint, PartAt};
use pccheck::save::{Faults, Snapshot};
use pccheck::{ErrorKind, Result};

use super::bed::{assert_idle, on, store, State, MIXED, TWO_GPUS, WAIT};
use super::standin::Standin;

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
