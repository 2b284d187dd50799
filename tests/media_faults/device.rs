//! The disk fails: each call of a save, a restore or an opening in turn.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::Arc;
use std::time::{Duration, Instant};

use pccheck::engine::{format_region, Select, Store};
use pccheck::{Error, ErrorKind, Result};

use super::bed::{
    assert_says, assert_settled, begin, format, restored_step, save, seen_by_a_reader, Bed, Way, SLOTS,
    STATE_BYTES, WAIT,
};
use super::disk::{Call, Disk, Trouble};

/// More calls of one kind than any history here makes.
const MANY: u64 = 200;
/// More calls than anybody should make of whom none gets anywhere. Not without an end, so that who never gives up is found.
const FOR_EVER: u64 = 20_000;

/// The `nth` of these calls meets trouble, and `more` after it. Returns the count of troubles.
fn trouble(disk: &Disk, call: Call, nth: u64, more: u64, trouble: Trouble) -> Arc<AtomicU64> {
    let met = Arc::new(AtomicU64::new(0));
    let (counter, mut seen) = (met.clone(), 0);
    disk.fail(move |called, _| {
        let picked = called == call && (nth..=nth.saturating_add(more)).contains(&seen);
        seen += u64::from(called == call);
        counter.fetch_add(u64::from(picked), Ordering::SeqCst);
        picked.then_some(trouble)
    });
    met
}

/// Saves step 2 while the `nth` call meets trouble; none where there are not so many calls.
fn save_in_trouble(bed: &Bed, call: Call, nth: u64, more: u64, kind: Trouble) -> Option<Result<()>> {
    let met = trouble(&bed.disk, call, nth, more, kind);
    let saved = save(bed.store(), 2).map(drop);
    bed.disk.stop_failing();
    (met.load(Ordering::SeqCst) > 0).then_some(saved)
}

/// A save that failed with nothing but itself lost.
fn assert_failed(bed: Bed, error: &Error, kinds: &[ErrorKind], errno: i32, context: &str) {
    assert!(kinds.contains(&error.kind()), "{context}: {error:?}, expected one of {kinds:?}");
    assert_says(error, error.kind(), Some(errno), &bed.path());
    let quarantined = u32::from(error.kind() == ErrorKind::DurabilityUnknown);
    assert_settled(bed.store(), quarantined);
    assert_eq!(restored_step(bed.store()).expect("restore"), 1, "{context}");
    assert_eq!(seen_by_a_reader(&bed.path(), bed.way), 1, "{context}");
    assert_eq!(bed.store().repair(WAIT).expect("repair"), quarantined, "{context}");
    bed.assert_as_good_as_new(10);
}

/// Every call of a kind fails in turn, once.
fn each_fails(ways: &[Way], call: Call, errno: i32, kinds: &[ErrorKind]) {
    for way in ways.iter().copied() {
        let mut hit = 0;
        for nth in 0..MANY {
            let bed = Bed::new(way);
            let context = format!("{way:?}, {call:?} {nth}, errno {errno}");
            match save_in_trouble(&bed, call, nth, 0, Trouble::Errno(errno)) {
                Some(Err(error)) => assert_failed(bed, &error, kinds, errno, &context),
                Some(Ok(())) => panic!("{context}: reported durable"),
                None => break,
            }
            hit += 1;
        }
        assert!((1..MANY).contains(&hit), "{way:?}: {hit} calls of {call:?} in a save");
        println!("{way:?}: each of {hit} calls of {call:?} failed with {errno}");
    }
}

#[test]
fn each_write_fails_in_turn_with_eio() {
    each_fails(&Way::ALL, Call::Write, libc::EIO, &[ErrorKind::Io, ErrorKind::DurabilityUnknown]);
}

#[test]
fn each_write_finds_the_device_full_in_turn() {
    each_fails(&Way::ALL, Call::Write, libc::ENOSPC, &[ErrorKind::NoSpace, ErrorKind::DurabilityUnknown]);
}

