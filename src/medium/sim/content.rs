//! Sparse, copy-on-write bytes: a region of many MiB costs only the blocks that were ever written.

use std::collections::BTreeMap;

use twox_hash::XxHash3_64;

use super::image::Image;
use crate::format::BLOCK_BYTES;
use crate::sync::Arc;

/// Size of one block in bytes, as an index.
pub(super) const BLOCK: usize = BLOCK_BYTES as usize;

static ZERO_BLOCK: [u8; BLOCK] = [0; BLOCK];

/// The bytes of one block: a part of a shared copy, or zeros that were never written.
#[derive(Clone, Default)]
pub(super) struct BlockBytes(Option<(Arc<[u8]>, usize)>);

impl BlockBytes {
    /// The block that begins at byte `at` of `data`.
    pub(super) fn part_of(data: &Arc<[u8]>, at: usize) -> Self {
        BlockBytes(Some((Arc::clone(data), at)))
    }

    /// A block of its own.
    pub(super) fn owned(bytes: [u8; BLOCK]) -> Self {
        BlockBytes(Some((Arc::from(bytes.as_slice()), 0)))
    }

    /// All bytes of the block.
    pub(super) fn bytes(&self) -> &[u8] {
        match &self.0 {
            Some((data, at)) => &data[*at..*at + BLOCK],
            None => &ZERO_BLOCK,
        }
    }

    /// A copy that can be changed.
    pub(super) fn to_array(&self) -> [u8; BLOCK] {
        let mut array = [0; BLOCK];
        array.copy_from_slice(self.bytes());
        array
    }

    /// Contribution of this block at `index` to a digest of a whole region; zeros contribute nothing, so that
    /// a block never written and a block written with zeros are the same.
    pub(super) fn digest(&self, index: u64) -> u64 {
        if self.0.is_none() || self.bytes() == ZERO_BLOCK {
            return 0;
        }
        XxHash3_64::oneshot_with_seed(index.wrapping_add(1), self.bytes())
    }
}

/// A region's bytes: blocks of its own over an optional crash image.
#[derive(Clone, Default)]
pub(super) struct Content {
    under: Option<Arc<Image>>,
    blocks: Arc<BTreeMap<u64, BlockBytes>>,
    /// How the digest differs from that of `under`.
    digest_change: u64,
}

impl Content {
    /// What `image` holds, copied when written.
    pub(super) fn over(image: Arc<Image>) -> Self {
        Content { under: Some(image), blocks: Arc::default(), digest_change: 0 }
    }

    /// The block at `index`.
    pub(super) fn get(&self, index: u64) -> BlockBytes {
        match (self.blocks.get(&index), &self.under) {
            (Some(block), _) => block.clone(),
            (None, Some(image)) => image.block(index),
            (None, None) => BlockBytes::default(),
        }
    }

    /// Replaces the block at `index`.
    pub(super) fn set(&mut self, index: u64, block: BlockBytes) {
        self.digest_change ^= self.get(index).digest(index) ^ block.digest(index);
        Arc::make_mut(&mut self.blocks).insert(index, block);
    }

    /// Equal for equal bytes.
    pub(super) fn digest(&self) -> u64 {
        self.digest_change ^ self.under.as_ref().map_or(0, |image| image.fingerprint())
    }
}

/// Fills `dst` from byte `offset` of a region whose blocks `block` returns.
pub(super) fn read_blocks(offset: u64, dst: &mut [u8], block: impl Fn(u64) -> BlockBytes) {
    let mut done = 0;
    while done < dst.len() {
        let at = offset + done as u64;
        let within = (at % BLOCK_BYTES) as usize;
        let count = (BLOCK - within).min(dst.len() - done);
        dst[done..done + count].copy_from_slice(&block(at / BLOCK_BYTES).bytes()[within..within + count]);
        done += count;
    }
}

/// The blocks that a byte range touches.
pub(super) fn blocks_of(offset: u64, len: u64) -> std::ops::Range<u64> {
    offset / BLOCK_BYTES..(offset + len).div_ceil(BLOCK_BYTES)
}

/// A well-mixed function of two numbers: the only source of chance here, so that a seed repeats a run.
pub(super) fn mix(seed: u64, value: u64) -> u64 {
    let mut z = seed ^ value.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(0x2545_f491_4f6c_dd1d);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
