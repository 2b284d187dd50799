//! Prevents: defects that were found in how regions are formatted, locked, grown and read, each told by its test.

mod common;

use std::fs;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use common::{disk, region_in, scratch};
use pccheck::engine::{format_region, Store};
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
