//! Chunks that cuFile is to write, while the slot's writing mark takes long: nothing is written before it, and nothing else is held up.

use std::os::fd::AsRawFd;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use pccheck::engine::{format_region, Select, Store, TensorAt};
use pccheck::medium::{
    open_medium, Barrier, Durability, Io, Medium, MediumInfo, MediumMemory, MediumOptions, Requested,
};
use pccheck::save::{DirectStorage, Faults, Save, SaveOptions, Snapshot};
use pccheck::store::{FormatOptions, OpenOptions};
use pccheck::Result;

use super::bed::{assert_idle, on, until, Shape, State, CHUNK, WAIT};
use super::cufile::Cufile;
use super::standin::{Standin, Stream};

/// A medium whose writing marks can be held up.
struct Held {
    inner: Arc<dyn Medium>,
    held: Mutex<bool>,
    changed: Condvar,
}

impl Held {
    fn hold(&self, on: bool) {
        *self.held.lock().expect("lock") = on;
        self.changed.notify_all();
    }
}

impl Medium for Held {
    fn info(&self) -> MediumInfo {
        self.inner.info()
    }
    fn len_bytes(&self) -> u64 {
        self.inner.len_bytes()
    }
    fn read(&self, offset: u64, dst: &mut [u8]) -> Result<()> {
        self.inner.read(offset, dst)
    }
    fn start(&self, io: Io) {
        self.inner.start(io);
    }
    fn copy(&self, offset: u64, src: &[u8]) -> Result<()> {
        self.inner.copy(offset, src)
    }
    fn fence(&self, barrier: Barrier) -> Result<()> {
        self.inner.fence(barrier)
    }
    fn persist(&self, offset: u64, len: u64, barrier: Barrier) -> Result<()> {
        self.inner.persist(offset, len, barrier)
    }
    fn memory(&self) -> Option<&dyn MediumMemory> {
        self.inner.memory()
    }
    fn direct_file(&self) -> Result<Option<Arc<dyn AsRawFd + Send + Sync>>> {
        self.inner.direct_file()
    }
    fn write_durable(&self, offset: u64, block: &[u8], barrier: Barrier) -> Result<()> {
        if barrier == Barrier::WritingMark {
            let mut held = self.held.lock().expect("lock");
            while *held {
                held = self.changed.wait(held).expect("lock");
            }
        }
        self.inner.write_durable(offset, block, barrier)
    }
}

fn opened(folder: &tempfile::TempDir, buffers: u64) -> (Arc<Held>, Store) {
    let path = folder.path().join("region.pcc");
    let _ = std::fs::remove_file(&path);
    format_region(&path, &FormatOptions::new(4, 1 << 21)).expect("format");
    let options =
        MediumOptions { kind: Requested::Direct, required: Durability::Process, ..MediumOptions::default() };
    let inner = open_medium(&path, &options, None).expect("open");
    let held = Arc::new(Held { inner, held: Mutex::new(false), changed: Condvar::new() });
    let options = OpenOptions {
        required: Durability::Process,
        max_in_flight: 2,
        chunk_bytes: CHUNK,
        staging_bytes: buffers * CHUNK,
        // As with more of them and so many pieces.
        writers: 1,
        rewrite_every: 1,
        ..OpenOptions::default()
    };
    let store = Store::open_on(held.clone(), &options, Faults::default()).expect("open");
    (held, store)
}

fn direct(stream: Stream, how: DirectStorage) -> SaveOptions {
    let mut options = on(stream, Snapshot::Spare);
    options.device.direct_storage = how;
    options
}

const ON_GPU: &Shape = &[(40 * CHUNK as usize, Some(0))];

