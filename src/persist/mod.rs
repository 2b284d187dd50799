//! Copies that bypass the cache, hashing in the same pass, flushes of cache lines, and the fence that makes copies durable.
//!
//! The only room with machine instructions. One file per architecture, each with the same functions;
//! which instructions are used is decided once, at run time, by [`Persister::detect`].
//!
//! # Contract
//!
//! After [`Persister::copy_durable`] and then [`Persister::fence`] *on the same thread*, every byte copied into a
//! MAP_SYNC mapping of persistent memory survives power loss, whatever the alignment of either address and
//! of the length: whole cache lines go by non-temporal stores, the cached first and last line are
//! written back. Each aligned 8-byte unit of the destination persists whole or not at all.
//! [`Persister::copy_streaming`] makes the same stores without writing the edge lines back: right for memory
//! that need not survive anything.
#![expect(unsafe_code, reason = "this room is the crate's only home of machine instructions")]

mod blocks;
mod hasher;

// `--cfg pcc_portable` chooses the portable path anywhere, so that it is tested, too.
#[cfg(all(target_arch = "aarch64", not(pcc_portable)))]
#[path = "aarch64.rs"]
mod arch;
#[cfg(any(pcc_portable, not(any(target_arch = "x86_64", target_arch = "aarch64"))))]
#[path = "portable.rs"]
mod arch;
#[cfg(all(target_arch = "x86_64", not(pcc_portable)))]
#[path = "x86_64.rs"]
mod arch;

pub use hasher::ChunkHasher;

use crate::sync::OnceLock;
use blocks::{Secret, Sums, BLOCK_BYTES};

/// Unit in which the copies work: one cache line on x86-64. Longer lines elsewhere are the flush's business.
const LINE_BYTES: usize = 64;

/// The instructions chosen for this processor.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Persister {
    path: arch::Path,
}

impl Persister {
    /// The best instructions that this processor and operating system allow. They are asked once: a virtual machine may
    /// answer slowly.
    pub fn detect() -> Self {
        static DETECTED: OnceLock<Persister> = OnceLock::new();
        *DETECTED.get_or_init(|| Persister { path: arch::detect() })
    }

    /// Every choice that works on this machine, best first. For tests and measurements.
    pub fn available() -> Vec<Self> {
        arch::available().into_iter().map(|path| Persister { path }).collect()
    }

    /// What was chosen, for people: `"avx512"`, `"avx2"`, `"sse2"`, `"stnp"` or `"memcpy"`.
    pub fn name(&self) -> &'static str {
        arch::name(self.path)
    }

    /// Whether a fence can make stores to persistent memory durable; the portable path cannot.
    pub fn reaches_persistence(&self) -> bool {
        arch::REACHES_PERSISTENCE
    }

    /// Copies `len` bytes so that a later [`Persister::fence`] on this thread makes them durable.
    ///
    /// # Safety
    ///
    /// `src` must be readable and `dst` writable for `len` bytes, and the two must not overlap.
    pub unsafe fn copy_durable(&self, dst: *mut u8, src: *const u8, len: usize) {
        // SAFETY: the caller's promise is exactly what the function asks for.
        unsafe { self.copy::<true>(dst, src, len) }
    }

    /// Copies `len` bytes around the cache; [`Persister::fence`] is needed before another thread may look.
    ///
    /// # Safety
    ///
    /// As [`Persister::copy_durable`].
    pub unsafe fn copy_streaming(&self, dst: *mut u8, src: *const u8, len: usize) {
        // SAFETY: the caller's promise is exactly what the function asks for.
        unsafe { self.copy::<false>(dst, src, len) }
    }

    /// # Safety
    ///
    /// As [`Persister::copy_durable`].
    unsafe fn copy<const DURABLE: bool>(&self, dst: *mut u8, src: *const u8, len: usize) {
        let head = dst.align_offset(LINE_BYTES).min(len);
        let body = (len - head) / LINE_BYTES * LINE_BYTES;
        let tail = len - head - body;
        if head > 0 {
            // SAFETY: the first `head` of the caller's `len` bytes.
            unsafe { self.copy_edge::<DURABLE>(dst, src, head) };
        }
        if body > 0 {
            // SAFETY: `head <= len`, so the result stays in the caller's range.
            let body_dst = unsafe { dst.add(head) };
            // SAFETY: as above.
            let body_src = unsafe { src.add(head) };
            // SAFETY: `body` more bytes of the caller's ranges; `body_dst` is aligned to a line because `head`
            // was cut short only where the whole copy was, and then `body` is 0.
            unsafe { arch::copy_lines::<DURABLE>(self.path, body_dst, body_src, body) };
        }
        if tail > 0 {
            // SAFETY: `head + body <= len`.
            let tail_dst = unsafe { dst.add(head + body) };
            // SAFETY: as above.
            let tail_src = unsafe { src.add(head + body) };
            // SAFETY: the last `tail` of the caller's `len` bytes.
            unsafe { self.copy_edge::<DURABLE>(tail_dst, tail_src, tail) };
        }
    }

    /// Copies less than a line with cached stores.
    ///
    /// # Safety
    ///
    /// As [`Persister::copy_durable`].
    unsafe fn copy_edge<const DURABLE: bool>(&self, dst: *mut u8, src: *const u8, len: usize) {
        // SAFETY: the caller's promise.
        unsafe { std::ptr::copy_nonoverlapping(src, dst, len) };
        if DURABLE {
            // SAFETY: the range was just written.
            unsafe { self.flush_lines(dst, len) };
        }
    }

    /// Starts writing back every cache line that holds a byte of the range; durable after [`Persister::fence`].
    ///
    /// # Safety
    ///
    /// The range must be mapped.
    pub unsafe fn flush_lines(&self, start: *const u8, len: usize) {
        if len > 0 {
            // SAFETY: the caller's promise, and the range is not empty.
            unsafe { arch::flush_lines(self.path, start, len) };
        }
    }

    /// Adds whole blocks to the sums of an XXH3 hash.
    fn hash_blocks(&self, sums: &mut Sums, blocks: &[u8], secret: &Secret) {
        debug_assert!(blocks.len().is_multiple_of(BLOCK_BYTES));
        arch::hash_blocks(self.path, sums, blocks, secret);
    }

    /// The same, while they are copied around the caches as by [`Persister::copy_durable`].
    ///
    /// # Safety
    ///
    /// `dst` must be aligned to a line, writable for the length of `blocks`, and not overlap with them.
    unsafe fn hash_and_copy_blocks(&self, sums: &mut Sums, dst: *mut u8, blocks: &[u8], secret: &Secret) {
        debug_assert!(blocks.len().is_multiple_of(BLOCK_BYTES) && dst.addr().is_multiple_of(LINE_BYTES));
        // SAFETY: the caller's promise.
        if unsafe { arch::hash_and_copy_blocks(self.path, sums, dst, blocks, secret) } {
            return;
        }
        for (index, block) in blocks.chunks_exact(BLOCK_BYTES).enumerate() {
            self.hash_blocks(sums, block, secret);
            // SAFETY: the block's place within the caller's.
            let to = unsafe { dst.add(index * BLOCK_BYTES) };
            // SAFETY: aligned, as blocks are whole lines, and within the caller's ranges.
            unsafe { arch::copy_lines::<true>(self.path, to, block.as_ptr(), BLOCK_BYTES) };
        }
    }

    /// Waits until this thread's earlier copies and flushes have reached the persistent domain, and are visible
    /// to other threads before anything that this thread stores later.
    pub fn fence(&self) {
        arch::fence();
    }
}

#[cfg(test)]
mod tests;