#[test]
fn each_flush_fails_in_turn() {
    each_fails(&Way::ALL, Call::Flush, libc::EIO, &[ErrorKind::DurabilityUnknown]);
}

/// Each flush of a save fails in turn beside another that is in flight: nobody knows whose writes were lost, so both fail,
/// although the flush of the other would succeed.
#[test]
fn a_flush_that_fails_fails_every_save_in_flight() {
    for way in Way::ALL {
        let mut hit = 0;
        for nth in 0..MANY {
            let bed = Bed::new(way);
            let mut raw = bed.store().begin_raw(2, STATE_BYTES as u64, &[], WAIT).expect("begin");
            let half = STATE_BYTES / 2;
            raw.write_at(0, &vec![7; half]).expect("write");
            until("its mark is durable", || raw.progress().is_some_and(|seen| seen.written_bytes > 0));
            let beside = save_in_trouble(&bed, Call::Flush, nth, 0, Trouble::Errno(libc::EIO));
            let rest = raw.write_at(half as u64, &vec![7; STATE_BYTES - half]).and_then(|()| raw.commit());
            let streamed = rest.and_then(|save| save.wait_durable(WAIT)).map(drop);
            let Some(beside) = beside else {
                streamed.expect("no flush failed");
                break;
            };
            for saved in [beside, streamed] {
                let error = saved.expect_err("its flush failed, or one beside it");
                assert_says(&error, ErrorKind::DurabilityUnknown, Some(libc::EIO), &bed.path());
            }
            drop(raw);
            assert_settled(bed.store(), 2);
            assert_eq!(restored_step(bed.store()).expect("restore"), 1, "{way:?}, flush {nth}");
            assert_eq!(seen_by_a_reader(&bed.path(), way), 1, "{way:?}, flush {nth}");
            assert_eq!(bed.store().repair(WAIT).expect("repair"), 2);
            bed.assert_as_good_as_new(10);
            hit += 1;
        }
        assert!((2..MANY).contains(&hit), "{way:?}: {hit} flushes in a save");
    }
}

fn until(what: &str, is_so: impl Fn() -> bool) {
    let deadline = Instant::now() + WAIT.expect("a time");
    while !is_so() {
        assert!(Instant::now() < deadline, "{what}: never");
        std::thread::yield_now();
    }
}

/// A write-back that was interrupted has lost its pages, which the kernel tells once: a flush that is asked for again would
/// succeed, and the save be called durable.
#[test]
fn write_backs_that_are_interrupted_have_failed() {
    for errno in [libc::EINTR, libc::EAGAIN] {
        each_fails(&[Way::Mmap], Call::Write, errno, &[ErrorKind::Io, ErrorKind::DurabilityUnknown]);
    }
}

/// What another process stored through its mapping is written back by the flush of an opening, also of one by O_DIRECT: that this
/// was given up is told once.
#[test]
fn an_opening_that_loses_what_another_left_in_the_cache_says_so() {
    for way in [Way::Uring, Way::Threads] {
        let mut bed = Bed::new(way);
        let last_slot = bed.store().region().layout().slot_offset(SLOTS - 1) as usize;
        bed.store = None;
        let file = std::fs::File::options().read(true).write(true).open(bed.path()).expect("open");
        let left = memmap2::MmapOptions::new().len(last_slot + 4096).map_raw(&file).expect("map");
        // SAFETY: within the mapping; nobody else has this slot.
        unsafe { left.as_mut_ptr().wrapping_add(last_slot).write_volatile(1) };
        let met = trouble(&bed.disk, Call::Write, 0, 0, Trouble::Errno(libc::EINTR));
        let error = Store::open(&bed.path(), &way.options()).err().expect("something was lost");
        assert_eq!(met.load(Ordering::SeqCst), 1, "{way:?}");
        assert_says(&error, ErrorKind::DurabilityUnknown, Some(libc::EINTR), &bed.path());
        drop((left, file));
        bed.store = Some(Store::open(&bed.path(), &way.options()).expect("told once"));
        assert_eq!(restored_step(bed.store()).expect("restore"), 1);
        bed.assert_as_good_as_new(10);
    }
}

