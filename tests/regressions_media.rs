//! Prevents: defects that were found in how regions are formatted, locked, grown and read, each told by its test.

mod common;

use std::fs;
use std::os::unix::fs::FileExt;
use std::time::Duration;

use common::{disk, region_in, scratch, WAIT};
use pccheck::engine::{format_region, Store};
use pccheck::medium::{Durability, Requested};
use pccheck::store::{FormatOptions, OpenOptions};

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
