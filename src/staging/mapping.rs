//! One anonymous, huge-page, touched, unforkable mapping.
#![expect(unsafe_code, reason = "system calls on memory that this file alone maps and unmaps")]

use std::fs::File;
use std::io::{self, BufRead, BufReader};
use std::ptr::{self, NonNull};

use crate::error::{Error, ErrorKind, Result};
use crate::fork::{without_forks, ForkStamp};

/// Size and alignment of the large pages asked for: x86-64, and aarch64 with 4 KiB base pages.
pub(super) const HUGE_PAGE_BYTES: usize = 2 << 20;
/// The smallest page size of any supported machine: touching one byte in each touches every page.
pub(super) const PAGE_BYTES: usize = 4096;
/// `MADV_POPULATE_WRITE`, Linux 5.14; older kernels answer EINVAL.
const MADV_POPULATE_WRITE: libc::c_int = 23;

const OP: &str = "map staging pool";

/// The mapping; unmapped on drop, in the process that made it.
#[derive(Debug)]
pub(super) struct Mapping {
    base: NonNull<u8>,
    len: usize,
    stamp: ForkStamp,
}

// SAFETY: the mapping is plain memory, valid in every thread until drop; this type itself only reads `base`.
unsafe impl Send for Mapping {}
// SAFETY: as above; accesses through `base` are governed by the pool that hands out disjoint buffers.
unsafe impl Sync for Mapping {}

