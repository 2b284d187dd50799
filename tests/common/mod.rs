//! What several tests need: scratch folders, regions in them, and saves of plain bytes.
#![allow(dead_code, reason = "every test uses a part of it")]

use std::path::{Path, PathBuf};
use std::sync::OnceLock;
use std::time::Duration;

use pccheck::engine::{format_region, Store, Tensor};
use pccheck::format::Dtype;
use pccheck::save::{Save, SaveOptions};
use pccheck::store::FormatOptions;
use pccheck::Result;

/// Long enough for anything that happens at all, also on a slow disk.
pub const WAIT: Option<Duration> = Some(Duration::from_secs(300));

/// The folder on a disk where tests may leave large files; `PCC_TEST_DISK` names another.
pub fn disk() -> &'static Path {
    static DISK: OnceLock<PathBuf> = OnceLock::new();
    DISK.get_or_init(|| {
        std::env::var_os("PCC_TEST_DISK").map_or_else(|| env!("CARGO_TARGET_TMPDIR").into(), PathBuf::from)
    })
}

/// `PCC_TEST_DAX`: the disk is persistent memory, mounted with DAX.
pub fn disk_is_dax() -> bool {
    std::env::var_os("PCC_TEST_DAX").is_some()
}

/// A folder that goes with the test.
pub fn scratch() -> tempfile::TempDir {
    scratch_in(disk())
}

pub fn scratch_in(root: &Path) -> tempfile::TempDir {
    tempfile::tempdir_in(root).expect("a temporary directory")
}

/// A region in a folder of its own.
pub struct Region {
    pub dir: tempfile::TempDir,
    pub path: PathBuf,
}

pub fn region_in(root: &Path, format: &FormatOptions) -> Region {
    let dir = scratch_in(root);
    let path = dir.path().join("region");
    format_region(&path, format).expect("format");
    Region { dir, path }
}

/// Begins a save of one tensor of bytes, called "w".
pub fn save_one(store: &Store, step: u64, data: &[u8], metadata: &[(&str, &str)]) -> Result<Save> {
    let shape = [data.len() as u64];
    store.save(step, &[Tensor { name: "w", dtype: Dtype::U8, shape: &shape, data }], metadata, WAIT)
}

/// Begins a save of tensors of bytes.
pub fn save_bytes(
    store: &Store,
    step: u64,
    state: &[(String, Vec<u8>)],
    metadata: &[(&str, &str)],
) -> Result<Save> {
    save_bytes_as(store, step, state, metadata, WAIT)
}

/// [`save_bytes`], pinned or otherwise not as usual.
pub fn save_bytes_as(
    store: &Store,
    step: u64,
    state: &[(String, Vec<u8>)],
    metadata: &[(&str, &str)],
    options: impl Into<SaveOptions>,
) -> Result<Save> {
    let shapes: Vec<[u64; 1]> = state.iter().map(|(_, data)| [data.len() as u64]).collect();
    let tensors: Vec<Tensor<'_>> = state
        .iter()
        .zip(&shapes)
        .map(|((name, data), shape)| Tensor { name, dtype: Dtype::U8, shape, data })
        .collect();
    store.save(step, &tensors, metadata, options)
}
