//! States of more tensors than the driver's queues take.

use std::sync::Arc;
use std::time::Duration;

use pccheck::engine::Store;
use pccheck::error::ErrorKind;
use pccheck::medium::sim::{SimMedium, SimModel};
use pccheck::save::{DeviceOptions, Faults, Save, SaveOptions, Snapshot};
use pccheck::store::{format_medium, FormatOptions};

use super::bed::{assert_idle, on, open, stream_wait, until, without_jams, State, MIXED, WAIT};
use super::standin::{Standin, Stream};

/// Of each stream, of which the engine has two.
const QUEUE: u64 = 950;
const TENSORS: usize = 6_000;

const COPIES: [&str; 3] = ["cuMemcpyDtoHAsync_v2", "cuMemcpyDtoDAsync_v2", "cuMemcpyBatchAsync"];

/// A store whose pool holds the states here.
fn store(chunk_bytes: u64) -> Store {
    let sim = Arc::new(SimMedium::new(64 << 20, SimModel::Ssd { torn: false }));
    format_medium(&*sim, &FormatOptions::new(3, 8 << 20)).expect("format");
    open(&sim, chunk_bytes, (5 << 20) / chunk_bytes, Faults::default())
}

fn options(stream: Stream, snapshot: Snapshot, flag_waits: bool) -> SaveOptions {
    let options = on(stream, snapshot);
    SaveOptions { device: DeviceOptions { flag_waits, ..options.device }, ..options }
}

/// States filled for their steps, 1 and up, each by a stream of the GPU of its number.
fn filled<'a, const N: usize>(
    standin: &'a Standin,
    streams: &[Stream],
    shapes: [&[(usize, Option<u32>)]; N],
) -> [State<'a>; N] {
    let mut states = shapes.map(|shape| State::new(standin, shape));
    for (state, step) in states.iter_mut().zip(1..) {
        state.fill(|device| streams[device as usize], step, 0);
    }
    streams.iter().zip(0..).for_each(|(&stream, device)| standin.synchronize(device, stream));
    states
}

/// Waits until the engine enqueues nothing more.
fn settle(standin: &Standin) {
    let count = || COPIES.map(|call| standin.calls(call));
    let mut before = [0; 3];
    until("copies are enqueued", || {
        std::thread::sleep(Duration::from_millis(50));
        let now = count();
        now.iter().any(|&calls| calls > 0) && std::mem::replace(&mut before, now) == now
    });
}

/// As much of the save is enqueued as is at once, and nothing waits in the driver. Then the stream goes on.
fn assert_has_room(standin: &Standin, save: &Save, stream: Stream, what: &str) {
    settle(standin);
    // SAFETY: the stream lives.
    let waited = unsafe { save.stream_wait_copied(stream.0, Some(Duration::from_millis(10))) };
    let jams = standin.jams();
    // Also where it has failed.
    standin.hold_stream(stream, false);
    assert_eq!(jams, 0, "{what}");
    assert_eq!(waited.expect_err("not all are enqueued").kind(), ErrorKind::TimedOut, "{what}");
}

/// Most of what the driver takes without waiting is enqueued, and no more, so that calls of the program are not held up; the rest is as
/// copies end.
#[test]
fn many_tensors_leave_room_for_the_program() {
    const G0: Option<u32> = Some(0);
    const G1: Option<u32> = Some(1);
    for (gpus, snapshot, chunk_bytes, bytes) in [
        (&[G0][..], Snapshot::Staging, 65_536, 300),
        // Groups of more copies than are enqueued together.
        (&[G0], Snapshot::Staging, 65_536, 180),
        // A chunk of more copies than a queue takes.
        (&[G0], Snapshot::Staging, 1 << 20, 300),
        (&[G0], Snapshot::Spare, 65_536, 300),
        (&[G0, G1], Snapshot::Spare, 65_536, 300),
        (&[G0, G1], Snapshot::Staging, 65_536, 300),
        // Some of them in host memory.
        (&[G0, G0, None], Snapshot::Staging, 65_536, 300),
        (&[G0, G0, None], Snapshot::Spare, 65_536, 300),
    ] {
        for flag_waits in [false, true] {
            let what = format!("{snapshot:?}, {gpus:?}, {chunk_bytes}, {bytes}, {flag_waits}");
            let standin = Standin::take();
            let streams = [standin.stream(0), standin.stream(1)];
            let stream = streams[0];
            let store = store(chunk_bytes);
            let shape: Vec<_> = (0..TENSORS).map(|nth| (bytes, gpus[nth % gpus.len()])).collect();
            let [state] = filled(&standin, &streams, [&shape]);
            standin.queue_limit(QUEUE);
            standin.hold_stream(stream, true);
            let save = state.begin(&store, 1, options(stream, snapshot, flag_waits)).expect("begin");
            standin.delay_us(1_000);
            assert_has_room(&standin, &save, stream, &what);
            stream_wait(&save, stream).expect("wait");
            save.wait_durable(WAIT).expect("durable");
            assert_eq!(standin.jams(), 0, "{what}");
            standin.queue_limit(0);
            assert!(state.is_saved(&store, 1), "{what}");
            assert_idle(&store);
        }
    }
}

