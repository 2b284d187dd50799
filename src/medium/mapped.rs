//! `dax` and `mmap`: stores into a shared mapping. Reads never touch it: a damaged or truncated page would raise
//! SIGBUS, where pread returns an error.
#![expect(unsafe_code, reason = "mapping, storing into the mapping, msync")]

use std::mem::ManuallyDrop;

use memmap2::{Advice, MmapOptions, MmapRaw};

use super::file::RegionFile;
use super::io::Behind;
use super::{
    check_io, io as transfer, refuse, Barrier, Io, IoOp, Medium, MediumInfo, MediumKind, MediumMemory,
};
use crate::error::{Error, ErrorKind, Result};
use crate::fork::without_forks;
use crate::format::BLOCK_BYTES;
use crate::persist::Persister;
use crate::sync::atomic::{AtomicUsize, Ordering};
use crate::sync::share;

/// `MADV_POPULATE_WRITE`, Linux 5.14; older kernels answer EINVAL.
const MADV_POPULATE_WRITE: libc::c_int = 23;

/// Threads that ask for pages at open, and how much each asks for at a time.
const POPULATE_THREADS_MAX: usize = 4;
const POPULATE_PIECE_BYTES: usize = 64 << 20;

/// A MAP_SYNC mapping, which memmap2 cannot make: the kernel keeps the file's metadata durable at every fault.
struct SyncMap {
    start: *mut u8,
    len: usize,
}

// SAFETY: the mapping is plain shared memory, valid until dropped, from whatever thread.
unsafe impl Send for SyncMap {}
// SAFETY: as above; through a shared reference only the address can be had.
unsafe impl Sync for SyncMap {}

impl SyncMap {
    fn new(file: &RegionFile, protection: libc::c_int) -> Result<Self> {
        let len = mapping_len(file)?;
        let flags = libc::MAP_SHARED_VALIDATE | libc::MAP_SYNC;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let start = unsafe { libc::mmap(std::ptr::null_mut(), len, protection, flags, file.raw_fd(), 0) };
        if start == libc::MAP_FAILED {
            return Err(Error::last_os("map with MAP_SYNC"));
        }
        let map = SyncMap { start: start.cast(), len };
        // SAFETY: the mapping that was just made.
        if unsafe { libc::madvise(start, len, libc::MADV_DONTFORK) } != 0 {
            return Err(Error::last_os("keep the mapping from forked children"));
        }
        Ok(map)
    }
}

impl Drop for SyncMap {
    fn drop(&mut self) {
        // SAFETY: made by `new`, and nobody uses it any more.
        unsafe { libc::munmap(self.start.cast(), self.len) };
    }
}

/// Makes the kernel map every page now, which would otherwise cost a fault each in the first save (on tmpfs three times
/// the copying itself; on persistent memory with MAP_SYNC also a journal commit). Only where the pages are there already:
/// those of a disk would have to be read, and those of a hole allocated, for a path that may be no region at all.
///
/// A request: without it, or where it is refused, the first saves are slower.
fn populate(start: *mut u8, len: usize) {
    let cores = std::thread::available_parallelism().map_or(1, |cores| cores.get());
    let threads = cores.min(POPULATE_THREADS_MAX).min(len / POPULATE_PIECE_BYTES + 1);
    let next = AtomicUsize::new(0);
    let start = start.expose_provenance();
    let work = || loop {
        // Relaxed: only shares pieces out.
        let offset = next.fetch_add(POPULATE_PIECE_BYTES, Ordering::Relaxed);
        if offset >= len {
            return;
        }
        let piece = std::ptr::with_exposed_provenance_mut::<u8>(start + offset);
        let bytes = POPULATE_PIECE_BYTES.min(len - offset);
        // SAFETY: a part of the mapping, which outlives the call; changes no byte.
        if unsafe { libc::madvise(piece.cast(), bytes, MADV_POPULATE_WRITE) } != 0 {
            return;
        }
    };
    share("pcc-map", threads - 1, work);
}

enum Mapping {
    Sync(SyncMap),
    Shared(MmapRaw),
}

impl Mapping {
    fn as_mut_ptr(&self) -> *mut u8 {
        match self {
            Mapping::Sync(map) => map.start,
            Mapping::Shared(map) => map.as_mut_ptr(),
        }
    }

    fn len(&self) -> usize {
        match self {
            Mapping::Sync(map) => map.len,
            Mapping::Shared(map) => map.len(),
        }
    }
}

fn mapping_len(file: &RegionFile) -> Result<usize> {
    match usize::try_from(file.len_bytes()) {
        Ok(len) if len > 0 => Ok(len),
        _ => Err(Error::new(
            ErrorKind::InvalidArgument,
            "map the region",
            format!("{} bytes cannot be mapped", file.len_bytes()),
        )),
    }
}

