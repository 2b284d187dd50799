//! AArch64: STNP stores, DC CVAP (or CVAC) to clean lines, DSB to wait for them.
//!
//! STNP is only a hint: the bytes may stay in the cache. So a durable copy cleans what it has stored.

use std::arch::asm;

pub(super) use super::blocks::{hash_and_copy_blocks, hash_blocks};

/// DC CVAP cleans to the point of persistence; without it DC CVAC cleans to the point of coherency, which is the
/// persistent domain of the machines that lack the former.
pub(super) const REACHES_PERSISTENCE: bool = true;

/// Bytes stored per turn of the loop.
const TURN_BYTES: usize = 64;

/// Instruction that cleans a cache line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Path {
    /// To the point of persistence.
    Cvap,
    /// To the point of coherency.
    Cvac,
}

pub(super) fn detect() -> Path {
    available()[0]
}

pub(super) fn available() -> Vec<Path> {
    let mut paths = Vec::new();
    if std::arch::is_aarch64_feature_detected!("dpb") {
        paths.push(Path::Cvap);
    }
    paths.push(Path::Cvac);
    paths
}

pub(super) fn name(_path: Path) -> &'static str {
    "stnp"
}

/// # Safety
///
/// `len` a positive multiple of 64; ranges valid and disjoint.
pub(super) unsafe fn copy_lines<const DURABLE: bool>(path: Path, dst: *mut u8, src: *const u8, len: usize) {
    debug_assert!(len % TURN_BYTES == 0, "whole lines only");
    // SAFETY: reads `len` bytes at `src` and writes as many at `dst`, both the caller's.
    unsafe {
        asm!(
            "2:",
            "ldp {a:q}, {b:q}, [{src}]",
            "ldp {c:q}, {d:q}, [{src}, #32]",
            "stnp {a:q}, {b:q}, [{dst}]",
            "stnp {c:q}, {d:q}, [{dst}, #32]",
            "add {src}, {src}, #64",
            "add {dst}, {dst}, #64",
            "subs {left}, {left}, #64",
            "b.ne 2b",
            src = inout(reg) src => _,
            dst = inout(reg) dst => _,
            left = inout(reg) len => _,
            a = out(vreg) _,
            b = out(vreg) _,
            c = out(vreg) _,
            d = out(vreg) _,
            options(nostack),
        );
    }
    if DURABLE {
        // SAFETY: the range was just written.
        unsafe { flush_lines(path, dst, len) };
    }
}

/// The processor's smallest data cache line.
fn line_bytes() -> usize {
    let ctr: u64;
    // SAFETY: Linux lets every program read this register.
    unsafe { asm!("mrs {}, ctr_el0", out(reg) ctr, options(nomem, nostack, preserves_flags)) };
    4usize << ((ctr >> 16) & 0xf)
}

/// # Safety
///
/// The range is mapped and not empty, `path` available.
pub(super) unsafe fn flush_lines(path: Path, start: *const u8, len: usize) {
    let line_bytes = line_bytes();
    let skew = start.addr() % line_bytes;
    let first = start.wrapping_sub(skew);
    for offset in (0..skew + len).step_by(line_bytes) {
        let line = first.wrapping_add(offset);
        match path {
            // The numeric form of DC CVAP assembles also where the compiler's target lacks the extension.
            // SAFETY: the line holds a byte of the caller's mapped range.
            Path::Cvap => unsafe {
                asm!("sys #3, c7, c12, #1, {}", in(reg) line, options(nostack, preserves_flags))
            },
            // SAFETY: as above.
            Path::Cvac => unsafe { asm!("dc cvac, {}", in(reg) line, options(nostack, preserves_flags)) },
        }
    }
}

pub(super) fn fence() {
    // SAFETY: waits for stores and cleans; touches nothing. Not `nomem`, so that the compiler moves no store
    // across it.
    unsafe { asm!("dsb sy", options(nostack, preserves_flags)) };
}