/// Trouble that passes: the save becomes durable all the same.
fn each_passes(call: Call, more: u64, kind: Trouble) {
    // What the page cache writes back is the kernel's to do again.
    for way in [Way::Uring, Way::Threads] {
        let mut hit = 0;
        for nth in 0..MANY {
            let bed = Bed::new(way);
            let context = format!("{way:?}, {call:?} {nth} and {more} more, {kind:?}");
            match save_in_trouble(&bed, call, nth, more, kind) {
                Some(saved) => saved.unwrap_or_else(|error| panic!("{context}: {error}")),
                None => break,
            }
            assert_eq!(restored_step(bed.store()).expect("restore"), 2, "{context}");
            assert_eq!(seen_by_a_reader(&bed.path(), bed.way), 2, "{context}");
            bed.assert_as_good_as_new(10);
            hit += 1;
        }
        assert!((1..MANY).contains(&hit), "{way:?}: {hit} calls of {call:?} in a save");
    }
}

#[test]
fn writes_that_are_interrupted_are_made_again() {
    each_passes(Call::Write, 3, Trouble::Errno(libc::EINTR));
}

#[test]
fn writes_that_find_no_room_at_once_are_made_again() {
    each_passes(Call::Write, 3, Trouble::Errno(libc::EAGAIN));
}

#[test]
fn flushes_that_are_interrupted_are_made_again() {
    each_passes(Call::Flush, 3, Trouble::Errno(libc::EINTR));
}

#[test]
fn writes_that_end_early_are_gone_on_with() {
    for bytes in [4096, 5000, 12_288 + 1, 100] {
        each_passes(Call::Write, 0, Trouble::Short(bytes));
    }
}

#[test]
fn writes_that_always_end_early_are_gone_on_with() {
    for way in [Way::Uring, Way::Threads] {
        let bed = Bed::new(way);
        let met = trouble(&bed.disk, Call::Write, 0, u64::MAX, Trouble::Short(4096));
        save(bed.store(), 2).expect("block by block");
        assert!(met.load(Ordering::SeqCst) > 75, "one call for each block");
        assert_eq!(restored_step(bed.store()).expect("restore"), 2);
        bed.assert_as_good_as_new(10);
    }
}

/// The calls never get anywhere: the save fails with that, and nothing else is lost.
fn never_gets_on(way: Way, call: Call, kind: Trouble) {
    let bed = Bed::new(way);
    let context = format!("{way:?}, {call:?}, {kind:?}");
    let met = trouble(&bed.disk, call, 0, FOR_EVER, kind);
    let error = save(bed.store(), 2).expect_err(&context);
    bed.disk.stop_failing();
    assert!(met.load(Ordering::SeqCst) > 0, "{context}");
    match call {
        Call::Flush => assert_eq!(error.kind(), ErrorKind::DurabilityUnknown, "{context}: {error}"),
        _ => assert!(
            matches!(error.kind(), ErrorKind::Io | ErrorKind::DurabilityUnknown),
            "{context}: {error:?}"
        ),
    }
    if let Trouble::Errno(errno) = kind {
        assert_eq!(error.errno(), Some(errno), "{context}: {error}");
    }
    assert_says(&error, error.kind(), error.errno(), &bed.path());
    assert_settled(bed.store(), u32::from(error.kind() == ErrorKind::DurabilityUnknown));
    assert_eq!(restored_step(bed.store()).expect("restore"), 1, "{context}");
    bed.store().repair(WAIT).expect("repair");
    bed.assert_as_good_as_new(10);
}

#[test]
fn writes_that_never_get_on_fail_in_the_end() {
    let refused = [Trouble::Errno(libc::EINTR), Trouble::Errno(libc::EAGAIN)];
    for way in Way::ALL {
        refused.iter().for_each(|kind| never_gets_on(way, Call::Write, *kind));
    }
    // Behind the page cache, the kernel hides what came short.
    for way in [Way::Uring, Way::Threads] {
        [Trouble::Short(100), Trouble::Short(0)]
            .iter()
            .for_each(|kind| never_gets_on(way, Call::Write, *kind));
    }
}

