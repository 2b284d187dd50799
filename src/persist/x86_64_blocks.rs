//! XXH3's inner loop with wide registers, alone or while the bytes are stored around the caches.
//!
//! With AVX-512 both are one loop: a stripe is one register, loaded once. Each turn asks for the line 8 KiB ahead to be
//! brought into the second-level cache, so that the memory is not idle while the processor computes, and for the one 1 KiB
//! ahead to come from there into the first (docs/performance.md has what that is worth). A prefetch beyond the source
//! is harmless: it never faults.

use std::arch::asm;

use super::super::blocks::{add_blocks, Secret, Sums, BLOCK_BYTES, MIX_PRIME};
use super::{Path, Width};

const AHEAD_BYTES: usize = 8 << 10;

/// Adds whole blocks to the sums.
pub(in super::super) fn hash_blocks(path: Path, sums: &mut Sums, blocks: &[u8], secret: &Secret) {
    if blocks.is_empty() {
        return;
    }
    match path.width {
        // SAFETY: the path is available, so the processor has AVX-512F; the slice is whole blocks, at least one.
        Width::Avx512 => unsafe {
            blocks_avx512::<false>(sums, std::ptr::null_mut(), blocks.as_ptr(), blocks.len(), secret)
        },
        // SAFETY: the path is available, so the processor has AVX2.
        Width::Avx2 => unsafe { blocks_avx2(sums, blocks, secret) },
        Width::Sse2 => add_blocks(sums, blocks, secret),
    }
}

/// Adds whole blocks to the sums and stores them around the caches, if there is one loop for both; false where not.
///
/// # Safety
///
/// `dst` aligned to a line and writable for the length of `blocks`, and distinct from it; `path` available.
pub(in super::super) unsafe fn hash_and_copy_blocks(
    path: Path,
    sums: &mut Sums,
    dst: *mut u8,
    blocks: &[u8],
    secret: &Secret,
) -> bool {
    if path.width != Width::Avx512 {
        return false;
    }
    if !blocks.is_empty() {
        // SAFETY: as in `hash_blocks`, and the caller's promise.
        unsafe { blocks_avx512::<true>(sums, dst, blocks.as_ptr(), blocks.len(), secret) };
    }
    true
}

/// # Safety
///
/// AVX2.
#[target_feature(enable = "avx2")]
unsafe fn blocks_avx2(sums: &mut Sums, blocks: &[u8], secret: &Secret) {
    for block in blocks.chunks_exact(BLOCK_BYTES) {
        for line in (0..BLOCK_BYTES).step_by(64) {
            let ahead = block.as_ptr().wrapping_add(AHEAD_BYTES + line);
            // SAFETY: a hint, which never faults.
            unsafe { asm!("prefetcht1 [{}]", in(reg) ahead, options(nostack, preserves_flags, readonly)) };
        }
        add_blocks(sums, block, secret);
    }
}

/// One stripe: load, store, multiply, add. `$at` is its offset, `$key` that of its secret.
macro_rules! stripe {
    ($at:literal, $key:literal, $store:expr) => {
        concat!(
            "prefetcht1 [rsi + 8192 + ",
            $at,
            "]\n",
            "prefetcht0 [rsi + 1024 + ",
            $at,
            "]\n",
            "vmovdqu64 zmm1, [rsi + ",
            $at,
            "]\n",
            $store,
            "vpxorq zmm2, zmm1, [rdx + ",
            $key,
            "]\n",
            "vpshufd zmm1, zmm1, 0x4e\n",
            "vpsrlq zmm3, zmm2, 32\n",
            "vpmuludq zmm2, zmm2, zmm3\n",
            "vpaddq zmm1, zmm1, zmm2\n",
            "vpaddq zmm0, zmm0, zmm1\n",
        )
    };
}

/// All stripes of a block, and the mixing of the sums. `$store` is applied to each stripe's offset.
macro_rules! block {
    ($stripe:ident) => {
        concat!(
            $stripe!("0", "0"),
            $stripe!("64", "8"),
            $stripe!("128", "16"),
            $stripe!("192", "24"),
            $stripe!("256", "32"),
            $stripe!("320", "40"),
            $stripe!("384", "48"),
            $stripe!("448", "56"),
            $stripe!("512", "64"),
            $stripe!("576", "72"),
            $stripe!("640", "80"),
            $stripe!("704", "88"),
            $stripe!("768", "96"),
            $stripe!("832", "104"),
            $stripe!("896", "112"),
            $stripe!("960", "120"),
            "vpsrlq zmm1, zmm0, 47\n",
            "vpxorq zmm0, zmm0, zmm1\n",
            "vpxorq zmm0, zmm0, [rdx + 128]\n",
            "vpsrlq zmm1, zmm0, 32\n",
            "vpmuludq zmm0, zmm0, zmm4\n",
            "vpmuludq zmm1, zmm1, zmm4\n",
            "vpsllq zmm1, zmm1, 32\n",
            "vpaddq zmm0, zmm0, zmm1\n",
        )
    };
}

macro_rules! hashed {
    ($at:literal, $key:literal) => {
        stripe!($at, $key, "")
    };
}

macro_rules! stored {
    ($at:literal, $key:literal) => {
        stripe!($at, $key, concat!("vmovntdq [rdi + ", $at, "], zmm1\n"))
    };
}

/// The loop over blocks, with or without the stores.
macro_rules! blocks_loop {
    ($stripe:ident, $sums:expr, $dst:expr, $src:expr, $len:expr, $secret:expr) => {
        asm!(
            "vmovdqu64 zmm0, [rax]",
            "vpbroadcastq zmm4, r8",
            "2:",
            block!($stripe),
            "add rsi, 1024",
            "add rdi, 1024",
            "sub rcx, 1024",
            "jnz 2b",
            "vmovdqu64 [rax], zmm0",
            "vzeroupper",
            inout("rax") $sums.as_mut_ptr() => _,
            inout("rdx") $secret.as_ptr() => _,
            inout("r8") MIX_PRIME => _,
            inout("rdi") $dst => _,
            inout("rsi") $src => _,
            inout("rcx") $len => _,
            clobber_abi("sysv64"),
            options(nostack),
        )
    };
}

/// # Safety
///
/// AVX-512F; `len` a positive number of blocks; `src` readable and, with `STORE`, `dst` writable for it, aligned to a line,
/// and distinct.
unsafe fn blocks_avx512<const STORE: bool>(
    sums: &mut Sums,
    dst: *mut u8,
    src: *const u8,
    len: usize,
    secret: &Secret,
) {
    // The memory operands of the secret end at byte 128 + 64, which is its length.
    const _: () = assert!(size_of::<Secret>() == 192 && BLOCK_BYTES == 1024 && AHEAD_BYTES == 8192);
    match STORE {
        // SAFETY: reads `len` bytes at `src`, the sums and the secret; writes `len` bytes at `dst` and the sums, all the
        // caller's. All vector registers are declared as lost.
        true => unsafe { blocks_loop!(stored, sums, dst, src, len, secret) },
        // SAFETY: as above, but nothing is written at `dst`.
        false => unsafe { blocks_loop!(hashed, sums, dst, src, len, secret) },
    }
}
