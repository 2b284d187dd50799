//! Prevents: defects that were found in how regions are formatted, locked, grown and read, each told by its test.

mod common;

use std::fs;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::time::Duration;

use common::{disk, region_in, save_bytes, save_one, scratch, WAIT};
use pccheck::engine::{format_region, grow_region, Select, Store};
use pccheck::format::{BLOCK_BYTES, CONTROL_OFFSETS};
use pccheck::medium::{Durability, Requested};
use pccheck::store::{FormatOptions, OpenOptions};
use pccheck::ErrorKind;

fn options() -> OpenOptions {
    OpenOptions {
        required: Durability::Process,
        medium: Requested::Mmap,
        chunk_bytes: 8192,
        staging_bytes: 6 * 8192,
        max_in_flight: 1,
        writers: 1,
        readers: 2,
        ..OpenOptions::default()
    }
}

fn format() -> FormatOptions {
    FormatOptions { medium: Requested::Mmap, ..FormatOptions::new(3, 200_000) }
}

/// The end of such a wait is a time that no clock can tell: computing it once ended the process.
#[test]
fn waiting_for_the_lock_for_the_longest_duration_is_waiting_for_ever() {
    let region = region_in(disk(), &format());
    let wait = OpenOptions { lock_wait: Some(Duration::MAX), ..options() };
    let first = Store::open(&region.path, &wait).expect("open");
    std::thread::scope(|scope| {
        let second = scope.spawn(|| Store::open(&region.path, &wait).map(drop));
        std::thread::sleep(Duration::from_millis(50));
        assert!(!second.is_finished(), "did not wait");
        drop(first);
        second.join().expect("no panic").expect("the lock is free");
    });
}

/// Measuring once wrote the whole slot five times: 500 GiB for a slot of 100.
#[test]
fn formatting_with_large_slots_writes_a_bounded_scratch() {
    const SLOT_BYTES: u64 = 96 << 20;
    const MOST_BYTES: u64 = 64 << 20;
    let region = region_in(disk(), &FormatOptions::new(2, SLOT_BYTES));
    let file = fs::File::open(&region.path).expect("open");
    let mut written = 0;
    let mut piece = vec![0; 1 << 20];
    for at in (0..SLOT_BYTES).step_by(piece.len()) {
        file.read_exact_at(&mut piece, at).expect("read");
        written += piece.len() as u64 * u64::from(piece.iter().any(|&byte| byte != 0));
    }
    assert!(written < MOST_BYTES, "{written} bytes of scratch");
}

/// A file was once taken for empty where its first and last MiB were zero, as a disk image or a sparse array may be.
#[test]
fn formatting_spares_a_file_of_zeros_with_something_in_the_middle() {
    let dir = scratch();
    for (name, bytes) in [("sparse", 0), ("array", 9)] {
        let path = dir.path().join(name);
        let file = fs::File::create(&path).expect("create");
        file.set_len(5 << 20).expect("size");
        file.write_all_at(&vec![7; bytes], 5 << 19).expect("write");
        let before = fs::read(&path).expect("read");
        let error = format_region(&path, &format()).expect_err("the file is not empty");
        assert_eq!(error.kind(), ErrorKind::AlreadyExists, "{error}");
        assert!(error.advice().is_some_and(|advice| advice.contains("force")), "{error}");
        assert!(fs::read(&path).expect("read") == before, "destroyed all the same");
        format_region(&path, &FormatOptions { force: true, ..format() }).expect("forced");
    }
}

/// The look at what a path holds once came before the lock, and the lock was given up twice before the superblocks.
#[test]
fn of_those_who_format_one_path_at_once_one_succeeds() {
    let dir = scratch();
    for round in 0..60 {
        let path = dir.path().join(round.to_string());
        if round % 2 == 0 {
            fs::write(&path, []).expect("an empty file");
        }
        let made: Vec<_> = std::thread::scope(|scope| {
            let begun: Vec<_> = (0..4)
                .map(|_| {
                    scope.spawn(|| {
                        let made = format_region(&path, &format());
                        made.map(|()| fs::read(&path).expect("read")[..4096].to_vec())
                    })
                })
                .collect();
            begun.into_iter().map(|thread| thread.join().expect("no panic")).collect()
        });
        let winners: Vec<_> = made.iter().filter_map(|made| made.as_ref().ok()).collect();
        assert_eq!(winners.len(), 1, "{made:?}");
        for error in made.iter().filter_map(|made| made.as_ref().err()) {
            assert!(matches!(error.kind(), ErrorKind::AlreadyExists | ErrorKind::InUse), "{error}");
        }
        assert!(fs::read(&path).expect("read")[..4096] == winners[0][..], "another region than the one made");
    }
}

