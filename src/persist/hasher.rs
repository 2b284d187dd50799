//! XXH3-128 of bytes that are copied, in one pass: each byte is loaded once, hashed, and stored around the caches.
//!
//! The algorithm is Y. Collet's XXH3 (<https://github.com/Cyan4973/xxHash>, `doc/xxhash_spec.md`) with seed 0 and the default
//! secret. Its inner loop works on stripes of 64 bytes, and mixes its sums after each block of 16 stripes, so whole blocks are
//! what the loops of this room ([`Persister::hash_blocks`], [`Persister::hash_and_copy_blocks`]) take. Everything else
//! is here, and compared with another implementation at every length that matters.

use twox_hash::xxhash3_128::{SecretBuffer, DEFAULT_SECRET_LENGTH};
use twox_hash::XxHash3_128;

use super::blocks::{accumulate, Secret, Sums, BLOCK_BYTES, STRIPE_BYTES};
use super::{Persister, LINE_BYTES};

const PRIME32_1: u64 = 0x9e37_79b1;
const PRIME32_2: u64 = 0x85eb_ca77;
const PRIME32_3: u64 = 0xc2b2_ae3d;
const PRIME64_1: u64 = 0x9e37_79b1_85eb_ca87;
const PRIME64_2: u64 = 0xc2b2_ae3d_27d4_eb4f;
const PRIME64_3: u64 = 0x1656_67b1_9e37_79f9;
const PRIME64_4: u64 = 0x85eb_ca77_c2b2_ae63;
const PRIME64_5: u64 = 0x27d4_eb2f_1656_67c5;
const PRIME_MX1: u64 = 0x1656_6791_9e37_79f9;

const START: Sums = [PRIME32_3, PRIME64_1, PRIME64_2, PRIME64_3, PRIME64_4, PRIME32_2, PRIME64_5, PRIME32_1];

/// Longest input that the algorithm hashes in another way.
const SHORT_MAX_BYTES: u64 = 240;

/// Where the secret for the last stripe, and for merging the sums into either half, begins.
const LAST_STRIPE_SECRET: usize = DEFAULT_SECRET_LENGTH - STRIPE_BYTES - 7;
const LOW_SECRET: usize = 11;
const HIGH_SECRET: usize = DEFAULT_SECRET_LENGTH - STRIPE_BYTES - 11;

/// Bytes that are hashed and then copied while they are in the first-level cache, where both at once is not possible.
const PIECE_BYTES: usize = 4 * BLOCK_BYTES;

/// XXH3-128 (seed 0) of bytes that arrive in pieces. Allocates nothing: one is made for every chunk.
pub struct ChunkHasher {
    persister: Persister,
    secret: &'static Secret,
    sums: Sums,
    /// The last bytes, at least one if there were any: the end of the input is hashed differently, and whether this is it
    /// shows only later.
    pending: [u8; BLOCK_BYTES],
    pending_bytes: usize,
    /// The bytes before `pending`, for a last stripe that begins there.
    before: [u8; STRIPE_BYTES],
    total_bytes: u64,
}

impl ChunkHasher {
    /// A hasher that has seen nothing.
    pub fn new() -> ChunkHasher {
        ChunkHasher::with(Persister::detect())
    }

    /// The same with a choice of instructions.
    pub fn with(persister: Persister) -> ChunkHasher {
        ChunkHasher {
            persister,
            secret: SecretBuffer::default().into_secret(),
            sums: START,
            pending: [0; BLOCK_BYTES],
            pending_bytes: 0,
            before: [0; STRIPE_BYTES],
            total_bytes: 0,
        }
    }

    /// Adds the next bytes.
    pub fn update(&mut self, bytes: &[u8]) {
        let (head, blocks, tail) = self.divide(bytes.len());
        self.hold(&bytes[..head]);
        if blocks > 0 {
            self.add_pending();
            let blocks = &bytes[head..head + blocks];
            self.persister.hash_blocks(&mut self.sums, blocks, self.secret);
            self.added(blocks);
        }
        self.hold(&bytes[bytes.len() - tail..]);
    }

    /// Adds the next bytes and copies them to `dst` around the caches. [`Persister::fence`] is needed before another thread
    /// may look; with `durable` it also makes the copy durable, as after [`Persister::copy_durable`].
    ///
    /// What is hashed and what is copied can differ if the source changes meanwhile.
    ///
    /// # Safety
    ///
    /// `dst` must be writable for the length of `bytes`, and not overlap with them.
    pub unsafe fn copy(&mut self, dst: *mut u8, bytes: &[u8], durable: bool) {
        let (head, blocks, tail) = self.divide(bytes.len());
        let rest = bytes.len() - tail;
        // SAFETY: the first bytes, by the caller's promise.
        unsafe { self.copy_held(dst, &bytes[..head], durable) };
        if blocks > 0 {
            self.add_pending();
            // SAFETY: `head` is at most the length.
            let to = unsafe { dst.add(head) };
            // SAFETY: the blocks among the caller's bytes.
            unsafe { self.copy_blocks(to, &bytes[head..rest], durable) };
            self.added(&bytes[head..rest]);
        }
        // SAFETY: `rest` is at most the length.
        let to = unsafe { dst.add(rest) };
        // SAFETY: the last bytes, by the caller's promise.
        unsafe { self.copy_held(to, &bytes[rest..], durable) };
    }