/// A region behind a shared mapping.
pub(super) struct Mapped {
    /// None when opened read-only. Not dropped in a forked child, where it does not exist.
    mapping: ManuallyDrop<Option<Mapping>>,
    file: RegionFile,
    kind: MediumKind,
    persister: Persister,
    notes: Vec<String>,
}

/// Why a region cannot be `dax`; the file is given back for another medium.
pub(super) struct NotDax {
    pub(super) file: RegionFile,
    pub(super) error: Error,
}

impl Mapped {
    /// Maps the region with MAP_SYNC.
    pub(super) fn dax(file: RegionFile) -> std::result::Result<Self, Box<NotDax>> {
        let persister = Persister::detect();
        if !persister.reaches_persistence() {
            let message = "no instruction of this processor is known to reach persistence";
            let error = file
                .about(Error::new(ErrorKind::Unsupported, "map with MAP_SYNC", message))
                .advise("let the engine choose the medium, or choose mmap");
            return Err(Box::new(NotDax { file, error }));
        }
        let protection = match file.is_writable() {
            true => libc::PROT_READ | libc::PROT_WRITE,
            false => libc::PROT_READ,
        };
        match without_forks(|| SyncMap::new(&file, protection)) {
            Ok(map) => {
                // A reader maps only to learn whether it could.
                let mapping = file.is_writable().then_some(Mapping::Sync(map));
                Ok(Mapped::with(mapping, file, MediumKind::Dax, persister))
            }
            Err(error) => {
                let error = file.about(error.with_kind(ErrorKind::Unsupported)).advise(
                    "persistent memory needs a file on an ext4 or XFS file system mounted with `-o dax`, 4 KiB blocks",
                );
                Err(Box::new(NotDax { file, error }))
            }
        }
    }

    /// Maps any file.
    pub(super) fn mmap(file: RegionFile) -> Result<Self> {
        file.use_buffered()?;
        let mapping = if file.is_writable() {
            let mapped = without_forks(|| {
                let len = mapping_len(&file)?;
                let mapped = MmapOptions::new().len(len).map_raw(file.raw_fd());
                let map = mapped.map_err(|error| Error::io("map the region", &error))?;
                let advised = map.advise(Advice::DontFork);
                advised.map_err(|error| Error::io("keep the mapping from forked children", &error))?;
                Ok(map)
            });
            Some(Mapping::Shared(mapped.map_err(|error| file.about(error))?))
        } else {
            None
        };
        Ok(Mapped::with(mapping, file, MediumKind::Mmap, Persister::detect()))
    }

    fn with(mapping: Option<Mapping>, file: RegionFile, kind: MediumKind, persister: Persister) -> Self {
        let notes = file.notes();
        let there = (kind == MediumKind::Dax || file.is_in_memory()) && !file.has_holes();
        if let Some(mapping) = mapping.as_ref().filter(|_| there) {
            populate(mapping.as_mut_ptr(), mapping.len());
        }
        Mapped { mapping: ManuallyDrop::new(mapping), file, kind, persister, notes }
    }

    /// Adds a note for people.
    pub(super) fn noting(mut self, note: String) -> Self {
        self.notes.push(note);
        self
    }

    /// The mapped address of a range that was checked.
    fn place(&self, op: &'static str, offset: u64, len: u64) -> Result<*mut u8> {
        self.file.check(op, offset, len, true)?;
        match &*self.mapping {
            Some(mapping) => Ok(mapping.as_mut_ptr().wrapping_add(offset as usize)),
            None => {
                Err(self.file.about(Error::new(ErrorKind::ReadOnly, op, "the region was opened read-only")))
            }
        }
    }

    /// As [`Mapped::place`], of a file that is still whole: a store beyond its end would raise SIGBUS. One that is cut short
    /// between this and the store still does.
    fn place_to_store(&self, offset: u64, len: u64) -> Result<*mut u8> {
        let place = self.place("copy", offset, len)?;
        self.file.check_present()?;
        Ok(place)
    }

    /// msync of the pages of the range. On Linux MS_SYNC is fdatasync of that range of the file (the kernel calls the
    /// file system's fsync with the data flag set, device cache included), so no fdatasync need follow.
    fn msync(&self, offset: u64, len: u64) -> Result<()> {
        // SAFETY: touches no memory.
        let page =
            usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(BLOCK_BYTES as usize);
        let place = self.place("msync", offset, len)?;
        let skew = place.addr() % page;
        let (start, len) = (place.wrapping_sub(skew), len as usize + skew);
        // SAFETY: whole pages of the mapping, which starts at a page boundary; msync changes no byte.
        if unsafe { libc::msync(start.cast(), len, libc::MS_SYNC) } == 0 {
            return Ok(());
        }
        // Not made again when it was interrupted: see `Behind::PageCache`.
        let error = transfer::durability_unknown(Error::last_os("msync"));
        Err(self.file.about(error.at_offset(offset)))
    }
}

