//! A small region with two checkpoints, and the assertions that every refusal must meet.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::Duration;

pub use super::common::WAIT;
use super::common::{disk, region_in, save_one, Region};
use pccheck::engine::{Select, Store};
use pccheck::format::Layout;
use pccheck::medium::{Durability, Requested};
use pccheck::store::{FormatOptions, OpenOptions};
use pccheck::{Error, ErrorKind, Result};

pub const SLOTS: u32 = 3;
pub const PAYLOAD_BYTES: u64 = 1 << 20;
/// Steps of the two checkpoints; generation = step.
pub const OLDER: u64 = 1;
pub const NEWEST: u64 = 2;
const NEXT: u64 = 3;

/// A region that holds two checkpoints in the slots 0 and 1 of three.
pub struct Bed {
    pub dir: tempfile::TempDir,
    pub path: PathBuf,
    pub layout: Layout,
}

pub fn options() -> OpenOptions {
    OpenOptions {
        medium: Requested::Mmap,
        required: Durability::Process,
        max_in_flight: 1,
        keep: 2,
        chunk_bytes: 4096,
        staging_bytes: 4 * 4096,
        writers: 1,
        readers: 1,
        lock_wait: Some(Duration::ZERO),
        ..OpenOptions::default()
    }
}

pub fn reading() -> OpenOptions {
    OpenOptions { read_only: true, ..options() }
}

/// The state of a step: three chunks and a bit.
pub fn state(step: u64) -> Vec<u8> {
    (0..9001u64).map(|at| (at.wrapping_mul(31) ^ (at >> 8) ^ (step << 5)) as u8).collect()
}

pub fn save(store: &Store, step: u64) -> Result<()> {
    save_one(store, step, &state(step), &[("step", &step.to_string())])?.wait_durable(WAIT).map(drop)
}

impl Bed {
    pub fn new() -> Bed {
        Bed::in_dir(disk())
    }

    pub fn in_dir(root: &Path) -> Bed {
        let format = FormatOptions { medium: Requested::Mmap, ..FormatOptions::new(SLOTS, PAYLOAD_BYTES) };
        let Region { dir, path } = region_in(root, &format);
        let store = Store::open(&path, &options()).expect("open");
        for step in [OLDER, NEWEST] {
            save(&store, step).expect("save");
        }
        let layout = *store.region().layout();
        Bed { dir, path, layout }
    }

    pub fn file(&self) -> File {
        File::options().read(true).write(true).open(&self.path).expect("open the file")
    }

    pub fn read(&self, offset: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        self.file().read_exact_at(&mut bytes, offset).expect("read the file");
        bytes
    }

    pub fn write(&self, offset: u64, bytes: &[u8]) {
        self.file().write_all_at(bytes, offset).expect("write the file");
    }

    pub fn bytes(&self) -> Vec<u8> {
        fs::read(&self.path).expect("read the file")
    }

    /// The step of the newest readable checkpoint, whose bytes are right, through a reader.
    pub fn newest_step(&self) -> Result<u64> {
        let store = Store::open(&self.path, &reading())?;
        checked_step(&store)
    }

    /// Both checkpoints are there, whole, for readers and for the next writer, who can also save. Leaves the file as it was.
    pub fn assert_intact(&self) {
        let before = self.bytes();
        assert_eq!(self.newest_step().expect("open"), NEWEST);
        let store = Store::open(&self.path, &options()).expect("open for writing");
        assert_both(&store);
        save(&store, NEXT).expect("save");
        drop(store);
        assert_eq!(self.newest_step().expect("open"), NEXT);
        self.write(0, &before);
    }

    /// `refused` must fail and must leave every byte of the file as it was.
    pub fn assert_untouched(&self, refused: impl FnOnce() -> Error) -> Error {
        let before = self.bytes();
        let error = refused();
        assert!(before == self.bytes(), "the file was changed by what ended with: {error}");
        error
    }
}

pub fn assert_both(store: &Store) {
    for step in [OLDER, NEWEST] {
        let opened = store.open_checkpoint(Select::Step(step), true).expect("open checkpoint");
        assert_eq!(opened.checkpoint.read_tensor("w").expect("read"), state(step));
    }
}

/// Restores the newest checkpoint and holds it against what was saved.
pub fn checked_step(store: &Store) -> Result<u64> {
    let opened = store.open_checkpoint(Select::Newest, true)?;
    let step = opened.checkpoint.record().step;
    let bytes = opened.checkpoint.read_tensor("w")?;
    assert!(bytes == state(step), "step {step} came back changed");
    assert_eq!(opened.checkpoint.metadata()["step"], step.to_string());
    assert_eq!(opened.checkpoint.tensors().len(), 1);
    Ok(step)
}

/// The error of a refusal: of that kind, and its text says all that a person needs.
pub fn refused<T>(result: Result<T>, kind: ErrorKind, says: &[&str]) -> Error {
    let error = match result {
        Ok(_) => panic!("accepted, expected {kind:?}"),
        Err(error) => error,
    };
    assert_eq!(error.kind(), kind, "{error}");
    let text = error.to_string();
    for part in says {
        assert!(text.contains(part), "{text:?} does not say {part:?}");
    }
    error
}

/// As [`refused`], and it names the path and what to do.
pub fn refused_at<T>(result: Result<T>, path: &Path, kind: ErrorKind, says: &[&str]) -> Error {
    let error = refused(result, kind, says);
    assert_eq!(error.path(), Some(path), "{error} does not name the path");
    assert!(error.advice().is_some(), "{error} does not say what to do");
    error
}