#[test]
fn flushes_that_never_get_on_fail_in_the_end() {
    for way in Way::ALL {
        never_gets_on(way, Call::Flush, Trouble::Errno(libc::EINTR));
    }
}

#[test]
fn reads_that_never_get_on_fail_in_the_end() {
    for way in Way::ALL {
        let mut bed = Bed::new(way);
        forget_cached(&bed);
        let met = trouble(&bed.disk, Call::Read, 0, FOR_EVER, Trouble::Errno(libc::EINTR));
        let error = restored_step(bed.store()).expect_err("no read gets anywhere");
        assert_says(&error, error.kind(), error.errno(), &bed.path());
        assert!(met.load(Ordering::SeqCst) > 0, "{way:?}");
        bed.store = None;
        forget_cached(&bed);
        let met = trouble(&bed.disk, Call::Read, 0, FOR_EVER, Trouble::Errno(libc::EINTR));
        let error = Store::open(&bed.path(), &way.options()).err().expect("no read gets anywhere");
        assert_says(&error, error.kind(), error.errno(), &bed.path());
        let error = format_region(&bed.path(), &format()).expect_err("nobody knows what is there");
        assert_says(&error, error.kind(), error.errno(), &bed.path());
        assert!(met.load(Ordering::SeqCst) > 0, "{way:?}");
        bed.disk.stop_failing();
        bed.store = Some(Store::open(&bed.path(), &way.options()).expect("open"));
        assert_eq!(restored_step(bed.store()).expect("restore"), 1, "{way:?}");
        bed.assert_as_good_as_new(10);
    }
}

/// Each read of a restore fails in turn: the one before is taken, and it is said why.
#[test]
fn each_read_of_a_restore_fails_in_turn() {
    for way in Way::ALL {
        let (mut hit, mut passed_over) = (0, 0);
        for nth in 0..MANY {
            let bed = Bed::new(way);
            save(bed.store(), 2).expect("save");
            // A mapped region is read through the page cache, which would not ask the disk.
            forget_cached(&bed);
            // What it read ahead and did not get, it asks for again.
            let more = u64::from(way == Way::Mmap);
            let met = trouble(&bed.disk, Call::Read, nth, more, Trouble::Errno(libc::EIO));
            let opened = bed.store().open_checkpoint(Select::Newest, true);
            bed.disk.stop_failing();
            if met.load(Ordering::SeqCst) == 0 {
                break;
            }
            let opened = opened.unwrap_or_else(|error| panic!("{way:?}, read {nth}: {error}"));
            // Behind the cache some reads are made again, and some only ahead.
            if way != Way::Mmap || !opened.rejected.is_empty() {
                passed_over += 1;
                assert_eq!(opened.checkpoint.record().step, 1, "{way:?}, read {nth}");
                let (record, error) = &opened.rejected[0];
                assert_eq!(record.step, 2);
                assert_says(error, ErrorKind::Io, Some(libc::EIO), &bed.path());
            }
            drop(opened);
            forget_cached(&bed);
            assert_eq!(restored_step(bed.store()).expect("restore"), 2, "{way:?}: nothing was lost");
            assert_settled(bed.store(), 0);
            bed.assert_as_good_as_new(10);
            hit += 1;
        }
        assert!(passed_over > 0, "{way:?}: the newest was restored whatever failed");
        println!("{way:?}: of {hit} reads that failed, {passed_over} made it take the checkpoint before");
        assert!(
            (3..MANY).contains(&hit),
            "{way:?}: a restore reads table, header and chunks, found {hit} reads"
        );
    }
}

fn forget_cached(bed: &Bed) {
    let file = std::fs::File::open(bed.path()).expect("open");
    // SAFETY: touches no memory.
    let refused = unsafe {
        libc::posix_fadvise(std::os::fd::AsRawFd::as_raw_fd(&file), 0, 0, libc::POSIX_FADV_DONTNEED)
    };
    assert_eq!(refused, 0);
}

