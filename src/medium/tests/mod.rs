//! Prevents: a medium or backend that loses, repeats or misplaces an operation, and silent use of less than was asked
//! for.

use std::fs;
use std::os::fd::AsRawFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use super::threads::ThreadEngine;
use super::uring::UringEngine;
use super::*;
use crate::format::{Label, StripeLayout, Uuid, LABEL_AREA_BYTES};
use crate::staging::StagingPool;
use crate::sync::{thread, Condvar, Mutex};

mod process;
#[expect(unsafe_code, reason = "rlimits, capabilities and seccomp are system calls")]
mod refusals;

const BLOCK: usize = BLOCK_BYTES as usize;
const BUFFER: usize = 64 << 10;
const REGION: u64 = 4 << 20;
const PATIENCE: Duration = Duration::from_secs(60);

fn on_disk() -> tempfile::TempDir {
    // Not /tmp, which may be in memory.
    let place = std::env::var("PCC_TEST_DISK");
    tempfile::tempdir_in(place.as_deref().unwrap_or(env!("CARGO_MANIFEST_DIR"))).unwrap()
}

/// Whether [`on_disk`] is on persistent memory, mounted with DAX: then that must work.
fn disk_is_dax() -> bool {
    std::env::var_os("PCC_TEST_DAX").is_some()
}

fn in_memory() -> tempfile::TempDir {
    tempfile::tempdir_in("/dev/shm").unwrap()
}

fn region(directory: &tempfile::TempDir) -> PathBuf {
    let path = directory.path().join("region");
    create_file(&path, REGION, None).unwrap();
    path
}

fn pool() -> Arc<StagingPool> {
    StagingPool::new(16 * BUFFER as u64, BUFFER, &Default::default()).unwrap()
}

fn options(kind: Requested, backend: IoBackend) -> MediumOptions {
    MediumOptions { kind, backend, required: Durability::Process, ..MediumOptions::default() }
}

/// As long as [`region`], over two members. Buffers fill a unit; those that start elsewhere straddle two.
fn striped_region(directory: &tempfile::TempDir) -> PathBuf {
    let stripe = StripeLayout::new(2, BUFFER as u64, REGION).unwrap();
    let paths = [0, 1].map(|index| directory.path().join(format!("member{index}")));
    for (path, index) in paths.iter().zip(0..) {
        let label = Label {
            set: Uuid([9; 16]),
            index,
            sequence: 1,
            stripe,
            data_offset: LABEL_AREA_BYTES,
            created_unix_ns: 0,
            paths: paths.iter().map(|path| path.to_str().unwrap().into()).collect(),
        };
        create_file(path, LABEL_AREA_BYTES + stripe.member_bytes, None).unwrap();
        let medium = open_medium(path, &options(Requested::Mmap, IoBackend::Auto), None).unwrap();
        write_label(&*medium, &label).unwrap();
    }
    let [first, _] = paths;
    first
}

/// Every medium and backend that this machine can have, on a disk and in memory, by itself and in stripes.
fn for_each_medium(queue_depth: usize, check: impl Fn(&str, Arc<dyn Medium>, &Arc<StagingPool>)) {
    let (disk, memory) = (on_disk(), in_memory());
    for path in [region(&disk), region(&memory), striped_region(&disk), striped_region(&memory)] {
        let pool = pool();
        let mut ways = vec![
            (Requested::Mmap, IoBackend::Auto, false),
            (Requested::Direct, IoBackend::Uring, true),
            (Requested::Direct, IoBackend::Uring, false),
            (Requested::Direct, IoBackend::Threads, false),
        ];
        if disk_is_dax() && path.starts_with(disk.path()) {
            ways.push((Requested::Dax, IoBackend::Auto, false));
        }
        for (kind, backend, registered) in ways {
            // A medium that a completion dropped gives its lock up on the thread of that completion, a little later.
            let lock_wait = PATIENCE;
            let options = MediumOptions { queue_depth, lock_wait, ..options(kind, backend) };
            let medium = match open_medium(&path, &options, registered.then_some(&pool)) {
                // tmpfs learnt O_DIRECT in Linux 6.6.
                Err(error) if error.kind() == ErrorKind::Unsupported && path.starts_with(memory.path()) => {
                    assert_eq!(kind, Requested::Direct, "{error}");
                    continue;
                }
                opened => opened.unwrap(),
            };
            let what = format!("{} {:?}", path.display(), medium.info());
            check(&what, medium, &pool);
        }
    }
}