/// What a failed format leaves behind must not need force the next time.
#[test]
fn a_format_that_fails_leaves_the_path_as_it_was() {
    let dir = scratch();
    let dax = FormatOptions { medium: Requested::Dax, ..format() };
    let (new, empty) = (dir.path().join("new"), dir.path().join("empty"));
    fs::write(&empty, []).expect("an empty file");
    for path in [&new, &empty] {
        match format_region(path, &dax) {
            // Persistent memory: nothing fails here.
            Ok(()) => return,
            Err(error) => assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}"),
        }
    }
    assert!(!new.exists(), "left behind");
    assert_eq!(fs::metadata(&empty).expect("still there").len(), 0);
    for path in [&new, &empty] {
        format_region(path, &format()).expect("with another medium");
    }
}

/// Such a checkpoint was once read by one thread through a heap buffer of one chunk, outside of the staging pool.
#[test]
fn chunks_larger_than_the_readers_buffers_are_read_through_them() {
    let region = region_in(disk(), &FormatOptions::new(3, 4 << 20));
    let bytes =
        |len: usize, seed: usize| (0..len).map(|i| ((i * 131) ^ (i >> 9) ^ seed) as u8).collect::<Vec<u8>>();
    // Three chunks and a shorter one, which is smaller than a reader's buffer; tensors that begin and end anywhere.
    let state: Vec<(String, Vec<u8>)> = [1_000_000, 3, 700_001, 1_442_000]
        .iter()
        .enumerate()
        .map(|(index, &len)| (index.to_string(), bytes(len, index)))
        .collect();
    let writing = OpenOptions { chunk_bytes: 1 << 20, staging_bytes: 4 << 20, ..options() };
    let store = Store::open(&region.path, &writing).expect("open");
    save_bytes(&store, 1, &state, &[]).expect("save").wait_durable(WAIT).expect("durable");
    drop(store);
    for medium in [Requested::Mmap, Requested::Direct] {
        for (chunk_bytes, buffers) in [(4096, 2), (4096, 3), (12_288, 9), (1 << 20, 3)] {
            let reading =
                OpenOptions { medium, chunk_bytes, staging_bytes: buffers * chunk_bytes, ..options() };
            let what = format!("{medium:?}, {buffers} buffers of {chunk_bytes} bytes");
            let store = Store::open(&region.path, &reading).expect("open");
            let opened = store.open_checkpoint(Select::Newest, true).expect(&what);
            let checkpoint = opened.checkpoint;
            // Twice the same bytes in one read: both destinations are filled.
            let mut got: Vec<Vec<u8>> =
                state.iter().chain(&state).map(|(_, data)| vec![0; data.len()]).collect();
            let names = state.iter().chain(&state).map(|(name, _)| name.as_str());
            let mut wanted: Vec<(&str, &mut [u8])> =
                names.zip(&mut got).map(|(name, got)| (name, got.as_mut_slice())).collect();
            checkpoint.read_tensors(&mut wanted).expect(&what);
            for (got, (name, data)) in got.iter().zip(state.iter().chain(&state)) {
                assert!(got == data, "{what}: tensor {name}");
            }
        }
    }
    // And what is damaged is found, wherever in a chunk.
    let small = OpenOptions { chunk_bytes: 4096, staging_bytes: 3 * 4096, ..options() };
    let store = Store::open(&region.path, &small).expect("open");
    let record = store.checkpoints().expect("list")[0].record.clone();
    let slot = store.region().layout().slot_offset(record.slot);
    let file = fs::OpenOptions::new().read(true).write(true).open(&region.path).expect("open");
    for at in [slot + 4096, slot + (1 << 20) + 5000, slot + (2 << 20) - 1] {
        let mut byte = [0];
        file.read_exact_at(&mut byte, at).expect("read");
        file.write_all_at(&[byte[0] ^ 4], at).expect("damage");
        let error = store.open_checkpoint(Select::Newest, true).map(drop).expect_err("damaged");
        assert_eq!(error.kind(), ErrorKind::Corrupt, "{error}");
        file.write_all_at(&byte, at).expect("repair");
    }
    store.open_checkpoint(Select::Newest, true).expect("whole again");
}

