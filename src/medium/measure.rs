//! Which of `direct` and `mmap` is faster here: on NVMe `direct`, on some network file systems by far `mmap`.

use std::path::Path;
use std::time::Instant;

use super::aligned::AlignedBuffer;
use super::direct::{Direct, IoBackend};
use super::file::RegionFile;
use super::mapped::Mapped;
use super::open::PreferredHint;
use super::{Barrier, Medium};
use crate::error::{Error, ErrorKind, Result};
use crate::format::BLOCK_BYTES;

/// Bytes of one blocking write.
const PIECE_BYTES: usize = 8 << 20;

/// A transparent huge page: memory in such pages is twice as fast a source for O_DIRECT.
const HUGE_PAGE_BYTES: usize = 2 << 20;

/// Measurements of each medium; the best of each counts.
const ROUNDS: usize = 2;

/// Times that the range is written: once to begin with, then by either medium in each round.
const PASSES: u64 = 1 + 2 * ROUNDS as u64;

/// Most bytes that measuring writes in all, however large the region: a slot may have hundreds of gigabytes.
const MEASURE_BYTES: u64 = 64 << 20;

/// What was measured, in bytes per second, durable.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Measured {
    /// O_DIRECT; 0 where it is refused.
    pub direct_bytes_per_s: f64,
    /// Shared mapping and msync.
    pub mmap_bytes_per_s: f64,
    /// The faster of the two.
    pub preferred: PreferredHint,
}

/// Overwrites at most `len` bytes of the region from `offset` (both multiples of 4 KiB) with a pattern, several times,
/// through each medium, and tells which made them durable sooner. Writes 64 MiB in all at most. For a
/// freshly formatted region: what was there is lost. The lock is not taken: the caller holds it, or is the only one to
/// know of the file.
pub fn measure_preferred(path: &Path, offset: u64, len: u64) -> Result<Measured> {
    if len == 0 || !len.is_multiple_of(BLOCK_BYTES) || !offset.is_multiple_of(BLOCK_BYTES) {
        let message =
            format!("expected whole blocks of {BLOCK_BYTES} bytes, found {len} bytes from {offset}");
        return Err(Error::new(ErrorKind::InvalidArgument, "measure", message).at_path(path));
    }
    let len = len.min(MEASURE_BYTES / PASSES / BLOCK_BYTES * BLOCK_BYTES);
    let mut pattern =
        AlignedBuffer::new(PIECE_BYTES.min(usize::try_from(len).unwrap_or(PIECE_BYTES)), HUGE_PAGE_BYTES)?;
    fill(&mut pattern);
    let direct = RegionFile::open_unlocked(path)
        .and_then(|file| Direct::new(file, None, IoBackend::Threads, 1, 1))
        .map(Some)
        .or_else(|error| if error.kind() == ErrorKind::Unsupported { Ok(None) } else { Err(error) })?;
    let mmap = Mapped::mmap(RegionFile::open_unlocked(path)?)?;
    let (mut by_direct, mut by_mmap) = (0.0, 0.0);
    if let Some(direct) = &direct {
        // The first writing of preallocated blocks is slower; the first medium must not pay for both.
        bytes_per_s(direct, offset, len, &pattern)?;
    }
    for _ in 0..ROUNDS {
        if let Some(direct) = &direct {
            by_direct = f64::max(by_direct, bytes_per_s(direct, offset, len, &pattern)?);
        }
        by_mmap = f64::max(by_mmap, bytes_per_s(&mmap, offset, len, &pattern)?);
    }
    let preferred = if by_direct >= by_mmap { PreferredHint::Direct } else { PreferredHint::Mmap };
    Ok(Measured { direct_bytes_per_s: by_direct, mmap_bytes_per_s: by_mmap, preferred })
}

fn bytes_per_s(medium: &dyn Medium, offset: u64, len: u64, pattern: &[u8]) -> Result<f64> {
    let began = Instant::now();
    let mut done = 0;
    while done < len {
        let piece = (len - done).min(pattern.len() as u64);
        medium.copy(offset + done, &pattern[..piece as usize])?;
        done += piece;
    }
    medium.fence(Barrier::Payload)?;
    medium.persist(offset, len, Barrier::Payload)?;
    Ok(len as f64 / began.elapsed().as_secs_f64())
}

/// Bytes that no storage can compress away (xorshift).
fn fill(pattern: &mut [u8]) {
    let mut state: u64 = 0x9e37_79b9_7f4a_7c15;
    for word in pattern.chunks_exact_mut(8) {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        word.copy_from_slice(&state.to_le_bytes());
    }
}