/// Collects completions.
#[derive(Default)]
struct Tally {
    finished: Mutex<Vec<(u64, StagingBuffer, Result<()>)>>,
    changed: Condvar,
}

impl IoSink for Tally {
    fn finished(&self, token: u64, buffer: StagingBuffer, result: Result<()>) {
        self.finished.lock().push((token, buffer, result));
        self.changed.notify_all();
    }
}

impl Tally {
    /// Waits for `count` completions and takes them, in order of their tokens.
    fn take(&self, count: usize) -> Vec<(u64, StagingBuffer, Result<()>)> {
        let deadline = Instant::now() + PATIENCE;
        let mut finished = self.finished.lock();
        while finished.len() < count {
            assert!(Instant::now() < deadline, "{} of {count} operations finished", finished.len());
            finished = self.changed.wait_until(finished, Some(Instant::now() + Duration::from_millis(100))).0;
        }
        let mut taken = std::mem::take(&mut *finished);
        taken.sort_by_key(|(token, ..)| *token);
        taken
    }
}

fn io(op: IoOp, offset: u64, len: usize, buffer: StagingBuffer, token: u64, sink: &Arc<Tally>) -> Io {
    Io { op, offset, len, buffer, token, sink: sink.clone() }
}

fn pattern(seed: usize, len: usize) -> Vec<u8> {
    (0..len).map(|i| (i.wrapping_mul(131) ^ (i >> 9) ^ seed.wrapping_mul(37)) as u8).collect()
}

#[test]
fn blocking_round_trips_at_every_alignment() {
    for_each_medium(8, |what, medium, _pool| {
        let source = pattern(1, 3 * (1 << 20) + 1);
        // Odd memory address, whole blocks, more than one bounce buffer.
        medium.copy(BLOCK_BYTES, &source[1..1 + (2 << 20) + BLOCK]).unwrap();
        medium.fence(Barrier::Payload).unwrap();
        medium.persist(0, REGION, Barrier::Payload).unwrap();
        for (offset, len) in
            [(0, 1), (1, 4095), (4095, 2), (100, (2 << 20) + 3), ((1 << 20) - 1, (1 << 20) + 7)]
        {
            let mut got = vec![0xee; len];
            medium.read(BLOCK_BYTES + offset as u64, &mut got).unwrap();
            assert!(got == source[1 + offset..1 + offset + len], "{what}: {len} bytes from {offset}");
        }
        let mut last = [0u8; 3];
        medium.read(REGION - 3, &mut last).unwrap();
        let block = pattern(9, BLOCK + 1);
        medium.write_durable(REGION - BLOCK_BYTES, &block[1..], Barrier::Commit).unwrap();
        let mut got = vec![0; BLOCK];
        medium.read(REGION - BLOCK_BYTES, &mut got).unwrap();
        assert!(got == block[1..], "{what}: durable block");
    });
}

#[test]
fn contract_violations_are_errors_and_reach_the_sink() {
    for_each_medium(8, |what, medium, pool| {
        let sink = Arc::new(Tally::default());
        let bad = [
            (REGION, BLOCK),
            (REGION - BLOCK_BYTES, 2 * BLOCK),
            (u64::MAX - 4095, BLOCK),
            (1, BLOCK),
            (0, 100),
            (0, 0),
            (0, BUFFER + BLOCK),
        ];
        for (offset, len) in bad {
            for op in [IoOp::Copy, IoOp::Read] {
                medium.start(io(op, offset, len, pool.acquire(None).unwrap(), 7, &sink));
                let (token, _, result) = sink.take(1).pop().unwrap();
                let error = result.expect_err(what);
                assert_eq!(
                    (token, error.kind()),
                    (7, ErrorKind::InvalidArgument),
                    "{what}: {offset}+{len}: {error}"
                );
            }
        }
        assert_eq!(medium.read(REGION, &mut [0]).unwrap_err().kind(), ErrorKind::InvalidArgument, "{what}");
        assert_eq!(
            medium.copy(REGION, &[0; BLOCK]).unwrap_err().kind(),
            ErrorKind::InvalidArgument,
            "{what}"
        );
        assert!(medium.persist(0, REGION + 1, Barrier::Payload).is_err(), "{what}");
    });
}