/// Both control blocks were lost, and with them the ceiling; growing once began a new one at 1.
#[test]
fn growing_a_region_without_control_blocks_uses_no_generation_twice() {
    let region = region_in(disk(), &format());
    let store = Store::open(&region.path, &options()).expect("open");
    save_one(&store, 1, &[1; 1000], &[]).expect("save").wait_durable(WAIT).expect("durable");
    let mut used = 0;
    for step in 2..20 {
        let raw = store.begin_raw(step, 1000, &[], WAIT).expect("begin");
        used = raw.generation();
        drop(raw);
        store.drain(WAIT).expect("drain");
    }
    drop(store);
    let file = fs::OpenOptions::new().write(true).open(&region.path).expect("open");
    for offset in CONTROL_OFFSETS {
        file.write_all_at(&[0; BLOCK_BYTES as usize], offset).expect("damage");
    }
    assert!(grow_region(&region.path, 5, 200_000, None).expect("grow").is_empty(), "all could be read");
    let store = Store::open(&region.path, &options()).expect("open");
    let next = store.begin_raw(100, 1000, &[], WAIT).expect("begin").generation();
    assert!(next > used, "generation {next} after {used}");
    store.open_checkpoint(Select::Step(1), true).expect("still there");
}

/// A group that shares a region lost it to whoever grew it.
#[test]
fn growing_keeps_the_mode_and_the_owner_of_the_file() {
    let region = region_in(disk(), &format());
    fs::set_permissions(&region.path, fs::Permissions::from_mode(0o640)).expect("chmod");
    let found = fs::metadata(&region.path).expect("stat");
    // Only root can give a file away; others check the mode alone.
    let other = (found.uid() == 0).then_some(12_345);
    if let Some(other) = other {
        std::os::unix::fs::chown(&region.path, Some(other), Some(other)).expect("chown");
    }
    grow_region(&region.path, 5, 200_000, None).expect("grow");
    let grown = fs::metadata(&region.path).expect("stat");
    assert_eq!(grown.mode() & 0o7777, 0o640);
    assert_eq!(grown.uid(), other.unwrap_or(found.uid()));
    assert_eq!(grown.gid(), other.unwrap_or(found.gid()));
}

/// A save whose flush hangs once made abandoning its step hang, too.
#[cfg(feature = "sim")]
#[test]
fn abandoning_a_step_waits_no_longer_than_it_was_told() {
    use pccheck::medium::sim::{SimMedium, SimModel};
    use pccheck::medium::Barrier;
    use pccheck::save::Faults;
    use std::sync::Arc;

    let sim = Arc::new(SimMedium::new(4 * (2 << 20), SimModel::Ssd { torn: false }));
    pccheck::store::format_medium(&*sim, &FormatOptions::new(3, 200_000)).expect("format");
    let store = Store::open_on(sim.clone(), &options(), Faults::default()).expect("open");
    save_one(&store, 1, &[1; 1000], &[]).expect("save").wait_durable(WAIT).expect("durable");
    let hold = sim.hold(|attempt| attempt.barrier == Some(Barrier::Payload));
    let save = save_one(&store, 2, &[2; 1000], &[]).expect("save");
    assert!(sim.wait_held(hold, 1, Duration::from_secs(60)), "never flushed");
    let error = store.abandon(0, 2, Some(Duration::from_millis(20))).expect_err("it cannot have ended");
    assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");
    sim.release(hold);
    let committed = save.wait_durable(WAIT).is_ok();
    assert_eq!(store.abandon(0, 2, WAIT).expect("abandon"), u32::from(committed));
    let steps: Vec<u64> = store.checkpoints().expect("list").iter().map(|info| info.record.step).collect();
    assert_eq!(steps.iter().filter(|&&step| step == 2).count(), 0, "{steps:?}");
}

/// A raw save's size could only be guessed before: its header is the format's business.
#[test]
fn the_size_of_a_raw_save_is_told_before_there_is_a_region() {
    let value = "v".repeat(5000);
    for (bytes, metadata) in [(0, vec![]), (5000, vec![]), (5000, vec![("key", value.as_str())])] {
        let told = Store::raw_payload_bytes(bytes, &metadata).expect("size");
        let region =
            region_in(disk(), &FormatOptions { medium: Requested::Mmap, ..FormatOptions::new(3, told) });
        let store = Store::open(&region.path, &options()).expect("open");
        let mut raw = store.begin_raw(1, bytes, &metadata, WAIT).expect("begin");
        raw.write_at(0, &vec![7; bytes as usize]).expect("write");
        raw.commit().expect("commit").wait_durable(WAIT).expect("durable");
        assert_eq!(store.checkpoints().expect("list")[0].record.payload_bytes, told);
    }
}
