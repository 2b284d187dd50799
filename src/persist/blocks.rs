//! XXH3's inner loop, as far as it is the same on every processor. The compiler makes vector code of it where the processor
//! is sure to have vectors.

use twox_hash::xxhash3_128::DEFAULT_SECRET_LENGTH;

/// Bytes that the inner loop takes at a time.
pub(super) const STRIPE_BYTES: usize = 64;

/// Bytes after which the sums are mixed; with the default secret.
pub(super) const BLOCK_BYTES: usize = 1024;
const _: () = assert!(BLOCK_BYTES == (DEFAULT_SECRET_LENGTH - STRIPE_BYTES) / 8 * STRIPE_BYTES);

/// Where the secret for mixing begins.
pub(super) const MIX_SECRET: usize = DEFAULT_SECRET_LENGTH - STRIPE_BYTES;

pub(super) const MIX_PRIME: u64 = 0x9e37_79b1;

/// The sums of one hash.
pub type Sums = [u64; 8];

/// The default secret.
pub type Secret = [u8; DEFAULT_SECRET_LENGTH];

/// Adds whole blocks.
#[inline(always)]
pub(super) fn add_blocks(sums: &mut Sums, blocks: &[u8], secret: &Secret) {
    for block in blocks.chunks_exact(BLOCK_BYTES) {
        for (index, stripe) in block.chunks_exact(STRIPE_BYTES).enumerate() {
            accumulate(sums, stripe, &secret[index * 8..]);
        }
        for (sum, secret) in sums.iter_mut().zip(words(&secret[MIX_SECRET..])) {
            *sum = (*sum ^ *sum >> 47 ^ secret).wrapping_mul(MIX_PRIME);
        }
    }
}

/// Adds one stripe.
#[inline(always)]
pub(super) fn accumulate(sums: &mut Sums, stripe: &[u8], secret: &[u8]) {
    let mut products = [0u64; 8];
    let mut swapped = [0u64; 8];
    for (index, (word, secret)) in words(stripe).zip(words(secret)).enumerate() {
        let keyed = word ^ secret;
        products[index] = (keyed & 0xffff_ffff) * (keyed >> 32);
        swapped[index ^ 1] = word;
    }
    for index in 0..8 {
        sums[index] = sums[index].wrapping_add(products[index]).wrapping_add(swapped[index]);
    }
}

#[inline(always)]
fn words(bytes: &[u8]) -> impl Iterator<Item = u64> + '_ {
    bytes[..STRIPE_BYTES].chunks_exact(8).map(|word| {
        let mut array = [0; 8];
        array.copy_from_slice(word);
        u64::from_le_bytes(array)
    })
}

#[cfg(any(pcc_portable, not(target_arch = "x86_64")))]
pub(super) use plain::{hash_and_copy_blocks, hash_blocks};

/// What architectures without loops of their own have.
#[cfg(any(pcc_portable, not(target_arch = "x86_64")))]
mod plain {
    use super::{add_blocks, Secret, Sums};

    /// Adds whole blocks to the sums.
    pub(in super::super) fn hash_blocks<P>(_path: P, sums: &mut Sums, blocks: &[u8], secret: &Secret) {
        add_blocks(sums, blocks, secret);
    }

    /// There is no loop that does both.
    ///
    /// # Safety
    ///
    /// None needed: the contract is that of other architectures.
    pub(in super::super) unsafe fn hash_and_copy_blocks<P>(
        _path: P,
        _sums: &mut Sums,
        _dst: *mut u8,
        _blocks: &[u8],
        _secret: &Secret,
    ) -> bool {
        false
    }
}