#[test]
fn concurrent_operations_complete_exactly_once_and_in_place() {
    const THREADS: usize = 4;
    const EACH: usize = 40;
    // A depth below the number of buffers, so that operations also wait in the backlog.
    for_each_medium(3, |what, medium, pool| {
        let sink = Arc::new(Tokens::default());
        let place = |n: usize| ((n * 7 % (THREADS * EACH)) * 4 * BLOCK) as u64;
        let length = |n: usize| (1 + n % 4) * BLOCK;
        thread::scope(|scope| {
            for first in 0..THREADS {
                let (medium, sink) = (&medium, &sink);
                scope.spawn(move || {
                    for n in (first..THREADS * EACH).step_by(THREADS) {
                        let mut buffer = pool.acquire(None).unwrap();
                        buffer[..length(n)].copy_from_slice(&pattern(n, length(n)));
                        medium.start(Io {
                            op: IoOp::Copy,
                            offset: place(n),
                            len: length(n),
                            buffer,
                            token: n as u64,
                            sink: sink.clone(),
                        });
                    }
                });
            }
        });
        let deadline = Instant::now() + PATIENCE;
        while sink.0.lock().len() < THREADS * EACH && Instant::now() < deadline {
            thread::sleep(Duration::from_millis(1));
        }
        thread::sleep(Duration::from_millis(5));
        let mut tokens = sink.0.lock().clone();
        tokens.sort_unstable();
        assert_eq!(tokens, (0..(THREADS * EACH) as u64).collect::<Vec<_>>(), "{what}");
        let tally = Arc::new(Tally::default());
        for n in 0..THREADS * EACH {
            medium.start(io(IoOp::Read, place(n), length(n), pool.acquire(None).unwrap(), n as u64, &tally));
            let (_, buffer, result) = tally.take(1).pop().unwrap();
            result.unwrap();
            assert!(buffer[..length(n)] == pattern(n, length(n)), "{what}: operation {n}");
        }
    });
}

/// Keeps the token of each successful completion and gives the buffer back.
#[derive(Default)]
struct Tokens(Mutex<Vec<u64>>);

impl IoSink for Tokens {
    fn finished(&self, token: u64, buffer: StagingBuffer, result: Result<()>) {
        result.unwrap();
        self.0.lock().push(token);
        drop(buffer);
    }
}

#[test]
fn closing_waits_for_everything_that_was_started() {
    for_each_medium(2, |what, medium, pool| {
        let sink = Arc::new(Tally::default());
        for token in 0..12 {
            let buffer = pool.acquire(None).unwrap();
            medium.start(io(IoOp::Copy, token * BUFFER as u64, BUFFER, buffer, token, &sink));
        }
        drop(medium);
        let finished = sink.finished.lock();
        assert_eq!(finished.len(), 12, "{what}");
        assert!(finished.iter().all(|(.., result)| result.is_ok()), "{what}");
    });
}

/// A sink that owns the medium, as a save's pipeline may.
struct Owner(Mutex<Option<Arc<dyn Medium>>>, Arc<Tally>);

impl IoSink for Owner {
    fn finished(&self, token: u64, buffer: StagingBuffer, result: Result<()>) {
        let medium = self.0.lock().take();
        drop(medium);
        self.1.finished(token, buffer, result);
    }
}

