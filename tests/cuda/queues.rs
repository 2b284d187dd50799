//! States of more tensors than the driver's queues take.

use std::sync::Arc;
use std::time::Duration;

use pccheck::error::ErrorKind;
use pccheck::medium::sim::{SimMedium, SimModel};
use pccheck::save::{DeviceOptions, Faults, SaveOptions, Snapshot};
use pccheck::store::{format_medium, FormatOptions};

use super::bed::{assert_idle, on, open, stream_wait, until, State, WAIT};
use super::standin::Standin;

/// Per stream, of which the engine has two.
const QUEUE: u64 = 1_100;
const CHUNK: u64 = 65_536;

fn region() -> Arc<SimMedium> {
    let sim = Arc::new(SimMedium::new(64 << 20, SimModel::Ssd { torn: false }));
    format_medium(&*sim, &FormatOptions::new(3, 8 << 20)).expect("format");
    sim
}

/// Most of what the driver takes without waiting is enqueued, and no more, so that calls of the program are not held up; the rest is as
/// copies end.
#[test]
fn many_tensors_leave_room_for_the_program() {
    for (gpus, snapshot) in [
        (&[Some(0)][..], Snapshot::Staging),
        (&[Some(0)], Snapshot::Spare),
        (&[Some(0), Some(1)], Snapshot::Spare),
        // Some of them in host memory.
        (&[Some(0), Some(0), None], Snapshot::Staging),
        (&[Some(0), Some(0), None], Snapshot::Spare),
    ] {
        let what = format!("{snapshot:?}, {gpus:?}");
        let standin = Standin::take();
        let streams = [standin.stream(0), standin.stream(1)];
        let stream = streams[0];
        let store = open(&region(), CHUNK, 80, Faults::default());
        let shape: Vec<_> = (0..6_000).map(|nth| (300, gpus[nth % gpus.len()])).collect();
        let mut state = State::new(&standin, &shape);
        state.fill(|device| streams[device as usize], 1, 0);
        (0..2).for_each(|device| standin.synchronize(device, streams[device as usize]));
        standin.queue_limit(QUEUE);
        standin.hold_stream(stream, true);
        let copies = || {
            ["cuMemcpyDtoHAsync_v2", "cuMemcpyDtoDAsync_v2", "cuMemcpyBatchAsync"]
                .map(|call| standin.calls(call))
        };
        let before = copies();
        let save = state.begin(&store, 1, on(stream, snapshot)).expect("begin");
        until("copies are enqueued", || copies() != before);
        // SAFETY: the stream lives.
        let waited = unsafe { save.stream_wait_copied(stream.0, Some(Duration::from_millis(100))) };
        let jams = standin.jams();
        standin.hold_stream(stream, false);
        assert_eq!(jams, 0, "{what}");
        assert_eq!(waited.expect_err("not all are enqueued").kind(), ErrorKind::TimedOut, "{what}");
        stream_wait(&save, stream).expect("wait");
        standin.queue_limit(0);
        save.wait_durable(WAIT).expect("durable");
        assert!(state.is_saved(&store, 1), "{what}");
        assert_idle(&store);
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
        let store = open(&region(), CHUNK, 80, Faults::default());
        let mut full = State::new(&standin, &[(300, Some(0)); 6_000]);
        let mut other = State::new(&standin, &[(300, Some(1)); 3_000]);
        full.fill(|_| streams[0], 1, 0);
        other.fill(|_| streams[1], 2, 0);
        (0..2).for_each(|device| standin.synchronize(device, streams[device as usize]));
        let begin = |state: &State, step: u64| {
            let options = on(streams[step as usize - 1], snapshot);
            let device = DeviceOptions { flag_waits, ..options.device };
            state.begin(&store, step, SaveOptions { device, ..options }).expect("begin")
        };
        standin.hold_stream(streams[0], true);
        let held = begin(&full, 1);
        let save = begin(&other, 2);
        save.wait_durable(WAIT).expect("durable");
        assert!(!held.progress().copied);
        assert!(other.is_saved(&store, 2));
        standin.hold_stream(streams[0], false);
        held.wait_durable(WAIT).expect("durable");
        assert_idle(&store);
    }
}
