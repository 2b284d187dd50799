//! The region's file, or the state's memory, goes away under the engine.

use std::fs::{self, OpenOptions as FileOptions};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::mpsc::channel;
use std::time::Duration;

use pccheck::engine::{format_region, Select, Store, TensorAt};
use pccheck::format::Dtype;
use pccheck::save::Save;
use pccheck::{ErrorKind, Result};

use super::bed::{
    assert_says, assert_settled, begin, format, restored_step, save, seen_by_a_reader, Bed, Way, STATE_BYTES,
    WAIT,
};
use super::common::scratch;
use super::disk::Call;

/// A region on a real disk with a checkpoint of step 1; the folder goes with the test.
fn region(way: Way) -> (tempfile::TempDir, PathBuf, Store) {
    let folder = scratch();
    let path = folder.path().join("region");
    format_region(&path, &format()).expect("format");
    let store = Store::open(&path, &way.options()).expect("open");
    save(&store, 1).expect("the first save");
    (folder, path, store)
}

fn set_len(path: &Path, bytes: u64) {
    FileOptions::new().write(true).open(path).and_then(|file| file.set_len(bytes)).expect("cut the file");
}

#[test]
fn a_file_that_is_cut_short_is_said_to_be_before_anything_is_saved_into_it() {
    for way in Way::ALL {
        let (_folder, path, store) = region(way);
        let whole = fs::metadata(&path).expect("stat").len();
        let mut raw = store.begin_raw(2, STATE_BYTES as u64, &[], WAIT).expect("begin");
        raw.write_at(0, &[7; 100_000]).expect("write");
        // Step 1 is in the first slot, what is in flight in a later one.
        set_len(&path, store.region().layout().slot_offset(1));
        let error = begin(&store, 3).err().expect("the file is short");
        assert_says(&error, ErrorKind::Io, None, &path);
        assert!(error.to_string().contains("cut short") && error.advice().is_some(), "{error}");
        // In flight: refused where it would store beyond the end, at the latest before its record is written.
        let rest = raw.write_at(100_000, &vec![7; STATE_BYTES - 100_000]).and_then(|()| raw.commit());
        let error = rest.and_then(|save| save.wait_durable(WAIT)).expect_err("the file is short");
        assert_says(&error, ErrorKind::Io, None, &path);
        assert_eq!(restored_step(&store).expect("restore"), 1, "{way:?}");
        assert_settled(&store, 0);
        // Whole again: so is the store.
        set_len(&path, whole);
        save(&store, 4).expect("save");
        drop(store);
        assert_eq!(seen_by_a_reader(&path, way), 4);
    }
}

/// By nothing, and by another region.
#[test]
fn a_file_that_is_deleted_or_replaced_takes_no_more_saves() {
    for way in Way::ALL {
        for replaced in [false, true] {
            let (folder, path, store) = region(way);
            let mut raw = store.begin_raw(2, 10_000, &[], WAIT).expect("begin");
            match replaced {
                true => {
                    let other = folder.path().join("other");
                    format_region(&other, &format()).expect("format");
                    fs::rename(&other, &path).expect("replace");
                }
                false => fs::remove_file(&path).expect("remove"),
            }
            let error = begin(&store, 3).err().expect("nobody would find it");
            assert_says(&error, ErrorKind::Io, None, &path);
            assert!(error.to_string().contains("deleted or replaced") && error.advice().is_some(), "{error}");
            let rest = raw.write_at(0, &[7; 10_000]).and_then(|()| raw.commit());
            let error = rest.and_then(|save| save.wait_durable(WAIT)).expect_err("nobody would find it");
            assert_says(&error, ErrorKind::Io, None, &path);
            assert_eq!(restored_step(&store).expect("what is open can be read"), 1, "{way:?}");
            drop(store);
            assert_eq!(path.exists(), replaced, "closing leaves alone what is there now");
            if replaced {
                let store = Store::open(&path, &way.options()).expect("open");
                assert!(store.checkpoints().expect("list").is_empty());
                save(&store, 4).expect("save");
            }
        }
    }
}

/// Moving the file is not losing it.
#[test]
fn a_file_that_is_moved_takes_saves_as_before() {
    for way in Way::ALL {
        let (folder, path, store) = region(way);
        let moved = folder.path().join("moved");
        fs::rename(&path, &moved).expect("move");
        save(&store, 2).expect("save");
        drop(store);
        assert_eq!(seen_by_a_reader(&moved, way), 2);
    }
}

/// Memory that the test takes from the save.
struct Lent {
    start: *mut u8,
    bytes: usize,
}