#[test]
fn a_sink_may_drop_the_last_handle_of_the_medium() {
    for_each_medium(2, |_what, medium, pool| {
        let tally = Arc::new(Tally::default());
        let weak = Arc::downgrade(&medium);
        let sink = Arc::new(Owner(Mutex::new(Some(medium.clone())), tally.clone()));
        let buffer = pool.acquire(None).unwrap();
        medium.start(Io { op: IoOp::Copy, offset: 0, len: BLOCK, buffer, token: 0, sink });
        drop(medium);
        tally.take(1).pop().unwrap().2.unwrap();
        let deadline = Instant::now() + PATIENCE;
        while weak.strong_count() > 0 {
            assert!(Instant::now() < deadline, "the medium was never dropped");
            thread::yield_now();
        }
    });
}

#[test]
fn device_errors_reach_the_sink_of_the_operation() {
    let directory = on_disk();
    let path = region(&directory);
    // Copying into a file that was opened for reading: the kernel refuses each write (the media check earlier).
    let file = Arc::new(RegionFile::open(&path, false, Duration::ZERO).unwrap());
    let pool = pool();
    let mut notes = Vec::new();
    let ring = UringEngine::new(file.clone(), Some(&pool), 2, &mut notes).unwrap();
    let threads = ThreadEngine::new(file.clone(), 2).unwrap();
    let engines: [(&str, &dyn Fn(Io)); 2] =
        [("ring", &|io| ring.start(io)), ("threads", &|io| threads.start(io))];
    for (name, start) in engines {
        let sink = Arc::new(Tally::default());
        for token in 0..8 {
            start(io(IoOp::Copy, 0, BLOCK, pool.acquire(None).unwrap(), token, &sink));
        }
        let finished = sink.take(8);
        assert_eq!(finished.len(), 8, "{name}");
        for (_, _, result) in finished {
            let error = result.expect_err(name);
            assert_eq!((error.kind(), error.errno()), (ErrorKind::Io, Some(libc::EBADF)), "{name}: {error}");
            assert_eq!(error.path(), Some(path.as_path()), "{name}");
        }
    }
    // /dev/full takes nothing.
    let full = fs::OpenOptions::new().write(true).open("/dev/full").unwrap();
    assert_eq!(super::io::write_all(full.as_raw_fd(), 0, &[1; 10]).unwrap_err().kind(), ErrorKind::NoSpace);
}

#[test]
fn a_region_cut_short_gives_errors_and_its_odd_tail_can_be_read() {
    for_each_medium(2, |what, medium, pool| {
        if medium.info().stripes.is_some() {
            // A member that is too short is refused when the region is opened.
            return;
        }
        let path = PathBuf::from(what.split(' ').next().unwrap());
        medium.copy(0, &pattern(3, 2 * BLOCK)).unwrap();
        let file = fs::OpenOptions::new().write(true).open(&path).unwrap();
        file.set_len(BLOCK_BYTES + 100).unwrap();
        let error = medium.read(BLOCK_BYTES, &mut [0; BLOCK]).expect_err(what);
        assert_eq!(error.kind(), ErrorKind::Io, "{what}: {error}");
        let sink = Arc::new(Tally::default());
        medium.start(io(IoOp::Read, 0, 4 * BLOCK, pool.acquire(None).unwrap(), 0, &sink));
        assert_eq!(sink.take(1).pop().unwrap().2.expect_err(what).kind(), ErrorKind::Io, "{what}");
        let kind = if medium.info().kind == MediumKind::Mmap { Requested::Mmap } else { Requested::Direct };
        drop(medium);
        let short =
            open_medium(&path, &MediumOptions { writable: false, ..options(kind, IoBackend::Auto) }, None);
        let short = short.unwrap();
        assert_eq!(short.len_bytes(), BLOCK_BYTES + 100);
        let mut tail = [0; 60];
        short.read(BLOCK_BYTES + 40, &mut tail).unwrap();
        assert_eq!(tail[..], pattern(3, 2 * BLOCK)[BLOCK + 40..BLOCK + 100], "{what}");
        assert!(short.read(BLOCK_BYTES + 41, &mut tail).is_err(), "{what}");
        file.set_len(REGION).unwrap();
    });
}