#[test]
fn reads_that_are_interrupted_or_end_early_are_gone_on_with() {
    let again = [Trouble::Errno(libc::EINTR), Trouble::Errno(libc::EAGAIN)];
    let short = [Trouble::Short(4096), Trouble::Short(5000)];
    // Behind the page cache a short answer is the file's end to the kernel; without it io_uring is not to be trusted.
    let cases = [
        (Way::Uring, Disk::behind_cache as fn(usize) -> Disk, &again[..]),
        (Way::Threads, Disk::synchronous, &again),
        (Way::Threads, Disk::synchronous, &short),
    ];
    for (way, disk, kinds) in cases {
        for kind in kinds.iter().copied() {
            let bed = Bed::on(disk, way);
            // Every other read, so that each gets on in between.
            let (met, mut turn) = (Arc::new(AtomicU64::new(0)), false);
            let counter = met.clone();
            bed.disk.fail(move |call, bytes| {
                turn = !turn && call == Call::Read;
                let ends_as_usual = matches!(kind, Trouble::Short(most) if bytes <= most);
                counter.fetch_add(u64::from(turn && !ends_as_usual), Ordering::SeqCst);
                turn.then_some(kind)
            });
            let step =
                restored_step(bed.store()).unwrap_or_else(|error| panic!("{way:?}, {kind:?}: {error}"));
            assert!(met.load(Ordering::SeqCst) > 0, "{way:?}, {kind:?}: no read met it");
            assert_eq!(step, 1);
            bed.assert_as_good_as_new(10);
        }
    }
}

/// Opening fails with an ordinary error, or works around what cannot be read, and destroys nothing.
#[test]
fn each_call_of_opening_fails_in_turn() {
    for way in Way::ALL {
        let mut failed = 0;
        for call in [Call::Read, Call::Write, Call::Flush] {
            for nth in 0..MANY {
                let mut bed = Bed::new(way);
                bed.store = None;
                forget_cached(&bed);
                let met = trouble(&bed.disk, call, nth, 0, Trouble::Errno(libc::EIO));
                let opened = Store::open(&bed.path(), &way.options());
                bed.disk.stop_failing();
                if met.load(Ordering::SeqCst) == 0 {
                    break;
                }
                match opened {
                    Ok(store) => drop(store),
                    Err(error) => {
                        failed += 1;
                        assert!(
                            matches!(error.kind(), ErrorKind::Io | ErrorKind::DurabilityUnknown),
                            "{error:?}"
                        );
                        assert_says(&error, error.kind(), Some(libc::EIO), &bed.path());
                    }
                }
                forget_cached(&bed);
                bed.store = Some(Store::open(&bed.path(), &way.options()).expect("open"));
                assert_eq!(restored_step(bed.store()).expect("restore"), 1, "{way:?}, {call:?} {nth}");
                bed.assert_as_good_as_new(10);
            }
        }
        assert!(failed > 0, "{way:?}: opening never minds");
    }
}

/// All fails: every save says so until none can be begun, what was saved before stays, and a repair by a disk that is well
/// again brings everything back.
#[test]
fn a_dead_disk_is_reported_until_it_is_repaired() {
    for way in Way::ALL {
        let bed = Bed::new(way);
        trouble(&bed.disk, Call::Flush, 0, u64::MAX, Trouble::Errno(libc::EIO));
        for step in 2..u64::from(SLOTS) + 1 {
            let error = save(bed.store(), step).expect_err("nothing can be flushed");
            assert_says(&error, ErrorKind::DurabilityUnknown, Some(libc::EIO), &bed.path());
        }
        assert_settled(bed.store(), SLOTS - 1);
        let brief = Some(Duration::from_millis(20));
        let error = bed.store().begin_raw(99, 1, &[], brief).err().expect("no slot is left");
        assert_eq!(error.kind(), ErrorKind::NoSlot, "{error}");
        let error = bed.store().repair(WAIT).expect_err("it is still dead");
        assert_says(&error, error.kind(), Some(libc::EIO), &bed.path());
        assert_eq!(restored_step(bed.store()).expect("restore"), 1);
        bed.disk.stop_failing();
        assert_eq!(bed.store().repair(WAIT).expect("repair"), SLOTS - 1);
        bed.assert_as_good_as_new(10);
    }
}

