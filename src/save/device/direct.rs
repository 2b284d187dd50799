//! Chunks that go from spare memory of a device to the region's file by cuFile (GPUDirect Storage), past host memory.
//!
//! Spare memory then has the payload's own layout, so that chunks lie in it as they do in the slot. Once the snapshot is taken
//! the device hashes them; hashes alone come to host memory, and copiers have cuFile write the chunks to their places.
//! Those that are partly in host memory, and the last one where it is shorter, go through the staging pool as ever.

use std::ops::Range;

use crate::cuda::gds::{Gds, GdsFile};
use crate::error::{Error, ErrorKind, Result};
use crate::source::DeviceSource;
use crate::store::Region;
use crate::sync::Arc;

/// Whether chunks go from a GPU to the file by GPUDirect Storage (cuFile), past host memory. What does not (a chunk that is partly in
/// host memory, or shorter than others) goes through the staging pool.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DirectStorage {
    /// Through the staging pool.
    #[default]
    Off,
    /// Where the state is first copied into spare memory, all of its GPU's part is on one GPU, the region is on the direct medium
    /// and not striped, and cuFile is there and does not itself go through host memory; else through the staging pool.
    Auto,
    /// As `Auto`, but the save fails (`Unsupported`) where that is not so. Whether cuFile itself goes through host memory (its
    /// compatibility mode) is up to its own configuration then.
    Required,
}

/// Size of a hash on the device.
pub(super) const HASH_BYTES: u64 = 16;
/// The first hash begins at a multiple of this.
const HASHES_ALIGN: u64 = 256;
/// What stands in host memory between a device's takes spare memory, too: not more than this.
const HOLES_MAX: u64 = 64 << 20;

const OP: &str = "save by GPUDirect Storage";

/// How a save's chunks lie in spare memory of its device, and which of them go directly.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Layout {
    /// Payload offset of the first byte of the spare: a chunk's first.
    base: u64,
    chunk_bytes: u64,
    /// Payload bytes there are room for.
    bytes: u64,
    /// Chunks that go directly, in order; never empty.
    runs: Vec<Range<u64>>,
}

impl Layout {
    /// Of a source, if some of its chunks can go directly.
    pub fn of(source: &DeviceSource, chunk_bytes: u64) -> Result<Layout> {
        match source.devices().len() {
            1 => Layout::of_runs(source.runs(), chunk_bytes),
            _ => Err(unsupported("the state is on several GPUs")),
        }
    }

    /// `places`: payload bytes that are on the device.
    fn of_runs(places: &[(u64, u64)], chunk_bytes: u64) -> Result<Layout> {
        let whole = |&(first, behind): &(u64, u64)| first.div_ceil(chunk_bytes)..behind / chunk_bytes;
        let runs: Vec<_> = places.iter().map(whole).filter(|run| !run.is_empty()).collect();
        let (Some(&(first, _)), Some(&(_, behind)), false) = (places.first(), places.last(), runs.is_empty())
        else {
            return Err(unsupported("no chunk of the state is on the GPU as a whole"));
        };
        let base = first / chunk_bytes * chunk_bytes;
        let on_device: u64 = places.iter().map(|&(first, behind)| behind - first).sum();
        if behind - first - on_device > HOLES_MAX {
            return Err(unsupported("too much host memory stands between that of the GPU"));
        }
        Ok(Layout { base, chunk_bytes, bytes: behind - base, runs })
    }

    /// Bytes of spare memory that it takes, hashes included.
    pub fn spare_bytes(&self) -> u64 {
        self.hashes_at() + HASH_BYTES * self.count()
    }

    /// Chunks that go directly.
    fn count(&self) -> u64 {
        self.runs.iter().map(|run| run.end - run.start).sum()
    }

    fn hashes_at(&self) -> u64 {
        self.bytes.next_multiple_of(HASHES_ALIGN)
    }

    /// Where a byte of the payload is in the spare.
    pub fn place(&self, offset: u64) -> u64 {
        offset - self.base
    }

    pub fn holds(&self, chunk: u64) -> bool {
        let next = self.runs.partition_point(|run| run.end <= chunk);
        self.runs.get(next).is_some_and(|run| run.contains(&chunk))
    }

    /// The chunks to hash when those of the first `hashed` are, at most `most`; none when all are.
    pub fn next_to_hash(&self, hashed: u64, most: u64) -> Option<Hashing> {
        let mut before = 0;
        for run in &self.runs {
            let count = run.end - run.start;
            if hashed < before + count {
                let first = run.start + (hashed - before);
                let chunks = first..run.end.min(first + most);
                let hashes = self.hashes_at() + HASH_BYTES * hashed;
                return Some(Hashing { at: self.place(first * self.chunk_bytes), chunks, hashes });
            }
            before += count;
        }
        None
    }
}

