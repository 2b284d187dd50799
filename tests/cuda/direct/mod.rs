//! Chunks that go from spare memory of a GPU to the file by cuFile, past host memory.

mod failures;
mod shapes;
mod spares;

use std::path::PathBuf;

use pccheck::engine::{format_region, Select, Store};
use pccheck::medium::{Durability, Requested};
use pccheck::save::{DirectStorage, Faults, SaveOptions, Snapshot};
use pccheck::store::{FormatOptions, OpenOptions};
use pccheck::ErrorKind;

use crate::bed::{
    assert_idle, on, store, stream_wait, until, without_jams, Shape, State, CHUNK, PROMPT, WAIT,
};
use crate::cufile::Cufile;
use crate::gds::alone;
use crate::standin::{Standin, Stream};

const INVALID: i32 = 1;
/// A number of cuFile's own: an internal error.
const INTERNAL: i32 = 5030;

/// 32 chunks, of which 28 are wholly on the GPU: the header and host memory are in four of them, and the last one is shorter.
const SHAPE: &Shape = &[
    (100_000, Some(0)),
    (3, Some(0)),
    (0, Some(0)),
    (17, Some(0)),
    (60_000, Some(0)),
    (5_000, None),
    (40_000, Some(0)),
    (9_001, Some(0)),
    (30_000, Some(0)),
];

/// A region in a file, which is removed at the end.
struct Home {
    folder: tempfile::TempDir,
}

impl Home {
    fn new() -> Home {
        let home = Home { folder: tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("folder") };
        format_region(&home.path(), &FormatOptions::new(3, 1 << 21)).expect("format");
        home
    }

    fn path(&self) -> PathBuf {
        self.folder.path().join("region.pcc")
    }

    /// For another region.
    fn other(&self) -> PathBuf {
        self.folder.path().join("other.pcc")
    }

    fn open(&self, medium: Requested, buffers: u64) -> Store {
        let options = OpenOptions {
            medium,
            required: Durability::Process,
            max_in_flight: 2,
            chunk_bytes: CHUNK,
            staging_bytes: buffers * CHUNK,
            writers: 2,
            rewrite_every: 1,
            ..OpenOptions::default()
        };
        Store::open(&self.path(), &options).expect("open")
    }
}

fn directly(stream: Stream, snapshot: Snapshot, how: DirectStorage) -> SaveOptions {
    let mut options = on(stream, snapshot);
    options.device.direct_storage = how;
    options
}

fn required(stream: Stream) -> SaveOptions {
    directly(stream, Snapshot::Spare, DirectStorage::Required)
}

#[test]
fn chunks_of_a_gpu_go_directly_and_the_rest_through_the_pool() {
    let standin = Standin::take();
    let cufile = Cufile::take(&standin);
    cufile.set_properties(2, 0);
    for (how, buffers) in
        [(DirectStorage::Required, 64), (DirectStorage::Required, 4), (DirectStorage::Auto, 4)]
    {
        let (home, stream) = (Home::new(), standin.stream(0));
        let store = home.open(Requested::Direct, buffers);
        let mut state = State::new(&standin, SHAPE);
        state.fill(|_| stream, 1, 2000);
        for step in 1..=4 {
            let copies = standin.copies();
            let save = state.begin(&store, step, directly(stream, Snapshot::Spare, how)).expect("begin");
            stream_wait(&save, stream).expect("wait");
            // Overwritten at once.
            state.fill(|_| stream, step + 1, 500);
            save.wait_durable(WAIT).expect("durable");
            assert!(state.is_saved(&store, step), "step {step}, {how:?}, {buffers} buffers");
            let direct = store.stats().direct_bytes;
            assert!(
                direct >= step * 25 * CHUNK && direct.is_multiple_of(CHUNK),
                "{direct} in {step} saves, {how:?}"
            );
            assert!(standin.copies() > copies, "the rest goes through the pool");
        }
        assert!(cufile.calls("cuFileWrite") >= 4);
        assert_eq!(cufile.unregistered(), 0, "the spare is registered");
        assert_eq!(cufile.unaligned(), 0);
        assert_idle(&store);
        standin.synchronize(0, stream);
        drop((store, state));
        // Another process finds them.
        let store = home.open(Requested::Mmap, buffers);
        let newest = store.open_checkpoint(Select::Newest, true).expect("verified");
        assert_eq!(newest.checkpoint.record().step, 4);
        drop((newest, store));
        standin.destroy(stream);
        standin.assert_clean("direct saves");
        cufile.assert_clean("direct saves");
        cufile.reset();
        cufile.set_properties(2, 0);
    }
}

#[test]
fn what_is_in_its_place_already_is_not_written_again() {
    let standin = Standin::take();
    let cufile = Cufile::take(&standin);
    let (home, stream) = (Home::new(), standin.stream(0));
    let options = OpenOptions {
        medium: Requested::Direct,
        required: Durability::Process,
        max_in_flight: 1,
        chunk_bytes: CHUNK,
        staging_bytes: 16 * CHUNK,
        ..OpenOptions::default()
    };
    let store = Store::open(&home.path(), &options).expect("open");
    let mut state = State::new(&standin, SHAPE);
    state.fill(|_| stream, 1, 0);
    let mut written = Vec::new();
    for step in 1..=6 {
        let before = cufile.calls("cuFileWrite");
        state.begin(&store, step, required(stream)).expect("begin").wait_durable(WAIT).expect("durable");
        written.push(cufile.calls("cuFileWrite") - before);
    }
    assert!(written[0] > 0 && written[1] > 0, "{written:?}");
    assert_eq!(written[4..], [0, 0], "{written:?}");
    assert!(store.stats().unchanged_bytes > 2 * 25 * CHUNK);
    let newest = store.open_checkpoint(Select::Newest, true).expect("verified");
    assert_eq!(newest.checkpoint.record().step, 6);
}