impl Medium for Mapped {
    fn info(&self) -> MediumInfo {
        MediumInfo {
            kind: self.kind,
            durability: self.file.durability(),
            path: self.persister.name(),
            notes: self.notes.clone(),
            stripes: None,
        }
    }

    fn len_bytes(&self) -> u64 {
        self.file.len_bytes()
    }

    fn read(&self, offset: u64, dst: &mut [u8]) -> Result<()> {
        self.file.read(offset, dst)
    }

    /// Completes before it returns, on this thread: storing and copying are the processor's work anyway.
    fn start(&self, mut io: Io) {
        if let Err(error) = check_io(&self.file, &io) {
            return refuse(io, error);
        }
        let result = match io.op {
            IoOp::Copy => self.copy(io.offset, &io.buffer[..io.len]),
            IoOp::Read => self.file.read(io.offset, &mut io.buffer[..io.len]),
        };
        io.sink.finished(io.token, io.buffer, result);
    }

    fn memory(&self) -> Option<&dyn MediumMemory> {
        Some(self)
    }

    fn copy(&self, offset: u64, src: &[u8]) -> Result<()> {
        let dst = self.place_to_store(offset, src.len() as u64)?;
        match self.kind {
            // SAFETY: `dst` is mapped for the checked length; `src` is the caller's memory, not the mapping, of which
            // no reference is given out but to who fills it.
            MediumKind::Dax => unsafe { self.persister.copy_durable(dst, src.as_ptr(), src.len()) },
            // SAFETY: as above.
            _ => unsafe { self.persister.copy_streaming(dst, src.as_ptr(), src.len()) },
        }
        Ok(())
    }

    /// On `dax` this is what makes the calling thread's copies durable.
    fn fence(&self, _barrier: Barrier) -> Result<()> {
        self.file.stamp().check("fence").map_err(|error| self.file.about(error))?;
        self.persister.fence();
        Ok(())
    }

    fn persist(&self, offset: u64, len: u64, barrier: Barrier) -> Result<()> {
        match (self.kind, barrier) {
            // What a process left in the processor's caches when it was killed between a store and its write-back:
            // the kernel remembers which pages were written, and writes their lines back.
            (MediumKind::Dax, Barrier::Open) => self.msync(offset, len),
            (MediumKind::Dax, _) => {
                self.file.check("persist", offset, len, true)?;
                self.fence(barrier)
            }
            // There is nothing to write back to.
            _ if self.file.is_in_memory() => self.file.check("persist", offset, len, true),
            _ => self.msync(offset, len),
        }
    }

    fn check_present(&self) -> Result<()> {
        self.file.check_present()
    }

    /// A write call on files that have a device: a store and msync would write back a whole folio, up to 2 MiB.
    fn write_durable(&self, offset: u64, block: &[u8], barrier: Barrier) -> Result<()> {
        if self.kind == MediumKind::Dax || self.file.is_in_memory() {
            self.copy(offset, block)?;
            self.fence(barrier)?;
            return self.persist(offset, block.len() as u64, barrier);
        }
        self.file.check("write durably", offset, block.len() as u64, true)?;
        transfer::write_dsync(self.file.raw_fd(), offset, block, Behind::PageCache)
            .map_err(|error| self.file.about(error))
    }
}

impl MediumMemory for Mapped {
    fn fill(
        &self,
        offset: u64,
        len: usize,
        fill: &mut dyn FnMut(&mut [u8], bool) -> Result<()>,
    ) -> Result<()> {
        let padded = len.next_multiple_of(BLOCK_BYTES as usize);
        let dst = self.place_to_store(offset, padded as u64)?;
        // SAFETY: mapped for the checked length, and always initialised. Nobody else refers to these bytes: those of a slot
        // are one save's, which fills each chunk once, and all reading goes through the file.
        let bytes = unsafe { std::slice::from_raw_parts_mut(dst, padded) };
        let write_back = self.kind == MediumKind::Dax;
        fill(&mut bytes[..len], write_back)?;
        let padding = &mut bytes[len..];
        padding.fill(0);
        if write_back {
            // SAFETY: mapped, as above.
            unsafe { self.persister.flush_lines(padding.as_ptr(), padding.len()) };
        }
        Ok(())
    }
}

impl Drop for Mapped {
    fn drop(&mut self) {
        if !self.file.stamp().is_forked() {
            // SAFETY: not used again: `self` is being dropped.
            unsafe { ManuallyDrop::drop(&mut self.mapping) };
        }
    }
}
