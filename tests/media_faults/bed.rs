//! A store on a disk that can fail, and what every fault must leave behind.

use std::path::{Path, PathBuf};
use std::time::Duration;

use pccheck::engine::{format_region, Select, Store};
use pccheck::medium::{IoBackend, Requested};
use pccheck::save::{Durable, Save};
use pccheck::store::{FormatOptions, OpenOptions};
use pccheck::{Error, ErrorKind, Result};

use super::common::{save_one, scratch_in};
use super::disk::Disk;

pub const WAIT: Option<Duration> = Some(Duration::from_secs(30));
pub const SLOTS: u32 = 4;
/// Several chunks, and an odd end.
pub const STATE_BYTES: usize = 300_001;
const CHUNK_BYTES: u64 = 64 << 10;

/// The ways from the engine to the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Way {
    Uring,
    Threads,
    Mmap,
    /// Direct, by what the engine chooses.
    Auto,
}

impl Way {
    /// Those that are chosen by name.
    pub const ALL: [Way; 3] = [Way::Uring, Way::Threads, Way::Mmap];

    pub fn options(self) -> OpenOptions {
        let (medium, backend) = match self {
            Way::Uring => (Requested::Direct, IoBackend::Uring),
            Way::Threads => (Requested::Direct, IoBackend::Threads),
            Way::Mmap => (Requested::Mmap, IoBackend::Auto),
            Way::Auto => (Requested::Direct, IoBackend::Auto),
        };
        OpenOptions {
            medium,
            backend,
            max_in_flight: 2,
            keep: 1,
            chunk_bytes: CHUNK_BYTES,
            staging_bytes: 6 * CHUNK_BYTES,
            writers: 2,
            readers: 1,
            ..OpenOptions::default()
        }
    }
}

pub fn format() -> FormatOptions {
    FormatOptions::new(SLOTS, 2 * STATE_BYTES as u64)
}

pub fn state(step: u64) -> Vec<u8> {
    (0..STATE_BYTES as u64)
        .map(|at| (at.wrapping_mul(37) ^ (at >> 9) ^ step.wrapping_mul(11)) as u8)
        .collect()
}

pub fn begin(store: &Store, step: u64) -> Result<Save> {
    save_one(store, step, &state(step), &[])
}

pub fn save(store: &Store, step: u64) -> Result<Durable> {
    begin(store, step)?.wait_durable(WAIT)
}

/// The step of the newest checkpoint, whose bytes must be right.
pub fn restored_step(store: &Store) -> Result<u64> {
    let opened = store.open_checkpoint(Select::Newest, true)?;
    let step = opened.checkpoint.record().step;
    assert!(opened.checkpoint.read_tensor("w")? == state(step), "step {step} came back changed");
    Ok(step)
}

/// What another process finds beside the live writer.
pub fn seen_by_a_reader(path: &Path, way: Way) -> u64 {
    let options = OpenOptions { read_only: true, ..way.options() };
    let reader = Store::open(path, &options).expect("open read-only");
    restored_step(&reader).expect("restore")
}

/// The error says of which kind it is, what the kernel said, and where.
pub fn assert_says(error: &Error, kind: ErrorKind, errno: Option<i32>, path: &Path) {
    assert_eq!(error.kind(), kind, "{error}");
    assert_eq!(error.errno(), errno, "{error}");
    assert_eq!(error.path(), Some(path), "{error}");
}

/// Nothing is under way, and no slot or buffer is lost but those that the store counts.
pub fn assert_settled(store: &Store, quarantined: u32) {
    store.drain(WAIT).expect("drain");
    let stats = store.stats();
    assert_eq!(stats.in_flight, 0);
    assert_eq!(stats.saves_begun, stats.saves_durable + stats.saves_failed + stats.saves_cancelled);
    assert_eq!(stats.quarantined_slots, quarantined);
    let pool = store.region().pool();
    let deadline = std::time::Instant::now() + WAIT.expect("a time");
    // A copier that was given a buffer for a save that failed brings it back a moment later.
    while pool.free_count() != pool.buffer_count() {
        assert!(std::time::Instant::now() < deadline, "{} of {}", pool.free_count(), pool.buffer_count());
        std::thread::yield_now();
    }
}

/// A region on a disk that can fail, with a checkpoint of step 1.
pub struct Bed {
    pub disk: Disk,
    pub way: Way,
    pub store: Option<Store>,
}

impl Bed {
    pub fn new(way: Way) -> Bed {
        // O_DIRECT goes around the cache.
        Bed::on(Disk::behind_cache, way)
    }

    pub fn on(disk: fn(usize) -> Disk, way: Way) -> Bed {
        let disk = formatted(disk);
        let store = Store::open(disk.path(), &way.options()).expect("open");
        save(&store, 1).expect("the first save");
        Bed { disk, way, store: Some(store) }
    }

    pub fn path(&self) -> PathBuf {
        self.disk.path().to_path_buf()
    }

    pub fn store(&self) -> &Store {
        self.store.as_ref().expect("open")
    }

    /// The disk is well again: every slot can be written, and the region opens anew with what was saved last.
    pub fn assert_as_good_as_new(mut self, step: u64) {
        self.disk.stop_failing();
        for step in step..step + 2 * u64::from(SLOTS) {
            save(self.store(), step).expect("save");
        }
        assert_settled(self.store(), 0);
        self.store = None;
        let store = Store::open(self.disk.path(), &self.way.options()).expect("open again");
        assert_eq!(restored_step(&store).expect("restore"), step + 2 * u64::from(SLOTS) - 1);
    }
}

fn formatted(disk: fn(usize) -> Disk) -> Disk {
    let folder = scratch_in(Path::new("/dev/shm"));
    let file = folder.path().join("region");
    format_region(&file, &format()).expect("format");
    Disk::of_file(disk, &file)
}