/// Of two saves in flight one meets a failing write: the other is not harmed.
#[test]
fn a_write_that_fails_harms_no_other_save() {
    for way in [Way::Uring, Way::Threads] {
        let bed = Bed::new(way);
        let mut chunks = 0;
        bed.disk.fail(move |call, bytes| {
            // Records are single blocks; a durable write of one that fails is a failed flush, which concerns both.
            chunks += u32::from(call == Call::Write && bytes > 4096);
            (chunks == 3).then(|| chunks += 1).map(|()| Trouble::Errno(libc::EIO))
        });
        let saves = [begin(bed.store(), 2), begin(bed.store(), 3)];
        let ended = saves.map(|save| save.and_then(|save| save.wait_durable(WAIT)));
        assert_eq!(ended.iter().filter(|ended| ended.is_err()).count(), 1, "{way:?}: {ended:?}");
        let good = 2 + ended.iter().position(|ended| ended.is_ok()).expect("one") as u64;
        assert_eq!(restored_step(bed.store()).expect("restore"), good);
        bed.store().repair(WAIT).expect("repair");
        bed.assert_as_good_as_new(10);
    }
}

/// Where a process serves the file system and asks for direct I/O, Linux repeats what io_uring got short at the wrong place:
/// left to choose, the engine does not go by it there.
#[test]
fn on_file_systems_that_a_process_serves_the_engine_goes_by_threads() {
    let bed = Bed::on(Disk::synchronous, Way::Auto);
    let info = bed.store().medium_info();
    assert_eq!(info.path, "pwrite", "{info:?}");
    assert!(info.notes.iter().any(|note| note.contains("FUSE")), "{info:?}");
    trouble(&bed.disk, Call::Write, 0, u64::MAX, Trouble::Short(4096));
    save(bed.store(), 2).expect("block by block");
    assert_eq!(restored_step(bed.store()).expect("restore"), 2);
    bed.assert_as_good_as_new(10);
}

/// Half-filled chunks of a stream that wait in the page cache: what it could not write back is not there any more when it has
/// dropped it. Hashing whatever came back would bless it.
#[test]
fn a_half_filled_chunk_that_the_page_cache_lost_fails_its_save() {
    let bed = Bed::new(Way::Mmap);
    let chunk_bytes = bed.store().region().options().chunk_bytes;
    let raw = bed.store().begin_raw(2, STATE_BYTES as u64, &[], WAIT).expect("begin");
    let piece = [7; 100];
    for at in (0..STATE_BYTES as u64 - 100).step_by(chunk_bytes as usize) {
        raw.write_at(at, &piece).expect("write");
    }
    let met = trouble(&bed.disk, Call::Write, 0, MANY, Trouble::Errno(libc::EIO));
    let file = std::fs::File::open(bed.path()).expect("open");
    file.sync_all().expect_err("cannot be written back");
    assert!(met.load(Ordering::SeqCst) > 0);
    bed.disk.stop_failing();
    forget_cached(&bed);
    let error = raw.write_at(100, &piece).expect_err("what was written before is lost");
    assert_says(&error, ErrorKind::Corrupt, None, &bed.path());
    drop(raw);
    assert_eq!(restored_step(bed.store()).expect("restore"), 1);
    // The region's own mapping hears of it at its next write-back.
    let error = save(bed.store(), 3).expect_err("pages were lost");
    assert_says(&error, ErrorKind::DurabilityUnknown, Some(libc::EIO), &bed.path());
    assert_settled(bed.store(), 1);
    assert_eq!(bed.store().repair(WAIT).expect("repair"), 1);
    bed.assert_as_good_as_new(10);
}