    /// # Safety
    ///
    /// As [`ChunkHasher::copy`]; `bytes` are whole blocks.
    unsafe fn copy_blocks(&mut self, dst: *mut u8, bytes: &[u8], durable: bool) {
        if dst.addr().is_multiple_of(LINE_BYTES) {
            // SAFETY: the caller's promise; whole lines leave no edge to write back.
            unsafe { self.persister.hash_and_copy_blocks(&mut self.sums, dst, bytes, self.secret) };
            return;
        }
        for (index, piece) in bytes.chunks(PIECE_BYTES).enumerate() {
            self.persister.hash_blocks(&mut self.sums, piece, self.secret);
            // SAFETY: the piece's place.
            let to = unsafe { dst.add(index * PIECE_BYTES) };
            // SAFETY: as above.
            unsafe { self.copy_only(to, piece, durable) };
        }
    }

    /// # Safety
    ///
    /// As [`ChunkHasher::copy`].
    unsafe fn copy_held(&mut self, dst: *mut u8, bytes: &[u8], durable: bool) {
        self.hold(bytes);
        // SAFETY: the caller's promise.
        unsafe { self.copy_only(dst, bytes, durable) };
    }

    /// # Safety
    ///
    /// As [`ChunkHasher::copy`].
    unsafe fn copy_only(&self, dst: *mut u8, bytes: &[u8], durable: bool) {
        match durable {
            // SAFETY: the caller's promise.
            true => unsafe { self.persister.copy_durable(dst, bytes.as_ptr(), bytes.len()) },
            // SAFETY: as above.
            false => unsafe { self.persister.copy_streaming(dst, bytes.as_ptr(), bytes.len()) },
        }
    }

    /// The hash of all bytes added.
    pub fn finish(&self) -> u128 {
        let pending = &self.pending[..self.pending_bytes];
        if self.total_bytes <= SHORT_MAX_BYTES {
            return XxHash3_128::oneshot(pending);
        }
        let mut sums = self.sums;
        let stripes = pending[..pending.len() - 1].chunks_exact(STRIPE_BYTES);
        for (index, stripe) in stripes.enumerate() {
            accumulate(&mut sums, stripe, &self.secret[index * 8..]);
        }
        let mut last = [0; STRIPE_BYTES];
        let held = pending.len().min(STRIPE_BYTES);
        last[..STRIPE_BYTES - held].copy_from_slice(&self.before[held..]);
        last[STRIPE_BYTES - held..].copy_from_slice(&pending[pending.len() - held..]);
        accumulate(&mut sums, &last, &self.secret[LAST_STRIPE_SECRET..]);
        let total = self.total_bytes;
        let low = merge(&sums, &self.secret[LOW_SECRET..], total.wrapping_mul(PRIME64_1));
        let high = merge(&sums, &self.secret[HIGH_SECRET..], !total.wrapping_mul(PRIME64_2));
        u128::from(high) << 64 | u128::from(low)
    }

    /// How the next `len` bytes are taken: so many to fill up the pending block, then whole blocks, then the rest, of which
    /// there is some if there are whole blocks.
    fn divide(&self, len: usize) -> (usize, usize, usize) {
        let room = if self.pending_bytes == 0 { 0 } else { BLOCK_BYTES - self.pending_bytes };
        let head = room.min(len);
        let blocks = (len - head).saturating_sub(1) / BLOCK_BYTES * BLOCK_BYTES;
        (head, blocks, len - head - blocks)
    }

    /// Keeps bytes until it shows whether they are the last: as many as the pending block has room for, or a block at most
    /// where it is full.
    fn hold(&mut self, bytes: &[u8]) {
        if bytes.is_empty() {
            return;
        }
        if self.pending_bytes == BLOCK_BYTES {
            self.add_pending();
        }
        self.pending[self.pending_bytes..][..bytes.len()].copy_from_slice(bytes);
        self.pending_bytes += bytes.len();
        self.total_bytes += bytes.len() as u64;
    }

    /// The pending block, if there is one, was not the last.
    fn add_pending(&mut self) {
        if self.pending_bytes == BLOCK_BYTES {
            self.persister.hash_blocks(&mut self.sums, &self.pending, self.secret);
            self.before.copy_from_slice(&self.pending[BLOCK_BYTES - STRIPE_BYTES..]);
            self.pending_bytes = 0;
        }
    }

    fn added(&mut self, blocks: &[u8]) {
        self.before.copy_from_slice(&blocks[blocks.len() - STRIPE_BYTES..]);
        self.total_bytes += blocks.len() as u64;
    }
}

impl Default for ChunkHasher {
    fn default() -> ChunkHasher {
        ChunkHasher::new()
    }
}