/// What is required and not possible is an error that says why; where it is left to the engine it does without.
fn does_without(store: &Store, state: &mut State<'_>, stream: Stream, snapshot: Snapshot, why: &str) {
    let save = state.begin(store, 1, directly(stream, snapshot, DirectStorage::Required));
    let error = match save {
        Err(error) => error,
        Ok(save) => save.wait_durable(WAIT).expect_err("not possible"),
    };
    assert!(matches!(error.kind(), ErrorKind::Unsupported | ErrorKind::InvalidArgument), "{error}");
    assert!(error.to_string().contains(why), "{error}");
    for step in 2..=4 {
        let save = state.begin(store, step, directly(stream, snapshot, DirectStorage::Auto)).expect("begin");
        save.wait_durable(WAIT).expect("durable");
    }
    assert_eq!(store.stats().direct_bytes, 0);
    assert_idle(store);
}

#[test]
fn where_it_is_not_possible_the_engine_does_without_or_says_why() {
    let standin = Standin::take();
    let cufile = Cufile::take(&standin);
    cufile.set_properties(2, 0);
    let stream = standin.stream(0);
    let home = Home::new();
    {
        let (store, mut state) = (home.open(Requested::Mmap, 16), State::new(&standin, SHAPE));
        state.fill(|_| stream, 1, 0);
        does_without(&store, &mut state, stream, Snapshot::Spare, "direct medium");
        does_without(&store, &mut state, stream, Snapshot::Staging, "spare");
    }
    let store = home.open(Requested::Direct, 16);
    for (shape, why) in
        [(&[(50_000, Some(0)), (50_000, Some(1))][..], "several GPUs"), (&[(100, Some(0))][..], "no chunk")]
    {
        let mut state = State::new(&standin, shape);
        state.fill(|device| if device == 0 { stream } else { crate::standin::LEGACY }, 1, 0);
        standin.synchronize(1, crate::standin::LEGACY);
        does_without(&store, &mut state, stream, Snapshot::Spare, why);
    }
    assert_eq!(cufile.calls("cuFileWrite"), 0);
}

#[test]
fn where_there_is_no_room_for_a_spare_the_pool_takes_all_unless_direct_storage_is_required() {
    let standin = Standin::take();
    let cufile = Cufile::take(&standin);
    cufile.set_properties(2, 0);
    let (home, stream) = (Home::new(), standin.stream(0));
    let (store, mut state) = (home.open(Requested::Direct, 16), State::new(&standin, SHAPE));
    state.fill(|_| stream, 1, 0);
    // The stand-in's GPUs have less than `Auto` leaves to the program.
    let options = |how| directly(stream, Snapshot::Auto, how);
    let save = state.begin(&store, 1, options(DirectStorage::Required)).expect("begin");
    assert_eq!(save.wait_durable(WAIT).expect_err("no room").kind(), ErrorKind::OutOfMemory);
    state.fill(|_| stream, 2, 0);
    let save = state.begin(&store, 2, options(DirectStorage::Auto)).expect("begin");
    save.wait_durable(WAIT).expect("durable");
    assert!(state.is_saved(&store, 2));
    assert_eq!(store.stats().direct_bytes, 0);
}

#[test]
fn cufile_that_goes_through_host_memory_itself_is_used_only_where_it_is_required() {
    let standin = Standin::take();
    let cufile = Cufile::take(&standin);
    let (home, stream) = (Home::new(), standin.stream(0));
    let (store, mut state) = (home.open(Requested::Direct, 16), State::new(&standin, SHAPE));
    state.fill(|_| stream, 1, 0);
    let auto = directly(stream, Snapshot::Spare, DirectStorage::Auto);
    state.begin(&store, 1, auto).expect("begin").wait_durable(WAIT).expect("durable");
    assert_eq!((store.stats().direct_bytes, cufile.calls("cuFileWrite")), (0, 0));
    state.begin(&store, 2, required(stream)).expect("begin").wait_durable(WAIT).expect("durable");
    assert!(store.stats().direct_bytes > 0);
    assert_eq!(store.open_checkpoint(Select::Newest, true).expect("open").checkpoint.record().step, 2);
}

#[test]
fn without_the_library_it_is_unsupported_and_the_engine_does_without() {
    alone("direct::without_the_library_it_is_unsupported_and_the_engine_does_without", "none", || {
        let standin = Standin::take();
        let (home, stream) = (Home::new(), standin.stream(0));
        let (store, mut state) = (home.open(Requested::Direct, 16), State::new(&standin, SHAPE));
        state.fill(|_| stream, 1, 0);
        does_without(&store, &mut state, stream, Snapshot::Spare, "cuFile");
    });
}

#[test]
fn saves_of_the_simulated_medium_do_without() {
    let standin = Standin::take();
    let _cufile = Cufile::take(&standin);
    let stream = standin.stream(0);
    let (store, mut state) = (store(16, Faults::default()), State::new(&standin, SHAPE));
    state.fill(|_| stream, 1, 0);
    does_without(&store, &mut state, stream, Snapshot::Spare, "direct medium");
}
