//! x86-64: MOVNT stores of 64, 32 or 16 bytes; CLWB, CLFLUSHOPT or CLFLUSH; SFENCE.
//!
//! The loops are assembly rather than intrinsics: the AVX-512 intrinsics are newer than the oldest supported
//! compiler, and the compiler gives no meaning of its own to non-temporal stores. Each turn prefetches 1 KiB ahead:
//! without it the hardware's prefetcher starts too late in the wide loops (9 instead of 13 GB/s measured). A
//! prefetch beyond the source is harmless: it never faults.

#[path = "x86_64_blocks.rs"]
mod blocks;

use std::arch::asm;
use std::arch::x86_64::{__cpuid, __cpuid_count};

pub(super) use blocks::{hash_and_copy_blocks, hash_blocks};

/// SFENCE waits for non-temporal stores and write-backs to reach the persistent (ADR) domain.
pub(super) const REACHES_PERSISTENCE: bool = true;

/// Bytes of a cache line on every x86-64 processor.
const LINE_BYTES: usize = 64;

/// Bytes copied per turn of the unrolled loops.
const TURN_BYTES: usize = 256;

/// Width of the stores.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Width {
    Avx512,
    Avx2,
    Sse2,
}

/// Instruction that writes a cache line back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Flush {
    /// Keeps the line in the cache.
    Clwb,
    /// Evicts the line; not ordered with other flushes.
    ClflushOpt,
    /// Evicts the line; on every processor.
    Clflush,
}

/// The instructions in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Path {
    width: Width,
    flush: Flush,
}

pub(super) fn detect() -> Path {
    Path { width: widths()[0], flush: flushes()[0] }
}

/// Every width with the best flush, then the best width with every other flush.
pub(super) fn available() -> Vec<Path> {
    let best = detect();
    let widths = widths().into_iter().map(|width| Path { width, ..best });
    let flushes = flushes().into_iter().skip(1).map(|flush| Path { flush, ..best });
    widths.chain(flushes).collect()
}

pub(super) fn name(path: Path) -> &'static str {
    match path.width {
        Width::Avx512 => "avx512",
        Width::Avx2 => "avx2",
        Width::Sse2 => "sse2",
    }
}

fn widths() -> Vec<Width> {
    let mut widths = Vec::new();
    // These also ask the operating system whether it saves the wide registers.
    if std::is_x86_feature_detected!("avx512f") {
        widths.push(Width::Avx512);
    }
    if std::is_x86_feature_detected!("avx2") {
        widths.push(Width::Avx2);
    }
    widths.push(Width::Sse2);
    widths
}

/// The standard library cannot tell of these two, so the processor is asked: leaf 7, EBX bits 23 and 24.
#[expect(clippy::allow_attributes, reason = "CPUID became a safe function in a later compiler")]
fn flushes() -> Vec<Flush> {
    const EXTENDED_FEATURES: u32 = 7;
    const CLFLUSHOPT_BIT: u32 = 1 << 23;
    const CLWB_BIT: u32 = 1 << 24;
    #[allow(unused_unsafe)]
    // SAFETY: every x86-64 processor has CPUID.
    let max_leaf = unsafe { __cpuid(0) }.eax;
    let ebx = if max_leaf >= EXTENDED_FEATURES {
        #[allow(unused_unsafe)]
        // SAFETY: the leaf exists.
        let leaf = unsafe { __cpuid_count(EXTENDED_FEATURES, 0) };
        leaf.ebx
    } else {
        0
    };
    let mut flushes = Vec::new();
    if ebx & CLWB_BIT != 0 {
        flushes.push(Flush::Clwb);
    }
    if ebx & CLFLUSHOPT_BIT != 0 {
        flushes.push(Flush::ClflushOpt);
    }
    flushes.push(Flush::Clflush);
    flushes
}

