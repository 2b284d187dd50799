//! What the kernel refuses, and clocks that go back.

use std::path::{Path, PathBuf};

use pccheck::engine::{format_region, Select, Store};
use pccheck::medium::{MediumKind, Requested};
use pccheck::store::{FormatOptions, OpenOptions};
use pccheck::{Error, ErrorKind};

use super::bed::{format, restored_step, save, seen_by_a_reader, state, Way};
use super::common::scratch;
use super::interposed::{refusing, set_clock_off_by_s, Refused};
use super::refusals::{alone, drop_capability_to_lock_memory, refuse_io_uring, LOCKABLE_BYTES};

/// More threads or mappings than anything here asks for.
const MANY: u32 = 100;

fn region() -> (tempfile::TempDir, PathBuf) {
    let folder = scratch();
    let path = folder.path().join("region");
    format_region(&path, &format()).expect("format");
    let store = Store::open(&path, &Way::Threads.options()).expect("open");
    save(&store, 1).expect("the first save");
    (folder, path)
}

/// What was saved last is there, whole, and two more saves succeed: of the store as it is, and of the next.
fn assert_saves(store: Store, path: &Path, way: Way, newest: u64) {
    assert_eq!(restored_step(&store).expect("restore"), newest);
    save(&store, newest + 1).expect("save");
    assert_eq!(restored_step(&store).expect("restore"), newest + 1);
    drop(store);
    let store = Store::open(path, &way.options()).expect("open again");
    assert_eq!(restored_step(&store).expect("restore"), newest + 1);
    save(&store, newest + 2).expect("save");
    drop(store);
    assert_eq!(seen_by_a_reader(path, way), newest + 2);
}

/// Each opening in which something is refused works, or says what is missing and leaves the region free. Returns what
/// was said.
fn each_refused_in_opening(way: Way, path: &Path, what: fn(u32) -> Refused) -> Vec<Error> {
    let (mut failed, mut newest) = (Vec::new(), 1);
    for nth in 0..MANY {
        let context = format!("{way:?}, {:?}", what(nth));
        let (opened, asked) = refusing(what(nth), || Store::open(path, &way.options()));
        match opened {
            Ok(store) if asked => {
                assert_eq!(restored_step(&store).expect("restore"), newest, "{context}");
                newest += 1;
                save(&store, newest).unwrap_or_else(|error| panic!("{context}: {error}"));
            }
            Ok(_) => return failed,
            Err(error) => {
                // A ring that was asked for by name cannot be had.
                let without_ring = way == Way::Uring && error.kind() == ErrorKind::Unsupported;
                assert!(without_ring || error.kind() == ErrorKind::OutOfMemory, "{context}: {error:?}");
                assert!(error.errno().is_some() || error.advice().is_some(), "{context}: {error}");
                failed.push(error);
            }
        }
        // Nothing is held, and nothing was done. Children that other tests fork have their descriptors for a moment.
        let options = OpenOptions { lock_wait: Some(std::time::Duration::from_secs(2)), ..way.options() };
        let store = Store::open(path, &options).unwrap_or_else(|error| panic!("{context}: {error}"));
        assert_eq!(restored_step(&store).expect("restore"), newest, "{context}");
        newest += 1;
        save(&store, newest).expect("save");
        drop(store);
        assert_eq!(seen_by_a_reader(path, way), newest, "{context}");
    }
    panic!("{way:?}: more than {MANY}");
}

#[test]
fn each_thread_that_is_refused_in_opening_is_told_or_done_without() {
    for way in Way::ALL {
        let (_folder, path) = region();
        let failed = each_refused_in_opening(way, &path, Refused::Thread);
        assert!(!failed.is_empty(), "{way:?}: no thread is needed");
    }
}

#[test]
fn each_mapping_that_is_refused_in_opening_is_told_or_done_without() {
    for way in Way::ALL {
        let (_folder, path) = region();
        let failed = each_refused_in_opening(way, &path, Refused::Mapping);
        let says = |what: &str| failed.iter().any(|error| error.to_string().contains(what));
        assert!(says("staging"), "{way:?}: {failed:?}");
        assert_eq!(says("map the region"), way == Way::Mmap, "{way:?}: {failed:?}");
    }
}

#[test]
fn a_staging_pool_that_cannot_be_had_is_told_with_its_size() {
    let (_folder, path) = region();
    let (opened, asked) = refusing(Refused::Mapping(0), || Store::open(&path, &Way::Threads.options()));
    let error = opened.err().expect("no pool");
    assert!(asked);
    assert_eq!(error.kind(), ErrorKind::OutOfMemory, "{error}");
    assert!(error.to_string().contains("393216") && error.advice().is_some(), "{error}");
    let store = Store::open(&path, &Way::Threads.options()).expect("open");
    assert_saves(store, &path, Way::Threads, 1);
}