#[test]
fn cufile_writes_nothing_before_the_writing_mark_is_durable() {
    let standin = Standin::take();
    let cufile = Cufile::take(&standin);
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("folder");
    let ((medium, store), stream) = (opened(&folder, 64), standin.stream(0));
    let mut state = State::new(&standin, ON_GPU);
    state.fill(|_| stream, 1, 0);
    medium.hold(true);
    let save = state.begin(&store, 1, direct(stream, DirectStorage::Required)).expect("begin");
    save.wait_copied(WAIT).expect("copied");
    std::thread::sleep(Duration::from_millis(200));
    let early = cufile.calls("cuFileWrite");
    medium.hold(false);
    save.wait_durable(WAIT).expect("durable");
    assert_eq!(early, 0, "written before the mark");
    assert!(cufile.calls("cuFileWrite") > 0);
    assert!(state.is_saved(&store, 1));
    assert_idle(&store);
}

#[test]
fn a_save_that_fails_before_its_mark_is_never_written_by_cufile() {
    let standin = Standin::take();
    let cufile = Cufile::take(&standin);
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("folder");
    let ((medium, store), stream) = (opened(&folder, 64), standin.stream(0));
    let mut state = State::new(&standin, ON_GPU);
    state.fill(|_| stream, 1, 0);
    medium.hold(true);
    let save = state.begin(&store, 1, direct(stream, DirectStorage::Required)).expect("begin");
    save.wait_copied(WAIT).expect("copied");
    std::thread::sleep(Duration::from_millis(50));
    save.cancel();
    std::thread::sleep(Duration::from_millis(50));
    medium.hold(false);
    save.wait_durable(WAIT).expect_err("cancelled");
    assert_eq!(cufile.calls("cuFileWrite"), 0);
    assert_idle(&store);
}

/// The state of the second save is in host memory, for which the pool has room: it leaves that whatever the disk does.
fn copied_while_the_mark_of_another_is_held(how: DirectStorage) {
    let standin = Standin::take();
    let _cufile = Cufile::take(&standin);
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("folder");
    let ((medium, store), stream) = (opened(&folder, 256), standin.stream(0));
    let mut state = State::new(&standin, ON_GPU);
    let host = State::new(&standin, &[(40 * CHUNK as usize, None)]);
    state.fill(|_| stream, 1, 0);
    medium.hold(true);
    let first = state.begin(&store, 1, direct(stream, how)).expect("begin");
    first.wait_copied(WAIT).expect("copied");
    std::thread::sleep(Duration::from_millis(100));
    let second = host.begin(&store, 2, SaveOptions { wait: WAIT, ..SaveOptions::DEFAULT }).expect("begin");
    let copied = second.wait_copied(Some(Duration::from_secs(3)));
    medium.hold(false);
    first.wait_durable(WAIT).expect("durable");
    second.wait_durable(WAIT).expect("durable");
    copied.expect("host memory is copied meanwhile");
    assert_idle(&store);
}

#[test]
fn host_memory_is_copied_while_a_mark_is_held() {
    copied_while_the_mark_of_another_is_held(DirectStorage::Off);
}

#[test]
fn host_memory_is_copied_while_cufile_waits_for_a_mark() {
    copied_while_the_mark_of_another_is_held(DirectStorage::Required);
}

/// A save whose chunks wait for a writing mark. Beside it raw writers waited for buffers, and saw to what holds some.
fn beside_raw_writers<'a>(
    standin: &'a Standin,
    folder: &tempfile::TempDir,
    stream: Stream,
) -> (Arc<Held>, Store, Save, State<'a>) {
    let (medium, store) = opened(folder, 32);
    let mut state = State::new(standin, ON_GPU);
    let pool = store.region().pool();
    let raw = store.begin_raw(1, 20 * CHUNK, &[], WAIT).expect("begin raw");
    std::thread::sleep(Duration::from_millis(20));
    medium.hold(true);
    let before = pool.free_count();
    standin.hold_stream(stream, true);
    state.fill(|_| stream, 2, 0);
    let save = state.begin(&store, 2, direct(stream, DirectStorage::Required)).expect("begin");
    // The hashes, and the first and the last chunk, which do not go directly.
    until("all is enqueued", || pool.free_count() + 3 <= before);
    let taken: Vec<_> = std::iter::from_fn(|| pool.try_acquire()).collect();
    std::thread::scope(|scope| {
        for chunk in 0..4 {
            let raw = &raw;
            scope.spawn(move || raw.write_at(chunk * CHUNK + 5000, &[1]).expect("written"));
        }
        std::thread::sleep(Duration::from_millis(30));
        standin.hold_stream(stream, false);
        std::thread::sleep(Duration::from_millis(30));
        drop(taken);
    });
    raw.cancel();
    (medium, store, save, state)
}

