//! Chunks that go from spare memory of a GPU to the file by cuFile, past host memory.

use std::path::PathBuf;

use pccheck::engine::{format_region, Select, Store};
use pccheck::medium::{Durability, Requested};
use pccheck::save::{DirectStorage, Faults, SaveOptions, Snapshot};
use pccheck::store::{FormatOptions, OpenOptions};
use pccheck::ErrorKind;

use super::bed::{assert_idle, on, store, stream_wait, Shape, State, CHUNK, PROMPT, WAIT};
use super::cufile::Cufile;
use super::gds::alone;
use super::standin::{Standin, Stream};

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
        state.fill(|device| if device == 0 { stream } else { super::standin::LEGACY }, 1, 0);
        standin.synchronize(1, super::standin::LEGACY);
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

/// Calls of a save that goes directly, beside those of every save.
const CALLS: &[&str] =
    &["cuModuleLoadData", "cuModuleGetFunction", "cuLaunchKernel", "cuMemcpyDtoHAsync_v2", "cuEventRecord"];
const CUFILE_CALLS: &[&str] = &["cuFileHandleRegister", "cuFileBufRegister", "cuFileWrite"];

#[test]
fn a_call_that_fails_costs_its_save_at_most_and_nothing_else() {
    let standin = Standin::take();
    let cufile = Cufile::take(&standin);
    let calls = CALLS.iter().map(|call| (call, false)).chain(CUFILE_CALLS.iter().map(|call| (call, true)));
    let mut failed = 0;
    for (call, of_cufile) in calls {
        for (nth, how) in [1, 2, 4]
            .into_iter()
            .flat_map(|nth| [DirectStorage::Required, DirectStorage::Auto].map(|how| (nth, how)))
        {
            let what = format!("{call} failing at call {nth}, {how:?}");
            let (home, stream) = (Home::new(), standin.stream(0));
            cufile.set_properties(2, 0);
            let (store, mut state) = (home.open(Requested::Direct, 8), State::new(&standin, SHAPE));
            state.fill(|_| stream, 1, 0);
            match of_cufile {
                true => cufile.fail(call, nth, INTERNAL, 0, false),
                false => standin.fail(call, nth, INVALID, false),
            }
            let options = directly(stream, Snapshot::Spare, how);
            let ended = state
                .begin(&store, 1, options)
                .and_then(|save| stream_wait(&save, stream).and_then(|()| save.wait_durable(WAIT)));
            failed += u32::from(ended.is_err());
            match ended {
                Ok(_) => assert!(state.is_saved(&store, 1), "{what}"),
                Err(error) => {
                    let told =
                        matches!(error.kind(), ErrorKind::Device | ErrorKind::Io | ErrorKind::Unsupported);
                    assert!(told, "{what}: {error}");
                    assert!(
                        error.to_string().contains(&if of_cufile { INTERNAL } else { INVALID }.to_string()),
                        "{what}: {error}"
                    );
                }
            }
            standin.reset();
            cufile.reset();
            cufile.set_properties(2, 0);
            assert_idle(&store);
            state.fill(|_| stream, 2, 0);
            let save = state.begin(&store, 2, options).unwrap_or_else(|e| panic!("{what}: {e}"));
            save.wait_durable(WAIT).unwrap_or_else(|e| panic!("after {what}: {e}"));
            assert!(state.is_saved(&store, 2), "after {what}");
            drop(save);
            assert_idle(&store);
            drop((store, state));
            standin.destroy(stream);
            standin.assert_clean(&what);
            cufile.assert_clean(&what);
        }
    }
    assert!(failed > 15, "only {failed} saves failed: are these the calls that are made?");
}

