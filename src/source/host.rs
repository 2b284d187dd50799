//! Host memory as the source of a save: the payload header, then tensors back to back.
#![expect(unsafe_code, reason = "reads memory that C callers lend until the save is copied")]

use std::io;

use crate::error::{Error, ErrorKind, Result};
use crate::persist::{ChunkHasher, Persister};
use crate::source::Source;

/// Gathered bytes are hashed at the latest when there are this many, while they are in the cache.
const GATHERED_MAX_BYTES: usize = 128 << 10;

/// Tensors smaller than this within a chunk are gathered by ordinary copies and hashed together.
const GATHER_BYTES: usize = 16 << 10;

/// So many pages the kernel is asked about at a time.
const PAGES_ASKED_FOR: usize = 512;

/// One tensor's memory. Not read before [`HostSource::new`] made it part of a save.
#[derive(Debug, Clone, Copy)]
pub struct HostSegment {
    /// First byte.
    pub ptr: *const u8,
    /// Bytes.
    pub len: usize,
}

/// Contiguous bytes of a payload.
#[cfg_attr(not(feature = "cuda"), expect(dead_code, reason = "devices ask whose bytes they are"))]
pub(super) struct Run {
    /// Whose they are; none: the header's.
    pub segment: Option<usize>,
    /// First byte.
    pub ptr: *const u8,
    /// Bytes of the segment before it.
    pub skip: u64,
    pub len: usize,
}

/// A payload made of a header and borrowed memory.
pub struct HostSource {
    header: Vec<u8>,
    segments: Vec<HostSegment>,
    /// Payload offset of each segment, ascending.
    starts: Vec<u64>,
    /// Memory that some segments point into and that nobody else keeps.
    _owned: Vec<u8>,
    persister: Persister,
}

// SAFETY: the contract of `new` makes the memory readable from any thread until the source is dropped, and
// nobody writes it meanwhile.
unsafe impl Send for HostSource {}
// SAFETY: as above; the source itself is never changed after `new`.
unsafe impl Sync for HostSource {}

impl HostSource {
    /// A payload of `header` followed by `segments` without holes; `owned` is kept for segments that point into it.
    ///
    /// # Safety
    ///
    /// Every segment must stay valid for reads, and must not be written by anyone, until the source is dropped.
    pub unsafe fn new(header: Vec<u8>, segments: Vec<HostSegment>, owned: Vec<u8>) -> Self {
        let mut next = header.len() as u64;
        let starts = segments
            .iter()
            .map(|segment| {
                let start = next;
                next += segment.len as u64;
                start
            })
            .collect();
        HostSource { header, segments, starts, _owned: owned, persister: Persister::detect() }
    }

    /// Where payload bytes from `offset` on are, as far as they are contiguous, at most `most` bytes.
    pub(super) fn locate(&self, offset: u64, most: usize) -> Run {
        let header_bytes = self.header.len() as u64;
        if offset < header_bytes {
            let rest = &self.header[offset as usize..];
            return Run { segment: None, ptr: rest.as_ptr(), skip: 0, len: rest.len().min(most) };
        }
        // The last segment that starts at or before `offset`; empty ones before it share its start.
        let index = self.starts.partition_point(|&start| start <= offset) - 1;
        let segment = self.segments[index];
        let skip = (offset - self.starts[index]) as usize;
        let len = (segment.len - skip).min(most);
        Run { segment: Some(index), ptr: segment.ptr.wrapping_add(skip), skip: skip as u64, len }
    }

    /// The segments, in payload order.
    #[cfg(feature = "cuda")]
    pub(super) fn segments(&self) -> &[HostSegment] {
        &self.segments
    }

    /// Bytes of the header.
    #[cfg(feature = "cuda")]
    pub(super) fn header_bytes(&self) -> u64 {
        self.header.len() as u64
    }

    /// Where a segment begins in the payload.
    #[cfg(feature = "cuda")]
    pub(super) fn start_of(&self, segment: usize) -> u64 {
        self.starts[segment]
    }

