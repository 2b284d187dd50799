//! Any other architecture: ordinary copies. Nothing here can make a store to persistent memory durable.

pub(super) use super::blocks::{hash_and_copy_blocks, hash_blocks};
use crate::sync::atomic::{fence as memory_fence, Ordering};

/// No instruction is known that reaches persistence, so the `dax` medium is refused.
pub(super) const REACHES_PERSISTENCE: bool = false;

/// There is nothing to choose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Path;

pub(super) fn detect() -> Path {
    Path
}

pub(super) fn available() -> Vec<Path> {
    vec![Path]
}

pub(super) fn name(_path: Path) -> &'static str {
    "memcpy"
}

/// # Safety
///
/// Ranges valid and disjoint.
pub(super) unsafe fn copy_lines<const DURABLE: bool>(_path: Path, dst: *mut u8, src: *const u8, len: usize) {
    // SAFETY: the caller's promise.
    unsafe { std::ptr::copy_nonoverlapping(src, dst, len) };
}

/// # Safety
///
/// None needed: the contract is the other architectures'.
pub(super) unsafe fn flush_lines(_path: Path, _start: *const u8, _len: usize) {}

pub(super) fn fence() {
    // Pairs with the acquire by which another thread learns that the copy ended.
    memory_fence(Ordering::SeqCst);
}
