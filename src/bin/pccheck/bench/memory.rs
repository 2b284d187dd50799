//! Huge-page blocks, the state that is saved, and how much memory is resident.

use std::fs;
use std::ops::{Deref, DerefMut};

use memmap2::{Advice, MmapMut};
use pccheck::engine::Tensor;
use pccheck::format::Dtype;
use pccheck::{Error, Result};

const HUGE_PAGE_BYTES: usize = 2 << 20;
const PAGE_BYTES: usize = 4096;
/// Parts of the state; each is a large and a small tensor.
const PARTS: usize = 64;
/// Bytes of the small tensor of each part.
const SMALL_BYTES: usize = 12 << 10;
/// Smallest state: each part has room for both its tensors.
pub const STATE_BYTES_MIN: u64 = (PARTS * SMALL_BYTES * 2) as u64;

/// Memory that was touched, in pages of 2 MiB where the kernel gives them.
pub struct HugeBlock {
    map: MmapMut,
    start: usize,
    len: usize,
}

impl HugeBlock {
    /// A block of `len` bytes, aligned to 2 MiB.
    pub fn new(len: usize) -> Result<HugeBlock> {
        let mut map = MmapMut::map_anon(len.next_multiple_of(HUGE_PAGE_BYTES) + HUGE_PAGE_BYTES)
            .map_err(|e| Error::io("allocate memory", &e))?;
        // A request: without huge pages everything here is slower, engine and ceilings alike.
        let _ = map.advise(Advice::HugePage);
        let start = map.as_ptr().align_offset(HUGE_PAGE_BYTES);
        for page in map[start..start + len].chunks_mut(PAGE_BYTES) {
            page[0] = 1;
        }
        Ok(HugeBlock { map, start, len })
    }
}

impl Deref for HugeBlock {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.map[self.start..self.start + self.len]
    }
}

impl DerefMut for HugeBlock {
    fn deref_mut(&mut self) -> &mut [u8] {
        &mut self.map[self.start..self.start + self.len]
    }
}

/// What is saved: tensors of a model's kind in one block, filled with bytes that cannot be compressed.
pub struct State {
    block: HugeBlock,
    names: Vec<(String, String)>,
    round: u64,
}

impl State {
    /// A state of `bytes` bytes, rounded up to whole pages in each part.
    pub fn new(bytes: u64) -> Result<State> {
        let len = (bytes as usize).next_multiple_of(PARTS * PAGE_BYTES);
        let mut block = HugeBlock::new(len)?;
        let mut random: u64 = 0x9e37_79b9_7f4a_7c15;
        for word in block.chunks_exact_mut(8) {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            word.copy_from_slice(&random.to_le_bytes());
        }
        let names = (0..PARTS).map(|n| (format!("layer.{n}.weight"), format!("layer.{n}.bias"))).collect();
        Ok(State { block, names, round: 0 })
    }

    /// All bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.block
    }

    /// Changes every page, as an update does.
    pub fn change(&mut self) {
        self.round += 1;
        let round = self.round.to_le_bytes();
        for page in self.block.chunks_mut(PAGE_BYTES) {
            page[..8].copy_from_slice(&round);
        }
    }

    /// Changes the page at a byte, and nothing else.
    pub fn change_at(&mut self, byte: usize) {
        self.round += 1;
        let round = self.round;
        self.block[byte..byte + 8].copy_from_slice(&round.to_le_bytes());
    }

    /// Shapes of the large and the small tensor of each part.
    pub fn shapes(&self) -> [[u64; 1]; 2] {
        let part = self.block.len() / PARTS;
        [[((part - SMALL_BYTES) / 4) as u64], [(SMALL_BYTES / 4) as u64]]
    }

    /// The state as tensors.
    pub fn tensors<'a>(&'a self, shapes: &'a [[u64; 1]; 2]) -> Vec<Tensor<'a>> {
        let part = self.block.len() / PARTS;
        let tensor =
            |name: &'a str, shape: &'a [u64], data: &'a [u8]| Tensor { name, dtype: Dtype::F32, shape, data };
        self.names
            .iter()
            .zip(self.block.chunks_exact(part))
            .flat_map(|((weight, bias), data)| {
                let (large, small) = data.split_at(part - SMALL_BYTES);
                [tensor(weight, &shapes[0], large), tensor(bias, &shapes[1], small)]
            })
            .collect()
    }

    /// The pieces of `block` that the tensors are restored to, by name.
    pub fn destinations<'a>(&'a self, block: &'a mut [u8]) -> Vec<(&'a str, &'a mut [u8])> {
        let part = self.block.len() / PARTS;
        self.names
            .iter()
            .zip(block.chunks_exact_mut(part))
            .flat_map(|((weight, bias), data)| {
                let (large, small) = data.split_at_mut(part - SMALL_BYTES);
                [(weight.as_str(), large), (bias.as_str(), small)]
            })
            .collect()
    }
}

/// Resident memory of this process, and the most it has been since the last reset.
pub struct Resident;

impl Resident {
    /// Bytes resident now.
    pub fn now() -> Option<u64> {
        Self::field("VmRSS:")
    }

    /// Forgets the peak; false where the kernel does not let it.
    pub fn reset_peak() -> bool {
        fs::write("/proc/self/clear_refs", "5").is_ok()
    }

    /// Peak in bytes.
    pub fn peak() -> Option<u64> {
        Self::field("VmHWM:")
    }

    fn field(name: &str) -> Option<u64> {
        let status = fs::read_to_string("/proc/self/status").ok()?;
        let line = status.lines().find_map(|line| line.strip_prefix(name))?;
        line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()?.checked_mul(1024)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensors_cover_the_state_and_changes_reach_every_page() {
        let mut state = State::new(STATE_BYTES_MIN).unwrap();
        let before = state.bytes().to_vec();
        let shapes = state.shapes();
        let total: usize = state.tensors(&shapes).iter().map(|tensor| tensor.data.len()).sum();
        assert_eq!(total, before.len());
        assert!(state.tensors(&shapes).iter().all(|tensor| tensor.data.len() as u64 == tensor.shape[0] * 4));
        state.change();
        let changed = before.chunks(PAGE_BYTES).zip(state.bytes().chunks(PAGE_BYTES));
        assert!(changed.into_iter().all(|(old, new)| old != new));
        let mut copy = vec![0; before.len()];
        for ((_, to), tensor) in state.destinations(&mut copy).into_iter().zip(state.tensors(&shapes)) {
            to.copy_from_slice(tensor.data);
        }
        assert!(copy == state.bytes());
    }

    #[test]
    fn resident_memory_is_known() {
        let now = Resident::now().unwrap();
        assert!(now > 1 << 20 && Resident::peak().unwrap() >= now);
    }
}