    /// Where the segments are in the payload: their first bytes, and the bytes behind their last.
    #[cfg(feature = "cuda")]
    pub(super) fn places(&self) -> impl Iterator<Item = (u64, u64)> + '_ {
        self.starts.iter().zip(&self.segments).map(|(&start, segment)| (start, start + segment.len as u64))
    }

    /// The memory of a run of this source.
    pub(super) fn bytes_of(&self, run: &Run) -> Result<&[u8]> {
        if run.segment.is_some() {
            check_mapped(run.ptr, run.len)?;
        }
        // SAFETY: within the header or one segment, which by `new`'s contract is readable and unchanged while `self` lives.
        Ok(unsafe { std::slice::from_raw_parts(run.ptr, run.len) })
    }

    /// The memory behind payload bytes from `offset` on, as far as it is contiguous, at most `most` bytes.
    fn run_at(&self, offset: u64, most: usize) -> Result<&[u8]> {
        self.bytes_of(&self.locate(offset, most))
    }

    /// Takes into account what was copied by cached stores.
    fn gathered(&self, bytes: &[u8], hasher: &mut ChunkHasher, write_back: bool) {
        hasher.update(bytes);
        if write_back {
            // SAFETY: the bytes are mapped: they are borrowed.
            unsafe { self.persister.flush_lines(bytes.as_ptr(), bytes.len()) };
        }
    }
}

/// Refuses memory that was unmapped: reading it would end the process. A caller who does so breaks the contract of saves;
/// here the kernel can still say so. What is unmapped between this and the reading is not noticed, nor memory that was
/// freed and stayed mapped.
fn check_mapped(ptr: *const u8, len: usize) -> Result<()> {
    // SAFETY: touches no memory; the C library knows it without asking the kernel.
    let page = usize::try_from(unsafe { libc::sysconf(libc::_SC_PAGESIZE) }).unwrap_or(4096);
    let start = ptr.wrapping_sub(ptr.addr() % page);
    let bytes = ptr.addr() - start.addr() + len;
    // Which pages are in memory does not matter here; that the kernel knows nothing of one does.
    let mut resident = [0u8; PAGES_ASKED_FOR];
    let unmapped = (0..bytes).step_by(PAGES_ASKED_FOR * page).any(|at| {
        let asked = (bytes - at).min(PAGES_ASKED_FOR * page);
        // SAFETY: reads nothing at the address, and writes one byte of `resident` for each page, for which there is room.
        let code =
            unsafe { libc::mincore(start.wrapping_add(at).cast_mut().cast(), asked, resident.as_mut_ptr()) };
        // Any other refusal says nothing of the memory, as where a sandbox forbids the call.
        code != 0 && io::Error::last_os_error().raw_os_error() == Some(libc::ENOMEM)
    });
    if !unmapped {
        return Ok(());
    }
    let message =
        format!("expected the {len} bytes at {ptr:p} to be readable, found memory that is not mapped");
    Err(Error::new(ErrorKind::InvalidArgument, "copy the state", message)
        .advise("keep the state's memory until the save has been copied (wait_copied)"))
}

/// Copies `src` to `dst`, of the same length, around the caches, and feeds it to `hasher`; as [`Source::fill`].
pub fn copy_and_hash(dst: &mut [u8], src: &[u8], hasher: &mut ChunkHasher, write_back: bool) {
    assert_eq!(dst.len(), src.len(), "a chunk goes to a place of its own size");
    // SAFETY: as long as `src`, and distinct: it is borrowed exclusively.
    unsafe { hasher.copy(dst.as_mut_ptr(), src, write_back) };
    // As in `fill`.
    Persister::detect().fence();
}

impl Source for HostSource {
    fn fill(&self, offset: u64, dst: &mut [u8], hasher: &mut ChunkHasher, write_back: bool) -> Result<()> {
        let mut done = 0;
        // Bytes of `dst` before `done` that were gathered but not hashed yet.
        let mut gathered_from = 0;
        while done < dst.len() {
            let src = self.run_at(offset + done as u64, dst.len() - done)?;
            if src.len() < GATHER_BYTES {
                dst[done..done + src.len()].copy_from_slice(src);
                done += src.len();
                if done - gathered_from >= GATHERED_MAX_BYTES {
                    self.gathered(&dst[gathered_from..done], hasher, write_back);
                    gathered_from = done;
                }
                continue;
            }
            self.gathered(&dst[gathered_from..done], hasher, write_back);
            let to = dst[done..done + src.len()].as_mut_ptr();
            // SAFETY: as long as `src`, and distinct: nobody else has `dst`.
            unsafe { hasher.copy(to, src, write_back) };
            done += src.len();
            gathered_from = done;
        }
        self.gathered(&dst[gathered_from..done], hasher, write_back);
        // Non-temporal stores are weakly ordered: without the fence another thread or the device could read
        // the buffer before they arrive.
        self.persister.fence();
        Ok(())
    }

    fn hash(&self, offset: u64, len: usize, hasher: &mut ChunkHasher) -> Result<()> {
        let mut done = 0;
        while done < len {
            let src = self.run_at(offset + done as u64, len - done)?;
            hasher.update(src);
            done += src.len();
        }
        Ok(())
    }
}