/// Copies whole lines by non-temporal stores. They bypass the cache, so there is nothing to flush.
///
/// # Safety
///
/// `dst` aligned to a line; `len` a multiple of one and not 0; `path` available; ranges valid and disjoint.
pub(super) unsafe fn copy_lines<const DURABLE: bool>(path: Path, dst: *mut u8, src: *const u8, len: usize) {
    let turns = len / TURN_BYTES * TURN_BYTES;
    if turns > 0 {
        match path.width {
            // SAFETY: the caller's promise; `turns` is a positive multiple of TURN_BYTES within `len`.
            Width::Avx512 => unsafe { turns_avx512(dst, src, turns) },
            // SAFETY: as above.
            Width::Avx2 => unsafe { turns_avx2(dst, src, turns) },
            // SAFETY: as above.
            Width::Sse2 => unsafe { turns_sse2(dst, src, turns) },
        }
    }
    let rest = len - turns;
    if rest > 0 {
        // SAFETY: `turns <= len`.
        let dst = unsafe { dst.add(turns) };
        // SAFETY: as above.
        let src = unsafe { src.add(turns) };
        // SAFETY: the rest of the caller's ranges, a positive multiple of a line.
        unsafe { lines_sse2(dst, src, rest) };
    }
}

/// # Safety
///
/// AVX-512F; `dst` aligned to 64; `len` a positive multiple of TURN_BYTES; ranges valid and disjoint.
unsafe fn turns_avx512(dst: *mut u8, src: *const u8, len: usize) {
    // SAFETY: reads `len` bytes at `src` and writes as many at `dst`, both the caller's; all vector registers are
    // declared as lost (VZEROUPPER touches more than the four named).
    unsafe {
        asm!(
            "2:",
            "prefetcht0 [rsi + 1024]",
            "prefetcht0 [rsi + 1088]",
            "prefetcht0 [rsi + 1152]",
            "prefetcht0 [rsi + 1216]",
            "vmovups zmm0, [rsi]",
            "vmovups zmm1, [rsi + 64]",
            "vmovups zmm2, [rsi + 128]",
            "vmovups zmm3, [rsi + 192]",
            "vmovntps [rdi], zmm0",
            "vmovntps [rdi + 64], zmm1",
            "vmovntps [rdi + 128], zmm2",
            "vmovntps [rdi + 192], zmm3",
            "add rsi, 256",
            "add rdi, 256",
            "sub rcx, 256",
            "jnz 2b",
            "vzeroupper",
            inout("rdi") dst => _,
            inout("rsi") src => _,
            inout("rcx") len => _,
            clobber_abi("sysv64"),
            options(nostack),
        );
    }
}

/// # Safety
///
/// AVX2; `dst` aligned to 32; `len` a positive multiple of TURN_BYTES; ranges valid and disjoint.
unsafe fn turns_avx2(dst: *mut u8, src: *const u8, len: usize) {
    // SAFETY: as in `turns_avx512`.
    unsafe {
        asm!(
            "2:",
            "prefetcht0 [rsi + 1024]",
            "prefetcht0 [rsi + 1088]",
            "prefetcht0 [rsi + 1152]",
            "prefetcht0 [rsi + 1216]",
            "vmovups ymm0, [rsi]",
            "vmovups ymm1, [rsi + 32]",
            "vmovups ymm2, [rsi + 64]",
            "vmovups ymm3, [rsi + 96]",
            "vmovups ymm4, [rsi + 128]",
            "vmovups ymm5, [rsi + 160]",
            "vmovups ymm6, [rsi + 192]",
            "vmovups ymm7, [rsi + 224]",
            "vmovntps [rdi], ymm0",
            "vmovntps [rdi + 32], ymm1",
            "vmovntps [rdi + 64], ymm2",
            "vmovntps [rdi + 96], ymm3",
            "vmovntps [rdi + 128], ymm4",
            "vmovntps [rdi + 160], ymm5",
            "vmovntps [rdi + 192], ymm6",
            "vmovntps [rdi + 224], ymm7",
            "add rsi, 256",
            "add rdi, 256",
            "sub rcx, 256",
            "jnz 2b",
            "vzeroupper",
            inout("rdi") dst => _,
            inout("rsi") src => _,
            inout("rcx") len => _,
            clobber_abi("sysv64"),
            options(nostack),
        );
    }
}

