//! Whose memory tensors are: the driver is asked once for each allocation, and nothing else than what was said is read.

use pccheck::engine::{Store, TensorAt};
use pccheck::format::Dtype;
use pccheck::save::{Faults, Save, Snapshot};
use pccheck::{ErrorKind, Result};

use super::bed::{on, store, WAIT};
use super::standin::{Standin, Stream};

const VIEW: u64 = 100;

/// A save of tensors of `VIEW` bytes: their addresses, and the GPUs that they are said to be on.
fn save(store: &Store, stream: Stream, places: &[(u64, u32)]) -> Result<()> {
    save_by(store, stream, places, Snapshot::Staging)?.wait_durable(WAIT).map(drop)
}

fn save_by(store: &Store, stream: Stream, places: &[(u64, u32)], snapshot: Snapshot) -> Result<Save> {
    let names: Vec<String> = (0..places.len()).map(|at| format!("t{at:03}")).collect();
    let mut tensors = Vec::new();
    for (name, &(address, device)) in names.iter().zip(places) {
        let (ptr, device) = (address as *const u8, Some(device));
        tensors.push(TensorAt { name, dtype: Dtype::U8, shape: &[VIEW], ptr, bytes: VIEW, device });
    }
    // SAFETY: the memory is that of the stand-in, which lives on; nobody changes it.
    unsafe { store.begin_save(1, &tensors, &[], on(stream, snapshot)) }
}

#[test]
fn the_driver_is_asked_once_for_each_allocation() {
    let standin = Standin::take();
    let (stream, store) = (standin.stream(0), store(8, Faults::default()));
    let allocations = [standin.allocate(0, 5000), standin.allocate(0, 5000)];
    let places: Vec<(u64, u32)> =
        (0..50).flat_map(|at| allocations.map(|start| (start + at * VIEW, 0))).collect();
    let before = standin.calls("cuPointerGetAttributes");
    save(&store, stream, &places).expect("saved");
    assert_eq!(standin.calls("cuPointerGetAttributes") - before, 2);
}

/// By the pump, before it copies: that begin does not ask is what the next test needs.
#[test]
fn what_earlier_saves_were_of_is_asked_about_once() {
    let standin = Standin::take();
    let (stream, store) = (standin.stream(0), store(8, Faults::default()));
    let allocations = [standin.allocate(0, 5000), standin.allocate(0, 5000)];
    let places: Vec<(u64, u32)> =
        (0..50).flat_map(|at| allocations.map(|start| (start + at * VIEW, 0))).collect();
    save(&store, stream, &places).expect("saved");
    let before = standin.calls("cuPointerGetAttributes");
    save(&store, stream, &places).expect("saved");
    assert_eq!(standin.calls("cuPointerGetAttributes") - before, 2);
}

#[test]
fn memory_that_was_freed_since_an_earlier_save_fails_the_save_that_is_said_to_be_of_it() {
    let standin = Standin::take();
    for snapshot in [Snapshot::Staging, Snapshot::Spare] {
        let (stream, store) = (standin.stream(0), store(8, Faults::default()));
        let (stays, goes) = (standin.allocate(0, 1000), standin.allocate(0, 1000));
        let both = [(stays, 0), (goes, 0)];
        save_by(&store, stream, &both, snapshot).expect("begun").wait_durable(WAIT).expect("saved");
        standin.free(0, goes);
        let save = save_by(&store, stream, &both, snapshot).expect("begun: nobody has asked yet");
        let error = save.wait_durable(WAIT).expect_err("refused");
        assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{error}");
        assert!(error.to_string().contains("no memory of a GPU"), "{error}");
        save_by(&store, stream, &[(stays, 0)], snapshot).expect("begun").wait_durable(WAIT).expect("saved");
    }
}

#[test]
fn a_tensor_beside_known_ones_is_refused_where_it_is_not_what_was_said() {
    let standin = Standin::take();
    let (stream, store) = (standin.stream(0), store(8, Faults::default()));
    let (here, there) = (standin.allocate(0, 1000), standin.allocate(1, 1000));
    let host = vec![0_u8; VIEW as usize];
    for (wrong, found) in [
        ((there, 0), "memory of GPU 1"),
        ((here + VIEW, 1), "memory of GPU 0"),
        ((host.as_ptr() as u64, 0), "no memory of a GPU"),
    ] {
        let error = save(&store, stream, &[(here, 0), (there, 1), wrong]).expect_err("refused");
        assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{error}");
        assert!(error.to_string().contains(found), "{error}");
    }
    save(&store, stream, &[(here, 0), (here + VIEW, 0)]).expect("saved");
}