fn merge(sums: &Sums, secret: &[u8], start: u64) -> u64 {
    let mut hash = start;
    for (pair, secret) in sums.chunks_exact(2).zip(secret.chunks_exact(16)) {
        let factor = |index: usize| {
            let mut word = [0; 8];
            word.copy_from_slice(&secret[index * 8..][..8]);
            u128::from(pair[index] ^ u64::from_le_bytes(word))
        };
        let product = factor(0) * factor(1);
        hash = hash.wrapping_add(product as u64 ^ (product >> 64) as u64);
    }
    hash ^= hash >> 37;
    hash = hash.wrapping_mul(PRIME_MX1);
    hash ^ hash >> 32
}

#[cfg(test)]
mod tests {
    use super::*;

    fn bytes(len: usize) -> Vec<u8> {
        (0..len).map(|i| (i * 131 + i / 251 + i / 70_001) as u8).collect()
    }

    fn persisters() -> Vec<Persister> {
        Persister::available()
    }

    /// Lengths at which something changes: the short inputs' end, stripes, blocks, and runs of blocks.
    fn lengths() -> impl Iterator<Item = usize> {
        let edges = [64, 128, 240, 256, 1024, 1088, 2048, 3072, 4096, 5120, 65_536, 70_000];
        (0..600).chain(edges.into_iter().flat_map(|edge| edge - 2..edge + 3))
    }

    #[test]
    fn every_length_hashes_as_elsewhere_on_every_path() {
        let bytes = bytes(70_100);
        for persister in persisters() {
            for len in lengths() {
                let mut hasher = ChunkHasher::with(persister);
                hasher.update(&bytes[..len]);
                assert_eq!(
                    hasher.finish(),
                    XxHash3_128::oneshot(&bytes[..len]),
                    "{persister:?}, {len} bytes"
                );
            }
        }
    }

    /// Pieces of all kinds of lengths, from a seed.
    fn pieces(mut seed: u64, total: usize) -> Vec<usize> {
        let mut pieces = Vec::new();
        let mut left = total;
        while left > 0 {
            seed = seed.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            let pick = (seed >> 33) as usize;
            let len = match pick % 5 {
                0 => pick / 5 % 70,
                1 => pick / 5 % 1030,
                2 => 1024 * (pick / 5 % 5),
                3 => 1024 * (pick / 5 % 3) + pick / 11 % 3,
                _ => pick / 5 % 9000,
            };
            pieces.push(len.min(left));
            left -= len.min(left);
        }
        pieces
    }

    #[test]
    fn pieces_make_the_same_hash_and_the_same_copy_at_every_alignment() {
        const GUARD: u8 = 0xa5;
        let bytes = bytes(60_000);
        for persister in persisters() {
            for seed in 0..200u64 {
                let total = (seed as usize * 977 + 13) % bytes.len();
                let skew = (seed as usize * 7) % 80;
                let from = &bytes[seed as usize % 64..][..total.min(bytes.len() - 64)];
                let mut arena = vec![GUARD; from.len() + 256];
                let base = arena.as_mut_ptr().align_offset(64) + if seed % 3 == 0 { 0 } else { skew };
                let mut hasher = ChunkHasher::with(persister);
                let mut done = 0;
                for (index, len) in pieces(seed, from.len()).into_iter().enumerate() {
                    let piece = &from[done..done + len];
                    let to = &mut arena[base + done..][..len];
                    match index % 4 {
                        0 => {
                            hasher.update(piece);
                            to.copy_from_slice(piece);
                        }
                        // SAFETY: as long as the piece, and of another vector.
                        kind => unsafe { hasher.copy(to.as_mut_ptr(), piece, kind == 1) },
                    }
                    done += len;
                }
                persister.fence();
                let what = format!("{persister:?}, seed {seed}, {} bytes", from.len());
                assert_eq!(hasher.finish(), XxHash3_128::oneshot(from), "{what}");
                assert!(&arena[base..base + from.len()] == from, "{what}: the copy");
                let around = arena[..base].iter().chain(&arena[base + from.len()..]);
                assert!(around.into_iter().all(|&byte| byte == GUARD), "{what}: beside the copy");
            }
        }
    }

    #[test]
    fn whole_chunks_are_copied_and_hashed_in_one_go() {
        let bytes = bytes((4 << 20) + 4096);
        for persister in persisters() {
            for (skew, len) in [(0, 4 << 20), (4, 4 << 20), (0, (4 << 20) - 1), (63, 1_000_003)] {
                let mut copy = vec![0u8; len + 64];
                let base = copy.as_mut_ptr().align_offset(64);
                let from = &bytes[skew..skew + len];
                let mut hasher = ChunkHasher::with(persister);
                // SAFETY: 63 bytes at most precede the first line, so the room is large enough.
                unsafe { hasher.copy(copy[base..].as_mut_ptr(), from, true) };
                persister.fence();
                assert_eq!(hasher.finish(), XxHash3_128::oneshot(from), "{persister:?}, {skew}, {len}");
                assert!(&copy[base..base + len] == from, "{persister:?}, {skew}, {len}");
            }
        }
    }
}