impl Lent {
    fn new(bytes: usize) -> Lent {
        // Far below where the kernel puts what asks for no address, so that nothing of another test's
        // thread is mapped there once it is gone.
        static NEXT: AtomicUsize = AtomicUsize::new(0x2000_0000_0000);
        let wanted = NEXT.fetch_add(1 << 30, Ordering::Relaxed);
        let (protection, flags) =
            (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a new mapping; one that is there already is kept.
        let start = unsafe {
            libc::mmap(
                wanted as *mut libc::c_void,
                bytes,
                protection,
                flags | libc::MAP_FIXED_NOREPLACE,
                -1,
                0,
            )
        };
        assert_eq!(start as usize, wanted, "{}", std::io::Error::last_os_error());
        Lent { start: start.cast(), bytes }
    }

    fn take(&self) {
        // SAFETY: mapped by `new`; whoever reads it from now on is what is tested.
        assert_eq!(unsafe { libc::munmap(self.start.cast(), self.bytes) }, 0);
    }

    fn begin(&self, store: &Store, step: u64) -> Result<Save> {
        let tensor = TensorAt {
            name: "w",
            dtype: Dtype::U8,
            shape: &[self.bytes as u64],
            ptr: self.start,
            bytes: self.bytes as u64,
            device: None,
        };
        // SAFETY: broken on purpose: the engine is to notice.
        unsafe { store.begin_save(step, &[tensor], &[], WAIT) }
    }
}

fn assert_notices(save: Result<Save>, context: &str) {
    let error = save.and_then(|save| save.wait_durable(WAIT)).expect_err(context);
    assert_eq!(error.kind(), ErrorKind::InvalidArgument, "{context}: {error}");
    assert!(error.to_string().contains("not mapped") && error.advice().is_some(), "{context}: {error}");
}

#[test]
fn memory_that_is_gone_at_begin_fails_the_save_and_not_the_trainer() {
    for way in Way::ALL {
        // Gathered by ordinary copies, and streamed.
        for bytes in [4096, STATE_BYTES] {
            let (_folder, path, store) = region(way);
            let lent = Lent::new(bytes);
            lent.take();
            assert_notices(lent.begin(&store, 2), &format!("{way:?}, {bytes} bytes"));
            assert_settled(&store, 0);
            assert_eq!(restored_step(&store).expect("restore"), 1);
            save(&store, 3).expect("save");
            assert_eq!(seen_by_a_reader(&path, way), 3);
        }
    }
}

/// Also where the bytes are only looked at, as they are likely to lie in their place already.
#[test]
fn memory_that_is_gone_is_noticed_where_nothing_has_changed() {
    let (_folder, path, store) = region(Way::Threads);
    let lent = Lent::new(STATE_BYTES);
    for step in 2..12 {
        lent.begin(&store, step).and_then(|save| save.wait_durable(WAIT)).expect("save");
    }
    assert!(store.stats().unchanged_bytes > 0, "chunks are looked at");
    lent.take();
    assert_notices(lent.begin(&store, 20), "unchanged");
    assert_settled(&store, 0);
    let newest = store.checkpoints().expect("list")[0].record.step;
    assert_eq!(newest, 11, "the checkpoint before stays");
    store.open_checkpoint(Select::Newest, true).expect("it verifies");
    save(&store, 21).expect("save");
    assert_eq!(seen_by_a_reader(&path, Way::Threads), 21);
}

/// In mid-copy: the pool is full, and the disk does not answer until the memory is gone.
#[test]
fn memory_that_is_taken_in_mid_copy_fails_the_save_and_not_the_trainer() {
    for way in [Way::Uring, Way::Threads] {
        let bed = Bed::new(way);
        let (release, held) = channel::<()>();
        let held = std::sync::Mutex::new(held);
        bed.disk.fail(move |call, bytes| {
            if call == Call::Write && bytes > 4096 {
                // Ends at once when the other side is gone.
                let _ = held.lock().expect("lock").recv();
            }
            None
        });
        let lent = Lent::new(2 * STATE_BYTES - 8192);
        let save = lent.begin(bed.store(), 2).expect("begin");
        let error =
            save.wait_copied(Some(Duration::from_millis(100))).expect_err("the pool holds half of it");
        assert_eq!(error.kind(), ErrorKind::TimedOut, "{error}");
        lent.take();
        drop(release);
        assert_notices(Ok(save), "mid-copy");
        assert_settled(bed.store(), 0);
        assert_eq!(restored_step(bed.store()).expect("restore"), 1, "{way:?}");
        bed.assert_as_good_as_new(10);
    }
}