#[test]
fn a_disk_that_refuses_a_write_fails_the_save_with_its_words() {
    let standin = Standin::take();
    let cufile = Cufile::take(&standin);
    for (errno, kind) in [(libc::EIO, ErrorKind::Io), (libc::ENOSPC, ErrorKind::NoSpace)] {
        let (home, stream) = (Home::new(), standin.stream(0));
        let (store, mut state) = (home.open(Requested::Direct, 8), State::new(&standin, SHAPE));
        state.fill(|_| stream, 1, 0);
        state.begin(&store, 1, required(stream)).expect("begin").wait_durable(WAIT).expect("durable");
        state.fill(|_| stream, 2, 0);
        cufile.fail_write(1, errno, false);
        let save = state.begin(&store, 2, required(stream)).expect("begin");
        let error = save.wait_durable(WAIT).expect_err("the disk refused");
        assert_eq!(error.kind(), kind, "{error}");
        assert!(error.to_string().contains("region.pcc"), "{error}");
        let newest = store.open_checkpoint(Select::Newest, true).expect("the one before is there");
        assert_eq!(newest.checkpoint.record().step, 1);
    }
}

/// Spare memory is the next save's only when all of it has been written.
#[test]
fn a_spare_that_is_still_being_written_from_is_not_the_next_saves() {
    let standin = Standin::take();
    let cufile = Cufile::take(&standin);
    let (home, stream) = (Home::new(), standin.stream(0));
    let (store, mut state) = (home.open(Requested::Direct, 8), State::new(&standin, SHAPE));
    cufile.delay_us(20_000);
    let mut saves = Vec::new();
    for step in 1..=6 {
        state.fill(|_| stream, step, 0);
        let save = state.begin(&store, step, required(stream)).expect("begin");
        stream_wait(&save, stream).expect("wait");
        saves.push(save);
    }
    for save in &saves {
        save.wait_durable(Some(PROMPT)).expect("durable");
    }
    assert!(state.is_saved(&store, 6));
    for kept in store.checkpoints().expect("checkpoints") {
        let opened = store.open_checkpoint(Select::Generation(kept.record.generation), true);
        opened.expect("what was written is what was hashed");
    }
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

/// What `Auto` was once refused is not tried again: some of those calls may wait for a device, outside of the gate.
#[test]
fn what_was_refused_once_is_not_tried_again_by_auto() {
    let standin = Standin::take();
    let cufile = Cufile::take(&standin);
    cufile.set_properties(2, 0);
    let (home, stream) = (Home::new(), standin.stream(0));
    let (store, mut state) = (home.open(Requested::Direct, 16), State::new(&standin, SHAPE));
    state.fill(|_| stream, 1, 0);
    standin.fail("cuModuleLoadData", 1, 209, true);
    for step in 1..=4 {
        let options = directly(stream, Snapshot::Spare, DirectStorage::Auto);
        state.begin(&store, step, options).expect("begin").wait_durable(WAIT).expect("durable");
    }
    assert_eq!(store.stats().direct_bytes, 0);
    assert_eq!(standin.calls("cuModuleLoadData"), 1);
}

/// Loading the code for hashes may wait for a stream that waits for a flag.
#[test]
fn what_was_refused_once_holds_up_no_stream_that_waits_for_a_flag() {
    let standin = Standin::take();
    let cufile = Cufile::take(&standin);
    cufile.set_properties(2, 0);
    let (home, stream, other) = (Home::new(), standin.stream(0), standin.stream(0));
    let (store, mut state) = (home.open(Requested::Direct, 8), State::new(&standin, SHAPE));
    state.fill(|_| stream, 1, 0);
    standin.fail("cuModuleLoadData", 1, 209, false);
    let auto = directly(stream, Snapshot::Spare, DirectStorage::Auto);
    state.begin(&store, 1, auto).expect("begin").wait_durable(WAIT).expect("durable");
    super::flags::warm(&store, &mut state, stream);
    for step in 3..=5 {
        state.fill(|_| stream, step, 0);
        standin.synchronize(0, stream);
        standin.delay_us(100_000);
        let flagged = state.begin(&store, step, super::flags::flagged(other, PROMPT)).expect("begin");
        stream_wait(&flagged, stream).expect("wait");
        let second =
            state.begin(&store, step, directly(other, Snapshot::Spare, DirectStorage::Auto)).expect("begin");
        flagged.wait_durable(WAIT).expect("the first is durable");
        second.wait_durable(WAIT).expect("the second, too");
        standin.delay_us(0);
    }
}

/// A number that looks random.
struct Dice(u64);

impl Dice {
    fn below(&mut self, most: u64) -> u64 {
        self.0 = self.0.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        (self.0 >> 33) % most
    }
}

#[test]
fn states_of_any_shape_come_back_as_they_were() {
    let standin = Standin::take();
    let cufile = Cufile::take(&standin);
    let mut dice = Dice(std::env::var("SEED").ok().and_then(|seed| seed.parse().ok()).unwrap_or(1));
    let mut went_directly = 0;
    for case in 0..120 {
        cufile.set_properties(2, 0);
        let chunk = 4096 * (1 + dice.below(4));
        let buffers = 3 + dice.below(20);
        let most = if dice.below(4) == 0 { 120 } else { 14 };
        let count = 1 + dice.below(most);
        let shape: Vec<(usize, Option<u32>)> = (0..count)
            .map(|_| {
                let bytes = match dice.below(6) {
                    0 => 0,
                    1 => dice.below(50),
                    2 => 4096 * dice.below(8),
                    3 => dice.below(3 * chunk),
                    _ => dice.below(if count > 20 { 5000 } else { 60_000 }),
                };
                (bytes as usize, (dice.below(4) > 0).then_some(0))
            })
            .collect();
        let (home, stream) = (Home::new(), standin.stream(0));
        let options = OpenOptions {
            medium: Requested::Direct,
            required: Durability::Process,
            max_in_flight: 2,
            chunk_bytes: chunk,
            staging_bytes: buffers * chunk,
            writers: 1 + dice.below(3) as u32,
            rewrite_every: 1 + dice.below(4) as u32,
            ..OpenOptions::default()
        };
        let store = Store::open(&home.path(), &options).expect("open");
        let mut state = State::new(&standin, &shape);
        let mut last = None;
        for step in 1..=8 {
            // Some of them have the bytes that the one before had.
            let filled = if dice.below(3) == 0 { last.unwrap_or(step) } else { step };
            state.fill(|_| stream, filled, dice.below(300));
            let how = [DirectStorage::Auto, DirectStorage::Auto, DirectStorage::Off][dice.below(3) as usize];
            cufile.delay_us(dice.below(3000));
            let mut save = state.begin(&store, step, directly(stream, Snapshot::Spare, how)).expect("begin");
            if dice.below(5) == 0 {
                let again = directly(stream, Snapshot::Spare, DirectStorage::Auto);
                stream_wait(&save, stream).expect("wait");
                standin.synchronize(0, stream);
                if dice.below(2) == 0 {
                    save.cancel();
                }
                save = state.begin(&store, step, again).expect("begin");
            }
            stream_wait(&save, stream).expect("wait");
            save.wait_copied(WAIT).expect("copied");
            last = Some(filled);
            state.fill(|_| stream, 77, 0);
            save.wait_durable(WAIT)
                .unwrap_or_else(|error| panic!("case {case}, step {step}: {error}, {shape:?}"));
            let opened = store.open_checkpoint(Select::Newest, true).expect("verified");
            let right = state.expected(filled);
            for (at, right) in right.iter().enumerate() {
                let found = opened.checkpoint.read_tensor(&format!("t{at:03}")).expect("read");
                assert!(
                    found == *right,
                    "case {case}, step {step}, tensor {at}, chunks of {chunk}: {shape:?}"
                );
            }
        }
        went_directly += u64::from(store.stats().direct_bytes > 0);
        assert_idle(&store);
        standin.synchronize(0, stream);
        drop((store, state));
        standin.destroy(stream);
        standin.assert_clean("states of any shape");
        cufile.assert_clean("states of any shape");
        cufile.reset();
    }
    assert!(went_directly > 60, "{went_directly}");
}

/// The job has left the pump long before its chunks are written: only the copiers hold its spare then.
#[test]
fn a_spare_that_copiers_alone_hold_is_not_the_next_saves() {
    let standin = Standin::take();
    let cufile = Cufile::take(&standin);
    let (home, stream) = (Home::new(), standin.stream(0));
    let (store, mut state) = (home.open(Requested::Direct, 64), State::new(&standin, SHAPE));
    cufile.delay_us(300_000);
    let mut saves = Vec::new();
    for step in 1..=2 {
        state.fill(|_| stream, step, 0);
        let save = state.begin(&store, step, required(stream)).expect("begin");
        save.wait_copied(WAIT).expect("copied");
        // Its hashes have come, and the pump has nothing more to do for it.
        std::thread::sleep(std::time::Duration::from_millis(60));
        assert!(!save.progress().ended);
        saves.push(save);
    }
    for save in &saves {
        let generation = save.wait_durable(Some(PROMPT)).expect("durable").generation;
        let opened = store.open_checkpoint(Select::Generation(generation), true);
        opened.expect("what was written is what was hashed");
    }
    assert!(state.is_saved(&store, 2));
}

/// What only shows when it is used: `Auto` may lose a save to it, and does without from then on.
fn auto_does_without_what_never_works(fail: impl Fn(&Standin, &Cufile<'_>)) {
    let standin = Standin::take();
    let cufile = Cufile::take(&standin);
    cufile.set_properties(2, 0);
    let (home, stream) = (Home::new(), standin.stream(0));
    let (store, mut state) = (home.open(Requested::Direct, 16), State::new(&standin, SHAPE));
    fail(&standin, &cufile);
    let mut ended = Vec::new();
    for step in 1..=4 {
        state.fill(|_| stream, step, 0);
        let save =
            state.begin(&store, step, directly(stream, Snapshot::Spare, DirectStorage::Auto)).expect("begin");
        ended.push(save.wait_durable(WAIT).map(|_| ()).map_err(|error| error.to_string()));
    }
    standin.reset();
    cufile.reset();
    assert!(ended[1..].iter().all(Result::is_ok), "{ended:#?}");
}

#[test]
fn auto_does_without_cufile_that_refuses_every_write() {
    // CU_FILE_IO_NOT_SUPPORTED.
    auto_does_without_what_never_works(|_, cufile| cufile.fail("cuFileWrite", 1, 5008, 0, true));
}

#[test]
fn auto_does_without_a_kernel_that_is_never_launched() {
    auto_does_without_what_never_works(|standin, _| standin.fail("cuLaunchKernel", 1, INVALID, true));
}

/// More hashes than a buffer takes, and more chunks than a copier writes at a time.
#[test]
fn a_state_of_many_pieces_goes_directly() {
    let standin = Standin::take();
    let _cufile = Cufile::take(&standin);
    for (chunk, bytes) in [(4096, 6 << 20), (1 << 20, 35 << 20)] {
        let folder = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("folder");
        let (path, stream) = (folder.path().join("region.pcc"), standin.stream(0));
        format_region(&path, &FormatOptions::new(3, 64 << 20)).expect("format");
        let options = OpenOptions {
            medium: Requested::Direct,
            required: Durability::Process,
            max_in_flight: 2,
            chunk_bytes: chunk,
            staging_bytes: 16 * chunk,
            ..OpenOptions::default()
        };
        let store = Store::open(&path, &options).expect("open");
        let mut state = State::new(&standin, &[(bytes + 1, Some(0)), (7 << 10, None), (bytes / 8, Some(0))]);
        state.fill(|_| stream, 1, 0);
        state.begin(&store, 1, required(stream)).expect("begin").wait_durable(WAIT).expect("durable");
        assert!(state.is_saved(&store, 1), "chunks of {chunk}");
        assert!(store.stats().direct_bytes >= bytes as u64 / 2);
        assert_idle(&store);
    }
}

/// Opening the file, loading the code and registering the spare may wait for a device: not while a stream waits for a flag.
#[test]
fn what_direct_storage_has_to_load_waits_for_streams_that_wait_for_a_flag() {
    let standin = Standin::take();
    let cufile = Cufile::take(&standin);
    cufile.set_properties(2, 0);
    let (home, stream, other) = (Home::new(), standin.stream(0), standin.stream(0));
    let (store, mut state) = (home.open(Requested::Direct, 8), State::new(&standin, SHAPE));
    state.fill(|_| stream, 1, 0);
    // A direct save leaves a spare that is large enough, and is refused what would go with it.
    standin.fail("cuModuleLoadData", 1, 209, false);
    let save = state.begin(&store, 1, required(stream)).expect("begin");
    save.wait_durable(WAIT).expect_err("refused");
    let plain = directly(stream, Snapshot::Spare, DirectStorage::Off);
    let mut larger = State::new(&standin, &[(400_000, Some(0))]);
    larger.fill(|_| stream, 1, 0);
    larger.begin(&store, 1, plain).expect("begin").wait_durable(WAIT).expect("durable");
    super::flags::warm(&store, &mut state, stream);
    state.fill(|_| stream, 3, 0);
    standin.synchronize(0, stream);
    standin.delay_us(100_000);
    let flagged = state.begin(&store, 3, super::flags::flagged(other, PROMPT)).expect("begin");
    stream_wait(&flagged, stream).expect("wait");
    let second =
        state.begin(&store, 4, directly(other, Snapshot::Spare, DirectStorage::Required)).expect("begin");
    flagged.wait_durable(WAIT).expect("the first is durable");
    second.wait_durable(WAIT).expect("the second, too");
    assert!(store.stats().direct_bytes > 0);
}

/// Two slots, of which one holds the newest checkpoint: what a save that was given up has written into the other is not taken for
/// what that held before.
#[test]
fn what_a_save_that_was_given_up_has_written_is_not_believed_to_be_what_was_there() {
    let standin = Standin::take();
    let cufile = Cufile::take(&standin);
    let (folder, stream) =
        (tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("folder"), standin.stream(0));
    let path = folder.path().join("region.pcc");
    format_region(&path, &FormatOptions::new(2, 1 << 21)).expect("format");
    let options = OpenOptions {
        medium: Requested::Direct,
        required: Durability::Process,
        max_in_flight: 1,
        chunk_bytes: CHUNK,
        staging_bytes: 16 * CHUNK,
        rewrite_every: 1000,
        ..OpenOptions::default()
    };
    let store = Store::open(&path, &options).expect("open");
    let mut state = State::new(&standin, SHAPE);
    for step in 1..=2 {
        state.fill(|_| stream, step, 0);
        state.begin(&store, step, required(stream)).expect("begin").wait_durable(WAIT).expect("durable");
    }
    state.fill(|_| stream, 3, 0);
    let confirmed = SaveOptions { confirm: true, ..required(stream) };
    let given_up = state.begin(&store, 3, confirmed).expect("begin");
    super::bed::until("all is written", || {
        let progress = given_up.progress();
        progress.written_bytes == progress.total_bytes
    });
    given_up.cancel();
    given_up.wait_durable(WAIT).expect_err("given up");
    let before = cufile.calls("cuFileWrite");
    // Those of the first one, whose slot it is.
    state.fill(|_| stream, 1, 0);
    state.begin(&store, 4, required(stream)).expect("begin").wait_durable(WAIT).expect("durable");
    assert!(cufile.calls("cuFileWrite") > before, "all was overwritten");
    let opened = store.open_checkpoint(Select::Newest, true).expect("verified");
    for (at, right) in state.expected(1).iter().enumerate() {
        assert!(opened.checkpoint.read_tensor(&format!("t{at:03}")).expect("read") == *right, "tensor {at}");
    }
}