/// Chunks that are hashed by one launch, and where all of it is in the spare.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Hashing {
    pub chunks: Range<u64>,
    pub at: u64,
    pub hashes: u64,
}

impl Hashing {
    pub fn count(&self) -> u64 {
        self.chunks.end - self.chunks.start
    }

    /// The hashes in what was copied from the device.
    pub fn parse(&self, bytes: &[u8]) -> Vec<u128> {
        let parse = |hash: &[u8]| {
            let mut word = [0; HASH_BYTES as usize];
            word.copy_from_slice(hash);
            u128::from_le_bytes(word)
        };
        bytes.chunks_exact(HASH_BYTES as usize).take(self.count() as usize).map(parse).collect()
    }
}

/// The region's file, as cuFile knows it.
#[derive(Default)]
pub(super) struct DirectFile(Option<Arc<GdsFile>>);

impl DirectFile {
    /// Something may go there, or has.
    pub fn is_open(&self) -> bool {
        self.0.is_some()
    }

    /// Opens it, once.
    pub fn open(&mut self, region: &Region, how: DirectStorage) -> Result<Arc<GdsFile>> {
        if how == DirectStorage::Auto && !Gds::get()?.is_direct() {
            return Err(unsupported(
                "cuFile would itself copy through host memory here: nvidia-fs is not loaded",
            ));
        }
        if let Some(file) = &self.0 {
            return Ok(file.clone());
        }
        let lacking = || unsupported("the region is not one file on the direct medium");
        let place = region.medium().direct_file()?.ok_or_else(lacking)?;
        let file = Arc::new(GdsFile::register(place)?);
        self.0 = Some(file.clone());
        Ok(file)
    }
}

pub(super) fn unsupported(message: &str) -> Error {
    Error::new(ErrorKind::Unsupported, OP, message)
        .advise("save without direct_storage, or have the engine choose (auto)")
}

#[cfg(test)]
mod tests {
    use super::*;

    const CHUNK: u64 = 4096;

    #[test]
    fn whole_chunks_of_the_device_go_directly() {
        // The header, a tensor on the device, 100 bytes in host memory, another tensor, and its end within a chunk.
        let layout = Layout::of_runs(&[(300, 9 * CHUNK + 50), (9 * CHUNK + 150, 20 * CHUNK + 7)], CHUNK)
            .expect("some");
        assert_eq!(layout.runs, [1..9, 10..20]);
        let direct: Vec<u64> = (0..22).filter(|&chunk| layout.holds(chunk)).collect();
        assert_eq!(direct, (1..9).chain(10..20).collect::<Vec<_>>());
        assert_eq!(layout.place(300), 300);
        let hashes = (20 * CHUNK + 7).next_multiple_of(HASHES_ALIGN);
        assert_eq!(layout.spare_bytes(), hashes + 16 * 18);
        let all: Vec<_> = std::iter::successors(layout.next_to_hash(0, 5), |last| {
            let hashed = (last.hashes - hashes) / 16 + last.count();
            layout.next_to_hash(hashed, 5)
        })
        .collect();
        let expected = [(1..6, 0), (6..9, 5), (10..15, 8), (15..20, 13)];
        let expected = expected.map(|(chunks, before): (Range<u64>, u64)| Hashing {
            at: chunks.start * CHUNK,
            hashes: hashes + 16 * before,
            chunks,
        });
        assert_eq!(all, expected);
    }

    #[test]
    fn the_spare_begins_with_the_first_chunk_that_is_partly_on_the_device() {
        let layout = Layout::of_runs(&[(5 * CHUNK + 1, 8 * CHUNK)], CHUNK).expect("some");
        assert_eq!((layout.base, layout.bytes), (5 * CHUNK, 3 * CHUNK));
        assert_eq!(layout.runs, vec![6..8; 1]);
        assert_eq!(layout.place(6 * CHUNK), CHUNK);
    }

    #[test]
    fn where_no_chunk_can_go_directly_or_much_host_memory_stands_between_there_is_none() {
        for places in [vec![], vec![(0, CHUNK - 1)], vec![(1, CHUNK + 1)]] {
            let error = Layout::of_runs(&places, CHUNK).expect_err("none");
            assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
        }
        let far = HOLES_MAX + CHUNK;
        Layout::of_runs(&[(0, CHUNK), (far, far + CHUNK)], CHUNK).expect("64 MiB between");
        Layout::of_runs(&[(0, CHUNK), (far + 1, far + CHUNK)], CHUNK).expect_err("more");
    }
}