#[test]
fn what_was_asked_for_is_got_or_refused() {
    let (disk, memory) = (on_disk(), in_memory());
    let (on_disk, in_memory) = (region(&disk), region(&memory));
    let error = open_medium(&in_memory, &MediumOptions::default(), None).err().expect("power loss on tmpfs");
    assert_eq!(error.kind(), ErrorKind::Durability, "{error}");
    let medium = open_medium(&in_memory, &options(Requested::Auto, IoBackend::Auto), None).unwrap();
    assert_eq!((medium.info().kind, medium.info().durability), (MediumKind::Mmap, Durability::Process));
    let error = open_medium(&on_disk, &options(Requested::Dax, IoBackend::Auto), None).err();
    // A disk with MAP_SYNC would be persistent memory: then auto takes it too.
    let expected = match &error {
        Some(error) => {
            assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
            assert!(error.advice().is_some());
            MediumKind::Direct
        }
        None => MediumKind::Dax,
    };
    assert!(expected == MediumKind::Dax || !disk_is_dax(), "{error:?}");
    let auto = open_medium(&on_disk, &MediumOptions::default(), Some(&pool())).unwrap();
    assert_eq!((auto.info().kind, auto.info().durability), (expected, Durability::Power));
    drop(auto);
    let hinted = MediumOptions { preferred: Some(PreferredHint::Mmap), ..MediumOptions::default() };
    let kind = open_medium(&on_disk, &hinted, None).unwrap().info().kind;
    assert!(kind == MediumKind::Mmap || expected == MediumKind::Dax);
    assert_eq!(
        open_medium(Path::new("/dev/null"), &hinted, None).err().unwrap().kind(),
        ErrorKind::Unsupported
    );
    let link = disk.path().join("link");
    std::os::unix::fs::symlink(&on_disk, &link).unwrap();
    assert_eq!(open_medium(&link, &hinted, None).err().unwrap().kind(), ErrorKind::InvalidArgument);
    let missing = open_medium(&disk.path().join("none"), &hinted, None).err().unwrap();
    assert_eq!(missing.kind(), ErrorKind::NotFound);
}

#[test]
fn created_files_have_their_space_and_failures_leave_nothing() {
    use std::os::unix::fs::MetadataExt;
    let directory = on_disk();
    let path = directory.path().join("new");
    let mut seen = Vec::new();
    create_file(&path, 9 << 20, Some(&mut |done, total| seen.push((done, total)))).unwrap();
    assert_eq!(seen.last(), Some(&(9 << 20, 9 << 20)));
    let found = fs::metadata(&path).unwrap();
    assert_eq!((found.len(), found.mode() & 0o777), (9 << 20, 0o600));
    assert!(found.blocks() * 512 >= 9 << 20, "only {} sectors are allocated", found.blocks());
    assert_eq!(create_file(&path, 4096, None).unwrap_err().kind(), ErrorKind::AlreadyExists);
    assert_eq!(fs::metadata(&path).unwrap().len(), 9 << 20);

    let huge = directory.path().join("huge");
    let error = create_file(&huge, 1 << 42, None).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::NoSpace, "{error}");
    assert!(error.message().contains("4398046511104") && error.message().contains("available"), "{error}");
    assert!(!huge.exists(), "left behind");
    for bytes in [0, 1, 4095, u64::MAX - 4095] {
        assert_eq!(create_file(&huge, bytes, None).unwrap_err().kind(), ErrorKind::InvalidArgument);
    }
}

#[test]
fn measuring_works_beside_the_lock_that_its_caller_holds() {
    let directory = on_disk();
    let path = region(&directory);
    let _held = RegionFile::open(&path, true, Duration::ZERO).unwrap();
    let measured = measure_preferred(&path, 2 << 20, 2 << 20).unwrap();
    assert!(measured.direct_bytes_per_s > 0.0 && measured.mmap_bytes_per_s > 0.0, "{measured:?}");
    let direct_won = measured.direct_bytes_per_s >= measured.mmap_bytes_per_s;
    assert_eq!(measured.preferred == PreferredHint::Direct, direct_won, "{measured:?}");
    assert_eq!(fs::read(&path).unwrap()[..2 << 20], vec![0; 2 << 20], "wrote before the range");
    assert_eq!(measure_preferred(&path, 0, 100).unwrap_err().kind(), ErrorKind::InvalidArgument);
}
