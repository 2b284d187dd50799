//! Prevents: defects that were found in how regions are formatted, locked, grown and read, each told by its test.

mod common;

use std::fs;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use common::{disk, region_in, save_bytes, scratch, WAIT};
use pccheck::engine::{format_region, Select, Store};
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
        |len: usize, seed: usize| (0..len).map(|i| (i * 131 ^ i >> 9 ^ seed) as u8).collect::<Vec<u8>>();
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
