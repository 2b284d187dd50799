//! Choosing and opening a medium.

use std::path::Path;
use std::time::Duration;

use super::direct::{Direct, IoBackend};
use super::file::RegionFile;
use super::mapped::Mapped;
use super::{striped, Durability, Medium};
use crate::error::{Error, ErrorKind, Result};
use crate::staging::StagingPool;
use crate::sync::Arc;

/// Operations in the kernel at once, unless the caller says otherwise.
const QUEUE_DEPTH: usize = 64;

/// Threads that do blocking I/O where io_uring is refused, unless the caller says otherwise.
const IO_THREADS: usize = 8;

/// The medium that the caller asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Requested {
    /// `dax` where MAP_SYNC works; in memory, `mmap`; otherwise what was measured to be faster.
    #[default]
    Auto,
    /// Persistent memory, or an error.
    Dax,
    /// A shared mapping.
    Mmap,
    /// O_DIRECT, or an error.
    Direct,
}

/// Which of two media was faster when the region was formatted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PreferredHint {
    /// O_DIRECT.
    Direct,
    /// The shared mapping.
    Mmap,
}

/// How to open a medium.
#[derive(Debug, Clone)]
pub struct MediumOptions {
    /// Which medium. Default: [`Requested::Auto`].
    pub kind: Requested,
    /// Open for writing, under the exclusive lock. Default: true.
    pub writable: bool,
    /// How long to wait for the lock; zero: one attempt. Default: zero.
    pub lock_wait: Duration,
    /// The weakest durability that is acceptable. Default: [`Durability::Power`].
    pub required: Durability,
    /// How `direct` does asynchronous operations. Default: [`IoBackend::Auto`].
    pub backend: IoBackend,
    /// Threads for [`IoBackend::Threads`]; 0 counts as 1. Default: 4.
    pub io_threads: usize,
    /// Most operations in the kernel at once, 1 to 1024; more wait. Default: 64.
    pub queue_depth: usize,
    /// What [`super::measure::measure_preferred`] found at format. Default: none, which means `direct`.
    pub preferred: Option<PreferredHint>,
}

impl Default for MediumOptions {
    fn default() -> Self {
        MediumOptions {
            kind: Requested::Auto,
            writable: true,
            lock_wait: Duration::ZERO,
            required: Durability::Power,
            backend: IoBackend::Auto,
            io_threads: IO_THREADS,
            queue_depth: QUEUE_DEPTH,
            preferred: None,
        }
    }
}

/// Opens the region at `path`, which must exist and have its final size; with all its members, if it is striped.
///
/// `pool` is registered with io_uring where that is possible; operations with other pools' buffers work too.
///
/// # Errors
///
/// [`ErrorKind::InUse`] when another writer holds the region; [`ErrorKind::Member`], naming it, when a member is lost,
/// foreign or damaged, or when `path` is another than the first; [`ErrorKind::Unsupported`] when the requested
/// medium cannot be had here; [`ErrorKind::Durability`] when the medium cannot give what `required` names.
/// Nothing is ever downgraded silently: see [`Medium::info`] for what was got.
pub fn open_medium(
    path: &Path,
    options: &MediumOptions,
    pool: Option<&Arc<StagingPool>>,
) -> Result<Arc<dyn Medium>> {
    let file = RegionFile::open(path, options.writable, options.lock_wait)?;
    match striped::label_of(&file)? {
        None => medium_on(file, options, pool),
        Some(found) if found.label.index == 0 => {
            striped::open_striped(file, &found.label, path, options, pool)
        }
        Some(found) => Err(striped::not_the_first(&found.label, path)),
    }
}

/// [`open_medium`] of a file that is already open, under its lock if it is writable.
pub(super) fn medium_on(
    file: RegionFile,
    options: &MediumOptions,
    pool: Option<&Arc<StagingPool>>,
) -> Result<Arc<dyn Medium>> {
    check_file(&file, options)?;
    match options.kind {
        Requested::Dax => Ok(Arc::new(Mapped::dax(file).map_err(|refused| refused.error)?)),
        Requested::Mmap => Ok(Arc::new(Mapped::mmap(file)?)),
        Requested::Direct => Ok(Arc::new(direct_on(file, options, pool)?)),
        Requested::Auto => auto(file, options, pool),
    }
}

/// Refuses an empty file, and one that cannot give the durability that is required.
pub(super) fn check_file(file: &RegionFile, options: &MediumOptions) -> Result<()> {
    if file.len_bytes() == 0 {
        return Err(Error::new(
            ErrorKind::NotARegion,
            "open",
            "expected a region, found an empty file: 0 bytes",
        )
        .at_path(file.path())
        .advise("format it first (`pccheck format`), or correct the path"));
    }
    if file.durability() < options.required {
        return Err(Error::new(
            ErrorKind::Durability,
            "open",
            "durability across power loss is required, but this file or device lives in memory only",
        )
        .at_path(file.path())
        .advise("put the region on a disk, or accept durability across the death of the process only"));
    }
    Ok(())
}

/// `direct` on a file, as the options say.
pub(super) fn direct_on(
    file: RegionFile,
    options: &MediumOptions,
    pool: Option<&Arc<StagingPool>>,
) -> Result<Direct> {
    Direct::new(file, pool, options.backend, options.queue_depth, options.io_threads)
}

fn auto(
    file: RegionFile,
    options: &MediumOptions,
    pool: Option<&Arc<StagingPool>>,
) -> Result<Arc<dyn Medium>> {
    let file = match Mapped::dax(file) {
        Ok(medium) => return Ok(Arc::new(medium)),
        Err(refused) => refused.file,
    };
    let prefers_mmap = options.preferred == Some(PreferredHint::Mmap);
    if file.is_in_memory() || prefers_mmap {
        return Ok(Arc::new(Mapped::mmap(file)?));
    }
    match file.use_direct() {
        Ok(_) => Ok(Arc::new(direct_on(file, options, pool)?)),
        Err(error) => {
            let note = format!("no direct I/O here, a shared mapping instead: {error}");
            Ok(Arc::new(Mapped::mmap(file)?.noting(note)))
        }
    }
}