/// Buffers and spare memory come back when what is enqueued has ended, and other saves are not touched by it.
#[test]
fn saves_end_in_the_midst_of_being_enqueued() {
    for (snapshot, flag_waits) in
        [(Snapshot::Staging, false), (Snapshot::Staging, true), (Snapshot::Spare, false)]
    {
        for nth in [0, 2, 4] {
            let what = format!("{snapshot:?}, {flag_waits}, call {nth}");
            let standin = Standin::take();
            let streams = [standin.stream(0), standin.stream(1)];
            let store = store(65_536);
            let shape = [(300, Some(0)); TENSORS];
            let [state, next] = filled(&standin, &streams, [&shape, &shape]);
            standin.hold_stream(streams[0], true);
            if nth > 0 {
                standin.fail("cuMemcpyBatchAsync", nth, 1, false);
            }
            let save = state.begin(&store, 1, options(streams[0], snapshot, flag_waits)).expect("begin");
            let other = standin.stream(0);
            let after = next.begin(&store, 2, options(other, snapshot, flag_waits)).expect("begin");
            settle(&standin);
            if nth == 0 {
                save.cancel();
            }
            std::thread::sleep(Duration::from_millis(20));
            standin.hold_stream(streams[0], false);
            let expected = if nth == 0 { ErrorKind::Cancelled } else { ErrorKind::Device };
            assert_eq!(save.wait_durable(WAIT).expect_err("ended").kind(), expected, "{what}");
            stream_wait(&after, other).expect("wait");
            after.wait_durable(WAIT).expect("durable");
            assert!(next.is_saved(&store, 2), "{what}");
            drop((save, after));
            assert_idle(&store);
        }
    }
}

/// Each GPU has its own queues.
#[test]
fn a_full_gpu_holds_up_no_other() {
    for (snapshot, flag_waits) in
        [(Snapshot::Staging, false), (Snapshot::Staging, true), (Snapshot::Spare, false)]
    {
        let standin = Standin::take();
        let streams = [standin.stream(0), standin.stream(1)];
        let store = store(65_536);
        let shapes = [&[(300, Some(0)); TENSORS][..], &[(300, Some(1)); TENSORS / 2]];
        let [full, other] = filled(&standin, &streams, shapes);
        standin.hold_stream(streams[0], true);
        let held = full.begin(&store, 1, options(streams[0], snapshot, flag_waits)).expect("begin");
        settle(&standin);
        let save = other.begin(&store, 2, options(streams[1], snapshot, flag_waits)).expect("begin");
        save.wait_durable(WAIT).expect("durable");
        assert!(!held.progress().copied);
        assert!(other.is_saved(&store, 2));
        standin.hold_stream(streams[0], false);
        held.wait_durable(WAIT).expect("durable");
        assert_idle(&store);
    }
}

/// What is left of one that finds no room does not come behind the stream of the next one.
#[test]
fn a_save_that_is_being_enqueued_waits_for_no_later_one() {
    for snapshot in [Snapshot::Staging, Snapshot::Spare] {
        let standin = Standin::take();
        let streams = [standin.stream(0), standin.stream(1)];
        let (later, store) = (standin.stream(0), store(65_536));
        let shapes = [&[(300, Some(0)); TENSORS][..], &[(300, Some(0)); 10]];
        let [state, next] = filled(&standin, &streams, shapes);
        streams.iter().take(1).chain([&later]).for_each(|&stream| standin.hold_stream(stream, true));
        let save = state.begin(&store, 1, on(streams[0], snapshot)).expect("begin");
        let held = next.begin(&store, 2, on(later, snapshot)).expect("begin");
        assert_has_room(&standin, &save, streams[0], "held");
        save.wait_copied(WAIT).expect("copied before the other one's stream goes on");
        standin.hold_stream(later, false);
        held.wait_durable(WAIT).expect("durable");
        assert!(next.is_saved(&store, 2));
    }
}