/// # Safety
///
/// `dst` aligned to 16; `len` a positive multiple of TURN_BYTES; ranges valid and disjoint.
unsafe fn turns_sse2(dst: *mut u8, src: *const u8, len: usize) {
    // SAFETY: as in `turns_avx512`; SSE2 is part of x86-64.
    unsafe {
        asm!(
            "2:",
            "prefetcht0 [rsi + 1024]",
            "prefetcht0 [rsi + 1088]",
            "prefetcht0 [rsi + 1152]",
            "prefetcht0 [rsi + 1216]",
            "movups xmm0, [rsi]",
            "movups xmm1, [rsi + 16]",
            "movups xmm2, [rsi + 32]",
            "movups xmm3, [rsi + 48]",
            "movups xmm4, [rsi + 64]",
            "movups xmm5, [rsi + 80]",
            "movups xmm6, [rsi + 96]",
            "movups xmm7, [rsi + 112]",
            "movups xmm8, [rsi + 128]",
            "movups xmm9, [rsi + 144]",
            "movups xmm10, [rsi + 160]",
            "movups xmm11, [rsi + 176]",
            "movups xmm12, [rsi + 192]",
            "movups xmm13, [rsi + 208]",
            "movups xmm14, [rsi + 224]",
            "movups xmm15, [rsi + 240]",
            "movntps [rdi], xmm0",
            "movntps [rdi + 16], xmm1",
            "movntps [rdi + 32], xmm2",
            "movntps [rdi + 48], xmm3",
            "movntps [rdi + 64], xmm4",
            "movntps [rdi + 80], xmm5",
            "movntps [rdi + 96], xmm6",
            "movntps [rdi + 112], xmm7",
            "movntps [rdi + 128], xmm8",
            "movntps [rdi + 144], xmm9",
            "movntps [rdi + 160], xmm10",
            "movntps [rdi + 176], xmm11",
            "movntps [rdi + 192], xmm12",
            "movntps [rdi + 208], xmm13",
            "movntps [rdi + 224], xmm14",
            "movntps [rdi + 240], xmm15",
            "add rsi, 256",
            "add rdi, 256",
            "sub rcx, 256",
            "jnz 2b",
            inout("rdi") dst => _,
            inout("rsi") src => _,
            inout("rcx") len => _,
            clobber_abi("sysv64"),
            options(nostack),
        );
    }
}

/// The last lines of every width: at most three.
///
/// # Safety
///
/// `dst` aligned to 16; `len` a positive multiple of a line; ranges valid and disjoint.
unsafe fn lines_sse2(dst: *mut u8, src: *const u8, len: usize) {
    // SAFETY: as in `turns_sse2`.
    unsafe {
        asm!(
            "2:",
            "movups xmm0, [rsi]",
            "movups xmm1, [rsi + 16]",
            "movups xmm2, [rsi + 32]",
            "movups xmm3, [rsi + 48]",
            "movntps [rdi], xmm0",
            "movntps [rdi + 16], xmm1",
            "movntps [rdi + 32], xmm2",
            "movntps [rdi + 48], xmm3",
            "add rsi, 64",
            "add rdi, 64",
            "sub rcx, 64",
            "jnz 2b",
            inout("rdi") dst => _,
            inout("rsi") src => _,
            inout("rcx") len => _,
            clobber_abi("sysv64"),
            options(nostack),
        );
    }
}

/// # Safety
///
/// The range is mapped and not empty, `path` available.
pub(super) unsafe fn flush_lines(path: Path, start: *const u8, len: usize) {
    let skew = start.addr() % LINE_BYTES;
    let first = start.wrapping_sub(skew);
    for offset in (0..skew + len).step_by(LINE_BYTES) {
        let line = first.wrapping_add(offset);
        match path.flush {
            // SAFETY: the line holds a byte of the caller's mapped range. (No stack, no flags, no registers.)
            Flush::Clwb => unsafe { asm!("clwb [{}]", in(reg) line, options(nostack, preserves_flags)) },
            // SAFETY: as above.
            Flush::ClflushOpt => unsafe {
                asm!("clflushopt [{}]", in(reg) line, options(nostack, preserves_flags))
            },
            // SAFETY: as above.
            Flush::Clflush => unsafe {
                asm!("clflush [{}]", in(reg) line, options(nostack, preserves_flags))
            },
        }
    }
}

pub(super) fn fence() {
    // SAFETY: orders stores; touches nothing. Not `nomem`, so that the compiler moves no store across it.
    unsafe { asm!("sfence", options(nostack, preserves_flags)) };
}