#[test]
fn raw_writers_that_wait_for_buffers_forget_no_chunks_of_a_gpu() {
    let standin = Standin::take();
    let _cufile = Cufile::take(&standin);
    for round in 0..5 {
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("folder");
        let stream = standin.stream(0);
        let (medium, store, save, state) = beside_raw_writers(&standin, &folder, stream);
        std::thread::sleep(Duration::from_millis(10));
        medium.hold(false);
        save.wait_durable(WAIT).unwrap_or_else(|error| panic!("round {round}: {error}"));
        drop((store, state));
        standin.destroy(stream);
    }
}

#[test]
fn a_store_is_closed_while_chunks_of_a_gpu_wait_for_a_mark() {
    let standin = Standin::take();
    let _cufile = Cufile::take(&standin);
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("folder");
    let (medium, store, save, _state) = beside_raw_writers(&standin, &folder, standin.stream(0));
    std::thread::sleep(Duration::from_millis(10));
    // What is in flight is cancelled.
    let closing = std::thread::spawn(move || drop(store));
    std::thread::sleep(Duration::from_millis(50));
    medium.hold(false);
    let deadline = std::time::Instant::now() + Duration::from_secs(5);
    while !closing.is_finished() && std::time::Instant::now() < deadline {
        std::thread::sleep(Duration::from_millis(5));
    }
    assert!(closing.is_finished(), "closing hangs");
    save.wait_durable(WAIT).expect_err("cancelled");
}

/// Tied tensors, confirmation and a pin.
#[test]
fn tied_tensors_of_a_save_that_is_confirmed_and_pinned() {
    let standin = Standin::take();
    let cufile = Cufile::take(&standin);
    let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("folder");
    let ((_medium, store), stream) = (opened(&folder, 16), standin.stream(0));
    let mut state = State::new(&standin, &[(70_000, Some(0)), (30_000, None), (90_000, Some(0))]);
    for step in 1..=3 {
        state.fill(|_| stream, step, 0);
        let mut options = direct(stream, DirectStorage::Required);
        (options.confirm, options.pin) = (true, step == 1);
        let mut tensors = state.tensors();
        tensors.push(TensorAt { name: "tied", ..tensors[2] });
        let metadata = "m".repeat(30_000);
        // SAFETY: the memory lives, and is changed when it is copied.
        let save =
            unsafe { store.begin_save(step, &tensors, &[("long", &metadata)], options) }.expect("begin");
        save.wait_copied(WAIT).expect("copied");
        state.fill(|_| stream, 50, 0);
        let written = cufile.calls("cuFileWrite");
        until("all is written", || save.progress().written_bytes == save.progress().total_bytes);
        assert!(written > 0 || cufile.calls("cuFileWrite") > 0);
        save.wait_durable(Some(Duration::from_millis(20))).expect_err("not confirmed");
        save.confirm().expect("confirmed");
        save.wait_durable(WAIT).expect("durable");
        let opened = store.open_checkpoint(Select::Newest, true).expect("verified");
        let right = state.expected(step);
        for (name, right) in
            [("t000", &right[0]), ("t001", &right[1]), ("t002", &right[2]), ("tied", &right[2])]
        {
            assert!(opened.checkpoint.read_tensor(name).expect("read") == *right, "{name} of step {step}");
        }
    }
    assert_idle(&store);
}