/// Nor where it waits for buffers.
#[test]
fn a_save_that_waits_for_buffers_waits_for_no_later_one() {
    let standin = Standin::take();
    let (stream, later) = (standin.stream(0), standin.stream(0));
    let (store, mut state) = (super::bed::store(8, Faults::default()), State::new(&standin, MIXED));
    state.fill(|_| stream, 1, 0);
    standin.synchronize(0, stream);
    [stream, later].iter().for_each(|&stream| standin.hold_stream(stream, true));
    let save = state.begin(&store, 1, on(stream, Snapshot::Staging)).expect("begin");
    let held = state.begin(&store, 2, on(later, Snapshot::Staging)).expect("begin");
    settle(&standin);
    standin.hold_stream(stream, false);
    save.wait_copied(WAIT).expect("copied before the other one's stream goes on");
    standin.hold_stream(later, false);
    held.wait_durable(WAIT).expect("durable");
}

/// None waits until another has room.
#[test]
fn gpus_of_a_state_are_served_side_by_side() {
    let standin = Standin::take();
    let streams = [standin.stream(0), standin.stream(1)];
    let store = store(65_536);
    let shape: Vec<_> = (0..TENSORS).map(|nth| (300, Some((nth % 2) as u32))).collect();
    let [state] = filled(&standin, &streams, [&shape]);
    standin.hold_stream(streams[0], true);
    let save = state.begin(&store, 1, on(streams[0], Snapshot::Spare)).expect("begin");
    // Two pieces on each of two streams of two GPUs.
    let are_full = (0..200).any(|_| {
        std::thread::sleep(Duration::from_millis(20));
        standin.calls("cuMemcpyBatchAsync") == 8
    });
    standin.hold_stream(streams[0], false);
    assert!(are_full);
    save.wait_durable(WAIT).expect("durable");
}

/// The last one is small, and on another stream.
#[test]
fn a_snapshot_is_done_when_all_its_pieces_are() {
    let standin = Standin::take();
    let streams = [standin.stream(0), standin.stream(1)];
    let sim = Arc::new(SimMedium::new(128 << 20, SimModel::Ssd { torn: false }));
    format_medium(&*sim, &FormatOptions::new(3, 32 << 20)).expect("format");
    let store = open(&sim, 1 << 20, 8, Faults::default());
    let [mut state] = filled(&standin, &streams, [&[(60_000, Some(0)); 401]]);
    let save = state.begin(&store, 1, on(streams[0], Snapshot::Spare)).expect("begin");
    stream_wait(&save, streams[0]).expect("wait");
    state.fill(|_| streams[0], 2, 0);
    save.wait_durable(WAIT).expect("durable");
    assert!(state.is_saved(&store, 1));
    standin.synchronize(0, streams[0]);
}

/// What has no event behind it ends all the same.
#[test]
fn calls_that_fail_again_and_again_take_no_room() {
    for snapshot in [Snapshot::Staging, Snapshot::Spare] {
        let standin = Standin::take();
        let streams = [standin.stream(0), standin.stream(1)];
        let store = store(65_536);
        let [state] = filled(&standin, &streams, [&[(300, Some(0)); TENSORS]]);
        for call in ["cuMemcpyBatchAsync", "cuEventRecord"] {
            for _ in 0..8 {
                // Of the caller's stream it is not refused.
                let nth = if call == "cuEventRecord" { 2 } else { 1 };
                standin.fail(call, nth, 1, false);
                let save = state.begin(&store, 1, on(streams[0], snapshot)).expect("begin");
                assert_eq!(save.wait_durable(WAIT).expect_err("refused").kind(), ErrorKind::Device);
            }
        }
        let save = state.begin(&store, 1, on(streams[0], snapshot)).expect("begin");
        save.wait_durable(WAIT).expect("durable");
        assert!(state.is_saved(&store, 1));
        drop(save);
        assert_idle(&store);
    }
}

/// Each has the engine's streams wait for its own.
#[test]
fn saves_that_are_given_up_take_no_more_room_than_there_is() {
    let standin = Standin::take();
    let streams = [standin.stream(0), standin.stream(1)];
    let store = store(65_536);
    let [state] = filled(&standin, &streams, [&[(300, Some(0)); TENSORS]]);
    standin.queue_limit(QUEUE);
    without_jams(&standin, streams[0], || {
        let options = on(streams[0], Snapshot::Staging);
        let device = DeviceOptions { timeout: Duration::from_millis(10), ..options.device };
        for _ in 0..150 {
            let save = state.begin(&store, 1, SaveOptions { device, ..options }).expect("begin");
            assert_eq!(save.wait_durable(WAIT).expect_err("late").kind(), ErrorKind::TimedOut);
        }
    });
    let save = state.begin(&store, 1, on(streams[0], Snapshot::Staging)).expect("begin");
    save.wait_durable(WAIT).expect("durable");
    standin.queue_limit(0);
    drop(save);
    assert_idle(&store);
}