impl Mapping {
    /// Maps and touches `len` bytes (a multiple of [`PAGE_BYTES`], not 0), aligned to [`HUGE_PAGE_BYTES`],
    /// all zero.
    pub(super) fn new(len: usize) -> Result<Mapping> {
        let too_large = || out_of_memory(len, "the size overflows the address space");
        // Mapped with one huge page to spare, so that an aligned start exists; the rest is given back.
        let spare_len = len.checked_add(HUGE_PAGE_BYTES).ok_or_else(too_large)?;
        // SAFETY: a fresh anonymous mapping at an address of the kernel's choice touches no existing memory.
        let map = || unsafe {
            libc::mmap(
                ptr::null_mut(),
                spare_len,
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_PRIVATE | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        let mapping = without_forks(|| {
            let raw = map();
            if raw == libc::MAP_FAILED {
                return Err(out_of_memory(len, &io::Error::last_os_error().to_string()));
            }
            let raw = raw.cast::<u8>();
            let head = raw.align_offset(HUGE_PAGE_BYTES).min(HUGE_PAGE_BYTES);
            let base = raw.wrapping_add(head);
            unmap(raw, head);
            unmap(base.wrapping_add(len), spare_len - head - len);
            let base = NonNull::new(base).ok_or_else(too_large)?;
            let mapping = Mapping { base, len, stamp: ForkStamp::now() };
            // Without this a forked child shares pages copy-on-write, and writes here would go to copies
            // while pinned I/O goes on in the originals.
            mapping
                .advise(libc::MADV_DONTFORK)
                .map_err(|error| Error::io(OP, &error).advise("the kernel must support MADV_DONTFORK"))?;
            Ok(mapping)
        })?;
        // A request: without huge pages I/O is slower, and huge_page_bytes() says so.
        let _ = mapping.advise(libc::MADV_HUGEPAGE);
        mapping.touch()?;
        Ok(mapping)
    }

    pub(super) fn base(&self) -> *mut u8 {
        self.base.as_ptr()
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    /// Locks the pages in memory; false where RLIMIT_MEMLOCK or the kernel refuses.
    pub(super) fn lock(&self) -> bool {
        // SAFETY: the range is this mapping's, which outlives the call.
        unsafe { libc::mlock(self.base.as_ptr().cast(), self.len) == 0 }
    }

    /// Bytes in huge pages now, as the kernel accounts for them; 0 where it does not say.
    pub(super) fn huge_page_bytes(&self) -> u64 {
        let Ok(smaps) = File::open("/proc/self/smaps") else { return 0 };
        let start = self.base.as_ptr() as u64;
        huge_bytes_in(BufReader::new(smaps), start, start + self.len as u64)
    }

    fn advise(&self, advice: libc::c_int) -> io::Result<()> {
        // SAFETY: the range is this mapping's; none of the advices used here discards or remaps its contents.
        match unsafe { libc::madvise(self.base.as_ptr().cast(), self.len, advice) } {
            0 => Ok(()),
            _ => Err(io::Error::last_os_error()),
        }
    }

    /// Makes the kernel give all pages now, not in the first save.
    fn touch(&self) -> Result<()> {
        match self.advise(MADV_POPULATE_WRITE) {
            Ok(()) => return Ok(()),
            Err(error) if error.raw_os_error() == Some(libc::ENOMEM) => {
                return Err(out_of_memory(self.len, &error.to_string()));
            }
            // An old kernel, or interrupted: by hand.
            Err(_) => {}
        }
        for offset in (0..self.len).step_by(PAGE_BYTES) {
            let byte = self.base.as_ptr().wrapping_add(offset);
            // SAFETY: `byte` lies in the mapping, which nobody else knows yet; volatile, so that the store
            // of a zero to zeroed memory is not optimised away.
            unsafe { byte.write_volatile(0) };
        }
        Ok(())
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // In a forked child the range is not this mapping (MADV_DONTFORK) but perhaps somebody else's. Process numbers
        // would not tell: a child in a new namespace may have its parent's.
        if !self.stamp.is_forked() {
            unmap(self.base.as_ptr(), self.len);
        }
    }
}

/// Gives back a range that this file mapped and that nobody refers to any more.
fn unmap(start: *mut u8, len: usize) {
    if len > 0 {
        // SAFETY: by contract of this private function the range is mapped by this file and unreferenced. The
        // result is ignored: munmap of such a range fails only when splitting it exceeds the mapping count,
        // and then it stays mapped, untouched.
        let _ = unsafe { libc::munmap(start.cast(), len) };
    }
}

fn out_of_memory(len: usize, why: &str) -> Error {
    Error::new(ErrorKind::OutOfMemory, OP, format!("cannot get {len} bytes of memory for staging: {why}"))
        .advise(
        "give the store a smaller staging pool, or raise the memory limit of the process (ulimit -v, cgroup)",
    )
}

/// Sums `AnonHugePages` of the mappings in `smaps` that overlap `start..end`, at most the range itself.
fn huge_bytes_in(smaps: impl BufRead, start: u64, end: u64) -> u64 {
    let mut within = false;
    let mut total_bytes = 0u64;
    for line in smaps.lines().map_while(|line| line.ok()) {
        if let Some((first, last)) = address_range(&line) {
            within = first < end && last > start;
        } else if within {
            if let Some(rest) = line.strip_prefix("AnonHugePages:") {
                let kib = rest.trim().trim_end_matches("kB").trim().parse::<u64>().unwrap_or(0);
                total_bytes = total_bytes.saturating_add(kib.saturating_mul(1024));
            }
        }
    }
    total_bytes.min(end - start)
}

/// The address range of a mapping's first line in smaps (`7f0000000000-7f0000200000 rw-p ...`).
fn address_range(line: &str) -> Option<(u64, u64)> {
    let (first, last) = line.split_whitespace().next()?.split_once('-')?;
    Some((u64::from_str_radix(first, 16).ok()?, u64::from_str_radix(last, 16).ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn huge_bytes_counts_only_overlapping_mappings() {
        let smaps = "1000-2000 rw-p 0 00:00 0\nAnonHugePages:  2048 kB\n\
                     400000-600000 rw-p 0 00:00 0 \nRss:  9 kB\nAnonHugePages:  1024 kB\nVmFlags: rd\n\
                     600000-a00000 rw-p 0 00:00 0 \nAnonHugePages:  4096 kB\n";
        assert_eq!(huge_bytes_in(smaps.as_bytes(), 0x400000, 0x600000), 1 << 20);
        assert_eq!(huge_bytes_in(smaps.as_bytes(), 0x400000, 0xa00000), 5 << 20);
        assert_eq!(huge_bytes_in(smaps.as_bytes(), 0x500000, 0x700000), 2 << 20, "at most the range itself");
        assert_eq!(huge_bytes_in(smaps.as_bytes(), 0xa00000, 0xb00000), 0);
    }

    #[test]
    fn is_aligned_zeroed_and_as_long_as_asked() {
        for len in [PAGE_BYTES, HUGE_PAGE_BYTES, 3 * HUGE_PAGE_BYTES + PAGE_BYTES] {
            let mapping = Mapping::new(len).expect("mapping");
            assert_eq!(mapping.base() as usize % HUGE_PAGE_BYTES, 0);
            // SAFETY: the mapping has `len` initialised bytes and this test alone knows it.
            let bytes = unsafe { std::slice::from_raw_parts(mapping.base(), len) };
            assert!(bytes.iter().all(|&byte| byte == 0));
        }
    }

    #[test]
    fn an_impossible_size_names_size_and_remedy() {
        for len in [usize::MAX - PAGE_BYTES + 1, 1 << 62] {
            let error = Mapping::new(len).expect_err("impossible");
            assert_eq!(error.kind(), ErrorKind::OutOfMemory);
            assert!(error.to_string().contains(&len.to_string()), "{error}");
            assert!(error.advice().is_some());
        }
    }
}