/// A restore that gets fewer threads, or none, is slower or says so.
#[test]
fn threads_that_are_refused_to_a_restore_lose_nothing() {
    let (_folder, path) = region();
    let store = Store::open(&path, &OpenOptions { readers: 4, ..Way::Threads.options() }).expect("open");
    let mut newest = 1;
    let mut refused = 0;
    for nth in 0..8 {
        let (opened, asked) = refusing(Refused::Thread(nth), || {
            let opened = store.open_checkpoint(Select::Newest, true)?;
            opened.checkpoint.read_tensor("w")
        });
        refused += u32::from(asked);
        match opened {
            Ok(bytes) => assert!(bytes == state(newest), "thread {nth}"),
            Err(error) => assert_eq!(error.kind(), ErrorKind::OutOfMemory, "thread {nth}: {error}"),
        }
        assert_eq!(restored_step(&store).expect("restore"), newest, "thread {nth}");
        newest += 1;
        save(&store, newest).expect("save");
    }
    assert!(refused > 0, "a restore asks for no thread");
    assert_saves(store, &path, Way::Threads, newest);
}

#[test]
fn where_o_direct_is_refused_the_engine_maps_and_says_so() {
    let (_folder, path) = region();
    // Not what was faster when it was measured.
    format_region(&path, &FormatOptions { force: true, medium: Requested::Direct, ..format() })
        .expect("format");
    let auto = OpenOptions { medium: Requested::Auto, ..Way::Uring.options() };
    let (opened, asked) = refusing(Refused::DirectIo, || Store::open(&path, &auto));
    let store = opened.expect("another medium");
    assert!(asked);
    let info = store.medium_info();
    assert_eq!(info.kind, MediumKind::Mmap, "{info:?}");
    assert!(info.notes.iter().any(|note| note.contains("O_DIRECT")), "{info:?}");
    save(&store, 1).expect("save");
    assert_saves(store, &path, Way::Threads, 1);
    let (refused, _) = refusing(Refused::DirectIo, || Store::open(&path, &Way::Uring.options()));
    let error = refused.err().expect("it was asked for by name");
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
    assert!(error.advice().is_some_and(|advice| advice.contains("mmap")), "{error}");
    let store = Store::open(&path, &Way::Uring.options()).expect("open");
    assert_saves(store, &path, Way::Uring, 3);
}

#[test]
fn where_io_uring_is_refused_saves_go_by_threads() {
    alone("refused::where_io_uring_is_refused_saves_go_by_threads", || {
        let (_folder, path) = region();
        refuse_io_uring();
        let store = Store::open(&path, &Way::Auto.options()).expect("another way");
        let info = store.medium_info();
        assert_eq!((info.kind, info.path), (MediumKind::Direct, "pwrite"), "{info:?}");
        assert!(info.notes.iter().any(|note| note.contains("io_uring")), "{info:?}");
        assert_saves(store, &path, Way::Auto, 1);
        let error = Store::open(&path, &Way::Uring.options()).err().expect("it was asked for by name");
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
        let store = Store::open(&path, &Way::Threads.options()).expect("open");
        assert_saves(store, &path, Way::Threads, 3);
    });
}

#[test]
fn without_lockable_memory_saves_go_unregistered() {
    alone("refused::without_lockable_memory_saves_go_unregistered", || {
        let (_folder, path) = region();
        let options = OpenOptions { staging_bytes: 4 * LOCKABLE_BYTES, ..Way::Uring.options() };
        let registered = Store::open(&path, &options).expect("open").medium_info();
        assert!(!registered.notes.iter().any(|note| note.contains("locked memory")), "{registered:?}");
        drop_capability_to_lock_memory();
        let store = Store::open(&path, &options).expect("io_uring all the same");
        let info = store.medium_info();
        assert!(info.path.contains("io_uring"), "{info:?}");
        assert!(info.notes.iter().any(|note| note.contains("locked memory")), "{info:?}");
        assert_saves(store, &path, Way::Uring, 1);
    });
}

/// What is newest is decided by generations, which no clock makes.
#[test]
fn clocks_that_go_back_change_nothing() {
    const TEN_YEARS_S: i64 = 10 * 365 * 24 * 3600;
    let (_folder, path) = region();
    let time_of_newest = |store: &Store| store.checkpoints().expect("list")[0].record.unix_ns;
    let store = Store::open(&path, &Way::Threads.options()).expect("open");
    save(&store, 2).expect("save");
    let before = time_of_newest(&store);
    set_clock_off_by_s(-TEN_YEARS_S);
    save(&store, 3).expect("save");
    let after = time_of_newest(&store);
    assert!(after < before, "the clock went back: {before}, {after}");
    assert_eq!(restored_step(&store).expect("restore"), 3);
    drop(store);
    let store = Store::open(&path, &Way::Threads.options()).expect("open");
    assert_eq!(restored_step(&store).expect("restore"), 3, "recovery chooses by generation");
    // Before 1970 there is no time.
    set_clock_off_by_s(-10 * TEN_YEARS_S);
    save(&store, 4).expect("save");
    set_clock_off_by_s(0);
    save(&store, 5).expect("save");
    assert_eq!(restored_step(&store).expect("restore"), 5);
}
